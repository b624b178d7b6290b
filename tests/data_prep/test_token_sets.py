"""The writer, the manifest and the reader of token sets, and the check of a set."""

import hashlib
import json
import os
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from common.publish import sha256_file
from data_prep.corpora.preparation import finish_set
from data_prep.token_sets.manifest import Manifest, Shard, token_dtype
from data_prep.token_sets.shard_writer import ShardWriter, clear_token_set
from data_prep.token_sets.token_set import TokenSet
from data_prep.tokenization.loading import load_tokenizer
from data_prep.tokenization.tokenizer import ByteTokenizer, CharTokenizer
from tests.helpers.token_sets import char_tokenizer, make_token_set

PROJECT = Path(__file__).resolve().parents[2]


def write_parts(folder, parts, shard_tokens, tokenizer=None):
    tokenizer = tokenizer or ByteTokenizer()
    with ShardWriter(folder, "train", tokenizer, shard_tokens) as writer:
        for part in parts:
            writer.write(np.array(part, dtype=tokenizer.dtype))
    finish_set(folder, tokenizer, {"name": "test"}, [], {"train": tuple(writer.shards), "val": ()})
    return TokenSet.open(folder, verify="full")


@settings(max_examples=60, deadline=None)
@given(
    parts=st.lists(st.lists(st.integers(0, 256), max_size=9), max_size=12),
    shard_tokens=st.integers(1, 11),
    data=st.data(),
)
def test_what_was_written_is_read_whatever_the_shards(parts, shard_tokens, data, tmp_path_factory):
    tokens = [token for part in parts for token in part]
    opened = write_parts(tmp_path_factory.mktemp("set"), parts, shard_tokens)
    sizes = [shard.tokens for shard in opened.manifest.splits["train"]]
    full, rest = divmod(len(tokens), shard_tokens)
    assert sizes == [shard_tokens] * full + [rest] * (rest > 0)
    stream = opened.split("train")
    assert (len(stream), stream.documents) == (len(tokens), tokens.count(256))
    assert stream.bytes == len(tokens) - tokens.count(256)
    start = data.draw(st.integers(0, len(tokens)))
    stop = data.draw(st.integers(start, len(tokens)))
    read = stream.read(start, stop)
    assert read.dtype == np.uint16
    assert read.tolist() == tokens[start:stop]


def test_shards_are_headerless_little_endian(tmp_path):
    write_parts(tmp_path, [[1, 256]], 10)
    assert (tmp_path / "train-00000.bin").read_bytes() == b"\x01\x00\x00\x01"


def test_uint32_where_the_vocabulary_needs_it(tmp_path):
    assert (token_dtype(65536), token_dtype(65537)) == (np.dtype("<u2"), np.dtype("<u4"))
    tokenizer = CharTokenizer("".join(map(chr, range(0x10000, 0x10000 + 65537))))
    opened = write_parts(tmp_path, [[0, 65536, 7]], 2, tokenizer)
    assert (tmp_path / "train-00000.bin").read_bytes() == b"\0\0\0\0\0\0\1\0"
    assert opened.split("train").read(0, 3).tolist() == [0, 65536, 7]
    assert opened.manifest.dtype == "uint32"


def test_reading_outside_is_refused(tmp_path):
    stream = make_token_set(tmp_path, train_tokens=10, val_tokens=0).split("train")
    for start, stop in [(-1, 2), (5, 11), (3, 2)]:
        with pytest.raises(IndexError):
            stream.read(start, stop)
    assert len(TokenSet.open(tmp_path).split("val")) == 0


def test_identity_is_the_data_and_how_to_read_it(tmp_path):
    first = make_token_set(tmp_path / "a", seed=1)
    assert make_token_set(tmp_path / "b", seed=1).identity == first.identity
    others = [
        make_token_set(tmp_path / "c", seed=2),
        make_token_set(tmp_path / "d", seed=1, shard_tokens=7_000),
        make_token_set(tmp_path / "e", seed=1, tokenizer=char_tokenizer(257)),
    ]
    assert len({first.identity, *(other.identity for other in others)}) == 4
    assert str(tmp_path) not in (tmp_path / "a" / "manifest.json").read_text()


