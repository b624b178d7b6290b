"""What the file system refuses: the advice fits the error, and no message has another error's."""

import errno
import os
from pathlib import Path

import pytest

from common.errors import UserError, exit_on_user_error
from common.os_errors import ADVICE, refusal
from common.paths import MOST_NAME_BYTES, MOST_PATH_BYTES, expand_path
from common.publish import write_json_output


def refused(code: int) -> OSError:
    return OSError(code, os.strerror(code), "a/b")


@pytest.mark.parametrize("code", sorted(ADVICE))
def test_advice_is_of_the_error(code: int) -> None:
    line = refusal("written", refused(code), otherwise="not this one")
    assert line == f"a/b can't be written ({os.strerror(code)}): {ADVICE[code]}"
    assert ("space" in line) == (code in (errno.ENOSPC, errno.EDQUOT))
    assert ("chmod" in line) == (code in (errno.EACCES, errno.EPERM))


def test_an_error_without_advice_takes_the_caller_s() -> None:
    assert refusal("read", refused(errno.EIO), Path("c"), otherwise="copy it again") == (
        "c can't be read (Input/output error): copy it again"
    )
    assert refusal("read", OSError("torn")) == "a file can't be read (torn)"


@pytest.mark.parametrize("code", [errno.EACCES, errno.ENAMETOOLONG, errno.EROFS, errno.ENOSPC, errno.EMFILE])
def test_what_nobody_has_met_is_a_line_as_well(code: int, capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> int:
        raise refused(code)

    with pytest.raises(SystemExit) as ended:
        exit_on_user_error(main)
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: a/b can't be used ({os.strerror(code)}): {ADVICE[code]}\n"


@pytest.mark.parametrize("error", [refused(errno.ENOENT), OSError(errno.EACCES, "of no file"), OSError("odd")])
def test_what_may_be_a_fault_of_the_program_keeps_its_traceback(error: OSError) -> None:
    def main() -> int:
        raise error

    with pytest.raises(OSError) as ended:
        exit_on_user_error(main)
    assert ended.value is error


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("a" * (MOST_NAME_BYTES + 1), "contains a name of 256 bytes: give one of at most 255"),
        ("é" * 128, "contains a name of 256 bytes"),
        ("ab/" * 200 + "c" * 250 + ("/" + "d" * 250) * 14, "bytes: give a path of at most 3,800"),
        ("a/b\0c", r"'a/b\\x00c' contains a NUL"),
        ("a\ud800", r"contains '\\ud800', which no file name in this locale can"),
    ],
)
def test_paths_that_no_file_can_have(path: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        expand_path(path)
    assert len(str(error.value)) < 250


def test_the_longest_name_is_written_whole(tmp_path: Path) -> None:
    assert MOST_PATH_BYTES < os.pathconf(tmp_path, "PC_PATH_MAX")
    path = expand_path(tmp_path / ("é" * 127 + "j"))
    write_json_output(path, {"a": 1})
    assert [found.name for found in tmp_path.iterdir()] == [path.name]
