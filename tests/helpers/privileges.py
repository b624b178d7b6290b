"""A process that modes of files hold back, as they do every user's but root's."""

import ctypes
import os
import struct

_VERSION = 0x20080522  # of Linux's capabilities: two times 32 of them
_DAC_OVERRIDE, _DAC_READ_SEARCH = 1, 2


def obey_modes() -> None:
    """Take from this process, for good, root's right to read and write what modes forbid. It stays the same user, who
    may still need files below /root. Raises OSError where that isn't allowed."""
    if os.geteuid() != 0:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = struct.pack("Ii", _VERSION, 0)
    held = ctypes.create_string_buffer(24)
    if libc.capget(header, held) != 0:
        raise OSError(ctypes.get_errno(), "capget")
    parts = list(struct.unpack("6I", held.raw))
    kept = ~(1 << _DAC_OVERRIDE | 1 << _DAC_READ_SEARCH) & 0xFFFFFFFF
    parts[:3] = [part & kept for part in parts[:3]]  # effective, permitted, inheritable
    if libc.capset(header, struct.pack("6I", *parts)) != 0:
        raise OSError(ctypes.get_errno(), "capset")
