"""Where a run came from, whatever the source looks like."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from common.credentials import mask_credentials
from train.checkpoints.resume import changed_fields
from train.run import provenance

GIT = ["git", "-c", "user.name=x", "-c", "user.email=x@example.com"]


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout that provenance takes for the project, with one committed file, `notes.txt`."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "notes.txt").write_text("ete\n\n\n")
    for command in (["init", "-q"], ["add", "notes.txt"], ["commit", "-qm", "first"]):
        subprocess.run([*GIT, *command], cwd=source, check=True)
    monkeypatch.setattr(provenance, "PROJECT", source)
    return source


def recorded(path: Path, **options: bool) -> dict[str, Any]:
    """What a start adds to `provenance.json`."""
    provenance.record_start(path, [], None, {}, **options)
    start = json.loads(path.read_text())["starts"][-1]
    assert isinstance(start, dict)
    return start


def test_a_change_in_another_encoding_does_not_keep_a_run_from_starting(tmp_path: Path, source: Path) -> None:
    (source / "notes.txt").write_bytes("été\n".encode("latin-1"))
    start = recorded(tmp_path / "provenance.json")
    assert len(start["revision"]) == 40
    assert "-ete\n" in start["diff"]
    assert "+\N{REPLACEMENT CHARACTER}t\N{REPLACEMENT CHARACTER}" in start["diff"]
    assert "diff_lacks" not in start


def test_the_patch_applies_whatever_a_user_made_of_git_diff(tmp_path: Path, source: Path) -> None:
    for setting in ("diff.noprefix=true", "color.ui=always", "diff.external=false"):
        subprocess.run(["git", "config", *setting.split("=")], cwd=source, check=True)
    changed = "été\n\n\n"  # its patch ends with blank context
    (source / "notes.txt").write_text(changed)
    (tmp_path / "changes.patch").write_text(recorded(tmp_path / "provenance.json")["diff"])
    subprocess.run(["git", "checkout", "-q", "notes.txt"], cwd=source, check=True)
    subprocess.run(["git", "apply", str(tmp_path / "changes.patch")], cwd=source, check=True)
    assert (source / "notes.txt").read_text() == changed


def test_what_the_patch_lacks_is_told(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "hf_" + "a1" * 17
    (source / "notes.txt").write_text(f"HF_TOKEN={secret}\n" + "long\n" * 100)
    (source / "new.py").write_text("")
    monkeypatch.setattr(provenance, "MAX_DIFF_CHARACTERS", 300)
    monkeypatch.setattr(sys, "argv", ["train/pretrain.py", "--hub-token", secret])
    start = recorded(tmp_path / "provenance.json")
    assert secret not in (tmp_path / "provenance.json").read_text()
    assert "HF_TOKEN=***" in start["diff"]
    assert start["command"].endswith("train/pretrain.py --hub-token ***")
    assert start["diff_lacks"] == ["credentials", "1 untracked file", "what follows its first 300 characters"]
    assert recorded(tmp_path / "provenance.json", with_diff=False)["diff"] is None


def test_who_may_not_read_the_sources_may_not_read_their_patch(tmp_path: Path, source: Path) -> None:
    before = os.umask(0o022)
    try:
        modes = []
        for folder, file in ((0o755, 0o644), (0o750, 0o644), (0o755, 0o600)):
            source.chmod(folder)
            (source / "notes.txt").write_text(f"{folder}{file}\n")
            (source / "notes.txt").chmod(file)
            path = tmp_path / f"{len(modes)}.json"
            recorded(path)
            modes.append(stat.S_IMODE(path.stat().st_mode))
        assert modes == [0o644, 0o640, 0o600]
        (source / "notes.txt").chmod(0o644)
        recorded(tmp_path / "2.json")  # stricter than the sources by now: it stays so
        assert stat.S_IMODE((tmp_path / "2.json").stat().st_mode) == 0o600
    finally:
        os.umask(before)


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("url = https://user:s3cret@git.example.org/x", "url = https://***@git.example.org/x"),
        ("+WANDB_API_KEY=" + "0123abcd" * 5, "+WANDB_API_KEY=***"),
        ('+    password = "hunter2"', '+    password = "***"'),
        ('{"access_key": "k-1"}', '{"access_key": "***"}'),
        ("--token=0123456789abcdef", "--token=***"),
        ("Authorization: Bearer abcdefghijklmnop", "Authorization: Bearer ***"),
        ("+-----BEGIN RSA PRIVATE KEY-----\n+MIIE=\n+AAA\n+-----END", "+-----BEGIN RSA PRIVATE KEY-----\n***+-----END"),
    ],
)
def test_credentials_are_masked(text: str, masked: str) -> None:
    assert mask_credentials(text) == masked


def test_the_words_of_a_language_model_are_no_credentials() -> None:
    project = Path(__file__).resolve().parents[2]
    for path in [*project.glob("[a-z]*/*.py"), *project.glob("train/configs/*.yaml")]:
        if path.name not in ("test_provenance.py", "credentials.py"):
            assert mask_credentials(path.read_text()) == path.read_text(), path
    long = "a.token" * 50_000  # one look at each character, not one at each for each
    assert mask_credentials(long) == long


def test_an_option_that_is_new_had_its_default_in_an_older_run() -> None:
    older = {"run": {"seed": 1}}
    assert changed_fields(older, {"run": {"seed": 2, "record_diff": True}}) == ["run.seed: 1 -> 2"]
    assert changed_fields(older, {"run": {"seed": 1, "record_diff": False}}) == ["run.record_diff: true -> false"]
    assert changed_fields({}, {"run": {"seed": 2}}) == []  # of an imported model nothing is known
