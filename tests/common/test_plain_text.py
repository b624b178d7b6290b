"""No text ends a program: real commands on terminals that lack half of what they print, and names that are no text."""

import ast
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from common.plain_text import READABLE, accept_any_text, as_typed
from tests.helpers.source_code import product_code
from tests.helpers.token_sets import make_token_set
from tests.helpers.training import PROJECT

SYMBOLS = "│…日本😀éab"  # all that the model can generate
C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}  # ASCII, as before Python 3.7
CONFIG = """
model: {block_size: 16, n_layer: 1, n_head: 2, n_embd: 32}
schedule: {warmup: 1}
batch: {tokens_per_step: 64, micro_batch: 4}
eval: {every_steps: 1, tokens: 64, sample_every_steps: 1, sample_tokens: 8, prompts: ["日│"]}
run: {max_steps: 1, dtype: fp32, device: cpu}
"""


def command(script: str, *arguments: object, environment: dict[str, str], text: bytes = b"") -> bytes:
    """Standard output of a script as a user types it; it must end well."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHON"))}
    done = subprocess.run(
        [sys.executable, str(PROJECT / script), *map(str, arguments)],
        input=text,
        env=inherited | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr.decode("ascii", "backslashreplace")
    return done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, Path]:
    """What a run in the C locale printed, and its folder, whose name the locale takes for bytes that are no text."""
    from data_prep.tokenization.tokenizer import CharTokenizer

    folder = tmp_path_factory.mktemp("plain")
    data = make_token_set(folder / "data", tokenizer=CharTokenizer(SYMBOLS, end_of_text=True)).folder
    config = folder / "tiny.yaml"
    config.write_text(CONFIG, encoding="utf-8")
    options = (f"--config={config}", f"--data.path={data}", f"--run.root={folder}", "--run.name=läuf")
    return command("train/pretrain.py", *options, environment=C_LOCALE), folder / "läuf"


def test_a_run_is_trained_and_sampled_where_the_terminal_shows_ascii_only(trained: tuple[bytes, Path]):
    printed, run = trained
    assert str(run).encode() in printed, "a name goes out as the bytes that it came in"
    sample = json.loads((run / "samples.jsonl").read_bytes().splitlines()[-1])
    assert sample["prompt"] == "日│", "the configuration is UTF-8, whatever the locale"
    shown = next(line for line in printed.splitlines() if b"sample:" in line)
    assert shown.startswith(rb"  sample: \u65e5||") and shown.isascii()
    log = (run / "log.txt").read_text(encoding="utf-8")
    assert f"sample: 日││{json.dumps(sample['text'], ensure_ascii=False)[1:-1]}" in log


@pytest.mark.parametrize(
    ("encoding", "script", "expected"),
    [
        ("ascii", "eval/summary.py", r"\u65e5||"),
        ("ascii", "eval/report.py", r"l\xe4uf/report/report.html: 1 steps"),
        ("ascii", "slurm/status.py", r"l\xe4uf"),
        ("cp1252", "slurm/status.py", "läuf"),
    ],
)
def test_a_run_is_looked_at_in_any_encoding(trained: tuple[bytes, Path], encoding: str, script: str, expected: str):
    printed = command(script, trained[1], environment={"PYTHONIOENCODING": encoding})
    assert expected in printed.decode(encoding)


def test_prompts_are_utf8_where_the_locale_takes_them_for_no_text(trained: tuple[bytes, Path], tmp_path: Path):
    """From the command line and from standard input."""
    figures = tmp_path / "figures.json"
    options = ("--prompt", "é日", "--prompt-file", "-", "--past-end", "--max-tokens", 2, "--json", figures)
    printed = command("eval/generate.py", trained[1], *options, environment=C_LOCALE, text="│😀".encode())
    assert rb"\xe9\u65e5" in printed and rb"|\U0001f600" in printed
    assert [text["prompt"] for text in json.loads(figures.read_bytes())["texts"]] == ["é日", "│😀"]


def test_a_name_that_is_no_text_is_printed_and_reported(trained: tuple[bytes, Path], tmp_path: Path):
    named = Path(os.fsdecode(bytes(tmp_path) + rb"/$\no$-" + b"\xff-text"))
    try:
        shutil.copytree(trained[1], named)
    except OSError:
        pytest.skip("this file system takes names in UTF-8 only")
    for encoding in ("utf-8", "ascii"):
        assert b"-\xff-text" in command("eval/summary.py", named, environment={"PYTHONIOENCODING": encoding})
    command("eval/report.py", named, environment={})
    page = (named / "report" / "report.html").read_text(encoding="utf-8")
    assert r"$\no$-\udcff-text" in page


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_every_character_is_written_somehow(encoding: str):
    accept_any_text()
    raw = io.BytesIO()
    with io.TextIOWrapper(raw, encoding=encoding, errors=READABLE) as stream:
        stream.write("a│…é日😀\udcff\ud800")
        stream.flush()
        written = raw.getvalue()
    shown = {
        "ascii": rb"a|...\xe9\u65e5\U0001f600" + b"\xff" + rb"\ud800",
        "latin-1": b"a|...\xe9" + rb"\u65e5\U0001f600" + b"\xff" + rb"\ud800",
        "cp1252": b"a|\x85\xe9" + rb"\u65e5\U0001f600" + b"\xff" + rb"\ud800",
        "utf-8": "a│…é日😀".encode() + b"\xff" + rb"\ud800",
    }
    assert written == shown[encoding]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("é日", "é日"), ("é日".encode().decode("ascii", "surrogateescape"), "é日"), ("\udcff", "�"), ("\ud800", "?")],
)
def test_what_was_typed_is_utf8(typed: str, meant: str):
    assert as_typed(typed) == meant


def test_every_text_file_and_pipe_of_the_product_names_its_encoding():
    """The default is the locale's: the next machine reads another text, or fails at a character."""
    found = [
        f"{path}:{call.lineno}: {complaint}"
        for path, tree in product_code()
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and (complaint := complaint_about(call))
    ]
    assert found == []


