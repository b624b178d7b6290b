"""Which part of a run's processor time layer statistics take at `log.statistics_every 50`.

    python data_prep/docstrings.py --tokenizer gpt2-8k --out data/demo
    python records/2026-11-28-statistics/share_of_step.py --config train/configs/demo.yaml --run.max_steps 300

takes the options of train/pretrain.py. Processor seconds of this process, which waiting on a busy machine does not
change.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from common.errors import exit_on_user_error
from train.layer_statistics.layer_statistics import LayerStatistics
from train.optimization.step import Stepper
from train.pretrain import main as pretrain

EVERY = 50
SPENT = {"steps": 0.0, "statistics": 0.0}


def timed(function: Callable[..., Any], part: str) -> Callable[..., Any]:
    def measured(*arguments: Any, **keywords: Any) -> Any:
        started = time.process_time()
        try:
            return function(*arguments, **keywords)
        finally:
            SPENT[part] += time.process_time() - started

    return measured


def main() -> int:
    for name in ("before_update", "after_update", "record"):
        setattr(LayerStatistics, name, timed(getattr(LayerStatistics, name), "statistics"))
    Stepper.__call__ = timed(Stepper.__call__, "steps")  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as root:
        own = [f"--log.statistics_every={EVERY}", f"--run.root={root}", "--eval.every_steps=0"]
        sys.argv += [*own, "--eval.sample_every_steps=0", "--checkpoint.every_steps=0"]
        status = pretrain()
    share = SPENT["statistics"] / SPENT["steps"]
    print(f"{SPENT['steps']:.1f} s of steps, {SPENT['statistics']:.3f} s of statistics: {share:.2%}")
    return status or 0


if __name__ == "__main__":
    exit_on_user_error(main)
