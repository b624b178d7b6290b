"""What goes wrong in numbers is noticed: copies that drift apart, overflow in fp16, an impossible loss."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from common.checkpoint_files import list_checkpoints, read_checkpoint_manifest
from common.metrics_file import read_json_lines, read_metrics
from data_prep.token_sets.sequences import Windows
from data_prep.token_sets.token_set import TokenSet
from model.config import ModelConfig
from model.gpt import GPT
from model.initialisation import initialise
from model.number_formats import cuda_dtype
from model.ranks import start_ranks
from tests.eval.hellaswag_files import official_rows, write_official
from tests.helpers.ranks import RankGroup, run_ranks
from tests.helpers.token_sets import make_token_set
from tests.helpers.training import curve, losses, run_of, tiny_arguments, train, train_as_rank, train_by_path
from train.batches.loader import StepBatch, StepLoader
from train.batches.plan import plan_batch
from train.checkpoints.check_weights import check_replicas
from train.errors import NonFiniteLoss, ReplicasDiffer
from train.objectives.language_modelling import LanguageModelling
from train.optimization.ddp import Parallel
from train.optimization.optimizer import build_optimizer
from train.optimization.step import Stepper, StepResult, Verdict
from train.settings.sections import OptimConfig

SCORES = ("val_loss", "hellaswag_acc_norm")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_token_set(folder, train_tokens=5_000, val_tokens=500)
    return folder


def compare(flip: bool) -> str:
    ranks = start_ranks("cpu")
    model = torch.nn.Linear(4, 4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.25)
        if flip and ranks.rank == 1:
            model.weight.view(torch.int32)[2, 2] ^= 1  # the lowest bit of one weight
    try:
        check_replicas(ranks, model)
    except ReplicasDiffer as error:
        return str(error)
    finally:
        ranks.close()
    return "the same"


def test_one_flipped_bit_on_one_rank_is_noticed_by_all(tmp_path: Path) -> None:
    assert run_ranks(3, tmp_path / "store", compare, False) == ["the same"] * 3
    answers = run_ranks(3, tmp_path / "store", compare, True)
    assert len(set(answers)) == 1
    assert "ranks [1] differ from rank 0's, rank 1's first in weight: " in answers[0]


def train_where_a_bit_flips(arguments: list[str]) -> None:
    """As faulty memory would flip it, on rank 1 after step 3."""
    step = Stepper.__call__

    def flipping(self: Stepper, batch: StepBatch, number: int) -> StepResult:
        result = step(self, batch, number)
        if number == 3 and self._ranks.rank == 1:
            with torch.no_grad():
                self._parallel.model.get_parameter("h.1.mlp.c_fc.weight").view(torch.int32)[2, 2] ^= 1
        return result

    pytest.MonkeyPatch().setattr(Stepper, "__call__", flipping)
    train_as_rank(arguments)


def test_replicas_are_compared_between_saves_where_asked_for(tmp_path: Path, data: Path) -> None:
    arguments = tiny_arguments(
        tmp_path, data, "flipped", "--checkpoint.every_steps=0", "--run.check_replicas_every_steps=2"
    )
    assert RankGroup(2, tmp_path / "store", train_where_a_bit_flips, arguments).join() == [1, 1]
    run = run_of(tmp_path, "flipped")
    reason = json.loads(run.state.read_text())["reason"]
    assert reason.startswith("the weights of ranks [1] differ from rank 0's, rank 1's first in h.1.mlp.c_fc.weight: ")
    assert max(losses(run)) == 4


def test_fp16_learns_and_its_overflow_steps_are_no_faults(tmp_path: Path, data: Path) -> None:
    train(1, tmp_path, tiny_arguments(tmp_path, data, "fp32", "--model.dropout=0"))
    train(1, tmp_path, tiny_arguments(tmp_path, data, "fp16", "--model.dropout=0", "--run.dtype=fp16"))
    half = run_of(tmp_path, "fp16")
    skipped = [record["step"] for record in read_metrics(half.metrics) if record.get("skipped")]
    expected, found = losses(run_of(tmp_path, "fp32")), losses(half)
    assert len(found) == 20
    assert found[1] == pytest.approx(expected[1], abs=0.01)
    norms = [
        {record["step"]: record["grad_norm"] for record in read_metrics(run.metrics) if "grad_norm" in record}
        for run in (run_of(tmp_path, "fp32"), half)
    ]
    first = min(set(range(1, 21)) - set(skipped))  # the weights are still the first ones
    assert norms[1][first] == pytest.approx(norms[0][1], rel=0.2)  # what clipping sees carries no loss scale
    # the scale starts at 65,536: what overflows is left out and the scale halved, so the run lags by those steps
    assert len(skipped) < 10
    assert found[20] < expected[1] - 1
    scaler = read_checkpoint_manifest(list_checkpoints(half.checkpoints)[0][1])["scaler"]
    assert scaler["scale"] == 65536 / 2 ** len(skipped)


def test_fp16_resumes_with_its_scale(tmp_path: Path, data: Path) -> None:
    arguments = ("--run.dtype=fp16", "--schedule.kind=constant")
    train(1, tmp_path, tiny_arguments(tmp_path, data, "calm", *arguments))
    train(1, tmp_path, tiny_arguments(tmp_path, data, "halved", *arguments, "--run.max_steps=10"))
    train(1, tmp_path, tiny_arguments(tmp_path, data, "halved", *arguments))
    assert curve(run_of(tmp_path, "halved")) == curve(run_of(tmp_path, "calm"))


def test_fp16_resumes_on_more_ranks_without_skipping_a_step(tmp_path: Path, data: Path) -> None:
    """Of the loss that a rank's backward begins with, the number of ranks is a factor as the scale is."""
    arguments = tiny_arguments(tmp_path, data, "grown", "--run.dtype=fp16", "--schedule.kind=constant")
    train(1, tmp_path, [*arguments, "--run.max_steps=15"])
    run = run_of(tmp_path, "grown")
    before = read_checkpoint_manifest(list_checkpoints(run.checkpoints)[0][1])
    train(4, tmp_path, [*arguments, "--run.max_steps=16"])
    assert not any(record.get("skipped") for record in read_metrics(run.metrics) if record["step"] > 15)
    after = read_checkpoint_manifest(list_checkpoints(run.checkpoints)[0][1])
    assert after["scaler"]["scale"] == before["scaler"]["scale"] / 4


