"""A batch that a step did not learn from is run again, and the first layer with NaN or inf is named."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from common.run_folder import RunFolder
from data_prep.token_sets.sequences import Windows
from data_prep.token_sets.token_set import TokenSet
from eval.reporting.page import page
from eval.reporting.run_data import load_run
from model.config import ModelConfig
from model.gpt import GPT
from model.initialisation import initialise
from model.ranks import start_ranks
from tests.helpers.html_tables import plain_cells
from tests.helpers.notes import Notes
from tests.helpers.ranks import run_ranks
from tests.helpers.token_sets import make_token_set
from tests.helpers.training import run_of, start_ranks_training, tiny_arguments
from train.batches.loader import StepLoader
from train.batches.plan import plan_batch
from train.layer_statistics.bad_batch import MOST, BadBatches, _first

CONFIG = ModelConfig(
    vocab_size=257, block_size=8, n_layer=3, n_head=2, n_embd=16, dropout=0.1, value_residual=True, logit_softcap=20.0
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_token_set(folder, train_tokens=3_000, val_tokens=300)
    return folder


def examine(data: Path, folder: Path, nan_at: str | None, steps: int) -> tuple[list[str], bool]:
    """A rank's part: what is logged, and whether weights, gradients and random numbers stayed as they were."""
    ranks, lines = start_ranks("cpu"), Notes()
    model = GPT(CONFIG)
    initialise(model, seed=1)
    if nan_at is not None and ranks.rank == ranks.world_size - 1:
        with torch.no_grad():
            model.get_parameter(nan_at)[0] = math.inf
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    plan = plan_batch(8 * 8, 8, 2, ranks.world_size)
    loader = StepLoader(Windows(TokenSet.open(data).split("train"), 8), plan, rank=ranks.rank, seed=1)
    examiner = BadBatches(model, ranks, RunFolder(folder), lines, "fp32")  # type: ignore[arg-type]
    random = torch.get_rng_state()
    for step in range(1, steps + 1):
        examiner.examine(loader.step_at(8 * step), step, "it was skipped")
    kept = all(torch.equal(before[name], p) and p.grad is None for name, p in model.named_parameters())
    ranks.close()
    return lines.lines, kept and torch.equal(random, torch.get_rng_state())


def test_the_first_layer_is_named_with_rank_and_sequence(tmp_path: Path, data: Path) -> None:
    (lines, kept), (others, kept_too) = run_ranks(
        2, tmp_path / "store", examine, data, tmp_path, "h.1.mlp.c_fc.bias", 1
    )
    assert kept and kept_too and others == []
    (line,) = lines
    assert "(rank 1) has loss nan; NaN or inf came up first in the forward of h.1" in line
    found: dict[str, Any] = json.loads(RunFolder(tmp_path).bad_batch(1).read_text())
    assert found["first"] == "forward of h.1" and found["blocks"] == 3 and found["why"] == "it was skipped"
    assert found["activation_max"][0] > 0 and found["activation_max"][1] is None
    assert f"sequence {found['sequence']} " in line


def test_only_the_first_few_of_a_run_are_examined(tmp_path: Path, data: Path) -> None:
    ((lines, kept),) = run_ranks(1, tmp_path / "one", examine, data, tmp_path, None, MOST)
    ((more, _),) = run_ranks(1, tmp_path / "two", examine, data, tmp_path, None, MOST + 1)
    assert kept and len(lines) == MOST and more == []
    assert "all values are finite, the largest, " in lines[0]


def test_the_forward_comes_before_the_head_and_that_before_the_backward() -> None:
    inf, nan = math.inf, math.nan
    assert _first(nan, [1.0, inf], [nan, nan]) == "forward of h.1"
    assert _first(nan, [1.0, 1.0], [nan, nan]) == "forward of the head"
    assert _first(1.0, [1.0, 1.0], [nan, nan]) == "backward of the head"
    assert _first(1.0, [1.0, 1.0], [nan, 1.0]) == "backward of h.1"
    assert _first(1.0, [1.0, 1.0], [1.0, 1.0]) is None


def test_a_run_that_ends_in_a_loss_that_is_not_finite_says_where(tmp_path: Path, data: Path) -> None:
    options = ["--optim.lr=1e30", "--schedule.warmup=0", "--optim.grad_clip=0", "--eval.every_steps=0"]
    group = start_ranks_training(1, tmp_path, tiny_arguments(tmp_path, data, "bad", *options))
    assert group.join() != [0]
    run = run_of(tmp_path, "bad")
    log = run.log.read_text()
    assert "NaN or inf came up first in the " in log
    (path,) = (run.path / "bad-batches").glob("step-*.json")
    found = json.loads(path.read_text())
    report = page([load_run(run.path)], {}, 0.0)
    assert f"<td>{found['step']}</td><td>{found['why']}</td>" in plain_cells(report)
    assert f"NaN or inf came up first in the {found['first']}" in report
    assert "<b>adamw</b><span>optimizer</span>" in report
    path.write_text("{}")
    spoilt = load_run(run.path)
    assert spoilt.bad_batches == [] and [line for line in spoilt.complaints if str(path) in line]
