"""`run.stream_dtype bf16` in whole runs."""

from pathlib import Path

import pytest

from tests.helpers.token_sets import make_token_set
from tests.helpers.training import losses, run_of, start_ranks_training, tiny_arguments, train


def test_a_run_with_a_stream_in_bf16_learns_and_resumes_to_the_bit(tmp_path: Path) -> None:
    data = tmp_path / "tokens"
    make_token_set(data, train_tokens=5_000, val_tokens=500)
    bf16 = ["--run.max_steps=8", "--run.dtype=bf16", "--schedule.kind=constant"]
    stream = [*bf16, "--run.stream_dtype=bf16"]
    train(1, tmp_path, tiny_arguments(tmp_path, data, "wide", *bf16))
    train(1, tmp_path, tiny_arguments(tmp_path, data, "whole", *stream))
    train(1, tmp_path, tiny_arguments(tmp_path, data, "cut", *stream, "--run.max_steps=4"))
    train(1, tmp_path, tiny_arguments(tmp_path, data, "cut", *stream))
    whole, wide = losses(run_of(tmp_path, "whole")), losses(run_of(tmp_path, "wide"))
    assert losses(run_of(tmp_path, "cut")) == whole
    assert whole != wide
    assert whole == pytest.approx(wide, rel=5e-3)
    assert whole[8] < whole[1]
    refused = tiny_arguments(tmp_path, data, "fp32", "--run.dtype=fp32", "--run.stream_dtype=bf16")
    assert start_ranks_training(1, tmp_path, refused).join() == [2]
