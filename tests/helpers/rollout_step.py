"""One step of an objective that learns from answers, of a small policy, for tests of what it does to the weights."""

from pathlib import Path
from typing import Any

import torch

from data_prep.token_sets.token_set import TokenSet
from model.config import ModelConfig
from model.gpt import GPT
from model.initialisation import initialise
from model.ranks import start_ranks
from train.batches.loader import StepLoader
from train.batches.plan import plan_batch
from train.batches.prompts import PromptOrder, PromptSequences, prompt_sequences
from train.objectives.model_reward import open_rewards
from train.objectives.rewards import load_rewards
from train.objectives.rollout import Sampler
from train.optimization.ddp import Parallel
from train.optimization.step import Stepper, of_all
from train.settings.sections import RolloutConfig

LENGTH = 48


def policy(tokens: TokenSet, seed: int, *, scalar_head: bool = False) -> GPT:
    """One whose answers end now and then, and whose values are not 0: equal weights give most tokens alike."""
    config = ModelConfig(
        vocab_size=tokens.tokenizer_spec["vocab_size"], vocab_multiple=1, block_size=LENGTH, n_layer=2, n_head=2,
        n_embd=16, position="rope", scalar_head=scalar_head,
    )  # fmt: skip
    model = GPT(config)
    initialise(model, seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)) * 0.3)
    return model


def sequences_of(tokens: TokenSet, config: RolloutConfig) -> PromptSequences:
    return prompt_sequences(tokens, LENGTH, samples=config.samples, max_tokens=config.max_tokens)


def one_step(
    kind: type[Any], data: Path, reward: str, world_size: int, micro_batch: int, config: RolloutConfig, rate: float
) -> dict[str, Any]:
    """A step with plain gradient descent: what was sampled, what was reported, and the weights after it.

    Args:
        kind: of objective; one that keeps its `rollouts`, and `furthest`.
        reward: a file with the functions `digits` and `short`.
    """
    tokens, ranks, objective = TokenSet.open(data), start_ranks("cpu"), kind(config)
    model, reference = (policy(tokens, seed, scalar_head="value_loss" in objective.terms) for seed in (1, 2))
    plan = plan_batch(config.sequences * LENGTH, LENGTH, micro_batch, world_size)
    sequences = sequences_of(tokens, config)
    sampler = Sampler(
        model, sequences.prompts, open_rewards(load_rewards([f"{reward}:digits", f"0.5*{reward}:short"]), ranks), ranks,
        max_tokens=config.max_tokens, prompts_per_block=config.prompts_per_block, seed=3, dtype="fp32",
    )  # fmt: skip
    objective.prepare(sampler, model, reference if config.kl else None, ranks, plan, "fp32", trims=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    stepper = Stepper(Parallel(model, ranks), optimizer, ranks, plan, objective, dtype="fp32", grad_clip=0.0, seed=1)
    stepper.warm_up(LENGTH)
    order = PromptOrder(sequences.prompts.count, config.samples, 5)
    batch = StepLoader(sequences, plan, rank=ranks.rank, seed=5, order=order).step_at(0)
    result = of_all([stepper(part, 1) for part in objective.updates(batch, 1)])
    (rollout,) = objective.rollouts
    report = objective.report(result.terms)
    assert report is not None
    return {
        "answers": rollout.answers, "rewards": rollout.rewards, "prompts": [p.ids for p in rollout.prompts],
        "loss": result.loss, "terms": dict(result.terms), "updates": result.updates, "furthest": objective.furthest,
        "weights": {name: p.detach().numpy() for name, p in model.named_parameters()}, "note": report.note,
    }  # fmt: skip
