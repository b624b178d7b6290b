"""What ranks tell each other comes back as it was, and nothing but values of known kinds ever does."""

import ast
import json
import math
import os
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import OutOfMemory, UserError
from model.messages import decode, encode
from tests.helpers.source_code import product_code
from train.checkpoints.background_write import ShareWritten, WriteFailure
from train.checkpoints.writer import Saved
from train.errors import SaveFailed, StorageFailed
from train.progress import Progress

SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()) | st.builds(Path, st.just("a/b"))
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text() | st.integers() | st.tuples(st.integers()), inner)
    ),
)


def same(one: Any, other: Any) -> bool:
    """Equal with all types; NaN is itself, and 0.0 is not -0.0."""
    return type(one) is type(other) and repr(one) == repr(other)


@given(VALUES)
def test_values_come_back_as_they_were(value: Any) -> None:
    assert same(decode(encode(value)), value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -0.0, 5e-324, 0.1 + 0.2, 2**70, "\udcff", {3: "x"}])
def test_what_json_or_others_might_lose_comes_back(value: Any) -> None:
    assert same(decode(encode(value)), value)


def test_named_kinds_come_back_with_what_they_hold() -> None:
    share = ShareWritten({"a": {"bytes": 3}}, WriteFailure("full", no_room=True), ["again"], 0.25)
    assert decode(encode(share, (ShareWritten, WriteFailure)), (ShareWritten, WriteFailure)) == share
    saved = Saved(Path("/r/step-1"), 1, 0.5, 7, ("once",))
    assert decode(encode((saved, Progress(1, 2)), (Saved, Progress)), (Saved, Progress)) == (saved, Progress(1, 2))


def test_mistakes_come_back_with_what_they_carry_and_as_the_nearest_kind_that_was_named() -> None:
    failed = decode(encode(SaveFailed("no room", transient=True), (SaveFailed,)), (SaveFailed,))
    assert (type(failed), str(failed), failed.transient) == (SaveFailed, "no room", True)
    stored = decode(encode(SaveFailed("no room", transient=True), (StorageFailed,)), (StorageFailed,))
    assert (type(stored), str(stored)) == (StorageFailed, "no room")
    memory = OutOfMemory(MemoryError(), "take less")
    assert (type(decode(encode(memory))), str(decode(encode(memory)))) == (UserError, str(memory))


@dataclass
class Stranger:
    """A class that nobody has named."""

    command: str = "true"


class Bomb:
    """What it is unpickled as runs a command."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def test_nothing_but_known_kinds_travels(tmp_path: Path) -> None:
    for value in (Stranger(), {1, 2}, b"bytes", object(), print, ValueError("x"), Bomb(tmp_path / "ran")):
        with pytest.raises(TypeError, match="can't be sent between ranks"):
            encode(value)
    with pytest.raises(TypeError):
        encode([{"deep": (Stranger(),)}], (Progress,))


@pytest.mark.parametrize(
    "message",
    [
        encode(Stranger(), (Stranger,)),
        b'{"os.system": ["true"]}',
        b'{"Path": 3}',
        b'{"Progress": {"no_such_field": 1}}',
        b'{"tuple": 3}',
        b'{"a": 1, "b": 2}',
        b"{}",
        b"no json",
        b"[" * 100_000,
        b"\xff",
    ],
    ids=lambda message: str(message[:20]),
)
def test_other_messages_make_no_value(message: bytes) -> None:
    with pytest.raises(ValueError, match=r".+"):
        decode(message, (Progress,))


def test_a_pickle_is_no_message(tmp_path: Path) -> None:
    bomb = pickle.dumps(Bomb(tmp_path / "ran"))
    with pytest.raises(ValueError, match=r".+"):
        decode(bomb)
    assert not (tmp_path / "ran").exists()
    pickle.loads(bomb)
    assert (tmp_path / "ran").exists(), "the bomb is none: nothing has been tested"


def test_an_object_has_one_kind_so_that_no_dict_is_taken_for_one() -> None:
    assert same(decode(encode({"Path": "/etc/passwd"})), {"Path": "/etc/passwd"})
    assert json.loads(encode({"a": 1})) == {"dict": [["a", 1]]}


def test_nothing_in_the_product_unpickles_what_others_may_have_written() -> None:
    found = [
        f"{path}:{node.lineno}: {complaint}"
        for path, tree in product_code()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call | ast.Attribute | ast.ImportFrom) and (complaint := complaint_about(node))
    ]
    assert found == []


COLLECTIVES = ("all_gather", "gather", "broadcast", "scatter", "send", "recv")
UNPICKLERS = ("pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal")


def complaint_about(node: ast.Call | ast.Attribute | ast.ImportFrom) -> str:
    """Why an expression may unpickle; "" where it doesn't."""
    if isinstance(node, ast.ImportFrom):
        names = [alias.name for alias in node.names]
        return f"from {node.module} import {', '.join(names)}" if unpickles(node.module or "", *names) else ""
    if isinstance(node, ast.Attribute):
        return ast.unparse(node) if unpickles(ast.unparse(node.value), node.attr) else ""
    keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    name = ast.unparse(node.func)
    if name.endswith("torch.load") and keywords.get("weights_only") != "True":
        return f"{name} without weights_only=True"
    return f"{name} with pickles" if keywords.get("allow_pickle", "False") != "False" else ""


def unpickles(module: str, *names: str) -> bool:
    """Whether one of a module's names is a function that unpickles, or a collective that does."""
    loads = module.split(".")[0] in UNPICKLERS and any(name in ("load", "loads", "open", "Unpickler") for name in names)
    return loads or any(name.startswith(tuple(f"{first}_object" for first in COLLECTIVES)) for name in names)


def test_pickles_are_found_in_code() -> None:
    for code in (
        "dist.all_gather_object(v, o)",
        "torch.distributed.broadcast_object_list(box)",
        "from torch.distributed import gather_object",
        "collective = dist.scatter_object_list",
        "pickle.loads(b)",
        "pickle.Unpickler(f).load()",
        "from pickle import load",
        "torch.load(p)",
        "torch.load(p, weights_only=False)",
        "np.load(p, allow_pickle=True)",
    ):
        assert any(complaint_about(node) for node in nodes_of(code)), code
    for code in ("torch.load(p, weights_only=True)", "pickle.UnpicklingError", "np.load(p)", "ranks.gather(o)"):
        assert not any(complaint_about(node) for node in nodes_of(code)), code


def nodes_of(code: str) -> list[Any]:
    return [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call | ast.Attribute | ast.ImportFrom)]
