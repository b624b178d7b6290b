"""Corpora out of many files: what comes out, whatever is interrupted, and who notices what is wrong."""

import argparse
import contextlib
import errno
import gzip
import io
import json
import os
import shutil
import signal
import threading
from dataclasses import replace
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from data_prep.corpora import readers as inputs
from data_prep.corpora.corpus import Corpus, Settings, prepare
from data_prep.corpora.encode_pool import START_METHODS, EncodePool
from data_prep.corpora.encode_worker import Selection, Work
from data_prep.corpora.journal import JOURNAL_FILE, Begun
from data_prep.corpora.local_files import LocalFiles
from data_prep.corpora.preparation import chosen_for_validation, finish_set, positive_count
from data_prep.token_sets.shard_writer import ShardWriter
from data_prep.token_sets.shared_documents import shared_documents
from data_prep.token_sets.token_set import TokenSet
from data_prep.tokenization.loading import load_tokenizer
from data_prep.tokenization.tokenizer import ByteTokenizer
from data_prep.verify import set_problems
from tests.helpers.parquet_files import make_source, texts, write_parquet

ONE_IN = 4


@pytest.fixture(scope="module", autouse=True)
def own_fork_server():
    """One that other tests have started holds torch for their ranks; theirs must not be this module's, without it."""
    stop = forkserver._forkserver._stop  # type: ignore[attr-defined] # made for unit tests
    stop()
    yield
    stop()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder of three small parquet files, and their documents."""
    folder = tmp_path_factory.mktemp("source")
    return folder, make_source(folder, files=3, documents=120, row_group=50)


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """The same with a fourth file, of copies of the first one's documents; every second one has more behind it."""
    folder = tmp_path_factory.mktemp("copied")
    documents = make_source(folder, files=3, documents=120, row_group=50)
    documents.append([text + " copied" * (number % 2) for number, text in enumerate(documents[0][:60])])
    write_parquet(folder / "sample" / "10BT" / "copies.parquet", documents[-1])
    return folder, documents


def settings_for(shard_tokens, val_tokens, max_tokens, files=1):
    return Settings(shard_tokens, val_tokens, max_tokens, "text", "byte", ONE_IN, files)


def corpus_of(folder, chosen, tokenizer=None):
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*.parquet")]
    return Corpus("test", {}, LocalFiles(folder, names), chosen, tokenizer or ByteTokenizer())


def expected(documents, tokenizer, chosen):
    """Both splits, told the plain way: one document after the other, in lists."""
    val: list[int] = []
    rest: list[tuple[str, list[int]]] = []
    starts: set[str] = set()
    for number, file in enumerate(documents):
        for text in filter(None, file):
            ids = [tokenizer.end_of_text_id, *tokenizer.encode(text).tolist()]
            may_validate = chosen.validation_files is None or number < chosen.validation_files
            if may_validate and len(val) < chosen.val_tokens and chosen_for_validation(text, ONE_IN):
                val += ids
                starts.add(text[:200])
            else:
                rest.append((text[:200], ids))
    train = [i for start, ids in rest if start not in starts for i in ids]
    return {"train": train[: chosen.max_tokens], "val": val[: chosen.val_tokens]}


def content(folder):
    opened = TokenSet.open(folder, verify="full")
    return {name: opened.split(name).read(0, len(opened.split(name))).tolist() for name in ("train", "val")}


