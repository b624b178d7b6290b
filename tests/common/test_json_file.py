"""Reading JSON as a declared type, and opening only what is a file."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typing_extensions import TypedDict

from common.errors import UserError
from common.json_file import BadJson, Count, Sha256, as_shape, keep_others, parse_json, read_json, read_json_for_user
from common.publish import sha256_file
from common.regular_file import NotAFile, open_regular, read_at_most

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 62), 1 << 62) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@dataclass(frozen=True)
class Part:
    file: str
    tokens: Count
    sha256: Sha256 = "0" * 64

    def __post_init__(self) -> None:
        if self.file == "no":
            raise ValueError("Part.file is no: give another")


@keep_others
class Whole(TypedDict):
    parts: dict[str, tuple[Part, ...]]
    loss: float | None


GOOD = {"parts": {"train": [{"file": "a", "tokens": 3}]}, "loss": 2, "more": [1]}


def test_what_fits_is_read_with_keys_the_shape_does_not_name(tmp_path):
    path = tmp_path / "whole.json"
    path.write_text(json.dumps(GOOD), encoding="utf-8-sig")
    whole = read_json(path, Whole)
    assert whole["parts"] == {"train": (Part("a", 3),)}
    assert whole["loss"] == 2.0 and whole["more"] == [1]  # type: ignore[typeddict-item]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "it is not JSON"),
        (b"\xff\xfe", "it is not JSON"),
        (b"[" * 1_000_000, "it is not JSON"),
        (b'{"loss": "\\udcff", "parts": ' + b"[" * 1_000_000, "it is not JSON"),
        (b"[]", "it is not an object"),
        (b'{"loss": null}', "parts: it is missing"),
        (b'{"loss": "2", "parts": {}}', "loss: it is not a number"),
        (b'{"loss": null, "parts": {"val": {}}}', "parts.val: it is not a list"),
        (b'{"loss": null, "parts": {"val": [{"file": "a", "tokens": "3"}]}}', "tokens: it is not a whole number"),
        (b'{"loss": null, "parts": {"val": [{"file": "a", "tokens": 3.0}]}}', "tokens: it is not a whole number"),
        (b'{"loss": null, "parts": {"val": [{"file": "a", "tokens": true}]}}', "tokens: it is not a whole number"),
        (b'{"loss": null, "parts": {"val": [{"file": "a", "tokens": -1}]}}', "tokens: .* greater than or equal to 0"),
        (b'{"loss": null, "parts": {"val": [{"file": "a", "tokens": ' + b"9" * 5000 + b"}]}}", "it is not JSON|out of"),
        (b'{"loss": null, "parts": {"val": [{"file": "a", "tokens": 1, "sha256": "A"}]}}', "sha256: "),
    ],
    ids=lambda value: None if isinstance(value, str) else repr(value[:60]),
)
def test_what_does_not_fit_is_named(tmp_path, content, words):
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(BadJson, match=words):
        read_json(path, Whole)
    with pytest.raises(UserError, match=rf"{path} is damaged \(.*\): make it again$"):
        read_json_for_user(path, Whole, "make it again")


def test_a_part_that_was_read_already_is_checked_as_a_file_is():
    assert as_shape({"file": "a", "tokens": 3}, Part) == Part("a", 3)
    with pytest.raises(BadJson, match=r"^part\.file is no: give another$"):
        as_shape({"file": "no", "tokens": 3}, Part)


class Named(NamedTuple):
    name: str


@dataclass(frozen=True)
class Names:
    argv: dict[str, list[str]]
    pair: tuple[Named, str]


def test_a_name_that_is_no_text_does_not_spoil_a_file():
    written: dict[str, Any] = {"argv": {"\udc80": ["a\udcff", "\U00010000"]}, "pair": [["\ud800"], "\udfff"]}
    content = json.dumps(written).encode()
    assert parse_json(content, dict[str, Any]) == written
    for lone in ("\ud800", "\ud800a", "\ud800\n", "\ud800\ud800"):
        assert parse_json(json.dumps([lone]).encode(), list[str]) == [lone]
    assert parse_json(content, Names) == Names(written["argv"], (Named("\ud800"), "\udfff"))


@given(VALUES)
def test_every_value_is_read_as_the_standard_library_reads_it(value):
    text = json.dumps({"value": value})
    assert repr(parse_json(text.encode(), dict[str, Any])) == repr(json.loads(text))


@given(st.binary(max_size=200))
def test_no_bytes_end_in_another_error(content):
    with pytest.raises(BadJson):
        parse_json(content + b"x", Whole)


@pytest.mark.timeout(60)
def test_only_regular_files_are_opened(tmp_path):
    pipe, link, folder = tmp_path / "pipe", tmp_path / "zero", tmp_path / "folder"
    os.mkfifo(pipe)
    link.symlink_to("/dev/zero")
    folder.mkdir()
    for path, words in ((pipe, "a pipe"), (link, "a device"), (folder, "a folder")):
        with pytest.raises(NotAFile, match=words):
            open_regular(path)
        with pytest.raises(NotAFile, match=words):
            sha256_file(path)
        with pytest.raises(UserError, match=rf"{path} can't be read \(it is {words}, not a file\): look"):
            read_json_for_user(path, dict[str, Any], "look")
    with pytest.raises(FileNotFoundError):
        read_json_for_user(tmp_path / "none", dict[str, Any], "look")


def test_a_larger_file_is_refused_before_it_is_taken(tmp_path):
    path = tmp_path / "sparse"
    with open(path, "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(OverflowError, match="more than 1,000 bytes"):
        read_at_most(path, 1000)
    with pytest.raises(BadJson, match="more than 16,777,216 bytes"):
        read_json(Path(path), dict[str, Any])
