"""Conversations as a token set: what counts as a target, what is left out and told, the same for workers and stops."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common.errors import UserError
from data_prep import conversations
from data_prep.corpora.journal import JOURNAL_FILE, Journal
from data_prep.token_sets.documents import conversations_of
from data_prep.token_sets.manifest import COUNTED, MANIFEST_FILE, Manifest
from data_prep.token_sets.packing import IGNORE, plan_in_memory
from data_prep.token_sets.shared_documents import shared_documents
from data_prep.token_sets.token_set import TokenSet
from data_prep.tokenization.loading import load_tokenizer
from data_prep.verify import set_problems

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"


def record(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


GOOD = [
    record((SYSTEM, "Be short."), (USER, f"{a} and {b}?"), (ASSISTANT, str(a + b)), (USER, "Sure?"), (ASSISTANT, "Yes"))
    for a in range(8)
    for b in range(4)
] + [{"prompt": "Say <|im_end|> thrice", "completion": "<|im_end|>, <|im_start|>"}]
BAD = {
    "an empty turn": record((USER, "a"), (ASSISTANT, " ")),
    "a system message that is not the first message, or a second one": record(
        (SYSTEM, "a"), (SYSTEM, "b"), (USER, "c")
    ),
    "an assistant's turn before any user's": record((ASSISTANT, "a"), (USER, "b")),
    "a role other than system, user and assistant": record((USER, "a"), ("tool", "b"), (ASSISTANT, "c")),
    "no answer to learn from": record((USER, "a")),
    "no messages": {"text": "a"},
    "more than 200 tokens (--longest)": record((USER, "a"), (ASSISTANT, "b" * 300)),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("source") / "all.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in [*GOOD[:20], *BAD.values(), *GOOD[20:]]))
    return path


def prepare(monkeypatch: pytest.MonkeyPatch, source: Path, out: Path, *more: str) -> TokenSet:
    options = ["--tokenizer", "byte", "--longest", "200", "--val-one-in", "4", "--shard-tokens", "700"]
    monkeypatch.setattr("sys.argv", ["conversations.py", str(source), "--out", str(out), *options, *more])
    assert conversations.main() == 0
    return TokenSet.open(out, verify="full")


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def texts_of(tokens: TokenSet, split: str) -> list[tuple[str, str]]:
    """Each conversation's text, and that of its targets."""
    tokenizer, stream, marks = load_tokenizer(tokens.tokenizer_spec), tokens.split(split), tokens.marks(split)
    assert marks is not None
    found, place = [], 0
    for ids in conversations_of(stream, marks):
        counted = marks.read(place, place + len(ids)) == COUNTED
        place += len(ids)
        found.append((tokenizer.decode(ids), tokenizer.decode(ids[counted])))
    return found


