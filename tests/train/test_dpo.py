"""DPO: equal to an independent float64 reference for any ranks and micro-batches, exact over stops, and it learns."""

import math
import os
import signal
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from common.checkpoint_files import list_checkpoints
from common.metrics_file import read_metrics
from common.paths import PROJECT
from common.run_folder import RunFolder
from data_prep.token_sets.documents import conversations_of
from data_prep.token_sets.manifest import COUNTED
from data_prep.token_sets.token_set import TokenSet
from eval.summary import print_figures, print_next, summarise
from model.config import ModelConfig
from model.gpt import GPT
from model.initialisation import initialise
from model.lora_config import LoraConfig
from model.ranks import start_ranks
from tests.eval.checkpoints import write_adapters, write_checkpoint
from tests.helpers.conversation_sets import make_conversation_set, make_pairs, short_tokenizer
from tests.helpers.ranks import RankGroup, run_ranks
from tests.helpers.training import curve, run_of, weights_hashes
from tests.train.test_finetune import arguments, finetune, finetune_as_rank, refusal
from train.batches.loader import StepLoader
from train.batches.pairs import PairSequences
from train.batches.plan import plan_batch
from train.batches.prompts import PromptOrder
from train.finetune import finetune_command
from train.objectives import reference as start_policy
from train.objectives.dpo import Dpo
from train.objectives.reference import FILE, stored_reference, write_reference
from train.optimization.ddp import Parallel
from train.optimization.step import Stepper
from train.settings.command_line import read_command
from train.settings.sections import PreferenceConfig

torch.set_num_threads(1)  # as ranks have
LENGTH, PAIRS = 40, 8


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("data")
    make_pairs(folder)
    return folder


def policy(tokens: TokenSet, seed: int) -> GPT:
    config = ModelConfig(
        vocab_size=tokens.tokenizer_spec["vocab_size"], block_size=LENGTH, n_layer=2, n_head=2, n_embd=16
    )
    model = GPT(config)
    initialise(model, seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)) * 0.2)
    return model


def exact_log_probs(model: GPT, tokens: TokenSet) -> list[tuple[torch.Tensor, int]]:
    """In float64, every answer alone: its log-probability, and its tokens."""
    stream, marks, found, place = tokens.split("train"), tokens.marks("train"), [], 0
    assert marks is not None
    for ids in conversations_of(stream, marks):
        counted = torch.from_numpy(marks.read(place, place + len(ids)) == COUNTED)
        place += len(ids)
        row = torch.from_numpy(ids.astype(np.int64))
        logits = model(row[None, :-1])[0, :, : model.config.vocab_size]  # (n - 1, V)
        each = logits.log_softmax(-1).gather(1, row[1:, None]).squeeze(1)
        found.append((each[counted[1:]].sum(), int(counted.sum())))
    return found


def exact_loss(answers: list[tuple[torch.Tensor, int]], reference: Any, pair: int, config: PreferenceConfig) -> Any:
    (chosen, length), (rejected, _) = answers[2 * pair : 2 * pair + 2]
    h = (chosen - reference[2 * pair]) - (rejected - reference[2 * pair + 1])
    if config.loss == "ipo":
        loss = (h - 0.5 / config.beta) ** 2
    else:
        right, wrong = (torch.sigmoid(sign * config.beta * h) for sign in (1, -1))
        loss = -(1 - config.label_smoothing) * right.log() - config.label_smoothing * wrong.log()
    return loss - config.likelihood * chosen / length


