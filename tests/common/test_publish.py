"""Nothing stands under its final name before it is whole; mistakes are one line."""

import json
import math
import os
import socket
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from common.errors import UserError
from common.progress import format_bytes, format_count, format_duration
from common.publish import (
    canonical_json,
    file_to_write,
    publish_folder,
    sha256_file,
    write_json_output,
    write_json_whole,
    write_whole,
)

PROJECT = Path(__file__).resolve().parents[2]
KILLED_WHILE_WRITING = """
import sys
sys.path.insert(0, {project!r})
from common.publish import write_whole
print("ready", flush=True)
while True:
    for letter in (b"a", b"b"):
        write_whole({path!r}, letter * 3_000_000)
"""


def test_what_json_does_not_know_becomes_null(tmp_path: Path) -> None:
    """A strict reader (jq, JavaScript, Go) refuses a file with NaN or Infinity in it."""
    written = {"loss": math.nan, "by": [math.inf, (1.5, -math.inf)], "of": {"n": 3, "name": "NaN", "none": None}}
    write_json_whole(tmp_path / "figures.json", written)
    text = (tmp_path / "figures.json").read_text()
    read = json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))
    assert read == {"loss": None, "by": [None, [1.5, None]], "of": {"n": 3, "name": "NaN", "none": None}}


def test_a_kill_at_any_moment_leaves_the_old_or_the_new_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    seen = set()
    for _ in range(10):
        code = KILLED_WHILE_WRITING.format(project=str(PROJECT), path=str(path))
        writer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert writer.stdout is not None
        writer.stdout.readline()
        while not path.exists() or not any(tmp_path.glob("file.*.tmp")):
            assert writer.poll() is None
        writer.kill()
        writer.wait()
        content = path.read_bytes()
        assert len(content) == 3_000_000
        assert len(set(content)) == 1
        seen.add(content[:1])
    assert seen <= {b"a", b"b"}


