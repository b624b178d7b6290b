"""Do devices, compilers, attention's backends and dtypes learn the same? Losses of the trainer's own step, compared."""

import gc
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from common.host_limits import allowed_cores
from common.paths import PROJECT
from model import gpt
from train.benchmarks.campaign.replaced import replaced
from train.benchmarks.contestants import build
from train.benchmarks.step_cases import Case
from train.benchmarks.step_worker import describe, random_batch
from train.optimization.compilation import report_compilations
from train.settings.command_line import read_config
from train.startup.auto import set_determinism

ARCHITECTURES = PROJECT / "train" / "configs" / "architectures"
STEPS = 20
Note = Callable[[Any], None]  # takes what is known so far, so that a check that is cut short leaves that
SHAPE = ("--model.block_size=512", "--model.n_layer=4", "--model.n_head=4", "--model.n_embd=256", "--optim.lr=1e-3")
TINY = (
    "--model.block_size=32", "--model.n_layer=2", "--model.n_head=2", "--model.n_embd=32", "--model.vocab_size=257",
    "--optim.lr=1e-3",
)  # fmt: skip
BACKENDS = {
    "math": SDPBackend.MATH,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


def case_of(options: list[str], *, micro_batch: int = 4, configs: tuple[Path, ...] = ()) -> Case:
    """A step of one micro-batch."""
    config, _ = read_config([*(f"--config={file}" for file in configs), *options])
    tokens = micro_batch * config.model.block_size
    config = replace(config, batch=replace(config.batch, micro_batch=micro_batch, tokens_per_step=tokens))
    return Case("campaign", config, ("longhaul",), turns=1, steps=1, warm_up=1, threads=allowed_cores(), profile=None)


def losses_of(
    case: Case, device: torch.device, steps: int = STEPS, context: AbstractContextManager[object] | None = None
) -> list[float]:
    """Of a model that learns two batches by heart. Raises what the step raises."""
    with context or nullcontext():
        step = build("longhaul", case, device).step
        batches = [random_batch(case, number, pinned=device.type == "cuda") for number in range(2)]
        losses = [step(batches[number % 2], number + 1) for number in range(steps)]
    gc.collect()
    return [math.nan if loss is None else loss for loss in losses]


def parity(device: torch.device, *, tiny: bool, note: Note) -> dict[str, Any]:
    """Losses by variant, and how far each is from the one it is compared with, relative to that."""
    shape = [*(TINY if tiny else SHAPE)]
    fp32, bf16 = ([*shape, f"--run.dtype={dtype}", "--run.compile=false"] for dtype in ("fp32", "bf16"))
    compiled = [[*options[:-1], "--run.compile=true"] for options in (fp32, bf16)]
    cpu = torch.device("cpu")
    variants: dict[str, tuple[list[str], torch.device, str | None]] = {  # the last: what it is compared with
        "cpu fp32": ([*fp32, "--run.device=cpu"], cpu, None),
        "device fp32": (fp32, device, "cpu fp32"),
        "device bf16": (bf16, device, "device fp32"),
    }
    if not tiny:
        variants["device fp32 compiled"] = (compiled[0], device, "device fp32")
        variants["device bf16 compiled"] = (compiled[1], device, "device bf16")
    for name in ["math"] if tiny else BACKENDS:
        variants[f"device bf16 {name}"] = (bf16, device, "device bf16")
    found: dict[str, Any] = {"losses": {}, "differences": {}, "errors": {}}
    for name, (options, where, other) in variants.items():
        backend = BACKENDS.get(name.rpartition(" ")[2])
        set_determinism("fp32" in name, device)  # without TensorFloat-32; some of the attentions have no exact form
        try:
            losses = losses_of(case_of(options), where, context=None if backend is None else sdpa_kernel(backend))
        except Exception as error:  # of a backend, a compiler, a driver: an entry of its own
            found["errors"][name] = describe(error)
            continue
        found["losses"][name] = losses
        if other in found["losses"]:
            found["differences"][f"{name} from {other}"] = difference(losses, found["losses"][other])
        note(found)
    return found


def difference(losses: list[float], others: list[float]) -> float:
    """The largest of any step, relative to the others' loss; infinite where one is NaN or inf."""
    pairs = zip(losses, others, strict=True)
    return max(abs(one - other) / other if math.isfinite(one) else math.inf for one, other in pairs)


def architectures(device: torch.device, *, tiny: bool, note: Note) -> dict[str, Any]:
    """Each architecture's file, with documents and without: losses compiled and eager, compilations by step."""
    files = sorted(ARCHITECTURES.glob("*.yaml"))
    rows: list[dict[str, Any]] = []
    for file in files[:2] if tiny else files:
        for documents in (False, True):
            options = [*(TINY if tiny else SHAPE), f"--data.document_mask={str(documents).lower()}", "--run.dtype=bf16"]
            row: dict[str, Any] = {"architecture": file.stem, "documents": documents}
            torch._dynamo.reset()
            try:
                row |= _architecture(options, file, device, compiles=not tiny)
            except Exception as error:  # the others are tried all the same
                row["error"] = describe(error)
            rows.append(row)
            note(_together(rows))
    return _together(rows)


def _together(rows: list[dict[str, Any]]) -> dict[str, Any]:
    def largest(key: str) -> float | None:
        return max((row[key] for row in rows if key in row), default=None)

    return {
        "rows": rows,
        "errors": sum("error" in row for row in rows),
        "least_first_compilations": min(
            (row["compilations"][0] for row in rows if "compilations" in row), default=None
        ),
        "late_compilations": sum(row.get("late_compilations", 0) for row in rows),
        "largest_difference": largest("difference"),
        "largest_flex_difference": largest("flex_difference"),
    }


def _architecture(options: list[str], file: Path, device: torch.device, *, compiles: bool) -> dict[str, Any]:
    compilations: list[None] = []
    report_compilations(lambda: compilations.append(None), lambda: None)  # anew: a reset forgets whom to tell
    case, eager = (
        case_of([*options, f"--run.compile={str(choice).lower()}"], configs=(file,)) for choice in (compiles, False)
    )
    step = build("longhaul", case, device).step
    batch, losses, counts = random_batch(case, 0, pinned=device.type == "cuda"), [], []
    for number in range(4):
        compilations.clear()
        losses.append(step(batch, number + 1) or math.nan)
        counts.append(len(compilations))
    row = {"losses": losses, "compilations": counts, "late_compilations": sum(counts[1:])}
    row["difference"] = difference(losses, _same_batch(eager, device))
    if eager.config.model.window or eager.config.data.masks_documents:  # else FlexAttention has nothing to do
        with replaced(gpt, "flex_works", lambda *_: False):
            row["flex_difference"] = difference(losses, _same_batch(eager, device))
    return row


def _same_batch(case: Case, device: torch.device) -> list[float]:
    step, batch = build("longhaul", case, device).step, random_batch(case, 0, pinned=device.type == "cuda")
    return [step(batch, number + 1) or math.nan for number in range(4)]
