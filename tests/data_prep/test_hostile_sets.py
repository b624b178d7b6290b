"""Token sets, journals and input files that are damaged, or made to hurt: each a sentence with the file's name."""

import bz2
import gzip
import json
import os
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from data_prep import text_files
from data_prep.corpora import readers as inputs
from data_prep.corpora.corpus import InputFile
from data_prep.corpora.corpus_command import _remove_leftovers
from data_prep.corpora.file_kinds import is_utf8
from data_prep.corpora.hub import HubFiles, HubSource
from data_prep.corpora.journal import JOURNAL_FILE, Begun, Journal, source_difference
from data_prep.corpora.local_files import find_files, local_parquet
from data_prep.corpora.readers import UnitReader, Unreadable, units
from data_prep.token_sets.manifest import Manifest, Shard
from data_prep.token_sets.shard_writer import clear_token_set
from data_prep.token_sets.token_set import TokenSet
from data_prep.tokenization.loading import load_tokenizer
from data_prep.tokenization.tokenizer import ByteTokenizer
from data_prep.verify import set_problems
from tests.helpers.parquet_files import write_parquet
from tests.helpers.token_sets import make_token_set

DEEP = "[" * 5_000 + "]" * 5_000

Edit = Callable[[dict[str, Any]], object]


def rewritten(path: Path, edit: Edit) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    edit(content)
    path.write_text(json.dumps(content).replace('"DEEP"', DEEP), encoding="utf-8")


MANIFESTS: dict[str, tuple[Edit, str]] = {
    "tokenizer a list": (lambda m: m.update(tokenizer=[]), "tokenizer: it is not an object"),
    "no tokenizer": (lambda m: m.pop("tokenizer"), "tokenizer: it is missing"),
    "no sha256": (lambda m: m["tokenizer"].pop("sha256"), r"tokenizer\.sha256: it is missing"),
    "vocabulary a text": (lambda m: m["tokenizer"].update(vocab_size="257"), "vocab_size: it is not a whole number"),
    "vocabulary huge": (lambda m: m["tokenizer"].update(vocab_size=1 << 40), "32 bits"),
    "end a text": (lambda m: m["tokenizer"].update(end_of_text_id="256"), "end_of_text_id: it is not a whole number"),
    "source a number": (lambda m: m.update(source=3), "source: it is not an object"),
    "source's name": (lambda m: m["source"].update(name=[]), r"source\.name: it is not text"),
    "skipped a number": (lambda m: m["source"].update(skipped=3), r"source\.skipped: it is not a list"),
    "files without names": (lambda m: m["source"].update(files=[{}]), r"source\.files\.0\.name: it is missing"),
    "versions": (lambda m: m.update(versions={"python": 3}), r"versions\.python: it is not text"),
    "splits a list": (lambda m: m.update(splits=[]), "splits: it is not an object"),
    "a split an object": (lambda m: m["splits"].update(val={}), r"splits\.val: it is not a list"),
    "a shard without tokens": (lambda m: m["splits"]["val"][0].pop("tokens"), r"val\.0\.tokens: it is missing"),
    "tokens beyond 64 bits": (lambda m: m["splits"]["val"][0].update(tokens=10**30), r"val\.0\.tokens: "),
    "a name with a NUL": (lambda m: m["splits"]["val"][0].update(file="a\0.bin"), "is not a shard's name"),
    "deep": (lambda m: m.update(source={"name": "DEEP"}), "not JSON: recursion limit"),
}  # fmt: skip


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_of_another_shape_is_named_with_the_key(tmp_path: Path, name: str) -> None:
    edit, words = MANIFESTS[name]
    make_token_set(tmp_path, train_tokens=500, val_tokens=100)
    rewritten(tmp_path / "manifest.json", edit)
    with pytest.raises(UserError, match=rf"manifest\.json is damaged \(.*{words}.*\): copy it again, or prepare"):
        TokenSet.open(tmp_path)


def pipe(path: Path) -> None:
    os.mkfifo(path)


def zero(path: Path) -> None:
    path.symlink_to("/dev/zero")


def folder(path: Path) -> None:
    path.mkdir()


