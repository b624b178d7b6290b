"""Which checkpoint a run goes on from, and whether it is this run's."""

import json
from pathlib import Path
from typing import Any

from common.checkpoint_files import find_checkpoint, list_checkpoints, newest_good_checkpoint, read_checkpoint_manifest
from common.errors import UserError
from common.run_folder import RunFolder

# What makes another run of it: these sections and fields must not change unnoticed.
FIXED_SECTIONS = ("model", "lora")
FIXED_FIELDS = ("run.seed", "batch.tokens_per_step", "data.stride")


def choose_checkpoint(resume: str, folder: RunFolder) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from (None for a new run), and what was passed over: newer ones that are damaged.

    A path outside of the run is where it begins: once it has checkpoints, the same command goes on from those.

    Raises UserError where `resume` is a path without a whole checkpoint, or to one of the run's own but the newest, or
    `never` for a run that has some, or all of whose checkpoints are damaged.
    """
    existing = list_checkpoints(folder.checkpoints)
    if resume == "never":
        if existing:
            raise UserError(
                f"{folder.path} has checkpoints already: --resume auto goes on from them, "
                "--run.name NAME begins another run"
            )
        return None, []
    passed_over = []
    if resume != "auto" and existing and not Path(resume).resolve().is_relative_to(folder.path.resolve()):
        passed_over.append(f"--resume {resume}: {folder.path} has checkpoints of its own by now")
    elif resume != "auto":
        chosen = find_checkpoint(resume)
        if read_checkpoint_manifest(chosen).get("weights_only"):
            raise UserError(
                f"{chosen} holds weights alone, without the optimizer's state: --resume needs a whole checkpoint "
                "(step-…)"
            )
        if existing and chosen.name != existing[0][1].name:
            # going on behind them, the run would have two futures, and a restart would take the wrong one
            raise UserError(
                f"{folder.path} has newer checkpoints than {chosen.name}: --run.name NAME branches from it into a run "
                f"of its own, or move {existing[0][1].name} and what else is newer away"
            )
        return chosen, []
    checkpoint, complaints = newest_good_checkpoint(folder.checkpoints)
    if checkpoint is None and existing:
        raise UserError(
            f"none of the {len(existing)} checkpoints in {folder.checkpoints} is whole ({complaints[0]}): "
            f"--run.name NAME begins another run"
        )
    return checkpoint, passed_over + complaints


def check_same_run(checkpoint: Path, config: dict[str, Any], data_identity: str, allowed: list[str]) -> None:
    """Refuse to go on with another model, other data, another seed or batch than the checkpoint's.

    Args:
        config: this run's resolved configuration. allowed: fields that may differ, as section.key.

    Raises UserError naming the first field that differs.
    """
    manifest = read_checkpoint_manifest(checkpoint)
    if manifest.get("lora") is not None and "lora" not in config:
        raise UserError(f"{checkpoint} holds adapters, not all of a model's weights: go on with train/finetune.py")
    # an imported checkpoint says of itself only what model it is
    before, now = _flat(manifest.get("config") or {"model": manifest["model"]}), _flat(config)
    fixed = [name for name in now if name.split(".")[0] in FIXED_SECTIONS and name != "model.preset"]
    for name in [*fixed, *FIXED_FIELDS]:
        if name in before and name not in allowed and before[name] != now.get(name):
            raise UserError(
                f"{checkpoint} was trained with {name} {json.dumps(before[name])}, this run has "
                f"{json.dumps(now.get(name))}: put it back, or give --allow-change {name}, or another --run.name"
            )
    if manifest["data_identity"] not in (data_identity, None) and "data.path" not in allowed:
        raise UserError(
            f"{checkpoint} was trained on other data ({manifest['data_identity'][:12]}) than data.path holds "
            f"({data_identity[:12]}): put data.path back, or give --allow-change data.path, or another --run.name"
        )


def changed_fields(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """`section.key: old -> new` for every field that differs."""
    old, new = _flat(before), _flat(now)
    return [
        f"{name}: {json.dumps(old.get(name))} -> {json.dumps(value)}"
        for name, value in new.items()
        if old.get(name) != value
    ]


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    return {f"{section}.{key}": value for section, values in config.items() for key, value in values.items()}
