"""Every command that README.md shows runs as it stands there, the long ones with the small overrides of one table."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from data_prep.tokenization.tokenizer import ByteTokenizer
from tests.eval.hellaswag_files import official_rows, write_official
from tests.helpers.parquet_files import make_source
from tests.helpers.token_sets import make_token_set

PROJECT = Path(__file__).resolve().parents[2]
NOT_COPIED = shutil.ignore_patterns(".*", "data", "runs", "__pycache__")
PATIENCE_SECONDS = 240

SMALL_DEMO = "--run.max_steps 60 --eval.every_steps 30 --eval.tokens 2048 --eval.sample_tokens 4"
FEW_STEPS = "--run.max_steps 4 --eval.tokens 256 --eval.sample_tokens 2"
LITTLE_DATA = "--source parquet --shard-tokens 10K --val-tokens 1000 --workers 0"
# A command of README.md: what is put at its end, for the clone of this test. Its .venv is the one that runs the tests.
OVERRIDES = {
    "make demo": f'-o environment DEMO_OPTIONS="{SMALL_DEMO}"',
    "make test": "-o dev-environment JOBS=1 TESTS='tests/setup/test_makefile.py -k help'",
    ".venv/bin/python data_prep/docstrings.py --out data/docstrings": "--out data/few --max-documents 200 --workers 1",
    ".venv/bin/python train/launch.py --standalone --nproc_per_node=auto:8 train/pretrain.py --config smoke": FEW_STEPS,
    ".venv/bin/python train/pretrain.py --config smoke --config llama --run.name faster --optim.lr 6e-3": FEW_STEPS,
    ".venv/bin/python data_prep/fineweb.py --dry-run": LITTLE_DATA,
    ".venv/bin/python data_prep/fineweb.py": LITTLE_DATA,
    ".venv/bin/python train/launch.py --standalone --nproc_per_node=auto:8 train/pretrain.py --config gpt2-124m": (
        "--data.path data/docstrings --model.n_layer 1 --model.n_head 1 --model.n_embd 16 --model.block_size 16 "
        f"--batch.tokens_per_step 128 --batch.micro_batch 1 {FEW_STEPS} --eval.sample_every_steps 0"
    ),
    ".venv/bin/python train/plan.py --config gpt2-1p3b --gpu h100 --nodes 4 --price-per-gpu-hour 2.5": "",
    ".venv/bin/python train/finetune.py runs/demo --data.path data/demo --run.name tuned": (
        f"{FEW_STEPS} --batch.tokens_per_step 256 --batch.micro_batch 1"
    ),
    ".venv/bin/python eval/watch.py runs/demo --once": "",
    ".venv/bin/python eval/report.py runs/demo": "",
    ".venv/bin/python eval/compare.py runs/demo": "",
    ".venv/bin/python eval/perplexity.py runs/demo --data data/demo": "--tokens 2048",
    ".venv/bin/python eval/hellaswag.py runs/demo --json runs/demo/report/hellaswag.json": "--data hellaswag.jsonl",
    ".venv/bin/python train/sync_tensorboard.py runs/demo": "",
    '.venv/bin/python eval/generate.py runs/demo --prompt "Return a new array with" --preset conservative '
    "--max-tokens 40": "",
    ".venv/bin/python eval/export_hf.py runs/demo exports/demo": "",
    ".venv/bin/python eval/import_hf.py exports/demo exports/back": "",
    ".venv/bin/python train/benchmarks/bench_step.py --preset gpt2-124m --dtype fp32 --micro-batch 1 "
    "--json step.json": (
        "--model.n_layer 1 --model.n_head 1 --model.n_embd 16 --block-size 16 --turns 1 --steps 1 "
        "--contestants longhaul textbook"
    ),
}

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="README's commands are those of Linux")


def readme_commands() -> list[str]:
    """The lines of README.md's fenced shell blocks, in order."""
    blocks = re.findall(r"^```sh\n(.*?)^```", (PROJECT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line and not line.startswith("#")]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project in a folder of its own, with small learnable token sets where the embedded corpus goes."""
    root = tmp_path_factory.mktemp("readme") / "longhaul"
    shutil.copytree(PROJECT, root, ignore=NOT_COPIED)
    (root / ".venv").symlink_to(sys.prefix)
    for name, kind in (("docstrings", "gpt2"), ("demo", "gpt2-8k")):
        corpus = root / "data" / name
        made = make_token_set(corpus, train_tokens=200_000, val_tokens=5_000, tokenizer=ByteTokenizer())
        stand_in = {"name": "docstrings", "settings": {"tokenizer": kind, "max_documents": None}}  # so it is left alone
        replace(made.manifest, source=stand_in).write(corpus)
    write_official(root / "hellaswag.jsonl", official_rows(8))
    make_source(root / "parquet", files=2, documents=200, row_group=50)
    return root


def test_the_table_is_that_of_the_readme() -> None:
    assert readme_commands() == list(OVERRIDES)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_command_of_the_readme_runs(clone: Path) -> None:
    """In the order of the page: later commands read what earlier ones made."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS", "PYTEST_"))}
    for command in readme_commands():
        result = subprocess.run(
            f"{command} {OVERRIDES[command]}",
            shell=True,
            cwd=clone,
            env=environment | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=PATIENCE_SECONDS,
        )
        assert result.returncode == 0, f"{command}\n{result.stdout[-4000:]}"
    assert (clone / "runs" / "demo" / "report" / "report.html").exists()


def test_the_commands_for_a_cluster_are_those_that_are_tested_on_one() -> None:
    """tests/slurm gives docs/cluster.md's commands to a real sbatch."""
    readme, page = ((PROJECT / name).read_text() for name in ("README.md", "docs/cluster.md"))
    (shown,) = re.findall(r"^```bash\n(.*?)^```", readme, flags=re.MULTILINE | re.DOTALL)
    assert f"```sh\n{shown}```" in page
