"""Text for people on any terminal, pipe or log: what can't be shown is written otherwise, and ends no program.

Windows' cp1252, latin-1 and LC_ALL=C lack characters that texts of this project have (`│`, `…`) and that models
generate; a file's name may hold bytes that are no text at all.
"""

import codecs
import io
import os
import sys

READABLE = "longhaul.readable"  # an error handler for encoding; accept_any_text makes it known
LOOKALIKES = {"│": "|", "─": "-", "–": "-", "…": "...", "·": ".", "×": "x", "≥": ">=", "±": "+-", "█": "#", "░": "."}
FIRST_BYTE, LAST_BYTE = "\udc80", "\udcff"  # what Python makes of bytes of a name that are no text


def accept_any_text() -> None:
    """Make standard output and error accept every text, and standard input every byte, from here on."""
    codecs.register_error(READABLE, _readable)
    for stream, errors in ((sys.stdout, READABLE), (sys.stderr, READABLE), (sys.stdin, "surrogateescape")):
        if isinstance(stream, io.TextIOWrapper):  # None where it is closed; others' streams see to it themselves
            stream.reconfigure(errors=errors)


def as_typed(text: str) -> str:
    """A text from the command line or standard input, where the locale took its UTF-8 for bytes that are no text.

    What is no UTF-8 either becomes U+FFFD.
    """
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    except UnicodeEncodeError:  # surrogates that stand for no byte
        return text.encode("utf-8", "replace").decode("utf-8")


def printable(name: str) -> str:
    """A name for pictures and pages, its bytes that are no text as escapes such as `\\udcff`."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def print_exactly(text: str) -> None:
    """A line on standard output for a program: names of files and arguments as the bytes that they came as."""
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
