"""Which files of a folder are read: each once, in one order, no test splits, nothing passed over without a word."""

import bz2
import gzip
import json
import lzma
import os
import socket

import pyarrow as pa
import pytest

from common.errors import UserError
from data_prep.corpora.file_walk import describe_left_out
from data_prep.corpora.local_files import find_files, local_parquet
from data_prep.corpora.split_names import choose_training_files
from tests.helpers.parquet_files import write_parquet

LINE = json.dumps({"text": "words"}) + "\n"


def make(folder, *names):
    """Files of one document, whatever their kind."""
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".parquet"):
            write_parquet(path, [f"text {number}"])
        elif ".json" in name or ".ndjson" in name:
            path.write_text(json.dumps({"text": f"words {number}"}) + "\n")
        else:
            path.write_text(f"words {number}")
    return folder


def taken(found):
    return [file.name for file in found.files.listed]


SPLITS = {  # all names: those to train on
    ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet", "data/validation-00000.parquet"): 1,
    ("train/0.jsonl", "train/1.jsonl", "test/0.jsonl", "val.jsonl"): 2,
    ("en/c4-train.00000-of-01024.json", "en/c4-validation.00000-of-00008.json"): 1,
    ("gsm8k/main/train-0.parquet", "gsm8k/main/test-0.parquet", "wiki/0.parquet"): ("gsm8k/main/train-0.parquet", 2),
    ("Stories-train.txt", "Stories-valid.txt"): 1,
    ("wiki.train.txt", "wiki.test.txt", "notes.txt"): ("notes.txt", "wiki.train.txt"),
    ("train/a.md", "test/b.md", "dev/c.md"): 1,
    # nothing but names that look so
    ("test.txt", "other.txt"): 2,
    ("docs/training.md", "docs/evaluation.md", "docs/testing.md"): 3,
    ("contest.jsonl", "latest.jsonl", "trains.jsonl"): 3,
    ("train-test-split/a.jsonl", "train-test-split/b.jsonl"): 2,
    # a test set by itself
    ("test-00000.parquet", "test-00001.parquet"): 2,
    ("test.txt",): 1,
}


@pytest.mark.parametrize("names", SPLITS)
def test_the_train_split_is_taken(names):
    wanted = SPLITS[names]
    choice = choose_training_files(sorted(names), "here")
    if isinstance(wanted, tuple):
        assert choice.names[0] == wanted[0]
        wanted = wanted[1] if isinstance(wanted[1], int) else len(wanted)
    assert len(choice.names) == wanted
    assert wanted == len(names) or all("train" in name or "/" in name or "notes" in name for name in choice.names)
    assert sum(map(len, choice.left_out.values())) == len(names) - wanted
    assert choose_training_files(sorted(names), "here", all_splits=True).names == sorted(names)
    assert (choice.note is not None) == (names[0] == "test-00000.parquet")


@pytest.mark.parametrize(
    "names", [("a.jsonl", "test.jsonl"), ("test-0.parquet", "validation-0.parquet"), ("x/0.parquet", "dev/0.parquet")]
)
def test_where_it_can_not_be_told_it_is_refused(names):
    with pytest.raises(UserError, match=r"here: .* is named for .*, and nothing for train"):
        choose_training_files(names, "here")


def test_a_folder_named_by_the_user_says_nothing(tmp_path):
    """Only names below it do; so do those of several that are named, which a shell's pattern may have made."""
    make(tmp_path, "data/validation/0.jsonl", "data/validation/1.jsonl", "data/train/0.jsonl")
    assert taken(find_files([tmp_path / "data" / "validation"], "text")) == ["0.jsonl", "1.jsonl"]
    both = find_files(sorted((tmp_path / "data").iterdir()), "text")
    assert taken(both) == ["0.jsonl"]
    assert describe_left_out(both.left_out) == [
        "2 named for validation (--all-splits takes everything): validation/0.jsonl, validation/1.jsonl"
    ]
    assert len(taken(find_files([tmp_path / "data"], "text", all_splits=True))) == 3


def test_parquet_of_a_folder_without_a_card_s_configurations(tmp_path):
    names = [f"data/{split}-00000-of-00001.parquet" for split in ("test", "train", "validation")]
    make(tmp_path, *names)
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# A data set\n")
    found = local_parquet(tmp_path, "default")
    assert taken(found) == [names[1]]
    assert sorted(reason.split(" (")[0] for reason in found.left_out) == [
        "named for test", "named for validation", "of a kind that is not read",
    ]  # fmt: skip
    card = (
        "configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/t*\n  - split: validation\n"
    )
    (tmp_path / "README.md").write_text(f"---\n{card}    path: data/v*\n---\n")  # the card's word is the last
    assert taken(local_parquet(tmp_path, "default")) == names[:2]
    assert taken(local_parquet(tmp_path, "default", all_splits=True)) == names


