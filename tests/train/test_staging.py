"""Copies of a token set on local disks: what was hashed is trusted, and nothing that is not the set is trained on."""

import ctypes
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from common.errors import UserError
from common.metrics_file import read_json_lines
from common.processes import boot_id
from data_prep.token_sets.token_set import TokenSet
from model.ranks import Ranks, start_ranks
from tests.helpers.mounts import small_disk
from tests.helpers.ranks import run_ranks
from tests.helpers.token_sets import make_token_set
from tests.helpers.training import losses, run_of, start_ranks_training, tiny_arguments, train, train_by_path
from train.batches import local_copy as staging
from train.batches.local_copy import STAGED_FILE, stage

CLONE_NEWNS = 0x00020000
ALONE = Ranks(0, 1, 0, 1, torch.device("cpu"))


@pytest.fixture
def made(tmp_path: Path) -> TokenSet:
    return make_token_set(tmp_path / "data", train_tokens=3_000, val_tokens=500, shard_tokens=1_000)


def staged_in(tokens: TokenSet, folder: Path, ranks: Ranks = ALONE) -> Path:
    """Where the set is read from that was staged to `folder`, which must have worked."""
    found, in_place = stage(tokens, folder, ranks)
    assert in_place == {}
    return found.folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != STAGED_FILE}


def flip(path: Path) -> None:
    """Damage a file that keeps its size, inode and, as disks do, its times."""
    stamps, content = path.stat(), bytearray(path.read_bytes())
    content[7] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stamps.st_atime_ns, stamps.st_mtime_ns))


def test_a_staged_set_is_the_same_and_is_used_again_without_reading_it(
    tmp_path: Path, made: TokenSet, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    local = tmp_path / "local"
    folder = staged_in(made, local)
    assert f"staging to {folder}: 6.8 KiB\n" in capsys.readouterr().err, "announced with its size"
    assert folder.parent == local
    assert contents(folder) == contents(made.folder)
    assert TokenSet.open(folder).identity == made.identity
    before = {path: path.stat() for path in folder.iterdir()}
    monkeypatch.setattr(staging, "sha256_file", lambda path: pytest.fail(f"{path} was hashed again"))
    assert staged_in(made, local) == folder
    assert {path: path.stat() for path in folder.iterdir()} == before


def test_a_shard_that_is_not_the_manifests_ends_the_run_on_all_ranks(tmp_path: Path, made: TokenSet) -> None:
    flip(made.folder / "train-00001.bin")
    arguments = tiny_arguments(tmp_path, made.folder, "corrupt", f"--data.stage_to={tmp_path / 'local'}")
    assert start_ranks_training(2, tmp_path, arguments).join() == [2, 2]
    assert not run_of(tmp_path, "corrupt").path.exists()
    done = train_by_path(*arguments)
    assert done.returncode == 2
    assert f"{made.folder / 'train-00001.bin'} is not what was prepared" in done.stderr.splitlines()[-1]
    (folder,) = (tmp_path / "local").iterdir()
    assert [path.name for path in folder.iterdir()] == ["train-00000.bin"]  # nothing of the other, no temporary file


def test_a_set_that_cannot_be_read_is_no_full_disk(tmp_path: Path, made: TokenSet) -> None:
    shard = made.folder / "train-00001.bin"
    shard.unlink()
    shard.mkdir()  # reading it fails, whoever reads
    with pytest.raises(UserError, match=r"train-00001\.bin can't be read \(it is a folder, not a file\): copy"):
        stage(made, tmp_path / "local", ALONE)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "train-00001.bin").unlink(),
        lambda folder: (folder / "train-00002.bin").write_bytes(b"short"),
        lambda folder: flip(folder / "train-00000.bin"),
        lambda folder: (folder / "manifest.json").write_text("{"),
        lambda folder: (folder / STAGED_FILE).write_text("{"),
        lambda folder: (folder / STAGED_FILE).write_text("[" * 5_000 + "]" * 5_000),
        lambda folder: (folder / STAGED_FILE).write_text(
            f'{{"boot": "{boot_id()}", "files": {{"train-00000.bin": 3}}}}'
        ),
    ],
    ids=["gone", "cut short", "other bytes", "manifest", "record", "deep record", "record of another shape"],
)
def test_a_copy_that_lost_something_is_made_whole(
    tmp_path: Path, made: TokenSet, damage: Callable[[Path], object]
) -> None:
    """Node-local disks get cleaned file by file, and lose bytes as others do."""
    folder = staged_in(made, tmp_path / "local")
    left = folder / ".train-00000.bin.0123abcd.tmp"  # of a copy that was killed long ago
    left.touch()
    os.utime(left, (0, 0))
    damage(folder)
    assert staged_in(made, tmp_path / "local") == folder
    assert contents(folder) == contents(made.folder)


