"""Whether a disturbed run is the undisturbed one, judged from its files by code of its own."""

import contextlib
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.metrics_file import read_json_lines, read_metrics
from common.run_folder import RunFolder

EXACT = ("lr", "tokens", "sequences", "source_tokens", "target_tokens", "val_tokens")  # for any number of ranks
SUMMED = ("loss", "grad_norm", "val_loss")
BY_SOURCE = "val_loss_by_source"
COMPARED = (*EXACT, *SUMMED, BY_SOURCE)
TOLERANCE = 1e-5  # relative, of sums in another order


@dataclass(frozen=True)
class Comparison:
    """differing_steps: steps whose training or validation record differs, is missing or superfluous. parameters: of
    the final checkpoint, whether all tensors (optimizer state too) are the same bytes. largest_difference: of losses
    and gradient norms, relative, where they need not be equal."""

    differing_steps: list[int]
    same_parameters: bool
    largest_difference: float = 0.0


def compare(reference: RunFolder, run: RunFolder) -> Comparison:
    """Compare a finished run with an undisturbed one, step by step and to the bit.

    Lines that a resume or roll-back superseded are held to the same standard: they were the same steps.
    """
    expected = by_step(read_metrics(reference.metrics))
    found = by_step(read_metrics(run.metrics))
    ever = by_step(read_json_lines(reference.metrics))  # what the reference itself was rolled back over, too
    differing = {step for step, _ in expected.items() ^ found.items()}
    for record in read_json_lines(run.metrics):
        differing |= {step for step, values in by_step([record]).items() if values - ever.get(step, frozenset())}
    tensors = [final_tensors(folder.checkpoints) for folder in (reference, run)]
    return Comparison(sorted(differing), tensors[0] is not None and tensors[0] == tensors[1])


def compare_closely(reference: RunFolder, run: RunFolder) -> Comparison:
    """Compare a finished run whose number of ranks has changed with an undisturbed one.

    What it read must be the same exactly, also what a resume superseded; losses and norms to within `TOLERANCE`. Final
    parameters are not compared: where a gradient is 0 but for rounding, Adam makes steps of the rounding.
    """
    expected = {_place(record): record for record in _measured(read_metrics(reference.metrics))}
    found = _measured(read_metrics(run.metrics))
    differing = {step for step, _ in expected.keys() ^ {_place(record) for record in found}}
    largest = 0.0
    for record in _measured(read_json_lines(run.metrics)):
        wanted = expected.get(_place(record), {})
        largest = max(largest, difference := _relative_difference(wanted, record))
        if difference > TOLERANCE or any(record.get(key) != wanted.get(key) for key in EXACT):
            differing.add(record["step"])
    return Comparison(sorted(differing), same_parameters=True, largest_difference=largest)


def _measured(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record for record in records if "kind" not in record and isinstance(record.get("step"), int)]


def _place(record: dict[str, Any]) -> tuple[int, bool]:
    """The step, and whether it is a validation's record."""
    return record["step"], "val_loss" in record


def _relative_difference(wanted: dict[str, Any], found: dict[str, Any]) -> float:
    """The largest of the figures that two records have; infinite where only one has it."""
    pairs = [(wanted.get(key), found.get(key)) for key in SUMMED]
    sources = [record.get(BY_SOURCE) or {} for record in (wanted, found)]
    pairs += [(sources[0].get(name), sources[1].get(name)) for name in sources[0] | sources[1]]
    differences = [0.0]
    for a, b in pairs:
        if (a is None) != (b is None):
            return math.inf
        if a is not None and b is not None:
            differences.append(abs(a - b) / abs(a))
    return max(differences)


def by_step(records: list[dict[str, Any]]) -> dict[int, frozenset[str]]:
    """What must not differ, by step: the compared fields of its training and its validation record, as exact text."""
    steps: dict[int, frozenset[str]] = {}
    for record in records:
        if "kind" not in record and isinstance(record.get("step"), int):
            values = json.dumps({key: record[key] for key in COMPARED if key in record})
            steps[record["step"]] = steps.get(record["step"], frozenset()) | {values}
    return steps


def whole_records(content: bytes) -> list[dict[str, Any]]:
    """Every whole JSON object among lines; the last line may still be torn."""
    records = []
    for line in content.splitlines():
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict):
                records.append(record)
    return records


def last_step(records: list[dict[str, Any]]) -> int | None:
    """The last training step recorded; None if there is none. (Not the highest: a run goes back.)"""
    steps = [record["step"] for record in records if "kind" not in record and "loss" in record]
    return steps[-1] if steps else None


def newest_whole(checkpoints: Path) -> int:
    """The step a run must go on from: of its newest whole checkpoint, or 0."""
    broken = broken_checkpoints(checkpoints)
    return max((int(path.name[5:]) for path in checkpoints.glob("step-????????") if path not in broken), default=0)


def final_tensors(checkpoints: Path) -> str | None:
    """SHA-256 over every tensor of the newest checkpoint, by name, in whatever files they lie."""
    from safetensors import safe_open

    folders = sorted(checkpoints.glob("step-????????"))
    if not folders:
        return None
    tensors = {}
    for path in folders[-1].glob("*.safetensors"):
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                tensor = file.get_tensor(name)
                tensors[f"{path.name.split('-')[0]} {name}"] = (str(tensor.dtype), tensor.shape, tensor.tobytes())
    digest = hashlib.sha256()
    for name in sorted(tensors):
        dtype, shape, content = tensors[name]
        digest.update(f"{name} {dtype} {shape}\n".encode() + content)
    return digest.hexdigest()


def broken_checkpoints(checkpoints: Path) -> dict[Path, str]:
    """Published checkpoints that are not whole, and what is wrong with each."""
    broken = {}
    for folder in sorted(checkpoints.glob("step-????????")):
        try:
            manifest = json.loads((folder / "checkpoint.json").read_text())
            for name, entry in manifest["files"].items():
                content = (folder / name).read_bytes()
                if (len(content), hashlib.sha256(content).hexdigest()) != (entry["bytes"], entry["sha256"]):
                    broken[folder] = f"{name} is not what the manifest says"
            own = manifest.pop("manifest_sha256", None)
            content = json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()
            if own not in (hashlib.sha256(content).hexdigest(), None):
                broken[folder] = "the manifest is not what its hash says"
            if not any(name.startswith("optimizer-") for name in manifest["files"]):
                broken[folder] = "no optimizer state"
        except (OSError, ValueError, KeyError) as error:
            broken[folder] = f"{type(error).__name__}: {error}"
    return broken
