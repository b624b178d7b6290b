"""GPT-2's encoding by tiktoken, faster: the same ids, the text cut into pieces without look-ahead.

GPT-2's pattern cuts a text into pieces, which merges never cross, and leaves the last of several white-space characters
to what follows: `\\s+(?!\\S)` (Radford et al. 2019). To look ahead, tiktoken needs a backtracking engine, which takes
most of its time. Here every such place is marked first, with a character that the pattern doesn't match and tiktoken
therefore passes over; what is left is a regular expression, found in one pass.
"""

from typing import Any

import numpy as np

from data_prep.tokenization.byte_level import BYTE_SHOWN_AS
from data_prep.tokenization.cached_files import carried_gpt2_file

MARK = "\x10"  # a control character that texts hardly ever have: one with its own is encoded the usual way
# tiktoken's, but for ` ?[^\s\p{L}\p{N}]+` without the mark and `\s+` for `\s+$|\s+(?!\S)|\s`
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}\x10]+|\s+"
# What \s is: Unicode's White_Space. Python's str.isspace counts U+001C … U+001F too.
WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"

_IS_WHITE_SPACE = np.zeros(0x3002, dtype=np.bool_)  # by code point; the last stands for all above
_IS_WHITE_SPACE[[ord(character) for character in WHITE_SPACE]] = True


class Gpt2Encoding:
    """50,257 ids, or fewer: the bytes, GPT-2's first merges, which are the most frequent ones, and end of text.

    Texts that have the mark need tiktoken's vocabulary files in its cache.
    """

    def __init__(self, vocab_size: int = 50_257) -> None:
        from tiktoken import Encoding  # here, so that byte and character sets need no tiktoken

        self.end_of_text_id = vocab_size - 1
        self._facts: dict[str, Any] = {
            "name": "gpt2",
            "mergeable_ranks": {piece: i for i, piece in enumerate(pieces_of_gpt2()[: self.end_of_text_id])},
            "special_tokens": {"<|endoftext|>": self.end_of_text_id},
            "explicit_n_vocab": vocab_size,
        }
        self._usual: Any = None
        self._encoding = Encoding(**self._facts, pat_str=PATTERN)

    def pieces(self) -> list[bytes]:
        """The bytes that each id stands for, the end of text's name included."""
        return [self._encoding.decode_single_token_bytes(i) for i in range(self._encoding.n_vocab)]

    def encode(self, text: str) -> np.ndarray[Any, np.dtype[np.uint32]]:
        """Ids (n,) as tiktoken's encode_ordinary gives them. Raises UnicodeEncodeError for a lone surrogate."""
        if MARK in text:
            if self._usual is None:
                from tiktoken import Encoding
                from tiktoken_ext.openai_public import ENCODING_CONSTRUCTORS

                self._usual = Encoding(**{**ENCODING_CONSTRUCTORS["gpt2"](), **self._facts})
            return self._usual.encode_to_numpy(text, disallowed_special=())
        return self._encoding.encode_to_numpy(marked(text), disallowed_special=())

    def decode(self, ids: list[int]) -> str:
        return self._encoding.decode(ids, errors="replace")


def pieces_of_gpt2() -> list[bytes]:
    """What GPT-2's ids stand for, its end of text left out: the bytes, then what the merges make, in their order.

    tiktoken's own function gives the same in about 0.6 s. Raises UserError where the copy of the merges is damaged.
    """
    _, *merges = carried_gpt2_file("vocab.bpe").decode("utf-8").splitlines()
    shown = str.maketrans(BYTE_SHOWN_AS)
    made = [merge.replace(" ", "").translate(shown).encode("latin-1") for merge in merges]
    return [bytes([byte]) for byte in BYTE_SHOWN_AS.values()] + made


def marked(text: str, *, newlines: bool = True) -> str:
    """The text with a mark before every last of several white-space characters that something else follows.

    Args:
        newlines: also where the last of them is a line break.
    """
    points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    space = _IS_WHITE_SPACE.take(points, mode="clip")
    last = space[1:-1] if newlines else space[1:-1] & (points[1:-1] != ord("\n")) & (points[1:-1] != ord("\r"))
    cuts = (np.flatnonzero(space[:-2] & last & ~space[2:]) + 1).tolist()
    return MARK.join([text[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True)])