def test_once_a_boot_a_copy_is_hashed_whatever_its_times_are(tmp_path: Path, made: TokenSet) -> None:
    folder = staged_in(made, tmp_path / "local")
    shard, record = folder / "train-00000.bin", folder / STAGED_FILE
    flip(shard)
    known = json.loads(record.read_text())
    known["files"][shard.name] = [*known["files"][shard.name][:4], shard.stat().st_ctime_ns]  # as a disk's fault would
    record.write_text(json.dumps(known))
    damaged = contents(folder)
    assert contents(staged_in(made, tmp_path / "local")) == damaged  # nothing tells, in the same boot
    record.write_text(json.dumps(known | {"boot": "another"}))
    assert contents(staged_in(made, tmp_path / "local")) == contents(made.folder)
    flip(shard)
    record.write_text(json.dumps(known))
    found, _ = stage(made, tmp_path / "local", ALONE, "full")  # what data.verify asks of the data, it asks of a copy
    assert contents(found.folder) == contents(made.folder)


def test_each_node_has_its_own_folder_by_a_variable_which_stays_in_the_configuration(
    tmp_path: Path, made: TokenSet
) -> None:
    home = tmp_path / "home"
    (home / "sets").mkdir(parents=True)
    made.folder.rename(home / "sets" / "mine")
    given = ["--data.path=~/sets/mine", "--run.root=~/runs", "--data.stage_to=$NODE_DISK/x", "--run.max_steps=1"]
    arguments = [*tiny_arguments(tmp_path, tmp_path, "named"), *given, "--checkpoint.every_steps=0"]
    done = train_by_path(*arguments, cwd=tmp_path, HOME=str(home), NODE_DISK="")
    assert (done.returncode, done.stderr) == (
        2, "error: $NODE_DISK/x: the environment variable NODE_DISK is not set: set it, or write the path out\n"
    )  # fmt: skip
    for disk in ("one", "two"):  # a job that is requeued on another node, with the configuration that the run has kept
        done = train_by_path(*arguments, cwd=tmp_path, HOME=str(home), NODE_DISK=str(tmp_path / disk))
        assert done.returncode == 0, done.stderr
        assert [path.name for path in (tmp_path / disk / "x").iterdir()] == [f"longhaul-{made.identity[:16]}"]
        written = home / "runs" / "named" / "config.yaml"
        arguments = [f"--config={written}", "--run.max_steps=2"]
    config = yaml.safe_load(written.read_text())
    assert (config["data"]["stage_to"], config["run"]["root"]) == ("$NODE_DISK/x", "~/runs")
    assert {path.name for path in tmp_path.iterdir()} == {"home", "one", "two", "tiny.yaml"}


def give_away(path: Path) -> None:
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("giving a file to another user takes root")
    os.chown(path, 12345, 12345)


