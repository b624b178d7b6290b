"""Every entry script answers a mistaken command line with one line and status 2, explains itself, has a version."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

from common.version import VERSION
from eval.shared.arguments import DTYPES
from model.number_formats import Dtype
from tests.helpers.ranks import hear_ctrl_c

Answers = dict[str, list[Any]]  # by command: status, output, complaint
PROJECT = Path(__file__).resolve().parents[2]
LAUNCHER = "train/launch.py"  # answers mistakes in a process that it starts: tests/train/test_launch_options.py
OF_LAUNCHER = "train/launching/torchrun_agent.py"  # only it starts that
MISTAKES = ("--no-such-option", "--hel")  # the beginning of an option is none
ASK_ALL = """
import contextlib, json, runpy, sys, tempfile
answers = {}
for question in sys.argv[1:]:
    script, *_ = sys.argv = question.split()
    said, complained = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complained):
        try:
            runpy.run_path(script, run_name="__main__")
            status = None
        except SystemExit as end:
            status = end.code
    answers[question] = [status, *(file.seek(0) or file.read() for file in (said, complained))]
print(json.dumps(answers))
"""

OPTION = r"^  (?:-h, )?(--[a-z][\w.-]*)"  # in a command's help
WITHOUT_TORCH = "import sys; sys.modules['torch'] = None\n" + ASK_ALL  # which makes `import torch` an ImportError
# What is answered from the command line and the files that it names, and words of the complaint.
BAD_VALUES = {
    "eval/average.py no-run --last=2": "no-run is not a folder",
    "eval/average.py no-run --last=1": "--last is 1",
    "eval/chat.py no-run": "no-run is not a folder",
    "eval/chat.py no-run --preset=greedy --max-tokens=0": "--max-tokens is 0",
    "eval/export_gguf.py no-run no-file.gguf": "no-run is not a folder",
    "eval/export_gguf.py eval no-file": "doesn't end in .gguf",
    "eval/export_hf.py no-run no-folder": "no-run is not a folder",
    "eval/generate.py no-run": "no prompt: give",
    "eval/generate.py no-run --prompt=a": "no-run is not a folder",
    "eval/generate.py no-run --prompt=a --top-p=2": "top-p is 2.0",
    "eval/generate.py no-run --prompt=a --samples=0": "--samples is 0",
    "eval/generate.py no-run --prompt-file=no-file": "no-file",
    "eval/harness.py no-run --tasks=piqa": "no-run is not a folder",
    "eval/harness.py no-run --tasks=piqa --batch=0": "--batch is 0",
    "eval/hellaswag.py no-run --data=no-file": "no-file",
    "eval/hellaswag.py no-run --limit=0": "--limit is 0",
    "eval/import_hf.py ./no-model no-folder": "no-model is neither a folder nor",
    "eval/perplexity.py no-run": "no-run is not a folder",
    "eval/perplexity.py eval --data=no-data": "no-data",
    "eval/perplexity.py no-run --dtype=fp8": "fp8",
    "train/benchmarks/bench_step.py --micro-batch=0": "above zero",
    "train/benchmarks/bench_step.py --model.n_head=5": "not a multiple of model.n_head",
    "train/finetune.py no-run": "no-run is not a folder",
    "train/study.py --compare A=no-run B=none": "no-run is not a run's folder",
    "train/study.py --compare A=no-run": "two groups of runs or more",
    "train/pretrain.py --data.path=no-data": "there is no token set in",
    "train/pretrain.py --optim.lr=x": "optim.lr is x",
}


# With neither torch nor what the project doesn't bring.
EXTRAS = ("transformers", "tokenizers", "peft", "lm_eval", "gguf")
WITHOUT_EXTRAS = f"import sys; sys.modules.update(dict.fromkeys({EXTRAS}))\n" + WITHOUT_TORCH
NEEDED = {
    "eval/export_hf.py eval no-folder": "needs transformers",
    "eval/export_hf.py eval no-folder --adapter eval": "needs peft and transformers",
    "eval/export_gguf.py eval no-file.gguf": "needs gguf and tokenizers",
    "eval/harness.py eval --tasks=piqa": "'lm-eval[hf]'",
}


def entry_scripts() -> list[str]:
    rooms = ("data_prep", "docs", "eval", "model", "setup", "slurm", "train")
    found = [
        path for room in rooms for path in (PROJECT / room).rglob("*.py") if "exit_on_user_error(" in path.read_text()
    ]
    return sorted({path.relative_to(PROJECT).as_posix() for path in found} - {OF_LAUNCHER})


def test_a_mistake_is_one_line_and_help_is_there() -> None:
    """In one process, so that torch is loaded once."""
    scripts = entry_scripts()
    assert len(scripts) > 25 and LAUNCHER in scripts
    mistakes = [f"{script} {mistake}" for script in scripts if script != LAUNCHER for mistake in MISTAKES]
    questions = [f"{script} {question}" for script in scripts for question in ("--help", "--version")]
    check(ask(ASK_ALL, [*mistakes, *questions]), scripts, mistakes)


def test_a_python_without_the_packages_is_one_line(tmp_path: Path) -> None:
    """-S: without what is installed, as the system's Python is."""
    copy = tmp_path / "clone"
    shutil.copytree(PROJECT / "common", copy / "common", ignore=shutil.ignore_patterns("__pycache__"))
    script = copy / "eval" / "report.py"
    script.parent.mkdir()
    shutil.copy(PROJECT / "eval" / "report.py", script)
    shutil.copy(PROJECT / "requirements.txt", copy)

    def start() -> str:
        command = [sys.executable, "-S", "-P", str(script), "--help"]
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        return done.stderr

    said = start()
    assert f"is not installed for {sys.executable}: " in said and "make environment" in said
    (copy / ".venv" / "bin").mkdir(parents=True)
    (copy / ".venv" / "longhaul.json").touch()
    (copy / ".venv" / "bin" / "python").touch()
    assert f"start the command with {copy}/.venv/bin/python" in start()

    hooked = {script for script in entry_scripts() if "sys.excepthook = " in (PROJECT / script).read_text()}
    commands = {s for s in entry_scripts() if s.count("/") == 1} | {LAUNCHER}
    assert commands - hooked == {"setup/environment.py", "setup/pin_packages.py"}, "which need none"


