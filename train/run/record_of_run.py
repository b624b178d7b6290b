"""What mirrors get of a run that is on disk, and whether the run is still writing it."""

import sys
from typing import Any

from common.curves import KnownCurves
from common.errors import UserError
from common.metrics_file import holding, read_records
from common.processes import ProcessIdentity
from common.rewritten_file import read_record
from common.run_files import leniently, read_samples, unreadable
from common.run_folder import RunFolder
from train.run.mirror import as_sample, is_mirrored


def mirrored_records(folder: RunFolder) -> list[dict[str, Any]]:
    """The records that are part of a curve, by step, and behind each step's the texts that were generated then.

    What can't be read of the rest is named on standard error. Raises UserError where there is none.
    """
    try:
        written = read_records(folder.metrics)
    except OSError as error:
        raise UserError(unreadable(folder.metrics, error)) from None
    known, complaints = KnownCurves.of(written), list[str]()
    records = [record for record in holding(written) if is_mirrored(record, known)]
    if not records:
        raise UserError(f"{folder.metrics} holds no record: give the folder of a run that has started")
    samples = leniently(lambda: read_samples(folder), complaints) or []
    for complaint in filter(None, [known.complaint_about(folder.metrics), *complaints]):
        print(f"left out: {complaint}", file=sys.stderr)
    last = records[-1]["step"]
    newest = {(sample["step"], str(sample.get("prompt"))): sample for sample in samples}  # of what was overwritten
    texts = [as_sample(sample) for sample in newest.values() if sample["step"] <= last]
    return sorted([*records, *texts], key=lambda record: int(record["step"]))


def is_being_trained(folder: RunFolder) -> bool:
    """Whether the run's lock is there, and its owner not certainly gone."""
    owner = read_record(folder.lock)
    if owner is None:
        return False
    try:
        return not ProcessIdentity.from_record(owner).is_gone()
    except KeyError:
        return True
