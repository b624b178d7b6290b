"""Evaluation examples planted in training text: which are found, and what is named that isn't there."""

import bz2
import json
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import UserError
from data_prep import contamination
from data_prep.chat.chat_tokenizer import ChatTokenizer
from data_prep.chat.messages import Message
from data_prep.chat.template import read_template
from data_prep.corpora.preparation import finish_set
from data_prep.overlap import scan as scanning
from data_prep.overlap.evaluation_items import read_evaluation
from data_prep.overlap.word_ngrams import NgramIndex
from data_prep.token_sets.shard_writer import ShardWriter
from data_prep.tokenization.loading import load_tokenizer
from data_prep.tokenization.tokenizer import CharTokenizer, Ids, Tokenizer
from tests.helpers.token_sets import make_token_set

PROJECT = Path(__file__).resolve().parents[2]
VOCABULARY = [f"{start}{end}" for start in ("ba", "ki", "mo", "ré", "tu") for end in ("", "n", "st", "la", "日", "1")]
COMMON = "all of the things that one says again and again in every single page"  # 14 words


def sentence(chance: random.Random, words: int) -> str:
    return " ".join(chance.choice(VOCABULARY) for _ in range(words))


def rewrapped(text: str) -> str:
    words = text.split(" ")
    return "\n".join("  ".join(words[start : start + 5]) for start in range(0, len(words), 5))


def in_other_case(text: str) -> str:
    return ", ".join(word.upper() if number % 2 else f"“{word}”" for number, word in enumerate(text.split(" "))) + "!"


PLANTED: dict[str, Callable[[str], str]] = {
    "verbatim": str,
    "re-wrapped": rewrapped,
    "case and punctuation": in_other_case,
    "embedded": lambda text: f"{sentence(random.Random(text), 40)} {text} {sentence(random.Random(text), 40)}",
    "a part": lambda text: " ".join(text.split(" ")[3:18]),
}


def item(number: int) -> dict[str, Any]:
    chance = random.Random(number)
    endings = [sentence(chance, 9) for _ in range(4)]
    return {"ctx": f"[header] {sentence(chance, 8)} [step] {sentence(chance, 8)}", "endings": endings, "label": 2}


def text_of(row: dict[str, Any]) -> str:
    return f"{row['ctx']} {row['endings'][2]}".replace("[header] ", "").replace("[step] ", "")


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, set[int]]]:
    """A token set, an evaluation's file, and which examples were put in the set in which form.

    100 examples are there, 20 in each form; 100 are not, of which 20 have only their wrong endings there and 20 a
    phrase that many documents have; one is too short.
    """
    folder = tmp_path_factory.mktemp("planted")
    rows = [item(number) for number in range(200)]
    forms = {form: set(range(start, 100, len(PLANTED))) for start, form in enumerate(PLANTED)}
    documents = [sentence(random.Random(1000 + number), 80) for number in range(300)]
    for form, numbers in forms.items():
        documents += [PLANTED[form](text_of(rows[number])) for number in numbers]
    for number in range(100, 120):
        documents += rows[number]["endings"][:2]
        rows[number + 20]["ctx"] += f" {COMMON}"
        documents.append(f"{sentence(random.Random(2000 + number), 30)} page {COMMON}")
    rows.append({"ctx": "too short", "endings": ["a b", "c", "d", "e"], "label": 0})
    random.Random(3).shuffle(documents)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "evaluation.jsonl").write_text(lines, encoding="utf-8")
    write_set(folder / "set", documents, load_tokenizer("gpt2"))
    return folder / "set", folder / "evaluation.jsonl", forms


def write_set(folder: Path, documents: list[str], tokenizer: Tokenizer) -> None:
    write_ids(folder, [np.concatenate([tokenizer.opening, tokenizer.encode(text)]) for text in documents], tokenizer)


def write_ids(folder: Path, documents: Sequence[Ids], tokenizer: Tokenizer) -> None:
    folder.mkdir()
    splits = {}
    for split, part in (("train", documents), ("val", documents[:1])):
        with ShardWriter(folder, split, tokenizer, 5_000) as writer:
            for ids in part:
                writer.write(ids)
        splits[split] = tuple(writer.shards)
    finish_set(folder, tokenizer, {"name": "test"}, [], splits)


