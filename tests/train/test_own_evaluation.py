"""A new evaluation is a file and a line: here one that is added from outside."""

import json
from pathlib import Path

import pytest

from common.checkpoint_files import list_checkpoints
from common.metrics_file import read_metrics
from data_prep.token_sets.token_set import TokenSet
from tests.helpers.ranks import RankGroup
from tests.helpers.token_sets import make_token_set
from tests.helpers.training import losses, run_of, tiny_arguments, train, train_as_rank
from train.evaluations import registry
from train.evaluations.evaluation import WHOLE, Evaluation, Parts, Tools, is_due
from train.progress import Progress


class CountNorms(Evaluation):
    """A toy: how many parameters of the model have one dimension."""

    name, phase = "toy", "counting"

    def due(self, step: int, *, last: bool) -> Parts:
        return WHOLE if last or is_due(step, 8) else ()

    def build(self, tools: Tools) -> None:
        self._tools = tools

    def measure(self, progress: Progress, parts: Parts) -> None:
        count = sum(parameter.dim() == 1 for parameter in self._tools.model.parameters())
        self._tools.recorder.note({"kind": self.name, "step": progress.step, "tokens": progress.tokens, "toy": count})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_token_set(folder, train_tokens=5_000, val_tokens=500)
    assert TokenSet.open(folder)
    return folder


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


def test_it_is_measured_when_due_on_all_ranks_and_made_up_for_after_a_failure(tmp_path: Path, data: Path) -> None:
    arguments = tiny_arguments(tmp_path, data, "own")
    run = run_of(tmp_path, "own")
    assert RankGroup(2, tmp_path / "store", train_with_the_toy, arguments).join() == [0, 0]
    assert measured(run.metrics) == dict.fromkeys(
        (8, 16, 20), 2 * 8 + 2
    )  # of a layer: 2 norms with 2, 4 biases; the last norm

    train(2, tmp_path, tiny_arguments(tmp_path, data, "calm"))
    assert losses(run) == losses(run_of(tmp_path, "calm")), "it has left the training curve as it is"

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


def train_and_fail_at_16(arguments: list[str]) -> None:
    train_with_the_toy(arguments, failing_at=16)
