"""The objective that a configuration names, and what one that samples answers needs for it."""

from collections.abc import Callable, Sequence

from data_prep.token_sets.token_set import TokenSet
from model.gpt import GPT
from model.number_formats import Dtype
from model.ranks import Ranks
from train.batches.loader import StepLoader
from train.batches.plan import BatchPlan
from train.batches.prompts import PromptOrder, Prompts, prompt_sequences
from train.objectives.answers import Answers
from train.objectives.dpo import Dpo
from train.objectives.grpo import Grpo
from train.objectives.language_modelling import LanguageModelling
from train.objectives.model_reward import open_rewards
from train.objectives.objective import Objective
from train.objectives.ppo import Ppo
from train.objectives.reward_model import RewardModel
from train.objectives.rewards import load_rewards
from train.objectives.rollout import Sampler
from train.objectives.rollout_objective import RolloutObjective
from train.settings.sections import Config, PreferenceConfig, RolloutConfig


def build_objective(
    kind: str, z_loss: float, sources: Sequence[str] = (), section: RolloutConfig | PreferenceConfig | None = None
) -> Objective:
    """Args: as options `objective.kind` and `optim.z_loss` have them; sources: names of those of a mix.
    section: of an objective that samples answers or compares them, of which only the loss works before its `prepare`.
    """
    if isinstance(section, RolloutConfig):
        return Ppo(section) if kind == "ppo" else Grpo(section)
    if section is not None:
        return RewardModel() if kind == "reward" else Dpo(section)
    return {"language_modelling": LanguageModelling, "sft": Answers}[kind](z_loss, sources)


def build_sampler(config: Config, model: GPT, prompts: Prompts, ranks: Ranks, dtype: Dtype) -> Sampler:
    """What answers a split's prompts and judges the answers. All ranks call.

    Raises UserError where a reward can't be loaded.
    """
    return Sampler(
        model,
        prompts,
        open_rewards(load_rewards(config.rollout.reward), ranks),
        ranks,
        max_tokens=config.rollout.max_tokens,
        prompts_per_block=config.rollout.prompts_per_block,
        seed=config.run.seed,
        dtype=dtype,
        cut_reward=config.rollout.cut_reward,
    )


def open_rollouts(
    objective: Objective,
    config: Config,
    tokens: TokenSet,
    model: GPT,
    reference: GPT | None,
    ranks: Ranks,
    plan: BatchPlan,
    dtype: Dtype,
    *,
    on_act: Callable[[str], None],
) -> tuple[StepLoader, Sampler]:
    """A loader of the prompts, and what answers them; the objective is prepared.

    Args: reference: the policy that the run started from. on_act: as `RolloutObjective.prepare` takes it.

    Raises UserError where no prompt leaves room for an answer, and as `RolloutObjective.prepare` does.
    """
    assert isinstance(objective, RolloutObjective), objective
    rollout, seed = config.rollout, config.order_seed()
    sequences = prompt_sequences(
        tokens, config.model.block_size, samples=rollout.samples, max_tokens=rollout.max_tokens
    )
    sampler = build_sampler(config, model, sequences.prompts, ranks, dtype)
    trims = not config.run.compile
    objective.prepare(sampler, model, reference, ranks, plan, dtype, trims=trims, on_act=on_act)
    order = PromptOrder(sequences.prompts.count, rollout.samples, seed)
    return StepLoader(sequences, plan, rank=ranks.rank, seed=seed, order=order), sampler
