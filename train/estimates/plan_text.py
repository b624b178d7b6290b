"""A plan for people, and as JSON."""

import itertools
import math
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common.paths import PROJECT
from common.progress import format_bytes, format_count, format_duration
from model.counts import flops_per_token, parameter_count
from train.estimates.durations import Pace
from train.estimates.run_memory import MEMORY_SHARE, describe_model
from train.estimates.run_plan import TOKENS_PER_PARAMETER, Plan

GIB, GB = 2**30, 10**9


def as_json(plan: Plan, price: float | None) -> dict[str, Any]:
    """Every figure of a plan by name; null where it isn't known."""
    config, machine = plan.config, plan.machine
    architecture, hours = config.model.architecture(), _hours(plan)
    speed, gpu_hours = plan.tokens_per_second, _gpu_hours(plan)
    tables = _table_parameters(plan)
    return {
        "device": machine.name,
        "nodes": machine.nodes,
        "ranks_per_node": machine.ranks_per_node,
        "objective": config.objective.kind,
        "parameters": parameter_count(architecture),
        "parameters_without_embeddings": parameter_count(architecture) - tables,
        "flops_per_token": flops_per_token(architecture, adapters=config.adapter_count()),
        "memory_gib": {name: size / GIB for name, size in plan.memory.parts.items()}
        | {"total": plan.memory.total / GIB},
        "memory_phases_gib": {name: size / GIB for name, size in plan.memory.phases.items()},
        "largest_phase": plan.memory.largest_phase,
        "device_memory_gib": machine.memory / GIB,
        "fits": plan.fits,
        "changes_that_fit": plan.changes,
        "dtype": config.run.dtype,
        "compile": config.run.compile,
        "shard": config.optim.shard,
        "micro_batch": plan.batch.micro_batch,
        "accumulation": plan.batch.accumulation,
        "recompute": config.recompute.mode,
        "largest_micro_batch": plan.micro_batches,
        "reasons": plan.reasons,
        "calibrated_on": plan.calibrated_on,
        "step_seconds": None if plan.pace is None else plan.pace.step,
        "sampling_seconds": None if plan.pace is None else plan.pace.sampling,
        "step_seconds_by_part": None if plan.step is None else asdict(plan.step),
        "tokens_per_second_per_gpu": None if speed is None else speed / machine.world_size,
        "tokens_per_second": speed,
        "mfu": plan.mfu,
        "tokens": plan.tokens,
        "hours": hours,
        "hours_by_part": None if plan.durations is None else _hours_by_part(plan),
        "restarts": None if plan.durations is None else plan.durations.restarts,
        "gpu_hours": gpu_hours,
        "cost": None if price is None or gpu_hours is None else price * gpu_hours,
        "energy_kwh": _energy(plan),
        "data_gb": sum(plan.data_bytes.values()) / GB,
        "data_gb_by_source": {name: size / GB for name, size in plan.data_bytes.items() if name},
        "checkpoint_gb": plan.checkpoint_bytes / GB,
        "disk_gb": plan.disk_bytes / GB,
        "compute_optimal_tokens": plan.optimal_tokens,
        "compute_optimal_hours": None if speed is None else plan.optimal_tokens / speed / 3600,
    }


def as_text(plan: Plan, price: float | None = None, submitted: tuple[list[str], str] | None = None) -> str:
    """Lines for the terminal.

    Args:
        submitted: the trainer's options, and the limit of one start as sbatch takes it; None: no line on submission.
    """
    architecture = plan.config.model.architecture()
    lines = [
        _heading(plan),
        *describe_model(plan.config, plan.batch, plan.machine.device_type),
        f"parameters without embeddings: {parameter_count(architecture) - _table_parameters(plan):,}",
        *_memory_lines(plan),
        *(f"choice: {reason}" for reason in plan.reasons),
        *_speed_lines(plan, price),
        _disk_line(plan),
    ]
    if plan.config.objective.kind == "language_modelling":  # what Hoffmann et al. have measured
        lines.append(_optimal_line(plan))
    if plan.machine.device_type == "cuda" and submitted is not None:
        lines.append(f"submit: {sbatch_line(plan, *submitted)}")
    return "\n".join(lines)


