"""Processor time and memory of a step with each of the study's variants at 124M parameters, beside the base's.

    python records/2026-11-28-architecture/speed_at_124m.py

Every variant is measured by train/benchmarks/bench_step.py in a process of its own, in two rounds of opposite order, on
one thread. Where a small model has 32 keys in a window or 2 of 4 heads, this one has 256 of 1,024 and 4 of 12.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parents[1]
AT_124M = {"model.window": 256}
HEADS = {2: 4, 1: 1}
STEP = ["--preset", "gpt2-124m", "--micro-batch", "1", "--contestants", "longhaul", "--threads", "1", "--dtype", "bf16",
        "--compile", "false", "--turns", "2", "--steps", "1"]  # fmt: skip


def options_of(variant: dict[str, Any]) -> list[str]:
    """A variant's options of bench_step at this size."""
    options = {key: AT_124M.get(key, value) for key, value in variant.items() if key.startswith("model.")}
    if "model.n_kv_head" in options:
        options["model.n_kv_head"] = HEADS[options["model.n_kv_head"]]
    return [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in options.items()]


def measure(variant: dict[str, Any]) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "step.json"
        command = [sys.executable, str(PROJECT / "train" / "benchmarks" / "bench_step.py"), *STEP, *options_of(variant)]
        subprocess.run([*command, f"--json={file}"], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        case = json.loads(file.read_text(encoding="utf-8"))["cases"][0]
    (found,) = case["contestants"]
    return {"processor_seconds": found["processor_seconds"]["median"], "peak_bytes": found["peak_bytes"]}


def main() -> None:
    study = yaml.safe_load((HERE / "study.yaml").read_text(encoding="utf-8"))
    names = list(study["variants"])
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for order in (names, names[::-1]):
        for name in order:
            measured[name].append(measure(study["variants"][name]))
            print(name, measured[name][-1], flush=True)
    figures: dict[str, dict[str, Any]] = {
        name: {key: statistics.median(turn[key] for turn in turns) for key in ("processor_seconds", "peak_bytes")}
        | {"turns": [turn["processor_seconds"] for turn in turns]}
        for name, turns in measured.items()
    }
    base = figures["base"]
    lines = ["| variant | processor time of a step | memory |", "|---|---|---|"]
    for name, found in figures.items():
        time, memory = (found[key] / base[key] for key in ("processor_seconds", "peak_bytes"))
        lines.append(f"| {name} | {time:.2f} | {memory:.2f} |")
    print("\n".join(lines))
    (HERE / "speed_at_124m.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
