"""Token sets, half-made ones, staged copies, and files of text and examples, with something wrong in them."""

import bz2
import gzip
import hashlib
import json
import lzma
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.fuzz.bases import make_base
from tests.fuzz.cases import Case
from tests.fuzz.judge import PROJECT
from tests.fuzz.mutations import json_bytes, mutate_bytes, mutate_json, remove, replace_by
from tests.helpers.conversation_sets import make_conversation_set

Damage = Callable[[random.Random, Path], str]  # does it to a case's folder, and says what it did
RUN, MANIFEST = "runs/one", "manifest.json"
TRAIN = ["train/pretrain.py", "--config", "tiny.yaml", "--data.path", "data", "--run.root", "runs", "--run.name", "new",
         "--run.max_steps", "2"]  # fmt: skip
STAGED = [*TRAIN, "--data.stage_to", "disk"]
READERS = [
    ["data_prep/verify.py", "data", "--workers", "1"],
    ["data_prep/inspect_shards.py", "data", "--split", "val"],
    ["data_prep/inspect_shards.py", "data", "--document", "0"],
    ["eval/perplexity.py", RUN, "--data", "data", "--device", "cpu"],
    TRAIN,
    [*TRAIN, "--data.verify", "full"],
    STAGED,
]
TALKS_RUN = "runs/talks"
TUNE = ["train/pretrain.py", "--config", "tiny.yaml", "--data.path", "talks", "--objective.kind", "sft",
        "--model.block_size", "32", "--run.root", "runs"]  # fmt: skip
TALKS_READERS = [
    ["data_prep/verify.py", "talks", "--workers", "1"],
    ["data_prep/inspect_shards.py", "talks", "--split", "val"],
    ["data_prep/inspect_shards.py", "talks", "--document", "0"],
    ["eval/perplexity.py", TALKS_RUN, "--data", "talks", "--device", "cpu"],
    [*TUNE, "--run.name", "new", "--run.max_steps", "2"],
    [*TUNE, "--run.name", "new", "--run.max_steps", "2", "--data.verify", "full"],
]
PREPARE = ["data_prep/text_files.py", "texts", "--tokenizer", "byte", "--workers", "0", "--shard-tokens", "400",
           "--val-one-in", "2", "--val-tokens", "300"]  # fmt: skip
FINEWEB = ["data_prep/fineweb.py", "--source", "hub", "--out", "made", "--tokenizer", "byte", "--workers", "0",
           "--shard-tokens", "2000", "--val-tokens", "300"]  # fmt: skip
HELLASWAG = ["eval/hellaswag.py", RUN, "--device", "cpu", "--data"]
PARTS = {  # what of the originals a case's folder holds
    "data": ["data"], "disk": ["data", "disk"], "begun": ["begun", "texts"], "made": ["made", "texts"],
    "texts": ["texts"], "talks": ["talks", "other-talks"], "hub": ["hub"], "examples": ["examples"],
}  # fmt: skip
CARD = "---\nconfigs:\n- config_name: sample-10BT\n  data_files:\n  - split: train\n    path: sample/*.parquet\n---\n"
EXTRA_NAMES = ["extra.bin", "train-00002.bin", "val-00001.bin", "train-00000.bin.tmp", "manifest.json.12345678.tmp",
               ".preparing.lock", "preparing.json", "notes.txt", "staged.json"]  # fmt: skip


