"""No name, sample, token or file commands a terminal: what every entry shows of hostile ones, on real terminals."""

import ast
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from common.checkpoint_files import write_checkpoint_manifest
from common.plain_text import one_line, printable, shown
from common.run_folder import RunFolder
from data_prep.tokenization.tokenizer import CharTokenizer
from tests.helpers.source_code import product_code
from tests.helpers.terminal import Shown, run_on_terminal
from tests.helpers.token_sets import make_token_set

EVIL = "\x1b]0;title\x07\x1b[2J\x9b31m\x9d0;t\x9c\ry\u202e\u2066z\x7f\x08\x0b$1^2$"  # no $x: a path's variable
NAME = f"_{EVIL}\n\u2028\t"  # of a run, a folder, a file
SYMBOLS = "".join(dict.fromkeys(NAME + "ab "))  # all that the model can generate
HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
WATCHS_COLORS = re.compile(r"\x1b\[(?:0|3[0-6]|1;\d+)m")
BAR = re.compile(r"\r(?:[^\r\n]*\d\d:\d\d[^\r\n]*| *)")  # tqdm's: a carriage return, and a time or blanks behind it
UP = "\x1b[A"
CONFIG = {
    "model": {"block_size": 64, "n_layer": 1, "n_head": 2, "n_embd": 16},
    "schedule": {"warmup": 1},
    "batch": {"tokens_per_step": 128, "micro_batch": 2},
    "eval": {"every_steps": 1, "tokens": 64, "sample_every_steps": 1, "sample_tokens": 8, "prompts": [EVIL, NAME]},
    "run": {"max_steps": 2, "dtype": "fp32", "device": "cpu"},
}
RUN = f"runs/{NAME}"


def commands_in(terminal: bytes, allowed: re.Pattern[str] | None = None) -> list[str]:
    """What of a terminal's text would command it."""
    text = terminal.decode("utf-8", "surrogateescape")
    text = allowed.sub("", text) if allowed else text
    return HIDDEN.findall(text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace"))


def check_shown(found: Shown, colors: bool = False) -> None:
    assert not commands_in(found.out, WATCHS_COLORS if colors else None), found.out
    error = found.error.decode("utf-8", "surrogateescape").replace(UP, "")
    assert not commands_in(BAR.sub("", error).encode("utf-8", "surrogateescape")), found.error


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Shown]:
    """A folder with a run, data and files that are hostile in every text they hold, and what training has shown."""
    folder = tmp_path_factory.mktemp("terminal")
    tokenizer = CharTokenizer(SYMBOLS, end_of_text=True)
    make_token_set(folder / NAME, train_tokens=3_000, val_tokens=200, tokenizer=tokenizer)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(CONFIG), encoding="utf-8")
    options = ["--config=tiny.yaml", f"--data.path={NAME}", "--run.root=runs", f"--run.name={NAME}"]
    found = run_on_terminal(["train/pretrain.py", *options], folder)
    assert found.status == 0, found
    poison(RunFolder(folder / RUN))
    return folder, found


def poison(run: RunFolder) -> None:
    """Put hostile texts wherever a run's folder holds one: its state, starts, lock, samples and measurements."""
    state = json.loads(run.state.read_text(encoding="utf-8"))
    evil = {"status": EVIL, "reason": EVIL, "host": EVIL, "job_id": EVIL, "trouble": EVIL}
    run.state.write_text(json.dumps(state | evil), encoding="utf-8")
    provenance = json.loads(run.provenance.read_text(encoding="utf-8"))
    command = f"python train/finetune.py {NAME}"
    for start in provenance["starts"]:
        start |= {"command": command, "revision": EVIL, "python": EVIL, "diff": EVIL, "version": EVIL}
        start["packages"] = {EVIL: EVIL}
        start["ranks"] = [rank | {"host": EVIL, "cpu": EVIL, "gpu": EVIL} for rank in start["ranks"]]
    run.provenance.write_text(json.dumps(provenance), encoding="utf-8")
    starts = [{"kind": "start", "time": 1.0, "job_id": EVIL, "restart_count": 0, "from_step": 0, "nodes": [EVIL]}]
    (run.path / "slurm.jsonl").write_text("".join(json.dumps(line) + "\n" for line in starts), encoding="utf-8")
    with open(run.samples, "a", encoding="utf-8") as samples:
        samples.write(json.dumps({"step": 2, "prompt": NAME, "text": NAME, "time": 1.0}) + "\n")
    with open(run.metrics, "a", encoding="utf-8") as metrics:
        metrics.write(json.dumps({"kind": EVIL, "step": 2, EVIL: EVIL}) + "\n")


