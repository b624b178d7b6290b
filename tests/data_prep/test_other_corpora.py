"""shakespeare.py, text_files.py, inspect_shards.py, prepare_offline.py and bench_prepare.py as users run them."""

import gzip
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from common.cache_folder import hellaswag_file
from common.checkpoint_files import write_checkpoint_manifest
from common.publish import canonical_json
from data_prep import prepare_offline
from data_prep.token_sets.token_set import TokenSet
from data_prep.tokenization.loading import load_tokenizer
from data_prep.tokenization.tokenizer import CharTokenizer
from data_prep.tokenization.tokenizer_choice import TokenizerChoice
from tests.helpers.http_server import Server
from tests.helpers.manifests import WHOLE
from tests.helpers.parquet_files import texts, write_parquet
from tests.helpers.token_sets import make_token_set

PROJECT = Path(__file__).resolve().parents[2]
TEXT = "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak. naïve 😀\n" * 40


def run(script, *options, cwd=None, **environment):
    command = [sys.executable, str(PROJECT / "data_prep" / script), *map(str, options)]
    inherited = {name: value for name, value in os.environ.items() if name != "TIKTOKEN_CACHE_DIR"}
    return subprocess.run(
        command, cwd=cwd or PROJECT.parent, capture_output=True, text=True, timeout=120, env=inherited | environment
    )


def tokens_of(folder, split):
    stream = TokenSet.open(folder, verify="full").split(split)
    return stream.read(0, len(stream))


