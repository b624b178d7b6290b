"""The study of Tiny Shakespeare: its leak, its configurations, and the command that makes it again."""

import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_prep.token_sets.sequences import Windows
from model.config import ModelConfig
from model.counts import parameter_count
from model.gpt import GPT
from model.initialisation import initialise
from tests.helpers.training import PROJECT
from train.optimization.schedule import plan_course
from train.settings.command_line import read_config
from train.settings.sections import Config

STUDY = PROJECT / "records" / "2026-11-22-tiny-shakespeare"
TRAINING_CHARACTERS = 1_003_854


def module(name: str) -> ModuleType:
    """A script of the study, which lies in no package."""
    spec = importlib.util.spec_from_file_location(f"study_{name}", STUDY / f"{name}.py")
    assert spec is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def config_of(name: str) -> Config:
    return read_config([f"--config={STUDY / 'configs' / name}.yaml", "--model.vocab_size=65"])[0]


class RandomCharacters:
    def __init__(self, length: int) -> None:
        self.characters = torch.randint(65, (length,), generator=torch.Generator().manual_seed(0)).numpy()

    def __len__(self) -> int:
        return len(self.characters)

    def read(self, start: int, stop: int):
        return self.characters[start:stop]


@pytest.mark.parametrize("kind", ["causal", "leaky"])
def test_a_norm_over_positions_tells_earlier_logits_of_the_last_character_and_a_norm_per_token_does_not(kind):
    config = ModelConfig(
        vocab_size=65,
        block_size=32,
        n_layer=2,
        n_head=2,
        n_embd=32,
        norm="rmsnorm",
        position="rope",
        mlp="swiglu",
        bias=False,
    )
    model = GPT(config) if kind == "causal" else module("leak").LeakyGPT(config)
    initialise(model, 1)
    model.eval()
    measure = module("measure")
    moved = measure.leak(model, Windows(RandomCharacters(400), 32))
    assert measure.is_leaky(model) == (kind == "leaky")
    if kind == "causal":
        assert moved == {"earlier_logits_moved_most": 0.0, "earlier_logits_moved_mean": 0.0}
    else:
        assert moved["earlier_logits_moved_mean"] > 1e-5


def test_the_reported_model_has_the_published_count_and_leaks_and_per_token_it_does_not():
    models, measure = module("leak"), module("measure")
    config = config_of("causal").model.architecture()
    windows = Windows(RandomCharacters(400), 32)
    for name, parameters, leaks in (("reported-positions", 1_112_781, True), ("reported-token", 1_096_909, False)):
        model = models.MODELS[name](config)
        models.initialise_reported(model, 1)
        assert sum(parameter.numel() for parameter in model.parameters()) == parameters
        assert models.model_of({key: value.shape for key, value in model.named_parameters()}, config) is type(model)
        assert (measure.leak(model.eval(), windows)["earlier_logits_moved_most"] > 1e-4) == leaks
        tokens = torch.from_numpy(windows.read(np.arange(3)))
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        expected = torch.nn.functional.cross_entropy(model(inputs).transpose(1, 2), targets, reduction="none")
        torch.testing.assert_close(model(inputs, targets, reduction="none"), expected)
        torch.testing.assert_close(model(inputs, targets), expected.sum())


@given(batch=st.integers(1, 3), length=st.integers(1, 8), width=st.sampled_from([1, 4, 6]), seed=st.integers(0, 2**31))
def test_the_norm_over_positions_divides_a_whole_window_by_one_number(batch, length, width, seed):
    x = torch.randn(batch, length, width, generator=torch.Generator().manual_seed(seed))
    norm = module("leak").PositionsRMSNorm(8, width, 0.0)
    with torch.no_grad():
        norm.weight.copy_(torch.arange(8 * width))
    weight = torch.arange(8 * width).view(8, width)[:length]
    for row, normed in zip(x, norm(x), strict=True):
        rms = row.norm() / (length * width) ** 0.5
        torch.testing.assert_close(normed.detach(), row / rms * weight)


