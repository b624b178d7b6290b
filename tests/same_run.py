"""Run two versions of the project side by side on the same small data, and compare what they leave.

    python tests/same_run.py 5fce065 HEAD --json result.json
    python tests/same_run.py /path/to/another/checkout . --cases "1 rank" LoRA

OLD and NEW are folders of the project, or git revisions of this one, which are checked out aside for as long as it
takes. Both train on the CPU, with the Python that runs this. Records but for their times, samples, and all tensors of
all checkpoints must be the same to the bit. Only entries, options and files' formats are used, which later versions
keep. Exit status 1 if a case differs.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import psutil

from common.command_line import CommandParser
from common.errors import UserError, exit_on_user_error
from common.publish import file_to_write, write_json_output
from tests.helpers.compare_runs import first_difference, read_lines
from tests.helpers.token_sets import make_token_set
from tests.helpers.versions import checked_out, described

PATIENCE_SECONDS = 300.0  # for one training
KILL_AFTER_STEP = 10
SHARED_YAML = """
optim: {lr: 1.0e-2}
schedule: {kind: wsd, warmup: 3, decay: 0.25}
batch: {tokens_per_step: 192, micro_batch: 2}
checkpoint: {every_steps: 4, keep_last: 2, weights_every_steps: 8}
eval: {every_steps: 4, tokens: 256, sample_every_steps: 6, sample_tokens: 8, prompts: ["a"]}
log: {sequences: true}
run: {max_steps: 24, dtype: fp32, device: cpu, compile: false}
"""
CONFIGS = {
    "pretrain.yaml": "model: {block_size: 16, n_layer: 2, n_head: 2, n_embd: 32, dropout: 0.1}" + SHARED_YAML,
    "finetune.yaml": "lora: {rank: 2, dropout: 0.1}" + SHARED_YAML,
}


@dataclass(frozen=True)
class Case:
    """One way to train. `may_lack`: not every machine can; where both versions refuse, that is no difference."""

    name: str
    ranks: int = 1
    options: tuple[str, ...] = ()
    finetuned: bool = False
    killed: bool = False
    may_lack: bool = False


CASES = (
    Case("1 rank"),
    Case("2 ranks", ranks=2),
    Case("3 ranks", ranks=3),
    Case("fp16", options=("--run.dtype=fp16",), may_lack=True),
    Case("compiled", options=("--run.compile=true", "--run.max_steps=8"), may_lack=True),
    Case("LoRA", finetuned=True),
    Case("killed", ranks=2, options=("--run.max_steps=120",), killed=True),
)


class Refused(Exception):
    """A training ended with a mistake of the user's, status 2: its last line."""


