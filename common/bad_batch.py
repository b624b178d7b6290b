"""What was found in a batch that a step did not learn from, as `bad-batches/step-….json` in a run's folder holds it."""

from typing_extensions import TypedDict

from common.json_file import Count, Finite, keep_others, read_json_for_user
from common.run_folder import RunFolder


@keep_others
class BadBatch(TypedDict):
    """Of the batch's worst sequence. Lists have a value for each block, null for one that is NaN or inf."""

    step: Count
    why: str
    sequence: Count
    rank: Count  # which had it
    loss: Finite | None
    activation_max: list[Finite | None]  # of the residual stream after the block
    first: str | None  # forward or backward, and where the first value that is NaN or inf came up


def read_bad_batches(folder: RunFolder) -> list[BadBatch]:
    """Those of a run, by step; none of a run without. Raises UserError."""
    files = sorted(folder.bad_batch(0).parent.glob("step-*.json"))
    return [read_json_for_user(path, BadBatch, "move it away") for path in files]


def layer_at_fault(first: str | None, activation_max: list[float | None]) -> str:
    """Where the first value that is NaN or inf came up; else where the largest one is."""
    if first is not None:
        return f"NaN or inf came up first in the {first}"
    known = {block: value for block, value in enumerate(activation_max) if value is not None}
    if not known:
        return "all values are finite"
    block = max(known, key=known.__getitem__)
    return f"all values are finite, the largest, {known[block]:.4g}, is after h.{block}"