def run(*options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(PROJECT / "data_prep" / "contamination.py"), *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def result_of(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def test_every_planted_form_is_found_and_nothing_else(planted: Any, tmp_path: Path) -> None:
    """Recall 1.0 of each form, precision 1.0. What is reported of an example is where it says."""
    folder, evaluation, forms = planted
    done = run(folder, "--against", evaluation, "--json", tmp_path / "out.json", "--workers", 2)
    assert done.returncode == 0, done.stderr
    assert "found           100" in done.stdout
    result = result_of(tmp_path / "out.json")
    found = {entry["item"] for entry in result["found"]}
    assert {form: len(found & numbers) / len(numbers) for form, numbers in forms.items()} == dict.fromkeys(forms, 1.0)
    assert found == set().union(*forms.values())
    assert {entry["item"] for entry in result["frequent"]} == set(range(120, 140))
    assert result["unchecked"] == [200]
    assert result["against"]["items"] == 201
    entry = next(entry for entry in result["found"] if entry["item"] in forms["case and punctuation"])
    inspect = [sys.executable, str(PROJECT / "data_prep" / "inspect_shards.py"), str(folder), "--document"]
    shown = subprocess.run([*inspect, str(entry["document"])], capture_output=True, text=True, timeout=60).stdout
    assert entry["ngram"] in " ".join("".join(c if c.isalnum() else " " for c in shown.lower()).split())


def test_turns_of_conversations_are_searched_each_by_itself(tmp_path: Path) -> None:
    """An example is found in an answer, but not where a question and an answer have eight words each of it."""
    chat = ChatTokenizer.of(load_tokenizer("gpt2"), read_template("chatml"))
    texts = [text_of(item(number)) for number in range(3)]
    halves = [" ".join(texts[1].split(" ")[start : start + 8]) for start in (0, 8)]
    turns = [(sentence(random.Random(9), 20), texts[0]), halves, halves[::-1]]
    messages = [[Message("user", question), Message("assistant", answer)] for question, answer in turns]
    write_ids(tmp_path / "set", [chat.render(found).ids for found in messages], chat)
    index = NgramIndex(texts, 13)
    found = scanning.scan(tmp_path / "set", "train", index, 0)
    assert (found.count, [bool(found.documents[grams].any()) for grams in index.of_item]) == (3, [True, False, False])


def test_the_result_is_the_same_for_any_blocks_and_workers(
    planted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, evaluation, _ = planted
    index = NgramIndex(read_evaluation(evaluation).texts, 13)
    whole = scanning.scan(folder, "train", index, 0)
    monkeypatch.setattr(scanning, "BLOCK_TOKENS", 700)  # documents run across blocks, some over several
    monkeypatch.setattr(scanning, "OVERLAP_TOKENS", 50)
    parts = scanning.scan(folder, "train", index, 0)
    assert (parts.count, parts.tokens) == (whole.count, whole.tokens)
    assert np.array_equal(parts.documents, whole.documents)
    assert np.array_equal(parts.first, whole.first)
    assert whole.count == 300 + 100 + 60


def test_an_example_of_which_half_is_in_many_documents_is_found_all_the_same(tmp_path: Path) -> None:
    text = sentence(random.Random(1), 30)
    (tmp_path / "e.jsonl").write_text(json.dumps({"question": text[:60], "answers": [text[60:]]}) + "\n")
    write_set(tmp_path / "set", [f"{number} {text}" for number in range(15)], load_tokenizer("byte"))
    evaluation = read_evaluation(tmp_path / "e.jsonl", ["question", "answers"])
    index = NgramIndex(evaluation.texts, 13)
    judged = contamination.judge(index, scanning.scan(tmp_path / "set", "train", index, 0), 10)
    assert [entry["documents"] for entry in judged["found"]] == [15]


def test_a_text_without_marked_documents_is_searched_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = sentence(random.Random(1), 400)
    tokenizer = CharTokenizer("".join(sorted(set(text))))
    write_set(tmp_path / "set", [text], tokenizer)
    monkeypatch.setattr(scanning, "BLOCK_TOKENS", 500)
    index = NgramIndex([" ".join(text.split(" ")[start : start + 20]) for start in range(0, 380, 7)], 13)
    found = scanning.scan(tmp_path / "set", "train", index, 0)
    assert (found.documents > 0).all()
    assert set(found.first.tolist()) == {0}


def test_both_of_hellaswags_forms_give_the_same_examples(tmp_path: Path) -> None:
    rows = [item(number) for number in range(3)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [line for row in rows for line in (row["ctx"], str(row["label"]), *row["endings"])]
    (tmp_path / "a.txt.bz2").write_bytes(bz2.compress("\n".join(lines).encode()))
    assert read_evaluation(tmp_path / "a.jsonl").texts == read_evaluation(tmp_path / "a.txt.bz2").texts


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"ctx": "a"}', "line 1 is no example"),
        ('{"ctx": "a", "endings": ["b"], "label": 4}', "line 1 is no example"),
        ("a\n7\nb\nc\nd\ne", "is '7', not a label"),
        ("one line", "is neither JSON lines nor"),
        ("[" * 100_000, "is neither JSON lines nor"),
        ('{"a":' * 100_000, "line 1 is no example"),
    ],
)
def test_a_file_that_is_no_evaluation_is_one_line(content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "e.jsonl").write_text(content)
    with pytest.raises(UserError, match=words):
        read_evaluation(tmp_path / "e.jsonl")


def test_mistakes_are_one_line(planted: Any, tmp_path: Path) -> None:
    make_token_set(tmp_path / "empty", train_tokens=300)
    for options, words in (
        (["nowhere", "--against", planted[1]], "there is no token set in"),
        ([planted[0], "--against", tmp_path / "none.jsonl"], "none.jsonl can't be read"),
        ([planted[0], "--against", planted[1], "--words", 2], "--words is 2: use 5 or more"),
    ):
        done = run(*options)
        assert (done.returncode, words in done.stderr, "Traceback" in done.stderr) == (2, True, False), done.stderr
