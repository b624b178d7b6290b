"""The model with its first weights, on this rank's device, and a micro-batch that fits beside it."""

from model.counts import check_parameters
from model.gpt import GPT
from model.initialisation import empty_gpt
from model.precision import stream_dtype
from train.estimates.run_memory import recompute_every
from train.optimization.compilation import compile_blocks
from train.startup.auto import set_determinism
from train.startup.micro_batch_trial import settle_micro_batch
from train.startup.open_run import OpenRun
from train.startup.plan_start import StartPlan
from train.startup.recording import Recording

TRIED_ON = ("cuda",)  # a CPU's memory is not refused but taken away again, by killing whoever has most of it


def build_model(run: OpenRun, plan: StartPlan, recording: Recording) -> tuple[GPT, StartPlan]:
    """The model, and the plan with what a trial of the memory has changed. All ranks call.

    Raises UserError on all ranks where the model doesn't fit.
    """
    config, resumed = plan.config, plan.checkpoint is not None
    set_determinism(config.run.deterministic, run.ranks.device)
    model = empty_gpt(config.model.architecture(), run.ranks.device)
    run.request.weights.fill(model, run.request.folder.checkpoints, config.run.seed, resumed=resumed)
    check_parameters(model, adapters=config.adapter_count())
    model.recompute_every = recompute_every(config)
    model.recompute_norms = config.recompute.norms
    model.stream_dtype = stream_dtype(config.run.stream_dtype)
    if config.run.compile:
        compile_blocks(model)
    # a micro-batch that the configuration names is left to the warm-up: there is nothing to choose
    if run.ranks.device.type in TRIED_ON and run.request.config.batch.micro_batch == "auto":
        plan = settle_micro_batch(run, plan, recording, model)
    return model, plan


def build_reference(run: OpenRun, plan: StartPlan) -> GPT:
    """The policy that the run started from, in evaluation mode, with nothing to be trained. All ranks call."""
    config, request = plan.config, run.request
    model = empty_gpt(config.model.architecture(), run.ranks.device)
    request.weights.fill(model, request.folder.checkpoints, config.run.seed, resumed=False)
    model.stream_dtype = stream_dtype(config.run.stream_dtype)
    return model.requires_grad_(requires_grad=False).eval()
