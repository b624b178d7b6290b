"""Where GPUs have gone nobody trains on a CPU that was not asked for."""

import json
from pathlib import Path

import pytest
import torch

from common.errors import UserError
from eval.shared.loading import device_for
from model.devices import choose_device
from model.ranks import Ranks
from tests.helpers.token_sets import make_token_set
from tests.helpers.training import losses, run_of, tiny_arguments, train, train_by_path
from train.startup.announce import describe_unused_gpus


def test_auto_is_no_cpu_in_a_job_that_was_given_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    words = r"PyTorch sees no GPU on \S+ that Slurm has given this job \(SLURM_GPUS_ON_NODE=8\): .*--run\.device cpu"
    with pytest.raises(UserError, match=words):
        choose_device("auto", 3, 8)
    with pytest.raises(UserError, match=words):
        device_for("auto")
    assert choose_device("cpu", 3, 8) == torch.device("cpu")
    (line,) = describe_unused_gpus(Ranks(0, 1, 0, 1, torch.device("cpu")))
    assert (
        line == "WARNING: on the CPU, as run.device says, though Slurm has given this job GPUs (SLURM_GPUS_ON_NODE=8)"
    )
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "0")
    assert choose_device("auto", 3, 8) == torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there are GPUs here")
def test_a_run_of_gpus_is_resumed_on_a_cpu_only_where_that_is_asked_for(tmp_path: Path) -> None:
    data = make_token_set(tmp_path / "data", train_tokens=5_000, val_tokens=500).folder
    arguments = tiny_arguments(tmp_path, data, "moved", "--schedule.kind=constant")
    train(1, tmp_path, [*arguments, "--run.max_steps=2"])
    run = run_of(tmp_path, "moved")
    starts = json.loads(run.provenance.read_text())
    starts["starts"][-1]["ranks"][0]["device"] = "cuda:0"  # as a start on a GPU records it
    run.provenance.write_text(json.dumps(starts))
    state = run.state.read_text()
    more = [*arguments, "--run.max_steps=4"]
    done = train_by_path(*more, "--run.device=auto")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {run.path} was trained on GPUs at its last start, and PyTorch sees none on ")
    assert "--run.device cpu" in line
    assert run.state.read_text() == state
    assert train_by_path(*more, "--run.device=cpu").returncode == 0
    assert max(losses(run)) == 4
    assert train_by_path(*more, "--run.device=auto", "--run.max_steps=5").returncode == 0  # its last start was this one
