"""The report of a study: what it says and names, at every stage of the study, and that no order changes a byte."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from eval.comparison.measured_runs import Metric
from eval.comparison.study_data import Study, StudyRun
from eval.comparison.study_output import write_report
from eval.comparison.study_page import study_page
from eval.comparison.study_report import report_study
from eval.comparison.study_tables import markdown
from eval.comparison.tuning import first_line, tune
from tests.helpers.html_tables import plain_cells
from tests.helpers.whole_study import RATES, SHARED, whole_study

FILES = ("report.html", "report.json", "report.md", "report.png")
KEYS = ["size", "budget", "baseline", "unit", "noise_floor", "data", "missing", "variants", "tuned"]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return whole_study(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def written(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write_report(study, folder)
    return folder


def turned(study: Study) -> Study:
    """The same results of a file in another order, found in another order."""
    changes, budgets = dict(reversed(study.changes.items())), dict(reversed(study.budgets.items()))
    return replace(study, changes=changes, budgets=budgets, runs=study.runs[::-1])


def without(study: Study, wanted: Callable[[StudyRun], bool]) -> Study:
    """The study while runs of it have no result yet."""
    runs = [replace(run, run=None, why="missing") if wanted(run) else run for run in study.runs]
    return replace(study, runs=runs)


def test_a_report_says_what_is_known_and_names_what_is_not(written: Path) -> None:
    page, table = ((written / name).read_text(encoding="utf-8") for name in ("report.html", "report.md"))
    found = json.loads((written / "report.json").read_bytes())
    first = (
        "The learning rate was swept for rate only; base, gain, leak at optim.lr = 0.001, which favours those that "
        "were swept. That of rate is best at the edge of its sweep: a better one may lie outside."
    )
    assert page.partition("<body>\n<p><b>")[2].startswith(first) and table.startswith(first)
    (cell,) = found["comparisons"]
    assert [key for key in cell if key != "refused"] == KEYS
    assert list(cell["variants"]) == ["base", "gain", "leak", "rate"]
    gain, leak, rate = (cell["variants"][name] for name in ("gain", "leak", "rate"))
    assert gain["multiplier"] == pytest.approx(1.3, rel=0.03) and gain["multiplier_from"] == "budgets"
    assert (gain["seeds"], leak["seeds"], rate["seeds"]) == (3, 0, 2)
    assert 0.002 < cell["noise_floor"] < 0.005
    assert cell["tuned"]["rate"]["chosen"] == {"optim.lr": RATES[-1]}
    assert [each["seeds"] for each in cell["tuned"]["rate"]["tried"]] == [1, 1, 1]
    whys = {entry["run"]: entry["why"] for entry in found["absent"]}
    assert list(whys) == [
        *(f"leak, budget 100K, seed {seed}" for seed in (1, 2, 3)), "rate, budget 100K, optim.lr 0.004, seed 3",
    ]  # fmt: skip
    assert [why.partition(":")[0] for why in whys.values()] == ["not causal", "not causal", "failed", "missing"]
    ladder = found["ladder"]["base"]
    assert ladder["exponent"] == pytest.approx(0.35, rel=0.01) and len(ladder["points"]) == 6
    assert list(found["ladder"]) == ["base"]
    for text in (*whys, *whys.values(), gain["sentence"], rate["sentence"], "Noise floor: ", "model.activation"):
        assert text in page, text
    cells = "".join(f"<td>{cell}</td>" for cell in ("gain", "model.activation", "swiglu", "(absent)"))
    assert cells in plain_cells(page)
    assert "Is &lt;SwiGLU&gt; better?" in page and "<SwiGLU>" not in page
    assert page.index("Noise floor: ") < page.index(gain["sentence"]) < page.index("extrapolated")
    assert page.count('<svg class="figure"') == 6  # differences, three of curves, sweep, ladder
    assert "| gain | 3 | 2.6" in table and "![Differences" in table
    assert (written / "report.png").read_bytes().startswith(b"\x89PNG")


def test_neither_order_nor_interruption_changes_a_byte(study: Study, written: Path, tmp_path: Path) -> None:
    write_report(without(study, lambda run: run.variant != "base" or run.seed[0] > 1), tmp_path)
    assert not (tmp_path / "report.png").exists()
    write_report(turned(study), tmp_path)

    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES)
    assert tmp_path.parent.name not in (tmp_path / "report.json").read_text(encoding="utf-8")  # no folder of a run
    for name in FILES:
        assert (written / name).read_bytes() == (tmp_path / name).read_bytes(), name


@pytest.mark.parametrize(
    ("missing", "told"),
    [
        (lambda run: True, "no run has been trained yet"),
        (lambda run: run.variant == "base", "No verdict on gain: no run of the baseline base can be ranked."),
        (lambda run: run.seed[0] > 1, "No verdict on gain: gain has one seed, and one seed shows no deviation."),
        (lambda run: run.trial or run.variant == "rate", "rate: no value of optim.lr has a finished run yet."),
        (lambda run: run.trial and run.choices["optim.lr"] == RATES[0], "2 of 3 values have a finished run."),
        (lambda run: run.budget == "280K", "5 points of falling loss: a law needs 6 sizes or budgets or more"),
    ],
)
def test_every_stage_of_a_study_has_a_report(study: Study, missing: Callable[[StudyRun], bool], told: str) -> None:
    report = report_study(without(study, missing))
    page = study_page(report, {})

    assert told in page
    assert json.loads(json.dumps(report.as_json()))["study"] == "lengths"
    assert markdown(report, picture=False)


def test_runs_that_do_not_compare_leave_the_rest_of_the_report(study: Study, tmp_path: Path) -> None:
    other = whole_study(tmp_path, sweep=False)
    mixed = [run for run in study.runs if run.variant != "gain"] + [
        replace(run, variant="gain", seed=(run.seed[0] + 9 * (run.variant == "base"), None))
        for run in other.runs
        if run.variant in ("gain", "base") and run.budget == "100K"
    ]
    report = report_study(replace(study, runs=mixed))

    assert report.cells[0].comparison is None
    assert "the runs of gain differ in model.activation" in report.as_json()["comparisons"][0]["refused"]
    assert "No comparison: the runs of gain differ in model.activation" in study_page(report, {})
    assert "exponent" in report.as_json()["ladder"]["base"]


def test_another_baseline_turns_a_study_s_differences_around(study: Study) -> None:
    (own,) = report_study(study).as_json()["comparisons"]
    (other,) = report_study(study.against("gain")).as_json()["comparisons"]
    there, back = own["variants"]["gain"]["difference"], other["variants"]["base"]["difference"]
    assert there == -back != 0
    with pytest.raises(UserError, match="--baseline: there is no variant no: use one of base, "):
        study.against("no")


def test_an_unknown_metric_or_a_folder_in_the_way_is_one_line(study: Study, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run records hellaswag_acc_norm: --metric is one of final, best"):
        report_study(replace(study, metric="hellaswag_acc_norm"))
    (tmp_path / "report.html").mkdir()
    early = without(study, lambda run: True)
    with pytest.raises(UserError, match=r"report\.html is a folder, not a file"):
        write_report(early, tmp_path)


@pytest.mark.parametrize(
    ("tunes", "rates", "edges", "line"),
    [
        ({}, {"a": {"": "optim.lr = 0.001"}, "b": {"": "optim.lr = 0.001"}}, [],
         "All variants ran at the same learning rate, optim.lr = 0.001, which was tuned for none of them: "),
        ({}, {"a": {"d4": "0.002", "d8": "0.001"}, "b": {"d4": "0.002", "d8": "0.001"}}, [],
         "All variants ran at the same learning rate, 0.002 (d4), 0.001 (d8), which was tuned for none of them: "),
        ({}, {"a": {"": "optim.lr = 0.001"}, "b": {"": "optim.lr = 0.002"}}, [],
         "No learning rate has been tuned (a at optim.lr = 0.001; b at optim.lr = 0.002): "),
        ({"a": {"optim.lr": [1, 2]}, "b": {"optim.muon_lr": [1, 2]}}, {"a": {"": "x"}, "b": {"": "x"}}, [],
         "The learning rate was swept for every variant, and each is compared at its own best."),
        ({"a": {"optim.lr": [1]}}, {}, [], "No run to compare has ended: "),
    ],
)  # fmt: skip
def test_the_first_line_says_at_whose_rate_all_ran(tunes: Any, rates: Any, edges: list[str], line: str) -> None:
    assert first_line(tunes, rates, edges).startswith(line)


def test_a_seed_that_only_one_value_has_decides_nothing(study: Study) -> None:
    rate = next(run for run in study.runs if run.trial)
    other = {run.choices["optim.lr"]: run for run in study.runs if run.trial}
    good, bad = other[RATES[2]].run, other[RATES[0]].run
    trials = [replace(rate, choices={"optim.lr": value}, run=bad) for value in (0.1, 0.3)]
    trials += [replace(rate, choices={"optim.lr": 0.2}, run=good)]
    trials += [replace(rate, choices={"optim.lr": 0.3}, run=good, seed=(2, None))]

    swept, metric = {"optim.lr": [0.1, 0.2, 0.3]}, Metric("final", "val_loss")
    found = tune(trials, rate, swept, metric)
    turned = tune(trials, rate, swept, replace(metric, higher_is_better=True))

    assert (found.chosen, found.at_edge) == ({"optim.lr": 0.2}, [])
    assert "optim.lr 0.2, inside its sweep (0.1, 0.2, 0.3)" in found.sentence
    assert [each.seeds for each in found.tried] == [1, 1, 2]
    assert found.tried[0].mean == found.tried[2].mean
    assert (turned.chosen, turned.at_edge) == ({"optim.lr": 0.1}, ["optim.lr"])
    assert SHARED == 100
