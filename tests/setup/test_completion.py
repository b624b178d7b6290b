"""What bash completes after `source` of what setup/completion.py prints."""

import subprocess
import sys
from pathlib import Path

import pytest

from setup.completion import commands, completion

ASK = 'source "$1"; COMP_WORDS=($2); COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _longhaul_python; echo "${COMPREPLY[@]}"'

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="bash")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "completion.bash"
    path.write_text(completion(["eval/generate.py", "train/finetune.py", "train/pretrain.py"]))
    return path


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        (".venv/bin/python train/pretrain.py --optim.l", "--optim.lr"),
        ("python train/launch.py --standalone train/pretrain.py --config gpt2-1", "gpt2-124m gpt2-1p3b"),
        ("python3 /somewhere/eval/generate.py runs/demo --preset n", "nucleus"),
        ("python train/finetune.py runs/demo --lora.r", "--lora.rank"),
        ("python other.py --optim.l", ""),
    ],
)
def test_bash_completes(file: Path, words: str, completed: str) -> None:
    done = subprocess.run(["bash", "-c", ASK, "bash", file, words], capture_output=True, text=True, cwd=file.parent)
    assert (done.stdout.strip(), done.stderr) == (completed, "")


def test_every_script_with_options_is_asked() -> None:
    found = set(commands())
    assert {
        "data_prep/fineweb.py",
        "eval/watch.py",
        "train/pretrain.py",
        "train/finetune.py",
        "slurm/submit.py",
    } <= found
    assert "train/launch.py" not in found, "whose options are torchrun's"