def edit_manifest(folder: Path, **changes: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def truncate(folder: Path) -> None:
    os.truncate(folder / "train-00001.bin", 100)


BROKEN = {
    "missing": (lambda folder: [path.unlink() for path in folder.iterdir()], "holds no token set yet: make one with"),
    "of another": (
        lambda folder: [path.rename(folder / f"{path.stem}.txt") for path in folder.iterdir()],
        "holds no token set .*the right folder",
    ),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "incomplete"),
    "not complete": (lambda folder: edit_manifest(folder, complete=False), "incomplete"),
    "torn manifest": (lambda folder: (folder / "manifest.json").write_text('{"comp'), "is damaged .*not JSON"),
    "other format": (lambda folder: edit_manifest(folder, format_version=99), "format 99"),
    "shard missing": (lambda folder: (folder / "train-00001.bin").unlink(), "train-00001.bin is missing"),
    "shard truncated": (truncate, "train-00001.bin has 100 bytes"),
    "shard unlisted": (lambda folder: (folder / "train-00009.bin").write_bytes(b"12"), "train-00009.bin is not in"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_wrong_set_is_refused_in_one_line(name, tmp_path):
    breaking, message = BROKEN[name]
    make_token_set(tmp_path)
    breaking(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        TokenSet.open(tmp_path)
    assert "\n" not in str(error.value)


def edit_shard(folder: Path, split: str, index: int, **changes: object) -> None:
    splits = json.loads((folder / "manifest.json").read_text())["splits"]
    splits[split][index] |= changes
    edit_manifest(folder, splits=splits)


def list_twice(folder: Path, split: str) -> None:
    splits = json.loads((folder / "manifest.json").read_text())["splits"]
    splits[split].append(splits["train"][0])
    edit_manifest(folder, splits=splits)


UNTRUE = {
    "twice in a split": (lambda folder: list_twice(folder, "train"), "train-00000.bin is listed twice"),
    "in two splits": (lambda folder: list_twice(folder, "val"), "train-00000.bin is listed twice"),
    "val_sha256 no hash": (lambda folder: edit_manifest(folder, val_sha256=[]), "val_sha256: it is not text"),
    "sha256 no hash": (
        lambda folder: edit_shard(folder, "train", 1, sha256=None),
        r"splits\.train\.1\.sha256: it is not text",
    ),
    "elsewhere": (lambda folder: edit_shard(folder, "train", 1, file="../x.bin"), "'../x.bin' is not a shard's name"),
    "negative": (lambda folder: edit_shard(folder, "train", 1, tokens=-1), r"train\.1\.tokens: .*greater than 0"),
    "a text": (
        lambda folder: edit_shard(folder, "val", 0, documents="7"),
        r"val\.0\.documents: it is not a whole number",
    ),
    "true": (lambda folder: edit_shard(folder, "val", 0, bytes=True), r"val\.0\.bytes: it is not a whole number"),
    "other dtype": (
        lambda folder: edit_manifest(folder, dtype="float16"),
        "dtype is 'float16' for a vocabulary of 257",
    ),
    "no split": (lambda folder: edit_manifest(folder, splits={"train": []}), "there is no split val"),
}


@pytest.mark.parametrize("name", UNTRUE)
def test_a_manifest_that_can_not_be_true_is_refused(name, tmp_path):
    breaking, message = UNTRUE[name]
    make_token_set(tmp_path)
    breaking(tmp_path)
    with pytest.raises(UserError, match=f"manifest.json is damaged .*{message}"):
        TokenSet.open(tmp_path)


def test_full_verification_recomputes_the_validation_hash(tmp_path):
    """Over several shards, none of which has it as its own."""
    opened = make_token_set(tmp_path / "set", val_tokens=200, shard_tokens=100)
    assert len({opened.manifest.val_sha256, *(shard.sha256 for shard in opened.manifest.splits["val"])}) == 3
    TokenSet.open(tmp_path / "set", verify="full")
    edit_manifest(tmp_path / "set", val_sha256=opened.manifest.val_sha256[::-1])
    with pytest.raises(UserError, match="not its manifest's val_sha256"):
        TokenSet.open(tmp_path / "set", verify="full")
    bad = run_verify(tmp_path / "set")
    assert (bad.returncode, bad.stdout.count("\n")) == (1, 1)
    assert f"val_sha256 is {opened.manifest.val_sha256[::-1][:16]}…, the validation split's is" in bad.stdout


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[1001] ^= 1  # high byte: ids move by 256
    path.write_bytes(data)


def test_full_verification_finds_a_flipped_bit(tmp_path):
    make_token_set(tmp_path)
    flip_a_byte(tmp_path / "train-00001.bin")
    TokenSet.open(tmp_path)
    with pytest.raises(UserError, match=r"train-00001\.bin is not what was written"):
        TokenSet.open(tmp_path, verify="full")


def run_verify(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(PROJECT / "data_prep" / "verify.py"), str(folder), *options]
    return subprocess.run(command, cwd=folder.parent, capture_output=True, text=True, timeout=60)


def test_verify_passes_a_good_set_and_names_all_that_is_broken(tmp_path):
    folder = tmp_path / "set"
    make_token_set(folder)
    good = run_verify(folder, "--json", str(tmp_path / "result.json"))
    assert good.returncode == 0, good.stderr
    assert "4 shards, 22.0K tokens, all is well" in good.stdout
    assert json.loads((tmp_path / "result.json").read_text())["problems"] == []
    flip_a_byte(folder / "train-00000.bin")
    os.truncate(folder / "train-00001.bin", 101)
    (folder / "val-00000.bin").unlink()
    (folder / "train-00007.bin").write_bytes(b"")
    bad = run_verify(folder)
    assert bad.returncode == 1
    for name in ("train-00000.bin", "train-00001.bin", "train-00007.bin", "val-00000.bin"):
        assert name in bad.stdout
    assert "train-00002.bin" not in bad.stdout
    assert run_verify(tmp_path / "nowhere").returncode == 2


def test_verify_finds_ids_outside_the_vocabulary_and_wrong_counts(tmp_path):
    make_token_set(tmp_path / "set")
    manifest = json.loads((tmp_path / "set" / "manifest.json").read_text())
    manifest["tokenizer"]["vocab_size"] = 200
    del manifest["vocabulary"]  # as in a set of 0.1.0: it would contradict that
    manifest["splits"]["val"][0]["documents"] += 1
    manifest["splits"]["train"][1]["bytes"] += 1
    (tmp_path / "set" / "manifest.json").write_text(json.dumps(manifest))
    bad = run_verify(tmp_path / "set")
    assert "token id 256 is outside the vocabulary of 200" in bad.stdout
    assert "documents start in it" in bad.stdout
    assert re.search(r"train-00001\.bin \(train\): its tokens stand for [\d,]+ bytes of text, not ", bad.stdout)
    assert "its tokenizer's vocab_size is not that of the tokenizer here" in bad.stdout


def test_verify_counts_the_one_document_of_a_split_without_ends_of_text(tmp_path):
    opened = make_token_set(tmp_path / "set", tokenizer=CharTokenizer("abcdefgh"))
    assert run_verify(tmp_path / "set").returncode == 0
    assert [shard.documents for shard in opened.manifest.splits["train"]] == [1, 0, 0]
    edit_shard(tmp_path / "set", "train", 2, documents=3)
    assert "0 documents start in it, not 3" in run_verify(tmp_path / "set").stdout


def test_a_shard_truncated_while_open_is_named(tmp_path):
    stream = make_token_set(tmp_path).split("train")
    truncate(tmp_path)
    assert len(stream.read(0, 100)) == 100
    with pytest.raises(UserError, match=r"train-00001\.bin changed"):
        stream.read(9_000, 9_100)


def test_reading_a_large_set_keeps_memory_and_opens_few_files(tmp_path):
    tokenizer = ByteTokenizer()
    block = np.zeros(40_000_000, dtype=np.uint16)
    with ShardWriter(tmp_path, "train", tokenizer, 100_000_000) as writer:
        for _ in range(10):
            writer.write(block)
    finish_set(tmp_path, tokenizer, {"name": "test"}, [], {"train": tuple(writer.shards), "val": ()})
    stream = TokenSet.open(tmp_path).split("train")
    process = psutil.Process()
    before, files = process.memory_info().rss, process.num_fds()
    largest = 0
    for start in range(0, len(stream) - 8_192, 8_192):  # all 800 MB
        stream.read(start, start + 8_193)
        if start % (8_192 * 64) == 0:
            largest = max(largest, process.memory_info().rss - before)
    assert largest < 200 << 20
    assert process.num_fds() == files
    clear_token_set(tmp_path)  # 800 MB that pytest would keep


def test_more_shards_than_the_soft_limit_of_open_files(tmp_path):
    code = (
        "import resource, sys; from pathlib import Path\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))\n"
        "from data_prep.token_sets.token_set import TokenSet\n"
        "stream = TokenSet.open(Path(sys.argv[1])).split('train'); print(len(stream.read(0, len(stream))))"
    )
    make_token_set(tmp_path, train_tokens=300, val_tokens=10, shard_tokens=2)
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=PROJECT, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "300", done.stderr


def test_disk_full_is_one_line_and_published_shards_stay(tmp_path):
    code = (
        "import resource, sys, numpy as np; from pathlib import Path\n"
        "from common.errors import exit_on_user_error\n"
        "from data_prep.token_sets.shard_writer import ShardWriter\n"
        "from data_prep.tokenization.tokenizer import ByteTokenizer\n"
        "def main():\n"
        "    with ShardWriter(Path(sys.argv[1]), 'train', ByteTokenizer(), 1000) as writer:\n"
        "        writer.write(np.zeros(1500, dtype=np.uint16))\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (1200, 1200))\n"
        "        writer.write(np.zeros(1500, dtype=np.uint16))\n"
        "exit_on_user_error(main)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=PROJECT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "the disk is full" in done.stderr
    assert done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["train-00000.bin"]


def test_finishing_a_set_reads_its_validation_shards_in_blocks(tmp_path):
    (tmp_path / "val-00000.bin").write_bytes(b"")
    os.truncate(tmp_path / "val-00000.bin", 64 << 20)
    splits = {"train": (), "val": (Shard("val-00000.bin", 32 << 20, 0, 0, ""),)}
    tokenizer = ByteTokenizer()
    tracemalloc.start()
    manifest = finish_set(tmp_path, tokenizer, {"name": "test"}, [], splits)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert manifest.val_sha256 == sha256_file(tmp_path / "val-00000.bin")
    assert manifest.val_text_sha256 == hashlib.sha256(bytes(32 << 20)).hexdigest()
    assert peak < 8 << 20


def test_the_hash_of_the_validation_text_is_the_same_whatever_its_tokens(tmp_path):
    documents = ["naïve café 日本語 😀\n", "def x():\n    return 1", "", "a" * 70_000]
    text = "".join(documents)
    tokenizers = [ByteTokenizer(), CharTokenizer("".join(sorted(set(text)))), load_tokenizer("gpt2")]
    found = set()
    for number, tokenizer in enumerate(tokenizers):
        folder = tmp_path / str(number)
        folder.mkdir()
        with ShardWriter(folder, "val", tokenizer, 30_000) as writer:
            for document in documents:
                writer.write(np.concatenate([tokenizer.opening, tokenizer.encode(document)]))
        manifest = finish_set(folder, tokenizer, {"name": "test"}, [], {"train": (), "val": tuple(writer.shards)})
        found.add(manifest.val_text_sha256)
        assert Manifest.read(folder) == manifest

    assert found == {hashlib.sha256(text.encode()).hexdigest()}


def test_clearing_touches_only_the_sets_own_files(tmp_path):
    make_token_set(tmp_path)
    for name in ("notes.txt", "train-1.bin", "train-00000.bin.tmp", "train-100000.bin"):
        (tmp_path / name).write_text("x")
    clear_token_set(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "train-1.bin"]


def test_a_file_in_place_of_a_set_is_told(tmp_path):
    (tmp_path / "mine.txt").write_text("text")
    with pytest.raises(UserError, match=r"mine\.txt is a file: a token set is a folder"):
        TokenSet.open(tmp_path / "mine.txt")


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("fineweb-edu", "python data_prep/fineweb.py --out FOLDER' (10 billion tokens"),
        ("demo", "python data_prep/docstrings.py --tokenizer gpt2-8k --out FOLDER'"),
        ("docstrings", "python data_prep/docstrings.py --out FOLDER'"),
        ("mine", "python data_prep/text_files.py … --out FOLDER' from your own texts"),
    ],
)
def test_a_missing_set_names_what_makes_it(name: str, command: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        TokenSet.open(tmp_path / name)
    assert command.replace("FOLDER", str(tmp_path / name)) in str(raised.value)
