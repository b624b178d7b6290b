"""Runs that an earlier version began: read as they are, and resumed to the bit."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from common.checkpoint_files import find_checkpoint, read_checkpoint_manifest, verify_checkpoint
from common.errors import UserError
from common.metrics_file import read_metrics
from data_prep.token_sets.sequences import Windows
from data_prep.token_sets.token_set import TokenSet
from data_prep.tokenization.loading import load_tokenizer
from eval.reporting.run_data import load_run
from eval.shared.loading import load_checkpoint
from eval.shared.loss import evaluate_loss
from model.config import ModelConfig
from model.ranks import start_ranks
from tests.fixtures.make_runs import RUNS, figures, machine, resume
from train.checkpoints.resume import check_same_run

FORMAT_1 = Path(__file__).resolve().parents[1] / "fixtures" / "format_1"
EXPECTED, RESUMED = (json.loads((FORMAT_1 / f"{name}.json").read_text()) for name in ("expected", "resumed"))
STOPPED_AT = 7


def by_step(figures: dict[str, Any]) -> dict[int, Any]:
    """JSON's keys as steps."""
    return {int(step): value for step, value in figures.items()}


@pytest.mark.parametrize("name", RUNS)
def test_an_older_run_is_resumed(tmp_path: Path, name: str) -> None:
    """As the version that wrote it would have, but for the rounding of a step, which 0.2.0 changed.

    To the bit where no step of this version lies between: the first loss shows that weights, ids, order and dropout's
    random numbers were read as they were written. The rest to the bit as `make_runs.py --resumed` last found it, so
    that no change of rounding passes unnoticed.
    """
    run = resume(FORMAT_1, name, tmp_path)
    starts = [record["step"] for record in read_metrics(run.metrics) if record.get("kind") == "start"]
    assert starts == [0, STOPPED_AT]
    found, older, today = figures(run), EXPECTED["runs"][name], RESUMED["runs"][name]
    for key in ("lr", "sequences"):
        assert found[key] == by_step(older[key])
    for key in ("loss", "val_loss"):
        assert found[key] == pytest.approx(by_step(older[key]), rel=1e-5, abs=0)
    assert found["tensors"].keys() == older["tensors"].keys()
    if machine() == EXPECTED["machine"]:
        for step in range(1, STOPPED_AT + 2):
            assert found["loss"][step] == older["loss"][str(step)]
    if machine() == RESUMED["machine"]:
        for key in ("loss", "val_loss"):
            assert found[key] == by_step(today[key])
        assert found["tensors"] == today["tensors"]


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
    val, piece_bytes = Windows(tokens.split("val"), 16), load_tokenizer(tokens.tokenizer_spec).piece_bytes
    result = evaluate_loss(model, val, piece_bytes, start_ranks("cpu"), window_count=16, micro_batch=2, dtype="fp32")
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
    assert "seed" not in manifest["config"]["data"]
    seed = manifest["config"]["run"]["seed"]
    check_same_run(newest, now | {"data": now["data"] | {"seed": seed}}, identity, [], optimizer="adamw")
    with pytest.raises(UserError, match=r"was trained with data.seed null, this run has 9"):
        check_same_run(newest, now | {"data": now["data"] | {"seed": 9}}, identity, [], optimizer="adamw")
    other = now | {"model": now["model"] | {"rope_scaling": "linear", "rope_factor": 2.0}}
    with pytest.raises(UserError, match=r'was trained with model.rope_scaling "none"'):
        check_same_run(newest, other, identity, [], optimizer="adamw")