def prepare(bases: Path) -> None:
    make_base(bases)
    _make_texts(bases / "texts")
    _make_examples(bases / "examples")
    (bases / "hub" / "sample").mkdir(parents=True)
    shutil.copy(bases / "texts" / "rows.parquet", bases / "hub" / "sample" / "0.parquet")
    (bases / "hub" / "README.md").write_text(CARD, encoding="utf-8")
    _run(bases, [*PREPARE, "--out", "made"], 0)
    damaged = bases / "texts" / "z.jsonl"  # the last file that is read: shards of all others are published before
    whole = damaged.read_bytes()
    damaged.write_bytes(whole + b"{\n")
    _run(bases, [*PREPARE, "--out", "begun"], 2)
    damaged.write_bytes(whole)
    assert (bases / "begun" / "preparing.json").exists()
    make_conversation_set(bases / "talks", count=40, val_count=12, shard_tokens=300)
    make_conversation_set(bases / "other-talks", count=40, val_count=12, seed=1, shard_tokens=300)
    _run(bases, [*TUNE, "--run.name", "talks", "--run.max_steps", "2"], 0)
    for plan in (bases / "talks").glob("packing-*"):
        shutil.rmtree(plan)
    _run(bases, [*STAGED, "--run.name", "staged"], 0)
    shutil.rmtree(bases / "runs" / "staged")


def cases(rng: random.Random, count: int, bases: Path) -> Iterator[Case]:
    for _ in range(count):
        act = rng.choices(list(ACTS), weights=[weight for weight, *_ in ACTS.values()])[0]
        _, parts, damage, entries = ACTS[act]
        arguments, seed = rng.choice(entries), rng.randrange(1 << 40)
        label = f"{act}, seed {seed}"
        yield Case(
            "token_sets",
            label,
            arguments,
            partial(_make, bases, PARTS[parts], damage, seed),
            stopped=arguments[0] == TRAIN[0],
            also=(1,) if arguments[0].endswith("verify.py") else (),
            # a preparation and a run that were begun are gone on with; a copy serves the next run
            keeps=("begun", "made", "disk", "talks", *(["runs/new"] if act in BEGINS_RUNS else [])),
        )


def damage_manifest(rng: random.Random, folder: Path) -> str:
    path = folder / "data" / MANIFEST
    value, label = mutate_json(rng, _read(path))
    if rng.random() < 0.2:
        value, second = mutate_json(rng, value)
        label += f"; {second}"
    path.write_bytes(json_bytes(value))
    return label


def damage_manifest_bytes(rng: random.Random, folder: Path) -> str:
    return _damage_bytes(rng, folder / "data" / MANIFEST)


def claim_much(rng: random.Random, folder: Path) -> str:
    """A manifest whose counts, or whose shard, are huge; the file's size fits, in sparse files."""
    path = folder / "data" / MANIFEST
    manifest = _read(path)
    split = rng.choice(["train", "val"])
    shard = rng.choice(manifest["splits"][split])
    field, value = (
        rng.choice(["tokens", "documents", "bytes"]),
        1 << rng.choice([16, 24, 28, 31, 32, 40, 61, 62, 63, 70, 200]),
    )
    shard[field] = value
    if field == "tokens" and value <= 1 << 28 and rng.random() < 0.7:
        os.truncate(folder / "data" / shard["file"], value * 2)
    if rng.random() < 0.3:
        manifest["tokenizer"]["vocab_size"] = value
        manifest["dtype"] = "uint32"
    _write(path, manifest)
    return f"{split} has {value} {field}"


def damage_tokenizer(rng: random.Random, folder: Path) -> str:
    path = folder / "data" / MANIFEST
    manifest = _read(path)
    manifest["tokenizer"] |= rng.choice(
        [
            {"kind": rng.choice(["gpt2", "char", "huggingface", "nothing", "", 3])},
            {"kind": "char", "symbols": rng.choice(["abc", "", "aa", 3, ["a"], "\ud800", "\U0010ffff"])},
            {"kind": "huggingface", "packed": rng.choice(["", "AAAA", 3, "!", "H4sIAAAAAAAA"])},
            {"end_of_text_id": rng.choice([10**6, -1, "256", 2.5, None, True, 10**30])},
            {"begin_of_text_id": rng.choice([10**6, -1, "256", 2.5, None, 10**30])},
            {"vocab_size": rng.choice([1, 2, 128, 65536, 65537, 10**9, 1 << 62])},
            {"begins_contexts": rng.choice([3, "yes", None]), "other_end_ids": rng.choice([3, [10**9], ["a"]])},
        ]
    )
    if rng.random() < 0.5:
        manifest["dtype"] = rng.choice(["uint32", "uint64", "<u2", "float16", "object", ">u2"])
    _write(path, manifest)
    return f"tokenizer {manifest['tokenizer']}, {manifest['dtype']}"


