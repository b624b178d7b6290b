"""The fourth phase of a start: metrics, log and heartbeat, and the reporter of failures."""

import contextlib
import os
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass

from common.run_folder import RunFolder
from common.run_note import leave_note
from model.ranks import Ranks, agreed
from train.estimates.run_memory import describe_model, memory_advice
from train.optimization.compilation import report_compilations
from train.run.acts import Acts
from train.run.failure import FailureReporter
from train.run.hang_watch import HangWatch
from train.run.heartbeat import Heartbeat
from train.run.mirror import Mirror
from train.run.recorder import Recorder
from train.run.slow_ranks import SlowRanks
from train.run.sniff_test import describe, sniff_test
from train.run.tensorboard_mirror import TensorboardWriter
from train.run.wandb_mirror import WandbMirror
from train.settings.command_line import as_dict
from train.startup.announce import (
    describe_course,
    describe_data,
    describe_in_place,
    describe_optimizer,
    describe_planned,
    describe_run,
    describe_unused_gpus,
)
from train.startup.open_run import OpenRun
from train.startup.plan_start import StartPlan
from train.stopping.ctrl_c import what_is_awaited


@dataclass(frozen=True)
class Recording:
    """What a run's record is written with."""

    recorder: Recorder
    acts: Acts
    slow_ranks: SlowRanks
    reporter: FailureReporter


@contextmanager
def recording(run: OpenRun, plan: StartPlan) -> Iterator[Recording]:
    """Keep the run's record inside the block, and report what goes wrong there. All ranks call.

    Raises as `FailureReporter.reporting` does.
    """
    request, ranks, config = run.request, run.ranks, plan.config
    folder, first_step = request.folder, plan.progress.step
    last, tokens = config.run.max_steps, plan.progress.tokens
    work = (tokens, plan.batches.stages.tokens_after(max(0, last - first_step), tokens))
    recorder = Recorder(folder, ranks, last, first_step=first_step, line_every=config.log.every_steps, work=work)
    agreed(ranks, recorder.open_files)
    reporter = FailureReporter(
        folder, ranks, plan.state, recorder, memory_advice(config, plan.batch, ranks.device.type)
    )
    acts, limit = Acts(config.run.hang_seconds), config.run.hang_limit_seconds
    ranks.on_meeting = acts.meet
    run.stop.ctrl_c.doing = lambda: what_is_awaited(acts.phase)
    run.stop.ctrl_c.drop = reporter.report_dropped
    slow_ranks = SlowRanks(ranks, [str(machine["host"]) for machine in plan.machines], recorder)
    if config.run.compile:
        report_compilations(acts.compiling, acts.compiled)
    with (
        reporter.reporting(),
        closing(Heartbeat(folder, ranks.rank, acts, token=run.lock.token)) as heartbeat,
        closing(HangWatch(folder, ranks, heartbeat, reporter, limit_seconds=limit)),
        watched_by_the_others(folder, ranks, acts, limit),
    ):
        run.deadline.report = recorder.log
        for line in describe_start(run, plan):
            recorder.log(line)
        if config.log.wandb and ranks.is_first:
            recorder.mirror_to(WandbMirror(folder, config.log, as_dict(config), recorder.log))
        if config.log.tensorboard and ranks.is_first:
            writer = TensorboardWriter(folder, first_step, plan.progress.tokens)
            recorder.mirror_to(Mirror(writer, recorder.log, config.log.wandb_finish_seconds))
        if "SLURM_JOB_ID" in os.environ:
            acts.enter("checking the machines")
            check_machines(run, plan, recorder)
        yield Recording(recorder, acts, slow_ranks, reporter)


def check_machines(run: OpenRun, plan: StartPlan, recorder: Recorder) -> None:
    """Name ranks whose machines seem sick before the first step of a cluster job; slurm/requeue.py reads the record."""
    nodes = [str(machine["node"]) for machine in plan.machines]
    record = sniff_test(run.request.folder, run.ranks, plan.machines, nodes)
    for line in describe(record):
        recorder.log(line)
    recorder.note({**record, "step": plan.progress.step, "time": time.time()})


@contextmanager
def watched_by_the_others(folder: RunFolder, ranks: Ranks, acts: Acts, limit_seconds: float) -> Iterator[None]:
    """Inside the block the other ranks watch this one, before and after it the launcher does.

    They leave it together: who left at once would see no more of one that hangs at its end.
    """
    leave_note(folder.path, ranks.rank, ranks.world_size, limit_seconds)
    try:
        yield
    finally:
        leave_note(None, ranks.rank, ranks.world_size, limit_seconds)
    acts.enter("leaving")
    with contextlib.suppress(RuntimeError):  # one that is gone by now has done its part
        ranks.barrier()


def describe_start(run: OpenRun, plan: StartPlan) -> list[str]:
    """What this start is about to do, and with what."""
    request, config, step = run.request, plan.config, plan.progress.step
    started = (
        f"resuming after step {step} from {plan.checkpoint}" if plan.checkpoint else f"starting from {request.weights}"
    )
    return [
        *describe_run(request.folder, config, plan.machines, plan.reasons),
        *describe_unused_gpus(run.ranks),
        *describe_model(config, plan.batch, run.ranks.device.type),
        *describe_data(config, request.tokens, plan.progress),
        *describe_planned(config, plan.batch, run.ranks),
        *describe_course(plan.course.course),
        *describe_optimizer(config, run.ranks.world_size),
        *(f"skipped: {complaint}" for complaint in plan.passed_over),
        started,
        *([f"first evaluating what was due at step {step} and is not recorded"] if plan.missing else []),
        *plan.notes,
        *describe_in_place(config, run.in_place),
    ]
