"""What a launch listens at, who can take part in it, and that nothing that is planted in its stores is run."""

import base64
import contextlib
import os
import pickle
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch.distributed as dist

from common.errors import UserError
from model.meeting import MEETING_KEY, STORE_FILE, open_store, tcp_store
from model.rank_environment import Place
from tests.helpers.listening import listened_at
from tests.helpers.token_sets import make_token_set
from tests.helpers.training import PRETRAIN, PROJECT, losses, run_of, tiny_arguments

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the launcher's platform")
LAUNCH = [sys.executable, str(PROJECT / "train" / "launch.py"), "--nproc_per_node=2"]
HERE = ("--standalone",)
RANK_WITHOUT_US = """
import os, pathlib, time
import torch.distributed as dist
dist.init_process_group("gloo")
here = pathlib.Path(__file__).parent
(here / f"{dist.get_rank()}.met").touch()
while not (here / "leave").exists():
    time.sleep(0.02)
dist.barrier()
dist.destroy_process_group()
"""
RANK_OF_OURS = f"""
import sys
sys.path.insert(0, {str(PROJECT)!r})
from model.ranks import start_ranks
start_ranks("cpu")
{RANK_WITHOUT_US.replace('dist.init_process_group("gloo")', "")}
"""


class Bomb:
    """What it is unpickled as writes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


@contextmanager
def launched(
    script: Path, *arguments: str, options: tuple[str, ...] = HERE, environment: dict[str, str] | None = None
) -> Iterator[Any]:
    """A launcher, which is killed with all it has started if the block fails."""
    launcher = psutil.Popen(
        [*LAUNCH, *options, str(script), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {}),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield launcher
    except BaseException:
        with contextlib.suppress(psutil.NoSuchProcess):  # all of them have ended
            for process in [*launcher.children(recursive=True), launcher]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        raise


def family(launcher: Any) -> list[psutil.Process]:
    """The launcher, torchrun's agent, and two ranks."""
    found = [launcher, *launcher.children(recursive=True)]
    assert len(found) == 4
    return found


def listening(processes: list[psutil.Process]) -> dict[str, set[int]]:
    """By address, which processes listen there: TCP of both versions, and UDP."""
    places: dict[str, set[int]] = {}
    for process in processes:
        datagrams = {place.laddr.ip for place in process.net_connections("udp")}
        for address in listened_at(process.pid) | datagrams:
            places.setdefault(address, set()).add(process.pid)
    return places


def wait_until(launcher: Any, reached: Any) -> None:
    while not reached():
        assert launcher.poll() is None, launcher.communicate()[1]
        time.sleep(0.02)


def have_met(folder: Path) -> bool:
    """Whether both ranks of a script above have."""
    return all((folder / f"{rank}.met").exists() for rank in (0, 1))


def environment_of(process: psutil.Process) -> dict[str, str]:
    return dict(process.environ())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_token_set(folder, train_tokens=20_000, val_tokens=500)
    return folder


def plant(store: Any, bomb: bytes) -> int:
    """Overwrite every entry; how many there were."""
    keys = store.list_keys()
    for key in keys:
        store.set(key, bomb)
    return len(keys)


