"""Pre-train a GPT.

    python train/launch.py --nproc_per_node=8 train/pretrain.py --config train/configs/gpt2-124m.yaml --optim.lr 3e-4
    python train/pretrain.py --config train/configs/smoke.yaml

The same command line continues the same run.
"""

import sys
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

if __package__ in (None, ""):  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch.distributed.elastic.multiprocessing.errors import record

from common.checkpoint_files import read_checkpoint_manifest
from common.checkpoint_manifest import CheckpointManifest
from common.errors import UserError, exit_on_user_error
from common.run_folder import RunFolder
from data_prep.token_sets.manifest import document_start
from data_prep.token_sets.sequences import Windows
from data_prep.token_sets.token_set import TokenSet, find_token_set
from data_prep.tokenization.tokenizer import load_tokenizer
from model.counts import check_parameters, flops_per_token, peak_flops
from model.devices import share_threads
from model.gpt import GPT
from model.initialisation import initialise
from model.lora_config import LoraConfig
from model.precision import Dtype
from model.ranks import Ranks, agreed, start_ranks
from train.batches.loader import StepLoader
from train.batches.local_copy import stage
from train.batches.plan import BatchPlan, plan_batch
from train.checkpoints.disk_space import check_space
from train.checkpoints.ownership import checkpoint_bytes
from train.checkpoints.reader import load_training_state
from train.checkpoints.resume import changed_fields, check_finished, check_same_run, choose_checkpoint
from train.checkpoints.saver import CheckpointKeeper
from train.checkpoints.writer import CheckpointWriter
from train.evaluations.between import SampleWriter, Validator, check_prompts
from train.evaluations.due import NOTHING, Due, missing_after
from train.evaluations.hellaswag import HellaSwagProbe, check_hellaswag
from train.optimization.compilation import compile_blocks
from train.optimization.ddp import Parallel
from train.optimization.optimizer import build_optimizer, declared_state
from train.optimization.schedule import Course
from train.optimization.step import Stepper
from train.progress import Progress
from train.run.failure import FailureReporter
from train.run.heartbeat import Heartbeat
from train.run.lock import holding_lock
from train.run.provenance import describe_rank
from train.run.recorder import Recorder
from train.run.state import RunState
from train.run.wandb_mirror import WandbMirror
from train.settings.command_line import Options, as_dict, read_config, to_yaml
from train.settings.sections import Config
from train.startup.announce import (
    describe_course,
    describe_data,
    describe_in_place,
    describe_measure,
    describe_model,
    describe_run,
)
from train.startup.auto import recompute_every, resolve, set_determinism
from train.startup.context import RunContext
from train.startup.course import check_course, plan_resumed, warm_up_facts
from train.startup.fit_to_data import fit_to_data
from train.startup.initial_weights import Base
from train.startup.memory_advice import memory_advice
from train.startup.position import Reading, begin_progress
from train.startup.prepare import check_files, prepare_folder
from train.stopping.deadline import StopMargin, check_deadline, open_deadline
from train.stopping.stop_requests import LauncherWatch, StopRequest
from train.trainer import TrainingLoop


@record
def main() -> int:
    return start(*read_config())


def start(config: Config, options: Options, base: Base | None = None) -> int:
    """Open the data, meet the other ranks and train; return the exit status. A fine-tuning begins with `base`."""
    if options.print_config:
        print(to_yaml(config), end="")
        return 0
    with closing(LauncherWatch()) as watch:
        return meet_and_train(config, options, base, watch)


def meet_and_train(config: Config, options: Options, base: Base | None, watch: LauncherWatch) -> int:
    """`start`, under the eye of a watch on the launcher."""
    tokens = TokenSet.open(find_token_set(config.data.path))
    if base is not None:
        base.check_tokens(tokens)
    config = fit_to_data(config, tokens)
    check_hellaswag(config.eval)
    check_prompts(config.eval, tokens.tokenizer_spec)
    folder = RunFolder.find(config.run.root, str(config.run.name))
    ranks = start_ranks(config.run.device, timeout_seconds=config.run.collective_timeout_seconds)
    threads = share_threads(ranks.local_world_size)
    if config.data.verify == "full":
        agreed(ranks, lambda: bool(TokenSet.open(tokens.folder, verify="full")))
    in_place: dict[str, str] = {}
    if config.data.stage_to is not None:
        tokens, in_place = stage(tokens, config.data.stage_to, ranks, config.data.verify)
    agreed(ranks, lambda: check_deadline(config.run.deadline))
    margin = StopMargin(config.run.deadline_margin_seconds)
    deadline = open_deadline(config.run.deadline if ranks.is_first else None, margin)
    stop = StopRequest(folder, watch_file=ranks.is_first, deadline=deadline.is_near)
    watch.lead_to(stop, margin.seconds_to_leave)
    with stop.listening(), closing(deadline), holding_lock(folder, config.run, ranks, stop) as lock:
        status = pretrain(
            RunContext(config, options, tokens, folder, ranks, threads, stop, lock, margin, deadline, base, in_place)
        )
        ranks.close()
    return status


