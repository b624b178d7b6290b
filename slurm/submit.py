"""Submit a run to Slurm with submitit, or run the same on this machine.

    python slurm/submit.py --config train/configs/gpt2-124m.yaml --nodes 1 --time 12:00:00
    python slurm/submit.py --config train/configs/gpt2-1p3b.yaml --nodes 4 --dry-run -- --optim.lr 1e-4
    python slurm/submit.py --config train/configs/gpt2-124m.yaml --sweep optim.lr=3e-4,6e-4
    python slurm/submit.py --jobs jobs.jsonl --gpus-per-node 1 --cpus-per-node 12

The job resumes by itself after pre-emptions, time limits and lost nodes, until the run is done.
"""

import argparse
import os
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import Any, cast

if __package__ in (None, ""):  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from common.early_end import end_in_one_line

    sys.excepthook = end_in_one_line

import submitit
from submitit.core.utils import FailedJobError
from submitit.local.local import LocalJob
from submitit.slurm.slurm import SlurmExecutor

from common.command_line import CommandParser
from common.errors import UserError, exit_on_user_error
from common.paths import PROJECT
from common.run_folder import RunFolder
from slurm.history import append_submission
from slurm.planned_jobs import Job, leave_out_queued, listed_jobs, plan_jobs
from slurm.training_task import TrainingTask
from train.estimates.machines import machine_of
from train.estimates.plan_text import as_text
from train.estimates.run_plan import make_plan
from train.estimates.time_limit import minutes
from train.settings.command_line import read_config

COMMON = (
    "config",
    "nodes",
    "gpus_per_node",
    "time",
    "partition",
    "account",
    "sweep",
    "dry_run",
    "local",
)  # that --help shows
NO_LIMIT = 1_000_000  # of time-outs; requeue.py's own rule ends a job that makes no progress
SIGNAL_SECONDS = 300  # before the time limit; Slurm may be a minute early or late
LOOK_SECONDS = 0.5


class SbatchWriter(SlurmExecutor):
    """submitit's executor, which can also be asked for its script where there is no Slurm."""

    @classmethod
    def affinity(cls) -> int:
        return 2

    def script(self, jobs: int) -> str:
        """The text that sbatch would get."""
        writer = SbatchWriter(self.folder, self.max_num_timeout, python=self.python)
        writer.update_parameters(**self.parameters)
        if jobs > 1:
            writer.parameters["map_count"] = jobs
        return str(writer._make_submission_file_text(writer._submitit_command_str, "dry-run"))


def build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(__doc__, common=COMMON)
    runs = parser.add_argument_group("what to run")
    what = runs.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", metavar="FILE", help="the run's configuration, or a name of one in train/configs")
    what.add_argument(
        "--jobs",
        type=Path,
        metavar="FILE",
        help="a job array of other runs: on each line a JSON list of train/pretrain.py's options; a run that is done "
        "or still queued is left out",
    )
    runs.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="KEY=A,B,…",
        help="a run for each value, as a job array; given twice, for each pair",
    )
    runs.add_argument("--at-once", type=int, metavar="N", help="jobs of an array that run at a time; default: 256")
    parser.add_argument("options", nargs="*", help="after --: options of train/pretrain.py")
    add_job(parser.add_argument_group("the job"))
    add_containers(parser.add_argument_group("containers, and the jobs' Python"))
    instead = parser.add_argument_group("instead of submitting")
    instead.add_argument("--dry-run", action="store_true", help="show what would be submitted")
    instead.add_argument("--gpu", metavar="NAME", help="the nodes' cards; --dry-run then shows the plan")
    instead.add_argument("--local", action="store_true", help="run on this machine, without Slurm")
    return parser