def folder_bytes(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


class Interrupted(Exception):
    pass


class InterruptedFiles(LocalFiles):
    """Files whose reading is broken off after so many shards, as by a signal."""

    shards_left = 0

    def done_with(self, index):
        self.shards_left -= 1
        if self.shards_left == 0:
            raise Interrupted


@given(
    shard_tokens=st.integers(4_000, 40_000),
    val_tokens=st.sampled_from([0, 1, 700, 5_000, 10**9]),
    max_tokens=st.sampled_from([None, 1, 999, 20_000, 10**9]),
    files=st.sampled_from([1, 2, None]),
    stops=st.lists(st.integers(1, 8), max_size=3),
)
@settings(max_examples=15, deadline=None)
def test_the_set_is_the_plain_one_whatever_the_sizes_and_stops(
    shard_tokens, val_tokens, max_tokens, files, stops, copied, tmp_path_factory
):
    folder, documents = copied
    out = tmp_path_factory.mktemp("out")
    chosen = settings_for(shard_tokens, val_tokens, max_tokens, files)
    corpus = corpus_of(folder, chosen)
    for stop in stops:
        broken = InterruptedFiles(folder, [file.name for file in corpus.files.listed])
        broken.shards_left = stop
        try:
            prepare(replace(corpus, files=broken), out, 0, "")
        except Interrupted:
            assert not (out / "manifest.json").exists()
        else:
            break
    prepare(corpus, out, 0, "")
    assert content(out) == expected(documents, ByteTokenizer(), chosen)
    sizes = [shard.tokens for shard in TokenSet.open(out).manifest.splits["train"]]
    assert all(size == shard_tokens for size in sizes[:-1])
    assert not list(out.glob("*.tmp")) + list(out.glob("preparing.json"))


@pytest.mark.parametrize(
    ("text", "count"),
    [("100_000", 100_000), ("1e9", 10**9), ("2.01M", 2_010_000), ("1.5B", 1_500_000_000), ("7k", 7_000)],
)
def test_amounts_as_people_write_them(text, count):
    assert positive_count(text) == count


@pytest.mark.parametrize("text", ["inf", "nan", "many", "", "K", "0", "-3", "0.5", "1.0001K"])
def test_no_amounts(text):
    with pytest.raises(argparse.ArgumentTypeError):
        positive_count(text)


def test_an_interruption_costs_at_most_a_shard(source, tmp_path):
    folder, _ = source
    chosen = settings_for(5_000, 2_000, None)
    corpus = corpus_of(folder, chosen)
    broken = InterruptedFiles(folder, [file.name for file in corpus.files.listed])
    broken.shards_left = 6
    with pytest.raises(Interrupted):
        prepare(replace(corpus, files=broken), tmp_path, 0, "")
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.bin")}
    assert len(before) == 7
    prepare(corpus, tmp_path, 0, "")
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in before} == before
    assert len(list(tmp_path.glob("train-*.bin"))) > 7


def test_validation_is_the_same_for_any_prefix_and_shard_size(source, tmp_path):
    folder, _ = source
    found = set()
    for shard_tokens, max_tokens in [(5_000, None), (700, 1_000), (9_999, 12_345)]:
        out = tmp_path / f"{shard_tokens}"
        out.mkdir()
        found.add(prepare(corpus_of(folder, settings_for(shard_tokens, 3_000, max_tokens)), out, 0, "").val_sha256)
    assert len(found) == 1


def test_what_validation_leaves_of_a_long_text_is_not_trained_on(tmp_path, monkeypatch):
    """A text file of many blocks is one document: what follows the last validation token belongs to neither split."""
    monkeypatch.setattr(inputs, "BLOCK_BYTES", 2_000)
    out, names = tmp_path / "out", ["a.txt", "b.txt", "c.txt"]
    out.mkdir()
    found = texts(200, seed=4, mean_words=400)
    chosen = next(text for text in found[6:] if chosen_for_validation(text, ONE_IN))
    first, last = [text for text in found[6:] if not chosen_for_validation(text, ONE_IN)][:2]
    for name, text in zip(names, (first, chosen * 5, last), strict=True):
        (tmp_path / name).write_text(text)
    corpus = Corpus("test", {}, LocalFiles(tmp_path, names), settings_for(10**6, 700, None, None), ByteTokenizer())
    prepare(corpus, out, 0, "")
    assert len(inputs.units(tmp_path / "b.txt", "text")) > 4
    end = ByteTokenizer().end_of_text_id
    assert content(out) == {
        "val": [end, *(chosen * 5).encode()][:700],
        "train": [end, *first.encode(), end, *last.encode()],
    }


@pytest.mark.parametrize("method", START_METHODS)
def test_workers_and_start_methods_change_nothing(method, source, tmp_path):
    folder, _ = source
    corpus = corpus_of(folder, settings_for(6_000, 2_000, 50_000), load_tokenizer("gpt2"))
    sets = []
    for workers in (0, 3) if method == "forkserver" else (0, 1):
        out = tmp_path / str(workers)
        out.mkdir()
        prepare(corpus, out, workers, method)
        sets.append(folder_bytes(out))
    assert sets[0] == sets[1]


