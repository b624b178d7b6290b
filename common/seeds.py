"""Seeds made from words: the same on every rank and device, whatever else has been drawn."""

import hashlib

import numpy as np
import numpy.typing as npt


def seed_of(words: str, bits: int = 64) -> int:
    """The first `bits` bits of the words' SHA-256, 64 at most. (torch takes seeds below 2^63 on every device.)"""
    return int.from_bytes(hashlib.sha256(words.encode()).digest()[:8], "little") >> (64 - bits)


def keys_of(words: str, count: int) -> npt.NDArray[np.uint64]:
    """So many numbers of 64 bits, 8 at most, from the words' SHA-512: (count,) uint64."""
    return np.frombuffer(hashlib.sha512(words.encode()).digest(), dtype="<u8")[:count].astype(np.uint64)
