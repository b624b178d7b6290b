"""How soon a slow rank is named, and how often one is that is not slow, or a hang that is none.

    python tests/chaos/alarms.py --runs 20 --steps 60 --slower 0.2 --device-seconds 0.2 --json slow.json
    python tests/chaos/alarms.py --runs 1 --steps 5000 --load 4 --json clean.json

Runs of two gloo ranks of which one takes longer by `--slower` for each forward and backward, by a busy loop, or, with
0, neither; beside `--load` processes that do nothing but compute. With `--device-seconds` a forward and backward takes
at least so long, as on a device that nobody else uses: the cores of a busy machine slow down now one rank, now another.
Exit status 1 if a slow rank was not named within 50 steps, or there was any other alarm. Linux only.
"""

import argparse
import multiprocessing
import os
import re
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from common.command_line import CommandParser
from common.errors import exit_on_user_error
from common.metrics_file import read_metrics
from common.publish import write_json_whole
from common.run_folder import RunFolder
from tests.helpers.ranks import RankGroup
from tests.helpers.token_sets import make_token_set
from tests.helpers.training import train_as_rank

WANTED_STEPS = 50  # within which a slow rank is to be named
RUN_SECONDS = 3600.0
CONFIG = """
model: {block_size: 64, n_layer: 2, n_head: 2, n_embd: 64}
schedule: {warmup: 5}
batch: {tokens_per_step: 512, micro_batch: 4}
checkpoint: {every_steps: 100, keep_last: 2}
eval: {every_steps: 100, tokens: 1024, prompts: []}
run: {dtype: fp32, device: cpu}
"""


@dataclass(frozen=True)
class Found:
    """What one run has shown.

    Attributes:
        slowed: the rank, or None. named_at: the step at which it was named; None where it was not.
        times_the_other: of its own time of a step and the other's, by the records of all ranks.
        other_alarms: lines of the log about ranks that are not slow, and about hangs.
    """

    run: int
    slowed: int | None
    steps: int
    seconds: float
    named_at: int | None
    times_the_other: list[float]
    other_alarms: list[str]

    @property
    def ok(self) -> bool:
        in_time = self.slowed is None or (self.named_at is not None and self.named_at <= WANTED_STEPS)
        return in_time and not self.other_alarms


def train_slowed(slowed: int | None, slower: float, device_seconds: float, arguments: list[str]) -> None:
    """A rank of a run: the one that is `slowed` takes longer for each forward and backward."""
    from model.gpt import GPT
    from train.optimization.step import Stepper

    started = time.perf_counter()
    forward, end_own_part = GPT.forward, Stepper._end_own_part

    def timed_forward(*values: Any, **named: Any) -> Any:
        nonlocal started
        started = time.perf_counter()
        return forward(*values, **named)

    def end_later(self: Stepper) -> None:
        time.sleep(max(0.0, started + device_seconds - time.perf_counter()))
        if int(os.environ["RANK"]) == slowed:
            now = time.perf_counter()
            until = now + slower * (now - started)
            while time.perf_counter() < until:
                pass
        end_own_part(self)

    GPT.forward = timed_forward  # type: ignore[method-assign]
    Stepper._end_own_part = end_later  # type: ignore[method-assign]
    train_as_rank(arguments)


def compute() -> None:
    """Until the process that started this one is gone."""
    parent = os.getppid()
    while os.getppid() == parent:
        sum(range(100_000))


def one_run(number: int, folder: Path, steps: int, slower: float, device_seconds: float) -> Found:
    """Train, and read what the log and the records of all ranks show."""
    run = RunFolder(folder / "runs" / f"run-{number:02d}")
    slowed = number % 2 if slower else None
    options = [f"--config={folder / 'config.yaml'}", f"--data.path={folder / 'tokens'}"]
    options += [f"--run.root={folder / 'runs'}", f"--run.name={run.path.name}", f"--run.max_steps={steps}"]
    started = time.monotonic()
    codes = RankGroup(2, folder / "store", partial(train_slowed, slowed, slower, device_seconds, options)).join(
        RUN_SECONDS
    )
    assert codes == [0, 0], f"{run.path}: {codes}"
    lines = run.log.read_text(encoding="utf-8").splitlines()
    alarms = [line for line in lines if " computes " in line or "training hangs" in line]
    own = [line for line in alarms if f"rank {slowed} on " in line and " computes " in line]
    named = re.search(r"before step (\d+)\)", own[0]) if own else None
    times = [
        [round(value / min(record["compute_seconds"]), 3) for value in record["compute_seconds"]]
        for record in read_metrics(run.metrics)
        if record.get("kind") == "ranks"
    ]
    return Found(
        number,
        slowed,
        steps,
        round(time.monotonic() - started, 1),
        int(named[1]) if named else None,
        [max(pair) if slowed is None else pair[slowed] for pair in times],
        [line for line in alarms if line not in own],
    )


def main() -> int:
    arguments = _arguments()
    os.environ["OMP_NUM_THREADS"] = "1"
    folder = Path(tempfile.mkdtemp(prefix="alarms-"))
    (folder / "config.yaml").write_text(CONFIG, encoding="utf-8")
    make_token_set(folder / "tokens", train_tokens=200_000, val_tokens=5_000)
    load = [multiprocessing.get_context("spawn").Process(target=compute, daemon=True) for _ in range(arguments.load)]
    for process in load:
        process.start()
    done: list[Found] = []
    for number in range(1, arguments.runs + 1):
        done.append(one_run(number, folder, arguments.steps, arguments.slower, arguments.device_seconds))
        found = done[-1]
        print(
            f"[{number}/{arguments.runs}] rank {found.slowed} slowed, named at step {found.named_at}, "
            f"{len(found.other_alarms)} other alarms, {found.seconds:.0f} s",
            flush=True,
        )
        if arguments.json is not None:
            facts = {"slower": arguments.slower, "load": arguments.load, "cores": os.cpu_count()}
            facts |= {"device_seconds": arguments.device_seconds, "load_average": os.getloadavg()[0]}
            rows = [asdict(one) | {"ok": one.ok} for one in done]
            write_json_whole(arguments.json, {**summary(done), **facts, "rows": rows})
    for process in load:
        process.kill()
    print(summary(done))
    return int(not all(one.ok for one in done))


def summary(done: list[Found]) -> dict[str, Any]:
    """What all runs have shown."""
    slowed = [one for one in done if one.slowed is not None]
    named = [one.named_at for one in slowed if one.named_at is not None]
    return {
        "runs": len(done),
        "steps": sum(one.steps for one in done),
        "slowed": len(slowed),
        "named": len(named),
        "named_within_50_steps": sum(step <= WANTED_STEPS for step in named),
        "other_alarms": sum(len(one.other_alarms) for one in done),
    }


def _arguments() -> argparse.Namespace:
    parser = CommandParser(__doc__)
    parser.add_argument("--runs", type=int, default=1, help="one after another (default 1)")
    parser.add_argument("--steps", type=int, default=60, help="of each (default 60)")
    parser.add_argument("--slower", type=float, default=0.0, help="0.2: one rank takes 20 %% longer (default 0)")
    parser.add_argument("--device-seconds", type=float, default=0.0, help="of each forward and backward (default 0)")
    parser.add_argument("--load", type=int, default=0, help="processes that compute beside it (default 0)")
    parser.add_argument("--json", type=Path, help="the report, rewritten after each run")
    return parser.parse_args()


if __name__ == "__main__":
    exit_on_user_error(main)
