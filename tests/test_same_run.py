"""tests/same_run.py: a version is the same as itself, one with another seed is not, and every part is looked at."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.compare_runs import first_difference
from tests.helpers.source_code import PROJECT, ROOMS

FIXTURE = PROJECT / "tests" / "fixtures" / "format_1" / "runs" / "llama"


def same_run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(PROJECT / "tests" / "same_run.py"), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=400,
    )


def test_a_version_is_the_same_as_itself(tmp_path: Path) -> None:
    done = same_run(str(PROJECT), str(PROJECT), "--cases", "1 rank", "--json", str(tmp_path / "result.json"))

    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert result["cases"] == [{"case": "1 rank", "ranks": 1, "same": True, "what": ""}]


def test_a_version_with_another_seed_differs(tmp_path: Path) -> None:
    other, work = tmp_path / "other", tmp_path / "work"
    for room in ROOMS:
        shutil.copytree(PROJECT / room, other / room, ignore=shutil.ignore_patterns("__pycache__"))
    sections = other / "train" / "settings" / "sections.py"
    text = sections.read_text(encoding="utf-8")
    assert text.count("seed: int = 1337") == 1
    sections.write_text(text.replace("seed: int = 1337", "seed: int = 1338"), encoding="utf-8")

    done = same_run(str(PROJECT), str(other), "--cases", "1 rank", "--work", str(work))

    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 rank     1     differs: metrics.jsonl, steps: step 0, val_loss: 5." in done.stdout
    assert (work / "new" / "runs" / "1-rank" / "metrics.jsonl").exists()


def test_what_is_no_version_is_refused() -> None:
    done = same_run("no-such-revision", str(PROJECT))

    assert done.returncode == 2
    assert done.stderr.startswith("error: no-such-revision is neither a folder of the project nor a revision")


def change_text(name: str, old: str, new: str) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        text = (run / name).read_text(encoding="utf-8")
        assert old in text
        (run / name).write_text(text.replace(old, new, 1), encoding="utf-8")

    return change


def flip_last_bit(pattern: str) -> Callable[[Path], None]:
    def flip(run: Path) -> None:
        path = next(iter(run.glob(pattern)))
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))

    return flip


CHANGES: dict[str, Callable[[Path], None]] = {
    "metrics.jsonl, steps: step 1, lr: ": change_text("metrics.jsonl", '"lr": 0.0', '"lr": 0.1'),
    "metrics.jsonl, start: step 0, world_size: 2 -> 3": change_text(
        "metrics.jsonl", '"world_size": 2', '"world_size": 3'
    ),
    "samples.jsonl: step 4, text: ": change_text("samples.jsonl", "GV", "VG"),
    "samples.jsonl: 1 records -> 0": lambda run: (run / "samples.jsonl").unlink(),
    "step-00000007: 1 of ": flip_last_bit("checkpoints/step-*/optimizer-*"),
    "weights-00000004: 1 of ": flip_last_bit("checkpoints/weights-*/weights-00001-*"),
    "step-00000007/checkpoint.json, sequences: 112 -> 113": change_text(
        "checkpoints/step-00000007/checkpoint.json", '"sequences": 112', '"sequences": 113'
    ),
    "checkpoints: step-00000007, weights-00000004 -> weights-00000004": lambda run: shutil.rmtree(
        run / "checkpoints" / "step-00000007"
    ),
}


@pytest.mark.parametrize("told", CHANGES)
def test_every_part_of_a_run_is_compared(tmp_path: Path, told: str) -> None:
    changed = shutil.copytree(FIXTURE, tmp_path / "run")
    assert first_difference(FIXTURE, changed) is None
    CHANGES[told](changed)

    found = first_difference(FIXTURE, changed)

    assert found is not None
    assert found.startswith(told)


def test_times_are_not_compared(tmp_path: Path) -> None:
    changed = shutil.copytree(FIXTURE, tmp_path / "run")
    for name in ("metrics.jsonl", "samples.jsonl"):
        records = [json.loads(line) for line in (changed / name).read_text(encoding="utf-8").splitlines()]
        times = [{key: 9.0 for key in record if key.endswith(("time", "seconds", "per_second"))} for record in records]
        assert all(times)
        lines = [json.dumps({**record, **new}) for record, new in zip(records, times, strict=True)]
        (changed / name).write_text("\n".join(lines) + "\n", encoding="utf-8")

    assert first_difference(FIXTURE, changed) is None


def test_superseded_lines_of_a_killed_run_must_be_the_same_ones(tmp_path: Path) -> None:
    changed = shutil.copytree(FIXTURE, tmp_path / "run")
    lines = (changed / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    again = {**json.loads(lines[-3]), "time": 0.0}
    assert "loss" in again or "val_loss" in again
    resumed = [json.dumps({"kind": "start", "step": again["step"] - 1}), json.dumps(again), '{"step": 1, "lo']
    (changed / "metrics.jsonl").write_text("\n".join(lines + resumed), encoding="utf-8")

    assert first_difference(FIXTURE, changed, resumed=True) is None
    assert first_difference(FIXTURE, changed) == "metrics.jsonl, start: 1 records -> 2"

    resumed[1] = json.dumps({**again, "tokens": 1})
    (changed / "metrics.jsonl").write_text("\n".join(lines + resumed), encoding="utf-8")
    assert first_difference(FIXTURE, changed, resumed=True) is not None