@pytest.mark.parametrize("kind", ["char", "gpt2", "byte"])
def test_a_text_is_split_in_order(kind, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    done = run("shakespeare.py", "--file", tmp_path / "text.txt", "--out", tmp_path / "set", "--tokenizer", kind)
    assert done.returncode == 0, done.stderr
    opened = TokenSet.open(tmp_path / "set")
    tokenizer = load_tokenizer(opened.tokenizer_spec)
    border = len(TEXT) * 9 // 10
    assert tokenizer.decode(tokens_of(tmp_path / "set", "train")) == TEXT[:border]
    assert tokenizer.decode(tokens_of(tmp_path / "set", "val")) == TEXT[border:]
    if kind == "char":
        assert opened.tokenizer_spec["symbols"] == "".join(sorted(set(TEXT)))
        assert opened.manifest.tokenizer["vocab_size"] == len(set(TEXT))


def test_one_text_is_split_in_the_symbols_of_a_model(tmp_path):
    spec = CharTokenizer("".join(sorted({*TEXT, "~"}))).spec
    (tmp_path / "model").mkdir()
    write_checkpoint_manifest(tmp_path / "model", {**WHOLE, "tokenizer": spec})
    (tmp_path / "text.txt").write_text(TEXT)
    prepare = ["shakespeare.py", "--file", tmp_path / "text.txt", "--out", tmp_path / "set"]
    done = run(*prepare, "--tokenizer", tmp_path / "model")
    assert done.returncode == 0, done.stderr
    assert TokenSet.open(tmp_path / "set").tokenizer_spec == spec
    assert "complete already" in run(*prepare, "--tokenizer", tmp_path / "model").stdout
    assert "another text or vocabulary" in run(*prepare).stderr


def test_tiny_shakespeare_is_the_one_everybody_trains_on(tmp_path):
    folder = os.environ.get("LONGHAUL_TEST_DATA")
    if not folder:
        pytest.skip("LONGHAUL_TEST_DATA names no folder with tinyshakespeare.txt")
    text = (Path(folder) / "tinyshakespeare.txt").read_bytes()
    with Server(files={"/input.txt": text}) as server:
        options = ["--out", tmp_path / "set", "--url", f"{server.url}/input.txt"]
        done = run("shakespeare.py", *options, LONGHAUL_CACHE=str(tmp_path / "cache"))
        assert done.returncode == 0, done.stderr
        again = run("shakespeare.py", *options, LONGHAUL_CACHE=str(tmp_path / "cache"))
        assert "complete already" in again.stdout
        assert len(server.requests) == 1
    manifest = TokenSet.open(tmp_path / "set").manifest
    assert manifest.tokenizer["vocab_size"] == 65
    assert (manifest.total("train", "tokens"), manifest.total("val", "tokens")) == (1_003_854, 111_540)


def test_shakespeare_mistakes_are_one_line(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9 " * 10)
    (tmp_path / "text.txt").write_text(TEXT)
    assert run("shakespeare.py", "--file", tmp_path / "text.txt", "--out", tmp_path / "set").returncode == 0
    with Server(files={"/input.txt": b"another text altogether"}) as server:
        cases = [
            (["--file", tmp_path / "none.txt", "--out", tmp_path / "a"], "can't be read ("),
            (["--file", tmp_path / "bad.txt", "--out", tmp_path / "b"], "not UTF-8"),
            (["--file", tmp_path / "text.txt", "--out", tmp_path / "set", "--tokenizer", "byte"], "another text"),
            (["--out", tmp_path / "c", "--url", f"{server.url}/none"], "no such file"),
            (["--file", tmp_path / "none.txt", "--out", tmp_path / "set"], "can't be read ("),
            (["--file", tmp_path / "none.txt", "--out", tmp_path / "set", "--force"], "can't be read ("),
        ]
        for options, words in cases:
            done = run("shakespeare.py", *options, LONGHAUL_CACHE=str(tmp_path / "cache"))
            assert (done.returncode, words in done.stderr) == (2, True), done.stderr
            assert "Traceback" not in done.stderr
    assert len(tokens_of(tmp_path / "set", "val")) > 0  # no mistake has cost the set


@pytest.fixture
def own_texts(tmp_path):
    """A folder with a file of every kind, and all its documents."""
    folder = tmp_path / "texts"
    documents = texts(200, seed=3)
    write_parquet(folder / "a.parquet", documents[:80])
    lines = [json.dumps({"text": text}) for text in documents[80:199]]
    (folder / "b.jsonl").write_text("\n".join(lines))
    (folder / "inner").mkdir()
    (folder / "inner" / "c.md").write_text(documents[199])
    (folder / "ignored.csv").write_text("no,text")
    return folder, [text for text in documents if text]


@pytest.mark.parametrize("kind", ["gpt2", "char", "byte"])
def test_own_texts_of_every_kind(kind, own_texts, tmp_path):
    folder, documents = own_texts
    done = run("text_files.py", folder, "--out", tmp_path / "set", "--tokenizer", kind, "--workers", 0)
    assert done.returncode == 0, done.stderr
    opened = TokenSet.open(tmp_path / "set")
    tokenizer = load_tokenizer(opened.tokenizer_spec)
    found = []
    for split in ("train", "val"):
        tokens = tokens_of(tmp_path / "set", split)
        begins = (tokens == tokenizer.end_of_text_id).nonzero()[0]
        assert len(begins) == opened.split(split).documents > 0
        ends = [*begins[1:], len(tokens)]
        found += [tokenizer.decode(tokens[b + 1 : e]) for b, e in zip(begins, ends, strict=True)]
    assert sorted(found) == sorted(documents)
    again = run("text_files.py", folder, "--out", tmp_path / "set", "--tokenizer", kind)
    assert "complete already" in again.stdout


def test_a_folder_gives_the_set_it_always_gave(tmp_path):
    """Its identity, and what the manifest says of its source, as they were when manifests got their first format."""
    folder = tmp_path / "in"
    (folder / "b").mkdir(parents=True)
    lines = [json.dumps({"text": f"document {number} " * 9}) + "\n" for number in range(99)]
    (folder / "a.jsonl").write_text("".join(lines))
    (folder / "b" / "c.md").write_text("# A chapter\n" * 40)
    (folder / "d.txt").write_text("And a text. " * 40)
    options = ["--out", tmp_path / "set", "--tokenizer", "byte", "--workers", 0, "--shard-tokens", "5K"]
    done = run("text_files.py", folder, *options)
    assert done.returncode == 0, done.stderr
    assert "3 files, " in done.stdout
    assert "(1 .jsonl, 1 .md, 1 .txt)\noutput " in done.stdout
    manifest = TokenSet.open(tmp_path / "set", verify="full").manifest
    source = hashlib.sha256(canonical_json(manifest.source).encode()).hexdigest()
    assert manifest.identity == "bcbc2740ccb15d3176c040076bfbd99b769bd2c4e33b69cbb6ef54322083f608"
    assert source == "1f2552589828afaf32deb1515d3ec17edb6096639798f122b09b36a1f5c95053"


def test_splits_and_what_is_passed_over_are_printed(tmp_path):
    for split in ("train", "test", "validation"):
        write_parquet(tmp_path / "in" / "data" / f"{split}-00000-of-00001.parquet", texts(40, seed=len(split)))
    (tmp_path / "in" / "data" / "more.json.gz").write_bytes(gzip.compress(b'{"text": "more"}\n'))
    every = ["--workers", 0, "--val-tokens", 0]
    done = run("fineweb.py", "--source", tmp_path / "in", "--out", tmp_path / "a", *every)
    assert done.returncode == 0, done.stderr
    assert "left out 1 named for test (--all-splits takes everything): data/test-00000-of-00001.parquet" in done.stdout
    assert "left out 1 of a kind that is not read: data/more.json.gz" in done.stdout
    done = run("text_files.py", tmp_path / "in", "--out", tmp_path / "b", *every)
    assert "left out 1 named for validation (--all-splits" in done.stdout
    sets = [TokenSet.open(tmp_path / name).manifest for name in "ab"]
    assert [len(manifest.source["files"]) for manifest in sets] == [1, 2]
    assert [manifest.total("train", "documents") for manifest in sets] == [39, 40]
    (tmp_path / "in" / "data" / "train-00000-of-00001.parquet").rename(tmp_path / "in" / "data" / "0.parquet")
    done = run("fineweb.py", "--source", tmp_path / "in", "--out", tmp_path / "c", *every)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "0.parquet" not in done.stderr
    assert "is named for test, and nothing for train" in done.stderr
    done = run("fineweb.py", "--source", tmp_path / "in", "--out", tmp_path / "c", "--all-splits", *every)
    assert TokenSet.open(tmp_path / "c").manifest.total("train", "documents") == 3 * 39
    assert "--all-splits needs --source" in run("fineweb.py", "--out", tmp_path / "d", "--all-splits").stderr


def test_a_handful_of_files_has_a_validation_split_where_more_of_them_are_asked_for(tmp_path):
    (tmp_path / "texts").mkdir()
    for number in range(8):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"Text {number}.")
    command = ["text_files.py", tmp_path / "texts", "--out", tmp_path / "set", "--workers", 0]
    assert "smaller --val-one-in" in run(*command).stdout
    assert "another validation_one_in (32, now 2)" in run(*command, "--val-one-in", 2).stderr
    done = run(*command, "--val-one-in", 2, "--force")
    assert (done.returncode, "no validation" in done.stdout) == (0, False), done.stderr
    splits = [TokenSet.open(tmp_path / "set").split(split).documents for split in ("train", "val")]
    assert sum(splits) == 8
    assert min(splits) > 0
    assert "use 2 or more" in run(*command, "--val-one-in", 1).stderr


def test_text_files_mistakes_are_one_line(own_texts, tmp_path):
    folder, _ = own_texts
    (tmp_path / "dangling").mkdir()
    (tmp_path / "dangling" / "gone.parquet").symlink_to(tmp_path / "nowhere.parquet")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "broken.jsonl").write_text('{"text": "fine"}\n{torn\n')
    cases = [
        ([tmp_path / "nowhere"], "no file or folder"),
        ([folder / "ignored.csv"], "can be read"),
        ([folder / "b.jsonl", "--field", "body"], "no field 'body'"),
        ([tmp_path / "broken.jsonl"], "broken.jsonl, line 2: "),
        ([tmp_path / "broken.jsonl", "--tokenizer", "char"], "broken.jsonl can't be read (Expecting"),
        ([folder / "a.parquet", "--field", "score"], "double, not text, in its column 'score'"),
        ([tmp_path / "dangling"], "can't be read ("),
        ([tmp_path / "empty.txt", "--tokenizer", "char"], "there is no text"),
    ]
    for number, (options, words) in enumerate(cases):
        done = run("text_files.py", *options, "--out", tmp_path / f"set{number}", "--workers", 0)
        assert (done.returncode, words in done.stderr) == (2, True), done.stderr
        assert "Traceback" not in done.stderr