def pretrain(context: RunContext) -> int:
    """Begin a run or go on with it; return the exit status. All ranks call."""
    folder, ranks, tokens = context.folder, context.ranks, context.tokens
    base = agreed(ranks, lambda: context.base and context.base.settled(folder), Base, LoraConfig)
    context = replace(context, base=base)
    checkpoint, complaints = agreed(ranks, lambda: choose_checkpoint(context.options.resume, folder))
    manifest = read_checkpoint_manifest(checkpoint) if checkpoint else None
    config, reasons = resolve(context.config, manifest.get("config") if manifest else None, ranks)
    context = replace(context, config=config)
    if checkpoint and manifest:
        if base is not None:
            base.check_checkpoint(checkpoint, manifest)
        optimizer = declared_state(config.optim).name
        check_same_run(checkpoint, as_dict(config), tokens.identity, context.options.allow_change, optimizer=optimizer)
    plan = plan_batch(
        config.batch.tokens_per_step, config.model.block_size, int(config.batch.micro_batch), ranks.world_size
    )
    machines = ranks.gather(describe_rank(ranks, context.threads))
    begin, read_anew = begin_progress(manifest, Reading.of(config, tokens.identity))
    state = RunState(folder, context.lock, ranks.world_size, begin)
    own = checkpoint is not None and checkpoint.resolve().parent == folder.checkpoints.resolve()
    missing = agreed(ranks, lambda: missing_after(begin.step, config, folder), Due) if own else NOTHING
    if begin.step >= config.run.max_steps and checkpoint and manifest:
        if not own:
            raise UserError(f"{checkpoint} has {begin.step} steps already: give a run.max_steps above that")
        ineffective = check_finished(folder.path, manifest, as_dict(config), context.options.allow_change)
        if not missing:
            answer_finished(context, checkpoint, state, ineffective)
            return 0
    resumed = plan_resumed(config, manifest, own=own)
    if checkpoint and own and begin.step < config.run.max_steps:
        check_course(resumed, checkpoint, context.options.allow_change)
    agreed(ranks, lambda: check_files(context, checkpoint))
    agreed(ranks, lambda: prepare_folder(context, machines, checkpoint, state))
    recorder = Recorder(folder, ranks, config.run.max_steps, first_step=begin.step, line_every=config.log.every_steps)
    agreed(ranks, recorder.open_files)
    reporter = FailureReporter(folder, ranks, state, recorder, memory_advice(config, plan, ranks.device.type))
    with reporter.reporting(), closing(Heartbeat(folder, ranks.rank)) as heartbeat:
        context.deadline.report = recorder.say
        from_the_beginning = f"starting from {base or 'scratch'}"
        for line in [
            *describe_run(folder, config, machines, reasons),
            *describe_model(config, plan, ranks.device.type),
            *describe_data(config, tokens, plan, begin),
            *describe_course(resumed.course),
            *(f"passed over: {complaint}" for complaint in complaints),
            f"going on after step {begin.step} from {checkpoint}" if checkpoint else from_the_beginning,
            *([f"measuring first what was due at step {begin.step} and is not recorded"] if missing else []),
            *(changed_fields(manifest["config"], as_dict(config)) if manifest and "config" in manifest else []),
            *resumed.lines,
            *read_anew,
            *describe_in_place(config, context.in_place),
        ]:
            recorder.say(line)
        if config.log.wandb and ranks.is_first:
            recorder.mirror_to(WandbMirror(folder, config.log, as_dict(config), recorder.say))
        loop = compose(context, plan, resumed.course, recorder, checkpoint, state, heartbeat)
        measured = describe_measure({**loop.keeper.facts, **loop.validator.facts()}, manifest)
        for line in [*measured, *(base.describe(loop.model) if base else [])]:
            recorder.say(line)
        if begin.step < config.run.max_steps:
            agreed(ranks, lambda: require_space(context, begin, loop))
        if checkpoint and manifest:
            restore(loop, checkpoint, manifest)
        loop.finish(loop.run(begin, missing))
    return 0


def answer_finished(context: RunContext, checkpoint: Path, state: RunState, ineffective: list[str]) -> None:
    """Print that the run has all its steps, and which of the command's changes have no effect on it."""
    if context.ranks.is_first:
        steps = context.config.run.max_steps
        print(f"{context.folder.path} is done: step {state.start.step} of {steps}, checkpoint {checkpoint}")
        for change in ineffective:
            print(f"without effect on it: {change}")
        state.write_done_before()


