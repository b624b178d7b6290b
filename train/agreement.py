"""One rank decides, all know."""

from collections.abc import Callable
from typing import TypeVar

from common.errors import UserError
from model.ranks import Ranks

Decision = TypeVar("Decision")


def agreed(ranks: Ranks, decide: Callable[[], Decision]) -> Decision:
    """What rank 0 decides, on all ranks; its UserError too."""
    outcome: Decision | UserError | None = None
    if ranks.is_first:
        try:
            outcome = decide()
        except UserError as error:
            outcome = error
    outcome = ranks.from_first(outcome)
    if isinstance(outcome, UserError):
        raise outcome
    return outcome