def test_what_is_passed_over_is_told_with_its_reason(tmp_path):
    folder = make(
        tmp_path / "in",
        "a.jsonl",
        "b/c.txt",
        "._a.txt",
        ".ipynb_checkpoints/a.txt",
        "__MACOSX/a.txt",
        "x.csv",
        "y.docx",
    )
    (folder / "info.json").write_text('{\n  "text": "of a document"\n}\n')
    (folder / "list.json").write_text('[{"text": "of a list"}]')
    (folder / "meta.json").write_text('{"rows": 7}\n')
    os.link(folder / "b" / "c.txt", folder / "d.txt")
    os.mkfifo(folder / "pipe.jsonl")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(folder / "s.txt"))
        found = find_files([folder], "text")
    assert taken(found) == ["a.jsonl", "b/c.txt"]
    assert describe_left_out(found.left_out) == [
        "2 JSON, but a document, not an object per line: info.json, list.json",
        "1 JSON, but without the text: its first line has no field 'text': meta.json",
        "3 hidden, or of another program's bookkeeping: ._a.txt, .ipynb_checkpoints/, __MACOSX/",
        "2 not regular files (pipes, sockets, devices): pipe.jsonl, s.txt",
        "2 of a kind that is not read: x.csv, y.docx",
        "1 the same file under another name: d.txt",
    ]
    assert taken(find_files([folder / "._a.txt"], "text")) == ["._a.txt"]  # what is named is meant
    for named, words in (
        ("pipe.jsonl", "not a regular file"),
        ("list.json", "jq -c"),
        ("meta.json", "no field 'text'"),
    ):
        with pytest.raises(UserError, match=words):
            find_files([folder / named], "text")
    os.mkfifo(folder / "pipe.parquet")
    make(folder, "p.parquet")
    assert taken(local_parquet(folder, "default")) == ["p.parquet"]


def test_linked_folders_are_entered_once_and_loops_end(tmp_path):
    """A name of a file's own comes before one that a linked folder leads to, whatever their order."""
    folder = make(tmp_path / "in", "v2/a.txt", "v2/b.txt")
    make(tmp_path / "elsewhere", "e.txt", "deep/f.txt")
    (folder / "latest").symlink_to(folder / "v2")
    (folder / "more").symlink_to(tmp_path / "elsewhere")
    (folder / "same").symlink_to(tmp_path / "elsewhere" / "deep")
    (folder / "v2" / "up").symlink_to(folder)
    (tmp_path / "elsewhere" / "deep" / "round").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(folder)
    found = find_files([folder], "text")
    assert taken(found) == ["more/deep/f.txt", "more/e.txt", "v2/a.txt", "v2/b.txt"]
    assert describe_left_out(found.left_out) == [
        "3 linked folders that are read under another name: latest, more/back, same",
        "2 links that lead back to a folder above them: more/deep/round, v2/up",
    ]
    for reason in find_files([folder, folder / "v2", folder / "v2" / "a.txt"], "text").left_out:
        assert "link" in reason  # a file that is asked for twice is no other file


def test_names_of_other_collections_are_read(tmp_path):
    """C4's, Dolma's and others': what they hold is read already under other names."""
    data = LINE.encode()
    packed = {
        "": data, ".gz": gzip.compress(data), ".bz2": bz2.compress(data), ".xz": lzma.compress(data),
        ".zst": (zstd := pa.compress(data, "zstd", asbytes=True)), ".zstd": zstd,
    }  # fmt: skip
    names = [f"{number}{base}{end}" for number, base in enumerate((".jsonl", ".json", ".ndjson")) for end in packed]
    for name in names:
        (tmp_path / name).write_bytes(packed["" if name.endswith(("json", "jsonl")) else "." + name.split(".")[-1]])
    assert sorted(taken(find_files([tmp_path], "text"))) == sorted(names)
    only = tmp_path / "only"
    only.mkdir()
    for path in tmp_path.glob("1.json*"):
        path.rename(only / path.name)
    with pytest.raises(UserError, match=r"no files to read .*6 JSON, but without the text: .* no field 'body'"):
        find_files([only], "body")
