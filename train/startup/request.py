"""What a start was asked for, checked as far as possible without torch: a mistake is reported at once."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.checkpoint_files import list_checkpoints, read_checkpoint_manifest
from common.errors import UserError
from common.run_folder import RunFolder
from data_prep.token_sets.token_set import TokenSet
from model.rank_environment import find_place
from train.batches.plan import plan_batches
from train.checkpoints.resume import check_finished, check_same_run, choose_checkpoint
from train.evaluations.evaluation import Evaluation, missing_after
from train.evaluations.registry import EVALUATIONS, OF_PAIRS, OF_ROLLOUTS
from train.objectives.rewards import recorded_rewards
from train.optimization.optimizer_name import optimizer_name
from train.settings.command_line import Options, as_dict, to_yaml
from train.settings.sections import Config
from train.startup.fit_to_data import fit_to_data, open_data
from train.startup.initial_weights import InitialWeights
from train.startup.recorded_choices import reuse


@dataclass(frozen=True)
class Request:
    """One start of a run.

    Attributes:
        config: fitted to the data; it may still have unresolved `auto` choices.
        weights: what the run starts from.
        evaluations: what happens between steps, in this order.
        rewards: what judges answers, as checkpoints record it; empty where none are sampled.
    """

    config: Config
    options: Options
    tokens: TokenSet
    folder: RunFolder
    weights: InitialWeights
    evaluations: tuple[Evaluation, ...]
    rewards: list[dict[str, Any]]


def check_request(config: Config, options: Options, weights: InitialWeights) -> Request | None:
    """Check a start; None where it has been answered: the configuration was to be printed, or the run is done.

    Raises UserError for missing data, a foreign vocabulary, an impossible batch, an evaluation that can't be done, and
    another run under this run's name.
    """
    if options.print_config:
        print(to_yaml(config), end="")
        return None
    tokens = open_data(config)
    if (config.objective.rolls_out or config.objective.compares) and weights.untrained:
        why = (
            "learns from what a trained model answers" if config.objective.rolls_out else "starts from a trained model"
        )
        raise UserError(f"--objective {config.objective.kind} {why}: use train/finetune.py RUN_OR_CHECKPOINT")
    weights = weights.fitted(tokens, config)
    config = fit_to_data(config, tokens, weights.vocab_size)
    objective = config.objective
    kinds = OF_ROLLOUTS if objective.rolls_out else OF_PAIRS if objective.compares else EVALUATIONS
    evaluations = tuple(kind(config) for kind in kinds)
    for evaluation in evaluations:
        evaluation.check(tokens)
    folder = RunFolder.find(config.run.root, str(config.run.name))
    rewards = recorded_rewards(config.rollout.reward) if objective.rolls_out else []
    request = Request(config, options, tokens, folder, weights, evaluations, rewards)
    world_size = find_place(os.environ).world_size
    micro_batch = config.batch.micro_batch
    smallest = 1 if isinstance(micro_batch, str) else micro_batch
    plan_batches(config.batch.stages, config.model.block_size, smallest, world_size)
    return None if world_size == 1 and _is_done(request) else request


def _is_done(request: Request) -> bool:
    """Print that the run has all its steps, where its files show it: no rank would decide otherwise."""
    config, folder, options = request.config, request.folder, request.options
    saved = list_checkpoints(folder.checkpoints)
    if not saved or saved[0][0] < config.run.max_steps:
        return False
    try:
        state = folder.read_state() or {}
    except (OSError, UserError):  # the start that follows reports that
        return False
    if state.get("status") != "done":
        return False
    checkpoint, _ = choose_checkpoint(options.resume, folder)
    if checkpoint is None or checkpoint.resolve().parent != folder.checkpoints.resolve():
        return False
    manifest = read_checkpoint_manifest(checkpoint)
    step = manifest["step"]
    if step < config.run.max_steps or missing_after(step, request.evaluations, folder, last=True):
        return False
    config = reuse(config, manifest.get("config"), world_size=1)
    request.weights.check_checkpoint(checkpoint, manifest)
    optimizer = optimizer_name(config.optim)
    facts = (as_dict(config), request.tokens.identity, options.allow_change)
    check_same_run(checkpoint, *facts, optimizer=optimizer, rewards=request.rewards)
    ineffective = check_finished(folder.path, manifest, as_dict(config), options.allow_change)
    print_done(folder, step, config.run.max_steps, checkpoint, ineffective)
    return True


def print_done(folder: RunFolder, step: int, max_steps: int, checkpoint: Path, ineffective: list[str]) -> None:
    """Print that a run has all its steps, and which of the command's changes have no effect on it."""
    print(f"{folder.path} is done: step {step} of {max_steps}, checkpoint {checkpoint}")
    for change in ineffective:
        print(f"without effect on it: {change}")
