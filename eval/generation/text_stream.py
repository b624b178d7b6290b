"""Tokens to text while they come, showing only what later tokens can't change."""

from collections.abc import Sequence

from data_prep.tokenization.tokenizer import Tokenizer

INCOMPLETE = "\ufffd"  # what decoding makes of a character whose last bytes are still to come


class TextStream:
    """One text in the making. What `push` returns, and at last `finish`, is joined the whole text.

    Held back are the bytes of an unfinished character, and whatever may turn out to begin a stop string. What comes may
    start a text, or (`continues`) continue a prompt.

    Attributes:
        text: everything given out so far.
        stopped: a stop string has come; it and what follows are no part of the text.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), *, continues: bool = False) -> None:
        assert all(stops), "an empty stop string would end every text at once"
        self._tokenizer = tokenizer
        self._stops = stops
        self._ids: list[int] = []  # since the text last ended in a whole character
        self._continues = continues  # what these ids follow is of the same document
        self._read = 0  # characters of their text that are whole and taken over
        self._held = ""  # whole characters that may begin a stop string
        self.text = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that is certain now and was not before."""
        self._ids.append(token)
        decoded = self._tokenizer.decode(self._ids, continues=self._continues)
        whole = decoded.removesuffix(INCOMPLETE)
        self._held += whole[self._read :]
        self._read = len(whole)
        if whole == decoded:
            self._ids, self._read = [], 0
            self._continues = token not in (self._tokenizer.begin_of_text_id, self._tokenizer.end_of_text_id)
        return self._give(self._certain())

    def finish(self) -> str:
        """The rest, when no more tokens come."""
        if not self.stopped:
            self._held += self._tokenizer.decode(self._ids, continues=self._continues)[self._read :]
            self._ids, self._read = [], 0
            return self._give(self._certain(at_the_end=True))
        return ""

    def _certain(self, at_the_end: bool = False) -> int:
        """How many of the held characters may be given out."""
        found = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return min(found)
        if at_the_end:
            return len(self._held)
        held = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        return len(self._held) - held

    def _give(self, count: int) -> str:
        given, self._held = self._held[:count], self._held[count:]
        self.text += given
        return given


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` that begin `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