def test_a_mistake_before_the_first_shard_binds_nobody(own_texts, tmp_path):
    folder, _ = own_texts
    options = ["text_files.py", folder / "a.parquet", "--out", tmp_path / "set", "--workers", 0]
    assert run(*options, "--field", "score").returncode == 2
    done = run(*options)
    assert done.returncode == 0, done.stderr


def test_text_in_another_encoding_is_warned_of(tmp_path):
    (tmp_path / "good.txt").write_text("déjà vu " * 200_000)  # the check's blocks end within a character or not
    (tmp_path / "bad.txt").write_bytes(b"deja vu " * 200_000 + "déjà vu ".encode("latin-1"))
    for name, warned in (("good.txt", False), ("bad.txt", True)):
        out = tmp_path / name[:-4]
        done = run("text_files.py", tmp_path / name, "--out", out, "--workers", 0, "--tokenizer", "byte")
        assert done.returncode == 0, done.stderr
        assert ("warning: bad.txt is not UTF-8" in done.stderr) == warned


def test_links_count_by_their_own_names_and_folders_may_have_a_file_s(own_texts, tmp_path):
    """As the hub's cache links files that have no suffix, and as Spark writes a table into a folder."""
    folder, documents = own_texts
    (tmp_path / "blobs").mkdir()
    (tmp_path / "links" / "table.parquet").mkdir(parents=True)
    (tmp_path / "links" / "notes.md").mkdir()
    for number, name in enumerate(["table.parquet/part-0.parquet", "b.jsonl", "c.md"]):
        (tmp_path / "blobs" / str(number)).write_bytes(
            (folder / ["a.parquet", "b.jsonl", "inner/c.md"][number]).read_bytes()
        )
        (tmp_path / "links" / name).symlink_to(tmp_path / "blobs" / str(number))
    (tmp_path / "links" / "again.md").symlink_to(tmp_path / "links" / "c.md")
    done = run("text_files.py", tmp_path / "links", "--out", tmp_path / "set", "--workers", 0)
    assert done.returncode == 0, done.stderr
    manifest = TokenSet.open(tmp_path / "set").manifest
    names = [file["name"] for file in manifest.source["files"]]
    assert names == ["again.md", "b.jsonl", "table.parquet/part-0.parquet"]
    assert sum(manifest.total(split, "documents") for split in manifest.splits) == len(documents)
    parquet = ["--source", tmp_path / "links", "--out", tmp_path / "parquet", "--workers", 0]
    assert run("fineweb.py", *parquet).returncode == 0


