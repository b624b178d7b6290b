"""PPO: equal to an independent float64 reference for any ranks and micro-batches, exact over stops, and it learns."""

import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.checkpoint_files import find_checkpoint, list_checkpoints, read_checkpoint_manifest, weights_identity
from data_prep.chat.messages import ASSISTANT, USER
from data_prep.token_sets.token_set import TokenSet
from eval import reward as eval_reward
from eval.hugging_face.export import load_plain
from model.gpt import GPT
from model.ranks import start_ranks
from model.weights import load_model
from tests.eval.checkpoints import write_checkpoint
from tests.helpers import rollout_step
from tests.helpers.conversation_sets import make_conversation_set, short_tokenizer
from tests.helpers.ranks import run_ranks
from tests.helpers.rollout_step import LENGTH, one_step, sequences_of
from tests.helpers.training import curve, run_of, weights_hashes
from tests.train import test_grpo
from tests.train.test_finetune import arguments, finetune, refusal
from tests.train.test_grpo import FULL, MUON, REWARDS, SEVERAL, SHARDED, base_of, told
from train.estimates.machines import machine_of
from train.estimates.run_memory import estimate_of
from train.estimates.run_plan import make_plan
from train.objectives.model_reward import open_rewards
from train.objectives.policy import log_probabilities
from train.objectives.ppo import Ppo
from train.objectives.rewards import load_rewards
from train.objectives.rollout import Sampler
from train.objectives.value_function import explained_variance, generalized_advantages, whitened
from train.plan import read_finetuning
from train.settings.sections import RolloutConfig

torch.set_num_threads(1)  # as ranks have
LEARNING_RATE = 0.3
ROLLOUT = RolloutConfig(
    prompts_per_step=4, samples=4, max_tokens=6, prompts_per_block=2, temperature=0.7, kl=0.5, gamma=0.9,
    gae_lambda=0.8, value_weight=0.5, epochs=2, minibatches=2, clip=0.05, value_clip=0.05,
)  # fmt: skip
CASES = {
    "updates": ROLLOUT,
    "cut": replace(ROLLOUT, mask_cut=True, kl=0.0, epochs=1, minibatches=1, gamma=1.0, gae_lambda=0.95),
}


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


def policy(tokens: TokenSet, seed: int) -> GPT:
    """One with values."""
    return rollout_step.policy(tokens, seed, scalar_head=True)


class Watched(Ppo):
    """Keeps the rollouts, and how far the new probabilities and values are from the old ones in the same forward."""

    def __init__(self, config: RolloutConfig) -> None:
        super().__init__(config)
        self.rollouts: list[Any] = []
        self.furthest = 0.0

    def _judged(self, rows: Any, rollout: Any) -> Any:
        self.rollouts.append(rollout)
        return super()._judged(rows, rollout)

    def loss(self, model: Any, batch: Any, scale: Any) -> Any:
        if "old" in batch.more:
            found = log_probabilities(model, batch.tokens, batch.targets, self._config.temperature, values=True)
            assert found.values is not None
            ratio = (found.log_probs - batch.more["old"]).exp()
            moved = torch.stack([ratio - 1, found.values - batch.more["old_values"]])
            self.furthest = max(self.furthest, moved.abs().max().item())
        return super().loss(model, batch, scale)


