"""What a run will take on a machine: whether it fits, how long it lasts, what it costs; without torch.

The functions are those that a start uses for its choices and its log.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

from common.errors import UserError
from model.config import PRESETS
from model.counts import flops_per_token, parameter_count
from model.device_table import GPUS
from model.memory import MemoryEstimate
from model.number_formats import Dtype, check_stream
from train.batches.mixture import Mixture, levels_of_mix
from train.batches.plan import BatchPlan, plan_batches
from train.checkpoints.disk_space import bytes_of_checkpoint, needed_bytes
from train.estimates.durations import COMPILE_SECONDS, START_SECONDS, Durations, Pace, durations
from train.estimates.machines import Machine, machine_of
from train.estimates.rollout_time import held_out_of, sampling_seconds, with_rollout
from train.estimates.run_memory import (
    KEPT_SHARE,
    Room,
    estimated_memory,
    fits,
    largest_that_fits,
    recompute_every,
    settle_memory,
    shapes_to_train,
    state_of_config,
)
from train.estimates.speed import CALIBRATED_ON, Cluster, StepTime, Work, forward_seconds, step_time
from train.objectives.rewards import judging_models
from train.settings.sections import Config

TOKENS_PER_PARAMETER = 20  # compute-optimal (Hoffmann et al. 2022, arXiv:2203.15556)
HOST_COPY_RATE = 10e9  # bytes/s from a GPU to host memory, for which a save stops training
RECORD_BYTES = 400  # of a step in metrics.jsonl and log.txt
MODES: dict[str, dict[str, Any]] = {  # by name: options of section recompute
    "none": {"mode": "none", "norms": False},
    "norms": {"mode": "none", "norms": True},
    "every second block": {"mode": "every", "every_blocks": 2, "norms": False},
    "full": {"mode": "full", "norms": False},
}


@dataclass(frozen=True)
class Plan:
    """All that `train/plan.py` prints.

    Attributes:
        config: with every `auto` resolved; reasons: a line for each choice.
        fits: whether the estimate leaves enough of the memory free; changes: else, the nearest options that do.
        micro_batches: by recompute mode the largest micro-batch that fits; None where none does.
        pace, durations, step: None where the speed is neither known nor measured.
        calibrated_on: what the speed is from.
        data_bytes: of the tokens that are read, by source. checkpoint_bytes, disk_bytes: of one checkpoint, of all that
            the run leaves.
        limit_seconds: of one start.
    """

    config: Config
    machine: Machine
    batch: BatchPlan
    reasons: list[str]
    memory: MemoryEstimate
    fits: bool
    changes: list[str]
    micro_batches: dict[str, int | None]
    pace: Pace | None
    durations: Durations | None
    step: StepTime | None
    calibrated_on: str | None
    data_bytes: dict[str, int]
    checkpoint_bytes: int
    disk_bytes: int
    limit_seconds: float | None

    @property
    def tokens(self) -> int:
        return self.config.batch.stages.tokens_after(self.config.run.max_steps)

    @property
    def tokens_per_second(self) -> float | None:
        """Of all ranks, in steps."""
        return None if self.pace is None else self.config.batch.tokens_per_step / self.pace.step

    @property
    def mfu(self) -> float | None:
        gpu, speed = self.machine.gpu, self.tokens_per_second
        if gpu is None or speed is None:
            return None
        flops = flops_per_token(self.config.model.architecture(), adapters=self.config.adapter_count())
        return speed / self.machine.world_size * flops / gpu.flops

    @property
    def optimal_tokens(self) -> int:
        return TOKENS_PER_PARAMETER * parameter_count(self.config.model.architecture())


def make_plan(
    config: Config, machine: Machine, *, limit_seconds: float | None = None, pace: Pace | None = None
) -> Plan:
    """Resolve every `auto` as a start on this machine would, and count.

    Args:
        limit_seconds: of one start on the cluster. pace: measured, instead of the model's.

    Raises UserError where the configuration is impossible, or its batch does not divide.
    """
    plan_batches(config.batch.stages, config.model.block_size, 1, machine.world_size)
    asked, (config, reasons) = config, _without_memory(config, machine)
    try:
        config, more = settle_memory(config, config, machine.room)
    except UserError as error:
        config, more = _least(config, machine), [str(error).partition(":")[0]]
    micro_batch = int(config.batch.micro_batch)
    batch = plan_batches(config.batch.stages, config.model.block_size, micro_batch, machine.world_size).full
    # what a user has named is taken as long as it fits at all; a choice leaves more
    share = {"share": KEPT_SHARE} if asked.batch.micro_batch != "auto" else {}
    good = fits(config, batch.micro_batch, recompute_every(config), machine.room, **share)
    step = None if (cluster := machine.cluster) is None else _step_time(config, batch, cluster)
    modelled = step is not None and pace is None
    if step is not None and pace is None:
        pace = _modelled(config, machine, batch, step)
    whole, weights = _checkpoint(config)
    data = _data_bytes(config)
    return Plan(
        config=config,
        machine=machine,
        batch=batch,
        reasons=[*reasons, *more],
        memory=estimated_memory(config, batch, machine.device_type),
        fits=good,
        changes=[] if good else list(_changes(config, machine)),
        micro_batches={name: _largest(config, options, machine.room) for name, options in MODES.items()},
        pace=pace,
        durations=None if pace is None else durations(config, pace, limit_seconds),
        step=step if modelled else None,
        calibrated_on=CALIBRATED_ON if modelled else "steps measured on this machine" if pace else None,
        data_bytes=data,
        checkpoint_bytes=whole,
        limit_seconds=limit_seconds,
        disk_bytes=sum(data.values()) + _kept_bytes(config, whole, weights) + RECORD_BYTES * config.run.max_steps,
    )


def _without_memory(config: Config, machine: Machine) -> tuple[Config, list[str]]:
    """Dtype and compilation, which no memory decides, and the reasons for them."""
    dtype, because = machine.dtype(config)
    reasons = [f"dtype {dtype}: {because}"] if config.run.dtype == "auto" else []
    check_stream(config.run.stream_dtype, dtype)
    compiled = machine.device_type == "cuda" if config.run.compile == "auto" else config.run.compile
    if config.run.compile == "auto":
        reasons.append(f"compile {str(compiled).lower()}: {'on GPUs' if compiled else 'it takes longer than it saves'}")
    return replace(config, run=replace(config.run, dtype=dtype, compile=compiled)), reasons


def _least(config: Config, machine: Machine) -> Config:
    """What takes the least of all that `auto` may choose."""
    if config.optim.shard == "auto":
        config = replace(config, optim=replace(config.optim, shard=machine.world_size > 1))
    if config.recompute.mode == "auto":
        config = replace(config, recompute=replace(config.recompute, mode="full"))
    if config.batch.micro_batch == "auto":
        config = replace(config, batch=replace(config.batch, micro_batch=1))
    return config


def _largest(config: Config, options: dict[str, Any], room: Room) -> int | None:
    chosen = replace(config, recompute=replace(config.recompute, **options))
    return largest_that_fits(chosen, recompute_every(chosen), room)


def _work(config: Config, batch: BatchPlan) -> Work:
    return Work(
        config.model.architecture(),
        batch.micro_batch,
        batch.accumulation,
        recompute_every=recompute_every(config),
        dtype=cast(Dtype, config.run.dtype),
        sharded=config.optim.is_sharded(batch.world_size),
        adapters=config.adapter_count(),
    )


def _step_time(config: Config, batch: BatchPlan, cluster: Cluster) -> StepTime:
    work = _work(config, batch)
    step = step_time(work, cluster)
    if not config.objective.rolls_out:
        return step
    return with_rollout(
        step,
        work,
        cluster,
        config.rollout,
        reference=config.needs_reference,
        values=config.objective.learns_scalar_head,
        judges=judging_models(config.rollout.reward),
    )


def _validation_seconds(config: Config, batch: BatchPlan, cluster: Cluster) -> float:
    """Of a validation's tokens, or of held-out answers."""
    work = _work(config, batch)
    if config.objective.rolls_out:
        return sampling_seconds(work, cluster, held_out_of(work.model, config.rollout))
    return forward_seconds(work, cluster, max(config.model.block_size, config.eval.tokens // cluster.world_size))


def _modelled(config: Config, machine: Machine, batch: BatchPlan, step: StepTime) -> Pace:
    cluster = machine.cluster
    assert cluster is not None
    share = sum(_checkpoint(config)[:1]) / machine.world_size
    compiling = COMPILE_SECONDS if config.run.compile else 0.0
    return Pace(
        step=step.total,
        validation=_validation_seconds(config, batch, cluster),
        save=share / HOST_COPY_RATE,
        start=START_SECONDS + compiling,
        sampling=step.sampling or None,
    )


def _checkpoint(config: Config) -> tuple[int, int]:
    averaged = config.optim.ema_half_life_tokens is not None
    return bytes_of_checkpoint(shapes_to_train(config), state_of_config(config), averaged=averaged)


def _data_bytes(config: Config) -> dict[str, int]:
    """Of the tokens that a run reads of each source, if none is read twice; "" is the name of a single set."""
    item, length = 2 if config.model.vocab_size <= 1 << 16 else 4, config.model.block_size
    read = config.batch.stages.tokens_after(config.run.max_steps)
    if not config.data.mix:
        return {"": item * (read + config.eval.tokens)}
    counts = Mixture(levels_of_mix(*config.data.planned_mix, length)).consumed(read // length).tolist()
    validated = max(1, config.eval.tokens // length // len(counts))
    return {
        source.name: item * length * (count + validated) for source, count in zip(config.data.mix, counts, strict=True)
    }


def _kept_bytes(config: Config, whole: int, weights: int) -> int:
    return needed_bytes(
        config.checkpoint,
        existing=[],
        first_step=0,
        max_steps=config.run.max_steps,
        checkpoint_bytes=whole,
        weights_bytes=weights,
    )


def _changes(config: Config, machine: Machine) -> Iterator[str]:
    """Options and cards with which it fits, the nearest first."""

    def fit(changed: Config, on: Machine = machine) -> int | None:
        return largest_that_fits(changed, recompute_every(changed), on.room)

    full = replace(config, recompute=replace(config.recompute, mode="full"))
    sharded = replace(full, optim=replace(full.optim, shard=True))
    if size := fit(config):
        yield f"--batch.micro_batch {size}"
    elif size := fit(full):
        yield f"--recompute.mode full --batch.micro_batch {size}"
    elif machine.world_size > 1 and (size := fit(sharded)):
        yield f"--recompute.mode full --optim.shard true --batch.micro_batch {size}"
    yield from _other_cards(config, machine)
    if size or config.model.preset is None:
        return
    kind, _, _ = config.model.preset.partition("-")
    smaller = [name for name, preset in PRESETS.items() if name.startswith(kind) and
               parameter_count(preset) < parameter_count(config.model.architecture())]  # fmt: skip
    for name in reversed(smaller):
        preset = PRESETS[name]
        sizes = {key: getattr(preset, key) for key in ("n_layer", "n_head", "n_embd", "block_size")}
        if fit(replace(full, model=replace(config.model, preset=name, **sizes))):
            yield f"--model.preset {name}"
            return


def _other_cards(config: Config, machine: Machine) -> Iterator[str]:
    """The smallest card of the table on which the same configuration fits."""
    if machine.device_type != "cuda":
        return
    larger = sorted((gpu.memory_gib, name) for name, gpu in GPUS.items() if gpu.memory_gib * 2**30 > machine.memory)
    for _, name in larger:
        other = machine_of(name, machine.nodes, machine.ranks_per_node)
        if fits(config, int(config.batch.micro_batch), recompute_every(config), other.room):
            yield f"--gpu {name}"
            return
