"""wandb mirrors the run, and may fail or hang as it likes: no step waits for it."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from common.run_folder import RunFolder
from model.ranks import Ranks
from tests.eval.hellaswag_files import official_rows, write_official
from tests.helpers.token_sets import make_token_set
from tests.helpers.training import PRETRAIN, losses, run_of, tiny_arguments, train_by_path
from train.run.recorder import Recorder
from train.run.wandb_mirror import MIRROR_FILE, read_place

FAKE = """
import threading, time
def never(*arguments, **keywords):
    threading.Event().wait()
def fail(*arguments, **keywords):
    raise RuntimeError("no such account")
class Settings:
    def __init__(self, **keywords): pass
class Run:
    log = staticmethod({log})
    finish = staticmethod({finish})
def init(**keywords):
    {init}
    return Run()
"""
FINE = "lambda *arguments, **keywords: None"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_token_set(folder, train_tokens=5_000, val_tokens=500)
    return folder


def fake_wandb(folder: Path, *, init: str = "pass", log: str = FINE, finish: str = FINE) -> str:
    """A folder with a module `wandb` that misbehaves, for PYTHONPATH."""
    folder.mkdir()
    (folder / "wandb.py").write_text(FAKE.format(init=init, log=log, finish=finish))
    return str(folder)


@pytest.mark.parametrize(
    ("fake", "said"),
    [
        ({"init": "fail()"}, "RuntimeError: no such account"),
        ({"log": "fail"}, "RuntimeError: no such account"),
        ({"finish": "fail"}, "RuntimeError: no such account"),
        ({"init": "never()"}, "it did not finish within 1 s"),
        ({"log": "never"}, "it did not finish within 1 s"),
        ({"finish": "never"}, "it did not finish within 1 s"),
    ],
)
def test_a_mirror_that_fails_or_hangs_costs_no_step(
    tmp_path: Path, data: Path, fake: dict[str, str], said: str
) -> None:
    path = fake_wandb(tmp_path / "fake", **fake)
    arguments = tiny_arguments(tmp_path, data, "mirrored", "--log.wandb=true", "--log.wandb_finish_seconds=1")
    done = train_by_path(*arguments, "--run.max_steps=4", PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    assert sorted(losses(run_of(tmp_path, "mirrored"))) == [1, 2, 3, 4]
    assert done.stdout.count("wandb is not mirroring this run") == 1
    assert said in done.stdout


def test_mirrors_that_are_not_installed_say_how_to_install_them(tmp_path: Path, data: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules.update(wandb=None, tensorboard=None)\n")
    asked = ("--log.wandb=true", "--log.tensorboard=true", "--run.max_steps=4")
    done = train_by_path(*tiny_arguments(tmp_path, data, "alone", *asked), PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    for name, needs, package in (
        ("wandb", "Weights & Biases needs wandb", "wandb"),
        ("TensorBoard", "TensorBoard needs tensorboard", "tensorboard"),
    ):
        (line,) = [line for line in done.stdout.splitlines() if line.startswith(f"{name} is not mirroring this run")]
        assert needs in line and f"-m pip install {package} -c " in line


def is_wandbs_service(process: psutil.Process) -> bool:
    try:
        return any("wandb-core" in argument for argument in process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):  # one of the short-lived ones beside it
        return False


def test_a_service_that_stands_still_does_not_keep_the_run_from_ending(tmp_path: Path, data: Path) -> None:
    """wandb's own end, at the exit of the process, would wait for it for ever."""
    arguments = tiny_arguments(tmp_path, data, "still", "--log.wandb=true", "--log.wandb_finish_seconds=1")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "HOME": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, str(PRETRAIN), *arguments, "--run.max_steps=1000000"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while not list(run_of(tmp_path, "still").path.glob("wandb/offline-run-*/*.wandb")):  # it has begun to write
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    (service,) = [child for child in psutil.Process(process.pid).children(recursive=True) if is_wandbs_service(child)]
    service.suspend()
    process.terminate()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert "wandb is not mirroring this run (it did not finish within 1 s)" in output
    assert "Traceback" not in output
    assert not service.is_running()


def mirrored_steps(run: RunFolder, key: str = "train/loss") -> list[int]:
    """The steps of all records with this key in the run's offline wandb files, in order of writing."""
    return [step for step, _ in mirrored_values(run, key)]