def reference_step(data: Path, found: dict[str, Any], config: RolloutConfig, rate: float) -> dict[str, Any]:
    """The same step in float64, answer by answer and token by token, from the papers' formulas: weights and figures."""
    tokens = TokenSet.open(data)
    model, start = policy(tokens, 1).double(), policy(tokens, 2).double()

    def figures(of: GPT, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        """log p of an answer's tokens, and the values of the texts before them."""
        prompt = found["prompts"][row // config.samples].tolist()
        answer = found["answers"].tokens[row, : found["answers"].lengths[row]].tolist()
        text = torch.tensor([prompt + answer])
        log_probs = (of(text)[0] / config.temperature).log_softmax(-1)
        values = of.hidden(text)[0] @ of.scalar_head.weight[0]
        places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
        own = torch.stack([log_probs[place, token] for place, token in zip(places, answer, strict=True)])
        return own, torch.stack([values[place] for place in places])

    used = [row for row in range(config.sequences) if found["answers"].ended[row] or not config.mask_cut]
    with torch.no_grad():
        old = {row: figures(model, row) for row in used}
        base = {row: figures(start, row)[0] for row in used}
    advantages: dict[tuple[int, int], float] = {}
    costs = []
    for row in used:
        log_probs, values = (each.tolist() for each in old[row])
        n = len(values)
        paid = [-config.kl * (p - q) for p, q in zip(log_probs, base[row].tolist(), strict=True)]
        costs.append(sum(paid))
        reward = [cost + (found["rewards"][row] if t == n - 1 else 0.0) for t, cost in enumerate(paid)]
        delta = [reward[t] + config.gamma * (values[t + 1] if t + 1 < n else 0.0) - values[t] for t in range(n)]
        for t in range(n):
            advantages[row, t] = sum((config.gamma * config.gae_lambda) ** (k - t) * delta[k] for k in range(t, n))
    returns = {at: advantage + old[at[0]][1][at[1]].item() for at, advantage in advantages.items()}
    mean = sum(advantages.values()) / len(advantages)
    spread = math.sqrt(sum((a - mean) ** 2 for a in advantages.values()) / len(advantages) + 1e-8)
    share, held = config.sequences // config.minibatches, 0
    for _ in range(config.epochs):
        for part in range(config.minibatches):
            own = [row for row in used if part * share <= row < (part + 1) * share]
            loss, count = torch.zeros((), dtype=torch.float64), 0
            for row in own:
                for t, (new, value) in enumerate(zip(*figures(model, row), strict=True)):
                    ratio = torch.exp(new - old[row][0][t])
                    advantage = (advantages[row, t] - mean) / spread
                    lowest = min(ratio * advantage, ratio.clamp(1 - config.clip, 1 + config.clip) * advantage)
                    was, goal = old[row][1][t], returns[row, t]
                    near = was + torch.clamp(value - was, -config.value_clip, config.value_clip)
                    worse = max((value - goal) ** 2, (near - goal) ** 2)
                    held += bool((near - goal) ** 2 > (value - goal) ** 2)
                    loss, count = loss - lowest + config.value_weight * worse / 2, count + 1
            model.zero_grad()
            (loss / count).backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    assert parameter.grad is not None
                    parameter.sub_(rate * parameter.grad)
    left = [goal - old[row][1][t].item() for (row, t), goal in returns.items()]
    return {
        "weights": {name: p.detach().numpy() for name, p in model.named_parameters()},
        "mean_return": sum(returns.values()) / len(returns),
        "kl_reward": sum(costs) / len(costs),
        "explained_variance": 1 - np.var(left) / np.var(list(returns.values())),
        "held": held,
    }


@pytest.mark.parametrize("case", CASES)
def test_a_step_is_the_reference_for_any_ranks_and_micro_batches(
    case: str, data: Path, rewards: str, tmp_path: Path
) -> None:
    config = CASES[case]
    first = one_step(Watched, data, rewards, 1, 4, config, LEARNING_RATE)
    seen = run_ranks(2, tmp_path, one_step, Watched, data, rewards, 2, 2, config, LEARNING_RATE)
    expected = reference_step(data, first, config, LEARNING_RATE)
    before = policy(TokenSet.open(data), 1).state_dict()
    moved = {name: np.abs(value - before[name].numpy()).max() for name, value in expected["weights"].items()}
    assert max(moved.values()) > 1e-2 and moved["scalar_head.weight"] > 1e-2, "it learns something"
    for found in [first, *seen]:
        np.testing.assert_array_equal(found["answers"].tokens, first["answers"].tokens)  # to the bit: equal texts
        assert found["loss"] == pytest.approx(first["loss"], abs=1e-5)
        assert found["terms"] == pytest.approx(first["terms"], abs=1e-5)
        for name, value in expected["weights"].items():
            np.testing.assert_allclose(found["weights"][name], value, atol=2e-5, err_msg=name)
        for name in ("mean_return", "explained_variance", *(("kl_reward",) if config.kl else ())):
            assert found["note"][name] == pytest.approx(expected[name], abs=1e-4), name
    assert first["updates"] == config.epochs * config.minibatches
    assert (first["terms"]["clip_share"] > 0) == (case == "updates") == (first["terms"]["value_clip_share"] > 0)
    assert (expected["held"] > 0) == (case == "updates")
    assert ("kl" in first["terms"]) == ("kl_reward" in first["note"]) == (config.kl > 0)
    lengths, ended = first["answers"].lengths, first["answers"].ended
    assert 0 < ended.sum() < len(ended) and len(set(lengths.tolist())) > 1, "some answers are cut, some end early"


def test_with_a_rate_of_0_ratio_and_values_stay(data: Path, rewards: str) -> None:
    found = one_step(Watched, data, rewards, 1, 2, ROLLOUT, 0.0)
    assert len(set(found["answers"].lengths.tolist())) > 1, "rows are ragged"
    assert 0 <= found["furthest"] < 1e-5
    assert found["terms"]["clip_share"] == found["terms"]["value_clip_share"] == 0


def test_nothing_to_whiten_or_to_explain() -> None:
    none = np.zeros((2, 3), dtype=bool)
    assert (whitened(np.ones((2, 3)), none) == 0).all() and (whitened(np.ones((2, 3)), ~none) == 0).all()
    assert explained_variance(np.array([1.0, 2.0]), np.array([3.0, 3.0])) is None
    assert explained_variance(np.array([]), np.array([])) is None
    assert explained_variance(np.array([0.0, 0.0]), np.array([1.0, 3.0])) == 0
    lengths = np.array([1, 3])  # with values of 0 and nothing discounted, every token has what follows it
    rewards = np.array([[2.0, 9.0, 9.0], [1.0, 0.0, 3.0]])
    found = generalized_advantages(rewards, np.zeros((2, 3)), lengths, gamma=1.0, lam=1.0)
    assert found.tolist() == [[2, 0, 0], [4, 3, 3]]


def options_of(reward: str, *more: str) -> tuple[str, ...]:
    return test_grpo.options_of(reward, "--objective=ppo", *more)


@pytest.mark.parametrize(
    ("ranks", "more"),
    [(1, (FULL, *SEVERAL)), (2, (SHARDED, *SEVERAL)), (2, (FULL, MUON, SHARDED)), (1, ())],
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
    notes = [r for r in told(whole) if r["kind"] == "rollout"]
    assert [r for r in told(cut) if r["kind"] == "rollout"] == notes
    assert [r["step"] for r in notes] == list(range(1, 7))
    assert {r["updates"] for r in notes} == {4 if SEVERAL[0] in more else 1}
    # the first values are 0 and the first policy is the reference: a return is then the score that comes
    assert notes[0]["explained_variance"] in (0, None) and notes[0]["kl_reward"] == pytest.approx(0, abs=1e-6)
    assert notes[-1]["explained_variance"] != 0 and notes[-1]["kl_reward"] != 0
    assert "objective: ppo, 4 prompts a step x 4 answers" in whole.log.read_text()


def test_a_reward_is_learned(tmp_path: Path, data: Path, rewards: str) -> None:
    base = base_of(tmp_path / "base")
    asked = options_of(
        f"{rewards}:digits", FULL, *SEVERAL, "--rollout.samples=1", "--rollout.prompts_per_step=16",
        "--run.max_steps=30", "--rollout.kl=0.01", "--optim.lr=3e-3", "--eval.every_steps=30",
    )  # fmt: skip
    finetune(1, tmp_path, arguments(base, tmp_path, data, "learns", *asked))
    notes = [r for r in told(run_of(tmp_path, "learns")) if r["kind"] == "rollout"]
    before, after = (np.mean([r["reward"] for r in part]) for part in (notes[:5], notes[-5:]))
    assert after > before + 0.2
    assert np.mean([r["explained_variance"] for r in notes[-10:]]) > 0.1
    held = [r["held_out_reward"] for r in told(run_of(tmp_path, "learns")) if r["kind"] == "held_out_reward"]
    assert held[-1] > held[0]


def test_mistakes_are_one_line(tmp_path: Path, data: Path, rewards: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_of(tmp_path / "base")

    def refused(*more: str) -> str:
        return refusal(monkeypatch, arguments(base, tmp_path, data, "x", *options_of(f"{rewards}:digits", *more)))

    assert "rollout.length_term doesn't go with --objective ppo" in refused("--rollout.length_term=tokens")
    assert "rollout.gamma doesn't go with --objective grpo" in refused("--rollout.gamma=0.9", "--objective=grpo")
    assert "rollout.gamma must be above 0" in refused("--rollout.gamma=0")
    assert "rollout.value_clip is 0.0: use more than 0" in refused("--rollout.value_clip=0")
    assert "--lora.dropout 0" in refused("--lora.dropout=0.1")


def reward_model(folder: Path, **options: Any) -> Path:
    """A run's folder with a reward model whose scores differ."""
    run = folder / "runs" / "Demo-reward"
    write_checkpoint(
        run / "checkpoints",
        **{"tokenizer": short_tokenizer().spec, "block_size": LENGTH, "noise": 0.3, "scalar_head": True, **options},
    )
    return run


def test_a_reward_model_scores_as_eval_does(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, tokens, ranks = reward_model(tmp_path), TokenSet.open(data), start_ranks("cpu")
    prompts = sequences_of(tokens, ROLLOUT).prompts
    sampler = Sampler(
        policy(tokens, 1), prompts, open_rewards(load_rewards([f"0.5*{run}"]), ranks), ranks, max_tokens=6,
        prompts_per_block=2, seed=3, dtype="fp32", cut_reward=-1.0,
    )  # fmt: skip
    found = sampler.roll_out(np.arange(40), 1, samples=4, temperature=0.7)
    worth, ended = 0.5 * found.parts["demo_reward"], found.answers.ended
    np.testing.assert_array_equal(found.rewards, np.where(ended, worth, -1.0))
    assert 0 < ended.sum() < len(ended)
    lines, expected = [], []
    last = found.answers.tokens[
        np.arange(160), found.answers.lengths - 1
    ]  # (R): others end by the end of text, or are cut
    for row in np.flatnonzero(last == prompts.tokenizer.special_spellings["<|end|>"]).tolist():
        text = sampler.text_of(found.answers, row)
        turns = re.split(r"<\|user\|>|<\|end\|>|<\|bot\|>", found.prompts[row // 4].text)[1:-1]
        said = [turn for turn in turns if turn] + [text]
        if text and "<|" not in text:
            lines.append({"messages": [{"role": (USER, ASSISTANT)[n % 2], "content": c} for n, c in enumerate(said)]})
            expected.append(found.parts["demo_reward"][row])
    assert len(set(expected)) > 8
    (tmp_path / "said.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    scores = tmp_path / "scores.json"
    monkeypatch.setattr(
        sys, "argv", ["reward.py", str(run), str(tmp_path / "said.jsonl"), f"--json={scores}", "--device=cpu"]
    )
    assert eval_reward.main() == 0
    given = [score for (score,) in json.loads(scores.read_text())["scores"]]
    np.testing.assert_allclose(expected, given, atol=1e-5)


def test_it_starts_from_a_reward_model_and_learns_by_it(
    tmp_path: Path, data: Path, rewards: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = reward_model(tmp_path)

    def command(*more: str) -> list[str]:
        few = ("--run.max_steps=2", *SEVERAL, f"--reward=0.5*{run}")
        return arguments(run, tmp_path, data, "judged", *options_of(f"{rewards}:digits", *few, *more))

    finetune(2, tmp_path, command())
    judged = run_of(tmp_path, "judged")
    notes = [r for r in told(judged) if r["kind"] == "rollout"]
    assert all(r["reward"] == pytest.approx(r["reward_digits"] + 0.5 * r["reward_demo_reward"]) for r in notes)
    assert notes[0]["explained_variance"] not in (0, None), "the first values are the reward model's"
    assert {"held_out_reward", "held_out_reward_demo_reward"} <= told(judged)[-1].keys() | told(judged)[0].keys()
    (_, saved), *_ = list_checkpoints(judged.checkpoints)
    recorded = read_checkpoint_manifest(saved)["rewards"]
    identity = weights_identity(read_checkpoint_manifest(find_checkpoint(run)))
    assert [(r["name"], r["weight"], r["identity"]) for r in recorded][1] == ("demo_reward", 0.5, identity)
    # what a plan says of it: the policy, the reference, adapters and the reward model
    config, _ = read_finetuning(command("--batch.micro_batch=2"))
    size = sum(value.numel() for value in load_model(find_checkpoint(run)).parameters())
    memory = estimate_of(config, 2, 0, 1, "cpu")
    assert config.model.scalar_head and memory.weights == 4 * (3 * size + (config.adapter_count() or 0))
    without = replace(config, rollout=replace(config.rollout, reward=[]))
    steps = [make_plan(each, machine_of("h100", 1, 1), limit_seconds=None).step for each in (without, config)]
    assert steps[0] is not None and steps[1] is not None
    assert steps[1].other_policies == pytest.approx(1.5 * steps[0].other_policies), "old, reference; reward model"
    # the reward model learns on: another judge
    write_checkpoint(
        run / "checkpoints", tokenizer=short_tokenizer().spec, block_size=LENGTH, noise=0.3, scalar_head=True, step=9,
        seed=1,
    )  # fmt: skip
    assert "with another reward demo_reward (" in refusal(monkeypatch, command("--run.max_steps=3"))
    # a value function is none, and an export leaves it out
    assert "is the value function of --objective ppo" in refusal(monkeypatch, command(f"--reward={judged.path}"))
    assert load_model(saved).config.scalar_head and not load_plain(judged.path).model.config.scalar_head


def test_what_is_no_reward_model_is_one_line(
    tmp_path: Path, data: Path, rewards: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = base_of(tmp_path / "base")

    def refused(given: str) -> str:
        return refusal(monkeypatch, arguments(base, tmp_path, data, "x", *options_of(given)))

    run = reward_model(tmp_path)
    assert "there is no run or checkpoint" in refused(f"{tmp_path}/none")
    assert "is no reward model, as it has no scalar head" in refused(str(base))
    assert "use FILE.py:FUNCTION or a reward model's run" in refused(f"x*{run}")
    assert "rewards of the name demo_reward" in refusal(
        monkeypatch, arguments(base, tmp_path, data, "x", *options_of(str(run), f"--reward=2*{find_checkpoint(run)}"))
    )
    assert "has another tokenizer or template than data.path" in refused(
        str(reward_model(tmp_path / "other", tokenizer="byte"))
    )
    assert "reads 16 tokens, model.block_size is 48" in refused(str(reward_model(tmp_path / "short", block_size=16)))
