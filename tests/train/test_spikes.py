"""Spikes: what is one, that a skipped step changes nothing, and that all ranks and every resume judge alike."""

import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.checkpoint_files import list_checkpoints, read_checkpoint_manifest, write_checkpoint_manifest
from common.metrics_file import read_metrics
from common.run_folder import RunFolder
from data_prep.token_sets.sequences import Windows
from data_prep.token_sets.token_set import TokenSet
from model.config import ModelConfig
from model.gpt import GPT
from model.initialisation import initialise
from model.number_formats import Dtype
from model.ranks import start_ranks
from tests.helpers.garbage import VOCABULARY, make_planted_set
from tests.helpers.training import curve, run_of, train, train_by_path, weights_hashes
from train.batches.loader import StepLoader
from train.batches.plan import plan_batch
from train.batches.shuffle import windows_at
from train.checkpoints.ownership import expected_names, share_of
from train.errors import TooManySpikes
from train.objectives.language_modelling import LanguageModelling
from train.optimization.ddp import Parallel
from train.optimization.optimizer import build_optimizer
from train.optimization.step import Limits, Stepper, StepResult, Verdict
from train.optimization.trend import LENGTH, NORM_OUTLIER, OF_NORMAL, OUTLIER, RAISED, Trend
from train.run.spikes import SUSTAINED, WINDOW, Spikes
from train.settings.sections import OptimConfig