def tebibytes(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(1 << 42)


IN_PLACE: dict[Callable[[Path], None], str] = {
    pipe: "it is a pipe",
    zero: "it is a device",
    folder: "it is a folder",
    tebibytes: "has more than|has 4,398",
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("put", IN_PLACE)
def test_what_stands_in_a_files_place_is_not_waited_for(tmp_path: Path, put: Callable[[Path], None]) -> None:
    words = IN_PLACE[put]
    make_token_set(tmp_path, train_tokens=500, val_tokens=100)
    manifest = Manifest.read(tmp_path)
    (tmp_path / "val-00000.bin").unlink()
    put(tmp_path / "val-00000.bin")
    with pytest.raises(UserError, match=rf"val-00000\.bin .*({words})"):
        TokenSet.open(tmp_path, verify="full")
    problems = set_problems(tmp_path, manifest, 1)
    assert len(problems) == 1 and "val-00000.bin" in problems[0]
    (tmp_path / "manifest.json").unlink()
    put(tmp_path / "manifest.json")
    with pytest.raises(UserError, match=rf"manifest\.json .*({words})"):
        TokenSet.open(tmp_path)
    put(tmp_path / JOURNAL_FILE)
    with pytest.raises(UserError, match=rf"{JOURNAL_FILE} .*({words}).*: use --force to start again"):
        Begun.read(tmp_path)


def journal_in(folder: Path) -> dict[str, Any]:
    """A journal whose training split has a shard."""
    source = {
        "name": "test", "settings": {"validation_files": None, "shard_tokens": 4},
        "files": [{"name": "a.jsonl", "bytes": 3, "digest": {"sha256": "00"}}],
    }  # fmt: skip
    plan = {"source": source, "tokenizer": ByteTokenizer().spec}
    journal = Journal(folder, plan, skip_bad=3)
    journal.splits["train"].shards = [Shard("train-00000.bin", 4, 1, 4, "0" * 64)]
    journal.save()
    return plan


JOURNALS: dict[str, tuple[Edit, str]] = {
    "no place": (lambda j: j["splits"]["train"].pop("next"), r"splits\.train\.next: it is missing"),
    "a place of two": (lambda j: j["splits"]["train"].update(next=[0, 0]), r"splits\.train\.next"),
    "a place before the start": (lambda j: j["splits"]["train"].update(next=[0, -1, 0, 0]), r"splits\.train\.next"),
    "last a number": (lambda j: j["splits"]["val"].update(last=3), r"splits\.val\.last"),
    "done a text": (lambda j: j["splits"]["val"].update(done="no"), "done: it is neither true nor false"),
    "no split": (lambda j: j["splits"].pop("val"), r"splits\.val: it is missing"),
    "another shard's name": (lambda j: j["splits"]["train"]["shards"][0].update(file="train-00001.bin"), "train-00001"),
    "files a number": (lambda j: j["plan"]["source"].update(files=3), r"source\.files: it is not a list"),
    "a file a text": (lambda j: j["plan"]["source"].update(files=["a"]), r"source\.files\.0: it is not an object"),
    "no settings": (lambda j: j["plan"]["source"].pop("settings"), r"source\.settings: it is missing"),
    "scope a text": (lambda j: j["plan"]["source"]["settings"].update(validation_files="1"), "validation_files: "),
    "tokenizer a text": (lambda j: j["plan"].update(tokenizer="byte"), r"plan\.tokenizer: it is not an object"),
    "skipped pairs": (lambda j: j.update(skipped=[[1, 2]]), r"skipped\.0\.0"),
    "skipped without a file": (lambda j: j.update(skipped=[[[0, 0, 0], {}]]), r"skipped\.0\.1\.file: it is missing"),
    "deep": (lambda j: j.update(plan="DEEP"), "not JSON: recursion limit"),
}  # fmt: skip


@pytest.mark.parametrize("name", JOURNALS)
def test_a_journal_of_another_shape_is_named_with_the_key(tmp_path: Path, name: str) -> None:
    edit, words = JOURNALS[name]
    plan = journal_in(tmp_path)
    found = Begun.read(tmp_path)
    assert found is not None and source_difference(found.plan["source"], plan["source"]) is None
    rewritten(tmp_path / JOURNAL_FILE, edit)
    with pytest.raises(UserError, match=rf"{JOURNAL_FILE} is damaged \(.*{words}.*\): use --force to start again"):
        Begun.read(tmp_path)


def test_a_source_without_files_differs_from_one_with(tmp_path: Path) -> None:
    assert source_difference({"files": None}, {"files": [{"name": "a"}]}) == "file a"


def test_a_journal_too_large_to_be_read_again_is_refused_before_the_first_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_prep.corpora.journal.MOST_BYTES", 200)
    with pytest.raises(UserError, match="put the documents into fewer files"):
        journal_in(tmp_path)


def test_a_folder_with_a_shards_name_costs_nobody_a_set(tmp_path: Path) -> None:
    make_token_set(tmp_path, train_tokens=500, val_tokens=100)
    (tmp_path / "train-00007.bin").mkdir()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"train-00007\.bin is a folder, but a file must be written there"):
        clear_token_set(tmp_path)
    (tmp_path / "manifest.json.0123abcd.tmp").mkdir()
    with pytest.raises(UserError, match=r"manifest\.json\.0123abcd\.tmp can't be removed"):
        _remove_leftovers(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "manifest.json.0123abcd.tmp"])


def test_a_shard_that_is_a_link_to_nothing_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("some words", encoding="utf-8")
    out = tmp_path / "out"
    out.mkdir()
    (out / "train-00000.bin").symlink_to("nowhere")
    options = ["--out", str(out), "--tokenizer", "byte", "--workers", "0", "--val-tokens", "0", "--force"]
    monkeypatch.setattr(sys, "argv", ["text_files.py", str(tmp_path / "a.txt"), *options])
    assert text_files.main() == 0
    assert TokenSet.open(out, verify="full").split("train").documents == 1
    assert not (out / "nowhere").exists()


