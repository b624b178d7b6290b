"""Every command in docs/data.md is run, in its order, with small amounts and a hub on loopback."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from data_prep.fineweb import REPOSITORY, REVISION
from data_prep.token_sets.token_set import TokenSet
from tests.helpers.http_server import Server, hub_files
from tests.helpers.parquet_files import make_source, texts, write_parquet

PROJECT = Path(__file__).resolve().parents[2]
DOCUMENT = PROJECT / "docs" / "data.md"
SMALLER = {
    "docstrings.py": "--requirements small.txt --max-documents 2000",
    "fineweb.py": "--shard-tokens 10K --val-tokens 1000 --workers 0",
    "text_files.py": "--workers 0",
    "hub_dataset.py": "--val-tokens 1000 --workers 0",
    "train_tokenizer.py": "--vocab-size 400",
    "shakespeare.py": "--file texts/a.txt",
    "prepare_offline.py": "--hellaswag-url {url}/hellaswag_val.jsonl",
    "bench_prepare.py": "--corpus data/docstrings --megabytes 1 --repeats 1 --workers 1",
    "bench_loader.py": "--tokens 200000 --block-size 64 --tokens-per-step 4096 --steps 2 --ranks 1 2",
}
STATUS = {
    "prepare_offline.py": 2,
    "prepare_offline.py --check": 1,
}  # the stand-in is not the real HellaSwag, and says so


def commands():
    blocks = re.findall(r"```sh\n(.*?)```", DOCUMENT.read_text(), flags=re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith("python ")]


def prepare_folder(folder):
    """What the commands expect to be there, small."""
    (folder / "small.txt").write_text("tqdm\n")
    make_source(folder / "fineweb-edu", files=2, documents=200, row_group=50)
    (folder / "texts").mkdir()
    for name in ("a.txt", "b.md"):
        (folder / "texts" / name).write_text("\n\n".join(filter(None, texts(30, seed=1))))
    write_parquet(folder / "texts" / "c.parquet", texts(100, seed=2))
    (folder / "copy" / "js").mkdir(parents=True)
    (folder / "copy" / "js" / "train.jsonl").write_text("".join(f'{{"content": "line {n}"}}\n' for n in range(300)))
    card = '---\nconfigs: [{"config_name": "lines", "data_files": "js/*.jsonl"}]\n---\n'
    (folder / "copy" / "README.md").write_text(card)
    example = '{"ctx": "Students of history read about the river", "endings": ["and walk on", "not"], "label": 0}\n'
    (folder / "evaluation.jsonl").write_text(example)
    lines = "\n".join(f'{{"meta": {{"body": "line {number} says little"}}}}' for number in range(300))
    (folder / "dump.jsonl").write_text(lines)
    files = [path.read_bytes() for path in sorted((folder / "fineweb-edu").rglob("*.parquet"))]
    source = {f"sample/{size}/{n}.parquet": p for size in ("10BT", "100BT") for n, p in enumerate(files)}
    configs = [
        {"config_name": f"sample-{size}", "data_files": [{"split": "train", "path": f"sample/{size}/*"}]}
        for size in ("10BT", "100BT")
    ]
    return hub_files(REPOSITORY, REVISION, source, configs) | {"/hellaswag_val.jsonl": b"{}\n"}


def test_every_command_of_the_data_page_works(tmp_path):
    found = commands()
    assert {Path(line.split()[1]).name for line in found} >= {
        *SMALLER,
        "verify.py",
        "inspect_shards.py",
    }
    with Server(files=prepare_folder(tmp_path)) as server:
        environment = {**os.environ, "HF_ENDPOINT": server.url, "LONGHAUL_CACHE": str(tmp_path / "cache")}
        for line in found:
            _, script, *options = shlex.split(line)
            name = Path(script).name
            smaller = shlex.split(SMALLER.get(name, "").format(url=server.url))
            command = [sys.executable, str(PROJECT / script), *options, *smaller]
            done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, env=environment)
            expected = STATUS.get(" ".join([name, *options]), 0)
            assert done.returncode == expected, (line, done.stdout, done.stderr)
            assert "Traceback" not in done.stderr
    made = {path.parent.name: TokenSet.open(path.parent) for path in (tmp_path / "data").glob("*/manifest.json")}
    assert len(made) >= 6
    assert made["fineweb-edu"].manifest.val_sha256 == made["fineweb-edu-local"].manifest.val_sha256
