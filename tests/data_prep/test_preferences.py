"""Preferences as a token set: which answers count, all forms that hub sets have, what is left out and told."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_prep import preferences
from data_prep.token_sets.manifest import COUNTED
from data_prep.token_sets.token_set import TokenSet
from data_prep.tokenization.loading import load_tokenizer
from data_prep.verify import set_problems
from tests.data_prep.test_conversations import folder_bytes, texts_of

USER, ASSISTANT = "user", "assistant"


def turns(*contents: str, first: int = 0) -> list[dict[str, str]]:
    roles = (USER, ASSISTANT)
    return [{"role": roles[(first + n) % 2], "content": content} for n, content in enumerate(contents)]


def forms(number: int) -> list[dict[str, Any]]:
    """The same preference as hub sets write it."""
    asked, good, bad = f"{number}?", f"good {number}", f"bad {number}"
    return [
        {"prompt": asked, "chosen": good, "rejected": bad},
        {"prompt": turns(asked), "chosen": turns(good, first=1), "rejected": turns(bad, first=1)},
        {"chosen": turns(asked, good), "rejected": turns(asked, bad)},
        {"prompt": asked, "chosen": turns(asked, good), "rejected": turns(asked, bad), "score": 1.0},
    ]


LONG = {"chosen": turns("a?", "first", "b?", "yes"), "rejected": turns("a?", "first", "b?", "no")}
BAD: dict[str, Any] = {
    "no chosen and rejected answer": {"prompt": "a", "chosen": "b"},
    "chosen and rejected answer different prompts": {"chosen": turns("a", "b"), "rejected": turns("c", "d")},
    "chosen and rejected are the same answer": {"prompt": "a", "chosen": "b", "rejected": "b"},
    "an empty turn": {"prompt": "a", "chosen": " ", "rejected": "b"},
    "no messages": {"chosen": "b", "rejected": "c"},
    "no answer to learn from": {"chosen": turns("a", "b", "c"), "rejected": turns("a", "b", "d")},
    "more than 90 tokens (--longest)": {"prompt": "a", "chosen": "b" * 99, "rejected": "c"},
}


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def prepare(monkeypatch: pytest.MonkeyPatch, source: Path, out: Path, *more: str) -> TokenSet:
    options = ["--tokenizer", "byte", "--longest", "90", "--val-one-in", "3", *more]
    monkeypatch.setattr("sys.argv", ["preferences.py", str(source), "--out", str(out), *options])
    assert preferences.main() == 0
    return TokenSet.open(out, verify="full")


def test_every_form_gives_the_same_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sets = []
    for form in range(4):
        source = write(tmp_path / f"{form}.jsonl", [forms(number)[form] for number in range(12)])
        tokens = prepare(monkeypatch, source, tmp_path / str(form), "--workers", "2" if form == 1 else "0")
        sets.append({name: data for name, data in folder_bytes(tokens.folder).items() if name.endswith(".bin")})
    assert all(found == sets[0] for found in sets)
    assert tokens.has_pairs
    pairs = [texts_of(tokens, split)[n : n + 2] for split in ("train", "val") for n in range(0, 8, 2)]
    for (chosen, counted), (rejected, other) in (pair for pair in pairs if pair):
        number = chosen.split("user\n")[1].split("?")[0]
        assert (counted, other) == (f"good {number}<|im_end|>", f"bad {number}<|im_end|>")
        assert rejected == chosen.replace("good", "bad")


def test_only_the_last_answers_count_and_the_rest_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [*(forms(number)[0] for number in range(8)), LONG, *BAD.values()]
    tokens = prepare(monkeypatch, write(tmp_path / "some.jsonl", records), tmp_path / "set")
    told = capsys.readouterr().out
    for why in BAD:
        assert f"left out 1 records: {why}" in told
    counts = tokens.manifest.conversations
    assert counts is not None
    assert sum(counts[split]["conversations"] for split in ("train", "val")) == 2 * 9
    assert f"train: {counts['train']['conversations'] // 2} pairs" in told
    answers = {answer for split in ("train", "val") for _, answer in texts_of(tokens, split)}
    assert {"yes<|im_end|>", "no<|im_end|>"} <= answers
    assert not any("first" in answer for answer in answers)
    assert set_problems(tokens.folder, tokens.manifest, 1) == []
    marks = tokens.marks("train")
    assert marks is not None
    assert load_tokenizer(tokens.tokenizer_spec).decode(tokens.split("train").read(0, 1)) == "<|endoftext|>"
    assert (marks.read(0, len(marks)) == COUNTED).sum() == counts["train"]["answer_tokens"]
