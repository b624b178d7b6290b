"""The newest whole checkpoint is found by looking, whatever else lies there."""

import hashlib
import json
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
from common.checkpoint_manifest import LOSS_SCALE
from common.errors import UserError
from tests.helpers.manifests import WHOLE
from train.settings.command_line import as_dict
from train.settings.sections import Config


def make_checkpoint(checkpoints: Path, step: int, content: bytes = b"weights") -> Path:
    folder = checkpoints / checkpoint_name(step)
    folder.mkdir(parents=True)
    (folder / "weights.safetensors").write_bytes(content)
    files = {"weights.safetensors": {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}}
    (folder / "checkpoint.json").write_text(json.dumps({**WHOLE, "step": step, "files": files}))
    return folder


def test_a_fact_that_is_no_number_leaves_the_manifest_whole(tmp_path: Path) -> None:
    write_checkpoint_manifest(tmp_path, {**WHOLE, "val_loss": float("nan"), "best": [float("inf")]})
    assert "NaN" not in (tmp_path / "checkpoint.json").read_text()
    manifest: Mapping[str, Any] = verify_checkpoint(tmp_path)
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
    model = {"n_layer": 3, "norm_eps": 1.5e-3}
    facts = {**WHOLE, "step": 12, "tokens": 3, "model": model, "world_size": 2}
    write_checkpoint_manifest(tmp_path, facts)
    path = tmp_path / "checkpoint.json"
    written, manifest = path.read_bytes(), dict(read_checkpoint_manifest(tmp_path))
    assert {key: manifest[key] for key in facts} == facts
    noticed = 0
    for place in range(len(written)):
        for bit in range(8):
            path.write_bytes(written[:place] + bytes([written[place] ^ 1 << bit]) + written[place + 1 :])
            try:
                found = dict(read_checkpoint_manifest(tmp_path))
            except BadCheckpoint:
                noticed += 1
            else:
                assert {key: found[key] for key in facts} == facts
    assert noticed > 6 * len(written)


WRONG: dict[str, dict[str, Any]] = {  # each written with the hash of itself, as only somebody who means it does
    "sequences: it is not a whole number": {"sequences": {}},
    "step: it is not a whole number": {"step": "5"},
    "tokens: .*greater than or equal to 0": {"tokens": -1},
    "step: .*less than": {"step": 1 << 63},
    "files: it is missing": {"files": None},
    "files.x.sha256: it is missing": {"files": {"x": {"bytes": 1}}},
    "files.../x.*: it is not a plain name": {"files": {"../x": {"bytes": 0, "sha256": "0" * 64}}},
    "model: it is not an object": {"model": [1]},
    "tokenizer.kind: it is missing": {"tokenizer": {}},
    "data_identity: .*pattern": {"data_identity": "../x"},
    "config.run: it is not an object": {"config": {**as_dict(Config()), "run": []}},
    "config.schedule.warmup.*: it is neither whole steps": {
        "config": {**as_dict(Config()), "schedule": {**as_dict(Config())["schedule"], "warmup": 1.5}}
    },
    "position_in.stride: .*greater than 0": {
        "position_in": {"data_identity": None, "block_size": 16, "stride": 0, "seed": 1}
    },
    "warm_up.start: it is after step 7": {"warm_up": {"start": 8, "steps": 1}},
    "scaler: it is not a loss scale": {"scaler": {"scale": 2.0}},
    "world_size: it is missing": {"scaler": dict.fromkeys(LOSS_SCALE, 1.0)},
    "lora.rank: .*greater than 0": {"lora": {"rank": 0, "alpha": 1.0, "dropout": 0.0, "targets": ["c_fc"]}},
    "base: folder or sha256": {"lora": {"rank": 1, "alpha": 1.0, "dropout": 0.0, "targets": ["c_fc"]}},
    "base.folder: it is not a plain name": {"base": {"identity": "0" * 64, "folder": "../one", "sha256": "0" * 64}},
    "val_tokens: it is not a whole number": {"val_tokens": [640]},
    "version: it is not text": {"version": 2},
}


@pytest.mark.parametrize("words", WRONG)
def test_a_manifest_of_another_shape_is_passed_over_and_named(tmp_path: Path, words: str) -> None:
    good, bad = make_checkpoint(tmp_path, 6), make_checkpoint(tmp_path, 7)
    facts = {**WHOLE, "step": 7, **WRONG[words]}
    write_checkpoint_manifest(bad, {key: value for key, value in facts.items() if value is not None or key != "files"})
    found, complaints = newest_good_checkpoint(tmp_path)
    assert found == good
    assert re.fullmatch(rf"{bad / 'checkpoint.json'} is damaged \(.*{words}.*\)", complaints[0])


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["checkpoint.json", "weights.safetensors"])
def test_what_is_no_file_is_not_waited_for(tmp_path: Path, name: str) -> None:
    """A pipe has no end, and /dev/zero neither; both have the size 0, which a manifest may list."""
    folder = make_checkpoint(tmp_path, 7, b"")
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(BadCheckpoint, match=r"can't be read: it is a pipe, not a file"):
        verify_checkpoint(folder)
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")
    with pytest.raises(BadCheckpoint, match=r"can't be read: it is a device, not a file"):
        verify_checkpoint(folder)
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(BadCheckpoint, match=r"can't be read: it is a folder, not a file"):
        verify_checkpoint(folder)


def test_a_manifest_that_would_take_the_memory_or_the_stack_is_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, 7)
    path = folder / "checkpoint.json"
    for content in (b"[" * 100_000, b'{"format_version": ' + b"[" * 100_000, b'{"step": ' + b"9" * 5_000 + b"}"):
        path.write_bytes(content)
        with pytest.raises(BadCheckpoint, match="is damaged"):
            read_checkpoint_manifest(folder)
    with open(path, "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(BadCheckpoint, match=r"is damaged \(it has more than"):
        read_checkpoint_manifest(folder)
