"""Files follow the umask: what one makes, those that it allows can read, evaluate and serve."""

import os
import stat
import sys
from pathlib import Path

import pytest

from tests.helpers.ranks import RankGroup
from tests.helpers.token_sets import make_token_set
from tests.helpers.training import run_of, tiny_arguments, train_as_rank

GROUP_MAY_WRITE = 0o002  # as project folders of clusters ask for


def make_everything(arguments: list[str], data: Path, exported: Path) -> None:
    """A token set, a run and an export, by a process with a umask of its own."""
    os.umask(GROUP_MAY_WRITE)
    make_token_set(data, train_tokens=2_001, val_tokens=500)
    with pytest.raises(SystemExit, match="0"):
        train_as_rank(arguments)
    from eval import export_hf, report

    run = next(argument for argument in arguments if argument.startswith("--run.root")).partition("=")[2] + "/shared"
    for script, more in ((export_hf, [str(exported)]), (report, [])):
        sys.argv = ["script", run, *more]
        assert not script.main()


def test_files_of_a_run_and_of_an_export_follow_the_umask(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    more = ("--checkpoint.weights_every_steps=5", "--eval.sample_every_steps=5", '--eval.prompts=["ab"]')
    data, exported = tmp_path / "made" / "data", tmp_path / "made" / "exported"
    arguments = tiny_arguments(tmp_path, data, "shared", "--run.max_steps=10", *more)
    assert RankGroup(1, tmp_path / "store", make_everything, arguments, data, exported).join() == [0]
    run = run_of(tmp_path, "shared")
    found = [path for folder in (run.path, data, exported) for path in folder.rglob("*")]
    names = {path.name for path in found}
    assert {"weights-00000-of-00001.safetensors", "weights-00000005", "model.safetensors", "report.html"} <= names
    assert {"state", "rank-00000.json", "samples.jsonl", "manifest.json"} <= names
    wrong = {str(path): oct(path.stat().st_mode) for path in found if stat.S_IMODE(path.stat().st_mode) != right(path)}
    assert wrong == {}


def right(path: Path) -> int:
    return (0o777 if path.is_dir() else 0o666) & ~GROUP_MAY_WRITE
