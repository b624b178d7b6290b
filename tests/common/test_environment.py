"""Numbers in environment variables: any text is a number, a default, or one sentence."""

import ast

import pytest

from common.environment import whole_number
from common.errors import UserError
from tests.helpers.source_code import product_code

WRONG = ["x", "1.5", "-1", "-", "1e3", "0x10", "²", "١", "2147483648", "9" * 5000, "1 2", "None", "\udc80"]


@pytest.mark.parametrize("text", WRONG)
def test_what_is_no_count_is_one_sentence(text: str) -> None:
    with pytest.raises(UserError) as refusal:
        whole_number("TASKS", 1, environment={"TASKS": text})
    words = str(refusal.value)
    assert words.startswith("TASKS is '")
    assert words.endswith("not a whole number of 0 or more: unset it, or give one")
    assert len(words) < 200


def test_an_empty_one_counts_as_not_set() -> None:
    assert whole_number("TASKS", 3, environment={"TASKS": " "}) == 3
    assert whole_number("TASKS", 3, environment={}) == 3
    with pytest.raises(UserError, match="TASKS is empty in the environment, not a whole number of 0 or more: give one"):
        whole_number("TASKS", environment={"TASKS": ""})


def test_numbers_and_their_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TASKS", " 007 ")
    assert whole_number("TASKS", lowest=7, highest=7) == 7
    with pytest.raises(UserError, match="TASKS is '007' in the environment, not a whole number from 1 to 6: ask srun"):
        whole_number("TASKS", lowest=1, highest=6, advice="ask srun")


def test_nothing_else_reads_a_number_from_the_environment() -> None:
    found = []
    for path, tree in product_code():
        for node in ast.walk(tree):
            if not (
                isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("int", "float")
            ):
                continue
            names = {part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)}
            names |= {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
            if names & {"environ", "environment", "getenv"}:
                found.append(f"{path}:{node.lineno}")
    assert found == []
