"""What `train/study.py STUDY.yaml --report` writes: page, figures, and the picture and table of a README."""

from pathlib import Path

from common.errors import UserError
from common.os_errors import refusal
from common.publish import LEFT_SECONDS, sweep_temporaries, write_json_output, write_output
from common.regular_file import what_stands_at
from eval.comparison.study_data import Study
from eval.comparison.study_page import study_page
from eval.comparison.study_pictures import difference_picture, study_pictures
from eval.comparison.study_report import StudyReport, report_study
from eval.comparison.study_tables import PICTURE, markdown

PAGE, FIGURES, TABLE = "report.html", "report.json", "report.md"


def write_report(study: Study, folder: Path) -> StudyReport:
    """Write the report of a study, finished or not, into a folder.

    Raises UserError where it can't be written, or no run records the study's metric.
    """
    report = report_study(study)
    picture = difference_picture(report, report.main) if report.cells else None
    files: dict[str, bytes | str] = {PICTURE: picture.png} if picture is not None else {}
    files[TABLE] = markdown(report, picture=picture is not None)
    files[PAGE] = study_page(report, study_pictures(report))
    for name in (*files, FIGURES):
        if (what := what_stands_at(folder / name)) not in ("", "a file", "a link to nothing"):
            raise UserError(f"{folder / name} is {what}, not a file: move it away")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sweep_temporaries(folder, (*files, FIGURES), older_than_seconds=LEFT_SECONDS)
        if PICTURE not in files:
            (folder / PICTURE).unlink(missing_ok=True)  # of other results
    except OSError as error:
        raise UserError(refusal("written", error, folder, otherwise="give back the right to write there")) from None
    for name, content in files.items():
        write_output(folder / name, content)
    write_json_output(folder / FIGURES, report.as_json())
    return report


def as_text(report: StudyReport) -> str:
    """For the terminal: the first line, and of each size and budget its noise floor and sentences."""
    return markdown(report, picture=False)
