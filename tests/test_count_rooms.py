"""tests/count_rooms.py counts what is there, and the trainer is no longer a way to read than it is now."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.count_rooms import imports
from tests.helpers.source_code import PROJECT

# What a reader has to go through. Whoever makes it less makes these less. (The phases of a start made `visited` more:
# it was 32 before the rooms were drawn anew, and half of that is what is wanted.)
MOST = {"imports_of_pretrain": 10, "imports_of_assemble": 15, "frames": 5, "visited": 44}


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    result = tmp_path_factory.mktemp("count") / "result.json"
    done = subprocess.run(
        [sys.executable, str(PROJECT / "tests" / "count_rooms.py"), "--json", str(result)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(result.read_text(encoding="utf-8"))["this"]
    assert f"{len(found['frames']):>10}\n" in done.stdout
    return found


@pytest.mark.parametrize("what", MOST)
def test_the_way_through_the_trainer_grows_no_longer(counted: dict[str, Any], what: str) -> None:
    assert len(counted[what] or ()) <= MOST[what], counted[what]


def test_what_is_counted_is_there(counted: dict[str, Any]) -> None:
    assert counted["frames"][0] == "train/pretrain.py: main"
    assert counted["frames"][-1].startswith("train/optimization/step.py: ")
    assert {"common.errors", "train.settings.command_line"} <= set(counted["imports_of_pretrain"])
    assert {"train/pretrain.py", "train/settings/sections.py", "train/optimization/optimizer.py"} <= set(
        counted["visited"]
    )
    assert set(counted["visited"]) < set(counted["entered"])
    assert {"model/gpt.py: GPT.forward", counted["frames"][-1]} <= set(counted["step_functions"])
    assert not any(
        "profiler" in name for name in [*counted["step_functions"], *counted["entered"]]
    )  # it wasn't asked for
    files = [*counted["visited"], *counted["entered"], *counted["step_files"]]
    assert [file for file in files if not (PROJECT / file).is_file()] == []
    assert not any(Path(file).parts[0] == "tests" for file in files)


def test_imports_are_counted_wherever_they_stand(tmp_path: Path) -> None:
    (tmp_path / "train" / "run").mkdir(parents=True)
    for name in ("run/lock.py", "run/state.py", "trainer.py"):
        (tmp_path / "train" / name).touch()
    text = "import json\nfrom train.run import lock\ndef later():\n    from train.run.state import a, b\n"
    (tmp_path / "train" / "pretrain.py").write_text(text, encoding="utf-8")

    assert imports(tmp_path, Path("train/pretrain.py")) == ["train.run.lock", "train.run.state"]
    assert imports(tmp_path, Path("train/assemble.py")) is None
