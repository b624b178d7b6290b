"""Text for people on any terminal, pipe or log: what can't be shown is replaced, and never ends a program.

Windows' cp1252, latin-1 and LC_ALL=C lack characters that texts of this project have (`│`, `…`) and that models
generate; a file's name may hold undecodable bytes. Names, samples, tokens and the contents of files may
hold control characters, which would move a terminal's cursor, clear it or set its title: they are shown as escapes.
Standard output and error do it themselves (`PlainStream`), so that no print can forget it.
"""

import codecs
import contextlib
import io
import os
import re
import sys
from collections.abc import Iterator
from typing import Any, TextIO, cast

# C0 but tab and newline, DEL, C1, and what reorders the text around it (bidi embeddings, overrides, isolates)
_CONTROLS = "\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069"
_BREAKS = "\t\n\u2028\u2029"
_HIDDEN = re.compile(f"[\udc80-\udcff]+|[{_CONTROLS}]")
_HIDDEN_OR_BREAK = re.compile(f"[\udc80-\udcff]+|[{_CONTROLS}{_BREAKS}]")
_HIDDEN_BYTES = "\udc80-\udc9f"  # C1 to terminals of eight bits
_BAR_CODES = re.compile(r"(\r|\x1b\[A)")  # to the line's start, and up a line: all that tqdm's bars need
READABLE = "longhaul.readable"  # an error handler for encoding; accept_any_text makes it known
LOOKALIKES = {"│": "|", "─": "-", "–": "-", "…": "...", "·": ".", "×": "x", "≥": ">=", "±": "+-", "█": "#", "░": "."}
FIRST_BYTE, LAST_BYTE = "\udc80", "\udcff"  # what Python makes of undecodable bytes in a name


def accept_any_text() -> None:
    """Make standard output and error show every text, and standard input accept every byte, from here on."""
    codecs.register_error(READABLE, _readable)
    # None where one is closed; others' streams see to it themselves
    sys.stdout, sys.stderr = _plain(sys.stdout), _plain(sys.stderr)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")


class PlainStream(io.TextIOWrapper):
    """Standard output or error that shows control characters as escapes, and writes every text somehow."""

    mode = "w"

    def __init__(self, stream: io.TextIOWrapper) -> None:
        stream.flush()
        self._below = stream  # whose end would close the file
        super().__init__(
            stream.buffer,
            encoding=stream.encoding,
            errors=READABLE,
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )

    def write(self, text: str) -> int:
        return super().write(shown(text))

    def write_exactly(self, text: str) -> int:
        """For this program's own control characters, and for output that isn't a terminal."""
        return super().write(text)

    def close(self) -> None:
        """The file below is the interpreter's to close."""
        self.flush()


class BarFile:
    """Standard error for a progress bar, whose own control characters pass: all others don't."""

    def __init__(self, stream: PlainStream) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        parts = _BAR_CODES.split(text)  # texts and codes in turn
        return self._stream.write_exactly("".join(p if n % 2 else shown(p) for n, p in enumerate(parts)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __eq__(self, other: object) -> bool:
        """tqdm clears its bars while something is written to the same stream: the stream below is that."""
        return other is self or other is self._stream

    def __hash__(self) -> int:
        return hash(self._stream)


def bar_file() -> TextIO:
    """Where a progress bar of this project is drawn: standard error."""
    return cast(TextIO, BarFile(sys.stderr)) if isinstance(sys.stderr, PlainStream) else sys.stderr


@contextlib.contextmanager
def others_bars() -> Iterator[None]:
    """Let the bars of a library that draws them on standard error by itself be drawn there."""
    before, sys.stderr = sys.stderr, bar_file()
    try:
        yield
    finally:
        sys.stderr = before


def shown(text: str) -> str:
    """A text as it is shown: its control characters but tab and newline as escapes such as `\\x1b`.

    Undecodable bytes of a name stay as they are, but for those that eight-bit terminals take for commands.
    """
    return _HIDDEN.sub(lambda found: _escaped(found[0], _CONTROLS), text)


def one_line(text: str) -> str:
    """A name or another text from elsewhere where it must not end a line or a column: `shown`, without breaks."""
    return _HIDDEN_OR_BREAK.sub(lambda found: _escaped(found[0], _CONTROLS + _BREAKS), text)


def _escaped(found: str, hidden: str) -> str:
    """What may not go out as it is.

    Args:
        found: one such character, or a name's bytes: UTF-8, perhaps, that the locale has taken for no text.
    """
    is_hidden = re.compile(f"[{hidden}{_HIDDEN_BYTES}]").match
    text = found.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")
    shown_text = "".join(_escape(character) if is_hidden(character) else character for character in text)
    if found[0] < FIRST_BYTE or found[0] > LAST_BYTE:
        return shown_text
    return shown_text.encode("utf-8", "surrogateescape").decode("ascii", "surrogateescape")  # as the bytes that came


def _escape(character: str) -> str:
    if FIRST_BYTE <= character <= LAST_BYTE:
        return f"\\x{ord(character) & 0xFF:02x}"
    return character.encode("unicode_escape").decode("ascii")


def print_text(text: str) -> None:
    """What a model generates or a corpus holds, at once: shown on a terminal, exactly in a file or a pipe."""
    if isinstance(sys.stdout, PlainStream) and not sys.stdout.isatty():
        sys.stdout.write_exactly(text)
    else:
        sys.stdout.write(text)
    sys.stdout.flush()


def print_codes(codes: str) -> None:
    """Control characters of this program's own, for a terminal."""
    (sys.stdout.write_exactly if isinstance(sys.stdout, PlainStream) else sys.stdout.write)(codes)


def _plain(stream: TextIO) -> TextIO:
    is_ours = isinstance(stream, PlainStream) or not isinstance(stream, io.TextIOWrapper)
    return stream if is_ours else PlainStream(cast(io.TextIOWrapper, stream))


def as_typed(text: str) -> str:
    """A text from the command line or standard input whose UTF-8 the locale could not decode.

    What isn't UTF-8 either becomes U+FFFD.
    """
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    except UnicodeEncodeError:  # surrogates that stand for no byte
        return text.encode("utf-8", "replace").decode("utf-8")


def printable(name: str) -> str:
    """A name for pictures, pages and tables, on one line, its undecodable bytes as escapes such as `\\udcff`."""
    return one_line(name).encode("utf-8", "backslashreplace").decode("utf-8")


def print_exactly(text: str) -> None:
    """A line on standard output for a program: names of files and arguments as the bytes they were given as."""
    sys.stdout.flush()
    sys.stdout.buffer.write(os.fsencode(text + "\n"))
    sys.stdout.buffer.flush()


def _readable(error: UnicodeError) -> tuple[str | bytes, int]:
    """One character that an encoding lacks: a name's byte as it is, a lookalike, or an escape such as `\\u2581`."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    character, end = error.object[error.start], error.start + 1
    if FIRST_BYTE <= character <= LAST_BYTE:
        return bytes([ord(character) & 0xFF]), end
    return LOOKALIKES.get(character) or character.encode("ascii", "backslashreplace").decode("ascii"), end
