"""The last weights of a run beside their exponential average and the mean of its last checkpoints.

    python data_prep/docstrings.py --tokenizer byte --out data/docstrings-byte
    python records/2026-11-28-averages/measure_averages.py --json records/2026-11-28-averages/averages.json

The small Llama of the recipe study, three seeds, once with a constant learning rate and once with a linear decay to
zero over the last 40 % of the steps. The same 131,072 validation tokens for all.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[2]
SCHEDULES: dict[str, dict[str, Any]] = {
    "constant": {"schedule.kind": "constant"},
    "decayed": {"schedule.kind": "wsd", "schedule.decay": 0.4, "schedule.final_lr_fraction": 0.0},
}
EVERY_STEPS, KEPT, HALF_LIFE_TOKENS = 12, 6, 100_000
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def python(*arguments: object) -> None:
    subprocess.run(
        [sys.executable, *map(str, arguments)],
        check=True,
        cwd=PROJECT,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def bits_per_byte(run: Path, *options: str) -> float:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "perplexity.json"
        python(
            "eval/perplexity.py",
            run,
            "--tokens",
            131_072,
            "--micro-batch",
            64,
            "--dtype",
            "bf16",
            "--json",
            file,
            *options,
        )
        found: float = json.loads(file.read_text(encoding="utf-8"))["bits_per_byte"]["value"]
        return found


def measure(schedule: dict[str, Any], seed: int, root: Path) -> dict[str, float]:
    options = {
        "run.root": root, "run.name": "run", "run.seed": seed, "optim.ema_half_life_tokens": HALF_LIFE_TOKENS,
        "checkpoint.every_steps": EVERY_STEPS, "checkpoint.keep_last": KEPT, "eval.every_steps": 0, **schedule,
    }  # fmt: skip
    given = [text for key, value in options.items() for text in (f"--{key}", value)]
    python("train/pretrain.py", "--config", "records/2026-11-28-recipe/base.yaml", *given)
    python("eval/average.py", root / "run", "--last", KEPT, "--out", root / "mean")
    return {
        "last": bits_per_byte(root / "run"),
        "ema": bits_per_byte(root / "run", "--weights", "ema"),
        f"mean of the last {KEPT}": bits_per_byte(root / "mean"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, required=True)
    target = parser.parse_args().json
    rows = []
    for name, schedule in SCHEDULES.items():
        for seed in (1, 2, 3):
            with tempfile.TemporaryDirectory() as folder:
                rows.append({"schedule": name, "seed": seed} | measure(schedule, seed, Path(folder)))
            print(rows[-1], flush=True)
    target.write_text(json.dumps({"unit": "bits per byte", "rows": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
