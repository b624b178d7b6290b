"""The loader over much data: few files opened, little memory, attention inside documents."""

import itertools
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from common.metrics_file import read_metrics
from data_prep.token_sets.manifest import Manifest, Shard
from data_prep.token_sets.sequences import Windows, document_ids
from data_prep.token_sets.token_set import TokenSet
from data_prep.tokenization.tokenizer import ByteTokenizer
from model.config import ModelConfig
from model.gpt import GPT
from model.initialisation import initialise
from tests.helpers.ranks import run_ranks
from tests.helpers.token_sets import make_token_set
from tests.helpers.training import PROJECT, losses, run_of, tiny_arguments, train, train_by_path
from train.batches.loader import StepLoader
from train.batches.plan import BatchPlan


def count_opens(folder: Path) -> tuple[int, int]:
    """Shards opened before the first step, and then while 1,000 steps are read."""
    opened: list[str] = []

    def note(event: str, values: tuple[object, ...]) -> None:
        if event == "open" and str(values[0]).endswith(".bin"):
            opened.append(str(values[0]))

    sys.addaudithook(note)
    tokens = TokenSet.open(folder)
    loader = StepLoader(Windows(tokens.split("train"), 16), BatchPlan(8, 8, 1, 1), rank=0, seed=0)
    before = len(opened)
    for step in range(1000):
        loader.step_at(step * 8)
    return before, len(opened) - before


def test_few_files_are_opened(tmp_path: Path) -> None:
    data = tmp_path / "data"
    make_token_set(data, train_tokens=8_000, val_tokens=100, shard_tokens=400)
    assert run_ranks(1, tmp_path / "store", count_opens, data) == [(20, 0)]


def grow_by_reading(folder: Path, block: int) -> tuple[int, int]:
    """Bytes read, and by how many this process grew at most meanwhile."""
    windows = Windows(TokenSet.open(folder).split("train"), block)
    loader = StepLoader(windows, BatchPlan(8, 8, 1, 1), rank=0, seed=0)
    process = psutil.Process()
    loader.step_at(0)
    start = process.memory_info().rss
    most = read = 0
    for step in range(windows.count // 8):
        read += loader.step_at(step * 8).tokens.numel() * 2
        most = max(most, process.memory_info().rss - start)
    return read, most


@pytest.mark.slow
def test_reading_two_gigabytes_takes_little_memory(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    tokenizer = ByteTokenizer()
    shards = []
    for index in range(4):  # files of zeros that take no disk
        name = f"train-{index:05d}.bin"
        with open(data / name, "wb") as file:
            file.truncate(1 << 29)
        shards.append(Shard(name, 1 << 28, 0, 1 << 29, "0" * 64))
    Manifest("uint16", tokenizer.spec, {"name": "zeros"}, {}, {"train": tuple(shards), "val": ()}, "0" * 64).write(data)
    ((read, grown),) = run_ranks(1, tmp_path / "store", grow_by_reading, data, 65_536)
    assert read > 2_000_000_000
    assert grown < 300 << 20, f"grew by {grown >> 20} MiB"


def test_full_verification_names_the_shard_that_changed(tmp_path: Path) -> None:
    data = tmp_path / "data"
    make_token_set(data, train_tokens=5_000, val_tokens=500, shard_tokens=2_000)
    shard = data / "train-00001.bin"
    content = bytearray(shard.read_bytes())
    content[7] ^= 1
    shard.write_bytes(content)
    done = train_by_path(*tiny_arguments(tmp_path, data, "verified", "--data.verify=full"))
    assert done.returncode == 2
    assert "train-00001.bin is not what was written" in done.stderr.splitlines()[-1]
    shard.unlink()
    done = train_by_path(*tiny_arguments(tmp_path, data, "verified"))
    assert done.returncode == 2
    assert "train-00001.bin is missing" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_ids_that_the_vocabulary_lacks_end_the_run_with_the_shard_s_name(tmp_path: Path) -> None:
    """Damage that leaves a shard's size alone: on a GPU such an id is an error of the device, without a place."""
    data = tmp_path / "data"
    make_token_set(data, train_tokens=5_000, val_tokens=500, shard_tokens=2_000)
    (data / "train-00001.bin").write_bytes(b"\xff" * 4_000)
    done = train_by_path(*tiny_arguments(tmp_path, data, "damaged"))
    assert done.returncode == 2
    assert "train-00001.bin holds the token id 65,535, outside the vocabulary of 257" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_document_ids_count_the_ends_of_texts() -> None:
    tokens = np.array([[5, 6, 9, 7, 9, 9, 8], [9, 1, 2, 3, 4, 5, 6]])
    assert document_ids(tokens, 9).tolist() == [[0, 0, 1, 1, 2, 3, 3], [1, 1, 1, 1, 1, 1, 1]]


@pytest.mark.parametrize("position", ["learned", "rope"])
def test_with_a_document_mask_documents_are_as_if_run_apart(tmp_path: Path, position: str) -> None:
    data = tmp_path / "data"
    made = make_token_set(data, train_tokens=5_000, val_tokens=500)
    more = ("--run.max_steps=1", "--eval.tokens=480", f"--model.position={position}")
    train(2, tmp_path, tiny_arguments(tmp_path, data, "masked", *more, "--data.document_mask=true"))
    train(1, tmp_path, tiny_arguments(tmp_path, data, "unmasked", *more))
    model = GPT(ModelConfig(vocab_size=257, block_size=16, n_layer=2, n_head=2, n_embd=32, position=position))  # type: ignore[arg-type]
    initialise(model, seed=1337)
    total, count = 0.0, 0
    for window in Windows(made.split("val"), 16).read(np.arange(30)):
        starts = [0, *np.flatnonzero(window[:-1] == 256).tolist(), 16]
        for start, stop in itertools.pairwise(starts):
            if stop > start:
                part = torch.from_numpy(window[start : stop + 1]).unsqueeze(0)
                with torch.no_grad():
                    total += model.eval()(part[:, :-1], part[:, 1:]).item()
                count += stop - start
    assert count == 480
    first = {name: read_metrics(run_of(tmp_path, name).metrics)[1]["val_loss"] for name in ("masked", "unmasked")}
    assert first["masked"] == pytest.approx(total / count, abs=1e-6)
    assert first["unmasked"] != pytest.approx(total / count, abs=1e-6)
    trained = [losses(run_of(tmp_path, name))[1] for name in ("masked", "unmasked")]
    assert trained[0] != trained[1]


def test_documents_need_a_mark_between_them(tmp_path: Path) -> None:
    from data_prep.tokenization.tokenizer import CharTokenizer

    data = tmp_path / "data"
    make_token_set(data, train_tokens=5_000, val_tokens=500, tokenizer=CharTokenizer("abcdefgh"))
    done = train_by_path(*tiny_arguments(tmp_path, data, "unmarked", "--data.document_mask=true"))
    assert done.returncode == 2
    assert "has no end-of-text token" in done.stderr
    shutil.rmtree(data)


@pytest.mark.parametrize("wrong", [("--tokens=64",), ("--ranks", "0"), ("--block-size=0",)])
def test_the_benchmark_refuses_what_it_cannot_measure(wrong: tuple[str, ...]) -> None:
    command = [sys.executable, str(PROJECT / "train" / "benchmarks" / "bench_loader.py"), "--block-size=64", *wrong]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "error: " in done.stderr.splitlines()[-1]
