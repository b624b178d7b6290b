"""The mean of a run's last checkpoints: its values, its origin, every command that reads it, and what is refused."""

import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from common.checkpoint_files import find_checkpoint, read_checkpoint_manifest, verify_checkpoint, weights_identity
from common.errors import UserError
from common.run_folder import RunFolder
from eval import average, export_hf, generate, hellaswag, perplexity
from model.weights import load_model
from tests.eval.checkpoints import write_checkpoint
from tests.eval.hellaswag_files import official_rows, write_official
from tests.helpers.token_sets import make_token_set
from train.checkpoints.resume import choose_checkpoint
from train.checkpoints.retention import keep_weights

STEPS = (5, 10, 15, 20)
SHAPE = {"block_size": 160, "noise": 0.2}


def command(module: ModuleType, *arguments: object) -> None:
    sys.argv = ["command", *map(str, arguments)]
    assert module.main() == 0


def weights_of(checkpoint: Path) -> dict[str, np.ndarray]:
    return {name: value.detach().numpy() for name, value in load_model(checkpoint).named_parameters()}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with four checkpoints; of the second only the weights are left."""
    checkpoints = tmp_path / "run" / "checkpoints"
    for step in STEPS:
        path = write_checkpoint(checkpoints, step=step, seed=step, **SHAPE)
        if step in STEPS[1:3]:
            keep_weights(path, step)
        if step == STEPS[1]:
            shutil.rmtree(path)
    return tmp_path / "run"


def test_the_mean_is_the_mean_and_every_evaluation_reads_it(run: Path, tmp_path: Path) -> None:
    command(average, run, "--last", 3, "--json", tmp_path / "origin.json")
    mean = run / "checkpoints" / "average-00000020-last-3"

    chosen = [run / "checkpoints" / name for name in ("weights-00000010", "step-00000015", "step-00000020")]
    parts, found = [weights_of(path) for path in chosen], weights_of(mean)
    for name, value in found.items():
        expected = (sum(part[name].astype(np.float64) for part in parts) / 3).astype(np.float32)
        assert value.tobytes() == expected.tobytes(), name
    manifest = verify_checkpoint(mean)
    assert (manifest["step"], manifest["tokens"], manifest["weights_only"]) == (20, 20_000, True)
    origin = json.loads((tmp_path / "origin.json").read_text())
    assert origin == {"checkpoint": str(mean), **manifest["average"]}
    assert manifest["average"] == {
        "kind": "mean",
        "run": str(run),
        "of": [
            {"checkpoint": path.name, "step": step, "sha256": weights_identity(read_checkpoint_manifest(path))}
            for path, step in zip(chosen, STEPS[1:], strict=True)
        ],
    }
    # it is nobody's newest checkpoint, and training can start from it only anew
    assert find_checkpoint(run).name == "step-00000020"
    assert choose_checkpoint(str(mean), RunFolder(tmp_path / "another"))[0] == mean

    make_token_set(tmp_path / "data", train_tokens=5_000, val_tokens=1_000)
    write_official(tmp_path / "questions.jsonl", official_rows(2, words_at_most=6))
    out, on_cpu = tmp_path / "figures.json", ("--device=cpu", f"--json={tmp_path / 'figures.json'}")
    for module, *arguments in (
        (perplexity, mean, f"--data={tmp_path / 'data'}", *on_cpu),
        (hellaswag, mean, f"--data={tmp_path / 'questions.jsonl'}", *on_cpu),
        (generate, mean, "--prompt=a", "--max-tokens=2", *on_cpu),
        (export_hf, mean, tmp_path / "exported", f"--json={out}"),
    ):
        command(module, *arguments)
        figures = json.loads(out.read_text())
        assert figures["weights"] == "mean of the checkpoints of steps 10, 15, 20", module
        assert figures["checkpoint"] == str(mean)
        out.unlink()
    assert "mean of the checkpoints" in (tmp_path / "exported" / "README.md").read_text()


def test_a_damaged_one_is_passed_over_and_too_few_are_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = next((run / "checkpoints" / "step-00000020").glob("weights-*"))
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)

    command(average, run, "--last", 3, "--out", tmp_path / "mean")
    steps = [one["step"] for one in read_checkpoint_manifest(tmp_path / "mean")["average"]["of"]]
    assert steps == [5, 10, 15]
    assert "passed over" in capsys.readouterr().err

    for arguments, words in (
        ((run, "--last", 4), "has 3 whole checkpoints"),
        ((run, "--last", 3, "--out", tmp_path / "mean"), "is already there"),
        ((run / "checkpoints" / "step-00000015", "--last", 2), "is one checkpoint"),
    ):
        with pytest.raises(UserError, match=words):
            command(average, *arguments)
    assert not list((run / "checkpoints").glob("*average*"))


def test_models_of_two_shapes_have_no_mean(run: Path) -> None:
    write_checkpoint(run / "checkpoints", step=25, **SHAPE | {"n_layer": 1})
    with pytest.raises(UserError, match=r"model\.n_layer 2, step-00000025 1"):
        command(average, run, "--last", 3)
    assert not list((run / "checkpoints").glob("*average*"))