def test_what_another_user_or_a_link_put_there_is_not_read(tmp_path: Path, made: TokenSet) -> None:
    """Tokens of the same size under the same name."""
    local = tmp_path / "local"
    foreign = make_token_set(tmp_path / "foreign", train_tokens=3_000, val_tokens=500, shard_tokens=1_000, seed=9)
    planted = local / f"longhaul-{made.identity[:16]}"
    local.mkdir()
    planted.symlink_to(foreign.folder)
    before = contents(foreign.folder)
    own = staged_in(made, local)
    assert own != planted
    assert contents(own) == contents(made.folder)
    assert contents(foreign.folder) == before
    (own / "train-00000.bin").unlink()
    (own / "train-00000.bin").symlink_to(foreign.folder / "train-00000.bin")
    staged_in(made, local)
    assert contents(own) == contents(made.folder)
    assert contents(foreign.folder) == before

    shutil.rmtree(own)
    planted.unlink()
    shutil.copytree(foreign.folder, planted)
    shutil.copyfile(made.folder / "manifest.json", planted / "manifest.json")
    for path in planted.iterdir():
        give_away(path)
    assert contents(staged_in(made, local)) == contents(made.folder)  # the user's own folder, others' files
    shutil.copyfile(foreign.folder / "train-00000.bin", planted / "train-00000.bin")
    planted.chmod(0o777)
    give_away(planted)
    assert staged_in(made, local) == own
    assert contents(own) == contents(made.folder)
    give_away(own)
    found, in_place = stage(made, local, ALONE)
    assert found.folder == made.folder
    assert ["another user's" in why for why in in_place.values()] == [True]


def test_another_run_that_stages_the_same_set_leaves_a_copy_alone(
    tmp_path: Path, made: TokenSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs on a node write into files of their own, the more so where one reads a damaged source."""
    damaged = tmp_path / "damaged"
    shutil.copytree(made.folder, damaged)
    (damaged / "train-00000.bin").write_bytes(bytes(2_000))

    def stage_in_between(path: Path) -> None:
        monkeypatch.undo()
        with pytest.raises(UserError, match="is not what was prepared"):
            stage(TokenSet.open(damaged), tmp_path / "local", ALONE)

    monkeypatch.setattr(staging, "fsync_file", stage_in_between)  # the first run has written and not yet published
    assert contents(staged_in(made, tmp_path / "local")) == contents(made.folder)


def test_where_there_is_no_room_the_run_reads_the_original_and_records_it(tmp_path: Path, made: TokenSet) -> None:
    with small_disk(tmp_path / "local", 4) as full:
        arguments = tiny_arguments(tmp_path, made.folder, "unstaged", "--run.max_steps=2", f"--data.stage_to={full}")
        train(2, tmp_path, arguments)
    run = run_of(tmp_path, "unstaged")
    assert f"data are read from {made.folder}, not staged, on " in run.log.read_text()
    (why,) = read_json_lines(run.metrics)[0]["data_in_place"].values()
    assert why.startswith(str(full))
    (tmp_path / "file").touch()
    arguments = [f"--data.stage_to={tmp_path / 'file' / 'below'}", "--run.max_steps=2"]
    train(1, tmp_path, tiny_arguments(tmp_path, made.folder, "nowhere", *arguments))
    assert "Not a directory" in run_of(tmp_path, "nowhere").log.read_text()
    staged = tiny_arguments(tmp_path, made.folder, "staged", "--run.max_steps=2", f"--data.stage_to={tmp_path / 'ok'}")
    train(2, tmp_path, staged)
    run = run_of(tmp_path, "staged")
    assert f"data: {tmp_path / 'ok'}" in run.log.read_text()
    assert "data_in_place" not in read_json_lines(run.metrics)[0]
    assert losses(run) == losses(run_of(tmp_path, "unstaged"))


def stage_where_each_rank_has_its_own_disk(data: Path, local: Path) -> tuple[str, int]:
    """Stage as ranks do whose containers share the host's name only; return what is read and how many hosts fail."""
    ranks = start_ranks("cpu")
    if ranks.rank == 1:
        assert ctypes.CDLL(None).unshare(CLONE_NEWNS) == 0
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(local)], check=True)
    tokens, in_place = stage(TokenSet.open(data), local, ranks)
    ranks.close()
    return str(tokens.folder), len(in_place)


def test_ranks_of_one_host_that_see_different_disks_read_the_original(tmp_path: Path, made: TokenSet) -> None:
    (tmp_path / "local").mkdir()
    with small_disk(tmp_path / "probe", 4):  # or skip: mounting takes rights
        arguments = (made.folder, tmp_path / "local")
        found = run_ranks(2, tmp_path / "store", stage_where_each_rank_has_its_own_disk, *arguments)
    assert found == [(str(made.folder), 1)] * 2
