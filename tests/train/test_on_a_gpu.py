"""The trainer on a GPU: it learns what the CPU learns, is resumed to the bit, saves what a CPU reads, and stops."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.token_sets import make_token_set
from tests.helpers.training import PROJECT, curve, losses, run_of, tiny_arguments, train_by_path, weights_hashes
from tests.model.small import small_model
from train.benchmarks.campaign.trainers import trainers
from train.checkpoints.ownership import optimizer_tensors
from train.optimization.optimizer import build_optimizer
from train.settings.sections import OptimConfig

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
EXACT = "--run.deterministic=true"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_token_set(tmp_path_factory.mktemp("data") / "set").folder


def run(folder: Path, data: Path, name: str, *options: str) -> None:
    done = train_by_path(*tiny_arguments(folder, data, name, f"--run.device={DEVICE}", *options))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("compiled", "documents"), [("true", "true"), ("false", "false")])
def test_it_learns_what_the_cpu_learns(tmp_path: Path, data: Path, compiled: str, documents: str) -> None:
    options = [f"--run.compile={compiled}", EXACT, "--model.dropout=0", f"--data.document_mask={documents}"]
    run(tmp_path, data, "gpu", *options)
    run(tmp_path, data, "cpu", *options, "--run.device=cpu", "--run.compile=false")
    theirs = losses(run_of(tmp_path, "cpu"))
    assert losses(run_of(tmp_path, "gpu")) == pytest.approx(theirs, rel=1e-3)
    assert theirs[20] < theirs[1] - 0.1


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_it_is_resumed_to_the_bit(tmp_path: Path, data: Path, kind: str) -> None:
    options = [
        f"--optim.kind={kind}",
        "--run.compile=true",
        EXACT,
        "--schedule.kind=constant",
        "--checkpoint.every_steps=10",
    ]
    run(tmp_path, data, "calm", *options)
    run(tmp_path, data, "halved", *options, "--run.max_steps=10")
    run(tmp_path, data, "halved", *options)
    calm, halved = run_of(tmp_path, "calm"), run_of(tmp_path, "halved")
    assert [row for row in curve(halved) if row[1] != "None"] == [row for row in curve(calm) if row[1] != "None"]
    last = "step-00000020"
    assert weights_hashes(halved.checkpoints / last) == weights_hashes(calm.checkpoints / last)


def test_muon_updates_as_on_a_cpu_and_skips_without_the_host(tmp_path: Path) -> None:
    """In bfloat16; a refused step with NaN in a gradient leaves every bit as it was."""
    updated = []
    for device in ("cpu", DEVICE):
        model = small_model(n_kv_head=2).to(device)
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        optimizer = build_optimizer(model, OptimConfig(kind="muon", lr=0.01))
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(device)
            optimizer.found_inf = torch.tensor(float(step == 2), device=device)  # type: ignore[attr-defined]
            if step == 2:
                kept = dict(model.named_parameters()) | optimizer_tensors(model, optimizer)
                bits = {name: tensor.detach().clone() for name, tensor in kept.items()}
                for parameter in model.parameters():
                    assert parameter.grad is not None
                    parameter.grad[0] = math.nan
            optimizer.step()
        assert all(tensor.equal(bits[name]) for name, tensor in kept.items())
        updated.append({name: (p.detach() - before[name]).cpu() for name, p in model.named_parameters()})
    for name, change in updated[0].items():
        assert (updated[1][name] - change).norm() <= 5e-2 * change.norm(), name


def test_a_cpu_reads_what_it_saved(tmp_path: Path, data: Path) -> None:
    run(tmp_path, data, "saved", "--schedule.kind=constant")
    found = []
    for device in (DEVICE, "cpu"):
        file = tmp_path / f"{device}-perplexity.json"
        command = [sys.executable, str(PROJECT / "eval" / "perplexity.py"), str(run_of(tmp_path, "saved").path)]
        command += [f"--data={data}", f"--device={device}", "--dtype=fp32", f"--json={file}"]
        subprocess.run(command, check=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"})
        found.append(json.loads(file.read_text(encoding="utf-8"))["loss"]["value"])
    assert found[0] == pytest.approx(found[1], rel=1e-3)
    run(tmp_path, data, "saved", "--schedule.kind=constant", "--run.max_steps=24", "--run.device=cpu")
    assert len(losses(run_of(tmp_path, "saved"))) == 24


def test_a_signal_stops_it_after_a_step_and_nothing_is_lost(tmp_path: Path, data: Path) -> None:
    steps = ("--run.max_steps=400", "--checkpoint.every_steps=0", "--eval.every_steps=0", EXACT)
    options = tiny_arguments(tmp_path, data, "stopped", f"--run.device={DEVICE}", *steps)
    run(tmp_path, data, "calm", *steps)
    with trainers(tmp_path, data, tiny=False) as started:
        trainer = started.start("stopped", *options, OMP_NUM_THREADS="1")
        assert trainer.wait_until(trainer.has_step), trainer.printed()
        trainer.send(signal.SIGTERM)
        assert trainer.wait() == [0], trainer.printed()
    stopped = run_of(tmp_path, "stopped")
    assert (stopped.read_state() or {})["status"] == "preempted"
    assert len(losses(stopped)) < 400
    run(tmp_path, data, "stopped", *steps)
    assert losses(stopped) == losses(run_of(tmp_path, "calm"))
