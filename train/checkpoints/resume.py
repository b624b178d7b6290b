"""Which checkpoint a run resumes from, and whether it is this run's."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common.checkpoint_files import find_checkpoint, list_checkpoints, newest_good_checkpoint, read_checkpoint_manifest
from common.checkpoint_manifest import CheckpointManifest, optimizer_of
from common.errors import UserError
from common.paths import expand_path
from common.run_folder import RunFolder
from model.config import config_from_dict
from train.run.provenance import read_starts
from train.run.storage import Patience
from train.settings.command_line import as_dict
from train.settings.sections import Config

# A change of these sections and fields makes it another run: it must not go unnoticed.
FIXED_SECTIONS = ("model", "lora", "objective")
FIXED_FIELDS = (
    "run.seed", "batch.tokens_per_step", "batch.warmup", "data.stride", "data.packing", "rollout.samples",
    "rollout.prompts_per_block", "rollout.max_tokens",
)  # fmt: skip
# These may change from one start to the next, though they give another model.
TRAINING_SECTIONS = ("optim.", "schedule.", "data.document_mask:", "run.dtype:", "run.stream_dtype:")
AS_BEFORE: dict[str, Any] = {
    "objective.kind": "language_modelling",
    "data.packing": "stream",
    "data.document_mask": False,
    "batch.warmup": [],
}  # what runs did that record neither
SHARDING = "optim.shard"  # which ranks keep what: the weights are the same
PLACES = ("run.root", "run.name", "data.path", "data.stage_to")  # where things are, not what they are


def choose_checkpoint(resume: str, folder: RunFolder) -> tuple[Path | None, list[str]]:
    """The checkpoint to resume from (None for a new run), and what was skipped: newer ones that are damaged.

    A path that the run started from means its own newest once it has checkpoints: the same command resumes. One to
    another run's checkpoint that holds only weights is a start with a new optimizer.

    Raises UserError where `resume` is a path without a checkpoint, to one of the run's own but the newest whole one, or
    to one elsewhere that a run with checkpoints did not start from; or `never` for a run that has some; or where all of
    the run's are damaged.
    """
    existing = list_checkpoints(folder.checkpoints)
    if resume not in ("auto", "never"):
        resume = str(expand_path(resume))
    if resume == "never":
        if existing:
            raise UserError(
                f"{folder.path} has checkpoints already: --resume auto resumes from them, "
                "--run.name NAME starts another run"
            )
        return None, []
    passed_over: list[str] = []
    if resume != "auto" and existing and not Path(resume).resolve().is_relative_to(folder.path.resolve()):
        if not _started_from(resume, folder):
            raise UserError(
                f"{folder.path} has checkpoints of its own, and did not start from {resume}: leave --resume out to "
                "resume it, or give --run.name NAME for another run"
            )
        passed_over.append(f"--resume {resume}: {folder.path} has checkpoints of its own by now")
    elif resume != "auto":
        chosen, passed_over = _find(resume, None if existing else folder)
        if read_checkpoint_manifest(chosen).get("weights_only") and chosen.resolve().is_relative_to(
            folder.path.resolve()
        ):
            raise UserError(
                f"{chosen} holds only weights, without the optimizer's state: give --resume a whole checkpoint "
                "(step-…), or --run.name NAME for another run, which starts with a new optimizer"
            )
        if existing and chosen.name != existing[0][1].name:
            # resuming before them, the run would have two futures, and a restart would take the wrong one
            raise UserError(
                f"{folder.path} has newer checkpoints than {chosen.name}: --run.name NAME branches from it into a run "
                f"of its own, or move {existing[0][1].name} and all newer checkpoints out of the folder"
            )
        return chosen, passed_over
    # a skipped one is lost with its steps: a file system gets some time
    checkpoint, complaints = newest_good_checkpoint(folder.checkpoints, try_again=Patience().waited)
    if checkpoint is None and existing:
        raise UserError(
            f"none of the {len(existing)} checkpoints in {folder.checkpoints} is whole ({complaints[0]}): "
            f"--run.name NAME starts another run"
        )
    return checkpoint, passed_over + complaints


def _find(given: str, unsaved: RunFolder | None) -> tuple[Path, list[str]]:
    """The checkpoint that `--resume` names, and what was skipped for it.

    Args:
        unsaved: a run without checkpoints of its own. An earlier start of it may have recorded which checkpoint a
            run's name meant: that one it is, though that run may have saved another since.
    """
    passed_over = []
    began = [Path(path) for path in _recorded_starts(unsaved) if _names(given, path)] if unsaved else []
    for path in began[-1:]:
        try:
            return find_checkpoint(path), []
        except UserError:
            passed_over = [f"{path}, from which an earlier launch started, is gone"]
    return find_checkpoint(given), passed_over


def _started_from(given: str, folder: RunFolder) -> bool:
    """Whether one of the run's starts was from this checkpoint of another run's, or from that run's newest."""
    return any(_names(given, path) for path in _recorded_starts(folder))


