"""One optimizer step: the same gradient however the batch is cut up, one round of all-reduce, no update from NaN."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from data_prep.token_sets.sequences import Windows
from data_prep.token_sets.token_set import TokenSet
from model.config import ModelConfig
from model.gpt import GPT
from model.initialisation import initialise
from model.number_formats import Dtype
from model.ranks import Ranks, start_ranks
from tests.helpers.ranks import run_ranks
from tests.helpers.token_sets import make_token_set
from train.batches.loader import StepBatch, StepLoader
from train.batches.plan import plan_batch
from train.checkpoints.ownership import optimizer_tensors
from train.errors import NonFiniteLoss
from train.objectives.language_modelling import LanguageModelling
from train.optimization.ddp import Parallel
from train.optimization.optimizer import build_optimizer
from train.optimization.step import Limits, Stepper, Verdict
from train.settings.sections import OptimConfig

CONFIG = ModelConfig(vocab_size=257, block_size=8, n_layer=2, n_head=2, n_embd=16)
SEQUENCES = 8


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_token_set(folder, train_tokens=2_000, val_tokens=100)
    return folder


class GradientKeeper(torch.optim.Optimizer):
    """Changes nothing and keeps what it was given."""

    def __init__(self, model: GPT) -> None:
        super().__init__(model.parameters(), {})
        self._names = [name for name, _ in model.named_parameters()]
        self.kept: dict[str, np.ndarray] = {}

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        parameters = self.param_groups[0]["params"]
        self.kept = {name: p.grad.numpy().copy() for name, p in zip(self._names, parameters, strict=True)}


class CountedInTheStep(LanguageModelling):
    """An objective whose number of targets is another in every step."""

    def total_target_count(self, batch: StepBatch) -> int | None:
        return None


Z_LOSS = 0.05


class Parts:
    """A model and what its steps need, on this rank."""

    def __init__(self, data: Path, world_size: int, micro_batch: int, z_loss: float = 0.0) -> None:
        self.ranks = start_ranks("cpu")
        self.model = GPT(CONFIG)
        initialise(self.model, seed=1)
        self.parallel = Parallel(self.model, self.ranks)
        self.optimizer = GradientKeeper(self.model)
        plan = plan_batch(SEQUENCES * 8, 8, micro_batch, world_size)
        self.stepper = Stepper(
            self.parallel, self.optimizer, self.ranks, plan, LanguageModelling(z_loss),
            dtype="fp32", grad_clip=0.0, seed=1,
        )  # fmt: skip
        windows = Windows(TokenSet.open(data).split("train"), 8)
        self.batch = StepLoader(windows, plan, rank=self.ranks.rank, seed=1).step_at(0)


def parameters(model: GPT) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def one_step(
    data: Path, world_size: int, micro_batch: int, z_loss: float
) -> tuple[dict[str, float], float, dict[str, np.ndarray], int]:
    """Loss and terms, gradient norm, gradients and how many all-reduces a warmed-up step took."""
    parts = Parts(data, world_size, micro_batch, z_loss)
    rounds = 0

    def count(state: object, bucket) -> torch.futures.Future[Tensor]:
        nonlocal rounds
        rounds += 1
        summed = dist.all_reduce(bucket.buffer().div_(world_size), async_op=True).get_future()
        return summed.then(lambda future: future.value()[0])

    if world_size > 1:
        assert parts.parallel._ddp is not None
        parts.parallel._ddp.register_comm_hook(None, count)
    parts.stepper.warm_up(8)
    rounds = 0
    result = parts.stepper(parts.batch, 1)
    kept, rounds_of_one = parts.optimizer.kept, rounds
    with pytest.MonkeyPatch.context() as patch:  # no rank asks the others for their counts
        patch.setattr(Ranks, "sum", lambda self, values: pytest.fail("the ranks' targets are known"))
        assert parts.stepper(parts.batch, 1) == result  # nothing of the step before is left in the gradients
    parts.stepper.objective = CountedInTheStep(z_loss)
    assert parts.stepper(parts.batch, 1) == result
    assert all(np.array_equal(kept[name], again) for name, again in parts.optimizer.kept.items())
    return {"loss": result.loss, **result.terms}, result.grad_norm, kept, rounds_of_one


def textbook_step(data: Path, z_loss: float) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Loss and gradients of the whole batch at once, without any of the trainer."""
    model = GPT(CONFIG)
    initialise(model, seed=1)
    windows = Windows(TokenSet.open(data).split("train"), 8)
    batch = StepLoader(windows, plan_batch(SEQUENCES * 8, 8, SEQUENCES, 1), rank=0, seed=1).step_at(0)
    logits = model(batch.tokens[0])[..., : CONFIG.vocab_size]
    loss = F.cross_entropy(logits.flatten(0, 1), batch.targets[0].flatten())
    z = z_loss * logits.logsumexp(-1).square().mean()
    (loss + z).backward()
    found = {"loss": loss.item()} | ({"z_loss": z.item()} if z_loss else {})
    return found, {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("world_size", "micro_batch", "accumulation", "z_loss"),
    [(1, 8, 1, 0.0), (1, 2, 4, Z_LOSS), (2, 2, 2, Z_LOSS), (2, 4, 1, 0.0), (4, 2, 1, 0.0), (4, 1, 2, 0.0)],
)
def test_the_gradient_is_the_same_however_the_batch_is_cut_up(
    tmp_path: Path, data: Path, world_size: int, micro_batch: int, accumulation: int, z_loss: float
) -> None:
    assert world_size * micro_batch * accumulation == SEQUENCES
    expected_losses, expected = textbook_step(data, z_loss)
    for losses, norm, gradients, rounds in run_ranks(
        world_size, tmp_path / "store", one_step, data, world_size, micro_batch, z_loss
    ):
        assert losses == pytest.approx(expected_losses, rel=1e-6)
        assert norm == pytest.approx(
            math.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in expected.values())), rel=1e-5
        )
        for name, gradient in gradients.items():
            np.testing.assert_allclose(gradient, expected[name], rtol=1e-4, atol=1e-7, err_msg=name)
            scale = np.linalg.norm(expected[name])
            assert np.linalg.norm(gradient - expected[name]) <= 1e-5 * scale + 1e-9, name
        assert rounds == (1 if world_size > 1 else 0)  # these parameters fit one bucket


