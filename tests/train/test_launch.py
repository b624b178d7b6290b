"""`train/launch.py` with a real torchrun under it: signals, deaths and failures of two ranks."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from common.checkpoint_files import list_checkpoints, verify_checkpoint
from common.run_folder import RunFolder
from tests.helpers.token_sets import make_token_set
from tests.helpers.training import PRETRAIN, PROJECT, losses, run_of, tiny_arguments
from train.run.heartbeat import SILENT_SECONDS

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="signals of a process tree, as Linux has them")
LAUNCH = PROJECT / "train" / "launch.py"
STARTS_AND_WAITS = "import subprocess, sys; subprocess.run(sys.argv[1:])"
SAVE_SECONDS = 40  # longer than torchrun waits for its workers


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_token_set(folder, train_tokens=20_000, val_tokens=500)
    return folder


def launch(script: Path, arguments: list[str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, str(LAUNCH), "--standalone", "--nproc_per_node=2", str(script), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_steps(launcher: "subprocess.Popen[str]", run: RunFolder, steps: int) -> list[psutil.Process]:
    """Wait until some steps are done; return everything the launcher has started."""
    while len(losses(run)) < steps:
        assert launcher.poll() is None, launcher.communicate()[1]
        time.sleep(0.1)
    return psutil.Process(launcher.pid).children(recursive=True)


def ended(family: list[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(family, timeout=60)
    return not alive


def pid_of(run: RunFolder, rank: int) -> int:
    return int(json.loads(run.rank_file(rank).read_text())["pid"])


def state_of(run: RunFolder) -> dict[str, object]:
    state = run.read_state()
    assert state is not None
    return state


def test_a_rank_that_is_killed_is_named_with_its_memory_and_takes_all_with_it(tmp_path: Path, data: Path) -> None:
    run = run_of(tmp_path, "killed")
    launcher = launch(PRETRAIN, tiny_arguments(tmp_path, data, "killed", "--run.max_steps=100000"))
    family = wait_for_steps(launcher, run, 7)
    pid = pid_of(run, 1)
    os.kill(pid, signal.SIGKILL)
    _, errors = launcher.communicate(timeout=60)
    assert launcher.returncode == 128 + signal.SIGKILL, errors
    assert ended(family)
    state = state_of(run)
    assert (state["status"], state["failure"], state["started_step"]) == ("failed", "lost_rank", 0)
    assert state["step"] == list_checkpoints(run.checkpoints)[0][0]
    assert f"(pid {pid}) vanished: killed, probably for memory" in str(state["reason"])
    assert re.search(r"it last held \d+\.\d\d GiB \(step \d+, ", str(state["reason"]))
    assert str(state["reason"]) in run.log.read_text()
    assert f"(pid {pid}) was ended by SIGKILL" in errors.splitlines()[-1]


def test_no_rank_outlives_its_launcher_and_what_it_has_done_is_saved(tmp_path: Path, data: Path) -> None:
    run = run_of(tmp_path, "orphans")
    arguments = tiny_arguments(tmp_path, data, "orphans", "--run.max_steps=100000", "--checkpoint.every_steps=0")
    launcher = launch(PRETRAIN, arguments)
    family = wait_for_steps(launcher, run, 3)
    launcher.kill()
    assert ended(family)
    launcher.communicate()
    state = state_of(run)
    assert (state["status"], state["stop"]) == ("preempted", "launcher")
    assert list_checkpoints(run.checkpoints)[0][0] == state["step"] == max(losses(run))


def test_a_rank_that_waits_for_others_at_the_start_ends_with_its_launcher(tmp_path: Path, data: Path) -> None:
    """It would wait for `run.collective_timeout_seconds`, half an hour. Here the launcher starts one rank of two."""
    arguments = tiny_arguments(tmp_path, data, "alone")
    ready = tmp_path / "ready"
    waiting = tmp_path / "waits.py"
    waiting.write_text(
        textwrap.dedent(
            f"""
            import pathlib, sys
            sys.path.insert(0, {str(PROJECT)!r})
            import train.pretrain
            from train.startup import open_run
            connect = open_run.start_ranks
            def start_ranks(*arguments, **keywords):
                pathlib.Path({str(ready)!r}).touch()
                return connect(*arguments, **keywords)
            open_run.start_ranks = start_ranks
            sys.exit(train.pretrain.main())
            """
        )
    )
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    launcher = psutil.Popen(
        [sys.executable, "-c", STARTS_AND_WAITS, sys.executable, str(waiting), *arguments],
        env=os.environ | rendezvous | {"LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none", "OMP_NUM_THREADS": "1"},
    )
    while not ready.exists():
        assert launcher.poll() is None
        time.sleep(0.02)
    (rank,) = launcher.children()
    launcher.kill()
    launcher.wait()
    assert ended([rank])


def test_an_error_of_one_rank_is_reported_with_rank_host_and_traceback(tmp_path: Path, data: Path) -> None:
    script = tmp_path / "broken.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import os, sys
            sys.path.insert(0, {str(PROJECT)!r})
            from common.errors import exit_on_user_error
            from train.optimization.step import Stepper
            whole = Stepper.__call__
            def broken(self, batch, step):
                if os.environ["RANK"] == "1" and step == 7:
                    raise ZeroDivisionError("seven")
                return whole(self, batch, step)
            Stepper.__call__ = broken
            from train.pretrain import main
            exit_on_user_error(main)
            """
        )
    )
    run = run_of(tmp_path, "broken")
    saved_at_once = "--checkpoint.asynchronous=false"  # step 5 is published before step 7 fails
    launcher = launch(script, tiny_arguments(tmp_path, data, "broken", saved_at_once))
    _, errors = launcher.communicate(timeout=120)
    assert launcher.returncode == 1, errors
    state = state_of(run)
    assert (state["status"], state["failure"], state["step"]) == ("failed", "exception", 5)
    assert str(state["reason"]).startswith("ZeroDivisionError on rank 1 on ")
    report = errors[errors.index("failed first with:") - 60 :]
    assert "rank 1 on" in report
    assert "ZeroDivisionError: seven" in report
    assert "in broken" in report


