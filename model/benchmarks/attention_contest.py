"""The ways to attend in turns: `bench_attention.py` without its command line."""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError
from common.progress import progress_bar
from common.publish import write_json_output
from model.attention_masks import Visibility, attend, see_before
from model.flex import flex_works


def dense_window(length: int, window: int, device: torch.device) -> Visibility:
    """The window as a mask over all pairs, which hides keys without skipping their work."""
    index = torch.arange(length, device=device)
    distance = index[:, None] - index[None, :]
    return Visibility(causal=False, mask=((distance >= 0) & (distance < window))[None, None])


def contestants(options: argparse.Namespace, device: torch.device) -> dict[str, Visibility]:
    """The visibility of each contestant, by name; masks are made once, as once per forward of a model."""
    length, window = options.length, options.window
    ways = {
        "full causal": see_before(length, None, None, device),
        "window, dense mask": dense_window(length, window, device),
        "window, in blocks": see_before(length, window, None, device),
    }
    if flex_works(device, getattr(torch, options.dtype), options.head_size):
        ways["window, FlexAttention"] = see_before(length, window, None, device, flex=True)
    return ways


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Time of one call, the device's queue emptied before and after."""
    synchronise(device)
    start = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - start


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Median seconds of forward and backward, and differences from the dense mask, by contestant."""
    device = torch.device(options.device)
    ways = contestants(options, device)
    torch.manual_seed(0)
    shapes = [(options.batch, heads, options.length, options.head_size) for heads in head_counts(options)]
    dtype = getattr(torch, options.dtype)
    q, k, v = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes)

    def train(way: Visibility) -> tuple[Tensor, ...]:
        return torch.autograd.grad(attend(q, k, v, way).sum(), (q, k, v))

    with torch.no_grad():
        outputs = {name: attend(q, k, v, way).float() for name, way in ways.items()}
    expected = outputs["window, dense mask"]
    times: dict[str, list[float]] = {name: [] for name in ways}
    with progress_bar(options.repeats + 1, "round", "attention") as bar:
        for turn in range(options.repeats + 1):
            for name, way in ways.items():
                seconds = seconds_of(lambda way=way: train(way), device)  # type: ignore[misc]
                if turn > 0:  # the first warms up
                    times[name].append(seconds)
            bar.update()
    full = statistics.median(times["full causal"])
    return {
        name: {
            "milliseconds": 1000 * statistics.median(values),
            "ratio_to_full": statistics.median(values) / full,
            "difference": None if name == "full causal" else (outputs[name] - expected).abs().max().item(),
        }
        for name, values in times.items()
    }


def head_counts(options: argparse.Namespace) -> tuple[int, int, int]:
    """Random q (B, H, T, D), k and v (B, K, T, D)."""
    return options.heads, options.kv_heads, options.kv_heads


def check(options: argparse.Namespace) -> None:
    """Raises UserError for sizes that can't be used."""
    small = [name for name, value in vars(options).items() if isinstance(value, int) and value < 1]
    if small:
        raise UserError(f"--{small[0].replace('_', '-')} is {getattr(options, small[0])}: use 1 or more")
    if options.heads % options.kv_heads:
        raise UserError(f"--heads is {options.heads}, not a multiple of --kv-heads {options.kv_heads}: make it one")
    if options.device != "cpu" and not (options.device.startswith("cuda") and torch.cuda.is_available()):
        raise UserError(f"--device is {options.device}, but PyTorch sees no such device here: use cpu")


def compare_attention(options: argparse.Namespace) -> None:
    check(options)
    torch.set_num_threads(options.threads)
    figures = measure(options)
    shape = f"B {options.batch}, H {options.heads}, K {options.kv_heads}, T {options.length}, D {options.head_size}"
    print(f"{shape}, W {options.window}, {options.dtype} on {options.device}, torch {torch.__version__}")
    print(f"{'forward and backward':<24}{'ms':>10}{'to full':>10}{'difference':>14}")
    for name, row in figures.items():
        difference = "" if row["difference"] is None else f"{row['difference']:.1e}"
        print(f"{name:<24}{row['milliseconds']:>10.1f}{row['ratio_to_full']:>10.2f}{difference:>14}")
    if options.json:
        settings = {name: value for name, value in vars(options).items() if name != "json"}
        write_json_output(options.json, {"settings": settings, "torch": torch.__version__, "contestants": figures})