def step_with_a_bad_rank(data: Path) -> tuple[str, bool]:
    parts = Parts(data, 2, 2)
    if parts.ranks.rank == 1:  # as a faulty GPU would
        with torch.no_grad():
            parts.model.get_parameter("h.0.mlp.c_fc.weight")[0, 0] = math.nan
    before = parameters(parts.model)
    with pytest.raises(NonFiniteLoss) as caught:
        parts.stepper(parts.batch, 7)
    after = parameters(parts.model)
    return str(caught.value), all(before[name].equal(after[name]) for name in before if name != "h.0.mlp.c_fc.weight")


def test_one_ranks_nan_stops_all_ranks_before_the_update_and_is_named(tmp_path: Path, data: Path) -> None:
    first, second = run_ranks(2, tmp_path / "store", step_with_a_bad_rank, data)
    assert first == second
    message, untouched = first
    assert untouched
    assert message.startswith("step 7: loss nan, gradient norm nan, before the update (rank 1, sequences [")


@pytest.mark.parametrize("fused", [True, False])  # the optimizer clips, or the step does
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_clipping_scales_to_the_limit(data: Path, fused: bool, dtype: Dtype) -> None:
    ranks = start_ranks("cpu")
    model = GPT(CONFIG)
    initialise(model, seed=1)
    before = parameters(model)
    plan = plan_batch(SEQUENCES * 8, 8, SEQUENCES, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=fused)
    stepper = Stepper(
        Parallel(model, ranks), optimizer, ranks, plan, LanguageModelling(), dtype=dtype, grad_clip=0.01, seed=1
    )
    windows = Windows(TokenSet.open(data).split("train"), 8)
    result = stepper(StepLoader(windows, plan, rank=0, seed=1).step_at(0), 1)
    assert result.grad_norm > 0.1  # as it was before clipping
    change = math.sqrt(sum(((before[name] - p) ** 2).sum().item() for name, p in parameters(model).items()))
    assert change == pytest.approx(0.01, rel=1e-3)
    assert not {"grad_scale", "found_inf"} & set(vars(optimizer))


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("clip", [1e-2, 1e2])  # above and below the norm
def test_whoever_clips_the_update_is_the_same(data: Path, clip: float, kind: Any) -> None:
    updated = []
    for fused in (True, False):
        ranks, model, plan = start_ranks("cpu"), GPT(CONFIG), plan_batch(SEQUENCES * 8, 8, SEQUENCES, 1)
        initialise(model, seed=1)
        optimizer = build_optimizer(model, OptimConfig(kind=kind, fused=fused, lr=1e-3))
        stepper = Stepper(
            Parallel(model, ranks), optimizer, ranks, plan, LanguageModelling(), dtype="fp32", grad_clip=clip, seed=1
        )
        loader = StepLoader(Windows(TokenSet.open(data).split("train"), 8), plan, rank=0, seed=1)
        results = [stepper(loader.step_at(step * SEQUENCES), step + 1) for step in range(3)]
        assert all((result.grad_norm > clip) == (clip < 1) for result in results)
        updated.append(parameters(model) | optimizer_tensors(model, optimizer))
    for name, value in updated[0].items():
        torch.testing.assert_close(value, updated[1][name], rtol=1e-5, atol=1e-6, msg=name)


