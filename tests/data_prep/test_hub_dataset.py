"""Any data set of the hub, by the list that `datasets` makes of it: from folders, and from a hub on loopback."""

import gzip
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.token_sets.token_set import TokenSet
from data_prep.tokenization.loading import load_tokenizer
from tests.helpers.http_server import Fault, Server, hub_files
from tests.helpers.parquet_files import texts

PROJECT = Path(__file__).resolve().parents[2]
REVISION, MOVED = "0123456789abcdef0123456789abcdef01234567", "f" * 40
REPO = "someone/anything"
CONFIGS = [
    {"config_name": "lines", "data_files": [{"split": "train", "path": "js/part-*.jsonl"}]},
    {
        "config_name": "tables",
        "data_files": [{"split": "train", "path": "pq/[0-9].parquet"}, {"split": "odd", "path": "pq/odd.parquet"}],
    },
    {"config_name": "pictures", "data_files": [{"split": "train", "path": "*.csv"}]},
]
ROWS = [texts(120, seed=seed) for seed in range(3)]
SMALL = ("--field", "content", "--tokenizer", "byte", "--shard-tokens", "6K", "--val-tokens", "1000")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as on the hub: the same records as lines of JSON and as tables; of each file one is null, of the lines'
    also one without the field. (One more is empty: tests' texts have one.)"""
    folder = tmp_path_factory.mktemp("source")
    for name in ("js", "pq"):
        (folder / name).mkdir()
    for number, rows in enumerate(ROWS):
        records: list[dict[str, Any]] = [{"content": text, "n": 1} for text in rows]
        records[20] = {"content": None}
        pq.write_table(pa.Table.from_pylist(records), folder / "pq" / f"{number}.parquet", row_group_size=50)
        records[30] = {"n": 2}
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / "js" / f"part-{number}.jsonl").write_text(lines)
    pq.write_table(pa.table({"content": ["held out"]}), folder / "pq" / "odd.parquet")
    (folder / "a.csv").write_text("content\nx\n")
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(CONFIGS)}\n---\n")
    return folder


def command(dataset: object, out: Path, *options: object) -> list[str]:
    script = str(PROJECT / "data_prep" / "hub_dataset.py")
    return [sys.executable, script, str(dataset), "--out", str(out), *map(str, options)]


def environment(cache: Path, **others: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return inherited | {"LONGHAUL_CACHE": str(cache), "HF_TOKEN_PATH": "/nonexistent"} | others


def run(dataset: object, out: Path, *options: object, **others: str) -> subprocess.CompletedProcess[str]:
    env = environment(out.parent / "cache", **({"HF_HUB_OFFLINE": "1"} | others))
    return subprocess.run(
        command(dataset, out, *options), capture_output=True, text=True, timeout=240, env=env, cwd=out.parent
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".bin", ".json")}


def served(source: Path, revision: str) -> dict[str, Any]:
    files = {path.relative_to(source).as_posix(): path.read_bytes() for path in source.rglob("*.*")}
    return hub_files(REPO, revision, {name: data for name, data in files.items() if name != "README.md"}, CONFIGS)


