"""Seconds that sampling answers takes on GPUs, beside learning from them, by the roofline model; without torch.

A block of answers is a prefill of its prompts and one decoding step a token. A decoding step reads all weights and the
keys and values so far, and computes one token a row: it takes what memory, products or the launches of kernels take,
the longest of the three. It is an estimate for answers of `rollout.max_tokens` and the longest prompts, which no
measured run has been compared with.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from model.attention_kinds import ATTENTION_KINDS
from model.config import ModelConfig
from model.counts import flops_per_token, parameter_count
from train.estimates.speed import (
    BANDWIDTH_SHARE,
    KERNEL_SECONDS,
    KERNELS_PER_BLOCK,
    Cluster,
    StepTime,
    Work,
    forward_seconds,
    matrix_rate,
)
from train.settings.sections import RolloutConfig

SAMPLED_LOGIT_BYTES = 60  # moved per logit to choose a token: widened to 64 bits, divided, softmax, cumulative sum
OF_MICRO_BATCHES = ("matrix_products", "attention", "elementwise", "head", "gradients", "launches")  # each epoch anew
FORWARD = 1 / 3  # of a block's kernels, which `KERNELS_PER_BLOCK` counts with the backward


@dataclass(frozen=True)
class Answers:
    """Answers that all ranks sample together. Tokens: of a prompt and of an answer, at most."""

    prompts: int
    samples: int
    prompts_per_block: int
    prompt_tokens: int
    answer_tokens: int


def with_rollout(
    step: StepTime,
    work: Work,
    cluster: Cluster,
    rollout: RolloutConfig,
    *,
    reference: bool,
    values: bool = False,
    judges: Sequence[ModelConfig] = (),
) -> StepTime:
    """A whole step of a rollout: sampling, what other models say of the answers, and all its updates.

    Args:
        step: of one update from all answers. reference: the policy of the start gives log-probabilities, too.
        values: the old policy's values are needed, however many updates there are. judges: reward models.
    """
    updates, epochs = rollout.epochs * rollout.minibatches, rollout.epochs
    rows = work.micro_batch * work.accumulation * work.model.block_size  # tokens of a rank's answers
    policies = int(reference) + int(updates > 1 or values)
    learning = {name: epochs * getattr(step, name) for name in OF_MICRO_BATCHES}
    return replace(
        step,
        **learning,
        update=updates * step.update,
        communication=updates * step.communication,
        sampling=sampling_seconds(work, cluster, answers_of(work.model, rollout)),
        other_policies=policies * forward_seconds(work, cluster, rows)
        + sum(forward_seconds(replace(work, model=judge), cluster, rows) for judge in judges),
    )


def answers_of(model: ModelConfig, rollout: RolloutConfig) -> Answers:
    """Of a step."""
    longest = model.block_size - rollout.max_tokens
    return Answers(rollout.prompts_per_step, rollout.samples, rollout.prompts_per_block, longest, rollout.max_tokens)


def held_out_of(model: ModelConfig, rollout: RolloutConfig) -> Answers:
    """Of the held-out reward."""
    return replace(answers_of(model, rollout), prompts=rollout.held_out_prompts, samples=1)


def sampling_seconds(work: Work, cluster: Cluster, answers: Answers) -> float:
    """Of the rank with the most blocks."""
    if not answers.prompts:
        return 0.0
    blocks = -(-answers.prompts // answers.prompts_per_block)
    each = -(-blocks // cluster.world_size)
    prompts = min(answers.prompts, answers.prompts_per_block)
    rows = prompts * answers.samples
    one = Work(work.model, prompts, 1, dtype=work.dtype)
    prefill = forward_seconds(one, cluster, prompts * answers.prompt_tokens)
    # the keys that a token sees grow from the prompt's to the whole row's
    seen = answers.prompt_tokens + answers.answer_tokens / 2
    return each * (prefill + answers.answer_tokens * _decoding_seconds(work, cluster, rows, seen))


def _decoding_seconds(work: Work, cluster: Cluster, rows: int, seen: float) -> float:
    """Of one token in every row. Args: seen: tokens before it."""
    model, gpu = work.model, cluster.gpu
    item = 4 if work.dtype == "fp32" else 2
    keys = sum(seen if window is None else min(window, seen) for window in model.windows)  # of all layers
    cached = 2 * model.kv_heads * model.head_size * keys * item
    moved = item * parameter_count(model) + rows * (cached + SAMPLED_LOGIT_BYTES * model.padded_vocab_size)
    flops = flops_per_token(model, 0) / 3 + ATTENTION_KINDS[model.attention].products_per_key(model) * keys
    launches = KERNEL_SECONDS * KERNELS_PER_BLOCK * FORWARD * model.n_layer
    return max(moved / (BANDWIDTH_SHARE * gpu.bandwidth), rows * flops / matrix_rate(gpu, work.dtype), launches)