class CastCounter(TorchDispatchMode):
    """Counts the casts of a tensor."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.tensor, self.count = tensor, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._to_copy.default and args[0] is self.tensor
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("recompute_every", [0, 1])
def test_weights_are_cast_once_a_step_and_learn_from_every_micro_batch(data: Path, recompute_every: int) -> None:
    gradients = []
    for micro_batch in (2, SEQUENCES):
        ranks, model, plan = start_ranks("cpu"), GPT(CONFIG), plan_batch(SEQUENCES * 8, 8, micro_batch, 1)
        initialise(model, seed=1)
        model.recompute_every = recompute_every
        optimizer = GradientKeeper(model)
        stepper = Stepper(
            Parallel(model, ranks), optimizer, ranks, plan, LanguageModelling(), dtype="bf16", grad_clip=0.0, seed=1
        )
        windows = Windows(TokenSet.open(data).split("train"), 8)
        with CastCounter(model.get_parameter("h.0.mlp.c_fc.weight")) as counter:
            stepper(StepLoader(windows, plan, rank=0, seed=1).step_at(0), 1)
        assert counter.count == 1
        gradients.append(optimizer.kept)
    for name, gradient in gradients[0].items():
        whole = gradients[1][name]
        assert np.linalg.norm(gradient - whole) <= 0.02 * np.linalg.norm(whole) + 1e-9, name


def test_dropout_is_another_in_every_step_and_micro_batch_and_depends_on_nothing_else(data: Path) -> None:
    stepper = Parts(data, 1, 2).stepper
    seeds = {}
    for step in (1, 2):
        for index in (0, 1):
            stepper._seed_dropout(step, index)
            seeds[step, index] = torch.initial_seed()
    assert len(set(seeds.values())) == 4
    torch.manual_seed(99)  # whatever was drawn before
    stepper._seed_dropout(2, 1)
    assert torch.initial_seed() == seeds[2, 1]


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("fused", [True, False])  # the verdict is read on the device, or by the host
@pytest.mark.parametrize("limits", [Limits(loss=1.0), Limits(grad_norm=1e-3)])
def test_a_step_beyond_a_limit_changes_nothing_and_the_next_one_learns(
    data: Path, limits: Limits, fused: bool, kind: Any
) -> None:
    ranks, model, plan = start_ranks("cpu"), GPT(CONFIG), plan_batch(SEQUENCES * 8, 8, 4, 1)
    initialise(model, seed=1)
    optimizer = build_optimizer(model, OptimConfig(kind=kind, fused=fused))
    loader = StepLoader(Windows(TokenSet.open(data).split("train"), 8), plan, rank=0, seed=1)

    def stepper(limits: Limits) -> Stepper:
        objective = LanguageModelling()
        return Stepper(
            Parallel(model, ranks), optimizer, ranks, plan, objective,
            dtype="fp32", grad_clip=1.0, seed=1, limits=limits,
        )  # fmt: skip

    learned = stepper(Limits())(loader.step_at(0), 1)
    before = parameters(model)
    moments = {name: value.clone() for name, value in optimizer_tensors(model, optimizer).items()}

    refused = stepper(limits)(loader.step_at(SEQUENCES), 2)

    assert (learned.verdict, refused.verdict) == (Verdict.LEARNED, Verdict.BEYOND_LIMITS)
    assert all(before[name].equal(value) for name, value in parameters(model).items())
    assert len(moments) > len(before)
    assert all(moments[name].equal(value) for name, value in optimizer_tensors(model, optimizer).items())
    assert all(p.grad is None for p in model.parameters())
    again = stepper(Limits())(loader.step_at(SEQUENCES), 2)
    assert (again.verdict, again.loss, again.grad_norm) == (Verdict.LEARNED, refused.loss, refused.grad_norm)
    assert not before["wte.weight"].equal(model.wte.weight)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("fused", [True, False])
def test_no_update_comes_of_a_gradient_that_is_nan(data: Path, fused: bool, kind: Any) -> None:
    """Of the embedding's, which is AdamW's: all is left as it was, in one decision."""
    ranks, model, plan = start_ranks("cpu"), GPT(CONFIG), plan_batch(SEQUENCES * 8, 8, 8, 1)
    initialise(model, seed=1)
    optimizer = build_optimizer(model, OptimConfig(kind=kind, fused=fused))
    stepper = Stepper(
        Parallel(model, ranks), optimizer, ranks, plan, LanguageModelling(), dtype="fp32", grad_clip=1.0, seed=1
    )
    batch = StepLoader(Windows(TokenSet.open(data).split("train"), 8), plan, rank=0, seed=1).step_at(0)
    stepper(batch, 1)
    before = parameters(model) | {name: t.clone() for name, t in optimizer_tensors(model, optimizer).items()}
    model.wte.weight.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(NonFiniteLoss, match=r"loss 5\.\d+, gradient norm nan, before the update"):
        stepper(batch, 2)
    after = parameters(model) | optimizer_tensors(model, optimizer)
    assert all(before[name].equal(value) for name, value in after.items())
