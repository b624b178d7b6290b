"""Tokens to text as they arrive, showing only what later tokens can't change."""

from collections.abc import Sequence

from data_prep.tokenization.tokenizer import Tokenizer

INCOMPLETE = "\ufffd"  # the decoding of a character whose last bytes are still missing


class TextStream:
    """A text being generated. What `push` and in the end `finish` return, joined, is the whole text.

    The bytes of an unfinished character are held back, and whatever may turn out to start a stop string. The ids may
    start a text, or (`continues`) continue a prompt.

    Attributes:
        text: everything given out so far.
        stopped: a stop string was found; it and what follows are not part of the text.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), *, continues: bool = False) -> None:
        assert all(stops), "a stop string is empty, and would end every text at once"
        self._tokenizer = tokenizer
        self._stops = stops
        self._ids: list[int] = []  # since the text last ended in a whole character
        self._continues = continues  # what these ids follow is of the same document
        self._read = 0  # whole characters of their text that have been used
        self._held = ""  # whole characters that may start a stop string
        self.text = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that has become certain with these ids."""
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
        """The rest, once there are no more tokens."""
        if not self.stopped:
            self._held += self._tokenizer.decode(self._ids, continues=self._continues)[self._read :]
            self._ids, self._read = [], 0
            return self._give(self._certain(at_the_end=True))
        return ""

    def _certain(self, at_the_end: bool = False) -> int:
        """How many of the held characters may be returned."""
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
    """Characters at the end of `text` that start `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
