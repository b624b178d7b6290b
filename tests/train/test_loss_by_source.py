"""Training loss by source: what float64 says, however the batch is cut up, and training is the same to the bit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.nn import functional as F

from data_prep.token_sets.token_mix import Source, TokenMix
from data_prep.token_sets.token_set import TokenSet
from model import kernel_sizes
from model.config import ModelConfig
from model.gpt import GPT
from model.initialisation import initialise
from model.ranks import start_ranks
from tests.helpers.ranks import run_ranks
from tests.helpers.token_sets import make_token_set
from train.batches.loader import StepBatch
from train.batches.mixture import Mixture, levels_of
from train.batches.plan import BatchPlans, plan_batches
from train.batches.training_sequences import open_loader, prepare_packing
from train.objectives.language_modelling import LanguageModelling
from train.optimization.ddp import Parallel
from train.optimization.optimizer import build_optimizer
from train.optimization.step import Stepper, StepResult
from train.settings.sections import BatchConfig, OptimConfig

LENGTH, SEQUENCES = 16, 12
WEIGHTS = {"web": 5.0, "code": 3.0, "rare": 0.05}  # the last is in few steps
CONFIG = ModelConfig(vocab_size=257, block_size=LENGTH, n_layer=1, n_head=2, n_embd=16)


def open_mix(folder: Path) -> TokenMix:
    return TokenMix([Source(name, TokenSet.open(folder / name)) for name in WEIGHTS], [])


def plans(micro_batch: int, world_size: int) -> BatchPlans:
    batch = BatchConfig(tokens_per_step=SEQUENCES * LENGTH, micro_batch=micro_batch)
    return plan_batches(batch.stages, LENGTH, micro_batch, world_size)


def exact(model: GPT, batch: StepBatch) -> dict[int, tuple[float, int]]:
    """By source, sums of losses in float64 and their number: a batch's logits all at once, without our loss."""
    assert batch.sources is not None
    wide = GPT(CONFIG).double()
    wide.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    documents = None if batch.document_ids is None else batch.document_ids.flatten(0, 1)
    logits = wide(batch.tokens.flatten(0, 1), document_ids=documents)[..., : CONFIG.vocab_size]
    targets, sources = batch.targets.flatten(0, 1), batch.sources.flatten()
    losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none", ignore_index=-100)
    counted = targets != -100
    return {
        number: (losses[sources == number].sum().item(), int(counted[sources == number].sum()))
        for number in range(len(WEIGHTS))
    }


def two_steps(folder: Path, world_size: int, packed: bool, z_loss: float) -> tuple[list[Any], list[Any], list[Any]]:
    """Of each of two steps what is reported and what float64 says; and both without the sources, at the end."""
    kernel_sizes.CHUNK_ROWS_CPU = 7  # of this rank's process: several chunks, across sequences
    ranks, batches, tokens = start_ranks("cpu"), plans(2, world_size), open_mix(folder)
    if packed:
        prepare_packing(tokens, LENGTH, ranks)
    mixture = Mixture(levels_of([(0, WEIGHTS, 0)], list(WEIGHTS)))
    shape: dict[str, Any] = {"length": LENGTH, "stride": None, "packed": packed, "mask_documents": packed}
    loader = open_loader(tokens, batches, ranks, **shape, seed=1, mixture=mixture)
    reported, expected, weights = [], [], []
    for sources in (tuple(WEIGHTS), ()):
        model = GPT(CONFIG)
        initialise(model, seed=1)
        parallel, optimizer = Parallel(model, ranks), build_optimizer(model, OptimConfig(lr=0.01), ranks)
        objective = LanguageModelling(z_loss, sources)
        stepper = Stepper(parallel, optimizer, ranks, batches.full, objective, dtype="fp32", grad_clip=1.0, seed=1)
        stepper.warm_up(LENGTH, document_mask=packed)
        for step in (1, 2):
            batch = loader.step_at((step - 1) * SEQUENCES)
            if sources:
                expected.append((exact(model, batch), batch.source_target_counts))
            reported.append(stepper(batch, step))
        weights.append({name: value.detach().numpy() for name, value in model.named_parameters()})
    return reported, expected, weights


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    for seed, name in enumerate(WEIGHTS):
        make_token_set(folder / name, train_tokens=1_200, val_tokens=100, seed=seed)
    return folder


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(("packed", "z_loss"), [(False, 0.0), (True, 0.05)])
def test_losses_by_source_are_those_of_float64(
    tmp_path: Path, sets: Path, world_size: int, packed: bool, z_loss: float
) -> None:
    found = run_ranks(world_size, tmp_path / "store", two_steps, sets, world_size, packed, z_loss)
    results: list[StepResult] = found[0][0]
    for step in (0, 1):
        by_rank = [expected[step] for _, expected, _ in found]
        sums = {n: [sum(part) for part in zip(*(own[n] for own, _ in by_rank), strict=True)] for n in range(3)}
        assert {tuple(total for _, total in sums.values())} == {counts for _, counts in by_rank}
        means = {name: total / count for name, (total, count) in zip(WEIGHTS, sums.values(), strict=True) if count}
        assert results[step].by_source == pytest.approx(means, rel=1e-5)
        assert "web" in means and "code" in means
        weighted = sum(loss * sums[list(WEIGHTS).index(name)][1] for name, loss in means.items())
        assert results[step].loss == pytest.approx(weighted / sum(total for _, total in sums.values()), rel=1e-5)
    assert "rare" not in results[0].by_source  # it has nothing in a step of 12

    # the same on all ranks, and the same to the bit without
    for reported, _, (with_sources, without) in found:
        assert reported == results
        assert [(r.loss, r.grad_norm, r.terms) for r in reported[:2]] == [
            (r.loss, r.grad_norm, r.terms) for r in reported[2:]
        ]
        for name, values in with_sources.items():
            np.testing.assert_array_equal(values, without[name], err_msg=name)
