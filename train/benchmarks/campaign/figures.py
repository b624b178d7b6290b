"""What checks are made of: the commands, tiny and not, and where a figure lies in what they find."""

from collections.abc import Callable
from typing import Any

from train.benchmarks.campaign.running import Figure

PROBE = "train/benchmarks/campaign/probe.py"
STEP = "train/benchmarks/bench_step.py"
SIZES = ("--model.n_layer=2", "--model.n_head=2", "--model.n_embd=32", "--model.vocab_size=257")
TINY_STEP = (
    *SIZES, "--block-size=32", "--micro-batch", "2", "--dtype=fp32", "--device=cpu", "--threads=1", "--steps=1",
    "--turns=1",
)  # fmt: skip
GENERATE = ("eval/benchmarks/bench_generate.py", "--json={json}", "--threads", "1", "--no-rerun")
OURS = ("--contestants", "longhaul")


def probe(name: str, *options: str) -> tuple[str, ...]:
    return (PROBE, name, "--work={work}", "--data={data}", "--json={json}", *options)


def tiny_probe(name: str, *options: str) -> tuple[str, ...]:
    return (*probe(name), "--tiny", *options)


def bench_step(*options: str) -> tuple[str, ...]:
    """Two turns of three steps, after three that warm up."""
    return (STEP, "--json={json}", "--warm-up=3", "--steps=3", "--turns=2", *options)


def tiny_step(*contestants: str) -> tuple[str, ...]:
    return (STEP, "--json={json}", *TINY_STEP, "--contestants", *contestants)


def at(*keys: str | int) -> Callable[[Any], Any]:
    """What lies there in a check's JSON; of a yes or no, 1 or 0."""

    def read(result: Any) -> Any:
        for key in keys:
            result = result[key]
        return float(result) if isinstance(result, bool) else result

    return read


def rows_of(result: Any, contestant: str = "longhaul") -> list[Any]:
    """One contestant's of each case of bench_step.py that has figures."""
    rows = [row for case in result["cases"] for row in case["contestants"] if row["contestant"] == contestant]
    return [row for row in rows if row["tokens_per_second"] is not None]


def best(key: str) -> Callable[[Any], float | None]:
    return lambda result: max((row[key] for row in rows_of(result) if row[key] is not None), default=None)


def memory_shares(result: Any) -> list[float]:
    return [row["peak_bytes"] / row["estimated_bytes"] for row in rows_of(result)]


def first_ratio(name: str) -> Callable[[Any], Any]:
    """Of the first case of bench_step.py."""
    return lambda result: next(iter(result["ratios"].values()))[name]


def speed(predicted: float | None = None, mfu: float | None = None) -> tuple[Figure, ...]:
    """Of bench_step.py's best case, and the memory of all."""
    return (
        Figure("tokens per second, best", best("tokens_per_second"), predicted),
        Figure("MFU, best", best("mfu"), mfu),
        Figure("idle share, least", lambda result: min(row["idle_share"] for row in rows_of(result)), 0.01),
        Figure("memory to estimate, most", lambda result: max(memory_shares(result)), 1.0, 0.85, 1.15, gpu_only=True),
        Figure("memory to estimate, least", lambda result: min(memory_shares(result)), 1.0, 0.85, 1.15, gpu_only=True),
    )


def real_steps(predicted: dict[str, float], **shares: float) -> tuple[Figure, ...]:
    """Of a run's own records, and its profile."""
    return (
        Figure("tokens per second", at("tokens_per_second"), predicted["tokens"]),
        Figure("MFU", at("mfu"), predicted["mfu"]),
        Figure("memory to estimate", at("peak_to_estimate"), 1.0, 0.85, 1.15, gpu_only=True),
        Figure("seconds to the first step", at("seconds_to_first_step")),
        Figure("seconds of the first step", at("seconds_of_first_step")),
        *(Figure(f"share of {part}", at("profile", "shares", part), share) for part, share in shares.items()),
    )


def differences(*names: tuple[str, float]) -> tuple[Figure, ...]:
    return tuple(Figure(name, at("differences", name), 0.0, most=most) for name, most in names)


def variant_ratio(one: str, other: str) -> Callable[[Any], float]:
    """Of tokens per second of two variants that the ddp probe has measured."""
    return lambda result: float(result[one]["tokens_per_second"] / result[other]["tokens_per_second"])


GENERATED = (
    Figure("tokens per second, the last", lambda result: result["figures"][-1]["tokens_per_second"]["longhaul"]),
    Figure("times transformers', one text", lambda result: result["figures"][0]["times_transformers"]),
    Figure("times transformers', the last", lambda result: result["figures"][-1]["times_transformers"]),
    Figure("share of the same tokens", lambda result: result["figures"][0]["same_texts"], 1.0),
)
