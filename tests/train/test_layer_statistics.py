"""Layer statistics: the figures are what they are called, depend only on weights and data, and change nothing."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from common.layer_figures import ACTIVATIONS, NORMS, by_name, flattened
from common.metrics_file import read_metrics
from common.metrics_table import MetricsTable
from data_prep.token_sets.sequences import Windows
from data_prep.token_sets.token_set import TokenSet
from eval.reporting.layer_pictures import layer_pictures
from eval.reporting.live_view import LiveRun, frame
from eval.reporting.look import Look
from eval.reporting.run_data import load_run
from model.config import ModelConfig
from model.gpt import GPT
from model.initialisation import initialise
from model.ranks import start_ranks
from tests.helpers.notes import Notes
from tests.helpers.ranks import run_ranks
from tests.helpers.token_sets import make_token_set
from tests.helpers.training import run_of, tiny_arguments, train
from train.batches.loader import StepLoader
from train.batches.plan import plan_batch
from train.layer_statistics.activations import DEAD, ActivationProbe, largest_logit, stream_of
from train.layer_statistics.layer_statistics import build_layer_statistics
from train.objectives.language_modelling import LanguageModelling
from train.optimization.compilation import compile_blocks
from train.optimization.ddp import Parallel
from train.optimization.optimizer import build_optimizer
from train.optimization.step import Limits, Stepper
from train.settings.sections import OptimConfig

CONFIG = ModelConfig(vocab_size=257, block_size=8, n_layer=2, n_head=2, n_embd=16, dropout=0.1)
SEQUENCES, STEPS = 8, 4


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_token_set(folder, train_tokens=3_000, val_tokens=300)
    return folder


def steps(
    data: Path, micro_batch: int, every: int, limits: Limits
) -> tuple[list[dict[str, Any]], dict[str, np.ndarray], list[dict[str, float]]]:
    """A rank's part: records, the last weights, and for the steps that are recorded each weight's change, by itself."""
    ranks, notes = start_ranks("cpu"), Notes()
    model = GPT(CONFIG)
    initialise(model, seed=1)
    tokens = TokenSet.open(data)
    plan = plan_batch(SEQUENCES * 8, 8, micro_batch, ranks.world_size)
    parallel, optimizer = Parallel(model, ranks), build_optimizer(model, OptimConfig(lr=1e-2))
    watcher = build_layer_statistics(every, "fp32", tokens, model, ranks, notes) if every else None  # type: ignore[arg-type]
    rest: dict[str, Any] = {"dtype": "fp32", "grad_clip": 0.1, "seed": 1, "limits": limits}
    stepper = Stepper(parallel, optimizer, ranks, plan, LanguageModelling(), watcher=watcher, **rest)
    loader = StepLoader(Windows(tokens.split("train"), 8), plan, rank=ranks.rank, seed=1)
    stepper.warm_up(8)
    changes = []
    for step in range(1, STEPS + 1):
        before = {name: p.detach().double().clone() for name, p in model.named_parameters()}
        stepper(loader.step_at((step - 1) * SEQUENCES), step)
        if watcher is not None:
            watcher.record(step)
        after = {name: p.detach().double() for name, p in model.named_parameters()}
        if every and step % every == 0:
            changes.append({name: float((after[name] - before[name]).norm()) for name in after})
    ranks.close()
    return notes.records, {name: p.detach().numpy() for name, p in model.named_parameters()}, changes


def test_the_same_figures_however_the_batch_is_cut_and_the_same_weights_without(tmp_path: Path, data: Path) -> None:
    ((records, weights, changes),) = run_ranks(1, tmp_path / "one", steps, data, 2, 2, Limits())
    ((none, without, _),) = run_ranks(1, tmp_path / "off", steps, data, 2, 0, Limits())
    (two, _, _), (nothing, _, _) = run_ranks(2, tmp_path / "two", steps, data, 2, 2, Limits())

    assert none == nothing == []  # only the first rank records
    assert all(np.array_equal(weights[name], without[name]) for name in weights)
    assert [record["step"] for record in records] == [record["step"] for record in two] == [2, 4]
    for one, other, change in zip(records, two, changes, strict=True):
        assert one["parts"] == ["embedding", "h.0.attn", "h.0.mlp", "h.1.attn", "h.1.mlp", "head"]
        for figure in (*NORMS, *ACTIVATIONS):
            assert one[figure] == pytest.approx(other[figure], rel=1e-3), figure  # Adam's first steps enlarge rounding
        mlp = math.sqrt(sum(value**2 for name, value in change.items() if name.startswith(("h.1.mlp", "h.1.ln_2"))))
        assert by_name(one)["update_norm"]["h.1.mlp"] == pytest.approx(mlp, rel=1e-4)
    last = by_name(records[-1])["weight_norm"]["h.0.attn"]
    own = [weights[n].astype(np.float64) for n in weights if n.startswith(("h.0.attn", "h.0.ln_1"))]
    assert last == pytest.approx(math.sqrt(sum((w**2).sum() for w in own)), rel=0.1)  # of the weights before the update


def test_a_refused_step_has_no_update_and_its_unclipped_gradient(tmp_path: Path, data: Path) -> None:
    ((records, _, _),) = run_ranks(1, tmp_path / "store", steps, data, 4, 4, Limits(loss=0.0))
    found = by_name(records[0])
    assert set(found["update_norm"].values()) == {0.0}
    total = math.sqrt(sum(value**2 for value in found["gradient_norm"].values()))
    assert total > 0.1  # the clip's limit


ARCHITECTURES = [
    {},
    {"n_kv_head": 1, "position": "rope", "window": 3, "norm": "rmsnorm", "mlp": "swiglu", "bias": False},
    {"mlp": "relu2", "qk_norm": True, "value_residual": True},
    {"attention": "differential", "position": "rope"},
]


@pytest.mark.parametrize("options", ARCHITECTURES)
def test_activations_are_those_of_a_plain_forward(options: dict[str, Any]) -> None:
    config = ModelConfig(**{**vars(CONFIG), **options, "dropout": 0.0})
    model = GPT(config)
    initialise(model, seed=2)
    compile_blocks(model)  # compiles at its first call, which does not come
    tokens = torch.randint(0, 257, (2, 8), generator=torch.Generator().manual_seed(0))

    streams: list[Tensor] = []
    seen: list[tuple[Tensor, Tensor, int, int | None]] = []
    plain = GPT(config)
    plain.load_state_dict(model.state_dict())
    for block in plain.h:
        block.register_forward_hook(lambda block, inputs, out: streams.append(stream_of(out).detach()))
        attention: Any = block.attn

        def watched(q: Tensor, k: Tensor, v: Tensor, visibility: Any, *, own: Any = attention) -> Tensor:
            seen.append((q.detach(), k.detach(), own.score_size, own.window))
            return type(own).attend(own, q, k, v, visibility)

        attention.attend = watched
    plain.hidden(tokens)
    rms, largest, logits, dead = ActivationProbe(model, tokens, "fp32").measure().tolist()

    assert rms == pytest.approx([s.double().square().mean().sqrt().item() for s in streams])
    assert largest == pytest.approx([s.abs().max().item() for s in streams])
    assert logits == pytest.approx([textbook_logit(*values) for values in seen], rel=1e-5)
    assert all(0 <= share <= 1 for share in dead)


def textbook_logit(q: Tensor, k: Tensor, score_size: int, window: int | None) -> float:
    """Pair by pair, of the first sequence."""
    best, group = -math.inf, q.shape[1] // k.shape[1]
    for head in range(q.shape[1]):
        for i in range(q.shape[2]):
            for j in range(0 if window is None else max(0, i - window + 1), i + 1):
                for start in range(0, q.shape[3], score_size):
                    features = slice(start, start + score_size)
                    score = float(q[0, head, i, features].double() @ k[0, head // group, j, features].double())
                    best = max(best, score / math.sqrt(score_size))
    return best


def test_units_that_do_nothing_are_dead() -> None:
    model = GPT(ModelConfig(**{**vars(CONFIG), "mlp": "relu2", "n_layer": 1}))
    initialise(model, seed=2)
    with torch.no_grad():
        model.get_parameter("h.0.mlp.c_fc.bias")[:16] = -100.0
    tokens = torch.arange(16).view(2, 8)
    dead = ActivationProbe(model, tokens, "fp32").measure()[ACTIVATIONS.index("dead_units"), 0].item()
    hidden = model.get_parameter("h.0.mlp.c_fc.bias").numel()
    assert 16 / hidden <= dead < 16 / hidden + 0.2
    assert DEAD < 1


def test_the_largest_logit_is_not_that_of_a_pair_that_does_not_see_each_other() -> None:
    q, k = torch.zeros(1, 4, 2), torch.zeros(1, 4, 2)
    q[0, 1], k[0, 3] = 10.0, 10.0  # the key comes later
    assert largest_logit(q, k, 2, None).item() == 0.0
    q[0, 3], k[0, 0] = 1.0, 1.0
    assert largest_logit(q, k, 2, None).item() == pytest.approx(20 / math.sqrt(2))
    assert largest_logit(q[:, :3], k[:, :3], 2, 1).item() == 0.0


def test_a_run_records_them_and_its_readers_show_them(tmp_path: Path, data: Path) -> None:
    options = ["--log.statistics_every=2", "--run.max_steps=6", "--eval.every_steps=0", "--checkpoint.every_steps=0"]
    train(1, tmp_path, tiny_arguments(tmp_path, data, "seen", *options))
    run = run_of(tmp_path, "seen")
    records = [record for record in read_metrics(run.metrics) if record.get("kind") == "layers"]
    assert [record["step"] for record in records] == [2, 4, 6]

    pictures = layer_pictures([load_run(run.path)])
    assert "layers-update_ratio.png" in pictures and len(pictures) == 7
    live = LiveRun(run, MetricsTable(run.metrics))
    live.refresh()
    (line,) = [line for line in frame(live, 160, 40, Look(unicode=False, color=False), 0.0) if "layers at" in line]
    assert line.startswith("layers at step 6: largest gradient ")
    assert flattened(records[0])["layers/attention_logit/h.1"] == records[0]["attention_logit"][1]


@pytest.mark.parametrize(
    "damage", [{"parts": "x"}, {"parts": ["a", 1]}, {"gradient_norm": None}, {"dead_units": ["x"]}]
)
def test_damaged_records_are_read_as_far_as_they_go(damage: dict[str, Any]) -> None:
    whole = {
        "step": 1,
        "kind": "layers",
        "parts": ["embedding", "head"],
        "weight_norm": [1.0, None],
        "dead_units": [0.5],
    }
    found = by_name(json.loads(json.dumps({**whole, "gradient_norm": [1.0, 2.0], **damage})))
    assert all(isinstance(value, float) for values in found.values() for value in values.values())
    assert "gradient_norm" not in found or "gradient_norm" not in damage
