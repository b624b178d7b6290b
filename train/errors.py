"""What can end a run apart from a mistake in the command: raised on all ranks, or by the one that must exit."""

from common.errors import UserError


class NonFiniteLoss(Exception):
    """A loss or gradient norm that is NaN or inf; raised on all ranks, before the update, naming the culprits."""


class NonFiniteWeights(Exception):
    """The last update has left weights that are NaN or inf."""


class ReplicasDiffer(Exception):
    """The copies of the model have drifted apart: a faulty device, or a missed synchronisation."""


class LockLost(Exception):
    """Another trainer has taken over the run. This one must not touch it any more."""


class StorageFailed(UserError):
    """A file that the run needs can't be written. The same command may succeed later, and loses only steps."""


class SaveFailed(StorageFailed):
    """A checkpoint that could not be written; raised on all ranks alike. Earlier ones are intact."""

    def __init__(self, message: str, *, transient: bool = False) -> None:
        """Args: transient: another try may succeed in a moment."""
        super().__init__(message)
        self.transient = transient


class TooManySpikes(Exception):
    """More steps are left out than the run permits, or a spike that can't be rolled back; raised on all ranks."""
