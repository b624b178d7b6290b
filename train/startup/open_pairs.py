"""What a run reads that learns from pairs of answers, with log-probabilities by the policy that it started from."""

from common.errors import UserError
from common.os_errors import refusal
from model.gpt import GPT
from train.batches.loader import StepLoader
from train.batches.pairs import InOrder, PairSequences
from train.batches.plan import BatchPlan
from train.batches.prompts import PromptOrder
from train.objectives.dpo import Dpo
from train.objectives.objective import Objective
from train.objectives.reference import FILE, HeldBack, reference_key, reference_log_probs
from train.objectives.reward_model import HeldBackScores, RewardModel
from train.startup.build_model import build_reference
from train.startup.open_run import OpenRun
from train.startup.plan_start import StartPlan
from train.startup.recording import Recording


def open_pairs(
    run: OpenRun, plan: StartPlan, recording: Recording, objective: Objective, model: GPT
) -> tuple[StepLoader, HeldBack | HeldBackScores]:
    """A loader of the pairs to learn from, and those that are held back; the objective is prepared. All ranks call.

    With DPO the log-probabilities of all answers by the policy of the start are read or computed; some are NaN where a
    stop has been requested meanwhile, on which the trainer agrees before its first step.

    Args: model: whose weights are those of the start where the run does not resume from a checkpoint.

    Raises UserError on all ranks where no pair fits into the model, or the log-probabilities can't be written.
    """
    config, tokens, ranks, weights = plan.config, run.request.tokens, run.ranks, run.request.weights
    length, seed, whole = config.model.block_size, config.order_seed(), config.objective.scores
    pairs = PairSequences(tokens, "train", length, whole=whole)
    held_back = PairSequences(tokens, "val", length, at_most=max(1, config.eval.tokens // (2 * length)), whole=whole)
    loader = StepLoader(pairs, plan.batch, rank=ranks.rank, seed=seed, order=PromptOrder(pairs.pairs, 2, seed))
    size = plan.batch.micro_batch
    all_once = BatchPlan(size * ranks.world_size, size, ranks.world_size, 1)
    validated = StepLoader(held_back, all_once, rank=ranks.rank, seed=seed, order=InOrder(held_back.count))
    trims = not config.run.compile
    if isinstance(objective, RewardModel):
        objective.prepare(trims=trims)
        return loader, HeldBackScores(validated, trims)
    assert isinstance(objective, Dpo), objective
    key = reference_key({
        "weights": weights.recorded()["base"]["identity"],
        "data": tokens.identity,
        "tokenizer": tokens.tokenizer_spec["sha256"],
        "block_size": length,
        "dtype": plan.dtype,
        "stream_dtype": config.run.stream_dtype,
    })  # fmt: skip
    path = run.request.folder.path / FILE
    try:
        reference = reference_log_probs(
            path,
            key,
            {"train": loader, "val": validated},
            (lambda: model) if plan.checkpoint is None else (lambda: build_reference(run, plan)),
            ranks,
            plan.dtype,
            trims=trims,
            on_act=recording.acts.start,
            log=recording.recorder.log,
            stop_code=run.stop.code,
        )
    except OSError as error:
        raise UserError(refusal("write", error, path, otherwise="start the same command again")) from None
    objective.prepare(reference["train"], trims=trims)
    return loader, HeldBack(validated, reference["val"], config.preference, trims)
