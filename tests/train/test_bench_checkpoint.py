"""The benchmark of saving runs and reports both kinds of save."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.helpers.training import PROJECT


def test_both_kinds_of_save_are_measured_with_two_ranks(tmp_path: Path) -> None:
    script = PROJECT / "train" / "benchmarks" / "bench_checkpoint.py"
    command = [
        sys.executable,
        str(script),
        "--quick",
        "--ranks=2",
        "--saves=2",
        f"--json={tmp_path / 'figures.json'}",
    ]
    done = subprocess.run(
        [*command, f"--json={tmp_path / 'figures.json'}", f"--folder={tmp_path}"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert row["ranks"] == 2
    assert row["bytes"] > 3 * 4 * (256 + 1024 + 12 * 64) * 64  # weights and two moments
    for kind in ("asynchronous", "synchronous"):
        assert row[kind]["median_blocked_seconds"] > 0
    assert list(tmp_path.iterdir()) == [tmp_path / "figures.json"]