def test_a_users_mistake_stays_one_line_with_status_2(tmp_path: Path, data: Path) -> None:
    launcher = launch(PRETRAIN, tiny_arguments(tmp_path, data, "bad", "--batch.tokens_per_step=1000"))
    _, errors = launcher.communicate(timeout=120)
    assert launcher.returncode == 2, errors
    (line,) = errors.splitlines()
    assert line.startswith("error: batch.tokens_per_step is 1000, not a whole number of sequences")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("patience", "first_fails"), [(60, True), (0, False)])
def test_a_mistake_is_told_whichever_rank_meets_it_first(tmp_path: Path, patience: int, first_fails: bool) -> None:
    """torchrun ends all ranks when one has ended. One that the first rank does not meet is told by another."""
    script = tmp_path / "mistaken.py"
    script.write_text(
        "import os, sys, time\n"
        f"sys.path[0] = {str(PROJECT)!r}\n"
        "from common import errors\n"
        "def main():\n"
        f"    errors.FIRST_RANK_SECONDS = {patience}\n"
        "    if os.environ['LOCAL_RANK'] == '0':\n"
        f"        time.sleep({2 if first_fails else 600})\n"
        "    raise errors.UserError('this is wrong: do that')\n"
        "errors.exit_on_user_error(main)\n",
        encoding="utf-8",
    )
    launcher = launch(script, [])
    _, errors = launcher.communicate(timeout=120)
    where = "" if first_fails else f" (on {socket.gethostname()})"
    assert (launcher.returncode, errors) == (2, f"error: this is wrong: do that{where}\n")