def _recorded_starts(folder: RunFolder) -> list[str]:
    """The checkpoints from which the run's launches started, oldest first."""
    return [str(start["resumed_from"]) for start in read_starts(folder.provenance) if start.get("resumed_from")]


def _names(given: str, recorded: str) -> bool:
    """Whether `given` leads to a recorded checkpoint: it is the one, or its run."""
    path = Path(recorded)
    leads = [path, path.parent, path.parent.parent]
    if Path(given).resolve() in [lead.resolve() for lead in leads]:
        return True
    # older versions recorded relative paths, in a working directory that is not known any more
    ends = [[part for part in lead.parts if part != ".."] for lead in leads if not path.is_absolute()]
    return any(end and list(Path(given).resolve().parts[-len(end) :]) == end for end in ends)


def check_optimizer(checkpoint: Path, manifest: CheckpointManifest, ours: str) -> None:
    """Raises UserError where a checkpoint holds the state of another optimizer than the one named, which can't use it.

    One without any state (an import, or only weights) fits every optimizer.
    """
    theirs = optimizer_of(manifest)
    if (
        theirs != ours
        and not manifest.get("weights_only")
        and (manifest["step"] > 0 or any(name.startswith("optimizer-") for name in manifest["files"]))
    ):
        raise UserError(
            f"{checkpoint} was trained with the optimizer {theirs}, but this run has {ours}: resume it with {theirs}, "
            "or start another run from its weights with train/finetune.py"
        )


