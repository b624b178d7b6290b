"""Folders of finished runs whose losses follow a known law of their compute, for comparisons of groups."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

MODEL: dict[str, Any] = {
    "vocab_size": 257,
    "block_size": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 32,
    "position": "rope",
}
TOKENS_PER_STEP = 1_000
KEPT = ("flops", "val_bits_per_byte", "val_bytes", "causal")
RANKS = [{"rank": 0, "host": "node7", "device": "cpu", "threads": 1, "cpu": "Fast CPU"}]


def law(tokens: float) -> float:
    """Nats a token."""
    return float(1.7 + 2.5 * (tokens / 1_000) ** -0.35)


def write_study_run(
    folder: Path,
    *,
    seed: int = 1,
    steps: int = 100,
    reached: int | None = None,
    every: int = 5,
    loss: Callable[[float], float] = law,
    step_seconds: float = 0.5,
    ranks: Sequence[dict[str, Any]] = RANKS,
    record: dict[str, Any] | None = None,
    kept: Sequence[str] = KEPT,
    more: Sequence[dict[str, Any]] = (),
    **options: Any,
) -> Path:
    """A run of so many steps with a validation at every `every`-th.

    Args:
        reached: the last step that it has done. loss: nats a token after so many tokens.
        record: what a validation's record has besides. kept: what a newer Longhaul records, of that which it does.
        more: other records. options: of the configuration, `optim__lr=0.1` for optim.lr.
    """
    folder.mkdir(parents=True)
    config: dict[str, Any] = {
        "model": dict(MODEL),
        "data": {"path": "data/tiny"},
        "optim": {"lr": 1e-3},
        "run": {"name": folder.name, "seed": seed, "max_steps": steps, "dtype": "fp32"},
    }
    for name, value in options.items():
        section, _, key = name.partition("__")
        config.setdefault(section, {})[key] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    (folder / "provenance.json").write_text(json.dumps({"starts": [{"ranks": list(ranks)}]}), encoding="utf-8")
    records: list[dict[str, Any]] = [{"kind": "start", "step": 0, "world_size": len(ranks), "time": 1.7e9}]
    for step in range((steps if reached is None else reached) + 1):
        tokens = step * TOKENS_PER_STEP
        if step:
            records.append({
                "step": step, "tokens": tokens, "loss": 2.0, "tokens_per_second": TOKENS_PER_STEP / step_seconds,
                "step_seconds": step_seconds, "memory_gib": 0.5, "time": 1.7e9 + step,
            })  # fmt: skip
        if step % every == 0:
            value = loss(tokens) if step else 5.5
            new = {"flops": 100_000.0 * tokens, "val_bits_per_byte": value * 1.25, "val_bytes": 3_000, "causal": True}
            new["val_loss_masked"] = 0.99 * value
            validation = {"step": step, "tokens": tokens, "val_loss": value, "val_sha256": "ab" * 32}
            validation |= {"val_tokens": 2_048, "val_block_size": 16, "val_document_mask": False}
            records.append({**validation, **{key: new[key] for key in kept}, **(record or {}), "time": 1.7e9 + step})
    lines = [json.dumps(record) for record in (*records, *more)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def write_group(root: Path, name: str, offsets: Sequence[float], *, gain: float = 1.0, **options: Any) -> str:
    """Runs of seeds 1, 2, … as `NAME=RUN,RUN,…`, each `offset` nats above what `gain` times the tokens give."""
    paths = []
    for number, offset in enumerate(offsets):

        def loss(tokens: float, offset: float = offset) -> float:
            return law(tokens * gain) + offset

        paths.append(write_study_run(root / f"{name}{number}", seed=number + 1, loss=loss, **options))
    return f"{name}={','.join(map(str, paths))}"