def test_two_writers_at_once_leave_one_of_the_two(tmp_path: Path) -> None:
    """With the same process id, as in two containers that share a folder."""
    path = tmp_path / "file"
    write_whole(path, b"a" * 10_000)

    def write(letter: bytes) -> set[bytes]:
        seen = set()
        for _ in range(30):
            write_whole(path, letter * 10_000)
            seen.add(path.read_bytes())
        return seen

    with ThreadPoolExecutor() as writers:
        seen = set.union(*writers.map(write, (b"a", b"b")))
    assert seen <= {b"a" * 10_000, b"b" * 10_000}
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_whole(path, "old")
    with pytest.raises(TypeError):
        write_whole(path, 3)  # type: ignore[arg-type]
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_published_folder_is_never_replaced(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    publish_folder(tmp_path / "first", tmp_path / "final")
    with pytest.raises(FileExistsError):
        publish_folder(tmp_path / "second", tmp_path / "final")
    assert (tmp_path / "final" / "file").read_text() == "first"


def test_hashes_are_of_bytes_and_json_has_one_text(tmp_path: Path) -> None:
    write_whole(tmp_path / "abc", b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    assert sha256_file(tmp_path / "abc", block_bytes=2) == expected
    assert canonical_json({"b": 1, "a": [1.5, None, "ä"]}) == '{"a":[1.5,null,"\\u00e4"],"b":1}'


@pytest.mark.parametrize(
    ("body", "status", "errors"),
    [
        ("raise UserError('do\\n  this')", 2, ["error: do this"]),
        ("raise KeyboardInterrupt", 130, ["interrupted"]),
        ("return 3", 3, []),
        ("return None", 0, []),
    ],
)
def test_how_an_entry_leaves(body: str, status: int, errors: list[str]) -> None:
    code = f"from common.errors import *\ndef main():\n    {body}\nexit_on_user_error(main)"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True)
    assert (done.returncode, done.stderr.splitlines()) == (status, errors)


@pytest.mark.parametrize(
    ("place", "errors"),
    [
        ({"RANK": "0", "LOCAL_RANK": "0"}, ["error: no data"]),
        # that nobody has ended after a while: the first rank has not met it
        ({"RANK": "1", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "x"}, [f"error: no data (on {socket.gethostname()})"]),
        ({"RANK": "1", "LOCAL_RANK": "1", "SLURM_LOCALID": "1"}, []),
        ({"LOCAL_RANK": "1"}, ["error: no data"]),  # left over in a shell
        ({"RANK": "2", "LOCAL_RANK": "0"}, [f"error: no data (on {socket.gethostname()})"]),  # on a node of its own
    ],
)
def test_one_rank_of_every_machine_tells_of_a_mistake(place: dict[str, str], errors: list[str]) -> None:
    code = "from common import errors\nerrors.FIRST_RANK_SECONDS = 0.1\n"
    code += "def main():\n    raise errors.UserError('no data')\nerrors.exit_on_user_error(main)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PROJECT, env=os.environ | place, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr.splitlines()) == (2, errors)


def test_a_broken_invariant_keeps_its_traceback() -> None:
    code = "from common.errors import *\ndef main():\n    assert False, 'why'\nexit_on_user_error(main)"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "AssertionError: why" in done.stderr
    assert isinstance(UserError("x"), Exception)


def test_numbers_as_people_read_them() -> None:
    assert [format_duration(s) for s in (1.25, 59.94, 61, 3599.6, 3 * 3600 + 420, 200_000)] == [
        "1.2 s",
        "59.9 s",
        "1 min 01 s",
        "1 h 00 min",
        "3 h 07 min",
        "2 d 7 h",
    ]
    assert [format_count(n) for n in (7, 0.5, 12_345, 124_439_808, 1e10)] == ["7", "0.5", "12.3K", "124.4M", "10.0B"]
    assert [format_bytes(n) for n in (512, 1536, 15 << 30)] == ["512 B", "1.5 KiB", "15.0 GiB"]


def test_a_file_to_write_is_refused_before_the_work_in_one_line(tmp_path: Path) -> None:
    new = file_to_write(str(tmp_path / "new" / "deep" / "a.json"))
    assert not (tmp_path / "new").exists(), "another option may be wrong: nothing is left of a command that is refused"
    write_json_output(new, {"a": 1})
    assert json.loads(new.read_text()) == {"a": 1}
    (tmp_path / "taken").write_text("a file")
    for path in (tmp_path / "taken" / "a.json", tmp_path / "taken" / "deep" / "a.json", tmp_path):
        with pytest.raises(UserError, match="can't be written") as error:
            file_to_write(path)
        assert "\n" not in str(error.value)
    assert file_to_write(tmp_path / "taken").read_text() == "a file", "an older one stays until the new one is whole"


def test_links_are_followed_and_stay(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    for target in (tmp_path / "real" / "there.json", tmp_path / "real" / "new.json"):
        link = tmp_path / target.name
        link.symlink_to(target)
        if target.name == "there.json":
            target.write_text("old")
        assert file_to_write(link) == link
        write_whole(link, "new")
        assert link.is_symlink()
        assert target.read_text() == "new"
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(UserError, match="Too many levels of symbolic links"):
        file_to_write(tmp_path / "loop")
    assert not any(tmp_path.glob("**/*.tmp"))


def test_a_device_or_pipe_takes_the_bytes_and_stays(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with ThreadPoolExecutor(1) as pool:
        received = pool.submit(fifo.read_bytes)
        write_json_whole(file_to_write(fifo), {"a": 1})
        assert json.loads(received.result()) == {"a": 1}
    assert stat.S_ISFIFO(fifo.stat().st_mode)
    if os.geteuid() == 0:  # for others the folder of devices is read-only
        null = tmp_path / "null"
        os.mknod(null, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        write_whole(file_to_write(null), "x")
        assert stat.S_ISCHR(null.stat().st_mode)
    assert not any(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
def test_standard_output_gets_a_result_between_what_is_printed(tmp_path: Path, name: str) -> None:
    code = (
        "from common.publish import file_to_write, write_json_whole\n"
        f"path = file_to_write({name!r})\n"
        "print('before'); write_json_whole(path, {'a': 1}); print('after')\n"
    )
    expected = 'before\n{\n  "a": 1\n}\nafter\n'
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True).stdout == expected
    with open(tmp_path / "out.txt", "w") as file:
        subprocess.run(command, cwd=PROJECT, stdout=file, check=True)
    assert (tmp_path / "out.txt").read_text() == expected


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's")
def test_an_output_that_finds_no_room_is_one_sentence(tmp_path):
    with pytest.raises(
        UserError, match=r"/dev/full can't be written \(No space left on device\): free some space, or name"
    ):
        write_json_output(Path("/dev/full"), {"a": 1})
    write_json_output(tmp_path / "there.json", {"a": float("nan")})
    assert json.loads((tmp_path / "there.json").read_text(encoding="utf-8")) == {"a": None}