def test_a_dry_run_counts_compressed_text_wide_tokens_and_what_is_there(tmp_path):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts(2_000, seed=3)).encode()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    out = tmp_path / "set"
    command = ["text_files.py", tmp_path / "a.jsonl.gz", "--out", out, "--shard-tokens", "10K", "--workers", 0]
    (planned,) = re.findall(r"about ([\d.]+)K training", run(*command, "--dry-run").stdout)
    assert run(*command, "--max-tokens", "30K").returncode == 0
    again = run(*command, "--max-tokens", "30K", "--dry-run")
    assert (again.returncode, "complete already" in again.stdout) == (0, True), again.stderr
    assert "another max_tokens" in run(*command, "--dry-run").stderr
    forced = run(*command, "--max-tokens", "30K", "--val-tokens", 0, "--force", "--dry-run")
    assert "disk     about 0 B needed" in forced.stdout  # the new set takes the old one's place
    assert (out / "manifest.json").exists()
    assert run(*command, "--force").returncode == 0
    made = TokenSet.open(out).manifest.total("train", "tokens")
    assert 0.5 < float(planned) * 1e3 / made < 2
    assert TokenizerChoice("a model's", {"vocab_size": 128_256}).token_bytes == 4


@pytest.mark.parametrize("workers", [0, 1])
def test_a_line_that_can_not_be_read_is_named(workers, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n{"text": "thr\n{"text": "four"}\n')
    done = run("text_files.py", tmp_path / "a.jsonl", "--out", tmp_path / "set", "--workers", workers)
    assert done.returncode == 2
    assert "a.jsonl, line 3: " in done.stderr


def test_bad_lines_are_skipped_as_far_as_is_allowed(tmp_path):
    """Both after a first try that stopped at the line, and of an alphabet, which is collected first."""
    lines = [json.dumps({"text": text}) for text in texts(50, seed=3)]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines[:9], "{torn", *lines[9:], "[]"]))
    for kind in ("byte", "char"):
        command = ["text_files.py", tmp_path / "a.jsonl", "--out", tmp_path / kind, "--tokenizer", kind, "--workers", 1]
        if kind == "byte":
            stopped = run(*command)
            assert (stopped.returncode, "a.jsonl, line 10: " in stopped.stderr) == (2, True), stopped.stderr
            few = run(*command, "--skip-bad", 1)
            assert "more than --skip-bad 1 can't be read: a.jsonl line 10, a.jsonl line 52 (no field" in few.stderr
        done = run(*command, "--skip-bad", 2, "--json", tmp_path / "figures.json")
        assert done.returncode == 0, done.stderr
        listed = [{"file": "a.jsonl", "line": 10}, {"file": "a.jsonl", "line": 52}]
        assert json.loads((tmp_path / "figures.json").read_text())["skipped"] == listed
        manifest = TokenSet.open(tmp_path / kind, verify="full").manifest
        assert manifest.source["skipped"] == listed
        assert sum(manifest.total(split, "documents") for split in manifest.splits) == 49
        told = "warning: skipped 2 unreadable: a.jsonl line 10, a.jsonl line 52"
        assert told in done.stdout
        assert told in run(*command).stdout  # complete already: with that list still