def restore(loop: TrainingLoop, checkpoint: Path, manifest: CheckpointManifest) -> None:
    """Fill weights, optimizer and loss scale from a checkpoint. All ranks call."""
    load_training_state(checkpoint, loop.model, loop.optimizer)
    if scaler := manifest.get("scaler"):
        # a backward's loss is scaled by the number of ranks as well: what fitted into fp16 shall fit again
        scale = scaler["scale"] * manifest["world_size"] / loop.ranks.world_size
        loop.stepper.scaler.load_state_dict({**scaler, "scale": scale})


def require_space(context: RunContext, begin: Progress, loop: TrainingLoop) -> None:
    """Raises UserError where the disk has no room for the checkpoints to come. One rank calls."""
    check_space(
        context.folder.checkpoints,
        context.config.checkpoint,
        first_step=begin.step,
        max_steps=context.config.run.max_steps,
        sizes=checkpoint_bytes(loop.model, loop.optimizer),
    )


def build_model(context: RunContext, *, resumed: bool) -> GPT:
    """The model with its first weights, on this rank's device."""
    config, ranks, base = context.config, context.ranks, context.base
    set_determinism(config.run.deterministic, ranks.device)
    with torch.device("meta"):
        model = GPT(config.model.architecture())
    model.to_empty(device=ranks.device)
    if base is not None:
        base.fill(model, context.folder.checkpoints, config.run.seed, resumed=resumed)
    else:
        initialise(model, config.run.seed)
    check_parameters(model, adapters=config.adapter_count())
    model.recompute_every = recompute_every(config)
    model.recompute_norms = config.recompute.norms
    if config.run.compile:
        compile_blocks(model)
    return model


def compose(
    context: RunContext,
    plan: BatchPlan,
    course: Course,
    recorder: Recorder,
    checkpoint: Path | None,
    state: RunState,
    heartbeat: Heartbeat,
) -> TrainingLoop:
    """Put the run together from its parts."""
    config, tokens, ranks, folder, base = context.config, context.tokens, context.ranks, context.folder, context.base
    model = build_model(context, resumed=checkpoint is not None)
    optimizer = build_optimizer(model, config.optim)
    dtype = cast(Dtype, config.run.dtype)  # resolve has replaced auto
    seed, clip, length = config.run.seed, config.optim.grad_clip, config.model.block_size
    parallel = Parallel(model, ranks, dtype=dtype)
    stepper = Stepper(parallel, optimizer, ranks, plan, dtype=dtype, grad_clip=clip, seed=seed)
    on_gpu = ranks.device.type == "cuda"
    train, val = Windows(tokens.split("train"), length, config.data.stride), Windows(tokens.split("val"), length)
    window_count = min(val.count, max(1, config.eval.tokens // length))
    border = document_start(tokens.tokenizer_spec) if config.data.document_mask else None
    sha256 = tokens.manifest.val_sha256
    validator = Validator(model, val, window_count, ranks, plan.micro_batch, dtype, recorder, sha256, border)
    keeper = CheckpointKeeper(
        folder.checkpoints,
        CheckpointWriter(folder.checkpoints, ranks, model, optimizer, context.lock.still_mine, recorder.sync),
        config.checkpoint,
        manifest_facts(config, course, tokens, ranks) | (base.facts(folder.checkpoints) if base else {}),
        validator,
        recorder,
        resumed_from=checkpoint,
        scaler=stepper.scaler,
        deletes=ranks.is_first,
        patience=context.margin.seconds,
    )
    tokenizer = load_tokenizer(tokens.tokenizer_spec)
    peak = peak_flops(torch.cuda.get_device_name(ranks.device)) if on_gpu else None
    return TrainingLoop(
        config=config,
        course=course,
        ranks=ranks,
        folder=folder,
        model=model,
        optimizer=optimizer,
        stepper=stepper,
        loader=StepLoader(train, plan, rank=ranks.rank, seed=seed, split_documents_at=border, pin_memory=on_gpu),
        validator=validator,
        samples=SampleWriter(model, tokenizer, config.eval, ranks, seed, recorder),
        hellaswag=HellaSwagProbe.build(config.eval, model, tokenizer, ranks, dtype, recorder),
        keeper=keeper,
        recorder=recorder,
        stop=context.stop,
        state=state,
        heartbeat=heartbeat,
        margin=context.margin,
        flops_per_token=flops_per_token(config.model.architecture(), adapters=config.adapter_count()),
        peak_flops=peak * ranks.world_size if peak else None,
        untrained=base is None and checkpoint is None,
        start_facts={"data_in_place": context.in_place} if context.in_place else {},
    )


def manifest_facts(config: Config, course: Course, tokens: TokenSet, ranks: Ranks) -> dict[str, Any]:
    """What every checkpoint of the run says of it."""
    return {
        "model": asdict(config.model.architecture()),
        "tokenizer": tokens.tokenizer_spec,
        "data_identity": tokens.identity,
        "config": as_dict(config),
        **warm_up_facts(course),
        **Reading.of(config, tokens.identity).facts(),
        "world_size": ranks.world_size,
    }


if __name__ == "__main__":
    exit_on_user_error(main)
