"""A report of runs that were profiled: bars, a table, and what a damaged file costs."""

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from common.run_folder import RunFolder
from common.step_profile import PARTS, table_name
from eval.reporting.step_profiles import PART_COLORS
from tests.eval.test_report import run_script
from tests.helpers.recorded_runs import a_profile, recorded_run


def write_profile(run: RunFolder, first: int, last: int, **seconds: float) -> None:
    run.profile.mkdir(exist_ok=True)
    (run.profile / table_name(first, last)).write_text(json.dumps(a_profile(first, last, **seconds)), encoding="utf-8")


def test_the_report_shows_where_profiled_steps_went(tmp_path: Path) -> None:
    run = recorded_run(tmp_path, "seen")
    write_profile(run, 3, 4, matrix_products=3.0, head=0.8, idle=0.2)
    write_profile(run, 21, 21, matrix_products=1.0, data=3.0)
    (run.profile / "steps-00003-00004-rank-00000.json.gz").write_bytes(b"a trace, which no report opens")

    done = run_script("report.py", run.path, "--json", "figures.json", cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    page = (run.report / "report.html").read_text(encoding="utf-8")
    assert "Where the profiled steps went" in page
    for text in ("steps 3 to 4", "step 21", "1,500.0 ms (75.0%)", "3,000.0 ms (75.0%)", "aten::&lt;mm&gt;"):
        assert text in page, text
    assert '<td class="any">attention</td>' not in page  # which took no time
    figures = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    assert [profile["last_step"] for profile in figures["runs"][0]["profiles"]] == [4, 21]
    picture = Image.open(io.BytesIO((run.report / "profile.png").read_bytes())).convert("RGB")
    colors = dict(zip(PARTS, PART_COLORS, strict=True))
    drawn = {part for part, color in colors.items() if amount_of(picture, color) > 300}
    assert drawn == {"matrix_products", "head", "data", "idle"}


def amount_of(picture: Image.Image, color: str) -> int:
    """Pixels of a color, as near as the palette has it."""
    wanted = np.array([int(color[at : at + 2], 16) for at in (1, 3, 5)])
    return int((np.abs(np.asarray(picture, dtype=np.int64) - wanted).max(axis=2) < 6).sum())


def test_runs_that_were_not_profiled_have_no_such_section(tmp_path: Path) -> None:
    plain, seen = recorded_run(tmp_path, "plain"), recorded_run(tmp_path, "seen")
    assert run_script("report.py", plain.path, cwd=tmp_path).returncode == 0
    assert "profiled" not in (plain.report / "report.html").read_text(encoding="utf-8")
    assert not (plain.report / "profile.png").exists()

    write_profile(seen, 3, 4, matrix_products=3.0, idle=1.0)
    assert run_script("report.py", plain.path, seen.path, "--out", "both", cwd=tmp_path).returncode == 0
    page = (tmp_path / "both" / "report.html").read_text(encoding="utf-8")
    assert page.count('<th class="number">seen, steps 3 to 4</th>') == 1
    assert "plain, steps" not in page


def test_a_damaged_profile_is_left_out_by_name(tmp_path: Path) -> None:
    run = recorded_run(tmp_path, "damaged")
    write_profile(run, 3, 4, matrix_products=3.0)
    file = run.profile / table_name(3, 4)
    file.write_text(file.read_text(encoding="utf-8").replace('"rank": 0', '"rank": "first"'), encoding="utf-8")

    done = run_script("report.py", run.path, cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    assert done.stderr == f"left out: {file} is damaged (rank: it is not a whole number): move it away\n"
