"""Runs of `train/pretrain.py` in processes of their own, and what their folders say afterwards."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.metrics_file import read_metrics
from common.paths import PROJECT
from common.run_folder import RunFolder
from model.meeting import STORE_FILE

PRETRAIN = PROJECT / "train" / "pretrain.py"
SHARING_RANK = Path(__file__).with_name("sharing_rank.py")
LOOK_SECONDS = 0.005
TINY_OPTIONS = ("--run.dtype=fp32", "--eval.tokens=1024", "--eval.sample_every_steps=0")
TINY_MODEL = (
    "--model.block_size=32", "--model.n_layer=2", "--model.n_head=2", "--model.n_embd=32",
    "--batch.tokens_per_step=1024", "--batch.micro_batch=8",
)  # fmt: skip


class Trainer:
    """A run that has been started."""

    def __init__(self, folder: RunFolder, processes: list["subprocess.Popen[bytes]"], output: Path) -> None:
        self.folder = folder
        self._processes = processes
        self._output = output

    @property
    def running(self) -> bool:
        return any(process.poll() is None for process in self._processes)

    def printed(self) -> str:
        return self._output.read_text(encoding="utf-8", errors="replace")

    def wait(self) -> list[int]:
        """Exit statuses of its ranks."""
        return [process.wait() for process in self._processes]

    def end_well(self) -> list[dict[str, Any]]:
        """Wait; the records that hold. Raises UserError where it has failed."""
        codes = self.wait()
        if any(codes):
            lines = " / ".join(self.printed().splitlines()[-8:])
            raise UserError(f"{self.folder.path.name} ended with {codes}: {lines}")
        return read_metrics(self.folder.metrics)

    def wait_until(self, seen: Callable[[], bool]) -> bool:
        """Look until it is seen, or the run has ended: whether it was."""
        while self.running:
            if seen():
                return True
            time.sleep(LOOK_SECONDS)
        return False

    def send(self, number: signal.Signals) -> None:
        for process in self._processes:
            process.send_signal(number)

    def has_step(self) -> bool:
        """Whether this run has recorded a step, of whichever start."""
        return self.folder.metrics.exists() and any("loss" in record for record in read_metrics(self.folder.metrics))

    def is_saving(self) -> bool:
        """Whether a checkpoint is being written: its folder has another name until it is whole."""
        return any(self.folder.checkpoints.glob(".step-*"))


class Trainers:
    """Starts runs below one folder, on one token set."""

    def __init__(self, work: Path, data: Path, *, tiny: bool) -> None:
        self._root = work / "runs"
        self._data = data
        self.tiny = tiny
        self._started: list[Trainer] = []

    def start(self, name: str, *options: str, ranks: int = 1, **variables: str) -> Trainer:
        """A run, or its resumption. Several ranks share the machine's first GPU."""
        self._root.mkdir(parents=True, exist_ok=True)
        own = [f"--data.path={self._data}", f"--run.root={self._root}", f"--run.name={name}", "--run.record_diff=false"]
        script = PRETRAIN if ranks == 1 else SHARING_RANK
        command = [sys.executable, str(script), *options, *own, *(TINY_OPTIONS if self.tiny else ())]
        count = len(self._started)
        output, store = (self._root / f"{name}-{count}.{kind}" for kind in ("printed", "store"))
        processes = []
        for rank in range(ranks):
            environment = os.environ | variables
            if ranks > 1:
                environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), STORE_FILE: str(store)}
                environment |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
            with open(output, "ab") as file:
                processes.append(subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment))
        self._started.append(Trainer(RunFolder.find(self._root, name), processes, output))
        return self._started[-1]

    def train(self, name: str, *options: str) -> list[dict[str, Any]]:
        """The records of a run that must end well. Raises UserError."""
        return self.start(name, *options).end_well()

    def end(self) -> None:
        for trainer in self._started:
            if trainer.running:
                trainer.send(signal.SIGKILL)
                trainer.wait()


@contextmanager
def trainers(work: Path, data: Path, *, tiny: bool) -> Iterator[Trainers]:
    """None of them is left running."""
    started = Trainers(work, data, tiny=tiny)
    try:
        yield started
    finally:
        started.end()


def training(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records of steps."""
    return [record for record in records if "kind" not in record and "loss" in record]


def last_validation(records: list[dict[str, Any]]) -> float:
    return [float(record["val_loss"]) for record in records if record.get("val_loss") is not None][-1]
