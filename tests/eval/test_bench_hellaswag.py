"""The benchmark's two contestants answer alike, and its figures are whole."""

import json
import sys
from pathlib import Path

import pytest

from eval.benchmarks.bench_hellaswag import main
from tests.eval.checkpoints import write_checkpoint
from tests.eval.hellaswag_files import official_rows, write_official


def test_both_give_the_same_answers_and_less_work_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = write_checkpoint(tmp_path / "run", noise=0.3, block_size=400)
    data = write_official(tmp_path / "official.jsonl", official_rows(12))
    arguments = ["--run", str(checkpoint), "--data", str(data), "--limit", "9", "--turns", "1"]
    monkeypatch.setattr(sys, "argv", ["bench_hellaswag.py", *arguments, "--json", str(tmp_path / "out.json")])
    assert main() == 0
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["examples"] == 9
    assert report["same_predictions"] == 1.0
    assert report["largest_difference_nats"] < 1e-3
    assert report["flop_ratio"] > 1.3
    assert min(report["examples_per_second"].values()) > 0