def limit_warnings(plan: Plan) -> list[str]:
    """What is wrong with a time limit."""
    if plan.pace is None or plan.durations is None or plan.limit_seconds is None:
        return []
    if plan.durations.restarts < 0:
        return ["WARNING: the time limit is too short for a start and a save: nothing would be kept"]
    every, limit = plan.config.checkpoint.every_steps or plan.config.run.max_steps, plan.limit_seconds
    interval = every * plan.pace.step
    if interval + plan.pace.start <= limit or plan.durations.total <= limit:
        return []
    return [
        f"WARNING: a start ends at {format_duration(limit)}, before its first regular save: checkpoint.every_steps "
        f"{every} takes {format_duration(interval)}; only the save at the limit keeps its work: lower "
        "checkpoint.every_steps"
    ]


def sbatch_line(plan: Plan, options: list[str], limit: str) -> str:
    """The command that starts the run on a cluster with as many nodes and GPUs, by the script of its size."""
    machine, script = plan.machine, "slurm/124m.sh"
    for name, value in itertools.pairwise([*options, ""]):
        if name == "--config" or name.startswith("--config="):
            file = value if name == "--config" else name.partition("=")[2]
            own = f"slurm/{Path(file).stem.rpartition('-')[2]}.sh"
            script = own if (PROJECT / own).is_file() else script
    words = ["sbatch", f"--nodes={machine.nodes}", f"--gpus-per-node={machine.ranks_per_node}", f"--time={limit}"]
    return shlex.join([*words, script, *options])


def misfit_line(plan: Plan) -> str:
    """What does not fit, and what does."""
    room = plan.machine.room
    advice = ", or ".join(plan.changes) or "use a smaller model or a shorter model.block_size"
    return (
        f"DOES NOT FIT: {format_bytes(plan.memory.total)} in phase {plan.memory.largest_phase!r} for the "
        f"{format_bytes(room.free)} of {plan.machine.name} ({MEMORY_SHARE:.0%} of which are used); this fits: {advice}"
    )


def _heading(plan: Plan) -> str:
    machine, config = plan.machine, plan.config
    where = f"{machine.nodes} x {machine.ranks_per_node} x {machine.name}"
    return f"plan of {config.run.name}: {config.run.max_steps:,} steps, {format_count(plan.tokens)} tokens, on {where}"


def _memory_lines(plan: Plan) -> list[str]:
    memory, machine = plan.memory, plan.machine
    parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in memory.parts.items() if size)
    reserved = f", {format_bytes(machine.reserved)} more for driver and NCCL" if machine.reserved else ""
    largest = ", ".join(f"{name}: {size or 'none'}" for name, size in plan.micro_batches.items())
    fit = "fits" if plan.fits else misfit_line(plan)
    return [
        f"memory by part (not all at once): {parts}",
        f"memory: {format_bytes(memory.total)} of {format_bytes(machine.memory)}{reserved}: {fit}",
        f"largest micro-batch by recompute mode: {largest}",
    ]