def test_restarts_inside_a_launch_are_refused_in_one_line() -> None:
    """Ranks of a second attempt waited for good. A LOCAL_RANK left over in the shell does not silence the launcher."""
    done = subprocess.run(
        [sys.executable, str(LAUNCH), "--standalone", str(PRETRAIN)],
        env=os.environ | {"PET_MAX_RESTARTS": "2", "RANK": "1", "LOCAL_RANK": "1"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith("error: --max-restarts is 2 (or PET_MAX_RESTARTS): ranks are not restarted")


def test_a_launcher_that_waits_for_another_machine_ends_when_asked() -> None:
    """No rank has started: nobody would take the signal."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    alone = [f"--master_port={port}", "--nnodes=2", "--node_rank=0", "--master_addr=127.0.0.1"]
    launcher = subprocess.Popen([sys.executable, str(LAUNCH), *alone, str(PRETRAIN)], stderr=subprocess.PIPE, text=True)
    while socket.socket().connect_ex(("127.0.0.1", port)) != 0:  # until torchrun waits there
        assert launcher.poll() is None
        time.sleep(0.05)
    family = psutil.Process(launcher.pid).children(recursive=True)
    launcher.send_signal(signal.SIGTERM)
    _, errors = launcher.communicate(timeout=60)
    assert launcher.returncode == 0, errors
    assert errors.splitlines()[-1] == "no rank has started yet: there is nothing to save"
    assert ended(family)


def test_a_frozen_rank_is_named_as_one_and_is_no_memory_case(tmp_path: Path, data: Path) -> None:
    """Its peer times out and leaves; torchrun asks the frozen one to end, waits for 30 s and kills it."""
    patience = f"--run.collective_timeout_seconds={SILENT_SECONDS + 6}"
    run = run_of(tmp_path, "frozen")
    launcher = launch(PRETRAIN, tiny_arguments(tmp_path, data, "frozen", "--run.max_steps=100000", patience))
    wait_for_steps(launcher, run, 7)
    pid = pid_of(run, 1)
    os.kill(pid, signal.SIGSTOP)
    _, errors = launcher.communicate(timeout=200)
    assert launcher.returncode == 1, errors
    state = state_of(run)
    assert (state["status"], state["failure"]) == ("failed", "lost_rank")
    assert f"(pid {pid}) is frozen, or stuck in the kernel: no sign of life for " in str(state["reason"])
    *_, before, last = errors.splitlines()
    assert f"(pid {pid}) was killed after another's failure: it did not end when torchrun asked" in before
    assert re.fullmatch(r"rank 0 on .* \(pid \d+\) failed first with exit status 1", last)
    assert "for lack of memory" not in errors


def test_ranks_meet_on_a_machine_whose_name_does_not_resolve(tmp_path: Path) -> None:
    """A laptop away from its network, a container: torchrun hands the name out as the address to meet at."""
    script = tmp_path / "meet.py"
    script.write_text(
        "import os\n"
        "import torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "os.write(1, b'met %d\\n' % dist.get_rank())\n"  # in one piece: print would write word by word
        "dist.destroy_process_group()\n"
    )
    renamed = "import os, socket, sys; socket.sethostname('no-such-name.invalid'); os.execv(sys.argv[1], sys.argv[1:])"
    launch = [sys.executable, "-c", renamed, sys.executable, LAUNCH, "--standalone", "--nproc_per_node=2", script]
    if subprocess.run(["unshare", "--uts", "true"], capture_output=True).returncode != 0:
        pytest.skip("giving the machine another name takes root")
    done = subprocess.run(
        ["unshare", "--uts", *map(str, launch)],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["met 0", "met 1"]


@pytest.mark.slow
def test_a_save_longer_than_torchruns_patience_survives_sigterm(tmp_path: Path, data: Path) -> None:
    script = tmp_path / "slow.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import sys, time
            sys.path.insert(0, {str(PROJECT)!r})
            import model.weights
            quick = model.weights.save_tensors
            def slow(path, tensors):
                if "weights" in path.name:
                    time.sleep({SAVE_SECONDS})
                quick(path, tensors)
            model.weights.save_tensors = slow
            from common.errors import exit_on_user_error
            from train.pretrain import main
            exit_on_user_error(main)
            """
        )
    )
    run = run_of(tmp_path, "slow")
    arguments = tiny_arguments(tmp_path, data, "slow", "--run.max_steps=100000", "--checkpoint.every_steps=0")
    launcher = launch(script, arguments)
    family = wait_for_steps(launcher, run, 3)
    started = time.monotonic()
    launcher.send_signal(signal.SIGTERM)
    launcher.send_signal(signal.SIGTERM)  # Slurm sends two
    _, errors = launcher.communicate(timeout=150)
    assert launcher.returncode == 0, errors
    assert time.monotonic() - started >= SAVE_SECONDS, "the save was not slow: nothing has been tested"
    assert ended(family)
    state = state_of(run)
    assert (state["status"], state["stop"], state["reason"]) == ("preempted", "signal", "SIGTERM")
    step, path = list_checkpoints(run.checkpoints)[0]
    assert step == state["step"] == max(losses(run))
    verify_checkpoint(path)
