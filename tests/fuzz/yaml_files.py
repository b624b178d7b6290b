"""Configuration files with something wrong in them, given to the trainer."""

import copy
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import yaml

from tests.fuzz.bases import TINY, copy_base, make_base
from tests.fuzz.cases import Case
from tests.fuzz.mutations import json_bytes, mutate_bytes, mutate_json, replace_by

MORE = {
    "optim": {"lr": 1e-3, "betas": [0.9, 0.95], "grad_clip": 1.0},
    "lora": {"rank": 2, "alpha": 4.0, "targets": ["attention"]},
    "log": {"every_steps": 1, "sequences": True},
    "data": {"path": "data", "verify": "full", "stride": 8, "document_mask": True},
}
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(9)
)
SPECIAL = {
    "a tag that runs code": "model: !!python/object/apply:os.system ['touch owned']\n",
    "an object": "run: !!python/object:subprocess.Popen {args: touch owned}\n",
    "a bomb of aliases": BOMB,
    "itself": "model: &m {block_size: *m}\n",
    "a list in itself": "eval: {prompts: &p [*p]}\n",
    "merge keys": "x: &x {n_layer: 1}\nmodel: {<<: *x, n_head: 2}\n",
    "a merge of a number": "model: {<<: 3}\n",
    "keys that are lists": "? [a, b]\n: 1\n",
    "keys that are objects": "? {a: b}\n: 1\n",
    "null keys": "model: {null: 1}\n~: 3\n",
    "number keys": "1: {2: 3}\n",
    "two documents": "model: {n_layer: 1}\n---\nmodel: {n_layer: 2}\n",
    "a duplicate key": "model: {n_layer: 1, n_layer: 2}\n",
    "tabs": "model:\n\tn_layer: 1\n",
    "a list": "- model\n- data\n",
    "a text": "model\n",
    "nothing": "",
    "null": "null\n",
    "comments only": "# nothing\n",
    "deep nesting": "model: " + "[" * 3_000 + "]" * 3_000 + "\n",
    "deep mappings": "".join(" " * depth + "a:\n" for depth in range(1_500)),
    "a long line": "run: {name: " + "a" * 1_000_000 + "}\n",
    "a sexagesimal": "run: {max_steps: 1:30}\n",
    "a date": "run: {name: 2026-01-01}\n",
    "binary": "run: {name: !!binary aGVsbG8=}\n",
    "a set": "model: !!set {n_layer, n_head}\n",
    "an unknown tag": "model: !what {n_layer: 1}\n",
    "a bad escape": 'run: {name: "\\ud800"}\n',
    "a NUL": 'run: {name: "a\\0b"}\n',
    "infinities": "optim: {lr: .inf, weight_decay: -.inf, eps: .nan}\n",
    "no braces": "model: {n_layer: 1\n",
}


def prepare(bases: Path) -> None:
    make_base(bases)


def cases(rng: random.Random, count: int, bases: Path) -> Iterator[Case]:
    specials = rng.sample(list(SPECIAL), len(SPECIAL))
    for number in range(count):
        if number % 4 == 3 and specials:
            label = specials.pop()
            content = SPECIAL[label].encode("utf-8", "surrogatepass")
        else:
            content, label = _mutated(rng)
        arguments = ["train/pretrain.py", "--config", "run.yaml", "--run.root", "runs", "--run.name", "new"]
        if rng.random() < 0.3:
            arguments.append("--print_config")
        else:
            arguments.append("--run.max_steps=2")
        replacing = rng.randrange(1 << 30) if rng.random() < 0.04 else None
        yield Case("yaml_files", label, arguments, partial(_make, bases, content, replacing), stopped=True)


def _mutated(rng: random.Random) -> tuple[bytes, str]:
    config = copy.deepcopy(TINY)
    for section in rng.sample(list(MORE), rng.randrange(len(MORE))):
        config.setdefault(section, {}).update(MORE[section])  # type: ignore[attr-defined]
    if rng.random() < 0.3:
        return mutate_bytes(rng, yaml.safe_dump(config).encode())
    value, label = mutate_json(rng, config)
    if rng.random() < 0.3:
        value, second = mutate_json(rng, value)
        label += f"; {second}"
    return json_bytes(value), label  # JSON is YAML, nearly


def _make(bases: Path, content: bytes, replacing: int | None, folder: Path) -> None:
    copy_base(bases, folder)
    (folder / "run.yaml").write_bytes(content)
    if replacing is not None:
        replace_by(random.Random(replacing), folder / "run.yaml")