def test_a_journal_of_other_settings_or_another_source_is_refused(source, tmp_path):
    folder, _ = source
    copy, out = tmp_path / "copy", tmp_path / "out"
    shutil.copytree(folder, copy)
    out.mkdir()
    corpus = corpus_of(copy, settings_for(5_000, 1_000, None))
    broken = InterruptedFiles(copy, [file.name for file in corpus.files.listed])
    broken.shards_left = 2
    with pytest.raises(Interrupted):
        prepare(replace(corpus, files=broken), out, 0, "")
    with pytest.raises(UserError, match=r"another shard_tokens \(5000, now 6000\)"):
        prepare(corpus_of(copy, settings_for(6_000, 1_000, None)), out, 0, "")
    with pytest.raises(UserError, match="--force"):
        prepare(corpus_of(copy, settings_for(5_000, 1_000, None), load_tokenizer("gpt2")), out, 0, "")
    write_parquet(copy / "sample" / "10BT" / "000_00000.parquet", texts(100, seed=9))
    with pytest.raises(UserError, match=r"another file sample/10BT/000_00000\.parquet"):
        prepare(corpus_of(copy, settings_for(5_000, 1_000, None)), out, 0, "")


@pytest.mark.parametrize("plan", ['{"source": []}', '{"source": null}', "{}", "[]", "3"])
def test_a_journal_that_is_none_is_refused(tmp_path, plan):
    (tmp_path / JOURNAL_FILE).write_text(f'{{"splits": {{}}, "plan": {plan}}}')
    with pytest.raises(UserError, match=r"is damaged .*: use --force to start again"):
        Begun.read(tmp_path)


def test_a_journal_without_shards_holds_nobody_to_its_settings(source, tmp_path):
    """A mistaken --field, say, seen before the first shard: the corrected command needs no --force."""
    folder, _ = source
    corpus = corpus_of(folder, settings_for(5_000, 1_000, None))
    out, fresh = tmp_path / "out", tmp_path / "fresh"
    out.mkdir()
    fresh.mkdir()
    with pytest.raises(UserError, match="no column"):
        prepare(replace(corpus, settings=replace(corpus.settings, field="body")), out, 0, "")
    prepare(corpus, out, 0, "")
    prepare(corpus, fresh, 0, "")
    assert folder_bytes(out) == folder_bytes(fresh)


def test_a_published_shard_that_was_hurt_is_noticed(source, tmp_path):
    folder, _ = source
    corpus = corpus_of(folder, settings_for(5_000, 0, None))
    broken = InterruptedFiles(folder, [file.name for file in corpus.files.listed])
    broken.shards_left = 3
    with pytest.raises(Interrupted):
        prepare(replace(corpus, files=broken), tmp_path, 0, "")
    data = bytearray((tmp_path / "train-00002.bin").read_bytes())
    data[0] ^= 1
    (tmp_path / "train-00002.bin").write_bytes(data)
    with pytest.raises(UserError, match=r"train-00002\.bin is not what was written"):
        prepare(corpus, tmp_path, 0, "")


def work_on(path, group, rows, number=0):
    return Work(0, str(path), path.name, group, 0, rows, "text", Selection("train"), number)


def test_parts_come_in_order_and_what_waits_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("data_prep.corpora.encode_pool.BUFFERED_BYTES", 1)
    path = tmp_path / "d.parquet"
    write_parquet(path, texts(2_000, seed=1), row_group=20)
    tokenizer = ByteTokenizer()
    with EncodePool(tokenizer, 3) as pool:
        works = (work_on(path, group, 20, group) for group in range(100))
        order = []
        for part in pool.run(works):
            order.append(part.work.unit)
            waiting = sum(worker.buffered_bytes for worker in pool._workers)
            assert waiting < 3 * 200_000
    assert order == sorted(order)
    assert set(order) == set(range(100))


def test_a_killed_worker_ends_the_work_and_says_where(tmp_path):
    path = tmp_path / "d.parquet"
    write_parquet(path, texts(3_000, seed=1), row_group=1_000)
    with EncodePool(load_tokenizer("gpt2"), 2) as pool:
        parts = pool.run(work_on(path, number % 3, 1_000) for number in range(10_000))
        next(parts)
        os.kill(pool.process_ids[1], signal.SIGKILL)
        with pytest.raises(UserError, match=r"worker 1 was killed by SIGKILL at d\.parquet, row group \d, row \d+"):
            for _ in parts:
                pass
    assert not [pid for pid in pool.process_ids if psutil.pid_exists(pid)]