def test_a_first_loss_far_from_chance_warns_loudly(tmp_path: Path, data: Path) -> None:
    # so wide that the untrained head's logits are far from equal
    wide = ("--model.n_embd=3072", "--model.n_layer=1", "--model.mlp_hidden=1", "--run.max_steps=1")
    done = train_by_path(*tiny_arguments(tmp_path, data, "wide", *wide))
    assert done.returncode == 0, done.stderr
    assert "WARNING: the untrained model's loss is" in done.stdout
    calm = train_by_path(*tiny_arguments(tmp_path, data, "calm", "--run.max_steps=1"))
    assert "WARNING" not in calm.stdout


def test_a_run_that_leaves_the_numbers_says_where_and_fails(tmp_path: Path, data: Path) -> None:
    arguments = tiny_arguments(
        tmp_path, data, "diverging", "--optim.lr=1e30", "--optim.grad_clip=0", "--schedule.warmup=0"
    )
    done = train_by_path(*arguments)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    run = run_of(tmp_path, "diverging")
    state = json.loads(run.state.read_text())
    assert state["status"] == "failed"
    assert "before the update (rank 0, sequences [" in state["reason"]
    assert list_checkpoints(run.checkpoints) == []


def test_weights_that_are_no_numbers_are_never_a_checkpoint(tmp_path: Path, data: Path) -> None:
    """Loss and gradients of the step were finite, its update was not: the newest good checkpoint is an earlier one."""
    steps = ("--optim.grad_clip=0", "--schedule.warmup=0", "--checkpoint.every_steps=1", "--eval.every_steps=0")
    train(1, tmp_path, tiny_arguments(tmp_path, data, "spoilt", *steps, "--run.max_steps=1"))
    swag = write_official(tmp_path / "official.jsonl", official_rows(8, words_at_most=1))
    between = ("--eval.hellaswag_every_steps=2", f"--eval.hellaswag_data={swag}", "--eval.sample_every_steps=2")
    allowed = ("--allow-change=optim.lr", "--allow-change=run.max_steps")
    bad = (*steps, *between, '--eval.prompts=["ab"]', "--optim.lr=1e39", *allowed)
    unsaved = ("--checkpoint.every_steps=3", "--eval.every_steps=2", "--run.max_steps=3")
    done = train_by_path(*tiny_arguments(tmp_path, data, "spoilt", *bad, *unsaved))
    assert done.returncode == 1
    assert "no sample at step 2" in done.stdout and not read_json_lines(run_of(tmp_path, "spoilt").samples)
    records = read_metrics(run_of(tmp_path, "spoilt").metrics)
    figures = {key: record[key] for record in records for key in SCORES if key in record}
    assert figures == dict.fromkeys(SCORES), "neither is a figure: the first of four NaN is no answer"
    done = train_by_path(*tiny_arguments(tmp_path, data, "spoilt", *bad, "--run.max_steps=2"))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    run = run_of(tmp_path, "spoilt")
    state = json.loads(run.state.read_text())
    assert (state["status"], state["step"]) == ("failed", 1)
    assert state["reason"].startswith("wte.weight has weights that are NaN or inf")
    assert [step for step, _ in list_checkpoints(run.checkpoints)] == [1]
    train(1, tmp_path, tiny_arguments(tmp_path, data, "spoilt", *steps, "--run.max_steps=2"))  # at a sane rate


