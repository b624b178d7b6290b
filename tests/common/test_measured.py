"""Which figures compare: those measured on the same, as far as their records tell."""

from pathlib import Path

import pytest

from common.curves import VALIDATION
from common.measured import describe_validation, like_the_newest, measured_alike, validation_of
from common.metrics_file import MetricsFile
from common.metrics_table import read_metrics_table
from eval.reporting.page_sections import comparison
from eval.reporting.published_score import examples_of
from eval.reporting.run_data import load_run
from tests.helpers.recorded_runs import recorded_run

FULL = {"val_sha256": "ab", "val_tokens": 640, "val_block_size": 16, "val_document_mask": False}


@pytest.mark.parametrize(("name", "other"), [*zip(FULL, ("ba", 32, 8, True), strict=True)])
def test_each_part_counts_and_what_is_not_recorded_does_not(name: str, other: object) -> None:
    assert not measured_alike(VALIDATION, FULL, {**FULL, name: other})
    assert measured_alike(VALIDATION, FULL, {key: value for key, value in FULL.items() if key != name})
    assert like_the_newest(VALIDATION, [FULL, {**FULL, name: other}, FULL]) == [FULL, FULL]


def test_a_manifest_without_configuration_is_like_any() -> None:
    """An imported checkpoint's."""
    assert measured_alike(VALIDATION, validation_of({"data_identity": None}), validation_of(FULL))
    assert describe_validation(validation_of({})) == ""


def test_a_curve_of_hellaswag_keeps_to_as_many_examples_as_the_newest_score(tmp_path: Path) -> None:
    """eval.hellaswag_examples was raised when the run was resumed."""
    run = recorded_run(tmp_path, "raised", hellaswag=True)
    metrics = MetricsFile(run.metrics)
    score = {"hellaswag_acc_norm": 0.9, "hellaswag_examples": 1_000, "hellaswag_official": True}
    metrics.append({"kind": "hellaswag", "step": 40, "tokens": 40_000, **score})
    metrics.close()
    events = read_metrics_table(run.metrics).comparable("hellaswag_acc_norm")
    assert [event["hellaswag_examples"] for event in events] == [1_000]
    loaded = load_run(run.path)
    assert examples_of([loaded]).startswith("1,000 of ")
    assert "left out what was measured on something else (400 examples), step 10 to 30" in comparison([loaded])