@dataclass(frozen=True)
class Side:
    """One of the two versions, and the folder in which its runs lie."""

    checkout: Path
    work: Path
    data: Path

    def run(self, case: Case) -> Path:
        """Train as the case says; the folder of the run that is to be compared. Raises Refused, RuntimeError."""
        name = case.name.replace(" ", "-")
        run = self.work / "runs" / name
        if case.killed:
            self._kill_in_the_middle(case, run)
        self._train(case, "pretrain", name)
        if not case.finetuned:
            return run
        self._train(case, "finetune", f"{name}-tuned", str(run))
        return self.work / "runs" / f"{name}-tuned"

    def _kill_in_the_middle(self, case: Case, run: Path) -> None:
        process = self._start(case, "pretrain", run.name)
        until = time.monotonic() + PATIENCE_SECONDS
        while not any(record.get("step", 0) >= KILL_AFTER_STEP for record in read_lines(run / "metrics.jsonl")):
            if process.poll() is not None or time.monotonic() > until:
                kill_tree(process)
                raise RuntimeError(f"no step {KILL_AFTER_STEP} to kill it after: {self._last_line(run.name)}")
            time.sleep(0.01)
        kill_tree(process)
        if process.returncode != -signal.SIGKILL:
            raise RuntimeError("it ended before it could be killed")

    def _train(self, case: Case, entry: str, name: str, *more: str) -> None:
        process = self._start(case, entry, name, *more)
        try:
            status = process.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            kill_tree(process)
            raise RuntimeError(f"not done after {PATIENCE_SECONDS:.0f} s: {self._last_line(name)}") from None
        if status == 2:
            raise Refused(self._last_line(name))
        if status != 0:
            raise RuntimeError(f"exit status {status}: {self._last_line(name)}")

    def _start(self, case: Case, entry: str, name: str, *more: str) -> "subprocess.Popen[bytes]":
        launcher = ["train/launch.py", "--standalone", f"--nproc_per_node={case.ranks}"]
        command = [str(self.checkout / launcher[0]), *launcher[1:]] if case.ranks > 1 else []
        command += [str(self.checkout / "train" / f"{entry}.py"), *more, f"--config={self.work / entry}.yaml"]
        command += [f"--data.path={self.data}", f"--run.root={self.work / 'runs'}", f"--run.name={name}", *case.options]
        left_out = ("PYTHONPATH", "PYTHONHASHSEED", "MASTER_", "TORCHELASTIC_", "SLURM_")
        environment = {key: value for key, value in os.environ.items() if not key.startswith(left_out)}
        with open(self.work / f"{name}.log", "ab") as log:
            return subprocess.Popen(
                [sys.executable, *command],
                cwd=self.work,
                env=environment | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _last_line(self, name: str) -> str:
        lines = (self.work / f"{name}.log").read_text(encoding="utf-8", errors="replace").split("\n")
        errors = [line for line in lines if "rror: " in line] or [line for line in lines if line.strip()]
        return errors[-1].strip() if errors else "no output"


def kill_tree(process: "subprocess.Popen[bytes]") -> None:
    """SIGKILL for a process and all that it has started, at once."""
    try:
        tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        tree = []
    for one in tree:
        try:
            one.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()
    psutil.wait_procs(tree)


def compare(case: Case, old: Side, new: Side) -> tuple[bool | None, str]:
    """Whether a case is the same in both (None where this machine can't run it), and what differs first, or why."""
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(side.run, case) for side in (old, new)]
    failures = [run.exception() for run in runs]
    if case.may_lack and all(isinstance(failure, Refused) for failure in failures):
        return None, f"can't be run here: {failures[0]}"
    for name, failure in zip(("old", "new"), failures, strict=True):
        if failure is not None:
            return False, f"the {name} one failed: {failure}"
    found = first_difference(runs[0].result(), runs[1].result(), resumed=case.killed)
    return found is None, found or ""


def parse_arguments() -> argparse.Namespace:
    parser = CommandParser(__doc__)
    parser.add_argument("old", metavar="OLD", help="a folder of the project, or a git revision")
    parser.add_argument("new", metavar="NEW", help="what is compared with it: likewise")
    names = [case.name for case in CASES]
    parser.add_argument("--cases", nargs="+", choices=names, default=names, help="only these (default: all)")
    parser.add_argument("--json", type=file_to_write, help="the table as JSON, with both revisions and the versions")
    parser.add_argument("--work", type=Path, help="a new folder in which data, runs and logs stay, to be looked into")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    with ExitStack() as stack:
        checkouts = [stack.enter_context(checked_out(given)) for given in (arguments.old, arguments.new)]
        work = arguments.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="same-run-")))
        rows = run_cases([case for case in CASES if case.name in arguments.cases], checkouts, work.resolve())
        facts = {"old": described(checkouts[0]), "new": described(checkouts[1])}
    if arguments.json is not None:
        import torch

        versions = {"python": sys.version.split()[0], "torch": torch.__version__}
        write_json_output(arguments.json, {**facts, **versions, "cases": rows})
    return int(any(row["same"] is False for row in rows))


def run_cases(cases: list[Case], checkouts: list[Path], work: Path) -> list[dict[str, Any]]:
    """A row for each case, printed as soon as it is known. Raises UserError where the folder can't be made."""
    try:
        work.mkdir(parents=True, exist_ok=True)
        data = work / "tokens"
        make_token_set(data, train_tokens=9_001, val_tokens=600, shard_tokens=4_000)
        sides = [Side(checkout, work / name, data) for name, checkout in zip(("old", "new"), checkouts, strict=True)]
        for side in sides:
            side.work.mkdir()
            for name, text in CONFIGS.items():
                (side.work / name).write_text(text, encoding="utf-8")
    except FileExistsError as error:
        raise UserError(f"{error.filename} is there already: give --work a new folder") from None
    rows = []
    print(f"{'case':<10} {'ranks':<5} result", flush=True)
    for case in cases:
        same, why = compare(case, *sides)
        result = {True: "same", False: "differs: ", None: "skipped: "}[same] + why
        print(f"{case.name:<10} {case.ranks:<5} {result}", flush=True)
        rows.append({"case": case.name, "ranks": case.ranks, "same": same, "what": why})
    return rows


if __name__ == "__main__":
    exit_on_user_error(main)
