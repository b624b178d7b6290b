"""Jobs of tiny runs on the test cluster: submitting them, watching them, and making things happen to them."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from common.metrics_file import read_metrics
from common.run_folder import RunFolder
from tests.helpers.listening import listened_at
from tests.helpers.training import PROJECT, curve
from tests.slurm.cluster import Cluster

STEPS = 40
SAVE_STEPS = 10
# smoke.yaml, with steps that are slow enough for faults to land between them
OPTIONS = [
    "--config=train/configs/smoke.yaml",
    "--batch.tokens_per_step=2048",
    "--batch.micro_batch=1",
    f"--checkpoint.every_steps={SAVE_STEPS}",
    "--eval.tokens=512",
    "--eval.sample_every_steps=0",
    f"--run.max_steps={STEPS}",
    "--run.dtype=fp32",
]
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}


def environment_of(process: psutil.Process) -> dict[str, str]:
    """A process's variables; none of one that has ended, or that the kernel runs."""
    try:
        return dict(process.environ())
    except (psutil.Error, OSError):
        return {}


@dataclass
class Job:
    """A submitted job and the run it trains."""

    id: str
    run: RunFolder
    cluster: Cluster
    output_file: Path

    @property
    def facts(self) -> dict[str, str]:
        return self.cluster.job(self.id)

    @property
    def output(self) -> str:
        return self.output_file.read_text() if self.output_file.exists() else ""

    @property
    def state(self) -> dict[str, Any]:
        return self.run.read_state() or {}

    @property
    def lines(self) -> list[dict[str, Any]]:
        """slurm.jsonl"""
        path = self.run.path / "slurm.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def decisions(self) -> list[str]:
        return [line["decision"] for line in self.lines if line["kind"] == "end"]

    def listening(self) -> set[str]:
        """The addresses at which the job's launchers and ranks listen, each in its node's own network."""
        found = {address for process in self._trainers() for address in listened_at(process.pid)}
        assert found, "gloo listens somewhere: nothing was looked at"
        return found

    def command_lines(self) -> str:
        """Of all the job's processes, as every user of a node can read them."""
        return "\n".join(word for process in self._processes() for word in process.cmdline())

    def _trainers(self) -> list[psutil.Process]:
        found = [process for process in self._processes() if "train/pretrain.py" in " ".join(process.cmdline())]
        assert found
        return found

    def _processes(self) -> list[psutil.Process]:
        return [process for process in psutil.process_iter() if environment_of(process).get("SLURM_JOB_ID") == self.id]

    def step(self) -> int:
        """The last step that the run has recorded."""
        return max([record["step"] for record in read_metrics(self.run.metrics)], default=0)

    def wait_for_step(self, step: int, *, start: int = 0) -> None:
        """Until the run has done `step` in the job's start of that number."""

        def reached() -> bool:
            assert self.facts["JobState"] not in ENDED, f"ended: {self.output}"
            ours = self.state.get("restart_count") == start and self.state.get("job_id") == self.id
            return ours and self.state["status"] == "running" and self.step() >= step

        self.wait_for(reached, f"step {step} of start {start}")

    def wait_for_state(self, *states: str, seconds: float = 90.0) -> None:
        self.wait_for(lambda: self.facts["JobState"] in states, " or ".join(states), seconds)

    def wait_for_restart(self, number: int) -> None:
        self.wait_for(lambda: int(self.facts["Restarts"]) >= number, f"restart {number}")

    def wait_for_text(self, text: str, seconds: float = 90.0) -> None:
        self.wait_for(lambda: text in self.output, text, seconds)

    def completes(self, *, restarts: int, like: RunFolder) -> None:
        """The job must end well after so many restarts, every loss as in the undisturbed run, to the bit."""
        self.wait_for_state(*ENDED, seconds=150)
        facts = self.facts
        assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", str(restarts)), self.output
        assert self.state["status"] == "done"
        assert curve(self.run) == curve(like)

    def wait_for(self, happened: Any, what: str, seconds: float = 90.0) -> None:
        try:
            self.cluster.wait_for(happened, what, seconds=seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.facts}\n{self.output}") from None

    def rank_pids(self) -> dict[int, int]:
        """Process ids, as seen from outside the nodes, of the run's ranks."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                words = (folder / "cmdline").read_bytes().split(b"\0")
                environment = (folder / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if (
                f"--run.name={self.run.path.name}".encode() in words
                and b"SLURM_JOB_ID=" + self.id.encode() in environment
            ):
                as_tasks = b"LONGHAUL_LAUNCH=srun" in environment and any(
                    b"train/pretrain.py" in word for word in words
                )
                name = b"SLURM_PROCID=" if as_tasks else b"RANK="
                ranks = [word for word in environment if word.startswith(name)]
                if ranks:
                    found[int(ranks[0].split(b"=")[1])] = int(folder.name)
        return found

    def signal_rank(self, rank: int, number: signal.Signals) -> None:
        os.kill(self.rank_pids()[rank], number)


@dataclass
class Bench:
    """Where the jobs of a test session run and what they read."""

    cluster: Cluster
    folder: Path
    data: Path

    def run(self, name: str) -> RunFolder:
        return RunFolder(self.folder / "runs" / name)

    def options(self, name: str, *more: str) -> list[str]:
        return [*OPTIONS, f"--data.path={self.data}", f"--run.root={self.folder / 'runs'}", f"--run.name={name}", *more]

    @property
    def environment(self) -> dict[str, str]:
        return {"LONGHAUL_PYTHON": sys.executable, "OMP_WAIT_POLICY": "PASSIVE", "TORCH_CPP_LOG_LEVEL": "ERROR"}

    def submit(
        self,
        name: str,
        *more: str,
        script: str = "slurm/1p3b.sh",
        sbatch: tuple[str, ...] = (),
        cwd: Path = PROJECT,
        **environment: str,
    ) -> Job:
        """`sbatch -N 2 --gpus-per-node=0 slurm/1p3b.sh …`, as a person types it in the repository."""
        output = self.folder / f"{name}-%j.out"
        flags = ["--nodes=2", "--gpus-per-node=0", f"--output={output}", *sbatch]
        done = self.cluster.run(
            "sbatch", *flags, script, *self.options(name, *more), cwd=cwd, **(self.environment | environment)
        )
        assert done.returncode == 0, done.stderr
        job_id = done.stdout.split()[-1]
        return Job(job_id, self.run(name), self.cluster, Path(str(output).replace("%j", job_id)))

    def pre_empt(self) -> None:
        """Somebody more important needs all nodes, for a moment."""
        line = ["--partition=high", "--exclusive", f"--nodes={len(self.cluster.nodes)}", "--output=/dev/null"]
        self.cluster.ask("sbatch", *line, "--wrap=true")

    def run_python(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """One of the project's Python scripts, on the login node."""
        return self.cluster.run(sys.executable, *arguments, cwd=PROJECT, **(self.environment | environment))