def add_job(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--nodes", type=int, default=1)
    group.add_argument("--gpus-per-node", type=int, default=8, help="0: train on CPUs")
    group.add_argument("--cpus-per-node", type=int, help="default: whole nodes, only for this job")
    group.add_argument("--time", default="24:00:00", help="of one start: minutes, H:MM:SS or D-HH:MM:SS")
    group.add_argument("--partition", default=os.environ.get("SBATCH_PARTITION"))
    group.add_argument("--account", default=os.environ.get("SBATCH_ACCOUNT"))
    group.add_argument("--job-name", metavar="NAME", help="default: the name of FILE")
    group.add_argument("--nodelist", metavar="NODES", help="only with these nodes")
    group.add_argument("--exclude", metavar="NODES", help="not with these nodes")
    group.add_argument("--mail-type", metavar="EVENTS", help="when to send mail: END,FAIL,REQUEUE, …")
    group.add_argument("--mail-user", metavar="ADDRESS", help="to whom; the submitter by default")


def add_containers(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--container", metavar="WORDS", help="before every Python command: 'apptainer exec --nv IMAGE'")
    group.add_argument("--image", help="sbatch --image, for Shifter; enter it by --container shifter")
    group.add_argument("--container-image", metavar="IMAGE", help="srun --container-image (pyxis)")
    group.add_argument("--container-mounts", metavar="FOLDER,…", help="what the image needs beside project and runs")
    group.add_argument("--python", help="the jobs'; default: LONGHAUL_CONTAINER_PYTHON, LONGHAUL_PYTHON or this one")


def setup_lines(a: argparse.Namespace, folders: list[Path]) -> list[str]:
    """The script's lines before srun. A container needs `folders` as they are on the nodes."""
    here = os.getcwd()
    lines = [f"cd {shlex.quote(here)}"]
    lines += [f". {shlex.quote(str(PROJECT / 'slurm' / name))}" for name in ("site_environment.sh", "requeue.sh")]
    lines += [f"export PYTHONPATH={shlex.quote(str(PROJECT))}${{PYTHONPATH:+:$PYTHONPATH}}"]
    lines += ["export SRUN_CPUS_PER_TASK=$SLURM_CPUS_ON_NODE"]
    if a.container:
        lines += [f"in_container=({shlex.join(shlex.split(a.container))})"]
    if a.container_image:
        more = (a.container_mounts or "").split(",")
        mounts = dict.fromkeys(filter(None, [str(PROJECT), here, *map(str, folders), *more]))
        pairs = ",".join(mount if ":" in mount else f"{mount}:{mount}" for mount in mounts)
        options = [f"--container-image={a.container_image}", f"--container-mounts={pairs}"]
        options += [f"--container-workdir={here}"]
        lines += [f"srun_options+=({shlex.join(options)})"]
    default = f"${{LONGHAUL_CONTAINER_PYTHON:-${{LONGHAUL_PYTHON:-{shlex.quote(sys.executable)}}}}}"
    lines += [f"job_python={shlex.quote(a.python) if a.python else default}"]
    return [*lines, 'srun() { command srun "${srun_options[@]}" "$@"; }']


def slurm_parameters(a: argparse.Namespace, folders: list[Path]) -> dict[str, Any]:
    """The contents of the sbatch script."""
    parameters: dict[str, Any] = {
        "job_name": a.job_name or Path(a.config or a.jobs).stem,
        "array_parallelism": a.at_once,
        "nodes": a.nodes,
        "ntasks_per_node": 1,
        "gpus_per_node": a.gpus_per_node,
        "time": minutes(a.time),
        "signal_delay_s": SIGNAL_SECONDS,
        "partition": a.partition,
        "account": a.account,
        "stderr_to_stdout": True,
        "exclude": a.exclude,
        "nodelist": a.nodelist,
        "mail_type": a.mail_type,
        "mail_user": a.mail_user,
        "setup": setup_lines(a, folders),
        "teardown": ["end_job $?"],
        "additional_parameters": {"requeue": True, "open-mode": "append"} | ({"image": a.image} if a.image else {}),
    }
    if a.cpus_per_node is None:
        parameters |= {"exclusive": True, "mem": "0"}
    else:
        parameters["cpus_per_task"] = a.cpus_per_node
    return {name: value for name, value in parameters.items() if value is not None}


def make_private(folder: Path) -> None:
    """Make a folder that only the user may enter: a job executes the pickles that submitit writes there for it."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)


def plan_lines(a: argparse.Namespace, job: Job) -> list[str]:
    """What a run takes on the nodes that are asked for. Raises UserError where its batch does not divide."""
    if a.gpus_per_node < 1:
        return []
    if a.gpu is None:
        return ["name the nodes' cards (--gpu h100) for memory, hours and GPU hours"]
    config, _ = read_config(job.options)
    machine = machine_of(a.gpu, a.nodes, a.gpus_per_node)
    return as_text(make_plan(config, machine, limit_seconds=60.0 * minutes(a.time))).splitlines()


def submit(a: argparse.Namespace, jobs: list[Job], tasks: list[TrainingTask]) -> None:
    """Submit to Slurm, or show what would be submitted."""
    python = '"${in_container[@]}" "$job_python"'  # variables of the script, set where it runs
    executor = SbatchWriter(jobs[0].submitit / "%j", max_num_timeout=NO_LIMIT, python=python)
    folders = sorted({job.folder.parent for job in jobs})
    executor.update_parameters(**slurm_parameters(a, folders))
    if a.dry_run:
        print(executor.script(len(jobs)))
        for job in jobs:
            print(f"# {job.folder}: train/pretrain.py {shlex.join(job.options)}")
            for line in plan_lines(a, job):
                print(f"#   {line}")
        return
    if shutil.which("sbatch") is None:
        raise UserError("sbatch is not on this machine: run this on the cluster's login node, or give --local")
    make_private(jobs[0].submitit)
    try:
        with executor.batch():
            submitted = [executor.submit(task) for task in tasks]
    except FailedJobError as error:
        raise UserError(f"not submitted: {error}") from None
    for job, handle in zip(jobs, submitted, strict=True):
        append_submission(RunFolder(job.folder), handle.job_id)
        print(f"submitted job {handle.job_id}: {job.folder}, output in {handle.paths.stdout}")
    print("python slurm/status.py shows their status")


def run_here(jobs: list[Job], tasks: list[TrainingTask], gpus: int) -> int:
    """Run one after another on this machine, showing their output."""
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH")]))
    status = 0
    for job, task in zip(jobs, tasks, strict=True):
        make_private(job.submitit)
        executor = submitit.LocalExecutor(job.submitit / "%j", max_num_timeout=NO_LIMIT)
        executor.update_parameters(timeout_min=NO_LIMIT, stderr_to_stdout=True, nodes=1, gpus_per_node=gpus)
        handle = cast(LocalJob[str], executor.submit(task))
        print(f"running {job.folder}, output in {handle.paths.stdout}", flush=True)
        try:
            _show_until_done(handle)
        except KeyboardInterrupt:  # the terminal has sent it to the trainers as well
            print("the trainers save and exit; the same command resumes", file=sys.stderr)
            raise
        try:
            print(handle.result())
        except Exception as error:
            print(str(error).strip().splitlines()[-1], file=sys.stderr)
            status = 1
    return status


def _show_until_done(handle: LocalJob[str]) -> None:
    shown = 0
    while True:
        done = handle.done()
        text = handle.paths.stdout.read_text(encoding="utf-8", errors="replace") if handle.paths.stdout.exists() else ""
        print(text[shown:], end="", flush=True)
        shown = len(text)
        if done:
            return
        time.sleep(LOOK_SECONDS)


def jobs_to_submit(a: argparse.Namespace) -> list[Job]:
    """Raises UserError for options that no trainer would accept."""
    if a.jobs is None:
        return plan_jobs(a.config, a.options, a.sweep)
    if a.sweep:
        raise UserError("--sweep is for --config: leave it out, and list the runs in --jobs' file")
    jobs, left_out = leave_out_queued(listed_jobs(a.jobs, a.options))
    print("\n".join(left_out), end="\n" if left_out else "", flush=True)
    return jobs


def main() -> int:
    a = build_parser().parse_args()
    if a.local and a.nodes > 1:
        raise UserError("--local is for this one machine: leave --nodes out")
    if a.local and (a.image or a.container or a.container_image):
        raise UserError("--local doesn't enter a container: start submit.py itself inside it")
    if a.at_once is not None and a.at_once < 1:
        raise UserError(f"--at-once is {a.at_once}: use 1 or more")
    jobs = jobs_to_submit(a)
    if not jobs:
        print("nothing to submit")
        return 0
    tasks = [TrainingTask(job.options, job.folder, max(1, a.gpus_per_node)) for job in jobs]
    if a.local:
        return run_here(jobs, tasks, a.gpus_per_node)
    submit(a, jobs, tasks)
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