def test_a_run_trains_on_a_terminal_without_commanding_it(trained: tuple[Path, Shown]) -> None:
    folder, found = trained
    assert found.status == 0, found.error
    check_shown(found)
    assert b"sample: \\x1b]0;title\\x07" in found.out
    log = (folder / RUN / "log.txt").read_bytes()
    assert not commands_in(log)
    assert rb"sample: _\x1b]0;title\x07" in log and log.count(b"\n") == log.count(b"] ") + len(
        re.findall(rb"^\d{4}-\d\d-\d\d ", log, re.MULTILINE)
    )


def hostile_checkpoint(folder: Path) -> list[str]:
    copy = shutil.copytree(folder / RUN / "checkpoints" / "step-00000002", folder / "broken")
    manifest = json.loads((copy / "checkpoint.json").read_text(encoding="utf-8"))
    write_checkpoint_manifest(copy, manifest | {"files": {EVIL: {"bytes": 1, "sha256": "0" * 64}}})
    return ["eval/generate.py", "broken", "--prompt", "a"]


def hostile_set(folder: Path) -> list[str]:
    copy = shutil.copytree(folder / NAME, folder / f"set{NAME}")
    (copy / f"{NAME}.bin").touch()
    return ["data_prep/verify.py", f"set{NAME}"]


def hostile_texts(folder: Path) -> list[str]:
    texts = folder / f"texts{NAME}"
    texts.mkdir()
    for number, name in enumerate((f"{NAME}a.txt", f"{NAME}b.txt", f"{NAME}.odd", f".{NAME}.txt", f"{NAME}test.txt")):
        (texts / name).write_bytes(f"{EVIL} {number} {'text ' * 400}\xff".encode("latin-1", "replace"))
    return [
        "data_prep/text_files.py",
        f"texts{NAME}",
        "--tokenizer=byte",
        "--val-tokens=10",
        "--out=made",
        "--workers=0",
    ]


def bad_line(folder: Path) -> list[str]:
    (folder / f"{NAME}.jsonl").write_text(f'{{"text": "a"}}\n{EVIL}\n'.replace("\n", "\r\n"), encoding="utf-8")
    return ["data_prep/text_files.py", f"{NAME}.jsonl", "--tokenizer=byte", "--out=never", "--workers=0"]


def hostile_examples(folder: Path) -> list[str]:
    (folder / "swag.txt").write_text(f"context\n{EVIL}\na\nb\nc\nd\n", encoding="utf-8")
    return ["eval/hellaswag.py", RUN, "--data=swag.txt"]


def hostile_model(folder: Path) -> list[str]:
    (folder / "theirs").mkdir()
    save_file({"wte.weight": np.zeros((2, 2), np.float32)}, folder / "theirs" / "model.safetensors")
    (folder / "theirs" / "config.json").write_text(json.dumps({"model_type": EVIL, EVIL: EVIL}), encoding="utf-8")
    return ["eval/import_hf.py", "theirs", "imported"]


def failed_run(folder: Path) -> list[str]:
    run = RunFolder(folder / "failed")
    run.path.mkdir()
    run.write_state("failed", reason=NAME, step=1, tokens=1, failure="exception")
    return ["slurm/requeue.py", "failed"]


def hostile_yaml(folder: Path) -> list[str]:
    (folder / "evil.yaml").write_text(yaml.safe_dump({"model": {EVIL: EVIL}}), encoding="utf-8")
    return ["train/pretrain.py", "--config=evil.yaml"]


