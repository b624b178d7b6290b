"""Whether a disturbed run is the undisturbed one, judged from its files by code of its own."""

import contextlib
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.metrics_file import read_json_lines, read_metrics
from common.run_folder import RunFolder

COMPARED = ("loss", "grad_norm", "lr", "tokens", "sequences", "val_loss", "val_tokens")


@dataclass(frozen=True)
class Comparison:
    """differing_steps: steps whose training or validation record differs, is missing or superfluous. parameters: of
    the final checkpoint, whether all tensors (optimizer state too) are the same bytes."""

    differing_steps: list[int]
    same_parameters: bool


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