def complaint_about(call: ast.Call) -> str:
    """Why a call may depend on the locale; "" where it doesn't."""
    function, keywords = call.func, {keyword.arg for keyword in call.keywords}
    on_object = isinstance(function, ast.Attribute)
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    if name in ("read_text", "write_text") and on_object and "encoding" not in keywords:
        return f"{name} without encoding="
    if keywords & {"text", "universal_newlines"} and name in ("run", "Popen", "check_output"):
        return "" if {"encoding", "errors"} <= keywords else f"{name} of text without encoding= and errors="
    if name == "TextIOWrapper" and "encoding" not in keywords:
        return "TextIOWrapper without encoding="
    opens = (name == "open" and not on_object) or (on_object and ast.unparse(function) in ("gzip.open", "os.fdopen"))
    modes = [word.value for word in (*call.args[1:2], *(k.value for k in call.keywords if k.arg == "mode"))
             if isinstance(word, ast.Constant)]  # fmt: skip
    text = opens and (not call.args[1:] or modes) and not any("b" in str(mode) for mode in modes)
    return f"{ast.unparse(call)} without encoding=" if text and "encoding" not in keywords else ""


def test_the_locale_is_found_in_calls():
    for code in (
        "p.read_text()",
        "open(p)",
        "open(p, 'w')",
        "open(p, mode='a')",
        "run(c, text=True, errors='replace')",
    ):
        assert complaint_about(call_in(code)), code
    for code in ("open(p, 'rb')", "open(p, mode)", "open(p, encoding='utf-8')", "TokenSet.open(p)", "read_text(a)"):
        assert not complaint_about(call_in(code)), code


def call_in(code: str) -> ast.Call:
    return next(node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call))
