"""Runs over whole documents: the same for any ranks and interruptions, each document as if it stood alone."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from common.errors import UserError
from common.metrics_file import read_metrics
from common.run_folder import RunFolder
from data_prep.token_sets.packing import FORMAT_VERSION, Framing, PackedSequences, make_plan
from data_prep.token_sets.token_set import TokenSet
from data_prep.tokenization.tokenizer import CharTokenizer
from model.config import ModelConfig
from model.gpt import GPT
from model.initialisation import initialise
from model.ranks import Ranks
from tests.helpers.token_sets import make_token_set
from tests.helpers.training import curve, run_of, tiny_arguments, train, train_by_path
from train.batches.training_sequences import prepare_packing, training_sequences
from train.startup.announce import describe_packing

ALONE = Ranks(0, 1, 0, 1, torch.device("cpu"))
PACKING: dict[str, Any] = {"stride": None, "packed": True, "mask_documents": True}
PACKED = "--data.packing=whole_documents"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_token_set(folder, train_tokens=6_000)
    return folder


def steps(run: RunFolder) -> list[dict[str, float]]:
    return [record for record in read_metrics(run.metrics) if "grad_norm" in record]


def test_any_ranks_and_interruptions_train_on_the_same_documents(tmp_path: Path, data: Path) -> None:
    options = (PACKED, "--model.dropout=0", "--schedule.kind=constant", "--run.max_steps=12")  # an epoch
    train(1, tmp_path, tiny_arguments(tmp_path, data, "one", *options))
    train(2, tmp_path, tiny_arguments(tmp_path, data, "two", *options))
    train(2, tmp_path, tiny_arguments(tmp_path, data, "cut", *options, "--run.max_steps=5"))
    train(2, tmp_path, tiny_arguments(tmp_path, data, "cut", *options))
    one, two = run_of(tmp_path, "one"), run_of(tmp_path, "two")
    assert [row for row in curve(run_of(tmp_path, "cut")) if row[-1] != "None"] == [
        row for row in curve(two) if row[-1] != "None"
    ]
    assert [row["sequences"] for row in steps(one)] == [row["sequences"] for row in steps(two)]
    np.testing.assert_allclose([s["loss"] for s in steps(one)], [s["loss"] for s in steps(two)], atol=1e-5)
    (plan,) = data.glob("packing-*")
    packed = PackedSequences.read(TokenSet.open(data).split("train"), plan)
    for record in steps(two):
        assert record["target_tokens"] == packed.target_count(np.array(record["sequences"]))
    assert min(record["target_tokens"] for record in steps(two)) < 512

    # both packings are validated on the same sequences, and the mask gives a second figure
    train(1, tmp_path, tiny_arguments(tmp_path, data, "stream", "--run.max_steps=5", "--eval.masked_loss=true"))
    measured = [
        [r for r in read_metrics(run_of(tmp_path, name).metrics) if "val_loss" in r] for name in ("one", "stream")
    ]
    for key in ("val_sha256", "val_tokens", "val_document_mask"):
        assert measured[0][0][key] == measured[1][0][key]
    assert measured[0][0]["val_document_mask"] is False
    assert all(record["val_loss_masked"] != record["val_loss"] for record in (*measured[0], *measured[1]))
    assert yaml.safe_load(one.config.read_text())["data"]["document_mask"] is True
    assert f"packing: {packed.facts.pieces:,} pieces" in one.log.read_text()


@pytest.mark.parametrize("change", [{}, {"window": 3}, {"attention": "differential"}])
def test_a_document_s_loss_is_that_which_it_has_alone(data: Path, tmp_path: Path, change: dict[str, object]) -> None:
    tokens = TokenSet.open(data)
    prepare_packing(tokens, 200, ALONE)
    sequences = training_sequences(tokens, 200, **PACKING)
    rows = sequences.rows(np.arange(min(3, sequences.count)))
    assert rows.document_ids is not None
    shape = {"vocab_size": 257, "block_size": 200, "n_layer": 2, "n_head": 2, "n_embd": 32, "position": "rope"}
    model = GPT(ModelConfig(**(shape | change))).eval()  # type: ignore[arg-type]
    initialise(model, 1)
    inputs, targets, ids = (torch.from_numpy(part) for part in (rows.inputs, rows.targets, rows.document_ids))
    together = model(inputs, targets, document_ids=ids).item()
    apart, count = 0.0, 0
    for row in range(len(inputs)):
        for number in ids[row].unique():
            here = (ids[row] == number) & (targets[row] >= 0)
            if here.any():
                apart += model(inputs[row, here][None], targets[row, here][None]).item()
                count += int(here.sum())
    assert count == sequences.target_count(np.arange(len(inputs)))
    assert together == pytest.approx(apart, rel=1e-5)


class Stream:
    """Documents of these lengths in memory, each after its mark; one of them has other tokens."""

    def __init__(self, lengths: list[int], changed: int | None = None) -> None:
        shift = [7 if number == changed else 0 for number in range(len(lengths))]
        texts = [[256, *((np.arange(n - 1) * 3 + 5 * n + s) % 200)] for n, s in zip(lengths, shift, strict=True)]
        self._tokens = np.concatenate(texts).astype(np.uint16)

    def __len__(self) -> int:
        return len(self._tokens)

    def read(self, start: int, stop: int) -> Any:
        return self._tokens[start:stop]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")  # the CPU's form is meant
@pytest.mark.parametrize("flex", [False, True])
@pytest.mark.parametrize("change", [{}, {"window": 5}, {"attention": "differential"}], ids=str)
def test_changing_a_document_moves_no_logit_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flex: bool, change: dict[str, object]
) -> None:
    monkeypatch.setattr("model.gpt.flex_works", lambda *_: flex)
    length, lengths = 64, [63, 64, 65, 129, 20, 9, 30, 5]  # T-1, T, T+1, 2T+1, short ones
    shape = {"vocab_size": 257, "block_size": length, "n_layer": 2, "n_head": 2, "n_embd": 32}
    model = GPT(ModelConfig(**(shape | change))).eval()  # type: ignore[arg-type]
    initialise(model, 1)

    def logits(changed: int | None) -> tuple[Any, Any, Any]:
        stream = Stream(lengths, changed)
        make_plan(stream, Framing(256, False), length, tmp_path / str(changed), data_identity="ab" * 32)
        packed = PackedSequences.read(stream, tmp_path / str(changed))
        rows = packed.rows(np.arange(packed.count))
        assert rows.document_ids is not None
        inputs, ids = torch.from_numpy(rows.inputs), torch.from_numpy(rows.document_ids)
        with torch.no_grad():
            return inputs, ids, model(inputs, document_ids=ids)[..., :257]

    inputs, ids, before = logits(None)
    for number in range(len(lengths)):
        other, same, after = logits(number)
        assert torch.equal(same, ids)
        own = torch.zeros_like(ids, dtype=torch.bool)  # where its pieces are
        for row, place in (other != inputs).nonzero().tolist():
            own[row] |= ids[row] == ids[row, place]
        assert own.sum() >= min(lengths[number], length) - 1
        assert (after - before)[own].abs().max() > 1e-3
        torch.testing.assert_close(after[~own], before[~own], rtol=0, atol=1e-6)


def test_much_padding_is_warned_of(tmp_path: Path) -> None:
    for lengths, words in (([64] * 5 + [60], "packing: 6 pieces"), ([40] * 5, "WARNING: packing: 5 pieces")):
        stream, folder = Stream(lengths), tmp_path / str(len(lengths))
        facts = make_plan(stream, Framing(256, False), 64, folder, data_identity="ab" * 32)
        assert facts.targets + facts.padding == 64 * facts.sequences
        (line,) = describe_packing(PackedSequences.read(stream, folder))
        assert line.startswith(words) and f"{facts.padding / (64 * facts.sequences):.2%}" in line


def test_a_plan_of_another_length_is_not_taken(tmp_path: Path) -> None:
    tokens = make_token_set(tmp_path, train_tokens=3_000)
    for length in (16, 24):
        prepare_packing(tokens, length, ALONE)
    assert [training_sequences(tokens, length, **PACKING).block_size for length in (16, 24)] == [16, 24]
    there, others = (tmp_path / f"packing-{FORMAT_VERSION}-{length}-{tokens.identity[:16]}" for length in (16, 24))
    shutil.rmtree(there)
    shutil.copytree(others, there)  # by hand, under the name of this length's
    with pytest.raises(UserError, match="is for sequences of 24 tokens, not 16: delete the folder"):
        training_sequences(tokens, 16, **PACKING)


def test_a_set_that_can_t_be_written_to_has_its_plan_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = make_token_set(tmp_path / "data", train_tokens=3_000)
    monkeypatch.setenv("LONGHAUL_CACHE", str(tmp_path / "cache"))
    beside = tokens.folder / f"packing-1-16-{tokens.identity[:16]}"
    beside.write_text("a file is where the plan would be")
    prepare_packing(tokens, 16, ALONE)
    (plan,) = (tmp_path / "cache" / "packing").iterdir()
    made = (plan / "plan.json").stat().st_mtime_ns
    prepare_packing(tokens, 16, ALONE)
    assert (plan / "plan.json").stat().st_mtime_ns == made
    assert training_sequences(tokens, 16, **PACKING).count > 0


def test_what_can_t_be_packed_is_one_line(tmp_path: Path, data: Path) -> None:
    train(1, tmp_path, tiny_arguments(tmp_path, data, "kept", PACKED, "--run.max_steps=5"))
    make_token_set(tmp_path / "chars", train_tokens=1_000, val_tokens=100, tokenizer=CharTokenizer("abcdefgh"))
    for options, words in (
        ((PACKED, "--data.stride=8"), "data.packing whole_documents overlaps nothing: use null"),
        ((f"--data.path={tmp_path / 'chars'}", PACKED, "--run.name=chars"), "has no end-of-text token"),
        (("--run.max_steps=10",), 'trained with data.packing "whole_documents", this run has "stream": put it back'),
    ):
        done = train_by_path(*tiny_arguments(tmp_path, data, "kept", *options))
        assert done.returncode == 2, done.stderr
        (line,) = done.stderr.splitlines()
        assert words in line
