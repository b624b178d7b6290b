"""Perplexity against a plain reading of its definition, and over ranks, micro-batches and strides."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.errors import UserError
from common.metrics_file import read_metrics
from data_prep.token_sets.documents import conversations_of
from data_prep.token_sets.manifest import COUNTED
from data_prep.token_sets.token_set import TokenSet
from eval.hugging_face.export import export
from eval.perplexity import main
from eval.perplexity_task.measure import measure, ratio
from eval.shared.loading import evaluation_dtype, load_checkpoint
from model.ranks import start_ranks
from tests.eval.checkpoints import write_checkpoint
from tests.helpers.conversation_sets import make_conversation_set
from tests.helpers.ranks import run_ranks
from tests.helpers.token_sets import make_token_set
from tests.helpers.training import PROJECT, run_of, tiny_arguments, train

LENGTH, TARGETS = 16, 16 * 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A token set and a checkpoint of a model for it."""
    path = tmp_path_factory.mktemp("perplexity")
    make_token_set(path / "data", train_tokens=5_000, val_tokens=TARGETS + 6)
    write_checkpoint(path / "run", block_size=LENGTH, noise=0.2)
    return path


@torch.no_grad()
def textbook(model, tokens: list[int], stride: int) -> list[float]:
    """Loss of each target, one after the other: the last window that begins before it and counts it for the first
    time, the whole window through the model, one logarithm."""
    losses: list[float] = []
    start = 0
    while len(losses) < TARGETS:
        start = min(start, TARGETS - LENGTH)
        logits = model(torch.tensor([tokens[start : start + LENGTH]]))[0, :, : model.config.vocab_size].double()
        table = logits.log_softmax(dim=-1)
        losses += [-float(table[t - start, tokens[t + 1]]) for t in range(len(losses), start + LENGTH)]
        start += stride
    return losses


@pytest.mark.parametrize("stride", [LENGTH, 5, 1])
def test_each_target_counts_once_with_the_textbooks_loss(folder: Path, stride: int) -> None:
    tokens = TokenSet.open(folder / "data").split("val")
    loaded = load_checkpoint(folder / "run" / "step-00000007")
    ids = tokens.read(0, len(tokens)).tolist()
    expected = np.array(textbook(loaded.model, ids, stride))
    piece_bytes = loaded.tokenizer.piece_bytes
    for micro_batch in (1, 3, 8):
        blocks = measure(
            loaded.model,
            tokens,
            piece_bytes,
            start_ranks("cpu"),
            targets=TARGETS,
            stride=stride,
            micro_batch=micro_batch,
        )
        assert blocks.targets.tolist() == [LENGTH] * (TARGETS // LENGTH)
        assert blocks.losses == pytest.approx(expected.reshape(-1, LENGTH).sum(axis=1), rel=1e-6)
        # of the byte tokenizer each id is a byte of text, but the end of a text, which is none
        assert blocks.bytes.sum() == TARGETS - ids[1 : TARGETS + 1].count(256)
        assert blocks.bits_per_byte().value == pytest.approx(expected.sum() / math.log(2) / blocks.bytes.sum())
        means = expected.reshape(-1, LENGTH).mean(axis=1)
        assert blocks.loss().standard_error == pytest.approx(means.std(ddof=1) / math.sqrt(len(means)))
        assert blocks.perplexity().value == pytest.approx(math.exp(expected.mean()))


def test_the_standard_error_is_the_spread_over_repetitions() -> None:
    generator = np.random.default_rng(0)
    values: list[float] = []
    errors: list[float] = []
    for _ in range(400):
        sizes = generator.integers(5, 15, size=60).astype(float)
        sums = np.array([generator.normal(2.0, 1.0, size=int(n)).sum() for n in sizes])
        found = ratio(sums, sizes)
        assert found.standard_error is not None
        values.append(found.value)
        errors.append(found.standard_error)
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.1)
    assert ratio(np.array([3.0]), np.array([2.0])).standard_error is None


def perplexity_of(folder: Path, out: Path, *more: str) -> None:
    """The script in this process."""
    checkpoint = folder / "run" / "step-00000007"
    sys.argv = ["perplexity.py", str(checkpoint), f"--data={folder / 'data'}", "--device=cpu", f"--json={out}", *more]
    assert main() == 0