def test_a_damaged_row_group_is_named(tmp_path):
    path = tmp_path / "d.parquet"
    write_parquet(path, texts(300, seed=1), row_group=100)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle - 2_000 : middle + 2_000] = b"\xff" * 4_000
    path.write_bytes(data)
    with EncodePool(ByteTokenizer(), 2) as pool, pytest.raises(UserError, match=r"d\.parquet, row group 1, row \d+: "):
        list(pool.run(work_on(path, group, 100) for group in range(3)))


def test_memory_stays_small_for_a_row_group_of_any_size(tmp_path):
    """One row group of 100 MB of text: each worker under 150 MiB of its own, the parent far under 2 GiB."""
    path, out = tmp_path / "big" / "d.parquet", tmp_path / "out"
    write_parquet(path, texts(1_000, seed=1, mean_words=400) * 40, row_group=1 << 20)
    out.mkdir()
    peak = {"parent": 0, "worker": 0}
    stop = threading.Event()
    me = psutil.Process()
    before = me.memory_info().rss

    def watch():
        while not stop.wait(0.05):
            peak["parent"] = max(peak["parent"], me.memory_info().rss - before)
            for child in me.children(recursive=True):
                try:
                    peak["worker"] = max(peak["worker"], child.memory_full_info().uss)
                except psutil.Error:
                    continue

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        manifest = prepare(corpus_of(path.parent, settings_for(50_000_000, 1_000, None)), out, 2, START_METHODS[0])
    finally:
        stop.set()
        watching.join()
    assert manifest.total("train", "bytes") > 80 << 20
    assert 0 < peak["worker"] < 150 << 20
    assert peak["parent"] < 600 << 20
    for shard in out.glob("*.bin"):
        shard.unlink()  # half a gigabyte that pytest would keep


def test_the_journal_is_json_without_paths(source, tmp_path):
    folder, _ = source
    broken = InterruptedFiles(folder, [p.relative_to(folder).as_posix() for p in folder.rglob("*.parquet")])
    broken.shards_left = 2
    corpus = replace(corpus_of(folder, settings_for(5_000, 1_000, None)), files=broken)
    with pytest.raises(Interrupted):
        prepare(corpus, tmp_path, 0, "")
    text = (tmp_path / "preparing.json").read_text()
    assert str(folder) not in text
    assert len(json.loads(text)["splits"]["train"]["shards"]) == 2


def test_nothing_to_train_on_is_one_line(tmp_path):
    write_parquet(tmp_path / "in" / "d.parquet", ["", "", ""])
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="too little text"):
        prepare(corpus_of(tmp_path / "in", settings_for(100, 10, None)), Path(tmp_path / "out"), 0, "")