@pytest.mark.parametrize("workers", [0, 1])
def test_a_compressed_file_that_was_cut_off_is_named(workers, tmp_path):
    whole = gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in texts(200, seed=3)).encode())
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    done = run("text_files.py", tmp_path / "cut.jsonl.gz", "--out", tmp_path / "set", "--workers", workers)
    assert done.returncode == 2
    assert re.search(r"^error: cut\.jsonl\.gz, line \d+: .*ended before", done.stderr, re.MULTILINE)
    assert "Traceback" not in done.stderr


def test_looking_into_shards(own_texts, tmp_path):
    folder, _ = own_texts
    assert run("text_files.py", folder, "--out", tmp_path / "set", "--workers", 0).returncode == 0
    shown = run("inspect_shards.py", tmp_path / "set", "--plot", tmp_path / "p.png", "--json", tmp_path / "s.json")
    assert shown.returncode == 0, shown.stderr
    figures = json.loads((tmp_path / "s.json").read_text())
    manifest = TokenSet.open(tmp_path / "set").manifest
    assert figures["documents"] == manifest.total("train", "documents")
    assert figures["mean"] * figures["documents"] == pytest.approx(manifest.total("train", "tokens"))
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    tokens = tokens_of(tmp_path / "set", "train")
    second = load_tokenizer("gpt2").decode(tokens).split("<|endoftext|>")
    document = run("inspect_shards.py", tmp_path / "set", "--document", 0)
    assert document.returncode == 0
    assert document.stdout.split("\n", 1)[1].startswith(second[1][:20])
    missing = run("inspect_shards.py", tmp_path / "set", "--document", 99_999)
    assert missing.returncode == 2
    assert "there is no document 99999" in missing.stderr
    for picture in (tmp_path / "nowhere" / "p.png", tmp_path / "p.docx"):
        undrawn = run("inspect_shards.py", tmp_path / "set", "--max-tokens", "1K", "--plot", picture)
        assert (undrawn.returncode, f"error: {picture} can't be drawn" in undrawn.stderr) == (2, True)
        assert "Traceback" not in undrawn.stderr
    make_token_set(tmp_path / "bytes")
    assert run("inspect_shards.py", tmp_path / "bytes", "--split", "val", "--plot").returncode == 0
    assert (tmp_path / "bytes" / "lengths-val.png").exists()


