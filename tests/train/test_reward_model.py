"""Reward models: equal to a float64 reference for any ranks and micro-batches, exact over stops, scored as trained."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from common.checkpoint_files import list_checkpoints
from common.errors import UserError
from common.metrics_file import read_metrics
from data_prep.chat.messages import ASSISTANT, USER, Message
from data_prep.corpora.preparation import finish_set
from data_prep.token_sets.documents import conversations_of
from data_prep.token_sets.manifest import PREFERENCES, marks_of
from data_prep.token_sets.marked_writer import MarkedWriter, with_marks
from data_prep.token_sets.token_set import TokenSet
from eval import reward
from eval.hugging_face.export import export
from model.config import ModelConfig
from model.gpt import GPT
from model.initialisation import initialise
from model.ranks import start_ranks
from tests.helpers.conversation_sets import short_tokenizer
from tests.helpers.ranks import run_ranks
from tests.helpers.training import curve, run_of, weights_hashes
from tests.train.test_dpo import FULL, LENGTH, MUON, PAIRS, SHARDED, base_of, told
from tests.train.test_finetune import arguments, finetune, refusal
from train.batches.loader import StepLoader
from train.batches.pairs import PairSequences
from train.batches.plan import plan_batch
from train.batches.prompts import PromptOrder
from train.objectives.reward_model import RewardModel
from train.optimization.ddp import Parallel
from train.optimization.step import Stepper

torch.set_num_threads(1)  # as ranks have


def record_of(generator: np.random.Generator) -> dict[str, str]:
    """Sums: the right answer was preferred. Questions end in as many signs as they like, answers have several ends."""
    a, b = generator.integers(0, 20, 2).tolist()
    wrong = f"{a * b + 1}" + "!" * int(generator.integers(0, 4))
    return {"prompt": f"{a}+{b}" + "?" * int(generator.integers(0, 9)), "chosen": str(a + b), "rejected": wrong}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of pairs, with val.jsonl beside it."""
    folder: Path = tmp_path_factory.mktemp("data")
    tokenizer, generator, splits = short_tokenizer(), np.random.default_rng(0), {}
    for split, number in (("train", 40), ("val", 9)):
        records = [record_of(generator) for _ in range(number)]
        with MarkedWriter(folder, split, tokenizer, 2_000) as writer:
            for record in records:
                for answer in (record["chosen"], record["rejected"]):
                    rendered = tokenizer.render([Message(USER, record["prompt"]), Message(ASSISTANT, answer)])
                    writer.write(with_marks(rendered.ids, rendered.counted))
        splits |= {split: tuple(writer.shards), marks_of(split): tuple(writer.marks)}
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    finish_set(folder, tokenizer, {"name": PREFERENCES}, [], splits, marked=True)
    return folder


