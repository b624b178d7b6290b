"""`auto` choices: resolved once, recorded in the run's folder, reused on resume as long as they fit into the memory."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from common.errors import UserError
from common.progress import format_bytes
from model.devices import free_memory_bytes
from model.gpt import GPT
from model.initialisation import empty_gpt
from model.lora import add_lora
from model.memory import memory_estimate
from model.precision import Dtype, check_stream, resolve_dtype
from model.ranks import Ranks
from train.batches.plan import largest_micro_batch
from train.optimization.compilation import trial_compilation
from train.optimization.muon import newton_schulz_flops
from train.optimization.optimizer import declared_state, is_sharded, muons_matrices, trained_parameters
from train.optimization.optimizer_state import shapes_of
from train.optimization.owners import owners_of
from train.optimization.sharded import BUFFER_BYTES
from train.settings.sections import Config
from train.startup.recorded_choices import reuse

MEMORY_SHARE = 0.85  # of what is free; the rest is for the allocator's rounding and what the estimate leaves out
KEPT_SHARE = 0.95  # what an earlier start chose may take, so that it holds where a little less is free than it was then
CPU_MICRO_BATCH = 8  # beyond it a CPU gains no speed


def resolve(config: Config, recorded: Mapping[str, Any] | None, ranks: Ranks) -> tuple[Config, list[str]]:
    """Replace every `auto` by a choice; return the configuration and a line of reason for each.

    Args:
        recorded: the resolved configuration this run was started with, whose choices hold.

    Raises UserError where nothing fits.
    """
    asked = config
    config = reuse(config, recorded, world_size=ranks.world_size)
    reasons = []
    dtype, because = resolve_dtype(config.run.dtype, ranks.device)
    if config.run.dtype == "auto":
        reasons.append(f"dtype {dtype}: {because}")
    elif asked.run.dtype == "auto" and (other := resolve_dtype("auto", ranks.device)[0]) != dtype:
        reasons.append(f"dtype {dtype}, as the run has been trained so far: a new run would take {other} here")
    check_stream(config.run.stream_dtype, dtype)
    compile_, because = resolve_compile(config.run.compile, ranks, must=asked.run.compile is True)
    if config.run.compile == "auto" or compile_ != config.run.compile:
        reasons.append(f"compile {str(compile_).lower()}: {because}")
    config = replace(config, run=replace(config.run, dtype=dtype, compile=compile_))
    # the smallest answer of all ranks, so that they agree on uneven machines
    free = -ranks.agree([-free_memory_bytes(ranks.device, ranks.local_world_size)])[0]
    config, sharding = _choose_sharding(config, asked, dtype, free, ranks)
    config, anew = _forget_what_does_not_fit(config, asked, dtype, free, ranks)
    reasons += [*sharding, *anew]
    if config.recompute.mode == "auto":
        fits = _fits(config, _least_micro_batch(config), dtype, 0, free, ranks)
        mode: Literal["none", "full"] = "none" if fits else "full"
        config = replace(config, recompute=replace(config.recompute, mode=mode))
        reasons.append(f"recompute {mode}: {format_bytes(free)} are free")
    if config.batch.micro_batch == "auto":
        micro_batch = _choose_micro_batch(config, dtype, free, ranks)
        config = replace(config, batch=replace(config.batch, micro_batch=micro_batch))
        reasons.append(f"micro_batch {micro_batch}: {format_bytes(free)} are free")
    return config, reasons


def _choose_sharding(config: Config, asked: Config, dtype: Dtype, free: int, ranks: Ranks) -> tuple[Config, list[str]]:
    """Shard the optimizer where it would not fit whole; decided at every start, as the weights stay the same.

    It comes before recomputation, which costs more. Args: asked: as in `_forget_what_does_not_fit`.
    """
    if asked.optim.shard != "auto":
        return config, []
    whole, parts = (replace(config, optim=replace(config.optim, shard=shard)) for shard in (False, True))
    if ranks.world_size == 1:
        return whole, []
    every = 0 if config.recompute.mode == "auto" else recompute_every(config)
    if _fits(whole, _least_micro_batch(config), dtype, every, free, ranks):
        return whole, ["shard false: each rank has room for the optimizer's whole state"]
    here, all_of_it = (optimizer_bytes(which, ranks.world_size) for which in (parts, whole))
    if here >= all_of_it:  # of a tiny model, for which buffers are more than its state
        return whole, []
    line = f"{format_bytes(here)} of the optimizer's {format_bytes(all_of_it)} on a rank at most"
    return parts, [f"shard true: {format_bytes(free)} are free; {line}"]


def _forget_what_does_not_fit(
    config: Config, asked: Config, dtype: Dtype, free: int, ranks: Ranks
) -> tuple[Config, list[str]]:
    """An earlier start's choices, made `auto` again where the memory here is too small for them, and a line on that.

    Args: asked: the configuration before those choices were put in; what is not `auto` in it stays.
    """
    mode, size = config.recompute.mode, config.batch.micro_batch
    chosen = [
        f"{name} {value}"
        for name, wish, value in (
            ("recompute", asked.recompute.mode, mode),
            ("micro_batch", asked.batch.micro_batch, size),
        )
        if wish == "auto" and value != "auto"
    ]
    if not chosen or mode == "auto":
        return config, []
    least = _least_micro_batch(config)
    if _fits(config, least, dtype, recompute_every(config), free, ranks, share=KEPT_SHARE):
        return config, []
    line = (
        f"{' and '.join(chosen)}, which an earlier start chose, may not fit into the {format_bytes(free)} that are free"
    )
    config = replace(config, batch=asked.batch)
    if asked.recompute.mode == "auto" and not _fits(
        config, _least_micro_batch(config), dtype, recompute_every(config), free, ranks
    ):
        config = replace(config, recompute=asked.recompute)
    return config, [line]


def recompute_every(config: Config) -> int:
    """The model's `recompute_every` for a resolved configuration."""
    return {"none": 0, "full": 1, "every": config.recompute.every_blocks}[config.recompute.mode]


