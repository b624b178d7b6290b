"""A file system that does not take what a run has to write: for a moment, or for good."""

import errno

from common.errors import UserError

# What shared file systems answer while a server restarts, a lease is renewed or a quota is raised.
_TRANSIENT = (
    "EIO ESTALE EDQUOT ETIMEDOUT EAGAIN EBUSY EINTR ENOLCK EREMOTEIO ENODEV ENXIO ECOMM "
    "EHOSTDOWN EHOSTUNREACH ENETDOWN ENETUNREACH ECONNREFUSED ECONNRESET ECONNABORTED ENOTCONN ESHUTDOWN"
)
TRANSIENT = {getattr(errno, name) for name in _TRANSIENT.split() if hasattr(errno, name)}
NO_ROOM = {errno.ENOSPC, errno.EROFS} | ({errno.EDQUOT} if hasattr(errno, "EDQUOT") else set())
RETRY_DELAYS = (5.0, 30.0)  # seconds from a try to the next


class StorageFailed(UserError):
    """What the run has to write can't be written. The same command may succeed later, and loses no more than steps."""


def is_transient(error: OSError) -> bool:
    """Whether the same call may succeed in a moment."""
    return error.errno in TRANSIENT