Arguments = list[str] | Callable[[Path], list[str]]
SAYING: dict[str, tuple[Arguments, int]] = {
    "status": (["slurm/status.py", "--root=runs"], 0),
    "summary": (["eval/summary.py", RUN], 0),
    "compare": (["eval/compare.py", RUN], 0),
    "compare in Markdown": (["eval/compare.py", RUN, "--markdown"], 0),
    "report": (["eval/report.py", RUN], 0),
    "plot": (["eval/plot_loss.py", RUN], 0),
    "watch": (["eval/watch.py", RUN, "--once"], 0),
    "generate": (["eval/generate.py", RUN, "--prompt", NAME, "--max-tokens=20", "--past-end"], 0),
    "generate two": (["eval/generate.py", RUN, "--prompt", EVIL, "--samples=2", "--max-tokens=20"], 0),
    "perplexity": (["eval/perplexity.py", RUN], 0),
    "inspect": (["data_prep/inspect_shards.py", NAME], 0),
    "inspect a document": (["data_prep/inspect_shards.py", NAME, "--document=0"], 0),
    "verify": (hostile_set, 1),
    "text files": (hostile_texts, 0),
    "decide": (failed_run, 1),
    "submit": (["slurm/submit.py", "--config=tiny.yaml", "--dry-run", "--", f"--run.name={EVIL}"], 0),
    "done already": (["train/pretrain.py", f"--config={RUN}/config.yaml"], 0),
    "finetune": (["train/finetune.py", RUN, "--config=tiny.yaml", f"--data.path={NAME}", f"--run.name=tuned{NAME}"], 0),
    "a damaged checkpoint": (hostile_checkpoint, 2),
    "a line that is no JSON": (bad_line, 2),
    "no examples": (hostile_examples, 2),
    "no model": (hostile_model, 2),
    "no such option in a file": (hostile_yaml, 2),
    "no such option": (["train/pretrain.py", f"--{EVIL}"], 2),
    "no such script": (["train/launch.py", "--standalone", EVIL], 2),
    "no run to mirror": (["train/sync_wandb.py", NAME], 2),
    "no data": (["slurm/start_job.py", "--nodes=a", "--", "--config=tiny.yaml", f"--data.path={EVIL}"], 2),
    "no beginning": (["slurm/preflight.py", "--nodes", EVIL, EVIL], 2),
    "export": (["eval/export_hf.py", RUN, EVIL], 0),
}


SILENT = {"watch"}  # which shows a blank for each


@pytest.mark.parametrize("case", SAYING)
def test_no_entry_lets_a_text_command_the_terminal(trained: tuple[Path, Shown], case: str) -> None:
    arguments, status = SAYING[case]
    folder, _ = trained
    found = run_on_terminal(arguments(folder) if callable(arguments) else arguments, folder)
    assert found.status == status, found
    assert b"Traceback" not in found.error
    told = found.out + found.error
    assert re.search(rb"\\x(?:07|1b|9c)", told) or case in SILENT, told
    check_shown(found, colors=case == "watch")


NO_TEXT = os.fsdecode(b"_n\xff\x9b\xc2\x9b$")  # bytes that are no UTF-8, and some that command eight-bit terminals
NAMELESS: dict[str, list[str]] = {
    "status": ["slurm/status.py", f"more/{NO_TEXT}", "--json=a.json"],
    "summary": ["eval/summary.py", f"more/{NO_TEXT}", "--json=b.json"],
    "compare": ["eval/compare.py", f"more/{NO_TEXT}", RUN, "--json=c.json"],
    "report": ["eval/report.py", f"more/{NO_TEXT}", RUN, "--json=d.json", "--out=e.html"],
    "plot": ["eval/plot_loss.py", f"more/{NO_TEXT}"],
    "watch": ["eval/watch.py", f"more/{NO_TEXT}", "--once"],
    "generate": ["eval/generate.py", f"more/{NO_TEXT}", "--prompt=a", "--json=f.json"],
    "perplexity": ["eval/perplexity.py", f"more/{NO_TEXT}", "--json=g.json"],
    "export": ["eval/export_hf.py", f"more/{NO_TEXT}", "exported"],
    "decide": ["slurm/requeue.py", f"more/{NO_TEXT}"],
    "mirror": ["train/sync_wandb.py", f"more/{NO_TEXT}"],
    "resume": ["train/pretrain.py", "--config=tiny.yaml", f"--resume=more/{NO_TEXT}", "--run.name=b"],
    "begin": ["slurm/start_job.py", "--nodes=a", "--", "--config=tiny.yaml", f"--run.name={NO_TEXT}"],
    "prepare": ["data_prep/text_files.py", f"more/{NO_TEXT}.txt", "--tokenizer=byte", "--val-tokens=9", "--out=more/p"],
    "verify": ["data_prep/verify.py", f"more/{NO_TEXT}.set", "--json=h.json"],
    "train on": ["train/pretrain.py", "--config=tiny.yaml", f"--data.path=more/{NO_TEXT}.set", "--run.root=more/runs"],
}


