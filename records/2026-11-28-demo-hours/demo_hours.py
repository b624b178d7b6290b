"""What the demo takes, predicted from 20 real steps, beside what it took, several times in turn.

    python data_prep/docstrings.py --tokenizer gpt2-8k --out data/demo
    python records/2026-11-28-demo-hours/demo_hours.py --json records/2026-11-28-demo-hours/hours.json

Each time `train/plan.py --measure` plans the demo, and the demo is then trained in a folder that is deleted. Nothing
else should run on the machine. More options of train/pretrain.py may follow, for both (such as --run.max_steps 60 for a
trial). The file is written after each time.
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

PROJECT = Path(__file__).resolve().parents[2]
DEMO = ["--config", str(PROJECT / "train" / "configs" / "demo.yaml")]
WITHIN = 0.15  # what is asked for


def run(*words: str) -> float:
    """Seconds that a command of the project took. Its output is shown where it fails."""
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, *words], cwd=PROJECT, capture_output=True, encoding="utf-8", errors="replace"
    )
    if done.returncode:
        raise SystemExit(
            f"{words[0]} ended with status {done.returncode}: {done.stderr[-2000:] or done.stdout[-2000:]}"
        )
    return time.monotonic() - started


def predict_and_train(options: list[str], steps: int) -> dict[str, Any]:
    """One row: seconds as predicted, and as they were."""
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plan.json"
        measuring = run("train/plan.py", *DEMO, *options, "--measure", str(steps), "--json", str(file))
        plan = json.loads(file.read_text(encoding="utf-8"))
        took = run("train/pretrain.py", *DEMO, *options, "--run.root", folder, "--run.name", "demo")
    predicted = 3600 * plan["hours"]
    return {
        "predicted_seconds": predicted,
        "took_seconds": took,
        "miss": predicted / took - 1,
        "predicted_by_part": {name: 3600 * hours for name, hours in plan["hours_by_part"].items()},
        "step_seconds": plan["step_seconds"],
        "measuring_seconds": measuring,
        "load_before": load,  # of the minute before; an idle machine has less than 1
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    parser.add_argument("--times", type=int, default=3, metavar="N", help="default: 3")
    parser.add_argument("--measured-steps", type=int, default=20, metavar="N", help="default: 20")
    a, options = parser.parse_known_args()
    rows: list[dict[str, Any]] = []
    for number in range(1, a.times + 1):
        rows.append(row := predict_and_train(options, a.measured_steps))
        print(f"{number}: {row['predicted_seconds']:.1f} s predicted, {row['took_seconds']:.1f} s in reality "
              f"({row['miss']:+.1%})", flush=True)  # fmt: skip
        facts = {
            "options": options,
            "measured_steps": a.measured_steps,
            "cores": os.cpu_count(),
            "largest_miss": max(abs(row["miss"]) for row in rows),
            "median_miss": statistics.median(row["miss"] for row in rows),
            "within_15_percent": all(abs(row["miss"]) <= WITHIN for row in rows),
            "rows": rows,
        }
        a.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
