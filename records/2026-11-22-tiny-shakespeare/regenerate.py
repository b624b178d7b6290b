"""Make this record again: the data, every run, its measurements, the figures.

    python records/2026-11-22-tiny-shakespeare/regenerate.py
    … regenerate.py --only causal-seed1 --runs runs/again --out runs/again/record

Runs resume where they stopped when it is started again. Options it doesn't know go to every run's trainer, such as
--run.max_steps 100.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parents[1]
if __name__ == "__main__":  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(PROJECT)

import yaml

from common.command_line import CommandParser
from common.errors import UserError, exit_on_user_error
from common.metrics_file import read_metrics, record_kind
from common.publish import write_json_whole, write_whole
from common.run_folder import RunFolder

WHOLE_STEPS, KEPT_EVERY = 100, 20  # of metrics.jsonl's steps, the first hundred stay and then every twentieth


@dataclass(frozen=True)
class StudyRun:
    """One run: the script that trains it (and which model, where it has several), its configuration, its seed."""

    script: tuple[Path | str, ...]
    config: str
    seed: int


TRAINER = (PROJECT / "train" / "pretrain.py",)
ON_TWO_CORES = (PROJECT / "train" / "launch.py", "--standalone", "--nproc_per_node=2", *TRAINER)
LEAK = HERE / "leak.py"
RUNS = {
    "causal-seed1": StudyRun(TRAINER, "causal", 1),
    "positions-norm-seed1": StudyRun((LEAK, "positions"), "causal", 1),
    "reported-positions-seed1": StudyRun((LEAK, "reported-positions"), "causal", 1),
    "reported-token-seed1": StudyRun((LEAK, "reported-token"), "causal", 1),
    "causal-seed2": StudyRun(TRAINER, "causal", 2),
    "causal-seed3": StudyRun(TRAINER, "causal", 3),
    "best": StudyRun(ON_TWO_CORES, "best", 1),
}


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = CommandParser(__doc__)
    parser.add_argument("--only", action="append", choices=list(RUNS), help="only this run; may be repeated")
    parser.add_argument("--file", type=Path, help="Tiny Shakespeare on this disk, instead of a download")
    parser.add_argument("--data", type=Path, default=PROJECT / "data" / "shakespeare", help="where the token set goes")
    parser.add_argument("--runs", type=Path, default=PROJECT / "runs" / "tiny-shakespeare", help="where runs go")
    parser.add_argument("--out", type=Path, default=HERE, help="where the record goes (default: here, in place)")
    parser.add_argument("--no-training", action="store_true", help="record the runs as they are, done or not")
    return parser.parse_known_args()


def main() -> int:
    arguments, trainer_options = parse_arguments()
    chosen = arguments.only or list(RUNS)
    if not arguments.no_training:
        prepare = [PROJECT / "data_prep" / "shakespeare.py", "--out", arguments.data]
        call(*prepare, *(["--file", arguments.file] if arguments.file else []))
    for name in chosen:
        run = RUNS[name]
        folder = RunFolder(arguments.runs / name)
        if not arguments.no_training:
            where = ["--data.path", arguments.data, "--run.root", arguments.runs, "--run.name", name]
            config = HERE / "configs" / f"{run.config}.yaml"
            call(*run.script, "--config", config, *where, "--run.seed", run.seed, *trainer_options)
        elif not folder.checkpoints.is_dir():
            print(f"{folder.path} is not there: skipped")
            continue
        record(folder, arguments.out / "runs" / name)
        call(HERE / "measure.py", folder.path, "--data", arguments.data, "--json", measured(arguments.out, name))
    call(HERE / "draw.py", arguments.out)
    return 0


def call(script: Path | str, *options: object) -> None:
    """Run a script with this Python. Raises UserError where it fails; it has said why."""
    done = subprocess.run([sys.executable, str(script), *map(str, options)])
    if done.returncode:
        raise UserError(f"{Path(script).name} ended with status {done.returncode}: see above, then start this again")


def measured(out: Path, name: str) -> Path:
    return out / "runs" / name / "measured.json"


def record(folder: RunFolder, to: Path) -> None:
    """Copy what is worth keeping of a run: configuration, provenance and metrics, thinned, without this machine."""
    to.mkdir(parents=True, exist_ok=True)
    write_whole(
        to / "config.yaml",
        yaml.safe_dump(plain_config(yaml.safe_load(folder.config.read_text(encoding="utf-8"))), width=120),
    )
    write_json_whole(
        to / "provenance.json", plain_provenance(json.loads(folder.provenance.read_text(encoding="utf-8")))
    )
    lines = [json.dumps(item) for item in thinned(read_metrics(folder.metrics))]
    write_whole(to / "metrics.jsonl", "\n".join(lines) + "\n")
    if folder.samples.exists() and folder.samples.stat().st_size:
        shutil.copyfile(folder.samples, to / "samples.jsonl")


def thinned(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Everything but training steps, and of these the first `WHOLE_STEPS`, every `KEPT_EVERY`th and the last."""
    last = max((item["step"] for item in records if record_kind(item) == "train"), default=0)

    def stays(item: dict[str, Any]) -> bool:
        step = item["step"]
        return record_kind(item) != "train" or step <= WHOLE_STEPS or step % KEPT_EVERY == 0 or step == last

    return [item for item in records if stays(item)]


def plain_config(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration with its paths relative to the project's folders."""
    config["run"]["root"] = "runs/tiny-shakespeare"
    config["data"]["path"] = "data/shakespeare"
    return config


def plain_provenance(provenance: dict[str, Any]) -> dict[str, Any]:
    """Where the run came from, without names of hosts, folders and kernels."""
    for start in provenance["starts"]:
        _, *words = shlex.split(start["command"])
        start["command"] = shlex.join(["python", *map(relative, words)])
        start["platform"] = start["platform"].split("-")[0]
        start["resumed_from"] = start["resumed_from"] and Path(start["resumed_from"]).name
        for rank in start["ranks"]:
            del rank["host"]
    return provenance


def relative(word: str) -> str:
    """An option's value; a path outside the project becomes its last part."""
    path = Path(word)
    if not path.is_absolute():
        return word
    return str(path.relative_to(PROJECT)) if path.is_relative_to(PROJECT) else path.name


if __name__ == "__main__":
    exit_on_user_error(main)