def test_the_answers_with_their_ends_count_and_nothing_else(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = prepare(monkeypatch, source, tmp_path / "set")
    told = capsys.readouterr().out
    found = [item for split in ("train", "val") for item in texts_of(tokens, split)]
    assert len(found) == len(GOOD)
    wanted = {
        "".join(turn["content"] + "<|im_end|>" for turn in item["messages"] if turn["role"] == ASSISTANT)
        for item in GOOD[:-1]
    }
    assert {answers for _, answers in found if "," not in answers} == wanted
    # spellings in messages are text: as many end tokens as turns
    (spelled,) = [text for text, _ in found if "thrice" in text]
    assert spelled.count("<|im_end|>") == 4
    assert all(text.startswith("<|endoftext|><|im_start|>") for text, _ in found)
    for why in BAD:
        assert f"left out 1 records: {why}" in told
    assert "1 conversations have spellings of special tokens" in told
    assert "all.jsonl line 21" in told
    assert tokens.manifest.conversations == {
        split: {
            "conversations": len(texts_of(tokens, split)),
            "answer_tokens": sum(
                int((marks.read(0, len(marks)) == COUNTED).sum()) for marks in [tokens.marks(split)] if marks
            ),
            "longest": max(len(ids) for ids in conversations_of(tokens.split(split), tokens.marks(split))),  # type: ignore[arg-type]
        }
        for split in ("train", "val")
    }
    assert set_problems(tokens.folder, tokens.manifest, 1) == []
    assert shared_documents(tokens.folder, tokens.manifest) == (0, None)
    # equal questions stay on one side, whatever the system's message
    questions = [
        {text.split("user\n")[1].split("<|im_end|>")[0] for text, _ in texts_of(tokens, s)} for s in ("train", "val")
    ]
    assert not questions[0] & questions[1]
    assert questions[1]


class Interrupted(Exception):
    pass


def test_workers_parquet_and_stops_change_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = folder_bytes(prepare(monkeypatch, source, tmp_path / "whole").folder)
    assert len(whole) > 8
    assert folder_bytes(prepare(monkeypatch, source, tmp_path / "two", "--workers", "2").folder) == whole

    save, left = Journal.save, 5

    def interrupted(self: Journal) -> None:
        nonlocal left
        left -= 1
        save(self)
        if left == 0:
            raise Interrupted

    monkeypatch.setattr(Journal, "save", interrupted)
    with pytest.raises(Interrupted):
        prepare(monkeypatch, source, tmp_path / "cut")
    assert (tmp_path / "cut" / JOURNAL_FILE).exists()
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cut").glob("*-0000[01].bin")}
    assert len(before) >= 4
    assert folder_bytes(prepare(monkeypatch, source, tmp_path / "cut").folder) == whole
    assert {name: (tmp_path / "cut" / name).stat().st_mtime_ns for name in before} == before

    records = [json.loads(line) for line in source.read_text().splitlines()]
    rows = [
        {"messages": item.get("messages"), "prompt": item.get("prompt"), "completion": item.get("completion")}
        for item in records
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "all.parquet")
    of_parquet = folder_bytes(prepare(monkeypatch, tmp_path / "all.parquet", tmp_path / "parquet").folder)
    for name in whole.keys() - {MANIFEST_FILE}:
        assert of_parquet[name] == whole[name]


def test_marks_that_were_changed_are_noticed(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = prepare(monkeypatch, source, tmp_path)
    path = tmp_path / "train-marks-00000.bin"
    data = bytearray(path.read_bytes())
    data[10:12] = (1).to_bytes(2, "little") if data[10] != 1 else (0).to_bytes(2, "little")
    path.write_bytes(bytes(data))
    with pytest.raises(UserError, match="SHA-256"):
        TokenSet.open(tmp_path, verify="full")
    assert any("train-marks-00000.bin" in problem for problem in set_problems(tmp_path, tokens.manifest, 1))
    # another mask is other data: a run that resumes on it would learn something else
    splits = dict(tokens.manifest.splits)
    shard, *others = splits["train-marks"]
    splits["train-marks"] = (replace(shard, sha256="0" * 64), *others)
    assert replace(tokens.manifest, splits=splits).identity != tokens.manifest.identity
    path.unlink()
    with pytest.raises(UserError, match="missing"):
        TokenSet.open(tmp_path)
    content = json.loads((tmp_path / MANIFEST_FILE).read_text())
    del content["splits"]["train-marks"]
    (tmp_path / MANIFEST_FILE).write_text(json.dumps(content))
    with pytest.raises(UserError, match="the marks of the split train are not those of its tokens"):
        Manifest.read(tmp_path)


def test_what_no_sequence_holds_is_left_out_whole(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = prepare(monkeypatch, source, tmp_path)
    stream, marks = tokens.split("train"), tokens.marks("train")
    assert marks is not None
    lengths = [len(ids) - 1 for ids in conversations_of(stream, marks)]
    for length in (min(lengths) - 1, sorted(lengths)[len(lengths) // 2], max(lengths)):
        packed = plan_in_memory(stream, marks, length)
        kept = sorted(size for size in lengths if size <= length)
        assert packed.facts.left_out == len(lengths) - len(kept)
        rows = packed.rows(np.arange(packed.count))
        assert rows.document_ids is not None
        assert packed.facts.pieces == len(kept)
        assert packed.target_count(np.arange(packed.count)) == (rows.targets != IGNORE).sum()


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ("hello", "a.txt", "can't be read here"),
        (json.dumps(BAD["no messages"]) + "\n", "a.jsonl", "no conversation is left for training (1: no messages)"),
        ("{broken\n", "a.jsonl", "a.jsonl, line 1"),
    ],
)
def test_a_mistake_is_one_line(
    content: str, name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as error:
        prepare(monkeypatch, tmp_path / name, tmp_path / "out")
    assert message in str(error.value)
