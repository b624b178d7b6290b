"""Which errors mean that memory ran out, whichever of the libraries it was that asked for it. No torch."""

import errno
import re

NO_MEMORY = re.compile(
    r"out of memory|not enough memory|(can't|cannot|unable to|failed to) allocate|bad_alloc|ALLOC_FAILED", re.I
)
_ASKED = re.compile(r"tried to allocate ([\d.]+ ?[KMG]iB|\d+ bytes)|allocate ([\d.]+ ?[KMG]iB)", re.I)
_DEVICE = re.compile(r"(GPU \d+) has a total capacity of ([\d.]+ GiB) of which ([\d.]+ [KMG]iB) is free")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is of memory that could not be had: Python's, NumPy's, torch's, or the system's."""
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and NO_MEMORY.search(str(error)) is not None


def what_was_asked(error: BaseException) -> str:
    """The amounts of memory that such an error mentions, in a few words; "" where it mentions none."""
    from common.progress import format_bytes  # here, as every command imports this module

    asked, device = _ASKED.search(str(error)), _DEVICE.search(str(error))
    words = []
    if asked:
        amount = asked[1] or asked[2]
        count = amount.removesuffix(" bytes")
        words.append(f"{format_bytes(int(count)) if count.isdecimal() else amount} more were asked for")
    if device:
        words.append(f"{device[1]} has {device[2]}, of which {device[3]} are free")
    return ", ".join(words)