def test_a_loss_that_is_no_number_is_an_error_and_one_beyond_exp_has_no_perplexity(
    folder: Path, tmp_path: Path
) -> None:
    options = {"block_size": LENGTH, "step": 7}
    write_checkpoint(tmp_path / "overflowing" / "run", noise=1e30, **options)
    write_checkpoint(tmp_path / "astray" / "run", noise=300.0, **options)
    for name in ("overflowing", "astray"):
        (tmp_path / name / "data").symlink_to(folder / "data")
    for dtype, advice in (("fp32", "use an earlier checkpoint"), ("fp16", "fp16 ends at 65,504: use --dtype bf16")):
        with pytest.raises(UserError, match="non-finite") as error:
            perplexity_of(tmp_path / "overflowing", tmp_path / "no.json", f"--dtype={dtype}")
        assert advice in str(error.value)
        assert ("65,504" in str(error.value)) == (dtype == "fp16")
    assert not (tmp_path / "no.json").exists()

    perplexity_of(tmp_path / "astray", tmp_path / "astray.json")
    found = json.loads((tmp_path / "astray.json").read_text())
    assert found["loss"]["value"] > 700
    assert found["perplexity"] == {"value": None, "standard_error": None}


def loaded_by_rank(looks: list[Path]) -> str:
    """Where this rank's look at the run finds one of `looks`: the checkpoint that it loads, or what it says."""
    ranks = start_ranks("cpu")
    try:
        return str(load_checkpoint(looks[ranks.rank], "cpu", ranks).checkpoint)
    except UserError as error:
        return str(error)


def test_ranks_load_one_checkpoint_though_the_run_saves_between_their_looks(tmp_path: Path) -> None:
    older, newer = (write_checkpoint(tmp_path / "run", step=step) for step in (7, 8))
    assert run_ranks(2, tmp_path / "store", loaded_by_rank, [older, newer]) == [str(older)] * 2
    first, second = run_ranks(2, tmp_path / "again", loaded_by_rank, [tmp_path / "none", newer])
    assert first == second
    assert "is not a folder" in first


def test_any_number_of_ranks_and_any_micro_batch_give_the_same(folder: Path, tmp_path: Path) -> None:
    figures = []
    for world_size, micro_batch in ((1, 8), (2, 5), (3, 1)):
        out = tmp_path / f"{world_size}.json"
        run_ranks(world_size, tmp_path / "store", perplexity_of, folder, out, f"--micro-batch={micro_batch}")
        figures.append(json.loads(out.read_text()))
    for figure in figures[1:]:
        for name in ("loss", "perplexity", "bits_per_byte"):
            for part in ("value", "standard_error"):
                assert figure[name][part] == pytest.approx(figures[0][name][part], rel=1e-6)
        assert figure["targets"] == figures[0]["targets"] == TARGETS
    assert figures[0]["all_targets"]
    assert figures[0]["val_sha256"] == TokenSet.open(folder / "data").manifest.val_sha256


def test_under_torchrun_it_says_what_was_measured_once(folder: Path) -> None:
    script, checkpoint = PROJECT / "eval" / "perplexity.py", folder / "run" / "step-00000007"
    options = [f"--data={folder / 'data'}", "--device=cpu", "--tokens=70", "--stride=4"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launcher, str(script), str(checkpoint), *options],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("bits per byte") == 1
    assert TokenSet.open(folder / "data").manifest.val_sha256 in done.stdout
    assert "the first 64 target tokens" in done.stdout
    assert "stride 4" in done.stdout


@pytest.mark.parametrize(("document_mask", "ranks"), [("false", 2), ("true", 1)])
def test_it_is_the_loss_that_training_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, document_mask: str, ranks: int
) -> None:
    make_token_set(tmp_path / "data", train_tokens=5_000, val_tokens=1_000)
    more = ("--run.max_steps=5", f"--data.document_mask={document_mask}")
    train(ranks, tmp_path, tiny_arguments(tmp_path, tmp_path / "data", "a", *more))
    run = run_of(tmp_path, "a")
    (recorded,) = [r for r in read_metrics(run.metrics) if r["step"] == 5 and "val_loss" in r]
    arguments = [str(run.path), "--tokens=256", "--device=cpu", f"--json={tmp_path / 'out.json'}"]
    monkeypatch.setattr(sys, "argv", ["perplexity.py", *arguments])  # the data are the run's own
    assert main() == 0
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["loss"]["value"] == pytest.approx(recorded["val_loss"], abs=1e-6)
    assert report["bits_per_byte"]["value"] == pytest.approx(recorded["val_bits_per_byte"], abs=1e-6)
    assert (report["targets"], report["bytes"]) == (recorded["val_tokens"], recorded["val_bytes"])
    assert report["bytes"] < report["targets"]  # of the byte tokenizer each id is a byte, but the end of a text
    assert report["val_sha256"] == recorded["val_sha256"]
    assert not report["all_targets"]