def _speed_lines(plan: Plan, price: float | None) -> list[str]:
    pace, spent, speed = plan.pace, plan.durations, plan.tokens_per_second
    if pace is None or spent is None or speed is None:
        return ["speed: unknown for this device: --measure runs a few real steps, or name a card with --gpu"]
    ranks = plan.machine.world_size
    utilisation = "" if plan.mfu is None else f", MFU {plan.mfu:.1%}"
    lines = [
        f"speed: {format_count(speed / ranks)} tokens/s a rank, {format_count(speed)} in all, {pace.step:.3g} s a step"
        f"{utilisation} (from {plan.calibrated_on})"
    ]
    if plan.step is not None:
        shares = {name: seconds / plan.step.total for name, seconds in asdict(plan.step).items()}
        largest = sorted(shares, key=lambda name: -shares[name])
        lines.append(f"a step: {', '.join(f'{name} {shares[name]:.1%}' for name in largest if shares[name] >= 0.0005)}")
    if pace.sampling is not None:
        lines.append(_sampling_line(plan, pace))
    beside = {"steps": spent.steps, "validations": spent.validations, "saves": spent.saves, "starts": spent.starts}
    parts = ", ".join(f"{name} {format_duration(seconds)}" for name, seconds in beside.items())
    restarts = "" if spent.restarts <= 0 else f", {spent.restarts} restarts at the time limit"
    lines.append(f"time: {format_duration(spent.total)} ({spent.total / 86400:.2f} days): {parts}{restarts}")
    lines += limit_warnings(plan)
    if plan.machine.device_type == "cuda":
        energy, hours = _energy(plan), _gpu_hours(plan) or 0.0
        kwh = "" if energy is None else f", {energy:,.1f} kWh at the boards' rated power"
        money = "" if price is None else f", {price * hours:,.2f} at {price:g} an hour"
        lines.append(f"GPU hours: {hours:,.1f}{money}{kwh}")
    return lines


def _sampling_line(plan: Plan, pace: Pace) -> str:
    rollout, sampling = plan.config.rollout, pace.sampling or 0.0
    longest = plan.config.model.block_size - rollout.max_tokens
    estimate = f"an estimate, compared with no run, for prompts of {longest:,} tokens and answers of full length"
    how = "measured" if pace.measured else estimate
    return (
        f"sampling answers: {sampling:.3g} s, {sampling / pace.step:.0%} of a step: {rollout.sequences:,} answers of "
        f"{rollout.max_tokens:,} tokens at most, {rollout.prompts_per_block} prompts side by side ({how})"
    )


def _disk_line(plan: Plan) -> str:
    sources = ", ".join(f"{name} {size / GB:.1f}" for name, size in plan.data_bytes.items() if name)
    data = f"{sum(plan.data_bytes.values()) / GB:.1f} GB" + (f" ({sources})" if sources else "")
    return (
        f"disk: {plan.disk_bytes / GB:.1f} GB: data {data}, checkpoints of {plan.checkpoint_bytes / GB:.2f} GB each "
        "by the retention plan, logs"
    )


def _optimal_line(plan: Plan) -> str:
    optimal, speed = plan.optimal_tokens, plan.tokens_per_second
    time = "" if speed is None else f", {format_duration(optimal / speed)} of steps"
    return (
        f"compute-optimal: {format_count(optimal)} tokens, {TOKENS_PER_PARAMETER} a parameter (Hoffmann et al. 2022)"
        f"{time}; this run reads {plan.tokens / optimal:.2f} times as many"
    )


def _table_parameters(plan: Plan) -> int:
    config = plan.config.model.architecture()
    tables = config.vocab_size * (1 if config.tie_weights else 2)
    return config.n_embd * (tables + (config.block_size if config.position == "learned" else 0))


def _hours(plan: Plan) -> float | None:
    return None if plan.durations is None else plan.durations.total / 3600


def _hours_by_part(plan: Plan) -> dict[str, float]:
    spent = plan.durations
    assert spent is not None
    return {
        name: getattr(spent, name) / 3600 for name in ("steps", "validations", "saves", "starts")
    }  # fmt: skip


def _gpu_hours(plan: Plan) -> float | None:
    hours = _hours(plan)
    return None if hours is None or plan.machine.device_type != "cuda" else hours * plan.machine.world_size


def _energy(plan: Plan) -> float | None:
    hours = _gpu_hours(plan)
    if hours is None or plan.machine.gpu is None or not math.isfinite(hours):
        return None
    return hours * plan.machine.gpu.watts / 1000