@pytest.fixture(scope="module")
def nameless(trained: tuple[Path, Shown]) -> Path:
    """A folder with the hostile run, its data and a text, named by what is no text."""
    folder, _ = trained
    try:
        shutil.copytree(folder / RUN, folder / "more" / NO_TEXT)
    except OSError:
        pytest.skip("this file system takes names in UTF-8 only")
    shutil.copytree(folder / NAME, folder / "more" / f"{NO_TEXT}.set")
    (folder / "more" / f"{NO_TEXT}.txt").write_text("text " * 4000, encoding="utf-8")
    return folder


@pytest.mark.parametrize("case", NAMELESS)
def test_a_name_that_is_no_text_costs_no_traceback(nameless: Path, case: str) -> None:
    found = run_on_terminal(NAMELESS[case], nameless)
    assert b"Traceback" not in found.error, found.error.decode("utf-8", "replace")
    assert found.status in (0, 2) or case == "decide", found
    assert (found.status == 2) == (b"error: " in found.error)
    if case != "begin":  # whose values are for a shell
        check_shown(found, colors=case == "watch")


def test_a_generated_text_is_exact_in_a_file(trained: tuple[Path, Shown]) -> None:
    """What a program reads is what the model has generated."""
    folder, _ = trained
    options = ["--prompt", "ab", "--max-tokens=20", "--past-end", "--json=figures.json", "--temperature=5"]
    found = run_on_terminal(["eval/generate.py", RUN, *options], folder, out_file=folder / "out.txt")
    assert found.status == 0, found.error
    (text,) = json.loads((folder / "figures.json").read_text(encoding="utf-8"))["texts"]
    written = (folder / "out.txt").read_bytes()
    assert written.decode() == f"ab{text['text']}\n"
    assert commands_in(written)


@pytest.mark.parametrize(
    ("text", "as_text", "on_a_line"),
    [
        ("é日😀×\\x1b", None, None),
        ("a\tb\nc", None, r"a\tb\nc"),
        ("\x00\x07\x1b[2J\x7f\x9b\r\u202e\u2069", r"\x00\x07\x1b[2J\x7f\x9b\r\u202e\u2069", None),
        ("\u2028\u2029", None, r"\u2028\u2029"),
        ("n\udcff\udc9b", "n\udcff\\x9b", None),  # a name's bytes: no text; and a command to a terminal of eight bits
        ("é日\u202e\x9b".encode().decode("ascii", "surrogateescape"), None, None),  # UTF-8, in the C locale
        ("\ud800", None, None),
    ],
)
def test_what_is_hidden_is_an_escape(text: str, as_text: str | None, on_a_line: str | None) -> None:
    if text.startswith("\udcc3"):
        as_text = on_a_line = "é日".encode().decode("ascii", "surrogateescape") + r"\u202e\x9b"
    as_text = text if as_text is None else as_text
    assert shown(text) == as_text
    assert one_line(text) == (as_text if on_a_line is None else on_a_line)
    assert shown(one_line(text)) == one_line(text)
    assert printable(text).isprintable()


def test_only_plain_text_writes_past_the_filter() -> None:
    """`print` goes through it; what writes bytes, or to the streams that the interpreter made, does not."""
    past = {"buffer", "__stdout__", "__stderr__", "write_exactly"}
    found = {
        str(path)
        for path, tree in product_code()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and (node.attr in past and ast.unparse(node.value).startswith(("sys", "self._stream")))
    }
    assert found == {"common/plain_text.py", "eval/watch.py"}, "eval/watch.py filters by itself, for its colours"