def damage_shard(rng: random.Random, folder: Path) -> str:
    """A shard's bytes; sometimes with a manifest that fits them."""
    path = rng.choice(sorted((folder / "data").glob("*.bin")))
    label = _damage_bytes(rng, path)
    if rng.random() < 0.6:
        _list_as_it_is(folder / "data", path)
        label += ", manifest re-made"
    return label


def damage_marks(rng: random.Random, folder: Path) -> str:
    """A shard of marks: its bytes, its bits, its size, another set's; mostly with a manifest that fits them."""
    talks = folder / "talks"
    path = rng.choice(sorted(talks.glob("*-marks-*.bin")))
    marks = np.fromfile(path, dtype=np.uint16)
    act = rng.choice(["bytes", "shorter", "longer", "none", "starts", "counted", "bits", "other", "tokens"])
    if act == "bytes":
        act = _damage_bytes(rng, path)
    elif act == "shorter":
        marks[: rng.randrange(len(marks))].tofile(path)
    elif act == "longer":
        np.append(marks, rng.choices([0, 1, 2], k=rng.randrange(1, 40))).astype(np.uint16).tofile(path)
    elif act in ("none", "starts", "counted"):
        np.full_like(marks, ["none", "counted", "starts"].index(act)).tofile(path)
    elif act == "bits":
        for _ in range(rng.randrange(1, 30)):
            marks[rng.randrange(len(marks))] ^= 1 << rng.choice([0, 1, 1, 2, 15])
        marks.tofile(path)
    else:
        source = folder / "other-talks" / path.name if act == "other" else talks / path.name.replace("-marks", "")
        if source.is_file():
            shutil.copy(source, path)
    if rng.random() < 0.75:
        _list_as_it_is(talks, path)
        act += ", manifest re-made"
    return f"{path.name}: {act}"


def damage_talks_manifest(rng: random.Random, folder: Path) -> str:
    path = folder / "talks" / MANIFEST
    value, label = mutate_json(rng, _read(path))
    path.write_bytes(json_bytes(value))
    return label


def _list_as_it_is(folder: Path, path: Path) -> None:
    """Make a set's manifest fit what a shard of it has become."""
    content, manifest = path.read_bytes(), _read(folder / MANIFEST)
    for shards in manifest["splits"].values():
        for shard in shards:
            if shard["file"] == path.name:
                shard["tokens"] = len(content) // 2
                shard["sha256"] = hashlib.sha256(content).hexdigest()
    of_validation = [*manifest["splits"]["val"], *manifest["splits"].get("val-marks", ())]
    whole = b"".join((folder / shard["file"]).read_bytes() for shard in of_validation)
    manifest["val_sha256"] = hashlib.sha256(whole).hexdigest()
    _write(folder / MANIFEST, manifest)


def replace_file(rng: random.Random, folder: Path) -> str:
    return replace_by(rng, rng.choice(sorted((folder / "data").iterdir())))


def add_file(rng: random.Random, folder: Path) -> str:
    path = folder / rng.choice(["data", "data", "disk/" + _staged(folder).name if _staged(folder) else "data"])
    path /= rng.choice(EXTRA_NAMES)
    path.write_bytes(rng.randbytes(10))
    return f"beside: {replace_by(rng, path)}"


def damage_staged(rng: random.Random, folder: Path) -> str:
    copy = _staged(folder)
    assert copy is not None
    path = rng.choice([*sorted(copy.iterdir()), copy / "staged.json", copy / "staged.json", copy])
    if path == copy or rng.random() < 0.5:
        return replace_by(rng, path)
    if path.name.endswith(".json") and rng.random() < 0.6:
        value, label = mutate_json(rng, _read(path))
        path.write_bytes(json_bytes(value))
        return f"{path.name}: {label}"
    return f"{path.name}: {_damage_bytes(rng, path)}"


