"""Ports, addresses and the check of all nodes, without a cluster: nodes are processes, or threads, of this machine."""

import os
import socket
import stat
import threading
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.addresses import listen_at
from common.errors import UserError
from common.run_folder import RunFolder
from slurm import rendezvous
from slurm.history import StartId, read_starts
from slurm.job_start import begin
from slurm.node_check import CHALLENGE_BYTES, _hear, _report, check_nodes
from slurm.rendezvous import choose_port, ephemeral_ports, head_address, interface_to, port_range
from slurm.start_info import Beginning, leave_mark, read_mark
from tests.helpers.token_sets import make_token_set
from tests.helpers.training import PROJECT


@given(low=st.integers(1024, 60_000), size=st.integers(0, 40_000))
def test_ports_lie_outside_the_ephemeral_range_where_there_is_room(low: int, size: int):
    high = min(low + size, 65_535)
    ports = port_range((low, high))
    assert len(ports) > 500
    assert ports.start >= 1024
    assert ports.stop <= 65_536
    if low > 11_000 or high < 64_535:
        assert ports.stop <= low or ports.start > high


def test_starts_and_neighbouring_jobs_have_ports_of_their_own(monkeypatch):
    monkeypatch.setattr(rendezvous, "is_free", lambda port: True)
    ports = port_range((32_768, 60_999))
    chosen = [choose_port(StartId(str(job), restart), ports) for job in range(1000, 2000) for restart in range(10)]
    assert len(set(chosen)) == len(chosen)


def test_an_occupied_port_is_passed_over():
    ports = port_range(ephemeral_ports())
    start = StartId("123456", 1)
    first = choose_port(start, ports)
    with socket.create_server(("", first)):
        assert choose_port(start, ports) not in (first, None)
    assert choose_port(start, ports) == first


def test_the_head_is_called_by_the_address_that_faces_the_others():
    assert head_address("node-17", ["127.0.0.1"]) == "127.0.0.1"  # all "nodes" are this machine
    assert head_address("node-17", ["no-such-host.invalid"]) == "node-17"
    assert head_address("node-17", ["no-such-host.invalid", "127.0.0.1"]) == "127.0.0.1"


def test_the_interface_is_the_one_that_faces_the_others():
    assert interface_to("127.0.0.1") == "lo"
    assert interface_to("no-such-host.invalid") is None


@pytest.fixture
def beginning(tmp_path: Path) -> Beginning:
    tokens = make_token_set(tmp_path / "data", train_tokens=2000, val_tokens=500)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    run = tmp_path / "run"
    run.mkdir()
    found = Beginning(str(run), str(tokens.folder), tokens.identity, "127.0.0.1", port, "7.0", "secret", "")
    leave_mark(found)
    return found


def check(views: list[Beginning], patience_seconds: float = 3.0) -> list[str]:
    """What each node says when node i sees `views[i]`; "" where all is well."""
    said = [""] * len(views)
    nodes = [f"n{number}" for number in range(len(views))]

    def one(number: int) -> None:
        try:
            check_nodes(views[number], nodes, number, patience_seconds)
        except UserError as error:
            said[number] = str(error)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(len(views))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return said


def test_nodes_that_see_the_same_are_let_through(beginning: Beginning):
    assert check([beginning] * 3) == ["", "", ""]


def test_a_node_with_another_run_folder_is_named(beginning: Beginning, tmp_path: Path):
    said = check([beginning, beginning, replace(beginning, run_folder=str(tmp_path / "elsewhere"))])
    assert "n2 does not see the run's folder" in said[0]
    assert "put run.root on a file system that all nodes share" in said[2]
    assert said[1] == ""


