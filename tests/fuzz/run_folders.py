"""Damaged files in runs' folders, shown by every command that reads them, and met by a trainer that resumes."""

import json
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from common.run_folder import RunFolder
from common.step_profile import table_name
from slurm.decision import EXIT_STATUS
from tests.fuzz.bases import copy_base, make_base
from tests.fuzz.cases import Case
from tests.fuzz.mutations import json_bytes, mutate_bytes, mutate_json, replace_by
from tests.helpers.recorded_runs import a_profile, write_run

PATIENCE = "--run.lock_patience_seconds=0.2"
READERS = {
    "slurm/status.py": ["--root", "runs", "--json", "status.json"],
    "eval/summary.py": ["runs/one"],
    "eval/report.py": ["runs/one", "--json", "report.json"],
    "eval/watch.py": ["runs/one", "--once"],
    "eval/compare.py": ["runs/one", "runs/two"],
    "eval/plot_loss.py": ["runs/one"],
    "slurm/requeue.py": ["runs/one"],
    "train/sync_wandb.py": ["runs/one"],
}
TRAINERS = {
    "train/pretrain.py": ["--config=tiny.yaml", "--run.root=runs", "--run.name=one", "--run.max_steps=6", PATIENCE],
}
LINES = ["metrics.jsonl", "samples.jsonl", "slurm.jsonl"]
PROFILE = f"profile/{table_name(2, 3)}"
OBJECTS = ["state", "lock", "provenance.json", "ranks/rank-00000.json", "report/hellaswag.json", "wandb-mirror.json"]
OBJECTS += [PROFILE]
OTHERS = ["config.yaml", "log.txt", "STOP"]
TORN = [
    b"{",
    b"\n\n\n",
    b'{"step": 3}\n',
    b'{"step": NaN}\n',
    b"[" * 5_000 + b"\n",
    b"x" * 100_000,
    b"\xff\xfe\n",
    bytes(4096),
]


def prepare(bases: Path) -> None:
    """A trained run, with what a cluster, an evaluation and a mirror leave in its folder, and a recorded one."""
    make_base(bases)
    run = RunFolder(bases / "runs" / "one")
    identity = json.loads(run.rank_file(0).read_bytes())
    owner = {key: identity[key] for key in ("host", "pid", "started", "boot", "namespace")}
    lock = owner | {"job_id": "7", "restart_count": 0, "folder": [1, 2], "token": "0" * 32, "renewed": 1_700_000_000.0}
    run.lock.write_text(json.dumps(lock), encoding="utf-8")
    run.report.mkdir()
    score = {"acc_norm": 0.31, "acc_norm_stderr": 0.01, "examples": 400, "step": 4, "data": {"form": "official"}}
    (run.report / "hellaswag.json").write_text(json.dumps(score), encoding="utf-8")
    run.profile.mkdir()
    (run.path / PROFILE).write_text(json.dumps(a_profile(2, 3)), encoding="utf-8")
    (run.path / "wandb-mirror.json").write_text(json.dumps({"id": "0123abcd", "train": 4}), encoding="utf-8")
    lines = [
        {"kind": "submission", "time": 1_699_999_000.0, "job_id": "7", "restart_count": 0},
        {"kind": "start", "time": 1_699_999_900.0, "job_id": "7", "restart_count": 0, "from_step": 0, "nodes": ["a"]},
        {"kind": "end", "time": 1_700_000_900.0, "job_id": "7", "restart_count": 0, "pre_empted": False},
    ]
    (run.path / "slurm.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    samples = [{"step": step, "prompt": "Once", "text": "ab\ncd", "time": 1_700_000_000.0} for step in (2, 4)]
    run.samples.write_text("".join(json.dumps(sample) + "\n" for sample in samples), encoding="utf-8")
    write_run(RunFolder(bases / "runs" / "two"), lives=((0, 25), (20, 40)), hellaswag=True, own=True)


def cases(rng: random.Random, count: int, bases: Path) -> Iterator[Case]:
    one, two = bases / "runs" / "one", bases / "runs" / "two"
    for _ in range(count):
        entry, arguments = rng.choice([*READERS.items(), *READERS.items(), *TRAINERS.items()])
        source = two if entry not in TRAINERS and rng.random() < 0.4 else one
        changed, label, replaced = {}, "", None
        for _ in range(rng.choice([1, 1, 2])):
            name = rng.choice([*LINES, *LINES, *OBJECTS, *OTHERS, "metrics.jsonl"])
            if rng.random() < 0.25:
                name = rng.choice([*LINES, *OBJECTS, *OTHERS, "checkpoints", "report", "ranks"])
                replaced = (name, rng.randrange(1 << 30))
                continue
            content = (source / name).read_bytes() if (source / name).exists() else b"{}\n"
            changed[name], what = _damaged(rng, name, content)
            label += f"{name}: {what}; "
        label += f"{replaced[0]} replaced ({replaced[1]})" if replaced else ""
        given = [argument.replace("one", source.name) for argument in arguments]
        make = partial(_make, bases, source.name, changed, replaced)
        also = tuple(EXIT_STATUS.values()) if entry == "slurm/requeue.py" else ()
        # a trainer that refuses has taken over the lock of one that is gone, and released it
        yield Case("run_folders", label, [entry, *given], make, also=also, keeps=(f"runs/{source.name}/lock",))


def _damaged(rng: random.Random, name: str, content: bytes) -> tuple[bytes, str]:
    if name in OTHERS or rng.random() < 0.2:
        return mutate_bytes(rng, content)
    if name not in LINES:
        value, what = mutate_json(rng, json.loads(content))
        return json_bytes(value), what
    lines = content.splitlines(keepends=True)
    if rng.random() < 0.15:
        place, torn = rng.randrange(len(lines) + 1), rng.choice(TORN)
        return b"".join([*lines[:place], torn, *lines[place:]]), f"{torn[:20]!r} before line {place}"
    kinds: dict[Any, list[int]] = {}
    for number, line in enumerate(lines):
        record = json.loads(line)
        kinds.setdefault(record.get("kind", "val_loss" in record), []).append(number)
    chosen = rng.choice(list(kinds.values()))
    numbers = chosen if rng.random() < 0.3 else rng.sample(chosen, min(len(chosen), rng.choice([1, 1, 3])))
    if rng.random() < 0.3:
        numbers = sorted({*numbers, chosen[-1]})
    seed, what = rng.randrange(1 << 30), ""
    same = rng.random() < 0.5  # the same damage in each of these lines
    for number in numbers:
        value, what = _mutated(random.Random(seed if same else rng.randrange(1 << 30)), json.loads(lines[number]))
        lines[number] = json_bytes(value) + b"\n"
    return b"".join(lines), f"{what} in line {', '.join(map(str, numbers))[:40]}"


def _mutated(rng: random.Random, record: dict[str, Any]) -> tuple[Any, str]:
    """A record with one thing wrong; where it describes evaluations, often in that."""
    if not record.get("curves") or rng.random() < 0.4:
        return mutate_json(rng, record)
    curves, what = mutate_json(rng, record["curves"])
    return record | {"curves": curves}, f"curves: {what}"


def _make(bases: Path, name: str, changed: dict[str, bytes], replaced: tuple[str, int] | None, folder: Path) -> None:
    copy_base(bases, folder)
    run = folder / "runs" / name
    for file, content in changed.items():
        path = run / file
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    if replaced is not None:
        path = run / replaced[0]
        path.parent.mkdir(exist_ok=True)
        replace_by(random.Random(replaced[1]), path)