def damage_journal(rng: random.Random, folder: Path) -> str:
    path = folder / "begun" / "preparing.json"
    act = rng.random()
    if act < 0.65:
        value, label = mutate_json(rng, _read(path))
        path.write_bytes(json_bytes(value))
        return f"journal: {label}"
    if act < 0.8:
        return f"journal: {_damage_bytes(rng, path)}"
    name = rng.choice([*os.listdir(folder / "begun"), ".preparing.lock", "train-00009.bin.tmp", "preparing.json.1.tmp"])
    return replace_by(rng, folder / "begun" / name)


def damage_made(rng: random.Random, folder: Path) -> str:
    """A complete set that its preparation command finds."""
    path = folder / "made" / MANIFEST
    if rng.random() < 0.6:
        value, label = mutate_json(rng, _read(path))
        path.write_bytes(json_bytes(value))
        return label
    return replace_by(rng, rng.choice([path, folder / "made" / ".preparing.lock", folder / "made" / "train-00000.bin"]))


def damage_text(rng: random.Random, folder: Path) -> str:
    path = rng.choice(sorted((folder / "texts").iterdir()))
    if rng.random() < 0.3:
        if (said := replace_by(rng, path)).endswith("huge"):
            os.truncate(path, 1 << 24)  # terabytes of text are read for hours, as they should be
        return said
    if path.name == "z.jsonl" and rng.random() < 0.5:
        lines = path.read_bytes().splitlines()
        place = rng.randrange(len(lines))
        value, label = mutate_json(rng, json.loads(lines[place]))
        lines[place] = json_bytes(value)
        path.write_bytes(b"\n".join(lines))
        return f"{path.name}: {label}"
    return f"{path.name}: {_damage_bytes(rng, path)}"


def damage_hub(rng: random.Random, folder: Path) -> str:
    card = folder / "hub" / "README.md"
    path = rng.choice([card, card, folder / "hub" / "sample" / "0.parquet", folder / "hub" / "sample"])
    if path == card and rng.random() < 0.6:
        configs = [{"config_name": "sample-10BT", "data_files": [{"split": "train", "path": "sample/*.parquet"}]}]
        value, label = mutate_json(rng, {"configs": configs})
        card.write_bytes(b"---\n" + json_bytes(value) + b"\n---\n")
        return f"card: {label}"
    if path.is_dir() or rng.random() < 0.5:
        return replace_by(rng, path)
    return f"{path.name}: {_damage_bytes(rng, path)}"


def damage_examples(rng: random.Random, folder: Path) -> str:
    for path in sorted((folder / "examples").iterdir()):
        if path.name == "official.jsonl" and rng.random() < 0.6:
            lines = path.read_bytes().splitlines()
            value, label = mutate_json(rng, json.loads(lines[1]))
            lines[1] = json_bytes(value)
            path.write_bytes(b"\n".join(lines))
        elif rng.random() < 0.25:
            label = replace_by(rng, path)
        else:
            label = _damage_bytes(rng, path)
    return label


EXAMPLES = [[*HELLASWAG, f"examples/{name}"] for name in ("official.jsonl", "six.txt", "official.jsonl.bz2")]
RESUMED = [[*PREPARE, "--out", "begun"], [*PREPARE, "--out", "begun", "--dry-run"],
           [*PREPARE, "--out", "begun", "--skip-bad", "3"]]  # fmt: skip
AGAIN = [[*PREPARE, "--out", "made"], [*PREPARE, "--out", "made", "--dry-run"], [*PREPARE, "--out", "made", "--force"]]
NEW = [[*PREPARE, "--out", "begun"], [*PREPARE, "--out", "begun", "--skip-bad", "5"],
       [*PREPARE, "--out", "begun", "--dry-run"], [*PREPARE, "--out", "begun", "--tokenizer", "char"]]  # fmt: skip
