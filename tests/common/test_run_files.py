"""Whatever stands under the names of a run's files: what was meant, nothing, or one sentence with the file's name."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from common.metrics_file import MetricsFile, last_json_lines, metrics_of_step
from common.patient_file import PatientFile
from common.regular_file import NotAFile
from common.rewritten_file import read_record
from common.run_files import read_configuration, read_samples, read_score, read_starts, read_table
from common.run_folder import RunFolder
from slurm.history import StartId, fruitless_starts, starts_file
from slurm.history import read_starts as read_slurm_starts
from slurm.start_info import mark_path, read_mark
from tests.helpers.recorded_runs import recorded_run
from train.run.heartbeat import silent_ranks, vanished_ranks

READERS: dict[str, Callable[[RunFolder], Any]] = {
    "state": RunFolder.read_state,
    "config.yaml": read_configuration,
    "provenance.json": lambda folder: read_starts(folder.provenance),
    "samples.jsonl": read_samples,
    "metrics.jsonl": read_table,
    "report/hellaswag.json": read_score,
    "slurm.jsonl": read_slurm_starts,
}


def larger_than_any_disk(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(1 << 42)


NO_FILE: dict[str, Callable[[Path], object]] = {
    "it is a folder": Path.mkdir,
    "it is a pipe": os.mkfifo,
    "it is a device": lambda path: path.symlink_to("/dev/zero"),
    "it has more than": larger_than_any_disk,
    "Too many levels": lambda path: path.symlink_to(path.name),
}
WRONG = {
    "state": ["null", "[]", '{"status": 1}', '{"step": "5"}', '{"step": -1}', '{"job_id": []}', "{" * 5_000, "\xff"],
    "config.yaml": ["a: &a [*a]", "x", "? [a]\n: 1", "a: " + "[" * 3_000],
    "provenance.json": ["null", '{"starts": null}', '{"starts": [1]}', "[" * 5_000],
    "report/hellaswag.json": ["null", '{"acc_norm": "x"}', '{"acc_norm": NaN}', '{"examples": 0.5}', '{"data": 3}'],
}


@pytest.mark.parametrize("name", READERS)
def test_what_is_no_file_is_a_sentence_and_never_waited_for(tmp_path: Path, name: str) -> None:
    folder = RunFolder(tmp_path)
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    assert not READERS[name](folder), "nothing is there"
    for what, put in NO_FILE.items():
        put(path)
        with pytest.raises(UserError, match=what) as refused:
            READERS[name](folder)
        assert str(path) in str(refused.value) and ": " in str(refused.value)
        path.rmdir() if path.is_dir() else path.unlink()


@pytest.mark.parametrize(("name", "content"), [(name, content) for name in WRONG for content in WRONG[name]])
def test_what_is_of_another_type_is_a_sentence(tmp_path: Path, name: str, content: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match="is damaged") as refused:
        READERS[name](RunFolder(tmp_path))
    assert str(refused.value).startswith(str(path))


def test_small_records_and_ends_of_files_are_passed_over(tmp_path: Path) -> None:
    """The lock, heartbeats, a start's mark, the latest records: what can't be read there is nobody's word."""
    folder = RunFolder(tmp_path)
    folder.rank_file(0).parent.mkdir()
    mark = mark_path(tmp_path, "7.0")
    for put in NO_FILE.values():
        for path in (folder.lock, folder.rank_file(1), mark, folder.metrics):
            put(path)
        assert read_record(folder.lock) is None
        assert vanished_ranks(folder, [1]) == silent_ranks(folder, [1], 0) == []
        assert read_mark(tmp_path, "7.0") is None
        assert last_json_lines(folder.metrics) == []
        for path in (folder.lock, folder.rank_file(1), mark, folder.metrics):
            path.rmdir() if path.is_dir() else path.unlink()
    for content in (
        "{}",
        '{"run_folder": 3}',
        "null",
        '{"pid": [], "host": 1, "started": 0, "boot": 0, "namespace": 0}',
    ):
        mark.write_text(content)
        folder.rank_file(1).write_text(content)
        assert read_mark(tmp_path, "7.0") is None
        assert vanished_ranks(folder, [1]) == silent_ranks(folder, [1], 1) == []


def test_nothing_is_appended_to_what_is_no_file(tmp_path: Path) -> None:
    """A pipe would be waited for, a device would swallow it."""
    for what, put in list(NO_FILE.items())[:3]:
        path = tmp_path / what
        put(path)
        for writer in (MetricsFile, PatientFile):
            with pytest.raises(NotAFile, match=what):
                writer(path)


def test_lines_of_a_cluster_that_are_not_ours_are_passed_over(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    good: dict[str, Any] = {"kind": "start", "time": 1.0, "job_id": "7", "restart_count": 0, "from_step": 5}
    wrong: list[dict[str, Any]] = [
        {"kind": []},
        {"time": "1"},
        {"time": None},
        {"time": 1e300},
        {"job_id": ["7"]},
        {"job_id": None},
    ]
    odd: list[dict[str, Any]] = [{"from_step": "5"}, {"from_step": None, "pre_empted": {}}]
    lines = [json.dumps(good | more) for more in [{}, *wrong, *odd]]
    starts_file(folder).write_text("\n".join([*lines, "[" * 5_000, "\0" * 9, '{"kind": "end"', ""]))
    read = read_slurm_starts(folder)
    assert read == [good, *(good | more for more in odd)]
    assert fruitless_starts(read[:1], StartId("7", 0), 5) == 1
    assert fruitless_starts(read, StartId("7", 0), 5) == 0, "the last one began elsewhere, as far as one can tell"


def test_a_line_of_any_length_is_passed_over_from_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.metrics_file.LINE_BYTES", 100)
    path = tmp_path / "metrics.jsonl"
    good = b'{"step": 1, "loss": 2.0}\n'
    for long in (b"x" * 1000 + b"\n" + good, good + b"x" * 1000, good + b"x" * 1000 + b"\n"):
        path.write_bytes(long)
        for block in (1, 7, 64, 4096):
            assert metrics_of_step(path, 1, block) == [{"step": 1, "loss": 2.0}], (long, block)


def test_texts_of_a_start_that_are_none_are_left_out(tmp_path: Path) -> None:
    path = recorded_run(tmp_path, "run").provenance
    (start,) = json.loads(path.read_text())["starts"]
    odd = {"command": 5, "resumed_from": "runs/a\0b", "revision": ["x"], "mine": {"kept": 1}}
    path.write_text(json.dumps({"starts": [start | odd]}))
    assert read_starts(path) == [
        {key: value for key, value in start.items() if key not in ("command", "revision", "diff")}
        | {"mine": {"kept": 1}}
    ]


@pytest.mark.parametrize("name", ["state", "lock", "metrics.jsonl", "config.yaml", "checkpoints", "ranks"])
def test_a_trainer_refuses_a_folder_where_something_else_stands(tmp_path: Path, name: str) -> None:
    folder = recorded_run(tmp_path, "run")
    folder.refuse_what_is_no_file()
    path = folder.path / name
    path.unlink(missing_ok=True)
    is_folder = name in ("checkpoints", "ranks")
    (path.touch if is_folder else path.mkdir)()
    what, wanted = ("a file", "a folder") if is_folder else ("a folder", "a file")
    with pytest.raises(UserError, match=f"{name} is {what}, but the run needs {wanted} there: move it away"):
        folder.refuse_what_is_no_file()
