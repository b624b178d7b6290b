"""Parts of a step by themselves: the head's variants, attention's backends, DDP around one rank."""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from model import kernel_sizes
from model import loss as head
from model.chunk_kernel import ChunkKernel, compiled_kernel
from train.benchmarks.campaign.machine import seconds_of
from train.benchmarks.campaign.parity import BACKENDS, Note, case_of
from train.benchmarks.campaign.replaced import replaced
from train.benchmarks.contestants import build
from train.benchmarks.step_worker import describe, random_batch, synchronise
from train.optimization import ddp

REPEATS = 5


def heads(device: torch.device, *, tiny: bool, note: Note) -> dict[str, Any]:
    """Microseconds a token, forward and backward, and bytes at the peak, of ways to the loss of 124M's head."""
    rows, width, vocabulary = (64, 32, 250) if tiny else (32 * 1024, 768, 50_257)
    padded = -(-vocabulary // 128) * 128
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator).to(device).requires_grad_()
    weight = (0.02 * torch.randn(padded, width, generator=generator)).to(device).requires_grad_()
    targets = torch.randint(vocabulary, (rows,), generator=generator).to(device)

    kernel = None if tiny else compiled_kernel()

    def ours(kernel: ChunkKernel | None = kernel) -> Tensor:
        return head.head_loss(hidden, weight, targets, vocabulary, kernel=kernel)

    padding = torch.arange(padded, device=device) >= vocabulary

    def plain() -> Tensor:
        logits = F.linear(hidden, weight).float().masked_fill(padding, float("-inf"))
        return F.cross_entropy(logits, targets, reduction="sum")

    variants: dict[str, Callable[[], Tensor]] = {"longhaul": ours, "longhaul, eager": lambda: ours(None)}
    if not tiny:
        for chunk in (4096, 32_768):  # beside the usual size
            variants[f"longhaul, chunks of {chunk}"] = _with_chunks(ours, chunk)
        variants["plain, compiled"] = torch.compile(plain)
    variants["plain"] = plain
    if linear := getattr(F, "linear_cross_entropy", None):  # of torch 2.13
        variants["torch's linear_cross_entropy"] = lambda: linear(hidden, weight, targets, reduction="sum")

    def gradients(way: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        with torch.autocast(device.type, torch.bfloat16):
            loss = way()
        return loss.detach(), *torch.autograd.grad(loss, [hidden, weight])

    want = gradients(plain)

    def measure(way: Callable[[], Tensor]) -> dict[str, Any]:
        found = _measured(lambda: gradients(way), device, per=rows)
        return found | {"difference": max(_distance(a, b) for a, b in zip(gradients(way), want, strict=True))}

    return _each(variants, measure, note)


def _with_chunks(way: Callable[[], Tensor], rows: int) -> Callable[[], Tensor]:
    def chunked() -> Tensor:
        with replaced(kernel_sizes, "CHUNK_ROWS_KERNEL", rows):
            return way()

    return chunked


def _distance(one: Tensor, other: Tensor) -> float:
    """Relative, by norm."""
    return float((one.float() - other.float()).norm() / other.float().norm())


def attentions(device: torch.device, *, tiny: bool, note: Note) -> dict[str, Any]:
    """Microseconds a token and layer, forward and backward, of torch's backends, at the shapes of 124M and 1.3B."""
    shapes = {"tiny": (1, 2, 32, 16)} if tiny else {"124m": (32, 12, 1024, 64), "1p3b": (8, 16, 2048, 128)}
    found: dict[str, Any] = {}
    for name, shape in shapes.items():
        q, k, v = (torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))

        backward = torch.ones_like(q)

        def measure(
            backend: SDPBackend, q: Tensor = q, k: Tensor = k, v: Tensor = v, backward: Tensor = backward
        ) -> dict[str, Any]:
            def work() -> tuple[Tensor, ...]:
                with sdpa_kernel(backend):
                    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
                return torch.autograd.grad(out, [q, k, v], backward)

            return _measured(work, device, per=q.shape[0] * q.shape[2])

        backends = {"math": BACKENDS["math"]} if tiny else BACKENDS
        found[name] = _each(backends, measure, lambda rows, name=name: note(found | {name: rows}))  # type: ignore[misc]
    return found


def _each(variants: dict[str, Any], measure: Callable[[Any], dict[str, Any]], note: Note) -> dict[str, Any]:
    """By variant, what was measured, or the error in one line."""
    found: dict[str, Any] = {}
    for name, variant in variants.items():
        try:
            found[name] = measure(variant)
        except Exception as error:  # a kernel that is not there, memory that runs out
            found[name] = {"error": describe(error)}
        note(found)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return found


def _measured(work: Callable[[], Any], device: torch.device, *, per: int) -> dict[str, Any]:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    microseconds = 1e6 * seconds_of(work, device, REPEATS) / per
    peak = torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else None
    return {"microseconds_per_token": microseconds, "peak_bytes": peak}


def ddp_of_one(device: torch.device, options: list[str], *, micro_batch: int, tiny: bool, note: Note) -> dict[str, Any]:
    """Seconds a step without DDP, and with DDP around a single rank: its wrapper, buckets and hooks, no network."""
    case = case_of(options, micro_batch=micro_batch)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=HashStore(), rank=0, world_size=1)
    variants: dict[str, tuple[int | None, bool]] = {
        "no DDP": (None, False),
        "buckets of 100 MiB": (ddp.BUCKET_MIB, False),
        "buckets of 25 MiB": (25, False),
        "blocks cut by DDPOptimizer": (ddp.BUCKET_MIB, True),
    }

    def measure(variant: tuple[int | None, bool]) -> dict[str, Any]:
        torch._dynamo.reset()
        bucket, cut = variant
        with _wrapped(bucket):
            step = build("longhaul", case, device).step
        torch._dynamo.config.optimize_ddp = cut
        batch, times = random_batch(case, 0, pinned=device.type == "cuda"), []
        for number in range(3 if tiny else 10):
            synchronise(device)
            times.append(time.perf_counter())
            step(batch, number + 1)
        synchronise(device)
        times.append(time.perf_counter())
        seconds = sorted(after - before for before, after in pairwise(times))
        tokens = case.config.batch.tokens_per_step
        return {"seconds": seconds, "tokens_per_second": tokens / seconds[len(seconds) // 2]}

    found = _each(variants, measure, note)
    dist.destroy_process_group()
    return found


@contextmanager
def _wrapped(bucket: int | None) -> Iterator[None]:
    """Let `Parallel` wrap the model, though there is but one rank, with buckets of so many MiB; None: not at all."""
    initialise = ddp.Parallel.__init__

    def wrap(self: ddp.Parallel, model: torch.nn.Module, ranks: Any) -> None:
        initialise(self, model, ranks)
        ids = [ranks.device.index or 0] if ranks.device.type == "cuda" else None
        self._ddp = DistributedDataParallel(model, device_ids=ids, bucket_cap_mb=bucket, gradient_as_bucket_view=True)

    if bucket is None:
        yield
        return
    with replaced(ddp.Parallel, "__init__", wrap):
        yield