@pytest.fixture(scope="module")
def lines(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("lines") / "set"
    done = run(source, out, "--config", "lines", *SMALL, "--workers", 0)
    assert done.returncode == 0, done.stderr
    assert "records without text in 'content': 3 empty, 3 missing, 3 null; the first is js/part-0.jsonl" in done.stdout
    return out


def test_a_configuration_and_split_of_a_folder_and_what_has_no_text(lines: Path, source: Path, tmp_path: Path) -> None:
    manifest = TokenSet.open(lines, verify="full").manifest
    assert [file["name"] for file in manifest.source["files"]] == [f"js/part-{number}.jsonl" for number in range(3)]
    assert manifest.source["without_text"]["counts"] == {"empty": 3, "missing": 3, "null": 3}
    places = [(entry["file"], entry["line"]) for entry in manifest.source["without_text"]["first"]]
    assert places == [(f"js/part-{number}.jsonl", line) for number in range(3) for line in (4, 21, 31)]
    assert (manifest.source["config"], manifest.source["split"]) == ("lines", "train")
    assert str(source) not in (lines / "manifest.json").read_text()
    tables = run(source, tmp_path / "tables", "--config", "tables", *SMALL, "--workers", 0)
    assert tables.returncode == 0, tables.stderr
    opened = TokenSet.open(tmp_path / "tables")
    assert opened.manifest.source["without_text"]["counts"] == {"empty": 3, "null": 3}
    stream, tokenizer = opened.split("train"), load_tokenizer("byte")
    found = tokenizer.decode(stream.read(0, len(stream)))
    assert "held out" not in found
    assert ROWS[1][30] in found


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
def test_the_shards_are_the_same_for_any_number_of_workers(
    workers: int, lines: Path, source: Path, tmp_path: Path
) -> None:
    options = ("--config", "lines", *SMALL, "--workers", workers, "--start-method", "fork")
    done = run(source, tmp_path / "set", *options)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "set") == contents(lines)


def test_a_kill_and_a_hub_that_fails_and_moves_change_nothing(lines: Path, source: Path, tmp_path: Path) -> None:
    """Killed while the last file is awaited; then the branch has moved, and files are denied, cut and damaged."""
    path = f"/datasets/{REPO}/resolve/{REVISION}/js/part-%d.jsonl"
    out, options = tmp_path / "set", ("--config", "lines", *SMALL, "--workers", 0, "--keep-files")
    with Server(files=served(source, REVISION)) as hub:
        hub.faults[path % 0] = [Fault(status=404), Fault(cut=5_000), Fault(status=429, retry_after="0")]
        hub.faults[path % 2] = [Fault(cut=3_000, stall=True)]
        hub.faults[f"/api/datasets/{REPO}/revision/main"] = [Fault(status=503, retry_after="0")]
        env = environment(tmp_path / "cache", HF_ENDPOINT=hub.url)
        with open(tmp_path / "log", "w") as log:
            process = subprocess.Popen(command(REPO, out, *options), env=env, stdout=log, stderr=log, cwd=tmp_path)
            while not list(out.glob("train-*.bin")):
                assert process.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.05)
            process.kill()
            process.wait()
        hub.files.update(served(source, MOVED))  # `main` is another commit now
        hub.faults[path % 2] = [Fault(status=404), Fault(status=408), Fault(damage=True)]
        done = run(REPO, out, *options, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="0")
        assert done.returncode == 0, done.stderr
        assert not [request for request in hub.requests if MOVED in request.path]
    manifest = TokenSet.open(out, verify="full").manifest
    assert manifest.splits == TokenSet.open(lines).manifest.splits
    assert manifest.source["revision"] == REVISION
    assert manifest.source["without_text"] == TokenSet.open(lines).manifest.source["without_text"]
    assert all({"name", "bytes", "digest"} <= file.keys() for file in manifest.source["files"])


def test_mistakes_are_one_line(source: Path, tmp_path: Path) -> None:
    for options, words in (
        ((), "choose it with --config"),
        (("--config", "tables", "--split", "test"), "has no split 'test': choose one of train, odd"),
        (("--config", "pictures"), "has files such as a.csv, and only these can be read"),
        (("--config", "tables", "--field", "body"), "no column 'body': choose one of content, n"),
    ):
        done = run(source, tmp_path / "set", *options)
        assert (done.returncode, words in done.stderr, "Traceback" in done.stderr) == (2, True, False), done.stderr


def as_on_the_hub(kind: str, field: str, text: str) -> bytes:
    """A file of one record, as bytes, as the data sets of docs/data.md have them."""
    record: dict[str, Any] = {field: text, "url": "https://example.org", "n": 1}
    if kind == "parquet":
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist([record]), sink)
        return sink.getvalue().to_pybytes()
    line = (json.dumps(record) + "\n").encode()
    return gzip.compress(line) if kind == "gz" else pa.Codec("zstd").compress(line, asbytes=True)


