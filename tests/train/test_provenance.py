"""Where a run came from, whatever the source looks like."""

import json
import subprocess
from pathlib import Path

import pytest

from train import provenance


def test_a_change_in_another_encoding_does_not_keep_a_run_from_starting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "notes.txt").write_text("ete\n")
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@example.com"]
    for command in (["init", "-q"], ["add", "notes.txt"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], cwd=source, check=True)
    (source / "notes.txt").write_bytes("été\n".encode("latin-1"))
    monkeypatch.setattr(provenance, "PROJECT", source)

    provenance.record_start(tmp_path / "provenance.json", [], {})

    (start,) = json.loads((tmp_path / "provenance.json").read_text())["starts"]
    assert len(start["revision"]) == 40
    assert "-ete\n+\N{REPLACEMENT CHARACTER}t\N{REPLACEMENT CHARACTER}" in start["diff"]
