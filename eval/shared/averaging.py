"""The mean of a run's last checkpoints (Izmailov et al. 2018, arXiv:1803.05407), published as a checkpoint."""

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from common.checkpoint_files import (
    CHECKPOINT_MANIFEST,
    BadCheckpoint,
    list_weights,
    read_checkpoint_manifest,
    verify_checkpoint,
    weights_identity,
    write_checkpoint_manifest,
)
from common.checkpoint_manifest import CheckpointManifest, origin_of
from common.errors import UserError
from common.os_errors import refusal
from common.publish import TEMPORARY_SUFFIX, publish_folder, sha256_file
from common.run_folder import RunFolder
from common.version import VERSION
from model.config import config_from_dict
from model.weights import fitting_checkpoint, read_shapes, reading_tensors, save_tensors

WEIGHTS_FILE = "weights-00000-of-00001.safetensors"
# Of the newest checkpoint's manifest what holds for the mean as well; losses, loss scale and spikes are its own.
KEPT = (
    "model", "tokenizer", "data_identity", "step", "tokens", "sequences", "config", "position_in", "mix", "warm_up",
    "base",
)  # fmt: skip


def average_last(run: Path, count: int, out: Path | None) -> dict[str, Any]:
    """Publish the mean of a run's `count` newest checkpoints, kept weights included; return its origin as JSON has it.

    Args:
        out: the folder to make; None: one beside the checkpoints.

    Raises UserError where fewer are whole, or they don't fit together.
    """
    chosen = newest_whole(run, count)
    manifests = [check_alike(path, chosen[-1]) for path in chosen]
    last = manifests[-1]
    if out is None:
        out = RunFolder(run).checkpoints / f"average-{last['step']:08d}-last-{count}"
        if os.path.lexists(out):
            raise UserError(f"{out} is already there: use it, move it away, or name another folder with --out")
    average = {
        "kind": "mean",
        "run": str(run),
        "of": [
            {"checkpoint": path.name, "step": manifest["step"], "sha256": weights_identity(manifest)}
            for path, manifest in zip(chosen, manifests, strict=True)
        ],
    }
    facts = {key: value for key, value in last.items() if key in KEPT} | {"average": average, "weights_only": True}
    try:
        publish(out, mean_of(chosen), facts)
    except OSError as error:
        raise UserError(refusal("written", error, error.filename or out, otherwise="name another --out")) from None
    print(f"{out}: {origin_of(read_checkpoint_manifest(out))}")
    return {"checkpoint": str(out), **average}


def newest_whole(run: Path, count: int) -> list[Path]:
    """The folders of a run's newest whole checkpoints, oldest first; of a step whose checkpoint is gone, its weights.

    Raises UserError where there are fewer.
    """
    if (run / CHECKPOINT_MANIFEST).exists():
        raise UserError(f"{run} is one checkpoint: give the folder of a run, which has several")
    chosen: list[Path] = []
    complaints: list[str] = []
    for _, folders in list_weights(RunFolder(run).checkpoints):
        for folder in folders:
            try:
                verify_checkpoint(folder)
            except BadCheckpoint as error:
                complaints.append(str(error))
            else:
                chosen.append(folder)
                break
        if len(chosen) == count:
            for complaint in complaints:
                print(f"passed over: {complaint}", file=sys.stderr)
            return chosen[::-1]
    why = f" ({'; '.join(complaints)})" if complaints else ""
    raise UserError(
        f"{run} has {len(chosen)} whole checkpoints{why}, fewer than --last {count}: lower --last, or have the run "
        "keep more (checkpoint.keep_last, checkpoint.weights_every_steps)"
    )


def check_alike(checkpoint: Path, newest: Path) -> CheckpointManifest:
    """Raises UserError where a checkpoint's files are not its model's, or its model is not the newest one's."""
    fitting = fitting_checkpoint(checkpoint)
    manifest, last = read_checkpoint_manifest(checkpoint), read_checkpoint_manifest(newest)
    if fitting.lora is not None or last.get("lora") is not None:
        raise UserError(f"{checkpoint} holds adapters, whose products have another mean: average runs of whole weights")
    ours, theirs = vars(fitting.config), vars(config_from_dict(last["model"], newest))
    for name, value in ours.items():
        if value != theirs[name]:
            raise UserError(
                f"{checkpoint} has model.{name} {value}, {newest.name} {theirs[name]}: models of two shapes have no "
                "mean, lower --last"
            )
    if manifest["tokenizer"]["sha256"] != last["tokenizer"]["sha256"]:
        raise UserError(f"{checkpoint} has another tokenizer than {newest.name}: lower --last")
    return manifest


def mean_of(checkpoints: list[Path]) -> dict[str, Tensor]:
    """The mean of each weight, summed in float64 in the order of the checkpoints, as float32.

    One tensor of one checkpoint at a time is in memory beside the means.
    """
    where = [_files_by_name(fitting_checkpoint(checkpoint).weights) for checkpoint in checkpoints]
    means = {}
    for name in where[0]:
        total = _read(where[0][name], name).double()
        for files in where[1:]:
            total += _read(files[name], name)
        means[name] = (total / len(where)).float()
        if not torch.isfinite(means[name]).all():
            raise UserError(f"{name} is NaN or inf in one of {checkpoints[0].parent}'s checkpoints: lower --last")
    return means


def publish(out: Path, weights: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Make the folder `out` of weights and manifest, whole. Raises OSError."""
    temporary = out.with_name(f".{out.name}{TEMPORARY_SUFFIX}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        path = temporary / WEIGHTS_FILE
        save_tensors(path, weights)
        files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)}}
        write_checkpoint_manifest(temporary, {**facts, "version": VERSION, "files": files})
        publish_folder(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _files_by_name(files: tuple[Path, ...]) -> dict[str, Path]:
    return {name: path for path in files for name in read_shapes([path])}


def _read(path: Path, name: str) -> Tensor:
    with reading_tensors(path), safe_open(path, framework="pt", device="cpu", backend="pread") as file:
        tensor: Tensor = file.get_tensor(name)
    return tensor
