"""Who competes in bench_step.py: each a step on the same batches, from the same weights wherever it has any."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.missing_packages import install_command
from eval.hugging_face.hf_config import to_config
from eval.hugging_face.hf_tensors import to_tensors
from model.gpt import GPT
from model.initialisation import empty_gpt, initialise
from model.number_formats import Dtype
from model.precision import TORCH_DTYPES, resolve_dtype, stream_dtype
from model.ranks import Ranks
from train.batches.loader import StepBatch
from train.batches.plan import plan_batch
from train.benchmarks.ceiling import Ceiling
from train.benchmarks.plain_gpt import PlainGPT, PlainStep
from train.benchmarks.step_cases import Case
from train.estimates.run_memory import estimated_memory, recompute_every
from train.objectives.language_modelling import LanguageModelling
from train.optimization.compilation import compile_blocks
from train.optimization.ddp import Parallel
from train.optimization.optimizer import build_optimizer
from train.optimization.step import Stepper
from train.settings.sections import Config, OptimConfig
from train.startup.auto import resolve


@dataclass(frozen=True)
class Contestant:
    """What takes part.

    Attributes:
        step: learns from a batch, the number of the step beside it; its mean loss in nats, None where it has none.
        described: what it is, in a few words.
        compiled: whether torch.compile is at work in it.
        estimated_bytes: what Longhaul's own estimate says it keeps.
    """

    step: Callable[[StepBatch, int], float | None]
    described: str
    compiled: bool = False
    estimated_bytes: int | None = None


def build(name: str, case: Case, device: torch.device) -> Contestant:
    """Raises UserError where a contestant can't do what the case asks for."""
    builders = {
        "longhaul": _longhaul,
        "textbook": _textbook,
        "nanogpt": _nanogpt,
        "transformers": _transformers,
        "ceiling": _ceiling,
    }
    return builders[name](case, device)


def _longhaul(case: Case, device: torch.device) -> Contestant:
    """As train/startup/build_model.py and train/assemble.py build it."""
    ranks = Ranks(0, 1, 0, 1, device)
    config, _ = resolve(case.config, None, ranks)
    model = _initialised(config, device)
    model.recompute_every = recompute_every(config)
    model.recompute_norms = config.recompute.norms
    model.stream_dtype = stream_dtype(config.run.stream_dtype)
    if config.run.compile:
        compile_blocks(model)
    plan = plan_batch(config.batch.tokens_per_step, config.model.block_size, case.micro_batch, 1)
    stepper = Stepper(
        Parallel(model, ranks),
        build_optimizer(model, config.optim),
        ranks,
        plan,
        LanguageModelling(config.optim.z_loss),
        dtype=_dtype(config, device),
        grad_clip=config.optim.grad_clip,
        seed=config.run.seed,
    )
    compiled = "compiled block by block" if config.run.compile else "eager"
    return Contestant(
        step=lambda batch, step: stepper(batch, step).loss,
        described=f"as configured: {compiled}, recompute {config.recompute.mode}",
        compiled=bool(config.run.compile),
        estimated_bytes=estimated_memory(config, plan, device.type).total,
    )


def _textbook(case: Case, device: torch.device) -> Contestant:
    """The tokenizer's vocabulary, all logits, an optimizer that goes from parameter to parameter."""
    config = case.config
    model = _plain(config, device, config.model.vocab_size)
    optimizer = _adamw(model, config.optim, fused=False)
    step = PlainStep(model, optimizer, device, dtype=_dtype(config, device), grad_clip=config.optim.grad_clip)
    return Contestant(step, "all logits, AdamW unfused, eager")


def _nanogpt(case: Case, device: torch.device) -> Contestant:
    """nanoGPT's: a padded vocabulary whose padding nothing masks, all logits, fused AdamW, compiled as a whole."""
    config = case.config
    model = _plain(config, device, config.model.padded_vocab_size)
    optimizer = _adamw(model, config.optim, fused=True)
    compiled = _compiles(config, device)
    loss = torch.compile(model) if compiled else model
    step = PlainStep(loss, optimizer, device, dtype=_dtype(config, device), grad_clip=config.optim.grad_clip)
    how = "compiled as a whole" if compiled else "eager"
    return Contestant(step, f"all logits, vocabulary padded, AdamW fused, {how}", compiled)


class _TheirLoss(nn.Module):
    """transformers' model and the cross-entropy of its logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        logits = self.model(tokens, use_cache=False).logits  # (B, T, V)
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def _transformers(case: Case, device: torch.device) -> Contestant:
    """The class of transformers that computes the same function, with fused AdamW."""
    try:
        import transformers
    except ImportError:
        raise UserError(f"transformers is not installed: {install_command(['transformers'])}") from None
    config = case.config
    architecture = config.model.architecture()
    values = to_config(architecture, None)
    theirs = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    model = transformers.AutoModelForCausalLM.from_config(theirs)
    ours = dict(_initialised(config, torch.device("cpu")).named_parameters())
    missing, unexpected = model.load_state_dict(to_tensors(architecture, ours), strict=False)
    if unexpected or any("lm_head" not in name for name in missing):
        raise UserError(f"transformers {transformers.__version__} has other tensors: {[*missing, *unexpected][:3]}")
    model.train().to(device)
    optimizer = _adamw(model, config.optim, fused=True)
    compiled = _compiles(config, device)
    loss: nn.Module = _TheirLoss(model)
    if compiled:
        loss.compile()
    step = PlainStep(loss, optimizer, device, dtype=_dtype(config, device), grad_clip=config.optim.grad_clip)
    how = "compiled as a whole" if compiled else "eager"
    return Contestant(step, f"{type(model).__name__} {transformers.__version__}, AdamW fused, {how}", compiled)


def _ceiling(case: Case, device: torch.device) -> Contestant:
    config = case.config
    dtype = TORCH_DTYPES[_dtype(config, device)]
    step = Ceiling(config.model.architecture(), case.micro_batch, dtype, device)
    return Contestant(step, "matrix products only")


def _dtype(config: Config, device: torch.device) -> Dtype:
    return resolve_dtype(config.run.dtype, device)[0]


def _compiles(config: Config, device: torch.device) -> bool:
    """As the trainer decides it, but for its trial: what fails here is a row with the reason."""
    return config.run.compile is True or (config.run.compile == "auto" and device.type == "cuda")


def _initialised(config: Config, device: torch.device) -> GPT:
    model = empty_gpt(config.model.architecture(), device)
    initialise(model, config.run.seed)
    return model


def _plain(config: Config, device: torch.device, vocab_rows: int) -> PlainGPT:
    """With Longhaul's first weights."""
    architecture = config.model.architecture()
    model = PlainGPT(architecture, vocab_rows)
    weights = {name: tensor.detach() for name, tensor in _initialised(config, torch.device("cpu")).named_parameters()}
    weights |= {name: weights[name][:vocab_rows] for name in ("wte.weight", "lm_head.weight") if name in weights}
    weights.setdefault("lm_head.weight", weights["wte.weight"])
    model.load_state_dict(weights)
    return model.train().to(device)


def _adamw(model: nn.Module, optim: OptimConfig, *, fused: bool) -> torch.optim.AdamW:
    """AdamW with the configuration's figures; only matrices and tables decay."""
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (optim.beta1, optim.beta2)
    return torch.optim.AdamW(groups, lr=optim.lr, betas=betas, eps=optim.eps, foreach=False, fused=fused)
