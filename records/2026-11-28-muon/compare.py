"""How many steps Muon needs for the final loss of AdamW: Tiny Shakespeare by the character, docstrings by the byte.

    python data_prep/shakespeare.py --out data/shakespeare
    python records/2026-11-28-muon/compare.py --data data/shakespeare
    python data_prep/docstrings.py --tokenizer byte --out data/docstrings-byte
    python records/2026-11-28-muon/compare.py --data data/docstrings-byte --out docstrings \\
        --muon-rates 4e-3 8e-3 16e-3 32e-3

Both optimizers are tuned with the same number of trials (learning rates) at full length and one seed. The best of AdamW
runs with three seeds at full length, the best of Muon with the same seeds and shorter schedules, too: compared is how
long a schedule has to be, not how soon a long one passes a loss on its way down. The result of each run is written to
OUT/NAME.json as it ends; what exists is not run again. OUT/summary.json is written last.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from common.command_line import CommandParser
from common.errors import UserError, exit_on_user_error
from common.metrics_file import read_metrics
from common.paths import PROJECT
from common.publish import write_json_whole
from common.run_folder import RunFolder

HERE = Path(__file__).resolve().parent
RATES = (1e-3, 2e-3, 4e-3, 8e-3)
SEEDS = (1, 2, 3)
PARTS = (1.0, 0.75, 0.5)  # of the full length
CONFIG = """
model: {block_size: 64, n_layer: 4, n_head: 4, n_embd: 128, norm: rmsnorm, position: rope, mlp: swiglu, bias: false,
        vocab_multiple: 1}
data: {stride: 1}
optim: {beta2: 0.99, weight_decay: 0.1}
schedule: {kind: cosine, warmup: 0.05, final_lr_fraction: 0.02}
batch: {tokens_per_step: 2048, micro_batch: 32}
checkpoint: {every_steps: 0, keep_last: 1}
eval: {every_steps: 0, tokens: 32768, prompts: []}
log: {every_steps: 100}
run: {device: cpu, dtype: fp32, compile: false}
"""


def main() -> int:
    arguments = _arguments()
    results, rates = HERE / arguments.out, {"adamw": RATES, "muon": arguments.muon_rates}
    results.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.yaml"
        config.write_text(CONFIG, encoding="utf-8")

        def run(kind: str, rate: float, seed: int, part: float) -> dict[str, Any]:
            steps = round(arguments.steps * part)
            name = f"{kind}-lr{rate:g}-seed{seed}-steps{steps}"
            result = results / f"{name}.json"
            if not result.exists():
                write_json_whole(result, train(name, kind, rate, seed, steps, config, arguments.data, Path(folder)))
            return dict(json.loads(result.read_text(encoding="utf-8")))

        best = {}
        for kind, tried in rates.items():
            trials = {rate: run(kind, rate, SEEDS[0], 1.0)["val_loss"] for rate in tried}
            best[kind] = min(trials, key=lambda rate: trials[rate])
        adamw = [run("adamw", best["adamw"], seed, 1.0)["val_loss"] for seed in SEEDS]
        muon = {part: [run("muon", best["muon"], seed, part)["val_loss"] for seed in SEEDS] for part in PARTS}
    write_json_whole(results / "summary.json", summary(arguments.steps, best, adamw, muon))
    return 0


def train(
    name: str, kind: str, rate: float, seed: int, steps: int, config: Path, data: Path, folder: Path
) -> dict[str, Any]:
    """One run of the trainer, and what it came to. Raises UserError where it fails."""
    started = time.monotonic()
    options = {
        "data.path": data,
        "optim.kind": kind,
        "optim.lr": rate,
        "run.seed": seed,
        "run.max_steps": steps,
        "run.root": folder / "runs",
        "run.name": name,
    }
    command = [sys.executable, str(PROJECT / "train" / "pretrain.py"), f"--config={config}"]
    done = subprocess.run([*command, *(f"--{key}={value}" for key, value in options.items())])
    if done.returncode != 0:
        raise UserError(f"{name} ended with status {done.returncode}")
    records = list(read_metrics(RunFolder(folder / "runs" / name).metrics))
    validations = {str(r["step"]): r["val_loss"] for r in records if r.get("val_loss") is not None}
    found = {
        "kind": kind,
        "lr": rate,
        "seed": seed,
        "steps": steps,
        "tokens": steps * 2048,
        "val_loss": validations[str(steps)],
        "val_losses": validations,
        "seconds": time.monotonic() - started,
        "load_average": os.getloadavg(),
        "config": CONFIG.strip(),
    }
    print(f"{name}: {found['val_loss']:.4f} in {found['seconds']:.0f} s", flush=True)
    return found


def summary(steps: int, best: dict[str, float], adamw: list[float], muon: dict[float, list[float]]) -> dict[str, Any]:
    """The part of AdamW's steps that Muon's schedule needs, between those that were tried."""
    goal = statistics.mean(adamw)
    means = {part: statistics.mean(losses) for part, losses in sorted(muon.items())}
    needed, before = None, None
    for part, loss in means.items():
        if loss <= goal:
            needed = part
            if before is not None:
                shorter, worse = before
                needed = shorter + (part - shorter) * (worse - goal) / (worse - loss)
            break
        before = part, loss
    return {
        "steps": steps,
        "trials_each": len(RATES),
        "best_lr": best,
        "adamw_val_loss": {"mean": goal, "deviation": statistics.stdev(adamw), "seeds": adamw},
        "muon_val_loss_by_part": {str(part): {"mean": means[part], "seeds": muon[part]} for part in means},
        "part_of_the_steps_needed": needed,
        "at_most_that_of_the_shortest_tried": needed == min(means),
        "aim": 0.75,
    }


def _arguments() -> argparse.Namespace:
    parser = CommandParser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="the token set")
    parser.add_argument("--out", default="compare", help="folder of the results, beside this file (default: compare)")
    parser.add_argument(
        "--muon-rates", nargs=len(RATES), type=float, default=RATES, metavar="RATE", help="Muon's trials"
    )
    parser.add_argument("--steps", type=int, default=300, help="of AdamW's runs (default 300)")
    return parser.parse_args()


if __name__ == "__main__":
    exit_on_user_error(main)