def read_all(path: Path) -> list[Any]:
    reader = UnitReader(load_tokenizer("byte"))
    return [
        found
        for unit, about in enumerate(units(path, "text"))
        for found in reader.read_all(str(path), unit, "text", 0, about.rows)
    ]


@pytest.mark.parametrize("name", ["d.txt.gz", "d.json.gz"])
def test_a_damaged_stream_is_judged_where_its_documents_are_read(tmp_path: Path, name: str) -> None:
    """Looking at its beginning, and for its encoding, come before."""
    noise = bytes(range(32, 127)) * 40
    packed = bytearray(gzip.compress(b'{"text": "' + noise.replace(b'"', b"").replace(b"\\", b"") + b'"}\n', 0))
    packed[10] = 7  # the first block's kind: there is none such
    path = tmp_path / name
    path.write_bytes(packed)
    with pytest.raises(zlib.error):
        gzip.decompress(packed)
    assert is_utf8(path)
    assert [file.name for file in find_files([path], "text").files.listed] == [name]
    found = read_all(path)
    assert isinstance(found[-1], Unreadable) and isinstance(found[-1].error, zlib.error)


@pytest.mark.parametrize("compressed", [False, True])
def test_a_line_without_an_end_is_passed_over_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compressed: bool
) -> None:
    monkeypatch.setattr(inputs, "WHOLE_BYTES", 100)
    lines = b'{"text": "a"}\n' + b'{"text": "' + b"b" * 1_000 + b'"}\n{"text": "c"}\n'
    path = tmp_path / ("d.jsonl.bz2" if compressed else "d.jsonl")
    path.write_bytes(bz2.compress(lines) if compressed else lines)
    first, long, last = read_all(path)
    assert (first.text, last.text, last.row) == ("a", "c", 2)
    assert isinstance(long, Unreadable) and "1,013 bytes, more than the 100" in str(long.error)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["d.txt", "d.txt.gz"])
@pytest.mark.parametrize("byte", [b"\0", b"\x80"], ids=["zeros", "no UTF-8"])
def test_text_that_nothing_allows_to_cut_takes_no_memory_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, byte: bytes
) -> None:
    monkeypatch.setattr(inputs, "BLOCK_BYTES", 1 << 20)
    monkeypatch.setattr(inputs, "WHOLE_BYTES", 2 << 20)
    content = b"some text " * 10 + byte * (8 << 20)
    path = tmp_path / name
    path.write_bytes(gzip.compress(content, 1) if name.endswith(".gz") else content)
    found = read_all(path)
    assert any(isinstance(item, Unreadable) and "without a place to cut it" in str(item.error) for item in found)
    assert max((len(item.text) for item in found if not isinstance(item, Unreadable)), default=0) < 3 << 20


CARDS = {
    "a number": "configs: 3\n",
    "entries are texts": "configs: [a, b]\n",
    "files a number": "configs: [{config_name: default, data_files: 3}]\n",
    "paths null": "configs: [{config_name: default, data_files: [{split: train, path: null}]}]\n",
    "deep": "configs: " + DEEP + "\n",
    "itself": "configs: &c [*c]\n",
    "a bomb": "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 10)}]\n" for i in range(7)
    ),
    "no date": "configs: [{config_name: 2024-13-45}]\n",
}  # fmt: skip


@pytest.mark.parametrize("name", CARDS)
def test_a_card_of_another_shape_is_named(tmp_path: Path, name: str) -> None:
    write_parquet(tmp_path / "d.parquet", ["words"])
    (tmp_path / "README.md").write_text(f"---\n{CARDS[name]}---\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"README\.md is a data set's card that can't be read"):
        local_parquet(tmp_path, "default")


def test_a_configuration_named_like_a_number_is_found(tmp_path: Path) -> None:
    write_parquet(tmp_path / "2024.parquet", ["words"])
    card = "configs: [{config_name: 2023, data_files: x.parquet}, {config_name: 2024, data_files: 2024.parquet}]"
    (tmp_path / "README.md").write_text(f"---\nmade: 2024-01-01\n{card}\n---\n", encoding="utf-8")
    assert local_parquet(tmp_path, "2024").files.listed[0].name == "2024.parquet"


@pytest.mark.parametrize("name", ["../x.parquet", "/x.parquet", "a/../../x.parquet", "a//x.parquet", "a\\x", ""])
def test_a_hubs_file_stays_in_its_folder(tmp_path: Path, name: str) -> None:
    source = HubSource("some/set", "default", "0" * 40, (InputFile(name, 1, {}),))
    with pytest.raises(UserError, match=r"some/set lists .*, which is not a name inside a"):
        HubFiles(source, tmp_path, keep=False)
