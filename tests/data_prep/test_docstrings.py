"""The embedded corpus: what is taken from sources, which packages, and the command itself."""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from packaging.utils import canonicalize_name

from common.errors import UserError
from data_prep.corpora.docstring_sources import SourceFile, docstrings_in, required_distributions, source_files
from data_prep.corpora.preparation import chosen_for_validation
from data_prep.docstrings import corpus_distributions
from data_prep.token_sets.token_set import TokenSet
from data_prep.tokenization.loading import load_tokenizer

PROJECT = Path(__file__).resolve().parents[2]
LONG = "Says enough about itself to be worth a place in the corpus."

SOURCE = f'''"""Module. {LONG}"""
import nothing_that_exists


class Thing:
    """Class. {LONG}

    Indented as in the source.
    """

    def method(self):
        """Method. {LONG}"""

        async def inner():
            """Inner. {LONG}"""

    def short(self):
        """Too short."""


add_docstr(thing.attribute, r"""
Set from outside. {LONG}
""" + "Added.")
add_newdoc("module", "class", ("name", """In a tuple. {LONG}"""))
add_docstr(f, """Template of {{name}}. {LONG}""".format(**common))
print("Not documentation at all, although it is long enough to be taken for some.")
'''


def test_what_is_taken_from_a_source(tmp_path):
    path = tmp_path / "source.py"
    path.write_text(SOURCE)
    assert docstrings_in(SourceFile("source.py", str(path))) == [
        f"Module. {LONG}",
        f"Class. {LONG}\n\nIndented as in the source.",
        f"Method. {LONG}",
        f"Inner. {LONG}",
        f"Set from outside. {LONG}\nAdded.",
        f"In a tuple. {LONG}",
        f"Template of {{name}}. {LONG}",
    ]


def test_what_can_not_be_parsed_has_none(tmp_path):
    for name, content in [("a.py", b"def broken(:"), ("b.py", b"\xff\xfe"), ("c.py", b"x = '\0'")]:
        (tmp_path / name).write_bytes(content)
        assert docstrings_in(SourceFile(name, str(tmp_path / name))) == []
    assert docstrings_in(SourceFile("gone.py", str(tmp_path / "gone.py"))) == []


def test_required_packages_and_theirs_but_not_test_tools(tmp_path):
    (tmp_path / "requirements.txt").write_text(
        "# used\nsubmitit>=1.5 # clusters\npytest; python_version < '3'\n-r other\n"
    )
    found = required_distributions(tmp_path / "requirements.txt")
    assert set(found) == {"submitit", "cloudpickle", "typing-extensions"}
    assert all(file.name.startswith(("python/", *(f"{name}/" for name in found))) for file in source_files(found))


def test_the_projects_own_requirements_leave_test_tools_out():
    found = set(required_distributions(PROJECT / "requirements.txt"))
    assert {"torch", "numpy", "sympy", "tiktoken", "regex"} <= found
    assert not {"pytest", "hypothesis", "ruff", "mypy"} & found
    assert {canonicalize_name(name) for name in found} == found


def test_the_corpus_stays_the_one_that_the_demo_was_measured_on():
    required = required_distributions(PROJECT / "requirements.txt")
    assert required.keys() - corpus_distributions(PROJECT / "requirements.txt").keys() == {"scipy", "tokenizers"}


def test_extras_bring_their_packages(tmp_path):
    (tmp_path / "requirements.txt").write_text("jsonargparse[signatures]\n")
    assert "docstring-parser" in required_distributions(tmp_path / "requirements.txt")


def test_a_missing_package_or_file_is_named(tmp_path):
    (tmp_path / "requirements.txt").write_text("no-such-package-anywhere\n")
    with pytest.raises(UserError, match="no-such-package-anywhere"):
        required_distributions(tmp_path / "requirements.txt")
    with pytest.raises(UserError, match="--requirements"):
        required_distributions(tmp_path / "none.txt")


def test_documents_that_begin_alike_stay_on_one_side():
    beginning = "x" * 200
    assert len({chosen_for_validation(beginning + str(i), 2) for i in range(50)}) == 1
    sides = [chosen_for_validation(f"{i} {beginning}", 4) for i in range(2000)]
    assert 0.2 < np.mean(sides) < 0.3


def command(out: Path, *options: str) -> list[str]:
    return [sys.executable, str(PROJECT / "data_prep" / "docstrings.py"), "--out", str(out), *options]


def run(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(out, *options), cwd=out.parent, capture_output=True, text=True, timeout=120)


@pytest.fixture
def small(tmp_path):
    """Options for a corpus of one small package beside the standard library."""
    (tmp_path / "small.txt").write_text("tqdm\n")
    return ["--requirements", str(tmp_path / "small.txt"), "--shard-tokens", "200K"]


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.name[0] != "."}


