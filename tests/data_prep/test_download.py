"""Downloads from a server on loopback that is busy, breaks off, or sends the wrong bytes."""

import hashlib
import os
import threading
import time
from email.utils import formatdate
from itertools import pairwise

import pytest

from common.errors import UserError
from data_prep.corpora import download as module
from data_prep.corpora.download import Stopped, download
from tests.helpers.http_server import Fault, Server

DATA = os.urandom(3_000_000)
SHA256 = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def server():
    with Server(files={"/file": DATA}) as running:
        yield running


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(module, "BACKOFF_SECONDS", 0.01)


def test_a_file_arrives_whole(server, tmp_path):
    seen: list[int] = []
    download(f"{server.url}/file", tmp_path / "deep" / "file", size=len(DATA), sha256=SHA256, on_bytes=seen.append)
    assert (tmp_path / "deep" / "file").read_bytes() == DATA
    assert seen[-1] == len(DATA)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["file"]


def test_a_broken_connection_is_resumed_where_it_broke(server, tmp_path):
    server.faults["/file"] = [Fault(cut=1_000_000), Fault(cut=500_000)]
    download(f"{server.url}/file", tmp_path / "file", size=len(DATA), sha256=SHA256)
    assert (tmp_path / "file").read_bytes() == DATA
    starts = [int((request.range or "bytes=0-")[6:-1]) for request in server.requests]
    assert starts[0] == 0
    assert 900_000 < starts[1] <= 1_000_000
    assert starts[1] + 400_000 < starts[2] <= starts[1] + 500_000


def test_a_part_left_by_a_killed_process_is_resumed(server, tmp_path):
    (tmp_path / "file.part").write_bytes(DATA[:2_000_000])
    download(f"{server.url}/file", tmp_path / "file", size=len(DATA), sha256=SHA256)
    assert (tmp_path / "file").read_bytes() == DATA
    assert server.requests[0].range == "bytes=2000000-"


def test_without_ranges_it_begins_anew(server, tmp_path):
    server.ranges = False
    (tmp_path / "file.part").write_bytes(DATA[:2_000_000])
    download(f"{server.url}/file", tmp_path / "file", sha256=SHA256)
    assert (tmp_path / "file").read_bytes() == DATA


@pytest.mark.parametrize("part", [DATA, DATA + b"more", b"x" * 2_000_000])
def test_a_part_of_another_file_is_found_out(part, server, tmp_path):
    (tmp_path / "file.part").write_bytes(part)
    download(f"{server.url}/file", tmp_path / "file", sha256=SHA256)
    assert (tmp_path / "file").read_bytes() == DATA


@pytest.mark.parametrize("status", [429, 500, 503])
def test_busy_servers_are_tried_again(status, server, tmp_path):
    server.faults["/file"] = [Fault(status=status)] * 3
    download(f"{server.url}/file", tmp_path / "file", size=len(DATA), sha256=SHA256)
    assert (tmp_path / "file").read_bytes() == DATA
    assert len(server.requests) == 4


def test_retry_after_is_honoured_in_seconds_and_as_a_date(server, tmp_path):
    until = int(time.time()) + 3
    faults = [Fault(status=429, retry_after="1"), Fault(status=503, retry_after=formatdate(until, usegmt=True))]
    server.faults["/file"] = faults
    download(f"{server.url}/file", tmp_path / "file", size=len(DATA))
    first, second, _ = (request.time for request in server.requests)
    assert second - first >= 1
    assert time.time() >= until


def test_an_endless_retry_after_is_waited_for_until_somebody_stops_it(server, tmp_path):
    server.faults["/file"] = [Fault(status=429, retry_after="1e999")]
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped):
        download(f"{server.url}/file", tmp_path / "file", size=len(DATA), stop=stop)


def test_it_waits_longer_and_longer(server, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BACKOFF_SECONDS", 0.05)
    server.faults["/file"] = [Fault(status=503)] * 4
    download(f"{server.url}/file", tmp_path / "file", size=len(DATA))
    times = [request.time for request in server.requests]
    gaps = [after - before for before, after in pairwise(times)]
    for attempt, gap in enumerate(gaps, start=1):
        assert gap >= 0.05 * 2**attempt * 0.75


def test_damage_is_noticed_and_fetched_again(server, tmp_path):
    server.faults["/file"] = [Fault(damage=True)]
    download(f"{server.url}/file", tmp_path / "file", size=len(DATA), sha256=SHA256)
    assert (tmp_path / "file").read_bytes() == DATA


def test_a_file_that_always_comes_damaged_is_never_there(server, tmp_path):
    with pytest.raises(UserError, match="damaged"):
        download(f"{server.url}/file", tmp_path / "file", sha256="0" * 64)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("status", "words"), [(401, "HF_TOKEN"), (403, "refused"), (404, "no such file")])
def test_refusals_are_one_line_at_once(status, words, server, tmp_path):
    server.faults["/file"] = [Fault(status=status)]
    with pytest.raises(UserError, match=words):
        download(f"{server.url}/file", tmp_path / "file")
    assert len(server.requests) == 1


def test_a_server_that_stays_away_is_given_up(tmp_path):
    with Server() as gone:
        url = gone.url
    with pytest.raises(UserError, match=r"no connection to 127.0.0.1:.* is there a network here\?"):
        download(f"{url}/file", tmp_path / "file")


def test_a_server_that_has_answered_gets_more_patience(tmp_path):
    with Server(files={"/file": DATA}) as server:
        download(f"{server.url}/file", tmp_path / "file")
    with pytest.raises(UserError, match=r"no connection .*: run the same command again later"):
        download(f"{server.url}/other", tmp_path / "other")


def test_no_room_is_one_line(server, tmp_path):
    (tmp_path / "file.part").mkdir()
    with pytest.raises(UserError, match=r"can't be written .*; then run the same command again, it continues"):
        download(f"{server.url}/file", tmp_path / "file")
