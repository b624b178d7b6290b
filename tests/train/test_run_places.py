"""Places where no run can be: one line that names the place and fits the error, by the real trainer."""

import sys
from contextlib import redirect_stderr
from pathlib import Path

import pytest

from tests.helpers.privileges import obey_modes
from tests.helpers.ranks import RankGroup
from tests.helpers.token_sets import make_token_set
from tests.helpers.training import run_of, tiny_arguments, train_as_rank

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux's capabilities and error messages")


def train_held_back(arguments: list[str], output: Path) -> None:
    """The trainer, held back by modes, and what it prints as errors in a file."""
    obey_modes()
    with open(output, "w", encoding="utf-8", buffering=1) as file, redirect_stderr(file):
        train_as_rank(arguments)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_token_set(tmp_path_factory.mktemp("data") / "set", train_tokens=2_001, val_tokens=500).folder


def refusal_of(folder: Path, arguments: list[str]) -> str:
    output = folder / "stderr.txt"
    assert RankGroup(1, folder / "store", train_held_back, arguments, output).join() == [2], output.read_text()
    (line,) = output.read_text(encoding="utf-8").splitlines()
    assert line.startswith("error: ")
    return line


def test_places_that_may_not_be_entered_written_to_or_read(tmp_path: Path, data: Path) -> None:
    arguments = tiny_arguments(tmp_path, data, "mine")
    runs, shard, manifest = tmp_path / "runs", data / "train-00000.bin", data / "manifest.json"
    runs.mkdir()
    for path, mode, words in (
        (runs, 0o000, "mine can't be read (Permission denied): change its owner"),
        (runs, 0o555, "mine can't be made (Permission denied): change its owner"),
        (shard, 0o000, "train-00000.bin can't be read (Permission denied): change its owner"),
        (manifest, 0o000, "manifest.json can't be read (Permission denied): change its owner"),
    ):
        usual = path.stat().st_mode
        path.chmod(mode)
        line = refusal_of(tmp_path, arguments)
        path.chmod(usual)
        assert words in line, line
        assert "larger shards" not in line and "--force" not in line


def test_names_and_links_that_no_run_can_have(tmp_path: Path, data: Path) -> None:
    nul = tmp_path / "nul.yaml"
    nul.write_text('run: {name: "a\\0b"}')
    run = run_of(tmp_path, "linked")
    run.path.mkdir(parents=True)
    run.checkpoints.symlink_to(tmp_path / "nowhere" / "far")
    (tmp_path / "file").write_text("")
    arguments = tiny_arguments(tmp_path, data, "mine")
    for option, words in (
        ("--run.name=" + "n" * 256, "contains a name of 256 bytes: give one of at most 255"),
        ("--run.root=" + "r" * 300, "contains a name of 300 bytes"),
        (f"--run.root={'r/' * 200}{('s' * 250 + '/') * 15}", "give a path of at most 3,800"),
        (f"--config={nul}", "contains a NUL, which no file name can"),
        ("--run.name=linked", "checkpoints is a link to nothing, but the run needs a folder there: move it away"),
        (f"--run.root={tmp_path / 'file'}", "mine can't be made (Not a directory): a file is where a folder should be"),
    ):
        given = [word for word in arguments if not (option.startswith("--config") and word.startswith("--run.name"))]
        line = refusal_of(tmp_path, [*given, option])
        assert words in line, line
        assert "free some space" not in line
