"""GRPO: equal to an independent float64 reference for any ranks and micro-batches, exact over stops, and it learns."""

import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.checkpoint_files import list_checkpoints, read_checkpoint_manifest
from common.errors import UserError
from common.metrics_file import read_metrics
from common.metrics_table import MetricsTable
from common.paths import PROJECT
from common.run_folder import RunFolder
from data_prep.token_sets.packing import IGNORE
from data_prep.token_sets.token_set import TokenSet
from eval.reporting import page_sections
from eval.reporting.evaluation_pictures import curves_of
from eval.reporting.live_view import LiveRun
from eval.reporting.look import Look
from eval.reporting.run_data import load_run
from eval.summary import print_samples
from model.gpt import GPT
from model.ranks import Ranks
from tests.eval.checkpoints import write_checkpoint
from tests.helpers.conversation_sets import make_conversation_set, short_tokenizer
from tests.helpers.ranks import run_ranks
from tests.helpers.rollout_step import LENGTH, one_step, policy, sequences_of
from tests.helpers.training import curve, run_of, weights_hashes
from tests.train.test_finetune import arguments, finetune, refusal
from train.batches.loader import StepBatch, StepLoader
from train.batches.plan import plan_batch
from train.batches.prompts import Prompts
from train.objectives.grpo import Grpo
from train.objectives.policy import clipped_surrogate, group_advantages, kl_loss, log_probabilities
from train.objectives.rewards import Reward, load_rewards
from train.objectives.rollout import Sampler, repetition
from train.objectives.sampling import random_numbers, sample_answers
from train.settings.sections import RolloutConfig

