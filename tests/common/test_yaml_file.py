"""YAML that is damaged, or made to hurt."""

from pathlib import Path

import pytest
import yaml

from common.yaml_file import BadYaml, read_yaml
from tests.fuzz.yaml_files import BOMB

WRONG = {
    "a: &a {b: *a}\n": "the value at line 1 contains itself",
    "a: &a [1, *a]\n": "the value at line 1 contains itself",
    BOMB: "with its aliases expanded it has more than 100,000 values",
    "a: " + "[" * 5_000: "it is nested too deeply",
    "a: \0": "special characters are not allowed",
    "a: [1": "while parsing a flow sequence",
    "a: 2026-99-99": "month must be in",
    "a: !!python/object/apply:os.system [x]": "could not determine a constructor",
    "a: 1\n---\na: 2\n": "expected a single document",
    "x" * (2 << 20): "it has more than 1,048,576 bytes",
}


@pytest.mark.parametrize(("text", "words"), WRONG.items(), ids=range(len(WRONG)))
def test_what_is_wrong_is_a_sentence(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(BadYaml, match=words):
        read_yaml(path)


@pytest.mark.parametrize("text", ["", "a: &a [1, 2]\nb: *a\n", "x: &x {n: 1}\ny: {<<: *x, m: 2}\n", "[1, 2.5, yes, ~]"])
def test_what_is_right_is_read_as_pyyaml_does(tmp_path: Path, text: str) -> None:
    path = tmp_path / "right.yaml"
    path.write_text(text, encoding="utf-8-sig")
    assert read_yaml(path) == yaml.safe_load(text)
