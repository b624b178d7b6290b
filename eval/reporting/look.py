"""What a terminal can show, and lines cut off at its width."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Look:
    """What the terminal can show."""

    unicode: bool
    color: bool

    def paint(self, text: str, code: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self.color and text else text


def fit(text: str, width: int, look: Look) -> str:
    """A line as the terminal can show it, cut off at its width."""
    text = "".join(character if character.isprintable() else " " for character in text)
    text = text if look.unicode else text.encode("ascii", "replace").decode()
    mark = "…" if look.unicode else "~"
    return text if len(text) <= width else text[: max(0, width - 1)] + mark
