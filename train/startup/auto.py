"""`auto` choices: resolved once, recorded in the run's folder, reused on resume as long as they fit into the memory."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch

from common.errors import UserError
from model.devices import free_memory_bytes
from model.number_formats import check_stream
from model.precision import resolve_dtype
from model.ranks import Ranks
from train.estimates.run_memory import Room, settle_memory
from train.optimization.compilation import trial_compilation
from train.settings.sections import Config
from train.startup.recorded_choices import reuse


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
    config, more = settle_memory(config, asked, Room(ranks.device.type, ranks.world_size, free))
    return config, [*reasons, *more]


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
