"""The curves that a start's record describes: valid ones are taken, invalid ones are left out and reported."""

import json
from pathlib import Path
from typing import Any

import pytest

from common.curves import BUILT_IN, MOST_CURVES, RESERVED_KINDS, KnownCurves, format_figure, read_curve
from common.json_file import BadJson
from common.liveness import read_signs
from common.metrics_file import LATE_KINDS, TAIL_BYTES, MetricsFile
from common.time_spent import labels_of
from eval.reporting.figures import PART_COLORS
from tests.helpers.recorded_runs import OWN, recorded_run, train_record
from train.evaluations.registry import EVALUATIONS

GOOD: dict[str, Any] = {"kind": "toy", "figure": "toy", "label": "Toy"}
WRONG: list[tuple[Any, str]] = [
    (3, "curves: it is not a list"),
    (None, "curves: it is not a list"),
    ({"0": GOOD}, "curves: it is not a list"),
    ([None], "curves.0: it is not an object"),
    ([GOOD, {"kind": "toy", "figure": "b"}], "curves.1: label: it is missing"),
    ([GOOD | {"label": 3}], "label: it is not text"),
    ([GOOD | {"label": ""}], "label: string should have at least 1 character"),
    ([GOOD | {"label": "x" * 61}], "label: string should have at most 60 characters"),
    ([GOOD | {"label": "To\x1b[2Jy"}], "label: it holds control characters"),
    ([GOOD | {"label": "To\u202ey"}], "label: it holds control characters"),
    ([GOOD | {"label": "To\ud800y"}], "label: it holds control characters"),
    ([GOOD | {"figure": "../toy"}], "figure: string should match pattern"),
    ([GOOD | {"figure": "x" * 65}], "figure: string should match pattern"),
    ([GOOD | {"figure": "loss"}], "figure: loss is the name of something else"),
    ([GOOD | {"figure": "hellaswag_acc_norm"}], "figure: hellaswag_acc_norm is the name of something else"),
    ([GOOD | {"figure": "sequences"}], "figure: sequences is the name of something else"),
    ([GOOD | {"error": "val_loss"}], "error: val_loss is the name of something else"),
    ([GOOD | {"seconds": "step_seconds"}], "seconds: step_seconds is the name of something else"),
    ([GOOD | {"seconds": "toy_minutes"}], "seconds: toy_minutes does not end in _seconds"),
    ([GOOD | {"kind": "id"}], "kind: id is the name of something else"),
    ([GOOD | {"kind": "train"}], "kind: train is the name of something else"),
    ([GOOD | {"measured_on": "toy"}], "measured_on: it is not a list"),
    ([GOOD | {"measured_on": [["a"]] * 17}], "measured_on: "),
    ([GOOD | {"higher_is_better": "yes"}], "higher_is_better: it is neither true nor false"),
    ([GOOD | {"figure": f"toy_{number}"} for number in range(10_000)], f"there are more than {MOST_CURVES}"),
]


@pytest.mark.parametrize(("described", "said"), WRONG, ids=[said for _, said in WRONG])
def test_an_invalid_description_is_left_out_and_reported(described: Any, said: str) -> None:
    known = KnownCurves()
    known.learn({"kind": "start", "step": 0, "curves": described})
    assert said in known.complaint_about(Path("runs/a/metrics.jsonl"))
    assert said in known.complaint and known.complaint.isprintable()
    assert len(list(known)) <= len(BUILT_IN) + MOST_CURVES
    assert {curve.figure: curve for curve in known}.items() >= {curve.figure: curve for curve in BUILT_IN}.items()


def test_of_several_starts_the_last_description_holds_and_the_number_is_bounded() -> None:
    known = KnownCurves()
    for start in range(10):
        curves = [GOOD | {"figure": f"toy_{start}_{number}", "label": f"{start}"} for number in range(MOST_CURVES // 4)]
        known.learn({"kind": "start", "curves": [*curves, GOOD | {"label": f"at start {start}"}]})
    assert (len(list(known)), known.get("toy").label) == (len(BUILT_IN) + MOST_CURVES, "at start 9")
    assert "there are more" in known.complaint
    known.learn({"kind": "toy", "curves": [GOOD | {"label": "of no start"}]})
    assert known.get("toy").label == "at start 9"


def test_a_registered_evaluations_curves_are_those_that_readers_take() -> None:
    curves = [(kind, curve) for kind in EVALUATIONS for curve in kind.curves]
    assert {curve for _, curve in curves} >= set(BUILT_IN)
    for kind, curve in curves:
        assert curve.kind == kind.name
        assert curve in BUILT_IN or read_curve(json.loads(json.dumps(curve.as_json()))) == curve
    assert read_curve(json.loads(json.dumps(OWN.as_json()))) == OWN


def test_no_kind_has_the_name_of_another_record_or_part_of_the_time() -> None:
    others = {"train", "start", *LATE_KINDS, *labels_of([]), "total", "id"}
    assert set(RESERVED_KINDS) >= others
    assert set(PART_COLORS) == set(labels_of([]))
    for kind in others:
        with pytest.raises(BadJson, match="kind"):
            read_curve(GOOD | {"kind": kind})


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.29, "0.2900"),
        (18, "18"),
        (12_345, "12,345"),
        (10**12, "1.0T"),
        (1e-5, "1e-05"),
        (2.5e7, "2.5e+07"),
        (0.0, "0.0000"),
        (999.9, "999.9000"),
        (4586.6216, "4,587"),
    ],
)
def test_figures_as_people_read_them(value: float, text: str) -> None:
    assert format_figure(value) == text


def test_an_evaluation_that_takes_long_is_waited_for_though_its_description_lies_far_before(tmp_path: Path) -> None:
    """A run is judged by the last records of its file. A save that goes on beside training is none it waits for."""
    run = recorded_run(tmp_path, "long", own=True)
    metrics = MetricsFile(run.metrics)
    for step in range(41, 800):
        metrics.append(train_record(step, 1.8e9 + step, 2.0))
    metrics.append({"kind": "save", "step": 799, "save_seconds": 5_000.0, "save_blocked_seconds": 1.0})
    assert run.metrics.stat().st_size > 2 * TAIL_BYTES
    assert read_signs(run).patience_seconds == 120.0
    metrics.append({"kind": "toy", "step": 799, "toy_share": 0.5, "toy_seconds": 500.0})
    metrics.close()
    assert read_signs(run).patience_seconds == 1_500.0