SEQUENCES, BLOCK, SEED = 24, 8, 3
CONFIG = ModelConfig(vocab_size=VOCABULARY, block_size=BLOCK, n_layer=1, n_head=1, n_embd=16, mlp_hidden=32)
OPTIM = OptimConfig(lr=2e-2)
GARBAGE = (140, 148, 151, 152, 153)
YAML = """
model: {block_size: 8, n_layer: 1, n_head: 1, n_embd: 16, mlp_hidden: 32}
optim: {lr: 2.0e-2}
schedule: {warmup: 3, kind: constant}
batch: {tokens_per_step: 192, micro_batch: 4}
checkpoint: {every_steps: 0}
eval: {every_steps: 0, tokens: 512, prompts: []}
run: {seed: 3, dtype: fp32, device: cpu, max_steps: 150, on_spike: skip}
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planted") / "set"
    return make_planted_set(folder, GARBAGE, run_steps=160, sequences=SEQUENCES, block_size=BLOCK, seed=SEED)


def arguments(folder: Path, data: Path, name: str, *more: str) -> list[str]:
    config = folder / "spikes.yaml"
    config.write_text(YAML)
    return [f"--config={config}", f"--data.path={data}", f"--run.root={folder / 'runs'}", f"--run.name={name}", *more]


def result(loss: float, norm: float = 1.0, verdict: Verdict = Verdict.LEARNED) -> StepResult:
    return StepResult(loss, norm, verdict)


def noisy(count: int = LENGTH, seed: int = 0) -> list[tuple[float, float]]:
    generator = np.random.default_rng(seed)
    return [(3 + 0.1 * generator.standard_normal(), math.exp(0.2 * generator.standard_normal())) for _ in range(count)]


def test_limits_are_median_and_spread_of_the_last_accepted_steps() -> None:
    trend = Trend()
    for loss, norm in [(9.0, 9.0), *noisy()][: LENGTH - 1]:
        trend.accept(loss, norm)
        assert trend.limits == Limits() and trend.raised_above == math.inf
    trend = Trend.of([(9.0, 9.0), *noisy()])  # the oldest is forgotten
    losses, norms = np.array(noisy()).T
    spread = OF_NORMAL * np.median(np.abs(losses - np.median(losses)))
    assert trend.limits.loss == pytest.approx(np.median(losses) + OUTLIER * spread, rel=1e-12)
    assert trend.raised_above == pytest.approx(np.median(losses) + RAISED * spread, rel=1e-12)
    norms = np.log(norms)
    spread = OF_NORMAL * np.median(np.abs(norms - np.median(norms)))
    assert trend.limits.grad_norm == pytest.approx(math.exp(np.median(norms) + NORM_OUTLIER * spread), rel=1e-12)


def test_what_is_not_finite_or_was_skipped_is_no_part_of_the_trend() -> None:
    spikes = Spikes(on_spike="skip", max_skips=10)
    spikes.trend = Trend.of(noisy())
    before = spikes.limits
    for step, bad in enumerate((math.nan, math.inf, 50.0), 200):
        verdict = Verdict.BEYOND_LIMITS if math.isfinite(bad) else Verdict.NON_FINITE
        record = spikes.take(step, result(bad, verdict=verdict))
        assert record is not None and (record["skipped"], record["skips"]) == (True, step - 199)
        assert spikes.limits == before
    assert spikes.take(203, result(3.0)) is None
    assert spikes.take(204, result(0.1)) is None, "a loss far below is no spike"


def test_a_recorded_spike_is_learned_from_and_a_new_level_is_no_spike_for_long() -> None:
    spikes = Spikes()
    spikes.trend = Trend.of(noisy())
    assert spikes.limits == Limits(), "nothing is skipped"
    reported = [spikes.take(step, result(loss + 5.0, norm)) for step, (loss, norm) in enumerate(noisy(), 200)]
    count = sum(record is not None and not record["skipped"] for record in reported)
    assert 1 <= count <= LENGTH / 2 + 1 and reported[-1] is None
    assert spikes.sustained(400) is None and spikes.suspected() == []


def test_more_skips_than_permitted_among_the_last_steps_end_the_run() -> None:
    spikes = Spikes(on_spike="skip", max_skips=2)
    for step in (1, 1 + WINDOW // 2, 1 + WINDOW, 2 + WINDOW):
        spikes.take(step, result(9.0, verdict=Verdict.BEYOND_LIMITS))
        if step <= 1 + WINDOW:  # the first is no longer among the last then
            assert spikes.sustained(step) is None
    with pytest.raises(TooManySpikes, match=r"step 130: 3 of the last 128 steps were skipped"):
        spikes.sustained(2 + WINDOW)


def test_a_loss_that_stays_above_its_trend_is_sustained() -> None:
    spikes = Spikes(on_spike="rollback", max_rollbacks=1)
    spikes.trend = Trend.of(noisy())
    for step in range(200, 200 + SUSTAINED):
        assert spikes.sustained(step) is None
        spikes.take(step, result(3.6))
    found = spikes.sustained(200 + SUSTAINED - 1)
    assert found is not None and found.first_step == 200 and spikes.suspected() == [200]
    spikes.rollbacks.append({})
    with pytest.raises(TooManySpikes, match=r"after 1 roll-backs, as many as run\.max_rollbacks permits"):
        spikes.sustained(200 + SUSTAINED - 1)
    spikes.take(300, result(3.0))
    assert spikes.sustained(300) is None and spikes.suspected() == []


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads that wait for each other over a model of this size take longer than the model."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Bench:
    """A model and what its steps need, on one rank."""

    def __init__(self, data: Path, dtype: Dtype = "fp32", optim: OptimConfig = OPTIM) -> None:
        self.ranks, self.model = start_ranks("cpu"), GPT(CONFIG)
        plan = plan_batch(SEQUENCES * BLOCK, BLOCK, SEQUENCES, 1)
        initialise(self.model, SEED)
        self.optimizer = build_optimizer(self.model, optim)
        self.stepper = Stepper(
            Parallel(self.model, self.ranks), self.optimizer, self.ranks, plan, LanguageModelling(),
            dtype=dtype, grad_clip=1.0, seed=SEED, skip_nonfinite=True,
        )  # fmt: skip
        self.loader = StepLoader(Windows(TokenSet.open(data).split("train"), BLOCK), plan, rank=0, seed=SEED)

    def step(self, step: int) -> StepResult:
        return self.stepper(self.loader.step_at((step - 1) * SEQUENCES), step)

    def state(self) -> dict[str, Any]:
        """Everything that a step may change."""
        found: dict[str, Any] = {"scaler": self.stepper.scaler.state_dict()}
        for name, parameter in self.model.named_parameters():
            kept = {"weight": parameter.detach(), **self.optimizer.state[parameter]}
            found |= {f"{name}/{key}": value.clone() for key, value in kept.items()}
        return found


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("optim", [OptimConfig(), OptimConfig(fused=False), OptimConfig(kind="muon")])
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_skipped_step_leaves_everything_as_it_was(data: Path, dtype: Dtype, optim: OptimConfig) -> None:
    bench = Bench(data, dtype, optim)
    bench.stepper.scaler.load_state_dict(bench.stepper.scaler.state_dict() | {"scale": 64.0})
    assert [bench.step(step).verdict for step in (1, 2)] == [Verdict.LEARNED] * 2
    before = bench.state()
    poison = bench.model.wte.weight.register_hook(lambda gradient: gradient * math.nan)
    if dtype == "fp32":  # fp16 lowers its scale where only gradients overflow
        assert bench.step(3).verdict is Verdict.NON_FINITE
    poison.remove()
    spoilt = bench.model.ln_f.register_forward_hook(lambda *a: a[2] * math.nan)
    assert bench.step(3).verdict is Verdict.NON_FINITE
    spoilt.remove()
    bench.stepper.limits = Limits(loss=0.1)
    assert bench.step(3).verdict is Verdict.BEYOND_LIMITS
    same = {name: value.equal(now) if isinstance(value, torch.Tensor) else value == now
            for (name, value), now in zip(before.items(), bench.state().values(), strict=True)}  # fmt: skip
    assert all(same.values()), same
    bench.stepper.limits = Limits()
    assert bench.step(3).verdict is Verdict.LEARNED
    assert bench.optimizer.state[bench.model.wte.weight]["step"] == 3


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("optim", [OptimConfig(), OptimConfig(fused=False), OptimConfig(kind="muon", fused=False)])
def test_what_has_only_skipped_steps_is_saved_whole_and_continues_alike(data: Path, optim: OptimConfig) -> None:
    benches = [Bench(data, optim=optim) for _ in range(2)]
    for bench in benches:
        spoilt = bench.model.ln_f.register_forward_hook(lambda *a: a[2] * math.nan)
        assert bench.step(1).verdict is Verdict.NON_FINITE
        spoilt.remove()
    saved, other = benches
    names = {name for name, _ in saved.model.named_parameters()}
    share = share_of(names, saved.model, saved.optimizer)
    assert {kind: set(tensors) for kind, tensors in share.items()} == expected_names(saved.model, saved.optimizer)
    own = dict(saved.model.named_parameters())
    for full_name, tensor in share["optimizer"].items():
        name, key = full_name.rsplit("/", 1)
        saved.optimizer.state[own[name]][key] = tensor.clone()
    for bench in benches:
        assert [bench.step(step).verdict for step in (2, 3)] == [Verdict.LEARNED] * 2
    assert all(one.equal(two) for one, two in zip(saved.model.parameters(), other.model.parameters(), strict=True))


@pytest.mark.usefixtures("one_thread")
def test_with_skips_garbage_costs_next_to_nothing(tmp_path: Path) -> None:
    """Twenty runs of which some steps read garbage, and one of which none does; they share the first 134 steps."""
    clean = tmp_path / "clean"
    make_planted_set(clean, (), run_steps=150, sequences=SEQUENCES, block_size=BLOCK, seed=SEED)
    first, spikes = Bench(clean), Spikes(on_spike="skip")
    for step in range(1, 135):
        assert spikes.take(step, first.step(step)) is None
    generator = np.random.default_rng(0)
    ends = {}
    for number in range(21):
        planted = sorted(generator.choice(np.arange(135, 150), size=min(number, 4), replace=False).tolist())
        bench, own = Bench(clean), copy.deepcopy(spikes)
        bench.model.load_state_dict(first.model.state_dict())
        bench.optimizer.load_state_dict(first.optimizer.state_dict())
        for step in range(135, 151):
            batch = bench.loader.step_at((step - 1) * SEQUENCES)
            if step in planted:
                for tokens in (batch.tokens, batch.targets):
                    tokens.copy_(torch.from_numpy(generator.integers(VOCABULARY - 1, size=tokens.shape)))
            bench.stepper.limits = own.limits
            own.take(step, bench.stepper(batch, step))
        assert own.skipped == planted
        with torch.no_grad():
            batch = bench.loader.step_at(149 * SEQUENCES)
            ends[number] = bench.model(batch.tokens[0], batch.targets[0]).item() / batch.target_count
    assert max(ends.values()) <= 1.01 * ends[0], ends


@pytest.fixture(scope="module")
def skipping(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """Runs of 150 steps that skip two, on 1, 2 and 3 ranks."""
    folder = tmp_path_factory.mktemp("skipping")
    for ranks in (1, 2, 3):
        train(ranks, folder, arguments(folder, data, f"on-{ranks}"))
    return folder


def spike_records(folder: RunFolder) -> list[dict[str, object]]:
    return [record for record in read_metrics(folder.metrics) if record.get("kind") == "spike"]


def test_the_same_steps_are_skipped_on_any_number_of_ranks(skipping: Path) -> None:
    numbers = windows_at(139 * SEQUENCES, SEQUENCES, 160 * SEQUENCES, SEED)
    for ranks in (1, 2, 3):
        run = run_of(skipping, f"on-{ranks}")
        found = spike_records(run)
        told = [(record["step"], record["skipped"], record["skips"], record["position"]) for record in found]
        assert told == [(140, True, 1, 139 * SEQUENCES), (148, True, 2, 147 * SEQUENCES)]
        assert found[0]["sequences"] == sorted(numbers.tolist())
        steps = [record for record in read_metrics(run.metrics) if "kind" not in record]
        assert [record["step"] for record in steps if record.get("skipped")] == [140, 148]
        recorded = read_checkpoint_manifest(list_checkpoints(run.checkpoints)[0][1])["spikes"]
        assert (recorded["skips"], recorded["skipped"]) == (2, [140, 148])


def test_a_sharded_optimizer_skips_alike(skipping: Path, data: Path) -> None:
    train(2, skipping, arguments(skipping, data, "sharded", "--optim.shard=true"))
    whole, sharded = (run_of(skipping, name) for name in ("on-2", "sharded"))
    assert len(spike_records(sharded)) == 2 and curve(sharded) == curve(whole)
    hashes = [weights_hashes(list_checkpoints(run.checkpoints)[0][1]) for run in (whole, sharded)]
    assert hashes[0] == hashes[1] and any(name.startswith("optimizer:") for name in hashes[0])


def test_a_resumed_run_judges_by_the_recorded_trend(tmp_path: Path, data: Path, skipping: Path) -> None:
    halved, old = (arguments(tmp_path, data, name) for name in ("halved", "old"))
    train(1, tmp_path, [*halved, "--run.max_steps=145"])
    run = run_of(tmp_path, "halved")
    branch = f"--resume={run.checkpoints / 'step-00000145'}"
    train(1, tmp_path, [*old, branch, "--run.max_steps=146"])
    train(1, tmp_path, halved)
    steps = [record for record in curve(run) if record[0] != "145" or record[4] == "None"]  # its own last validation
    assert steps == curve(run_of(skipping, "on-1"))
    # as an older version has saved it: an empty history, so that nothing is a spike
    checkpoint = list_checkpoints(run_of(tmp_path, "old").checkpoints)[0][1]
    manifest = read_checkpoint_manifest(checkpoint)
    assert len(manifest["spikes"]["trend"]) == LENGTH
    facts = {key: value for key, value in manifest.items() if key not in ("spikes", "manifest_sha256")}
    write_checkpoint_manifest(checkpoint, facts)
    train(1, tmp_path, old)
    manifest = read_checkpoint_manifest(list_checkpoints(run_of(tmp_path, "old").checkpoints)[0][1])
    assert spike_records(run_of(tmp_path, "old")) == []
    assert len(manifest["spikes"]["trend"]) == 4, "of steps 147 to 150, the garbage included"
    # three more skips are more than this start permits
    done = train_by_path(*halved, "--run.max_steps=160", "--run.max_skips=4")
    state = json.loads(run.state.read_text())
    assert (done.returncode, state["status"], state["failure"]) == (1, "failed", "exception")
    assert state["reason"].startswith("step 153: 5 of the last 128 steps were skipped, more than run.max_skips 4: ")
    assert "Traceback" not in done.stderr


def test_other_data_or_another_batch_start_a_new_trend() -> None:
    spikes = Spikes(measured_in={"tokens_per_step": 192})
    spikes.trend, spikes.skips, spikes.skipped = Trend.of(noisy()), 5, [7]
    manifest = json.loads(json.dumps(spikes.facts()))
    same, other, branch = (Spikes(measured_in={"tokens_per_step": tokens}) for tokens in (192, 96, 192))
    assert (same.resume(manifest, own=True), same.trend.steps, same.skips) == ("", spikes.trend.steps, 5)
    assert "starts anew" in other.resume(manifest, own=True)
    assert (len(other.trend.steps), other.skips, other.skipped) == (0, 5, [])
    assert (branch.resume(manifest, own=False), branch.trend.steps, branch.skips) == ("", spikes.trend.steps, 0)
