"""The commands of docs/cluster.md are accepted, by the scripts and by a real sbatch."""

import re
import shlex
from pathlib import Path

import pytest

from slurm.planned_jobs import plan_jobs
from slurm.submit import build_parser
from tests.helpers.training import PROJECT
from tests.slurm.jobs import Bench
from train.estimates.time_limit import minutes
from train.settings.command_line import read_config

PAGE = (PROJECT / "docs" / "cluster.md").read_text()


def commands(program: str) -> list[list[str]]:
    """The words of every command in the page's blocks that runs `program`, without what stands before it."""
    blocks = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    found = []
    for line in "".join(blocks).splitlines():
        words = shlex.split(line, comments=True)
        if program in words:
            found.append(words[words.index(program) + 1 :])
    assert found, f"no {program} in docs/cluster.md"
    return found


@pytest.mark.parametrize("words", commands("slurm/submit.py"), ids=shlex.join)
def test_submit_takes_the_page_s_options(words: list[str]):
    a = build_parser().parse_args(words)
    assert plan_jobs(str(PROJECT / a.config), a.options, a.sweep)
    assert minutes(a.time) > 0


@pytest.mark.parametrize("words", commands("sbatch"), ids=shlex.join)
def test_the_trainer_takes_what_follows_the_script(words: list[str], monkeypatch):
    monkeypatch.chdir(PROJECT)
    script = next(word for word in words if word.startswith("slurm/"))
    assert Path(script).is_file()
    read_config(words[words.index(script) + 1 :])


@pytest.mark.slurm
@pytest.mark.parametrize("words", commands("sbatch"), ids=shlex.join)
def test_sbatch_takes_the_page_s_options(words: list[str], bench: Bench):
    """On a cluster of two nodes with four processors and no GPU."""
    script = next(index for index, word in enumerate(words) if word.startswith("slurm/"))
    smaller = ["--test-only", "--gpus-per-node=0", "--nodes=2", "--ntasks-per-node=4"]
    done = bench.cluster.run("sbatch", *words[:script], *smaller, *words[script:], cwd=PROJECT)
    assert done.returncode == 0, done.stderr


def test_the_scripts_differ_in_their_size_alone():
    texts = {}
    for name in ("124m", "355m", "774m", "1p3b"):
        text = (PROJECT / "slurm" / f"{name}.sh").read_text()
        assert f"train/configs/gpt2-{name}.yaml" in text
        assert (PROJECT / "train" / "configs" / f"gpt2-{name}.yaml").is_file()
        (nodes,) = re.findall(r"--nodes=(\d+)", text)
        assert f"| `slurm/{name}.sh` | {nodes} × 8 | `train/configs/gpt2-{name}.yaml` |" in PAGE
        lines = [line for line in text.splitlines() if not re.search(r"^# .*parameters on|--nodes=|--time=", line)]
        texts[name] = "\n".join(lines).replace(name, "SIZE")
    assert len(set(texts.values())) == 1