def check_same_run(
    checkpoint: Path,
    config: dict[str, Any],
    data_identity: str,
    allowed: list[str],
    *,
    optimizer: str,
    rewards: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Refuse to resume with another model, optimizer, seed or batch than the checkpoint's, or other data or rewards.

    Args:
        config: this run's resolved configuration. allowed: fields that may differ, as section.key.
        optimizer: the name of this run's. rewards: what judges this run's answers, as a manifest records it.

    Raises UserError naming the first field that differs.
    """
    manifest = read_checkpoint_manifest(checkpoint)
    check_optimizer(checkpoint, manifest, optimizer)
    if manifest.get("lora") is not None and "lora" not in config:
        raise UserError(f"{checkpoint} holds adapters, not all of a model's weights: resume it with train/finetune.py")
    # an imported checkpoint only records its model
    before = _flat(_with_whole_model(manifest.get("config") or {"model": manifest["model"]}, checkpoint))
    if "config" in manifest:
        before = AS_BEFORE | before
    now = AS_BEFORE | _flat(_with_whole_model(config, "this run"))
    fixed = [name for name in now if name.split(".")[0] in FIXED_SECTIONS and name != "model.preset"]
    for name in [*fixed, *FIXED_FIELDS]:
        if name in before and name not in allowed and before[name] != now.get(name):
            raise UserError(
                f"{checkpoint} was trained with {name} {json.dumps(before[name])}, this run has "
                f"{json.dumps(now.get(name))}: put it back, or give --allow-change {name}, or another --run.name"
            )
    _check_order(checkpoint, before, now, allowed)
    _check_rewards(checkpoint, manifest.get("rewards"), rewards, allowed)
    trained_on = manifest["data_identity"]
    if trained_on is not None and trained_on != data_identity and "data.path" not in allowed:
        raise UserError(
            f"{checkpoint} was trained on other data ({trained_on[:12]}) than data.path holds "
            f"({data_identity[:12]}): put data.path back, or give --allow-change data.path, or another --run.name"
        )


def _check_order(checkpoint: Path, before: Mapping[str, Any], now: Mapping[str, Any], allowed: list[str]) -> None:
    """Raises UserError where `data.seed` gives another order: null is run.seed, and older checkpoints don't have it."""
    theirs, ours = before.get("data.seed"), now.get("data.seed")
    orders = [run.get("run.seed") if seed is None else seed for run, seed in ((before, theirs), (now, ours))]
    if "run.seed" in before and theirs != ours and orders[0] != orders[1] and "data.seed" not in allowed:
        raise UserError(
            f"{checkpoint} was trained with data.seed {json.dumps(theirs)}, this run has {json.dumps(ours)}: "
            "put it back, or give --allow-change data.seed, or another --run.name"
        )


def _check_rewards(
    checkpoint: Path, before: Sequence[Mapping[str, Any]] | None, now: Sequence[Mapping[str, Any]], allowed: list[str]
) -> None:
    """Raises UserError naming what judges answers otherwise than before. Older checkpoints don't have it."""
    if before is None or "rollout.reward" in allowed:
        return
    permitted = "put it back, or give --allow-change rollout.reward, or another --run.name"
    theirs, ours = ([f"{reward['weight']:g}*{reward['name']}" for reward in run] for run in (before, now))
    if theirs != ours:
        raise UserError(
            f"{checkpoint} was trained with the rewards {' + '.join(theirs)}, this run has {' + '.join(ours)}: "
            f"{permitted}"
        )
    for old, new in zip(before, now, strict=True):
        if old["identity"] != new["identity"]:
            raise UserError(
                f"{checkpoint} was trained with another reward {new['name']} ({old['identity'][:12]}) than "
                f"{new['given']} is now ({new['identity'][:12]}): {permitted}"
            )


def check_finished(run: Path, manifest: CheckpointManifest, config: dict[str, Any], allowed: list[str]) -> list[str]:
    """Refuse to report another run as done than the one this command asks for; return what else differs, without
    effect.

    Args:
        manifest: of the run's last checkpoint, which has all steps that `config` asks for, or more.
        allowed: fields that may differ, as section.key.

    Raises UserError naming the options that differ among those that decide the trained model.
    """
    step, wanted = manifest["step"], config["run"]["max_steps"]
    if step > wanted and "run.max_steps" not in allowed:
        raise UserError(
            f"{run} is at step {step} already, past run.max_steps {wanted}: give --run.max_steps {step} to end it "
            "there, more to continue it, or --run.name NAME for another run"
        )
    changes = changed_fields(manifest.get("config", {}), config)
    others = [
        change for change in changes if change.split(":")[0] not in (*PLACES, SHARDING, "run.max_steps", *allowed)
    ]
    asked = [change for change in others if change.startswith(TRAINING_SECTIONS)]
    if asked:
        raise UserError(
            f"{run} is done, at step {step}, but this command asks for another run ({', '.join(asked)}): put that "
            "back, or give --run.name NAME"
        )
    return others


def changed_fields(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`section.key: old -> new` for every field that differs; one that did not exist at the time had its default.

    Args:
        before: a checkpoint's configuration; {} for an imported one, of which nothing is known.
    """
    if not before:
        return []
    old, new = _flat(as_dict(Config())) | {SHARDING: False} | AS_BEFORE | _flat(before), _flat(now)
    return [
        f"{name}: {json.dumps(old[name])} -> {json.dumps(value)}"
        for name, value in new.items()
        if name in old and old[name] != value
    ]


def _with_whole_model(config: Mapping[str, Any], source: object) -> dict[str, Any]:
    """Every field of the model: one that an older version lacked has its default, and the widths that null stands for
    are in its place (an imported model states them, a configuration need not)."""
    model = config_from_dict({key: value for key, value in config["model"].items() if key != "preset"}, source)
    widths = {"mlp_hidden": model.hidden_size, "n_kv_head": model.kv_heads}
    return {**config, "model": asdict(model) | config["model"] | widths}


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields by section.key; sections of other versions, too."""
    sections = {name: values for name, values in config.items() if isinstance(values, Mapping)}
    return {f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()}