def test_prepare_offline_fetches_checks_and_says_what_is_missing(tmp_path, monkeypatch):
    cache, home = tmp_path / "cache", tmp_path / "home"
    home.mkdir()
    environment = {"LONGHAUL_CACHE": str(cache), "HOME": str(home), "HF_HOME": "", "XDG_CACHE_HOME": ""}
    before = run("prepare_offline.py", "--check", **environment)
    assert before.returncode == 1
    assert before.stdout.count("missing ") == 3
    assert not cache.exists()
    examples = b'{"ctx": "stands in for the real one"}\n'
    with Server(files={"/hellaswag_val.jsonl": examples}) as server:
        options = ["--hellaswag-url", f"{server.url}/hellaswag_val.jsonl", "--json", tmp_path / "result.json"]
        wrong = run("prepare_offline.py", *options, **environment)  # not the real file: its hash tells
        assert wrong.returncode == 2
        assert "damaged" in wrong.stderr
        states = json.loads((tmp_path / "result.json").read_text())["states"]
        assert list(states.values()) == ["there", "there", "missing"]
        assert list(home.iterdir()) == []

        monkeypatch.setattr(prepare_offline, "HELLASWAG_SHA256", hashlib.sha256(examples).hexdigest())
        monkeypatch.setenv("LONGHAUL_CACHE", str(cache))
        monkeypatch.setattr(sys, "argv", ["prepare_offline.py", *map(str, options[:2])])
        assert prepare_offline.main() == 0
        assert hellaswag_file().read_bytes() == examples
        hellaswag_file().write_bytes(b"torn")
        monkeypatch.setattr(sys, "argv", ["prepare_offline.py", "--check"])
        assert prepare_offline.main() == 1


def test_the_benchmark_runs_and_its_writers_agree(tmp_path):
    write_parquet(tmp_path / "in" / "d.parquet", texts(3_000, seed=0, mean_words=200))
    assert run("fineweb.py", "--source", tmp_path / "in", "--out", tmp_path / "set", "--workers", 0).returncode == 0
    options = [
        "--corpus",
        tmp_path / "set",
        "--megabytes",
        2,
        "--repeats",
        1,
        "--workers",
        2,
        "--shard-tokens",
        300_000,
    ]
    done = run("benchmarks/bench_prepare.py", *options, "--json", tmp_path / "figures.json")
    assert done.returncode == 0, done.stderr
    assert "the shards are the same" in done.stdout
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["tokens"] > 300_000
    assert figures["longhaul"]["peak_memory_bytes"] > 0


SCRIPTS = sorted(p.name for p in (PROJECT / "data_prep").glob("*.py") if "exit_on_user_error(main)" in p.read_text())


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_entry_helps_from_anywhere(script, tmp_path):
    done = run(script, "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "--" in done.stdout
    assert run(script, "--no-such-option", cwd=tmp_path).returncode == 2


def test_nothing_in_data_prep_imports_torch():
    code = "import sys\n" + "\n".join(f"import data_prep.{name[:-3]}" for name in SCRIPTS)
    code += "\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
