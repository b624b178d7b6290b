"""Paths as people write them, where no shell has seen them."""

import os
from pathlib import Path

import pytest

from common import run_folder
from common.command_line import CommandParser
from common.errors import UserError
from common.paths import PROJECT, expand_path, find_path, is_inner_path, is_plain_name
from common.publish import file_to_write
from common.run_folder import RunFolder

ELSEWHERE = [
    "", ".", "..", "/etc/x", "../x", "./x", "./../x", "x/..", "x/", "x/../../y", "..\\x", "C:x", "C:\\x", "x\0", "x\n",
    "\x1b]0;x\x07", "\x9b2J", "\ud800", "\udcff", "x" * 256, "\u00e9" * 128, None, 7, ["x"], b"x",
]  # fmt: skip


@pytest.mark.parametrize("name", ELSEWHERE)
def test_only_an_entry_of_one_folder_is_a_plain_name(name: object) -> None:
    assert not is_plain_name(name)
    assert not is_inner_path(name if not isinstance(name, str) or "/" in name else f"x/{name}/y")


@pytest.mark.parametrize("name", ["x", "a b", ".x", "..x", "x..y", "\u00e9\u65e5", "ab:c", "x" * 255, "$x$", "-x"])
def test_what_is_an_entry_of_a_folder_is_one(name: str) -> None:
    assert is_plain_name(name)
    assert is_inner_path(name) and is_inner_path(f"{name}/y/{name}")


def test_home_and_variables_are_replaced_as_a_shell_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.setenv("JOB", "7")
    assert expand_path("~/x") == tmp_path / "x"
    assert expand_path("~") == tmp_path
    assert expand_path("$SCRATCH/job-${JOB}/a") == Path("/scratch/me/job-7/a")
    assert expand_path(Path("$SCRATCH")) == Path("/scratch/me")
    for plain in ("a~b", "x/~/y", "cost-$", "$1", "a b", "runs"):
        assert expand_path(plain) == Path(plain)
    monkeypatch.delenv("JOB")
    monkeypatch.setenv("EMPTY", "")
    for text, name in (("/x/${JOB}", "JOB"), ("$EMPTY/x", "EMPTY")):
        with pytest.raises(UserError, match=f"the environment variable {name} is not set"):
            expand_path(text)
    with pytest.raises(UserError, match="no such user on this machine"):
        expand_path("~nobody-of-this-name/x")
    with pytest.raises(UserError, match="has 5,000 parts: give a path of at most 300"):
        expand_path("a/" * 5_000)


def test_path_arguments_of_all_commands_are_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    parser = CommandParser("Reads.")
    parser.add_argument_group("more").add_argument("--data", type=Path)
    parser.add_argument("--json", type=file_to_write)
    parser.add_argument("runs", type=Path, nargs="*")
    found = parser.parse_args(["--data=~/x", "--json=~/figures/x.json", "~/a", "$HOME/b"])
    assert (found.data, found.json) == (tmp_path / "x", tmp_path / "figures" / "x.json")
    assert found.runs == [tmp_path / "a", tmp_path / "b"]
    assert not (tmp_path / "figures").exists(), "nothing is made before the work"
    with pytest.raises(UserError, match="the environment variable NO_SUCH_DISK is not set"):
        parser.parse_args(["--data=$NO_SUCH_DISK/x"])


def test_a_relative_path_is_meant_here_or_else_in_the_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_path("data/mine") == PROJECT / "data" / "mine"
    os.makedirs("data/mine")
    assert find_path("data/mine") == Path("data/mine")


def test_a_run_of_the_project_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    (project / "runs" / "begun").mkdir(parents=True)
    elsewhere.mkdir()
    monkeypatch.setattr(run_folder, "PROJECT", project)
    monkeypatch.chdir(elsewhere)
    assert RunFolder.find("runs", "begun").path == project / "runs" / "begun"
    assert RunFolder.find("runs", "new").path == elsewhere / "runs" / "new"
    assert RunFolder.find(tmp_path / "r", "begun").path == tmp_path / "r" / "begun"
    (elsewhere / "runs" / "begun").mkdir(parents=True)
    assert RunFolder.find("runs", "begun").path == elsewhere / "runs" / "begun"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert RunFolder.find("~/r", "begun").path == tmp_path / "home" / "r" / "begun"


def test_a_run_whose_checkpoints_could_not_be_opened_again_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not UTF-8 text"):
        RunFolder.find(os.fsdecode(bytes(tmp_path) + b"/\xff"), "name")