def test_the_command_end_to_end(tmp_path, small):
    first = run(tmp_path / "first", *small, "--json", str(tmp_path / "figures.json"))
    assert first.returncode == 0, first.stderr
    opened = TokenSet.open(tmp_path / "first", verify="full")
    tokenizer = load_tokenizer(opened.tokenizer_spec)
    beginnings: dict[str, set[str]] = {}
    texts: dict[str, list[str]] = {}
    for split in ("train", "val"):
        stream = opened.split(split)
        tokens = stream.read(0, len(stream))
        assert tokens[0] == tokenizer.end_of_text_id
        texts[split] = tokenizer.decode(tokens).split("<|endoftext|>")[1:]
        beginnings[split] = {text[:200] for text in texts[split]}
        assert len(texts[split]) == stream.documents
        assert sum(len(text.encode()) for text in texts[split]) == stream.bytes
    assert not beginnings["train"] & beginnings["val"]
    everything = texts["train"] + texts["val"]
    assert len(set(everything)) == len(everything) > 3_000
    assert any("tqdm" in text for text in everything)
    assert 0.02 < len(texts["val"]) / len(everything) < 0.06
    manifest = opened.manifest
    assert manifest.source["packages"] == {"tqdm": importlib.metadata.version("tqdm")}
    assert str(tmp_path) not in (tmp_path / "first" / "manifest.json").read_text()
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["splits"]["train"]["tokens"] == manifest.total("train", "tokens")

    second = run(tmp_path / "second", *small, "--workers", "1")  # another number of processes: the same bytes
    assert second.returncode == 0, second.stderr
    assert hashes(tmp_path / "second") == hashes(tmp_path / "first")


def test_a_complete_set_is_left_alone_and_a_killed_one_finished(tmp_path, small):
    out = tmp_path / "set"
    process = subprocess.Popen(command(out, *small), stderr=subprocess.DEVNULL, start_new_session=True)
    while not list(out.glob("train-*.bin*")):
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    with pytest.raises(UserError, match="incomplete"):
        TokenSet.open(out)
    assert run(out, *small, "--max-documents", "300").returncode == 0
    assert sum(shard.documents for shards in TokenSet.open(out).manifest.splits.values() for shard in shards) == 300
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.bin")}
    again = run(out, *small, "--max-documents", "300")
    assert again.returncode == 0
    assert "complete already" in again.stdout
    for options, difference in (  # not to be taken for the whole corpus, or for bytes
        ([], "max_documents (300, now None)"),
        (["--max-documents", "300", "--tokenizer", "byte"], "tokenizer (gpt2, now byte)"),
    ):
        other = run(out, *small, *options)
        assert (other.returncode, f"was made with another {difference}" in other.stderr) == (2, True), other.stderr
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.bin")} == before
    assert run(out, *small, "--max-documents", "200", "--force").returncode == 0
    assert sum(shard.documents for shards in TokenSet.open(out).manifest.splits.values() for shard in shards) == 200


@pytest.mark.skipif(sys.platform == "win32", reason="signals to a group of processes are POSIX's")
@pytest.mark.parametrize(("what", "cpu_seconds"), [("docstrings", 1.0), ("text_files", 0.0)])
def test_an_interruption_at_the_terminal_is_one_word(tmp_path, small, what, cpu_seconds):
    """Ctrl-C reaches the processes that parse or encode, too: they leave it to the command.

    cpu_seconds: after which the process is at work, or from its first moment.
    """
    (tmp_path / "a.txt").write_text("a text\n")
    options = {"docstrings": small, "text_files": [str(tmp_path / "a.txt"), "--val-one-in", "2", "--tokenizer", "byte"]}
    script = [sys.executable, str(PROJECT / "data_prep" / f"{what}.py"), "--out", str(tmp_path / "set")]
    process = subprocess.Popen(
        [*script, *options[what], "--workers", "2"], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        start_new_session=True,
    )  # fmt: skip
    started: list[psutil.Process] = []
    while not started:
        assert process.poll() is None
        with contextlib.suppress(psutil.NoSuchProcess):
            children = psutil.Process(process.pid).children()
            started = [child for child in children if re.search("spawn_main|forkserver", " ".join(child.cmdline()))]
            started = [child for child in started if child.cpu_times().user >= cpu_seconds]
    os.killpg(process.pid, signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert (process.returncode, told.splitlines()[-1], "Traceback" in told) == (130, "interrupted", False), told


def test_wrong_input_is_one_line(tmp_path):
    for options in (["--requirements", "nowhere.txt"], ["--shard-tokens", "-3"], ["--no-such-option"]):
        done = run(tmp_path / "set", *options)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
    assert run(tmp_path / "set", "--help").returncode == 0
