"""The newest whole checkpoint is found by looking, whatever else lies there."""

import hashlib
import json
import sys
from pathlib import Path

import pytest

from common.checkpoint_files import (
    BadCheckpoint,
    checkpoint_name,
    find_checkpoint,
    list_checkpoints,
    newest_good_checkpoint,
    read_checkpoint_manifest,
    verify_checkpoint,
    write_checkpoint_manifest,
)
from common.errors import UserError


def make_checkpoint(checkpoints: Path, step: int, content: bytes = b"weights") -> Path:
    folder = checkpoints / checkpoint_name(step)
    folder.mkdir(parents=True)
    (folder / "weights.safetensors").write_bytes(content)
    files = {"weights.safetensors": {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}}
    (folder / "checkpoint.json").write_text(json.dumps({"format_version": 1, "step": step, "files": files}))
    return folder


def test_a_fact_that_is_no_number_leaves_the_manifest_whole(tmp_path: Path) -> None:
    write_checkpoint_manifest(tmp_path, {"files": {}, "val_loss": float("nan"), "best": [float("inf")]})
    assert "NaN" not in (tmp_path / "checkpoint.json").read_text()
    manifest = verify_checkpoint(tmp_path)
    assert (manifest["val_loss"], manifest["best"]) == (None, [None])


def flip_a_bit(folder: Path) -> None:
    (folder / "weights.safetensors").write_bytes(b"veights")


def cut_short(folder: Path) -> None:
    (folder / "weights.safetensors").write_bytes(b"weigh")


def remove_weights(folder: Path) -> None:
    (folder / "weights.safetensors").unlink()


def lose_a_sector(folder: Path) -> None:
    """A file whose size is right and whose bytes the system answers for with an input/output error."""
    (folder / "weights.safetensors").unlink()
    (folder / "weights.safetensors").symlink_to("/proc/self/mem")
    manifest = json.loads((folder / "checkpoint.json").read_text())
    manifest["files"]["weights.safetensors"]["bytes"] = 0
    (folder / "checkpoint.json").write_text(json.dumps(manifest))


def remove_manifest(folder: Path) -> None:
    (folder / "checkpoint.json").unlink()


def tear_manifest(folder: Path) -> None:
    (folder / "checkpoint.json").write_text('{"format_version": 1, "fil')


def make_it_foreign(folder: Path) -> None:
    (folder / "checkpoint.json").write_text('{"format_version": 99, "files": {}}')


DAMAGES = {
    flip_a_bit: "SHA-256 differs",
    cut_short: "5 bytes instead of 7",
    remove_weights: "is missing",
    lose_a_sector: "can't be read" if sys.platform == "linux" else "is missing",
    remove_manifest: "can't be read",
    tear_manifest: "is damaged",
    make_it_foreign: "has checkpoint format 99",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_passed_over_by_name_and_stays(tmp_path: Path, damage: object) -> None:
    checkpoints = tmp_path / "checkpoints"
    good, bad = make_checkpoint(checkpoints, 900), make_checkpoint(checkpoints, 1000)
    (checkpoints / ".step-00001100.tmp").mkdir()  # a save that was cut short
    (checkpoints / "notes.txt").touch()
    damage(bad)  # type: ignore[operator]
    found, complaints = newest_good_checkpoint(checkpoints)
    assert found == good
    assert len(complaints) == 1
    assert DAMAGES[damage] in complaints[0]  # type: ignore[index]
    assert bad.is_dir()
    with pytest.raises(BadCheckpoint, match=DAMAGES[damage]):  # type: ignore[index]
        verify_checkpoint(bad)


def test_steps_beyond_eight_digits_are_still_ordered(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000, 5):
        make_checkpoint(tmp_path, step)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [100_000_000, 99_999_999, 5]


def test_an_evaluation_takes_a_run_or_a_checkpoint(tmp_path: Path) -> None:
    newest = make_checkpoint(tmp_path / "run" / "checkpoints", 20)
    assert find_checkpoint(tmp_path / "run") == find_checkpoint(newest) == newest
    flip_a_bit(newest)
    with pytest.raises(UserError, match="SHA-256 differs"):
        find_checkpoint(newest)
    with pytest.raises(UserError, match=r"holds no whole checkpoint \(.*SHA-256 differs"):
        find_checkpoint(tmp_path / "run")
    with pytest.raises(UserError, match="is not a folder"):
        find_checkpoint(tmp_path / "nowhere")


def test_every_flipped_bit_of_a_manifest_is_noticed_or_means_nothing(tmp_path: Path) -> None:
    """Of a few bytes of JSON every single bit: what still reads as a manifest says what was written."""
    facts = {"step": 12, "tokens": 3, "files": {}, "config": {"run": {"seed": 1.5e-3}}, "data_identity": "ab"}
    write_checkpoint_manifest(tmp_path, facts)
    path = tmp_path / "checkpoint.json"
    written, manifest = path.read_bytes(), read_checkpoint_manifest(tmp_path)
    assert {key: manifest[key] for key in facts} == facts
    noticed = 0
    for place in range(len(written)):
        for bit in range(8):
            path.write_bytes(written[:place] + bytes([written[place] ^ 1 << bit]) + written[place + 1 :])
            try:
                found = read_checkpoint_manifest(tmp_path)
            except BadCheckpoint:
                noticed += 1
            else:
                assert {key: found[key] for key in facts} == facts
    assert noticed > 6 * len(written)
