"""Loading takes no more memory than training does, and leaves nothing of the checkpoint behind."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.checkpoint_files import (
    list_checkpoints,
    read_checkpoint_manifest,
    verify_checkpoint,
    write_checkpoint_manifest,
)
from common.errors import UserError
from common.publish import sha256_file
from model.ranks import start_ranks
from model.weights import read_tensors, save_tensors
from tests.helpers.manifests import FACTS
from tests.helpers.token_sets import make_token_set
from tests.helpers.training import PROJECT, run_of, start_ranks_training, tiny_arguments, train
from train.checkpoints.reader import load_training_state
from train.checkpoints.writer import CheckpointWriter
from train.optimization.optimizer import build_optimizer
from train.progress import Progress
from train.settings.sections import OptimConfig

LOAD_AND_STEP = r"""
import json, re, sys
from pathlib import Path
import torch

from train.checkpoints.reader import load_training_state
from train.settings.sections import OptimConfig
from train.optimization.optimizer import build_optimizer

def peak():
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])

torch.set_num_threads(1)
small = torch.nn.Linear(8, 8)
small(torch.ones(1, 8)).sum().backward()  # the libraries' own memory
layers = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024) for _ in range(16)))  # 64 MiB
optimizer = build_optimizer(layers, OptimConfig())
start = peak()
progress = load_training_state(Path(sys.argv[1]), layers, optimizer)
loaded = peak()
maps = Path("/proc/self/maps").read_text()
layers(torch.ones(1, 1024)).sum().backward()
optimizer.step()
figures = {"step": progress.step, "load": loaded - start, "training": peak() - start, "mapped": ".safetensors" in maps}
json.dump(figures, sys.stdout)
"""


def trained(seed: int = 0, width: int = 1024, layers: int = 16) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(layers)))
    optimizer = build_optimizer(model, OptimConfig())
    for parameter in model.parameters():
        parameter.grad = torch.rand_like(parameter)
    optimizer.step()
    return model, optimizer


def test_loading_holds_one_tensor_more_than_the_state(tmp_path: Path) -> None:
    checkpoint = CheckpointWriter(tmp_path, start_ranks("cpu"), *trained()).save(Progress(3), FACTS)
    done = subprocess.run(
        [sys.executable, "-c", LOAD_AND_STEP, str(checkpoint)], cwd=PROJECT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["step"] == 3
    assert not figures["mapped"]
    # two moments of 64 MiB each and one tensor of 4 MiB; training needs the gradients as well
    assert figures["load"] < 144 * 2**20 < figures["training"], figures


@pytest.mark.parametrize("fused", [True, False])
def test_the_state_is_what_load_state_dict_would_have_made(tmp_path: Path, fused: bool) -> None:
    model, optimizer = trained(width=8, layers=2)
    checkpoint = CheckpointWriter(tmp_path, start_ranks("cpu"), model, optimizer).save(Progress(1), FACTS)
    others = []
    for way in ("ours", "torch's"):
        other, _ = trained(seed=1, width=8, layers=2)
        other_optimizer = build_optimizer(other, OptimConfig(fused=fused))
        if way == "ours":
            load_training_state(checkpoint, other, other_optimizer)
        else:
            other.load_state_dict(model.state_dict())
            groups = other_optimizer.state_dict()["param_groups"]
            other_optimizer.load_state_dict({"state": optimizer.state_dict()["state"], "param_groups": groups})
        for parameter in other.parameters():
            parameter.grad = torch.ones_like(parameter)
        other_optimizer.step()
        others.append((list(other.parameters()), other_optimizer.state_dict()["state"]))
    for ours, theirs in zip(others[0][0], others[1][0], strict=True):
        assert ours.equal(theirs)
    for index, state in others[1][1].items():
        for key, value in state.items():
            found = others[0][1][index][key]
            assert (found.dtype, found.device, found.shape) == (value.dtype, value.device, value.shape)
            assert found.equal(value)


def test_what_does_not_belong_is_named(tmp_path: Path) -> None:
    checkpoint = CheckpointWriter(tmp_path, start_ranks("cpu"), *trained(width=8, layers=2)).save(Progress(1), FACTS)
    for width, layers, message in (
        (8, 3, r"does not hold this model: missing \['2\.bias', '2\.weight'\]$"),
        (8, 1, r"does not hold this model: unknown \['1\.bias', '1\.weight'\]$"),
        (4, 2, r"does not hold this model: 0\..* has shape \(8,.* instead of \(4,"),
    ):
        with pytest.raises(UserError, match=message):
            load_training_state(checkpoint, *trained(width=width, layers=layers))
    manifest = read_checkpoint_manifest(checkpoint)
    kept = {name: entry for name, entry in manifest["files"].items() if not name.startswith("optimizer-")}
    write_checkpoint_manifest(checkpoint, {**manifest, "files": kept})
    with pytest.raises(UserError, match=r"has no optimizer state for 0\.bias"):
        load_training_state(checkpoint, *trained(width=8, layers=2))


def test_files_that_the_manifest_does_not_list_are_not_loaded(tmp_path: Path) -> None:
    """`cp -r` and `rsync` over an older copy of the same step, written by another number of ranks, leave its files."""
    model, optimizer = trained(width=8, layers=2)
    checkpoint = CheckpointWriter(tmp_path / "new", start_ranks("cpu"), model, optimizer).save(Progress(1), FACTS)
    older = trained(seed=1, width=8, layers=2)
    stale = CheckpointWriter(tmp_path / "old", start_ranks("cpu"), *older).save(Progress(1), FACTS)
    for path in stale.glob("*.safetensors"):
        path.rename(checkpoint / path.name.replace("-of-00001", "-of-00002"))
    verify_checkpoint(checkpoint)
    loaded, loaded_optimizer = trained(seed=2, width=8, layers=2)
    load_training_state(checkpoint, loaded, loaded_optimizer)
    for ours, theirs in zip(model.parameters(), loaded.parameters(), strict=True):
        assert ours.equal(theirs)
        assert optimizer.state[ours]["exp_avg"].equal(loaded_optimizer.state[theirs]["exp_avg"])


def rewrite(checkpoint: Path, kind: str, change: dict[str, torch.Tensor | None]) -> None:
    """Other tensors in a file of a checkpoint (None: not there), listed as they are."""
    path = checkpoint / f"{kind}-00000-of-00001.safetensors"
    known = {name: value.clone() for name, value in read_tensors([path]).items()}  # which maps the file
    tensors = {name: value for name, value in {**known, **change}.items() if value is not None}
    save_tensors(path, tensors)
    manifest = read_checkpoint_manifest(checkpoint)
    manifest["files"][path.name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    write_checkpoint_manifest(checkpoint, manifest)


NAN, MANY = torch.full((8,), float("nan")), torch.ones(8)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("optimizer", {"0.bias/exp_avg_sq": None}, "has no optimizer state for 0.bias/exp_avg_sq"),  # was a KeyError
        ("optimizer", {"0.bias/foo": MANY}, "has optimizer state 0.bias/foo, which"),
        ("optimizer", {"foo": MANY}, "has optimizer state foo, which"),  # was a ValueError
        ("optimizer", {"0.bias/step": MANY}, r"does not hold this model: 0.bias/step has shape \(8,\) instead of \(\)"),
        ("optimizer", {"0.bias/exp_avg": MANY.to(torch.int8)}, "holds 0.bias/exp_avg as I8"),
        ("optimizer", {"0.bias/exp_avg": NAN}, "holds values in 0.bias/exp_avg that training never"),
        ("optimizer", {"0.bias/exp_avg_sq": -MANY}, "holds values in 0.bias/exp_avg_sq that training never"),
        ("weights", {"0.bias": MANY.to(torch.bool)}, "holds 0.bias as BOOL"),
        ("weights", {"0.bias": NAN}, "holds values in 0.bias that training never"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else None,
)
def test_state_that_training_could_not_use_is_refused(
    tmp_path: Path, kind: str, change: dict[str, torch.Tensor | None], message: str
) -> None:
    checkpoint = CheckpointWriter(tmp_path, start_ranks("cpu"), *trained(width=8, layers=2)).save(Progress(1), FACTS)
    rewrite(checkpoint, kind, change)
    with pytest.raises(UserError, match=message) as error:
        load_training_state(checkpoint, *trained(width=8, layers=2))
    assert str(error.value).startswith(str(checkpoint))


def test_a_run_whose_checkpoint_is_another_models_is_left_as_it_is(tmp_path: Path) -> None:
    """It had been begun by then: its configuration was the new command's, its state `failed`."""
    make_token_set(tmp_path / "data", train_tokens=2_000, val_tokens=500)
    command = tiny_arguments(tmp_path, tmp_path / "data", "run", "--run.max_steps=5", "--schedule.kind=constant")
    train(1, tmp_path, command)
    run = run_of(tmp_path, "run")
    rewrite(list_checkpoints(run.checkpoints)[0][1], "optimizer", {"wte.weight/exp_avg": torch.ones(3)})
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    assert start_ranks_training(1, tmp_path, [*command, "--run.max_steps=6"]).join() == [2]
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before
