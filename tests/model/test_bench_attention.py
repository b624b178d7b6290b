"""The benchmark runs by path from anywhere, writes its figures, and refuses nonsense in one line."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "model" / "benchmarks" / "bench_attention.py"


def run(folder, *arguments):
    return subprocess.run([sys.executable, SCRIPT, *arguments], cwd=folder, capture_output=True, text=True, check=False)


def test_it_measures_and_writes(tmp_path):
    done = run(tmp_path, "--length", "512", "--window", "64", "--repeats", "2", "--kv-heads", "2", "--json", "out.json")
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures["settings"]["window"] == 64
    rows = figures["contestants"]
    assert set(rows) == {"full causal", "window, dense mask", "window, in blocks"}
    assert rows["full causal"]["ratio_to_full"] == 1
    assert all(row["milliseconds"] > 0 for row in rows.values())
    assert rows["window, in blocks"]["difference"] < 1e-5
    assert "window, in blocks" in done.stdout


def test_it_refuses_in_one_line(tmp_path):
    done = run(tmp_path, "--heads", "3")
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == ["error: --heads is 3, not a multiple of --kv-heads 4: make it one"]