def test_on_one_machine_nothing_listens_beyond_it_and_nothing_planted_is_run(tmp_path: Path, data: Path) -> None:
    """A site's variables for runs across machines change nothing of it."""
    run, marker = run_of(tmp_path, "alone"), tmp_path / "ran"
    bomb = pickle.dumps(Bomb(marker))
    arguments = tiny_arguments(tmp_path, data, "alone", "--run.max_steps=100000", "--checkpoint.every_steps=10")
    site = {"GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "eth0", STORE_FILE: str(tmp_path / "another's")}
    with launched(PRETRAIN, *arguments, environment=site) as launcher:
        wait_until(launcher, lambda: len(losses(run)) >= 3)
        processes = family(launcher)
        ranks = [process for process in processes if "RANK" in process.environ()]
        assert listening(processes).keys() == {"127.0.0.1"}
        store = Path(environment_of(ranks[0])[STORE_FILE])
        assert stat.S_IMODE(store.parent.stat().st_mode) == 0o700
        assert store.parent.stat().st_uid == os.geteuid()
        assert {environment_of(rank)["NCCL_SOCKET_IFNAME"] for rank in ranks} == {"lo"}
        assert plant(dist.FileStore(str(store), -1), bomb) > 0  # type: ignore[attr-defined]
        agent = launcher.children()[0]
        for port in [place.laddr.port for place in agent.net_connections("tcp") if place.status == "LISTEN"]:
            torchs = dist.TCPStore("127.0.0.1", port, None, False)  # type: ignore[attr-defined]
            plant(torchs, base64.b64encode(bomb))  # as torchrun's c10d rendezvous keeps its pickles
        assert b"touch" in store.read_bytes(), "nothing was planted"
        after = len(losses(run)) + 15  # past saves and measurements, where ranks tell each other most
        wait_until(launcher, lambda: len(losses(run)) >= after)
        for _ in range(3):  # signs of life: each comes 5 s after the other, as torchrun looks at its rendezvous
            before = run.rank_file(0).read_bytes()
            wait_until(launcher, lambda before=before: run.rank_file(0).read_bytes() != before)
        launcher.send_signal(signal.SIGTERM)
        _, errors = launcher.communicate(timeout=120)
    assert launcher.returncode == 0, errors
    state = run.read_state()
    assert state is not None
    assert state["status"] == "preempted"
    assert not marker.exists()
    assert not store.parent.exists()
    pickle.loads(bomb)
    assert marker.exists(), "the bomb is none: nothing has been tested"


def test_what_is_planted_while_the_ranks_meet_is_not_run_either(tmp_path: Path, data: Path) -> None:
    """At worst they find no addresses and fail. Only the user can do that to himself: the folder is his."""
    marker, planted = tmp_path / "ran", 0
    bomb = pickle.dumps(Bomb(marker))
    (tmp_path / "temporary").mkdir()
    arguments, environment = tiny_arguments(tmp_path, data, "planted"), {"TMPDIR": str(tmp_path / "temporary")}
    with launched(PRETRAIN, *arguments, environment=environment) as launcher:
        while launcher.poll() is None:
            for path in (tmp_path / "temporary").glob("longhaul-launch-*/store"):
                store = dist.FileStore(str(path), -1)  # type: ignore[attr-defined]
                store.set_timeout(timedelta(milliseconds=100))
                with contextlib.suppress(dist.DistError):  # gone by now
                    planted += plant(store, bomb)
        launcher.communicate()
    assert planted > 0
    assert not marker.exists()


@pytest.mark.parametrize(
    "options", [(), ("--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0")], ids=["static", "c10d"]
)
def test_ranks_that_torch_connects_listen_nowhere_else_either(tmp_path: Path, options: tuple[str, ...]) -> None:
    script = tmp_path / "rank.py"
    script.write_text(RANK_WITHOUT_US)
    with launched(script, options=options) as launcher:
        wait_until(launcher, lambda: have_met(tmp_path))
        assert listening(family(launcher)).keys() == {"127.0.0.1"}
        (tmp_path / "leave").touch()
        _, errors = launcher.communicate(timeout=60)
    assert launcher.returncode == 0, errors


def test_across_machines_only_the_address_that_others_call_is_listened_at(tmp_path: Path) -> None:
    """Two launchers of this machine, at an address of it that nothing else uses. The id is in no command line."""
    script, address, secret = tmp_path / "rank.py", "127.0.0.2", "9f3c51d2a7"
    script.write_text(RANK_OF_OURS)
    with socket.create_server((address, 0)) as probe:
        port = probe.getsockname()[1]
    both = ("--nnodes=2", f"--master_addr={address}", f"--master_port={port}", "--nproc_per_node=1")
    environment = {"PET_RDZV_ID": secret, "GLOO_SOCKET_IFNAME": "lo"}
    with (
        launched(script, options=(*both, "--node_rank=0"), environment=environment) as first,
        launched(script, options=(*both, "--node_rank=1"), environment=environment) as second,
    ):
        wait_until(first, lambda: have_met(tmp_path))
        processes = [process for one in (first, second) for process in (one, *one.children(recursive=True))]
        places = listening(processes)
        assert places.keys() == {address, "127.0.0.1"}, "the store's, and gloo's"
        (agent,) = places[address]
        assert agent == first.children()[0].pid
        assert not any(secret in word for process in processes for word in process.cmdline())
        store = dist.TCPStore(address, port, None, False)  # type: ignore[attr-defined]
        assert {key.split("/")[0] for key in store.list_keys() if key.strip("/") != "init"} == {secret}
        (tmp_path / "leave").touch()
        errors = [launcher.communicate(timeout=120)[1] for launcher in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), errors


def test_a_port_that_is_taken_is_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        options = ("--nnodes=2", "--node_rank=0", "--master_addr=127.0.0.1", f"--master_port={taken.getsockname()[1]}")
        with launched(PRETRAIN, options=options) as launcher:
            _, errors = launcher.communicate(timeout=60)
    assert launcher.returncode == 2
    (line,) = errors.splitlines()
    assert "can't be listened at (Address already in use): give another --master_port" in line


def test_ranks_of_srun_meet_under_the_key_at_one_address() -> None:
    """slurm/job.sh gives each task the key; the first task hosts the store."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    environment = {MEETING_KEY: "secret", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    stores: dict[int, Any] = {}

    def meet(rank: int) -> None:
        stores[rank] = open_store(environment, Place(rank, 2, rank, 2), timedelta(seconds=30))

    threads = [threading.Thread(target=meet, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    stores[0].set("said", "by 0")
    assert stores[1].get("said") == b"by 0"
    assert "secret/said" in dist.TCPStore("127.0.0.1", port, None, False).list_keys()  # type: ignore[attr-defined]
    (place,) = [p for p in psutil.Process().net_connections() if p.laddr.port == port and p.status == "LISTEN"]
    assert place.laddr.ip == "127.0.0.1"
    assert (environment["GLOO_SOCKET_IFNAME"], environment["NCCL_SOCKET_IFNAME"]) == ("lo", "lo")


def test_other_launchers_ranks_meet_as_torch_has_it() -> None:
    assert open_store({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}, Place(0, 2, 0, 2), timedelta(seconds=1)) is None
    with pytest.raises(UserError, match="MASTER_ADDR and MASTER_PORT are not set"):
        open_store({MEETING_KEY: "x"}, Place(0, 2, 0, 2), timedelta(seconds=1))


def test_a_store_without_members_waits_for_nobody() -> None:
    store = tcp_store("127.0.0.1", 0, None, timedelta(seconds=30), hosting=True)
    assert tcp_store("127.0.0.1", store.port, None, timedelta(seconds=30), hosting=False).port == store.port