def one_step(data: Path, world_size: int, micro_batch: int, given: dict[str, Any]) -> dict[str, Any]:
    """A step with plain gradient descent at rate 1: what is reported, and how the weights have changed."""
    tokens, ranks, config = TokenSet.open(data), start_ranks("cpu"), PreferenceConfig(**given)
    model = policy(tokens, 1)
    plan = plan_batch(2 * PAIRS * LENGTH, LENGTH, micro_batch, world_size)
    sequences, objective = PairSequences(tokens, "train", LENGTH), Dpo(config)
    with torch.no_grad():
        start = policy(tokens, 2).double()
        objective.prepare(np.array([float(v) for v, _ in exact_log_probs(start, tokens)], np.float32), trims=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
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


CASES = [
    {"beta": 0.3},
    {"beta": 0.3, "label_smoothing": 0.2, "likelihood": 0.5},
    {"beta": 0.2, "loss": "ipo"},
]


@pytest.mark.parametrize("given", CASES, ids=str)
def test_a_step_is_the_reference_for_any_ranks_and_micro_batches(
    given: dict[str, Any], data: Path, tmp_path: Path
) -> None:
    tokens, config = TokenSet.open(data), PreferenceConfig(**given)
    model = policy(tokens, 1).double()
    with torch.no_grad():
        reference = [float(v) for v, _ in exact_log_probs(policy(tokens, 2).double(), tokens)]
    runs = [
        run_ranks(world, tmp_path / f"{world}-{size}", one_step, data, world, size, given)
        for world, size in ((1, 16), (1, 2), (2, 4))
    ]
    pairs = sorted({number // 2 for number in runs[0][0]["numbers"].tolist()})
    assert len(pairs) == PAIRS
    answers = exact_log_probs(model, tokens)
    loss = sum(exact_loss(answers, reference, pair, config) for pair in pairs) / PAIRS
    loss.backward()
    chosen = [answers[2 * pair] for pair in pairs]
    rejected = [answers[2 * pair + 1] for pair in pairs]
    h = [(answers[2 * p][0] - answers[2 * p + 1][0]).item() - (reference[2 * p] - reference[2 * p + 1]) for p in pairs]
    expected = {
        "margin": config.beta * np.mean(h),
        "preference_accuracy": np.mean([value > 0 for value in h]),
        "chosen_log_prob": np.mean([value.item() for value, _ in chosen]),
        "rejected_log_prob": np.mean([value.item() for value, _ in rejected]),
        "chosen_log_prob_change": np.mean([answers[2 * p][0].item() - reference[2 * p] for p in pairs]),
        "chosen_tokens": np.mean([length for _, length in chosen]),
        "rejected_tokens": np.mean([length for _, length in rejected]),
        "length_accuracy": np.mean([(a > b) + 0.5 * (a == b) for (_, a), (_, b) in zip(chosen, rejected, strict=True)]),
    }
    for found in (rank for ranks in runs for rank in ranks):
        assert found["targets"] == PAIRS
        assert found["loss"] == pytest.approx(float(loss), abs=1e-5, rel=1e-5)
        assert found["terms"] == pytest.approx(expected, abs=1e-5, rel=1e-5)
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            want = parameter.grad.numpy()
            scale = max(1.0, float(np.abs(want).max()))
            np.testing.assert_allclose(found["gradients"][name], want, atol=2e-5 * scale, err_msg=name)


def base_of(folder: Path, **options: Any) -> Path:
    return write_checkpoint(folder, tokenizer=short_tokenizer().spec, block_size=LENGTH, noise=0.3, **options)


ASKED = (
    "--objective=dpo", "--batch.pairs_per_step=8", "--batch.micro_batch=4", "--schedule.kind=constant",
    "--run.max_steps=6",
)  # fmt: skip
FULL, MUON, SHARDED = "--lora.rank=0", "--optim.kind=muon", "--optim.shard=true"


def told(run: RunFolder, kind: str) -> list[dict[str, Any]]:
    records = [r for r in read_metrics(run.metrics) if r.get("kind") == kind]
    return [{k: v for k, v in r.items() if "second" not in k and k != "time"} for r in records]


@pytest.mark.parametrize(
    ("ranks", "more"), [(1, (FULL,)), (2, ()), (2, (FULL, MUON, SHARDED)), (2, (SHARDED, "--preference.loss=ipo"))],
    ids=str,
)  # fmt: skip
def test_a_stopped_run_resumes_to_the_bit_and_starts_at_ln_2(
    ranks: int, more: tuple[str, ...], tmp_path: Path, data: Path
) -> None:
    base = base_of(tmp_path / "base")
    finetune(ranks, tmp_path, arguments(base, tmp_path, data, "whole", *ASKED, *more))
    finetune(ranks, tmp_path, arguments(base, tmp_path, data, "cut", *ASKED, *more, "--run.max_steps=3"))
    whole, cut = run_of(tmp_path, "whole"), run_of(tmp_path, "cut")
    kept = (whole.path / FILE).read_bytes()
    assert (cut.path / FILE).read_bytes() == kept
    if ranks == 1:  # of a damaged file it is computed again, by the start policy, not by the one that resumes
        (cut.path / FILE).write_bytes(kept[:-4] + b"\0\0\0\0")
    finetune(ranks, tmp_path, arguments(base, tmp_path, data, "cut", *ASKED, *more))
    assert (cut.path / FILE).read_bytes() == kept
    assert [row for row in curve(cut) if row[1] != "None"] == [row for row in curve(whole) if row[1] != "None"]
    ends = [list_checkpoints(run.checkpoints)[0][1] for run in (whole, cut)]
    assert weights_hashes(ends[0]) == weights_hashes(ends[1])
    notes = told(whole, "preferences")
    assert told(cut, "preferences") == notes
    first = notes[0]
    assert (first["margin"], first["chosen_log_prob_change"], first["preference_accuracy"]) == (0.0, 0.0, 0.5)
    (loss,) = [r["loss"] for r in read_metrics(whole.metrics) if r.get("step") == 1 and "loss" in r]
    assert loss == pytest.approx(25.0 if "--preference.loss=ipo" in more else math.log(2), abs=1e-7)
    assert notes[-1]["margin"] > 0
    held = told(whole, "held_back_pairs")
    assert (
        held[0]["step"] == 0 and held[0]["held_back_margin"] == 0 and held[0]["held_back_pairs"] == 3
    )  # of eval.tokens


def stopped_in_the_reference(command: list[str], rank: int, batches: int) -> None:
    """Fine-tune in this (rank's) process; one rank is asked to stop inside a batch of the start policy's."""
    plain, done = start_policy.score, [0]

    def asked_to_stop(*given: Any) -> Any:
        done[0] += 1
        if done[0] == batches and int(os.environ.get("RANK", "0")) == rank:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(*given)

    with patch.object(start_policy, "score", asked_to_stop):
        finetune_as_rank(command)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_stop_before_the_first_step_keeps_what_is_computed(ranks: int, tmp_path: Path, data: Path) -> None:
    base = base_of(tmp_path / "base")
    finetune(ranks, tmp_path, arguments(base, tmp_path, data, "whole", *ASKED, "--run.max_steps=2"))
    command = arguments(base, tmp_path, data, "cut", *ASKED, "--run.max_steps=2")
    group = RankGroup(ranks, tmp_path / "store", stopped_in_the_reference, command, ranks - 1, 2)
    assert group.join() == [0] * ranks
    whole, cut = run_of(tmp_path, "whole"), run_of(tmp_path, "cut")
    state, log = cut.read_state(), cut.log.read_text()
    assert state is not None and (state["status"], state["step"], state["stop"]) == ("preempted", 0, "signal")
    assert "log-probabilities of 54 of 86 answers are left to the next start" in log and "warming up" not in log
    finetune(ranks, tmp_path, command)
    log = cut.log.read_text()
    assert "of 48 answers of the train split" in log and "of 6 answers of the val split" in log
    assert (cut.path / FILE).read_bytes() == (whole.path / FILE).read_bytes()
    assert [row for row in curve(cut) if row[1] != "None"] == [row for row in curve(whole) if row[1] != "None"]


def test_the_reference_of_adapters_is_their_start_and_not_the_base_below(tmp_path: Path, data: Path) -> None:
    """A fine-tuning of a fine-tuning: with the base's log-probabilities the first margin would not be 0."""
    options = {"tokenizer": short_tokenizer().spec, "block_size": LENGTH}
    write_adapters(tmp_path / "sft", LoraConfig(rank=4), noise=0.3, **options)
    finetune(1, tmp_path, arguments(tmp_path / "sft", tmp_path, data, "next", *ASKED, "--run.max_steps=2"))
    notes = told(run_of(tmp_path, "next"), "preferences")
    assert notes[0]["margin"] == 0.0 and notes[1]["margin"] != 0.0
    base = tmp_path / "sft" / "checkpoints" / "base"
    finetune(1, tmp_path, arguments(base, tmp_path, data, "below", *ASKED, "--run.max_steps=1"))
    assert told(run_of(tmp_path, "below"), "preferences")[0]["chosen_log_prob"] != notes[0]["chosen_log_prob"]


def test_preferences_are_learned_and_shown(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = base_of(tmp_path / "base")
    asked = (
        *ASKED,
        FULL,
        "--run.max_steps=30",
        "--optim.lr=3e-3",
        "--eval.every_steps=15",
        "--eval.tokens=720",
        "--run.dtype=bf16",
    )
    finetune(1, tmp_path, arguments(base, tmp_path, data, "learns", *asked))
    run = run_of(tmp_path, "learns")
    held, log = told(run, "held_back_pairs"), run.log.read_text()
    assert [r["step"] for r in held] == [0, 15, 30]
    assert held[-1]["held_back_preference_accuracy"] > 0.8 and held[-1]["held_back_loss"] < 0.5
    assert "objective: dpo, 8 pairs a step, loss sigmoid, beta 0.1" in log
    assert "40 pairs; the run sees 240, 6.00 epochs" in log
    assert "told apart (" in log and "by length only" in log and "validation on" not in log
    found = summarise(run)
    assert found.validated is None and found.evaluations["held_back_loss"].value == held[-1]["held_back_loss"]
    print_figures(found)
    print_next(run, found)
    shown = capsys.readouterr().out
    assert "loss of held-back pairs" in shown and "validation" not in shown and "eval/chat.py" in shown
    assert held[-1]["held_back_chosen_log_prob_change"] < 0 and "WARNING: chosen answers have become less likely" in log


def test_log_probabilities_are_taken_for_their_own_key_and_whole_only(tmp_path: Path) -> None:
    found, counts = {"train": np.arange(4, dtype="f4"), "val": np.ones(2, dtype="f4")}, {"train": 4, "val": 2}
    write_reference(tmp_path / FILE, "key", found)
    kept = stored_reference(tmp_path / FILE, "key", counts)
    assert kept is not None and all(np.array_equal(kept[split], found[split]) for split in found)
    assert stored_reference(tmp_path / FILE, "other", counts) is None
    assert stored_reference(tmp_path / FILE, "key", counts | {"val": 4}) is None
    content = bytearray((tmp_path / FILE).read_bytes())
    content[-1] ^= 1
    (tmp_path / FILE).write_bytes(content)
    assert stored_reference(tmp_path / FILE, "key", counts) is None


def test_dropout_is_off_unless_it_is_asked_for(tmp_path: Path) -> None:
    base, own = write_checkpoint(tmp_path / "base", dropout=0.1), tmp_path / "own.yaml"
    own.write_text("lora: {dropout: 0.02}\n")
    default = f"--config={PROJECT / 'train' / 'configs' / 'finetune.yaml'}"

    def dropouts(kind: str, *more: str) -> tuple[float, float]:
        asked = [f"--objective={kind}", f"--run.root={tmp_path / 'runs'}", "--run.name=x", *more]
        config = read_command(finetune_command(str(base)), asked)[0]
        return config.model.dropout, config.lora.dropout

    assert dropouts("dpo") == dropouts("grpo") == dropouts("dpo", default) == (0, 0)
    assert dropouts("sft") == dropouts("reward") == (0.1, 0.05)
    assert dropouts("dpo", default, f"--config={own}") == (0, 0.02)
    assert dropouts("grpo", "--model.dropout", "0.3", "--lora.dropout=0.2") == (0.3, 0.2)


def test_mistakes_are_one_line(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, talks = base_of(tmp_path / "base"), tmp_path / "talks"
    make_conversation_set(talks, count=20, val_count=4)

    def refused(*more: str, path: Path = data) -> str:
        return refusal(monkeypatch, arguments(base, tmp_path, path, "x", *ASKED, *more))

    assert "holds no preferences" in refused(path=talks)
    assert "would learn the rejected answers, too" in refused("--objective=sft")
    assert "pairs of two sequences stay together: use an even number" in refused("--batch.micro_batch=1")
    assert "--lora.dropout 0" in refused("--lora.dropout=0.1")
    assert "--model.dropout 0" in refused("--model.dropout=0.1")
    assert "data.stride doesn't go with --objective dpo" in refused("--data.stride=4")
    assert "preference.beta is 0.0: use more than 0" in refused("--preference.beta=0")
    assert "doesn't go with preference.loss ipo" in refused("--preference.loss=ipo", "--preference.label_smoothing=0.1")
    assert asdict(PreferenceConfig())["beta"] == 0.1