# by name: how often, what the folder holds, what is done to it, and who reads it
ACTS: dict[str, tuple[int, str, Damage, list[list[str]]]] = {
    "manifest": (6, "data", damage_manifest, READERS),
    "manifest's bytes": (2, "data", damage_manifest_bytes, READERS),
    "huge": (2, "data", claim_much, READERS),
    "tokenizer": (2, "data", damage_tokenizer, READERS),
    "shard": (3, "data", damage_shard, READERS),
    "marks": (4, "talks", damage_marks, TALKS_READERS),
    "manifest with marks": (1, "talks", damage_talks_manifest, TALKS_READERS),
    "replaced": (3, "data", replace_file, READERS),
    "added": (2, "data", add_file, READERS),
    "added beside a copy": (1, "disk", add_file, [STAGED]),
    "copy": (2, "disk", damage_staged, [STAGED]),
    "journal": (5, "begun", damage_journal, RESUMED),
    "complete": (2, "made", damage_made, AGAIN),
    "texts": (5, "texts", damage_text, NEW),
    "hub": (2, "hub", damage_hub, [FINEWEB, [*FINEWEB, "--dry-run"]]),
    "examples": (2, "examples", damage_examples, EXAMPLES),
}
BEGINS_RUNS = ("shard", "marks")  # an id outside the vocabulary, or a mark that is none, is met while training


def _make(bases: Path, parts: list[str], damage: Damage, seed: int, folder: Path) -> None:
    for name in [*parts, "runs", "tiny.yaml"]:
        if (bases / name).is_dir():
            shutil.copytree(bases / name, folder / name, symlinks=True)
        else:
            shutil.copy(bases / name, folder / name)
    said = damage(random.Random(seed), folder)
    (folder.parent / "damage.txt").write_text(said, encoding="utf-8", errors="backslashreplace")


def _make_texts(folder: Path) -> None:
    folder.mkdir()
    rng = random.Random(0)
    texts = [" ".join(rng.choices(["once", "upon", "a", "time", "né", "𝕏"], k=rng.randrange(5, 40))) for _ in range(30)]
    lines = "".join(json.dumps({"text": text, "meta": {"source": "x"}}) + "\n" for text in texts).encode()
    (folder / "a.txt").write_text(texts[0], encoding="utf-8")
    (folder / "b.md.gz").write_bytes(gzip.compress(texts[1].encode()))
    (folder / "c.jsonl").write_bytes(lines)
    (folder / "d.jsonl.gz").write_bytes(gzip.compress(lines))
    (folder / "e.jsonl.zst").write_bytes(pa.compress(lines, codec="zstd", asbytes=True))
    (folder / "f.jsonl.xz").write_bytes(lzma.compress(lines))
    (folder / "g.txt.bz2").write_bytes(bz2.compress(texts[2].encode()))
    (folder / "h.json").write_bytes(lines)
    pq.write_table(pa.table({"text": texts, "number": list(range(len(texts)))}), folder / "rows.parquet")
    (folder / "z.jsonl").write_bytes(lines)


def _make_examples(folder: Path) -> None:
    folder.mkdir()
    example = {
        "activity_label": "A", "ctx_a": "B.", "ctx_b": "c", "ctx": "B. c", "label": 1,
        "endings": ["a.", "b.", "c.", "d."],
    }  # fmt: skip
    lines = (json.dumps(example) + "\n").encode() * 3
    (folder / "official.jsonl").write_bytes(lines)
    (folder / "official.jsonl.bz2").write_bytes(bz2.compress(lines))
    (folder / "six.txt").write_text("He\n1\na\nb\nc\nd\n" * 2, encoding="utf-8")


def _damage_bytes(rng: random.Random, path: Path) -> str:
    content, label = mutate_bytes(rng, path.read_bytes())
    remove(path)
    path.write_bytes(content)
    return label


def _staged(folder: Path) -> Path | None:
    return next((folder / "disk").iterdir()) if (folder / "disk").is_dir() else None


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def _run(folder: Path, arguments: list[str], status: int) -> None:
    command = [sys.executable, str(PROJECT / arguments[0]), *arguments[1:]]
    done = subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8")
    assert done.returncode == status, done.stderr
