"""The benchmark runs whole on a tiny checkpoint, and its contestants write the same texts."""

import json
import sys

import pytest
import torch

from common.errors import UserError
from eval.benchmarks import bench_generate
from tests.eval.checkpoints import write_checkpoint


def test_contestants_write_the_same(tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    checkpoint = write_checkpoint(tmp_path, noise=0.3, position="rope", norm="rmsnorm", mlp="swiglu", bias=False)
    arguments = ["--run", checkpoint, "--batch", 1, 3, "--threads", 1, "--tokens", 12, "--json", tmp_path / "f.json"]
    monkeypatch.setattr(sys, "argv", ["bench", *map(str, arguments)])
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)  # of the test's own process
    assert bench_generate.main() == 0
    figures = json.loads((tmp_path / "f.json").read_text())["figures"]
    assert [figure["batch"] for figure in figures] == [1, 3]
    for figure in figures:
        assert figure["same_texts"] == 1.0
        speed = figure["tokens_per_second"]
        assert figure["times_transformers"] == speed["longhaul"] / speed["transformers"]
        assert figure["times_rerun"] == speed["longhaul"] / speed["rerun"]
    assert "transformers" in capsys.readouterr().out


def test_what_does_not_fit_is_refused(tmp_path, monkeypatch):
    checkpoint = write_checkpoint(tmp_path, block_size=16)
    monkeypatch.setattr(sys, "argv", ["bench", "--run", str(checkpoint), "--tokens", "10", "--prompt-tokens", "7"])
    with pytest.raises(UserError, match="16"):
        bench_generate.main()