def scorer(tokens: TokenSet, *, tied: bool) -> GPT:
    config = ModelConfig(
        vocab_size=tokens.tokenizer_spec["vocab_size"], block_size=LENGTH, n_layer=2, n_head=2, n_embd=16,
        scalar_head=True, tie_weights=tied,
    )  # fmt: skip
    model = GPT(config)
    initialise(model, 1)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def one_step(data: Path, world_size: int, micro_batch: int, tied: bool) -> dict[str, Any]:
    """A step of plain gradient descent at rate 1: what is reported, and how the weights have changed."""
    tokens, ranks = TokenSet.open(data), start_ranks("cpu")
    model, plan = scorer(tokens, tied=tied), plan_batch(2 * PAIRS * LENGTH, LENGTH, micro_batch, world_size)
    sequences, objective = PairSequences(tokens, "train", LENGTH, whole=True), RewardModel()
    objective.prepare(trims=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    stepper = Stepper(Parallel(model, ranks), optimizer, ranks, plan, objective, dtype="fp32", grad_clip=0.0, seed=1)
    stepper.warm_up(LENGTH)
    order = PromptOrder(sequences.pairs, 2, 5)
    batch = StepLoader(sequences, plan, rank=ranks.rank, seed=5, order=order).step_at(0)
    (part,) = objective.updates(batch, 1)
    result = stepper(part, 1)
    return {
        "loss": result.loss, "terms": dict(result.terms), "targets": result.targets, "numbers": batch.numbers,
        "gradients": {name: (before[name] - p.detach()).numpy() for name, p in model.named_parameters()},
    }  # fmt: skip


@pytest.mark.parametrize("tied", [True, False])
def test_a_step_is_the_reference_for_any_ranks_and_micro_batches(tied: bool, data: Path, tmp_path: Path) -> None:
    """Every conversation alone in float64: its score is the value at its last token, however it is padded."""
    tokens = TokenSet.open(data)
    model, marks = scorer(tokens, tied=tied).double(), tokens.marks("train")
    assert marks is not None
    scores = []
    for ids in conversations_of(tokens.split("train"), marks):  # SHORT's last token is the end of the answer
        hidden = model.hidden(torch.from_numpy(ids.astype(np.int64))[None])[0, -1]
        scores.append(hidden @ model.scalar_head.weight[0])
    shapes = ((1, 16), (1, 2), (2, 4)) if tied else ((2, 4),)
    runs = [run_ranks(world, tmp_path / f"{world}-{size}", one_step, data, world, size, tied) for world, size in shapes]
    pairs = sorted({number // 2 for number in runs[0][0]["numbers"].tolist()})
    margins = torch.stack([scores[2 * pair] - scores[2 * pair + 1] for pair in pairs])
    loss = F.softplus(-margins).mean()
    loss.backward()
    loss, margins = loss.detach(), margins.detach()
    for found in (rank for ranks in runs for rank in ranks):
        assert found["targets"] == PAIRS
        assert found["loss"] == pytest.approx(float(loss), abs=1e-5)
        assert found["terms"]["margin"] == pytest.approx(float(margins.mean()), abs=1e-5)
        assert found["terms"]["preference_accuracy"] == pytest.approx(float((margins > 0).double().mean()))
        chosen = np.mean([float(scores[2 * pair].detach()) for pair in pairs])
        assert found["terms"]["chosen_score"] == pytest.approx(chosen, abs=1e-5)
        for name, parameter in model.named_parameters():
            want = np.zeros(parameter.shape) if parameter.grad is None else parameter.grad.numpy()
            np.testing.assert_allclose(found["gradients"][name], want, atol=2e-5, err_msg=name)


ASKED = (
    "--objective=reward", "--batch.pairs_per_step=8", "--batch.micro_batch=4", "--schedule.kind=constant",
    "--run.max_steps=6",
)  # fmt: skip


@pytest.mark.parametrize(("ranks", "more"), [(1, (FULL,)), (2, ()), (2, (FULL, MUON, SHARDED))], ids=str)
def test_a_stopped_run_resumes_to_the_bit_and_scores_start_at_0(
    ranks: int, more: tuple[str, ...], tmp_path: Path, data: Path
) -> None:
    base = base_of(tmp_path / "base", tie_weights=ranks == 1)
    finetune(ranks, tmp_path, arguments(base, tmp_path, data, "whole", *ASKED, *more))
    finetune(ranks, tmp_path, arguments(base, tmp_path, data, "cut", *ASKED, *more, "--run.max_steps=3"))
    finetune(ranks, tmp_path, arguments(base, tmp_path, data, "cut", *ASKED, *more))
    whole, cut = run_of(tmp_path, "whole"), run_of(tmp_path, "cut")
    assert [row for row in curve(cut) if row[1] != "None"] == [row for row in curve(whole) if row[1] != "None"]
    ends = [list_checkpoints(run.checkpoints)[0][1] for run in (whole, cut)]
    assert weights_hashes(ends[0]) == weights_hashes(ends[1])
    notes = told(whole, "preferences")
    assert told(cut, "preferences") == notes
    assert (notes[0]["margin"], notes[0]["chosen_score"], notes[0]["preference_accuracy"]) == (0.0, 0.0, 0.5)
    (loss,) = [r["loss"] for r in read_metrics(whole.metrics) if r.get("step") == 1 and "loss" in r]
    assert loss == pytest.approx(math.log(2), abs=1e-7)
    assert notes[-1]["margin"] > 0


def test_it_learns_and_text_is_scored_as_held_back_pairs_are(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, out = base_of(tmp_path / "base"), tmp_path / "scores.json"
    asked = (
        *ASKED,
        "--lora.rank=4",
        "--run.max_steps=30",
        "--optim.lr=1e-2",
        "--eval.every_steps=15",
        "--eval.tokens=720",
    )
    finetune(1, tmp_path, arguments(base, tmp_path, data, "learns", *asked))
    run = run_of(tmp_path, "learns")
    held = told(run, "held_back_pairs")
    assert [r["step"] for r in held] == [0, 15, 30]
    assert held[-1]["held_back_preference_accuracy"] > 0.7 and held[-1]["held_back_loss"] < 0.6
    assert "objective: reward, 8 pairs a step" in run.log.read_text()
    monkeypatch.setattr(sys, "argv", ["reward.py", str(run.path), str(data / "val.jsonl"), f"--json={out}"])
    assert reward.main() == 0
    figures = json.loads(out.read_text())
    assert figures["accuracy"] == pytest.approx(held[-1]["held_back_preference_accuracy"])
    chosen = np.mean([scores[0] for scores in figures["scores"]])
    assert chosen == pytest.approx(held[-1]["held_back_chosen_score"], abs=1e-4)
    with pytest.raises(UserError, match=r"model\.scalar_head True"):
        export(run.path, tmp_path / "exported")
    command = arguments(run.path, tmp_path, data, "x", "--objective=dpo", "--batch.micro_batch=2")
    assert "add --model.scalar_head false" in refusal(monkeypatch, command)
