"""The second phase of a start: which checkpoint, what `auto` means, the batch, what is left. Writes nothing."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from common.checkpoint_files import read_checkpoint_manifest
from common.checkpoint_manifest import CheckpointManifest
from common.errors import UserError
from data_prep.token_sets.token_set import TokenSet
from model.initialisation import empty_gpt
from model.lora import add_lora
from model.number_formats import Dtype
from model.ranks import Ranks, agreed
from train.batches.loader import StepLoader
from train.batches.plan import BatchPlan, BatchPlans, plan_batches
from train.batches.training_sequences import open_loader
from train.checkpoints.reader import check_training_state
from train.checkpoints.resume import changed_fields, check_finished, check_same_run, choose_checkpoint
from train.evaluations.evaluation import Due, missing_after
from train.optimization.optimizer import declared_state
from train.optimization.optimizer_name import optimizer_name
from train.progress import Progress
from train.run.machines import describe_rank
from train.run.spikes import Spikes
from train.run.state import RunState
from train.settings.command_line import as_dict
from train.settings.sections import Config
from train.startup.auto import resolve
from train.startup.course import ResumedCourse, check_course, plan_resumed
from train.startup.fit_to_data import MixStart, check_epochs, mixture_of, start_of_mix
from train.startup.open_run import OpenRun
from train.startup.position import Reading, begin_progress, rolled_past
from train.startup.request import Request, print_done


@dataclass(frozen=True)
class StartPlan:
    """What this start will do.

    Attributes:
        config: with every `auto` resolved; reasons: a line for each choice.
        checkpoint, manifest: what is resumed from; None for a new run.
        progress: how far the run has come.
        missing: what was due at `progress` and is not recorded.
        notes: for the log: what was skipped, and what has changed.
        spikes: the judgement on losses and gradient norms, as the checkpoint records it.
        mix_start: where the sources of a mix start.
    """

    config: Config
    reasons: list[str]
    checkpoint: Path | None
    manifest: CheckpointManifest | None
    batches: BatchPlans
    course: ResumedCourse
    progress: Progress
    missing: Due
    machines: list[dict[str, Any]]
    state: RunState
    passed_over: list[str]
    notes: list[str]
    spikes: Spikes
    mix_start: MixStart

    @property
    def batch(self) -> BatchPlan:
        """Of the largest step, from which the others differ in their accumulation only."""
        return self.batches.full

    @property
    def dtype(self) -> Dtype:
        """Of matrix multiplications."""
        return cast(Dtype, self.config.run.dtype)  # auto has been replaced

    def open_sequences(self, tokens: TokenSet, ranks: Ranks) -> StepLoader:
        """A loader of the sequences of a text or of conversations. Raises UserError as `open_loader` does."""
        model, data = self.config.model, self.config.data
        return open_loader(
            tokens,
            self.batches,
            ranks,
            length=model.block_size,
            stride=data.stride,
            packed=data.is_packed,
            mask_documents=data.masks_documents,
            seed=self.config.order_seed(),
            mixture=mixture_of(tokens, self.mix_start.first),
        )


def plan_start(run: OpenRun) -> StartPlan | None:
    """All ranks call, and get the same: None where the run has all its steps, which has been printed.

    Raises UserError on all ranks where that is impossible.
    """
    request, ranks = run.request, run.ranks
    folder, tokens, options = request.folder, request.tokens, request.options

    # Which checkpoint to resume from, and whether it is this run's
    checkpoint, passed_over = agreed(ranks, lambda: choose_checkpoint(options.resume, folder))
    manifest = read_checkpoint_manifest(checkpoint) if checkpoint else None
    config, reasons = resolve(request.config, manifest.get("config") if manifest else None, ranks)
    if checkpoint and manifest:
        request.weights.check_checkpoint(checkpoint, manifest)
        optimizer = optimizer_name(config.optim)
        facts = (as_dict(config), tokens.identity, options.allow_change)
        check_same_run(checkpoint, *facts, optimizer=optimizer, rewards=request.rewards)

    # How the batch is divided, and how far the run is
    micro_batch = int(config.batch.micro_batch)
    batches = plan_batches(config.batch.stages, config.model.block_size, micro_batch, ranks.world_size)
    machines = ranks.gather(describe_rank(ranks, run.threads))
    reading = Reading.of(config, tokens.identity)
    progress, read_anew = begin_progress(manifest, reading)
    alike = manifest is not None and reading.cuts_alike(Reading.recorded(manifest))
    mix_start, continued = start_of_mix(tokens, manifest, same_sequences=alike, data=config.data)
    config = mix_start.stated(config)
    if alike and any(mix_start.first.values()):
        read_anew = []
    last_tokens = config.batch.stages.tokens_after(max(0, config.run.max_steps - progress.step), progress.tokens)
    end = progress.sequences + (last_tokens - progress.tokens) // config.model.block_size
    own = checkpoint is not None and checkpoint.resolve().parent == folder.checkpoints.resolve()
    rolled_back = rolled_past(manifest) if own and manifest else 0
    sources = agreed(ranks, lambda: check_epochs(tokens, config, mix_start.first, end, rolled_back))
    state = RunState(folder, run.lock, ranks.world_size, progress)
    done = progress.step >= config.run.max_steps
    missing: Due = {}
    if own:
        missing = agreed(ranks, lambda: missing_after(progress.step, request.evaluations, folder, last=done))

    # What is left to do
    if done and checkpoint and manifest:
        if not own:
            raise UserError(f"{checkpoint} has {progress.step} steps already: use a larger run.max_steps")
        ineffective = check_finished(folder.path, manifest, as_dict(config), options.allow_change)
        if not missing:
            if ranks.is_first:
                print_done(folder, progress.step, config.run.max_steps, checkpoint, ineffective)
                state.write_done_before()
            return None
    course = plan_resumed(config, manifest, own=own)
    if checkpoint and own and not done:
        check_course(course, checkpoint, options.allow_change)
    agreed(ranks, lambda: check_files(request, config, checkpoint))
    notes = changed_fields(manifest["config"], as_dict(config)) if manifest and "config" in manifest else []
    if manifest and manifest.get("weights_only"):
        notes.append(f"a new optimizer ({config.optim.kind}): {checkpoint} holds only weights")
    if manifest and config.optim.ema_half_life_tokens is not None and "ema" not in manifest:
        notes.append(f"the exponential average of the weights starts here: {checkpoint} has none")
    notes += [*course.lines, *read_anew, *continued, *sources]
    spikes = plan_spikes(config, tokens.identity, course)
    if manifest and (line := spikes.resume(manifest, own=own)):
        notes.append(line)
    return StartPlan(
        config, reasons, checkpoint, manifest, batches, course, progress, missing, machines, state, passed_over, notes,
        spikes, mix_start,
    )  # fmt: skip


def plan_spikes(config: Config, data_identity: str, course: ResumedCourse) -> Spikes:
    """The judgement on this run's steps, without any so far."""
    measured_in = {
        "data_identity": data_identity,
        "block_size": config.model.block_size,
        "tokens_per_step": config.batch.tokens_per_step,
        "warm_up_start": course.course.warm_up.start,
    }
    run = config.run
    return Spikes(run.on_spike, run.max_skips, run.max_rollbacks, measured_in)


def check_files(request: Request, config: Config, checkpoint: Path | None) -> None:
    """Compare what the run starts from with the model that is to be trained, by the files' headers. One rank calls.

    Raises UserError where it is another's, before anything of the run is touched.
    """
    adapters = request.weights.adapters
    request.weights.check_files(resumed=checkpoint is not None)
    if checkpoint is not None:
        model = empty_gpt(config.model.architecture())
        if adapters is not None:
            add_lora(model, adapters, config.run.seed)
        averaged = config.optim.ema_half_life_tokens is not None
        check_training_state(checkpoint, model, declared_state(model, config.optim), averaged=averaged)