def resolve_compile(choice: bool | Literal["auto"], ranks: Ranks, *, must: bool = True) -> tuple[bool, str]:
    """Whether to compile, and why. A toy is compiled first, on every rank: what fails there would fail in step 1.

    Args: must: whether `true` was asked for, and is not an earlier start's choice.

    Raises UserError where compilation was asked for by `true` and is impossible.
    """
    if choice is False:
        return False, "as asked"
    if choice == "auto" and ranks.device.type != "cuda":
        return False, f"on {ranks.device.type} compiling takes longer than it saves in most runs"
    problem = next((answer for answer in ranks.gather(trial_compilation(ranks.device)) if answer), None)
    if problem is None:
        return True, "a trial succeeded"
    if choice is True and must:
        raise UserError(f"run.compile is true, but a trial failed ({problem}): use --run.compile auto or false")
    return False, f"a trial failed ({problem})"


def _least_micro_batch(config: Config) -> int:
    return config.batch.micro_batch if isinstance(config.batch.micro_batch, int) else 1


def optimizer_bytes(config: Config, world_size: int = 1) -> int:
    """What the optimizer keeps on one rank: of all that is trained, or, where it is sharded, the largest part.

    Blocks are alike, but for the value embeddings of the first and last: the smallest model and one of a block more,
    built without memory for their weights, give the figures for any number.
    """
    if is_sharded(config.optim, world_size):
        return max(share.state for share in shares_of(config, world_size)) + BUFFER_BYTES
    fewest = max(1, 2 * config.model.value_embeddings)
    least, more = (_optimizer_bytes(config, layers) for layers in (fewest, fewest + 1))
    return least + (config.model.n_layer - fewest) * (more - least)


def _optimizer_bytes(config: Config, layers: int) -> int:
    model = _without_memory(config, layers)
    return declared_state(model, config.optim).nbytes(shapes_of(trained_parameters(model).items()))