def test_the_causal_configuration_is_the_reported_setting():
    config = config_of("causal")
    model = config.model.architecture()
    assert (model.n_layer, model.n_head, model.n_embd, model.block_size) == (4, 8, 128, 32)
    assert (model.mlp, model.position, model.rope_base, model.norm) == ("swiglu", "rope", 10_000, "rmsnorm")
    assert parameter_count(model) == sum(parameter.numel() for parameter in GPT(model).parameters()) == 1_097_088
    windows = Windows(RandomCharacters(TRAINING_CHARACTERS), 32, config.data.stride)
    assert windows.count == 1_003_822  # a window at every character that has 32 more behind it
    batch = config.batch.tokens_per_step // 32
    assert batch == 64
    assert (config.run.max_steps - 1) * batch < windows.count <= config.run.max_steps * batch  # one epoch
    assert (config.optim.weight_decay, config.optim.grad_clip, model.dropout) == (0.01, 1.0, 0.0)
    course = plan_course(config.schedule, config.optim.lr, 15_685)
    rates = [course.rate(step) for step in (1, 7_843, 15_685)]
    assert rates == pytest.approx([3e-3, 2e-3, 1e-3], rel=1e-3)


def test_the_best_configuration_keeps_to_the_same_size_and_text():
    config = config_of("best")
    assert parameter_count(config.model.architecture()) <= 1_120_000
    assert config.run.max_steps * config.batch.tokens_per_step <= 15_685 * 2_048


def test_the_record_says_what_was_measured_and_names_no_machine():
    results = json.loads((STUDY / "results.json").read_text())["runs"]
    page = (STUDY / "README.md").read_text()
    for name, run in results.items():
        cells = f"| {name} | {run['parameters']:,} | {run['step']:,} of {run['of_steps']:,} | {run['loss']:.4f} "
        assert f"{cells}| {run['last_position_loss']:.4f} ± " in page
        folder = STUDY / "runs" / name
        assert json.loads((folder / "measured.json").read_text()).items() <= run.items()
        assert (folder / "metrics.jsonl").stat().st_size < 1_000_000
        assert '"host"' not in (folder / "provenance.json").read_text()


@pytest.mark.slow
def test_the_command_makes_a_record(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(random.Random(0).choices("to be or not that is the question\n", k=6_000)))
    where = ["--data", tmp_path / "data", "--runs", tmp_path / "runs", "--out", tmp_path / "out"]
    tiny = [
        "--model.n_layer=1",
        "--model.n_head=2",
        "--model.n_embd=16",
        "--model.mlp_hidden=16",
        "--run.max_steps=121",
    ]
    quick = ["--run.compile=false", "--run.dtype=fp32", "--eval.tokens=320", "--checkpoint.every_steps=0"]
    runs = ["--only", "causal-seed2", "--only", "reported-positions-seed1", "--only", "best"]
    command = [sys.executable, STUDY / "regenerate.py", "--file", text, *where, *runs, *tiny, *quick]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())["runs"]
    assert list(results) == ["best", "causal-seed2", "reported-positions-seed1"]
    assert [run["norm"] for run in results.values()] == ["token", "token", "positions"]
    assert [run["step"] for run in results.values()] == [121, 121, 121]
    assert [run["earlier_logits_moved_most"] > 0 for run in results.values()] == [False, False, True]
    for name, run in results.items():
        assert len(run["loss_by_position"]) == run["context"] == (128 if name == "best" else 32)
        folder = tmp_path / "out" / "runs" / name
        steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [record["step"] for record in steps if "loss" in record] == [*range(1, 101), 120, 121]
        assert run["validation_in_training"] == [step["val_loss"] for step in steps if "val_loss" in step][-1]
        assert f"| {name} | {run['parameters']:,} | 121 of 121 | {run['loss']:.4f} |" in done.stdout
        for kept in ("config.yaml", "provenance.json", "metrics.jsonl"):
            assert str(tmp_path) not in (folder / kept).read_text()
            assert '"host"' not in (folder / kept).read_text()
    for picture in ("curves.png", "positions.png", "bars.png"):
        assert (tmp_path / "out" / picture).read_bytes().startswith(b"\x89PNG")
