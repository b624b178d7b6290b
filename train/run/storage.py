"""A file system that refuses what a run has to write: for a moment, or permanently."""

import errno
import sys
import time

from common.progress import format_duration

# Errors of shared file systems while a server restarts, a lease is renewed or a quota is raised.
_TRANSIENT = (
    "EIO ESTALE EDQUOT ETIMEDOUT EAGAIN EBUSY EINTR ENOLCK EREMOTEIO ENODEV ENXIO ECOMM "
    "EHOSTDOWN EHOSTUNREACH ENETDOWN ENETUNREACH ECONNREFUSED ECONNRESET ECONNABORTED ENOTCONN ESHUTDOWN"
)
TRANSIENT = {getattr(errno, name) for name in _TRANSIENT.split() if hasattr(errno, name)}
NO_ROOM = {errno.ENOSPC, errno.EROFS} | ({errno.EDQUOT} if hasattr(errno, "EDQUOT") else set())
RETRY_DELAYS = (5.0, 30.0)  # seconds from a try to the next


def is_transient(error: OSError) -> bool:
    """Whether the same call may succeed in a moment."""
    return error.errno in TRANSIENT


class Patience:
    """Waits at a start where the file system fails for a moment: for all of `RETRY_DELAYS`, and no longer."""

    def __init__(self) -> None:
        self._delays = list(RETRY_DELAYS)

    def waited(self, error: OSError) -> bool:
        """Wait, where that may help; return whether the call that failed is worth another try."""
        if not self._delays or not is_transient(error):
            return False
        delay = self._delays.pop(0)
        why = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        print(f"WARNING: {why}: trying again in {format_duration(delay)}", file=sys.stderr, flush=True)
        time.sleep(delay)
        return True