@dataclass(frozen=True)
class Share:
    """What a rank has to keep and do where the optimizer is sharded. state: bytes. flops: of Newton-Schulz, a step."""

    state: int
    flops: int


def shares_of(config: Config, world_size: int) -> list[Share]:
    """By rank."""
    model = _without_memory(config, config.model.n_layer)
    parameters, declared = trained_parameters(model), declared_state(model, config.optim)
    matrices = muons_matrices(model) if config.optim.kind == "muon" else {}
    state, flops = [0] * world_size, [0] * world_size
    for name, rank in owners_of(parameters, declared, world_size).items():
        shape = tuple(parameters[name].shape)
        state[rank] += declared.nbytes({name: shape})
        if name in matrices:
            flops[rank] += newton_schulz_flops(shape, matrices[name].rows, config.optim.muon_iterations)
    return [Share(*share) for share in zip(state, flops, strict=True)]


def average_bytes(config: Config, world_size: int = 1) -> int:
    """What one rank keeps of an average of the weights: the largest part, as `WeightAverage` divides them."""
    if config.optim.ema_half_life_tokens is None:
        return 0
    kept = [0] * world_size
    model = _without_memory(config, config.model.n_layer)
    parameters = trained_parameters(model)
    for name, rank in owners_of(parameters, declared_state(model, config.optim), world_size).items():
        kept[rank] += parameters[name].nbytes
    return max(kept)


def _without_memory(config: Config, layers: int) -> GPT:
    """The model with so many layers, on the meta device."""
    model = empty_gpt(replace(config.model.architecture(), n_layer=layers))
    if (adapters := config.adapters()) is not None:
        add_lora(model, adapters, seed=0)
    return model


def _fits(
    config: Config,
    micro_batch: int,
    dtype: Dtype,
    every: int,
    free: int,
    ranks: Ranks,
    *,
    share: float = MEMORY_SHARE,
) -> bool:
    estimate = memory_estimate(
        config.model.architecture(),
        micro_batch=micro_batch,
        dtype=dtype,
        recompute_every=every,
        recompute_norms=config.recompute.norms,
        stream=config.run.stream_dtype,
        device_type=ranks.device.type,
        compiled=config.run.compile is True,
        adapters=config.adapter_count(),
        optimizer_bytes=optimizer_bytes(config, ranks.world_size),
        average_bytes=average_bytes(config, ranks.world_size),
        statistics_ranks=ranks.world_size if config.log.statistics_every else 0,
    )
    return estimate.to_come <= share * free


def _choose_micro_batch(config: Config, dtype: Dtype, free: int, ranks: Ranks) -> int:
    """The largest micro-batch that divides the step and whose estimate fits."""
    every = recompute_every(config)
    size = CPU_MICRO_BATCH if ranks.device.type == "cpu" else config.batch.tokens_per_step // config.model.block_size
    while True:
        size = largest_micro_batch(config.batch.tokens_per_step, config.model.block_size, ranks.world_size, size)
        if _fits(config, size, dtype, every, free, ranks):
            return size
        if size == 1:
            raise UserError(
                f"not even a micro-batch of one sequence of {config.model.block_size} tokens fits into "
                f"{format_bytes(free)}: use --recompute.mode full, or a smaller model.preset or model.block_size"
            )
        size -= 1


def set_determinism(deterministic: bool, device: torch.device) -> None:
    """Make CUDA give the same bits on every run, or let it choose the fastest kernels with TensorFloat-32."""
    if device.type != "cuda":
        return
    torch.backends.cuda.matmul.allow_tf32 = not deterministic
    torch.backends.cudnn.allow_tf32 = not deterministic
    torch.use_deterministic_algorithms(deterministic)
    if deterministic:  # what inductor compiles, too: it chooses kernels by timing them, which gives others every time
        from torch._inductor import config as inductor

        if hasattr(inductor, "deterministic"):
            inductor.deterministic = True
