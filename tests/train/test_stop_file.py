"""STOP in a run's folder, a file or by mistake a folder: obeyed once, and never an error."""

from pathlib import Path

from tests.helpers.token_sets import make_token_set
from tests.helpers.training import losses, run_of, tiny_arguments, train


def test_a_folder_of_that_name_stops_a_start_and_is_removed_where_nothing_is_in_it(tmp_path: Path) -> None:
    make_token_set(tmp_path / "data", train_tokens=5_000, val_tokens=500)
    arguments = tiny_arguments(tmp_path, tmp_path / "data", "asked", "--run.max_steps=2")
    run = run_of(tmp_path, "asked")
    kept = run.stop_file / "note"
    kept.parent.mkdir(parents=True)
    kept.touch()
    train(1, tmp_path, arguments)
    state = run.read_state()
    assert state is not None and (state["status"], state["stop"]) == ("preempted", "file")
    warning = (
        f"WARNING: {run.stop_file} can't be removed (Directory not empty): as long as it is there, every start stops"
    )
    assert warning in run.log.read_text()
    kept.unlink()
    train(1, tmp_path, arguments)  # asked again, by a folder that can go
    assert not run.stop_file.exists()
    assert losses(run) == {}
    train(1, tmp_path, arguments)
    assert len(losses(run)) == 2
