"""Layer norm over positions against per token, three seeds of each: does the comparison see that one reads the future?

    python data_prep/shakespeare.py --out data/shakespeare
    python records/2026-11-28-leak/leak_seeds.py --data data/shakespeare

Trains what is missing of six small runs (about a minute each on one core), the leaking ones by leak.py of
records/2026-11-22-tiny-shakespeare, then compares them by `train/study.py --compare`. What stays of a run is its result
file, runs/NAME.json; comparison.json and comparison.txt are what the command writes and prints.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

if __package__ in (None, ""):  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from common.command_line import CommandParser
from common.errors import UserError, exit_on_user_error
from common.paths import PROJECT
from common.publish import write_whole

HERE = Path(__file__).resolve().parent
EARLIER = PROJECT / "records" / "2026-11-22-tiny-shakespeare"
TRAINERS: dict[str, list[Path | str]] = {
    "per-token": [PROJECT / "train" / "pretrain.py"],
    "over-positions": [EARLIER / "leak.py", "positions"],
}
SEEDS = (1, 2, 3)
SMALLER = {  # than the earlier study's configuration, else the same
    "model.n_layer": 2,
    "model.n_embd": 64,
    "model.n_head": 4,
    "model.mlp_hidden": 256,
    "batch.micro_batch": 64,
    "checkpoint.every_steps": 0,
    "eval.every_steps": 250,
    "eval.tokens": 32768,
    "eval.prompts": "[]",
    "run.dtype": "fp32",
    "run.compile": "false",
}


def main() -> int:
    arguments = _arguments()
    results = {name: [HERE / "runs" / f"{name}-seed{seed}.json" for seed in SEEDS] for name in TRAINERS}
    with tempfile.TemporaryDirectory() as folder:
        for seed in SEEDS:
            for name in TRAINERS:
                result = HERE / "runs" / f"{name}-seed{seed}.json"
                if not result.exists():
                    train(name, seed, arguments.steps, arguments.data, Path(folder), result)
    groups = [f"{name}={','.join(str(path.relative_to(HERE)) for path in paths)}" for name, paths in results.items()]
    study = [sys.executable, str(PROJECT / "train" / "study.py"), "--compare", *groups, "--baseline", "per-token"]
    done = subprocess.run(
        [*study, "--json", "comparison.json"], cwd=HERE, capture_output=True, text=True, encoding="utf-8"
    )
    if done.returncode != 0:
        raise UserError(done.stderr.strip())
    print(done.stdout, end="")
    write_whole(HERE / "comparison.txt", done.stdout)
    return 0


def train(name: str, seed: int, steps: int, data: Path, folder: Path, result: Path) -> None:
    """One run, of which the result file stays. Raises UserError where it fails."""
    from eval.comparison.measured_runs import MeasuredRun

    run = f"{name}-seed{seed}"
    options = SMALLER | {
        "data.path": data,
        "run.seed": seed,
        "run.max_steps": steps,
        "run.root": "runs",
        "run.name": run,
    }
    command = [sys.executable, *map(str, TRAINERS[name]), f"--config={EARLIER / 'configs' / 'causal.yaml'}"]
    done = subprocess.run(
        [*command, *(f"--{key}={value}" for key, value in options.items())],
        cwd=folder,  # a relative data.path is looked for in the project, too
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    if done.returncode != 0:
        raise UserError(f"{run} ended with status {done.returncode}")
    result.parent.mkdir(exist_ok=True)
    MeasuredRun.load(folder / "runs" / run).write_result(result)


def _arguments() -> argparse.Namespace:
    parser = CommandParser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="Tiny Shakespeare as a token set, by the character")
    parser.add_argument("--steps", type=int, default=1200, help="of each run (default 1200)")
    return parser.parse_args()


if __name__ == "__main__":
    exit_on_user_error(main)