def test_a_node_whose_gpus_have_gone_is_named(beginning: Beginning, monkeypatch):
    """None of these nodes has one, whatever Slurm says; where the CPU is asked for, nobody looks."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    on_cpu = replace(beginning, device="cpu")
    words = "n1 can't train: PyTorch sees no GPU on "
    said = check([on_cpu, beginning])
    assert said[0].startswith(words) and said[1].startswith(words)
    assert "SLURM_GPUS_ON_NODE=8" in said[0] and "--exclude=" in said[0]
    leave_mark(on_cpu)
    assert check([on_cpu, on_cpu]) == ["", ""]
    said = check([beginning, on_cpu])
    assert said[0].startswith("n0 can't train: PyTorch sees no GPU on ") and said[1] == ""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 7)
    said = check([beginning, on_cpu])
    assert said[0].startswith("n0 can't train: PyTorch sees 7 of the 8 GPUs on ")
    leave_mark(beginning)
    (both, _) = check([beginning, beginning])
    assert "n0 can't train" in both and "n1 can't train" in both
    findings = [record for record in read_starts(RunFolder(Path(beginning.run_folder))) if record["kind"] == "finding"]
    assert {record["what"] for record in findings} == {"lost_gpu"}
    assert [record["node"] for record in findings] == ["n1", "n0", "n0"], "none where all lack some"


def test_a_node_with_other_shards_is_named(beginning: Beginning, tmp_path: Path):
    make_token_set(tmp_path / "other", train_tokens=2000, val_tokens=500, seed=1)
    leave_mark(replace(beginning, data_folder=str(tmp_path / "other")))
    said = check([beginning, replace(beginning, data_folder=str(tmp_path / "other"))])
    assert "n1 finds other data" in said[0]


def test_a_node_without_the_shards_is_named(beginning: Beginning, tmp_path: Path):
    for shard in Path(beginning.data_folder).glob("*.bin"):
        shard.unlink()
    assert "n1 does not see the data" in check([beginning, beginning])[0]


@pytest.mark.parametrize("guess", ["", "7.0", "secreT"])
def test_a_node_that_stays_silent_is_named_whoever_speaks_for_it(beginning: Beginning, guess: str):
    stranger = replace(beginning, secret=guess)  # another user of the cluster; an old start's process, still alive
    said = check([beginning, beginning, stranger])
    assert said[0].startswith("n2 did not reach the first node n0")
    assert "--exclude=n2" in said[0]


def test_what_was_overheard_is_no_proof_twice(beginning: Beginning):
    """A stranger sits at the head's port and hears a node; the head draws another number, and believes no replay."""
    with socket.create_server((beginning.head, beginning.port)) as impostor:
        node = threading.Thread(target=_report, args=(beginning, "n1", ""))
        node.start()
        connection, _ = impostor.accept()
        with connection, connection.makefile("rb") as heard:
            connection.sendall(bytes(CHALLENGE_BYTES))
            overheard = heard.read()
        node.join(30)
    assert beginning.secret.encode() not in overheard
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.sendall(overheard)
        theirs.shutdown(socket.SHUT_WR)
        assert _hear(ours, beginning.secret) == ("", "")


def test_nothing_else_is_listened_at_than_the_head_s_address(beginning: Beginning):
    family = psutil.Process()
    with listen_at(beginning.head, beginning.port):
        (listener,) = [place for place in family.net_connections() if place.laddr.port == beginning.port]
    assert (listener.status, listener.laddr.ip) == ("LISTEN", "127.0.0.1")


def test_a_start_s_secret_is_new_and_only_the_user_can_read_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make_token_set(tmp_path / "data", train_tokens=2000, val_tokens=500)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    options = [f"--config={PROJECT / 'train/configs/smoke.yaml'}", f"--data.path={tmp_path / 'data'}"]
    starts = [begin([*options, f"--run.root={tmp_path / 'runs'}"], ["n1"], [], "torchrun") for _ in range(2)]
    assert len({start.secret for start in starts}) == 2
    assert all(len(bytes.fromhex(start.secret)) >= 16 for start in starts)
    before = os.umask(0)
    try:
        leave_mark(starts[0])
    finally:
        os.umask(before)
    (mark,) = Path(starts[0].run_folder).glob(".start-*")
    assert stat.S_IMODE(mark.stat().st_mode) == 0o600
    assert starts[0].secret not in mark.name
    assert read_mark(Path(starts[0].run_folder), "7.0") == starts[0]
