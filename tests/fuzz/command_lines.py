"""Command lines that nobody would type on purpose."""

import itertools
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tests.fuzz.bases import copy_base, make_base
from tests.fuzz.cases import Case
from tests.fuzz.judge import PROJECT

RUN, CHECKPOINT = "runs/one", "runs/one/checkpoints/step-00000004"
TRAIN = ["--config", "tiny.yaml", "--run.root", "runs", "--run.name", "new", "--run.max_steps", "2"]
ENTRIES = {  # a command line that works, for each
    "train/pretrain.py": TRAIN,
    "train/finetune.py": ["runs/one", *TRAIN],
    "train/sync_wandb.py": [RUN],
    "eval/generate.py": [RUN, "--prompt", "Once", "--max-tokens", "4", "--device", "cpu"],
    "eval/perplexity.py": [RUN, "--data", "data", "--device", "cpu"],
    "eval/summary.py": [RUN],
    "eval/plot_loss.py": [RUN],
    "eval/report.py": [RUN],
    "eval/compare.py": [RUN, RUN],
    "eval/watch.py": [RUN, "--once"],
    "eval/export_hf.py": [CHECKPOINT, "exported"],
    "eval/import_hf.py": ["exported", "imported"],
    "data_prep/text_files.py": ["text.txt", "--out", "prepared", "--tokenizer", "byte", "--workers", "1"],
    "data_prep/verify.py": ["data", "--workers", "1"],
    "data_prep/inspect_shards.py": ["data"],
    "slurm/status.py": ["--root", "runs"],
}
TRAINING = ("train/pretrain.py", "train/finetune.py")
VALUES = [  # none names a place outside the case's folder that an entry run by root could overwrite
    "", " ", "-1", "0", "1", "3", "0.5", "1e400", "nan", "-inf", "9" * 25, "-" + "9" * 25, "9" * 5_000, "0x10", "1_0",
    "٣", "½", "null", "true", "yes", "[", "[1", "{a: b", "a: b", "- 1", "!!python/name:os.system", "*a", "&a", "1,2",
    "[1, 2]", "{}", "@x", "\udcff", "a" * 300, "a" * 5_000, "a/" * 2_000, "\n", "\t", "\x1b[2J",
    "$x$", "$NOT_SET", "~nobody_here/x",
    "..", ".", "/dev/null", "/dev/zero", "/dev/full", "tiny.yaml", "tiny.yaml/x",
    "data", "runs", RUN, CHECKPOINT, "data/manifest.json", "pipe", "zero", "dangling", "loop", "none",
]  # fmt: skip
OUTPUTS = ("--json", "--out", "--plot")
# they wait for a person, compile for a minute, need what is not there, or answer with status 1
LEFT_OUT = re.compile(r"--(interactive|run\.compile|start-method|log\.wandb|require-margin)$")


def prepare(bases: Path) -> None:
    make_base(bases)
    options = {entry: _options(entry) for entry in ENTRIES}
    (bases / "options.json").write_text(json.dumps(options), encoding="utf-8")


def cases(rng: random.Random, count: int, bases: Path) -> Iterator[Case]:
    options = json.loads((bases / "options.json").read_text(encoding="utf-8"))
    given = 0
    while given < count:
        entry = rng.choice(list(ENTRIES))
        arguments, label = _mutate(rng, ENTRIES[entry], options[entry])
        outputs = _outputs(arguments)
        if "pipe" in outputs:  # it waits for a reader, as any program does
            continue
        given += 1
        yield Case(
            "command_lines", label, [entry, *arguments], partial(_make, bases), stopped=entry in TRAINING,
            keeps=tuple(f"{name}{end}" for name in outputs for end in ("", ".png")),
        )  # fmt: skip


def _options(entry: str) -> list[str]:
    """Every option that an entry's help names."""

    def answer(question: str) -> str:
        command = [sys.executable, str(PROJECT / entry), question]
        return subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout

    text = answer("--help")
    text = answer("--help-all") if "--help-all" in text else text
    found = set(re.findall(r"--[a-z][\w.-]*", text)) - {"--help", "--help-all", "--version"}
    return sorted(name for name in found if not LEFT_OUT.match(name))


def _outputs(arguments: list[str]) -> list[str]:
    """What was asked to be written: it may be there though the rest was refused."""
    words = [part for word in arguments for part in (word.split("=", 1) if word.startswith(OUTPUTS) else [word])]
    return [value for option, value in itertools.pairwise(words) if option in OUTPUTS]


def _mutate(rng: random.Random, valid: list[str], options: list[str]) -> tuple[list[str], str]:
    arguments = list(valid)
    act = rng.choice(["add", "add", "add", "add two", "value", "value", "drop", "double", "typo", "position", "many"])
    if act == "drop":
        dropped = arguments.pop(rng.randrange(len(arguments)))
        return arguments, f"without {dropped}"
    if act == "double":
        start = rng.randrange(len(arguments))
        return arguments + arguments[start:], "twice"
    if act == "typo":
        option = rng.choice(options)
        return [*arguments, f"{option[:-1]}={rng.choice(VALUES)}"], f"{option[:-1]}"
    if act == "value":
        place, value = rng.randrange(len(arguments)), rng.choice(VALUES)
        was, arguments[place] = arguments[place], value
        return arguments, f"{was} -> {value[:40]!r}"
    if act == "position":
        value = rng.choice(VALUES)
        arguments.insert(rng.randrange(len(arguments) + 1), value)
        return arguments, f"{value[:40]!r} among them"
    if act == "many":
        return [*arguments, *[f"{rng.choice(options)}={rng.choice(VALUES)}" for _ in range(6)]], "six more"
    added = []
    for _ in range(2 if act == "add two" else 1):
        option, value = rng.choice(options), rng.choice(VALUES)
        added += rng.choice([[option, value], [f"{option}={value}"], [option]])
    return arguments + added, " ".join(added)[:80]


def _make(bases: Path, folder: Path) -> None:
    copy_base(bases, folder)
    (folder / "text.txt").write_text("Once upon a time, and once more. " * 40, encoding="utf-8")
    os.mkfifo(folder / "pipe")
    for name, target in (("zero", "/dev/zero"), ("dangling", "nowhere"), ("loop", "loop")):
        (folder / name).symlink_to(target)