def test_ctrl_c_while_packages_are_imported_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "pydantic.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n", encoding="utf-8")
    for script in ("train/pretrain.py", "train/plan.py", "slurm/submit.py"):
        done = subprocess.run(
            [sys.executable, PROJECT / script, "--print_config"],
            env=os.environ | {"PYTHONPATH": str(tmp_path)},
            preexec_fn=hear_ctrl_c,
            capture_output=True,
            text=True,
            encoding="utf-8",
        )
        assert (done.returncode, done.stderr) == (130, "interrupted\n"), script


def test_entries_answer_before_torch_is_imported() -> None:
    scripts = entry_scripts()
    mistakes = [f"{script} {mistake}" for script in scripts if script != LAUNCHER for mistake in MISTAKES]
    questions = [f"{script} {question}" for script in scripts for question in ("--help", "--version")]
    answers = ask(WITHOUT_TORCH, [*mistakes, *questions, *BAD_VALUES])
    check(answers, scripts, [*mistakes, *BAD_VALUES])
    check_that_help_is_short_first_and_grouped(scripts, answers)
    for mistake, words in BAD_VALUES.items():
        assert words in answers[mistake][2], (mistake, answers[mistake])


def check_that_help_is_short_first_and_grouped(scripts: list[str], short: Answers) -> None:
    """Wherever there is a --help-all."""
    both = [script for script in scripts if "--help-all" in short[f"{script} --help"][1]]
    full = ask(WITHOUT_TORCH, [f"{script} --help-all" for script in both])
    assert len(both) >= 7 and {"train/pretrain.py", "train/finetune.py", "slurm/submit.py"} <= {*both}
    for script in both:
        (_, common, _), (status, every, _) = short[f"{script} --help"], full[f"{script} --help-all"]
        shown, known = (set(re.findall(OPTION, text, flags=re.MULTILINE)) for text in (common, every))
        assert status == 0 and shown < known, (script, shown - known)
        assert f"--help-all shows all {len(known)} options" in common, script
        assert len(common.splitlines()) <= (80 if script.startswith("train/") else 45), script
        for text, options in ((common, shown), (every, known)):
            titled = {title: found for title, found in groups(text).items() if found}
            assert len(titled) > 2 and set().union(*titled.values()) == options, (script, titled)


def groups(text: str) -> dict[str, set[str]]:
    """The options of a command's help by the titles that they stand under."""
    sections = re.findall(r"^(\S.*):\n((?:  .*\n)+)", text, flags=re.MULTILINE)
    return {title: set(re.findall(OPTION, entries, flags=re.MULTILINE)) for title, entries in sections}


def test_missing_packages_are_reported_before_anything_is_loaded() -> None:
    answers = ask(WITHOUT_EXTRAS, list(NEEDED))
    check(answers, [], list(NEEDED))
    for command, words in NEEDED.items():
        assert words in answers[command][2], answers[command]
        assert f"{sys.executable} -m pip install" in answers[command][2]


def test_entries_offer_the_dtypes_that_the_model_has() -> None:
    assert get_args(Dtype) == DTYPES


def ask(code: str, questions: list[str]) -> Answers:
    """Status, output and complaint of each command, run one after the other in one process."""
    done = subprocess.run(
        [sys.executable, "-c", code, *questions], cwd=PROJECT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    answers: Answers = json.loads(done.stdout)
    return answers


def check(answers: Answers, scripts: list[str], mistakes: list[str]) -> None:
    for mistake in mistakes:
        status, said, complained = answers[mistake]
        assert (status, said) == (2, ""), (mistake, said)
        assert complained.startswith("error: ") and complained.count("\n") == 1, (mistake, complained)
    for script in scripts:
        status, said, _ = answers[f"{script} --help"]
        assert status == 0, script
        assert "usage: " in said, script
        assert answers[f"{script} --version"] == [0, f"longhaul {VERSION}\n", ""], script


def test_the_changelogs_newest_list_is_this_versions() -> None:
    headings = re.findall(r"^## (\S+)", (PROJECT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert headings[0] == VERSION
    assert len(headings) == len(set(headings))