def mirrored_values(run: RunFolder, key: str) -> list[tuple[int, dict[str, Any]]]:
    """The steps, and the parts of what the key has at them ("" where it has none)."""
    from wandb.proto import wandb_internal_pb2 as protocol

    found = []
    for path in sorted(run.path.glob("wandb/offline-run-*/*.wandb")):
        for data in leveldb_records(path.read_bytes()):
            record = protocol.Record()  # type: ignore[attr-defined]
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
                of_it = {name: value for name, value in items.items() if f"{name}/".startswith(f"{key}/")}
                parts = {name[len(key) :].strip("/"): json.loads(value) for name, value in of_it.items()}
                if parts:
                    found.append((int(items["step"]), parts))
    return found


def run_records(run: RunFolder) -> list[Any]:
    """How the offline wandb files describe the run: project, group …"""
    from wandb.proto import wandb_internal_pb2 as protocol

    found = []
    for path in sorted(run.path.glob("wandb/offline-run-*/*.wandb")):
        for data in leveldb_records(path.read_bytes()):
            record = protocol.Record()  # type: ignore[attr-defined]
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "run":
                found.append(record.run)
    return found


def leveldb_records(content: bytes) -> list[bytes]:
    """The records of a LevelDB log: 7 bytes of header, blocks of 32 KiB, records cut into first, middle and last."""
    records, parts, position = [], [], 7  # wandb's own header comes first
    while position + 7 <= len(content):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        length = int.from_bytes(content[position + 4 : position + 6], "little")
        kind = content[position + 6]
        if kind == 0:
            break
        parts.append(content[position + 7 : position + 7 + length])
        position += 7 + length
        if kind in (1, 4):  # whole, or last part
            records.append(b"".join(parts))
            parts = []
    return records


def test_offline_without_an_account_every_step_appears_once_over_a_resume(tmp_path: Path, data: Path) -> None:
    answers = write_official(tmp_path / "official.jsonl", official_rows(9, words_at_most=1))
    hellaswag = ("--eval.hellaswag_every_steps=5", f"--eval.hellaswag_data={answers}", "--schedule.kind=constant")
    samples = ('--eval.prompts=["a"]', "--eval.sample_every_steps=5", "--eval.sample_tokens=2")
    for steps in (7, 12):
        mirrored = ("--log.wandb=true", f"--run.max_steps={steps}", *hellaswag, *samples)
        arguments = tiny_arguments(tmp_path, data, "offline", *mirrored)
        done = train_by_path(
            *arguments, WANDB_MODE="offline", WANDB_API_KEY="", HOME=str(tmp_path),
            WANDB_PROJECT="mine", WANDB_RUN_GROUP="pair", WANDB_ENTITY="us",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "not mirroring" not in done.stdout
        assert "wandb mirrors this run: offline, 'wandb sync " in done.stdout
    run = run_of(tmp_path, "offline")
    assert mirrored_steps(run) == list(range(1, 13))
    assert mirrored_steps(run, "val/loss") == [0, 5, 7, 10, 12]
    assert mirrored_steps(run, "hellaswag/acc_norm") == [5, 7, 10, 12]
    assert mirrored_steps(run, "val/bits_per_byte") == [0, 5, 7, 10, 12]
    assert mirrored_steps(run, "samples") == [5, 10]
    assert {(table["_type"], table["ncols"]) for _, table in mirrored_values(run, "samples")} == {("table-file", 3)}
    assert {(one.project, one.run_group, one.entity) for one in run_records(run)} == {("mine", "pair", "us")}
    assert set(mirrored_steps(run, "flops")) == set(range(13))
    assert {0, 12} <= set(mirrored_steps(run, "val/causal"))
    assert len({path.name.split("-")[-1] for path in run.path.glob("wandb/offline-run-*")}) == 1  # one wandb run


@pytest.mark.parametrize("content", ["[]", "3", "{}", '{"id": 7}', "torn", "[" * 100_000])
def test_a_place_that_is_none_is_made_anew(tmp_path: Path, content: str) -> None:
    run = RunFolder(tmp_path)
    (tmp_path / MIRROR_FILE).write_text(content)
    place = read_place(run)
    assert len(place["id"]) == 12
    assert read_place(run) == place


def test_lines_of_several_threads_stay_whole(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Mirrors say in their own threads what became of them."""
    alone = Ranks(rank=0, world_size=1, local_rank=0, local_world_size=1, device=torch.device("cpu"))
    recorder = Recorder(RunFolder(tmp_path), alone, 1, first_step=0, line_every=1)
    recorder.open_files()
    lines = [letter * 60 for letter in "abcdefgh"]

    def say(line: str) -> None:
        for _ in range(300):
            recorder.log(line)

    threads = [threading.Thread(target=say, args=(line,)) for line in lines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(capfd.readouterr().out.splitlines()) == sorted(lines * 300)