torch.set_num_threads(1)  # as ranks have
LEARNING_RATE = 0.3
ROLLOUT = RolloutConfig(prompts_per_step=4, samples=4, max_tokens=6, prompts_per_block=2, temperature=0.7, kl=0.5)
REWARDS = """
def digits(prompts, completions, fields):
    return [sum(c.isdigit() for c in text) / 4 for text in completions]

def short(prompts, completions, fields):
    return [1.0 if len(text) < 4 else 0.0 for text in completions]

def exact_answer(prompts, completions, fields):
    return [float(text == field["answer"]) for text, field in zip(completions, fields, strict=True)]

def nan(prompts, completions, fields):
    return [float("nan")] * len(completions)

def few(prompts, completions, fields):
    return [1.0]

def broken(prompts, completions, fields):
    return fields[0]["missing"]

number = 3
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("data")
    make_conversation_set(folder)
    return folder


@pytest.fixture(scope="module")
def rewards(tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tmp_path_factory.mktemp("rewards") / "rewards.py"
    path.write_text(REWARDS)
    return str(path)


class Watched(Grpo):
    """Keeps the rollouts, and the ratio of new and old probability in the forward that is learned from."""

    def __init__(self, config: RolloutConfig) -> None:
        super().__init__(config)
        self.rollouts: list[Any] = []
        self.furthest = 0.0

    def _judged(self, rows: StepBatch, rollout: Any) -> Any:
        self.rollouts.append(rollout)
        return super()._judged(rows, rollout)

    def loss(self, model: Any, batch: Any, scale: Any) -> Any:
        if "old" in batch.more:
            found = log_probabilities(model, batch.tokens, batch.targets, self._config.temperature)
            ratio = (found.log_probs.detach() - batch.more["old"]).exp()
            self.furthest = max(self.furthest, (ratio - 1).abs().max().item())
        return super().loss(model, batch, scale)


def reference_step(data: Path, found: dict[str, Any], config: RolloutConfig, rate: float) -> dict[str, np.ndarray]:
    """The weights after the same step, in float64, answer by answer and token by token, from the papers' formulas."""
    tokens = TokenSet.open(data)
    model, start = policy(tokens, 1).double(), policy(tokens, 2).double()

    def distribution(of: GPT, row: int) -> tuple[torch.Tensor, list[int]]:
        """log p of every next token of an answer (n, V), and the tokens that were sampled."""
        prompt = found["prompts"][row // config.samples].tolist()
        answer = found["answers"].tokens[row, : found["answers"].lengths[row]].tolist()
        logits = of(torch.tensor([prompt + answer]))[0] / config.temperature
        return logits.log_softmax(-1)[len(prompt) - 1 : -1], answer

    def chosen(of: GPT, row: int) -> torch.Tensor:
        log_probs, answer = distribution(of, row)
        return torch.stack([log_probs[place, token] for place, token in enumerate(answer)])

    rows = config.sequences
    with torch.no_grad():
        old, ref = ([chosen(of, row) for row in range(rows)] for of in (model, start))
    advantages = []
    for first in range(0, rows, config.samples):
        group = found["rewards"][first : first + config.samples]
        spread = (sum((r - sum(group) / len(group)) ** 2 for r in group) / (len(group) - 1)) ** 0.5 + 1e-4
        advantages += [(r - sum(group) / len(group)) / (spread if config.deviation_term else 1.0) for r in group]
    used = [row for row in range(rows) if found["answers"].ended[row] or not config.mask_cut]
    share = rows // config.minibatches
    for _ in range(config.epochs):
        for part in range(config.minibatches):
            own = [row for row in used if part * share <= row < (part + 1) * share]
            loss = torch.zeros((), dtype=torch.float64)
            for row in own:
                answer_loss = torch.zeros((), dtype=torch.float64)
                for new, was, base in zip(chosen(model, row), old[row], ref[row], strict=True):
                    ratio = torch.exp(new - was)
                    lowest = min(
                        ratio * advantages[row], ratio.clamp(1 - config.clip, 1 + config.clip) * advantages[row]
                    )
                    answer_loss = answer_loss - lowest + config.kl * ratio.detach() * (new - base) ** 2 / 2
                loss = loss + answer_loss / (len(old[row]) if config.length_term == "answers" else 1)
            divisor = {
                "answers": len(own),
                "tokens": sum(len(old[row]) for row in own),
                "constant": len(own) * config.max_tokens,
            }[config.length_term]
            model.zero_grad()
            (loss / divisor).backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    assert parameter.grad is not None
                    parameter.sub_(rate * parameter.grad)
    return {name: p.detach().numpy() for name, p in model.named_parameters()}


CASES = {
    "answers": ROLLOUT,
    "tokens": replace(ROLLOUT, length_term="tokens", deviation_term=False, kl=0.0, mask_cut=True),
    "constant": replace(ROLLOUT, length_term="constant", epochs=2, minibatches=2, clip=0.05),
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_is_the_reference_for_any_ranks_and_micro_batches(
    case: str, data: Path, rewards: str, tmp_path: Path
) -> None:
    config, world_size = CASES[case], 4 if case == "answers" else 2
    first = one_step(Watched, data, rewards, 1, 8 if case == "answers" else 2, config, LEARNING_RATE)
    seen = run_ranks(world_size, tmp_path, one_step, Watched, data, rewards, world_size, 2, config, LEARNING_RATE)
    expected = reference_step(data, first, config, LEARNING_RATE)
    moved = policy(TokenSet.open(data), 1).state_dict()
    assert max(np.abs(expected[name] - moved[name].numpy()).max() for name in expected) > 1e-2, "it learns something"
    for found in [first, *seen]:
        np.testing.assert_array_equal(found["answers"].tokens, first["answers"].tokens)  # to the bit: equal texts
        np.testing.assert_array_equal(found["rewards"], first["rewards"])
        assert found["loss"] == pytest.approx(first["loss"], abs=1e-5)
        assert found["terms"] == pytest.approx(first["terms"], abs=1e-5)
        for name, value in expected.items():
            np.testing.assert_allclose(found["weights"][name], value, atol=2e-5, err_msg=name)
    assert first["updates"] == config.epochs * config.minibatches
    assert (first["terms"]["clip_share"] > 0) == (case == "constant")
    lengths, ended = first["answers"].lengths, first["answers"].ended
    assert 0 < ended.sum() < len(ended) and len(set(lengths.tolist())) > 1, "some answers are cut, some end early"
    ends = np.isin(first["answers"].tokens[ended, lengths[ended] - 1], short_tokenizer().end_ids)
    assert ends.all() and first["note"]["cut_share"] == 1 - ended.mean()


def test_with_a_rate_of_0_the_ratio_is_1(data: Path, rewards: str) -> None:
    config = replace(ROLLOUT, epochs=2, minibatches=2)
    found = one_step(Watched, data, rewards, 1, 2, config, 0.0)
    assert len(set(found["answers"].lengths.tolist())) > 1, "rows are ragged"
    assert 0 <= found["furthest"] < 1e-5
    assert found["terms"]["clip_share"] == 0


def test_the_gradient_of_the_kl_loss_is_that_of_the_exact_kl() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, old, ref = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    logits.requires_grad_()
    log_p, log_old, log_q = logits.log_softmax(0), old.log_softmax(0), ref.log_softmax(0)
    (exact,) = torch.autograd.grad((log_p.exp() * (log_p - log_q)).sum(), logits, retain_graph=True)
    # the expectation over what the old policy samples, token by token of the vocabulary
    (estimated,) = torch.autograd.grad(
        (log_old.exp() * kl_loss(log_p, log_old, log_q)).sum(), logits, retain_graph=True
    )
    torch.testing.assert_close(estimated, exact, rtol=0, atol=1e-12)
    ratio = (log_p - log_old).exp().detach()
    k3 = ratio * ((log_q - log_p).exp() - (log_q - log_p) - 1)
    (biased,) = torch.autograd.grad((log_old.exp() * k3).sum(), logits)
    assert (biased - exact).abs().max() > 0.01


def test_equal_rewards_have_exactly_no_advantage() -> None:
    rewards = np.array([0.1] * 3 + [1.0, 0.0, 0.0] + [0.3, 0.3, 0.1 + 0.2])
    found = group_advantages(rewards, 3, deviation=True)
    assert found.equal == 1 and (found.advantages[:3] == 0).all()
    np.testing.assert_allclose(found.advantages[3:6] * (1 / 3**0.5 + 1e-4), [2 / 3, -1 / 3, -1 / 3])
    np.testing.assert_allclose(group_advantages(rewards, 3, deviation=False).advantages[3:6], [2 / 3, -1 / 3, -1 / 3])
    losses, beyond = clipped_surrogate(
        torch.tensor([[0.5, -0.5]]), torch.zeros(1, 2), torch.tensor([[1.0], [-1.0]]), 0.2
    )
    torch.testing.assert_close(losses, torch.tensor([[-1.2, -math.exp(-0.5)], [math.exp(0.5), 0.8]]))
    assert beyond.tolist() == [[True, False], [False, True]]


def test_three_tokens_by_hand(data: Path) -> None:
    """What stands in a row of a prompt of two tokens and an answer of one token and its end."""
    tokens = TokenSet.open(data)
    prompts = Prompts(tokens, "train", 20)
    tokenizer = prompts.tokenizer
    prompt = prompts[0]
    assert prompt.text.endswith("<|bot|>") and prompt.fields["answer"].isdigit()
    question = prompt.text.removesuffix("<|bot|>").rpartition("<|user|>")[2].rstrip("?")
    assert str(sum(map(int, question.split("+")))) == prompt.fields["answer"]
    config = replace(ROLLOUT, prompts_per_step=1, samples=2, kl=0.0)
    plan = plan_batch(2 * LENGTH, LENGTH, 2, 1)
    sampler = Sampler(
        policy(tokens, 1), prompts, [], Ranks(0, 1, 0, 1, torch.device("cpu")), max_tokens=6, prompts_per_block=1,
        seed=1, dtype="fp32",
    )  # fmt: skip
    objective = Grpo(config)
    objective.prepare(
        sampler, policy(tokens, 1), None, Ranks(0, 1, 0, 1, torch.device("cpu")), plan, "fp32", trims=False
    )
    rollout = sampler.roll_out(np.array([0]), 1, samples=2, temperature=1.0)
    end = tokenizer.special_spellings["<|end|>"]
    rollout.answers.tokens[:] = [[5, end, 0, 0, 0, 0], [7, 8, 9, 7, 8, 9]]
    rollout.answers.lengths[:], rollout.answers.ended[:] = [2, 6], [True, False]
    batch = StepLoader(sequences_of(tokens, config), plan, rank=0, seed=5).step_at(0)
    rows = objective._rows(batch, rollout)
    n = len(prompt.ids)
    assert rows.tokens[0, 0, : n + 1].tolist() == [*prompt.ids.tolist(), 5]
    assert rows.targets[0, 0].tolist() == [IGNORE] * (n - 1) + [5, end] + [IGNORE] * (LENGTH - n - 1)
    assert rows.targets[0, 1, n - 1 : n + 6].tolist() == [7, 8, 9, 7, 8, 9, IGNORE]
    assert sampler.text_of(rollout.answers, 0) == tokenizer.decode([5])
    assert repetition(np.array([7, 8, 9, 7, 8, 9])) == pytest.approx(1 / 4) and repetition(np.array([1, 2])) == 0


def test_what_is_sampled_follows_the_distribution_and_nothing_but_its_numbers(data: Path) -> None:
    tokens = TokenSet.open(data)
    model, prompts = policy(tokens, 1), Prompts(tokens, "train", 20)
    ids, more = prompts[0].ids, [prompts[n].ids for n in (1, 2, 3)]
    count = 4_000
    numbers = np.stack([random_numbers(1, 2, 3, sample, 2) for sample in range(count)])
    found = sample_answers(model, [ids], numbers, temperature=0.7, end_ids=[], dtype="fp32")
    with torch.no_grad():
        expected = (model(torch.from_numpy(ids.astype(np.int64))[None])[0, -1] / 0.7).softmax(-1).numpy()
    shares = np.bincount(found.tokens[:, 0], minlength=len(expected)) / count
    assert np.abs(shares - expected).max() < 5 * (expected.max() / count) ** 0.5
    words = ((1, 2, 3, 4), (2, 2, 3, 4), (1, 3, 3, 4), (1, 2, 4, 4), (1, 2, 3, 5))
    assert len({random_numbers(*each, 1)[0] for each in words}) == 5
    # beside others of other lengths, with the cache or without
    drawn = np.stack([random_numbers(1, 1, row, 0, 6) for row in range(4)])
    beside = sample_answers(model, [ids, *more], drawn, temperature=0.7, end_ids=[], dtype="fp32")
    row = ids.astype(np.int64).tolist()
    for place in range(6):
        with torch.no_grad():
            heights = (model(torch.tensor([row]))[0, -1].double() / 0.7).softmax(-1).cumsum(-1)
        row.append(int(torch.searchsorted(heights, torch.tensor(drawn[0, place], dtype=torch.float64), right=True)))
    assert row[len(ids) :] == beside.tokens[0].tolist()


def base_of(folder: Path, **options: Any) -> Path:
    return write_checkpoint(folder, tokenizer=short_tokenizer().spec, block_size=LENGTH, noise=0.3, **options)


def options_of(reward: str, *more: str) -> tuple[str, ...]:
    return (
        "--objective=grpo", f"--reward={reward}", "--rollout.prompts_per_step=4", "--rollout.samples=4",
        "--rollout.max_tokens=6", "--rollout.prompts_per_block=2", "--rollout.held_out_prompts=6",
        "--batch.micro_batch=2", "--schedule.kind=constant", "--run.max_steps=6", *more,
    )  # fmt: skip


def told(run: RunFolder) -> list[dict[str, Any]]:
    """What is recorded of rollouts and held-out rewards, but for times and speeds."""
    records = [r for r in read_metrics(run.metrics) if r.get("kind") in ("rollout", "held_out_reward")]
    return [{k: v for k, v in r.items() if "second" not in k and k != "time"} for r in records]


FULL, MUON, SHARDED = "--lora.rank=0", "--optim.kind=muon", "--optim.shard=true"
SEVERAL = ("--rollout.epochs=2", "--rollout.minibatches=2")


@pytest.mark.parametrize(
    ("ranks", "more"),
    [(1, (FULL, *SEVERAL)), (2, ()), (2, (FULL, MUON, SHARDED)), (2, (SHARDED, *SEVERAL)), (1, (FULL, MUON))],
    ids=str,
)
def test_a_stopped_run_resumes_to_the_bit(
    ranks: int, more: tuple[str, ...], tmp_path: Path, data: Path, rewards: str
) -> None:
    base = base_of(tmp_path / "base")
    asked = options_of(f"{rewards}:digits", *more)
    finetune(ranks, tmp_path, arguments(base, tmp_path, data, "whole", *asked))
    finetune(ranks, tmp_path, arguments(base, tmp_path, data, "cut", *asked, "--run.max_steps=3"))
    finetune(ranks, tmp_path, arguments(base, tmp_path, data, "cut", *asked))
    whole, cut = run_of(tmp_path, "whole"), run_of(tmp_path, "cut")
    assert [row for row in curve(cut) if row[1] != "None"] == [row for row in curve(whole) if row[1] != "None"]
    ends = [list_checkpoints(run.checkpoints)[0][1] for run in (whole, cut)]
    assert weights_hashes(ends[0]) == weights_hashes(ends[1])
    assert [r for r in told(cut) if r["kind"] == "rollout"] == [r for r in told(whole) if r["kind"] == "rollout"]
    notes = [r for r in told(whole) if r["kind"] == "rollout"]
    assert [r["step"] for r in notes] == list(range(1, 7))
    assert {r["updates"] for r in notes} == {4 if SEVERAL[0] in more else 1}
    assert notes[0]["kl"] == (pytest.approx(0, abs=1e-6) if SEVERAL[0] not in more else notes[0]["kl"])
    assert notes[-1]["kl"] > 0
    # prompts are a function of sequences consumed: 16 a step, 4 of each prompt
    numbers = [r["sequences"] for r in read_metrics(whole.metrics) if "sequences" in r]
    assert all(len(n) == 16 and len(set(n)) == 4 for n in numbers) and numbers[0] != numbers[1]


def test_a_reward_is_learned_shown_and_kept(
    tmp_path: Path, data: Path, rewards: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base, given = base_of(tmp_path / "base"), Path(shutil.copy(rewards, tmp_path / "rewards.py"))

    def command(file: Path, *more: str, weight: float = 0.1) -> list[str]:
        asked = options_of(
            f"{file}:digits", FULL, f"--reward={weight}*{file}:short", "--run.max_steps=40", "--rollout.kl=0",
            "--optim.lr=3e-3", "--eval.sample_every_steps=20", "--eval.every_steps=20", *more,
        )  # fmt: skip
        return arguments(base, tmp_path, data, "learns", *asked)

    file, plan = tmp_path / "plan.json", [sys.executable, str(PROJECT / "train" / "plan.py")]
    planned = subprocess.run(
        [*plan, *command(given), "--measure=2", f"--json={file}"], check=True, capture_output=True, encoding="utf-8"
    )
    found = json.loads(file.read_text(encoding="utf-8"))
    assert 0 < found["sampling_seconds"] < found["step_seconds"] and found["hours_by_part"]["validations"] > 0
    assert "of a step: 16 answers of 6 tokens at most, 2 prompts side by side (measured)" in planned.stdout
    assert "compute-optimal" not in planned.stdout, "that is of pre-training"
    finetune(1, tmp_path, command(given))
    run = run_of(tmp_path, "learns")
    notes = [r for r in told(run) if r["kind"] == "rollout"]
    before, after = (np.mean([r["reward_digits"] for r in part]) for part in (notes[:5], notes[-5:]))
    assert after > before + 0.2
    assert all(r["reward"] == pytest.approx(r["reward_digits"] + 0.1 * r["reward_short"]) for r in notes)
    held = [r for r in told(run) if r["kind"] == "held_out_reward"]
    assert [r["step"] for r in held] == [0, 20, 40] and held[-1]["held_out_reward"] > held[0]["held_out_reward"]
    samples = [json.loads(line) for line in run.samples.read_text().splitlines()]
    assert all(math.isfinite(s["reward"]) for s in samples if s["prompt"].endswith("<|bot|>"))
    assert "objective: grpo, 4 prompts a step x 4 answers of at most 6 tokens" in run.log.read_text()
    assert "(reward " in run.log.read_text()
    live, shown = LiveRun(run, MetricsTable(run.metrics)), Look(unicode=True, color=False)
    live.refresh()
    lines = live.frame(120, 40, shown, 0.0)
    assert any(line.startswith("reward  ") for line in lines), "drawn instead of the loss"
    for figure in ("held-out reward", "reward digits", "reward short", "entropy", "share of answers cut", "repeated"):
        assert any(figure in line for line in lines), figure
    assert lines[-1].startswith(f"sample, step 40, reward {samples[-1]['reward']:.3g}: ")
    data_of = load_run(run.path)
    assert f"reward {samples[-1]['reward']:.3g}</p>" in page_sections.samples([data_of])
    assert not page_sections.comparison([data_of]), "no published model is like it"
    pictured = {curve.figure for curve in curves_of([data_of])}
    figures = "held_out_reward reward reward_digits reward_short entropy clip_share cut_share answer_length repetition"
    assert {*figures.split(), "equal_groups", "generation_tokens_per_second"} <= pictured
    print_samples(run)
    assert f"(reward {samples[-1]['reward']:.3g})\n" in capsys.readouterr().out
    # the run keeps its rewards, wherever their file lies
    moved, longer = given.rename(tmp_path / "moved.py"), "--run.max_steps=41"
    other = "with the rewards 1*digits + 0.1*short, this run has 1*digits + 0.2*short: put it back, or give --allow-"
    assert other in refusal(monkeypatch, command(moved, longer, weight=0.2))
    finetune(1, tmp_path, command(moved, longer))
    moved.write_text(REWARDS.replace("/ 4", "/ 5"))
    other = refusal(monkeypatch, command(moved))
    assert "with another reward digits (" in other and f"than {moved}:digits is now (" in other
    finetune(1, tmp_path, command(moved, "--run.max_steps=42", "--allow-change=rollout.reward"))
    assert read_checkpoint_manifest(list_checkpoints(run.checkpoints)[0][1])["step"] == 42


MISTAKES = {
    "missing.py:f": "there is no file",
    "{file}:nothing": "has no function nothing",
    "{file}:number": "has no function number",
    "{file}": "use FILE.py:FUNCTION",
    "x*{file}:digits": "use FILE.py:FUNCTION",
    "": "--reward has no function",
}


def test_mistakes_are_one_line(tmp_path: Path, data: Path, rewards: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_of(tmp_path / "base")

    def refused(*more: str, reward: str = f"{rewards}:digits") -> str:
        return refusal(monkeypatch, arguments(base, tmp_path, data, "x", *options_of(reward, *more)))

    for reward, message in MISTAKES.items():
        assert message in refused(reward=reward.format(file=rewards)), reward
    assert "two functions of the name digits" in refused(f"--reward={rewards}:digits")
    assert "--lora.dropout 0" in refused("--lora.dropout=0.1")
    assert "rollout.samples is 1: use 2 or more" in refused("--rollout.samples=1")
    assert "doesn't divide the 8 answers of an update" in refused("--rollout.minibatches=2", "--batch.micro_batch=16")
    assert "leaves no room for prompts" in refused(f"--rollout.max_tokens={LENGTH}")
    assert "optim.z_loss doesn't go with --objective grpo" in refused("--optim.z_loss=0.1")
    broken = tmp_path / "broken.py"
    broken.write_text("import nothing_of_this_name\n")
    assert "can't be run: ModuleNotFoundError" in refused(reward=f"{broken}:f")


@pytest.mark.parametrize(
    ("name", "message"),
    [("nan", "is nan for the answer"), ("few", "returned 1 numbers for 8 answers"), ("broken", "KeyError: 'missing'")],
)
def test_a_reward_that_fails_is_a_users_mistake(name: str, message: str, rewards: str) -> None:
    (reward,) = load_rewards([f"{rewards}:{name}"])
    assert isinstance(reward, Reward)
    with pytest.raises(UserError, match=message):
        reward(["p"] * 8, ["a"] * 8, [{}] * 8)
