"""Runs that an earlier version began: read as they are, and resumed to the bit."""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from common.checkpoint_files import find_checkpoint, read_checkpoint_manifest, verify_checkpoint
from common.errors import UserError
from common.metrics_file import read_metrics
from common.run_folder import RunFolder
from data_prep.token_sets.sequences import Windows
from data_prep.token_sets.token_set import TokenSet
from eval.reporting.run_data import load_run
from eval.shared.loading import load_checkpoint
from eval.shared.loss import evaluate_loss
from model.config import ModelConfig
from model.ranks import start_ranks
from tests.fixtures.make_runs import RUNS, SHARED_YAML, figures, machine, train_as_rank
from tests.helpers.ranks import RankGroup
from train.checkpoints.resume import check_same_run

FORMAT_1 = Path(__file__).resolve().parents[1] / "fixtures" / "format_1"
EXPECTED = json.loads((FORMAT_1 / "expected.json").read_text())
STOPPED_AT = 7


def by_step(figures: dict[str, Any]) -> dict[int, Any]:
    """JSON's keys as steps."""
    return {int(step): value for step, value in figures.items()}


def resume_in(folder: Path, command: list[str]) -> None:
    os.chdir(folder)
    train_as_rank(command)


@pytest.mark.parametrize("name", RUNS)
def test_an_older_run_is_resumed_to_the_bit(tmp_path: Path, name: str) -> None:
    shutil.copytree(FORMAT_1 / "tokens", tmp_path / "tokens")
    run = RunFolder(Path(shutil.copytree(FORMAT_1 / "runs" / name, tmp_path / "runs" / name)))
    world_size, text = RUNS[name]
    (tmp_path / f"{name}.yaml").write_text(text + SHARED_YAML)
    command = ["train/finetune.py", "calm/gpt2"] if name == "lora" else ["train/pretrain.py"]
    command += [f"--config={name}.yaml", "--data.path=tokens", "--run.root=runs", f"--run.name={name}"]
    group = RankGroup(world_size, tmp_path / "store", resume_in, tmp_path, command)
    assert group.join() == [0] * world_size
    starts = [record["step"] for record in read_metrics(run.metrics) if record.get("kind") == "start"]
    assert starts == [0, STOPPED_AT]
    found, expected = figures(run), EXPECTED["runs"][name]
    for key in ("lr", "sequences"):
        assert found[key] == by_step(expected[key])
    same = machine() == EXPECTED["machine"]
    for key in ("loss", "val_loss"):
        assert found[key] == pytest.approx(by_step(expected[key]), rel=0 if same else 1e-5, abs=0)
    assert found["tensors"].keys() == expected["tensors"].keys()
    if same:
        assert found["tensors"] == expected["tensors"]


@pytest.mark.parametrize("name", RUNS)
def test_older_checkpoints_are_evaluated(name: str) -> None:
    tokens = TokenSet.open(FORMAT_1 / "tokens", verify="full")
    run = FORMAT_1 / "runs" / name
    newest = find_checkpoint(run)
    assert newest.name == f"step-{STOPPED_AT:08d}"
    assert read_checkpoint_manifest(newest)["data_identity"] == tokens.identity
    weights = run / "checkpoints" / "weights-00000004"
    assert verify_checkpoint(weights)["weights_only"]
    model = load_checkpoint(weights, "cpu").model
    val = Windows(tokens.split("val"), 16)
    result = evaluate_loss(model, val, start_ranks("cpu"), window_count=16, micro_batch=2, dtype="fp32")
    expected = by_step(EXPECTED["runs"][name]["val_loss"])[4]
    assert result.loss == pytest.approx(expected, rel=1e-5)
    assert load_run(run).table.column("step")[-1] == STOPPED_AT


def test_what_an_older_checkpoint_does_not_name_has_its_default() -> None:
    """Options that came later: the checkpoint was trained without them."""
    newest = find_checkpoint(FORMAT_1 / "runs" / "llama")
    manifest = read_checkpoint_manifest(newest)
    model: dict[str, Any] = {**asdict(ModelConfig()), **manifest["config"]["model"]}
    now: dict[str, Any] = {**manifest["config"], "model": model}
    assert "rope_scaling" not in manifest["config"]["model"]
    identity = str(manifest["data_identity"])
    check_same_run(newest, now, identity, [], optimizer="adamw")
    other = now | {"model": now["model"] | {"rope_scaling": "linear", "rope_factor": 2.0}}
    with pytest.raises(UserError, match=r'was trained with model.rope_scaling "none"'):
        check_same_run(newest, other, identity, [], optimizer="adamw")
