"""A new evaluation is a file and a line: here one that is added from outside, which every reader shows."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from common.checkpoint_files import list_checkpoints
from common.curves import Curve
from common.metrics_file import read_metrics
from common.progress import format_duration
from common.run_folder import RunFolder
from data_prep.token_sets.token_set import TokenSet
from model.ranks import Ranks
from tests.helpers.ranks import RankGroup
from tests.helpers.token_sets import make_token_set
from tests.helpers.training import PROJECT, losses, run_of, tiny_arguments, train, train_as_rank
from tests.train.test_wandb_mirror import mirrored_steps
from train.evaluations import registry
from train.evaluations.evaluation import WHOLE, Evaluation, Parts, Tools, is_due
from train.progress import Progress
from train.run.recorder import Recorder


class CountNorms(Evaluation):
    """A toy: how many parameters of the model have one dimension."""

    name, phase = "toy", "counting"
    curves = (Curve("toy", "toy", "Toy count", seconds="toy_seconds", measured_on=(("toy_parameters",),)),)

    def due(self, step: int, *, last: bool) -> Parts:
        return WHOLE if last or is_due(step, 8) else ()

    def build(self, tools: Tools) -> None:
        self._tools = tools

    def measure(self, progress: Progress, parts: Parts) -> None:
        parameters = list(self._tools.model.parameters())
        count = sum(parameter.dim() == 1 for parameter in parameters)
        self._tools.recorder.note({
            "kind": self.name,
            "step": progress.step,
            "tokens": progress.tokens,
            "toy": count,
            "toy_parameters": len(parameters),
            "toy_seconds": 0.25,
            "time": time.time(),
        })  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_token_set(folder, train_tokens=5_000, val_tokens=500)
    assert TokenSet.open(folder)
    return folder


COUNT = 2 * 8 + 2  # of a layer: 2 norms with 2, 4 biases; the last norm


def train_with_the_toy(arguments: list[str], *, failing_at: int | None = None) -> None:
    from train.startup import request

    class Failing(CountNorms):
        def measure(self, progress: Progress, parts: Parts) -> None:
            if progress.step == failing_at:
                raise ZeroDivisionError
            super().measure(progress, parts)

    pytest.MonkeyPatch().setattr(request, "EVALUATIONS", (*registry.EVALUATIONS, Failing))
    train_as_rank(arguments)


def measured(run: Path) -> dict[int, int]:
    return {record["step"]: record["toy"] for record in read_metrics(run) if record.get("kind") == "toy"}


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory, data: Path) -> RunFolder:
    """A run of two ranks with the evaluation, mirrored to wandb."""
    root = tmp_path_factory.mktemp("own")
    arguments = tiny_arguments(root, data, "own", "--log.wandb=true")
    assert RankGroup(2, root / "store", train_with_the_toy, arguments).join() == [0, 0]
    return run_of(root, "own")


def test_it_is_measured_when_due_on_all_ranks_and_made_up_for_after_a_failure(
    tmp_path: Path, data: Path, own: RunFolder
) -> None:
    assert measured(own.metrics) == dict.fromkeys((8, 16, 20), COUNT)

    train(2, tmp_path, tiny_arguments(tmp_path, data, "calm"))
    assert losses(own) == losses(run_of(tmp_path, "calm")), "it has left the training curve as it is"

    # step 16 is saved, and its evaluation is not done: the next start resumes there
    saving = ("--checkpoint.every_steps=8", "--checkpoint.asynchronous=false")
    short = tiny_arguments(tmp_path, data, "short", *saving)
    failing = RankGroup(1, tmp_path / "store", train_and_fail_at_16, short)
    assert failing.join() == [1]
    cut = run_of(tmp_path, "short")
    assert json.loads(cut.state.read_text())["failure"] == "exception"
    assert list(measured(cut.metrics)) == [8]
    assert max(step for step, _ in list_checkpoints(cut.checkpoints)) == 16
    assert RankGroup(1, tmp_path / "store", train_with_the_toy, short).join() == [0]
    assert list(measured(cut.metrics)) == [8, 16, 20]


def read(run: RunFolder, command: str, *arguments: str) -> str:
    """What a command prints, which knows nothing of this file."""
    done = subprocess.run(
        [sys.executable, str(PROJECT / command), str(run.path), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_every_reader_shows_it(tmp_path: Path, own: RunFolder) -> None:
    """From the run's folder only."""
    (start,) = [record for record in read_metrics(own.metrics) if record.get("kind") == "start"]
    assert start["curves"] == [CountNorms.curves[0].as_json()], "and validation, which all readers know, is not there"

    page = own.report / "report.html"
    read(own, "eval/report.py", "--json", str(tmp_path / "report.json"))
    (figures,) = json.loads((tmp_path / "report.json").read_text())["runs"]
    assert figures["seconds"]["toy"] == 0.75
    end = {"label": "Toy count", "value": COUNT, "error": None, "step": 20, "best": COUNT, "best_step": 8}
    assert figures["evaluations"] == {"toy": end}
    text = page.read_text(encoding="utf-8")
    assert 'aria-label="Toy count' in text
    assert f'<td class="any">Toy count, last</td><td class="number">{COUNT} (step 20)</td>' in text
    assert f"<b>{COUNT}</b><span>Toy count</span>" in text
    assert f'<td class="any">Toy count</td><td class="number">{format_duration(0.75)} (' in text, "where the time went"
    with Image.open(own.report / "evaluation-toy.png") as picture:
        assert min(picture.size) > 300

    assert f"Toy count {COUNT}" in read(own, "eval/watch.py", "--once")

    said = read(own, "eval/summary.py", "--json", str(tmp_path / "summary.json"))
    assert f"  Toy count         {COUNT}\n" in said
    assert json.loads((tmp_path / "summary.json").read_text())["evaluations"] == {"toy": end}

    said = read(own, "eval/compare.py", "--json", str(tmp_path / "models.json"))
    head, *_, row = said.split("\n\n")[0].splitlines()
    assert head.endswith("HellaSwag  Toy count") and row.endswith(f" {COUNT}")
    *published, row = json.loads((tmp_path / "models.json").read_text())["models"]
    assert row["evaluations"] == {"toy": end} and not any("evaluations" in model for model in published)

    assert mirrored_steps(own, "toy/toy") == [8, 16, 20], "while it trained"
    assert "records added" in read(own, "train/sync_wandb.py", "--again")
    assert mirrored_steps(own, "toy/toy") == [8, 16, 20] * 2, "and once more from its record"


def test_a_start_warns_of_a_curve_that_no_reader_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone = Ranks(rank=0, world_size=1, local_rank=0, local_world_size=1, device=torch.device("cpu"))
    recorder = Recorder(RunFolder(tmp_path), alone, 1, first_step=0, line_every=1)
    recorder.open_files()
    for curve, warned in ((CountNorms.curves[0], False), (replace(CountNorms.curves[0], figure="loss"), True)):
        recorder.note({"kind": "start", "step": 0, "curves": [curve.as_json()]})
        recorder.note({"kind": "toy", "step": 1, "toy": 1})
        assert capsys.readouterr().out.count("WARNING") == warned
    recorder.close()
    assert "WARNING" in (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert "curves.0: figure: loss is the name of something else" in (tmp_path / "log.txt").read_text(encoding="utf-8")


def train_and_fail_at_16(arguments: list[str]) -> None:
    train_with_the_toy(arguments, failing_at=16)
