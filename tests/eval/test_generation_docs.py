"""Every command in docs/generation.md is run, in its order, on a tiny run."""

import re
import shlex
from pathlib import Path

from data_prep.tokenization.loading import load_tokenizer
from tests.helpers.forked_command import run_command
from tests.helpers.token_sets import make_token_set
from tests.helpers.training import PROJECT, tiny_arguments, train

DOCUMENT = PROJECT / "docs" / "generation.md"


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", DOCUMENT.read_text(), flags=re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    # the one that installs packages is what requirements-dev.txt does for the tests
    return [line for line in lines if line and not line.startswith("pip install")]


def test_every_command_of_the_generation_page_works(tmp_path: Path) -> None:
    make_token_set(tmp_path / "data", train_tokens=5_000, val_tokens=500, tokenizer=load_tokenizer("gpt2-8k"))
    train(
        1, tmp_path, tiny_arguments(tmp_path, tmp_path / "data", "demo", "--model.block_size=64", "--run.max_steps=2")
    )
    (tmp_path / "prompt.txt").write_text("The file says")
    found = commands()
    assert len(found) >= 7
    for line in found:
        python, script, *options = shlex.split(line)
        assert python == "python"
        smaller = ["--max-tokens", "8"] if script == "eval/generate.py" else []
        done = run_command([script, *options, *smaller], tmp_path)
        assert done.status == 0, (line, done)
    assert (tmp_path / "texts.json").exists()
    assert (tmp_path / "exported" / "demo" / "config.json").exists()
    assert (tmp_path / "imported" / "demo" / "checkpoint.json").exists()