def damaged_source(folder):
    """Files of every kind with something that can't be read; returns what a skipping preparation lists of it."""
    folder.mkdir()
    lines = [json.dumps({"text": text}).encode() for text in texts(120, seed=21, mean_words=20)]
    lines[30], lines[31], lines[90] = b'{"text": "torn', b'{"words": "elsewhere"}', b'{"text": "caf\xe9"}'
    (folder / "a.jsonl").write_bytes(b"\n".join(lines))
    whole = gzip.compress(b"\n".join(json.dumps({"text": text}).encode() for text in texts(400, seed=22)))
    (folder / "b.jsonl.gz").write_bytes(whole[: len(whole) * 9 // 10])
    (folder / "c.txt.gz").write_bytes(gzip.compress(" ".join(texts(400, seed=23)).encode())[:-2_000])
    table = pa.table({"text": [f"row {number} " + "words " * 40 for number in range(300)]})
    options = {"compression": "none", "use_dictionary": False, "write_page_checksum": True, "write_batch_size": 10}
    pq.write_table(table, folder / "d.parquet", row_group_size=100, data_page_size=2_000, **options)
    data = (folder / "d.parquet").read_bytes().replace(b"row 180 ", b"rOw 180 ")
    (folder / "d.parquet").write_bytes(data)
    (folder / "e.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts(120, seed=24)))
    names = ["a.jsonl", "b.jsonl.gz", "c.txt.gz", "d.parquet", "e.jsonl"]
    return names, [{"file": "a.jsonl", "line": line} for line in (31, 32, 91)]


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_what_can_not_be_read_is_skipped_and_listed_whatever_happens(method, tmp_path, monkeypatch):
    """The same set and the same list for any number of processes and stops; blocks of 2 KB under fork."""
    if method == "fork":
        monkeypatch.setattr(inputs, "BLOCK_BYTES", 2_000)
        monkeypatch.setattr("data_prep.corpora.corpus.WORK_BYTES", 3_000)  # row groups are shared
    source, out = tmp_path / "source", tmp_path / "out"
    names, lines = damaged_source(source)
    corpus = Corpus("test", {}, LocalFiles(source, names), settings_for(4_000, 6_000, None, None), ByteTokenizer())
    sets = []
    for workers in (0, 3):
        out = tmp_path / f"{workers}"
        out.mkdir()
        manifest = prepare(corpus, out, workers, method, skip_bad=6)
        sets.append(folder_bytes(out))
    for stop in (1, 3, 9):
        (out := tmp_path / f"stopped {stop}").mkdir()
        for left in (stop, 4, 7):
            broken = InterruptedFiles(source, names)
            broken.shards_left = left
            with contextlib.suppress(Interrupted):
                prepare(replace(corpus, files=broken), out, 0, method, skip_bad=6)
        prepare(corpus, out, 0, method, skip_bad=6)
        sets.append(folder_bytes(out))
    assert all(found == sets[0] for found in sets)
    skipped = manifest.source["skipped"]
    assert skipped[:3] == lines
    assert [(entry["file"], entry["rest"]) for entry in skipped[3:]] == [
        ("b.jsonl.gz", True), ("c.txt.gz", True), ("d.parquet", True),
    ]  # fmt: skip
    assert 250 < skipped[3]["line"] < 400
    assert (skipped[5]["row_group"], skipped[5]["row"]) == (1, 64)  # rows are decoded 64 at once
    decoded = "".join(ByteTokenizer().decode(tokens) for tokens in content(out).values())
    assert decoded.count("row ") == 200 + skipped[5]["row"]
    (few := tmp_path / "few").mkdir()
    with pytest.raises(UserError, match=r"more than --skip-bad 5 can't be read: a.jsonl line 31, .*: fix or remove"):
        prepare(corpus, few, 0, method, skip_bad=5)
    first = replace(corpus, settings=settings_for(4_000, 0, 2_000, None))
    for allowed in (0, 6):  # what comes after the last token is not this set's
        (some := tmp_path / f"some {allowed}").mkdir()
        assert "skipped" not in prepare(first, some, 3, method, skip_bad=allowed).source


def test_a_mended_file_is_read_where_no_shard_has_read_it(tmp_path):
    """The end is that of a set made of the files as they are at last; files that a shard rests on must not change."""
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    names = ["a.jsonl", "b.jsonl", "c.jsonl"]
    for number, name in enumerate(names):
        lines = [json.dumps({"text": text}) for text in texts(120, seed=number)]
        (source / name).write_text("\n".join(lines))
    good = (source / "b.jsonl").read_text()
    (source / "b.jsonl").write_text("{torn\n" + good)

    def made(folder, *more, **options):
        folder.mkdir(exist_ok=True)
        files = LocalFiles(source, [*names, *more])
        return prepare(
            Corpus("test", {}, files, settings_for(5_000, 3_000, None, 1), ByteTokenizer()), folder, 0, "", **options
        )

    with pytest.raises(UserError, match=r"b.jsonl, line 1: .*--skip-bad"):
        made(out)
    shards = {path.name: path.stat().st_mtime_ns for path in out.glob("*.bin")}
    assert len(shards) > 3
    begun = Begun.read(out)
    assert begun is not None
    assert begun.files_read() == 1
    shutil.copytree(out, tmp_path / "skipping")
    skipping = made(tmp_path / "skipping", skip_bad=1)
    assert skipping.source["skipped"] == [{"file": "b.jsonl", "line": 1}]
    assert skipping.splits == made(tmp_path / "skipping at once", skip_bad=3).splits
    (source / "b.jsonl").write_text(good)
    (source / "c.jsonl").unlink()
    names.remove("c.jsonl")
    (source / "d.jsonl").write_text(json.dumps({"text": "more of it " * 30}))
    made(out, "d.jsonl")
    made(tmp_path / "fresh", "d.jsonl")
    assert folder_bytes(out) == folder_bytes(tmp_path / "fresh")
    assert {name: (out / name).stat().st_mtime_ns for name in shards} == shards


@pytest.mark.parametrize(
    ("chosen", "stop", "read"),
    [
        (settings_for(2_000, 0, None, 1), 2, 1),
        (settings_for(2_000, 3_000, None, None), 4, 1),  # validation is full within the first file
        (settings_for(2_000, 20_000, None, None), 1, 2),  # validation was full in the second, training is in the first
        (settings_for(2_000, 10**9, None, None), 4, None),  # it ended where the files did: others would change it
        (settings_for(2_000, 10**9, None, 2), 4, 2),
        (settings_for(2_000, 0, None, None), 35, 2),
    ],
)
def test_which_files_the_shards_rest_on(chosen, stop, read, source, tmp_path):
    folder, _ = source
    corpus = corpus_of(folder, chosen)
    broken = InterruptedFiles(folder, [file.name for file in corpus.files.listed])
    broken.shards_left = stop
    with pytest.raises(Interrupted):
        prepare(replace(corpus, files=broken), tmp_path, 0, "")
    begun = Begun.read(tmp_path)
    assert begun is not None
    assert begun.files_read() == read
    names = [file.name for file in corpus.files.listed]
    fewer = replace(corpus, files=LocalFiles(folder, names[: read or 3]))
    more = replace(corpus, files=LocalFiles(folder, names[: (read or 3) - 1]))
    with pytest.raises(UserError, match="was started with another file"):
        prepare(more, tmp_path, 0, "")
    prepare(fewer, tmp_path, 0, "")


def test_a_disk_that_fails_is_no_bad_line(tmp_path, monkeypatch):
    """EIO is of the moment: skipping would lose what is there."""
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')

    class Failing(io.BytesIO):
        def readline(self, *_):
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(inputs, "open_bytes", lambda *_: Failing())
    corpus = Corpus("test", {}, LocalFiles(tmp_path, ["a.jsonl"]), settings_for(100, 0, None), ByteTokenizer())
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="Input/output error"):
        prepare(corpus, tmp_path / "out", 0, "", skip_bad=5)


def test_no_text_is_on_both_sides_for_any_number_of_workers(copied, tmp_path):
    folder, _ = copied
    sets = {}
    for workers in (0, 1, 4, 8):
        (tmp_path / str(workers)).mkdir()
        prepare(corpus_of(folder, settings_for(20_000, 3_000, None)), tmp_path / str(workers), workers, "fork")
        sets[workers] = folder_bytes(tmp_path / str(workers))
    assert all(found == sets[0] for found in sets.values())
    manifest = TokenSet.open(tmp_path / "8").manifest
    assert manifest.shared_documents == 0
    assert shared_documents(tmp_path / "8", manifest) == (0, None)


def test_verify_finds_documents_on_both_sides_of_an_older_set(source, tmp_path):
    """A set as 0.1.0 made it: copies of validation documents were left in the training split."""
    documents = [[*file] for file in source[1]]
    tokenizer, splits = ByteTokenizer(), {}
    ids = [np.array([256, *tokenizer.encode(text)], dtype=tokenizer.dtype) for file in documents for text in file]
    for split, part in (("val", ids[:3]), ("train", [ids[20], *ids[:3], ids[21]])):
        with ShardWriter(tmp_path, split, tokenizer, 1_000) as writer:
            for one in part:
                writer.write(one[:100] if split == "val" and one is part[-1] else one)  # the last is cut off
        splits[split] = tuple(writer.shards)
    manifest = finish_set(tmp_path, tokenizer, {"name": "test"}, [], splits)
    assert manifest.shared_documents is None
    assert shared_documents(tmp_path, manifest) == (3, 1)
    problems = set_problems(tmp_path, manifest, 1)
    assert len(problems) == 1
    assert "3 documents of train, the first of them document 1, are in val, too" in problems[0]
    replace(manifest, shared_documents=3).write(tmp_path)
    with pytest.raises(UserError, match="3 documents are both in train and in val"):
        TokenSet.open(tmp_path)