def test_mistakes_are_one_line(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_token_set(tmp_path / "chars", vocab_size=61, train_tokens=500, val_tokens=100)
    checkpoint = folder / "run" / "step-00000007"
    cases = {
        ("--data", tmp_path / "chars"): "another tokenizer",
        (): "doesn't record what it was trained on",
        ("--data", tmp_path / "none"): "none",
        ("--data", folder / "data", "--stride", 17): "--stride is 17",
        ("--data", folder / "data", "--micro-batch", 0): "--micro-batch is 0",
        ("--data", folder / "data", "--tokens", 15): "a sequence has 16 targets",
    }
    for arguments, message in cases.items():
        monkeypatch.setattr(sys, "argv", ["perplexity.py", str(checkpoint), *map(str, arguments)])
        with pytest.raises(UserError, match=message) as error:
            main()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(("capability", "dtype"), [((9, 0), "bf16"), ((7, 5), "fp32")])
def test_the_dtype_of_an_evaluation_follows_the_device(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: str
) -> None:
    """As torch would answer on an H100 and on a T4, whose fp16 ends at 65,504."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    assert evaluation_dtype("auto", torch.device("cuda", 0)) == dtype
    assert evaluation_dtype("fp16", torch.device("cuda", 0)) == "fp16"
    assert evaluation_dtype("auto", torch.device("cpu")) == "fp32"


def test_the_report_names_the_dtype_that_was_taken(folder: Path, tmp_path: Path, monkeypatch) -> None:
    command = [
        "perplexity.py",
        str(write_checkpoint(tmp_path / "run", block_size=LENGTH)),
        f"--data={folder / 'data'}",
        "--device=cpu",
    ]
    monkeypatch.setattr(sys, "argv", [*command, f"--json={tmp_path / 'figures.json'}"])
    main()
    assert json.loads((tmp_path / "figures.json").read_text())["dtype"] == "fp32"


def padded_rows(tokens: TokenSet, longest: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Held-back conversations as transformers takes them: ids, attention mask, labels, each a row of its own."""
    stream, marks = tokens.split("val"), tokens.marks("val")
    assert marks is not None
    rows, place = [], 0
    for ids in conversations_of(stream, marks):
        counted = marks.read(place, place + len(ids)) == COUNTED
        place += len(ids)
        if len(ids) - 1 <= longest:
            rows.append((torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(counted)))
    assert 0 < len(rows) < tokens.manifest.conversations["val"]["conversations"]  # type: ignore[index]
    pad = torch.nn.utils.rnn.pad_sequence
    padded = pad([row for row, _ in rows], batch_first=True)
    mask = pad([torch.ones_like(row) for row, _ in rows], batch_first=True)
    labels = pad([row.where(counted, -100) for row, counted in rows], batch_first=True, padding_value=-100)
    return padded, mask, labels


def test_of_conversations_the_answers_count_as_in_validation_and_in_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    tokens = make_conversation_set(tmp_path / "data", val_count=60)
    more = ("--objective=sft", "--run.max_steps=5", "--model.block_size=16", "--batch.tokens_per_step=64")
    train(1, tmp_path, tiny_arguments(tmp_path, tokens.folder, "a", *more))
    run = run_of(tmp_path, "a")
    (recorded,) = [r for r in read_metrics(run.metrics) if r["step"] == 5 and "val_loss" in r]

    def report(*options: str) -> dict[str, Any]:
        out = tmp_path / "out.json"
        monkeypatch.setattr(sys, "argv", ["perplexity.py", str(run.path), "--device=cpu", f"--json={out}", *options])
        assert main() == 0
        return json.loads(out.read_text())

    same = report("--tokens=256", "--micro-batch=3")
    assert same["loss"]["value"] == pytest.approx(recorded["val_loss"], abs=1e-6)
    assert same["bits_per_byte"]["value"] == pytest.approx(recorded["val_bits_per_byte"], abs=1e-6)
    assert (same["targets"], same["bytes"]) == (recorded["val_tokens"], recorded["val_bytes"])
    assert same["targets_are"] == "answers" and not same["all_targets"]

    every, ids, mask, labels = report(), *padded_rows(tokens, 16)
    loaded = load_checkpoint(run.path)
    export(loaded.checkpoint, tmp_path / "exported")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    with torch.no_grad():
        after = labels[:, 1:].contiguous()  # a conversation's last token is only a target
        loss = theirs(ids[:, :-1], attention_mask=mask[:, :-1], labels=after, shift_labels=after).loss.item()
    assert every["loss"]["value"] == pytest.approx(loss, abs=1e-5)
    assert every["targets"] == int((labels != -100).sum()) and every["all_targets"]
    assert every["left_out_conversations"] == 60 - len(ids)
    with pytest.raises(UserError, match="--stride doesn't go with conversations"):
        report("--stride=4")
    with pytest.raises(UserError, match=r"no conversation of .* fits into the model's 16 tokens, or --tokens is less"):
        report("--tokens=15")
