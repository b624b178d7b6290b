"""The tutorial notebook, cell by cell, with few steps."""

import json
from pathlib import Path

import matplotlib as mpl
import pytest

from tests.helpers.source_code import PROJECT

NOTEBOOK = PROJECT / "docs" / "tutorial.ipynb"


def cells(kind: str) -> list[str]:
    content = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert [cell.get("outputs", []) for cell in content["cells"] if cell.get("outputs")] == [], "clear the outputs"
    return ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == kind]


def test_every_cell_of_the_tutorial_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As one module; Jupyter itself adds nothing to it."""
    monkeypatch.setenv("TUTORIAL_FOLDER", str(tmp_path))
    monkeypatch.setenv("TUTORIAL_STEPS", "6")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    mpl.use("Agg")
    names: dict[str, object] = {"__name__": "tutorial"}
    for cell in cells("code"):
        exec(compile(cell, "tutorial.ipynb", "exec"), names)

    said = capsys.readouterr().out
    assert "done at step 6: all steps done" in said
    assert {path.name for path in tmp_path.glob("*.png")} == {"loss.png", "surprise.png", "attention.png"}
    assert (tmp_path / "export" / "config.json").is_file()


def test_files_that_the_tutorial_names_are_there() -> None:
    words = " ".join(cells("markdown")).split()
    named = {word.strip("().,:;`") for word in words if word.startswith(("docs/", "`eval/", "`train/", "(docs/"))}
    assert len(named) > 3
    assert [name for name in named if not (PROJECT / name).is_file()] == []