def split_of(path: str) -> list[dict[str, str]]:
    return [{"split": "train", "path": path}]


# Configurations, files (those to read first), how they are kept and the field, as the data sets' pages have them
SHAPES: dict[str, tuple[list[dict[str, Any]], list[str], str, str]] = {
    "HuggingFaceFW/fineweb": (
        [
            {"config_name": "default", "data_files": split_of("data/*/*")},
            {"config_name": "sample-10BT", "data_files": split_of("sample/10BT/*")},
        ],
        ["sample/10BT/000_00000.parquet", "data/CC-MAIN-2024-10/000_00000.parquet"],
        "parquet",
        "text",
    ),
    "mlfoundations/dclm-baseline-1.0": (
        [],
        ["global-shard_01_of_10/local-shard_0_of_10/shard_00000000_processed.jsonl.zst"],
        "zst",
        "text",
    ),
    "allenai/c4": (
        [
            {
                "config_name": "en",
                "data_files": [
                    {"split": "train", "path": "en/c4-train.*.json.gz"},
                    {"split": "validation", "path": "en/c4-validation.*.json.gz"},
                ],
            },
            {"config_name": "realnewslike", "data_files": split_of("realnewslike/c4-train.*.json.gz")},
        ],
        ["en/c4-train.00000-of-01024.json.gz", "en/c4-validation.00000-of-00008.json.gz"],
        "gz",
        "text",
    ),
    "HuggingFaceTB/cosmopedia": (
        [
            {"config_name": name, "data_files": split_of(f"data/{name}/train-*")}
            for name in ("auto_math_text", "stories")
        ],
        ["data/stories/train-00000-of-00043.parquet", "data/auto_math_text/train-00000-of-00018.parquet"],
        "parquet",
        "text",
    ),
    "bigcode/the-stack-dedup": (
        [],
        ["data/python/data-00000-of-00144.parquet", "data/ada/data-00000-of-00001.parquet"],
        "parquet",
        "content",
    ),
    "codeparrot/codeparrot-clean": ([], ["file-000000000001.json.gz"], "gz", "content"),
}


def test_the_lines_of_the_documentation_read_what_they_name(tmp_path: Path) -> None:
    """Each line of docs/data.md, in one process, on a hub with a set of that name, layout, kind of file and field."""
    page = (PROJECT / "docs" / "data.md").read_text(encoding="utf-8")
    table = page.split("| data set | arguments of", 1)[1].split("\n\n", 1)[0]
    lines = [cell.split(" ") for cell in re.findall(r"^\| [^|]+ \| `([^`]+)`", table, re.MULTILINE)]
    assert [line[0] for line in lines] == list(SHAPES)
    files: dict[str, Any] = {}
    for repo, (configs, names, kind, field) in SHAPES.items():
        texts_of = [f"{'text to read ' * 30}{number}" for number in range(len(names))]
        data = {name: as_on_the_hub(kind, field, text) for name, text in zip(names, texts_of, strict=True)}
        files |= hub_files(repo, REVISION, data, configs)
    script = (
        "import json, sys; from data_prep import hub_dataset\n"
        "for line in json.loads(sys.argv[1]): sys.argv = ['hub_dataset.py', *line]; hub_dataset.main()"
    )
    small = ["--tokenizer", "byte", "--val-tokens", "0", "--workers", "0"]
    with Server(files=files) as hub:
        env = environment(tmp_path / "cache", HF_ENDPOINT=hub.url, PYTHONPATH=str(PROJECT))
        command = [sys.executable, "-c", script, json.dumps([[*line, *small] for line in lines])]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=env, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
    for line in lines:
        manifest = TokenSet.open(tmp_path / line[line.index("--out") + 1]).manifest
        assert [file["name"] for file in manifest.source["files"]] == SHAPES[line[0]][1][:1]
        assert manifest.source["revision"] == REVISION