@pytest.mark.parametrize(
    ("capability", "name", "dtype"),
    [((7, 0), "Tesla V100-SXM2-16GB", "fp16"), ((7, 5), "Tesla T4", "fp16"), ((8, 0), "NVIDIA A100", "bf16")],
)
def test_cards_without_bf16_get_fp16(capability: tuple[int, int], name: str, dtype: str) -> None:
    assert cuda_dtype(capability, name)[0] == dtype


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_fp16_gradients_that_no_loss_scale_makes_finite_end_the_run(data: Path, kind: Any) -> None:
    """As a faulty kernel gives them: every loss is finite, and each step would be left out for ever."""
    config = ModelConfig(vocab_size=257, block_size=8, n_layer=1, n_head=2, n_embd=16)
    model, ranks, plan = GPT(config), start_ranks("cpu"), plan_batch(64, 8, 8, 1)
    initialise(model, seed=1)
    model.get_parameter("h.0.mlp.c_fc.weight").register_hook(lambda gradient: gradient * math.nan)
    parallel, optimizer = Parallel(model, ranks), build_optimizer(model, OptimConfig(kind=kind))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    stepper = Stepper(parallel, optimizer, ranks, plan, LanguageModelling(), dtype="fp16", grad_clip=1.0, seed=1)
    batch = StepLoader(Windows(TokenSet.open(data).split("train"), 8), plan, rank=0, seed=1).step_at(0)
    skipped = [stepper(batch, step).verdict for step in range(1, 17)]  # 65,536 is halved to 1
    assert set(skipped) == {Verdict.OVERFLOW}
    with pytest.raises(NonFiniteLoss, match=r"step 17: loss 5\.\d+, gradient norm nan, before the update"):
        stepper(batch, 17)
    assert all(old.equal(new) for old, new in zip(before, model.parameters(), strict=True))


def train_where_one_rank_refuses(arguments: list[str]) -> None:
    """As a faulty device would that sees another norm than the others do."""
    step = Stepper.__call__

    def refusing(self: Stepper, batch: StepBatch, number: int) -> StepResult:
        result = step(self, batch, number)
        refuses = number == 7 and self._ranks.rank == 1
        return replace(result, verdict=Verdict.BEYOND_LIMITS) if refuses else result

    pytest.MonkeyPatch().setattr(Stepper, "__call__", refusing)
    train_as_rank(arguments)


def test_ranks_that_disagree_on_a_step_stop_before_the_next(tmp_path: Path, data: Path) -> None:
    arguments = tiny_arguments(tmp_path, data, "split")
    assert RankGroup(2, tmp_path / "store", train_where_one_rank_refuses, arguments).join() == [1, 1]
    run = run_of(tmp_path, "split")
    state = json.loads(run.state.read_text())
    assert (state["status"], state["failure"]) == ("failed", "exception")
    assert state["reason"].startswith("only some ranks have learned from step 7")
    assert max(losses(run)) == 7
    assert [step for step, _ in list_checkpoints(run.checkpoints)] == [5]
