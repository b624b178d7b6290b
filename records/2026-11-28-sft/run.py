"""What supervised fine-tuning is worth on a model that two cores train: exact answers, and answers that end.

    .venv/bin/python records/2026-11-28-sft/run.py --out /tmp/sft --json records/2026-11-28-sft/result.json

A base learns lines such as "12+30=42"; then conversations that this script makes are learned from, for each of three
seeds: sums, and which of two numbers is larger. One pair of numbers in eight is in none of the texts. Given again, the
command continues.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from common.seeds import seed_of
from data_prep.chat.chat_tokenizer import ChatTokenizer
from data_prep.chat.messages import USER, Message
from eval.generation.sampling import continue_tokens
from eval.shared.loading import load_checkpoint

PROJECT = Path(__file__).resolve().parents[2]
BELOW, HELD_BACK_ONE_IN = 20, 8
SEEDS = (1, 2, 3)
BASE = """
model: {block_size: 64, n_layer: 2, n_head: 4, n_embd: 96}
optim: {lr: 2.0e-3, weight_decay: 0.01}
schedule: {warmup: 50}
batch: {tokens_per_step: 2048, micro_batch: 32}
checkpoint: {every_steps: 250, keep_best: false}
eval: {every_steps: 400, tokens: 4096, prompts: []}
run: {max_steps: 800, dtype: bf16, device: cpu, compile: false}
"""
TUNED = """
lora: {rank: 0}
optim: {lr: 5.0e-4, weight_decay: 0.01}
schedule: {warmup: 20}
batch: {tokens_per_step: 2048, micro_batch: 32}
checkpoint: {every_steps: 100, keep_best: false}
eval: {every_steps: 100, tokens: 4096, prompts: []}
run: {max_steps: 150, dtype: bf16, device: cpu, compile: false}
"""

# the base has seen no word for roles: its characters are those of its lines
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ ('<|user|>' if message['role'] == 'user' else '<|bot|>') + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|bot|>' }}{% endif %}"
)


def held_back(a: int, b: int) -> bool:
    return seed_of(f"{min(a, b)} and {max(a, b)}") % HELD_BACK_ONE_IN == 0


def pairs(*, back: bool) -> list[tuple[int, int]]:
    return [(a, b) for a in range(BELOW) for b in range(BELOW) if held_back(a, b) is back]


def questions(a: int, b: int) -> Iterator[tuple[str, str]]:
    yield f"What is {a}+{b}?", str(a + b)
    if a != b:
        yield f"Which is larger, {a} or {b}?", str(max(a, b))


def write_texts(folder: Path) -> None:
    choose, known = random.Random(1), pairs(back=False)
    with (folder / "base.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(6_000):
            lines = [f"{a}+{b}={a + b}\n" for a, b in choose.choices(known, k=choose.randrange(2, 12))]
            text = "".join(lines) if choose.random() < 0.9 else "What is it? Which is larger, this or that?\n"
            file.write(json.dumps({"text": text}) + "\n")
    with (folder / "talks.jsonl").open("w", encoding="utf-8") as file:
        for a, b in known:
            for question, answer in questions(a, b):
                turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                file.write(json.dumps({"messages": turns}) + "\n")


def call(*command: object) -> float:
    """Run one of the project's commands; seconds of processor time."""
    before = os.times()
    subprocess.run([sys.executable, *map(str, command)], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    after = os.times()
    return sum(after[2:4]) - sum(before[2:4])


def answered(run: Path, asked: list[tuple[str, str]]) -> dict[str, float]:
    """Greedy answers to questions: the share that is exact, and the share that ends by itself."""
    loaded = load_checkpoint(run)
    tokenizer = loaded.tokenizer
    assert isinstance(tokenizer, ChatTokenizer)
    kinds: dict[str, list[bool]] = {}
    ended = 0
    for question, answer in asked:
        prompt = tokenizer.prompt_of([Message(USER, question)])
        found = continue_tokens(
            loaded.model, prompt, 12, temperature=0, top_k=0, seed=1, stops=tokenizer.end_ids
        )  # fmt: skip
        ended += len(found) < 12
        exact = len(found) < 12 and tokenizer.decode(found, continues=True) == answer
        kinds.setdefault("sums" if "+" in question else "larger", []).append(exact)
    shares = {f"exact_{kind}": sum(right) / len(right) for kind, right in kinds.items()}
    return shares | {"ended": ended / len(asked), "asked": float(len(asked))}


def continued(run: Path, asked: list[tuple[int, int]]) -> float:
    """The share of sums that the base completes in the form that it has learned."""
    loaded = load_checkpoint(run)
    right = 0
    for a, b in asked:
        prompt = loaded.tokenizer.prompt(f"{a}+{b}=")
        text = loaded.tokenizer.decode(
            continue_tokens(loaded.model, prompt, 5, temperature=0, top_k=0, seed=1, stops=()), continues=True
        )
        right += text.split("\n")[0] == str(a + b)
    return right / len(asked)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--base-steps", type=int, default=800)
    parser.add_argument("--steps", type=int, default=150)
    arguments = parser.parse_args()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    base, runs, started = out / "runs" / "base", out / "runs", time.monotonic()
    if not (out / "talks.jsonl").exists():
        write_texts(out)
    (out / "base.yaml").write_text(BASE, encoding="utf-8")
    (out / "tuned.yaml").write_text(TUNED, encoding="utf-8")
    (out / "template.jinja").write_text(TEMPLATE, encoding="utf-8")
    prepare, train = PROJECT / "data_prep", PROJECT / "train"
    root = [f"--run.root={runs}"]
    seconds = call(prepare / "text_files.py", out / "base.jsonl", "--tokenizer", "char", "--out", out / "base-set")
    length = f"--run.max_steps={arguments.base_steps}"
    config = f"--config={out / 'base.yaml'}"
    seconds += call(
        train / "pretrain.py", config, f"--data.path={out / 'base-set'}", "--run.name=base", length, *root
    )  # fmt: skip
    form = ["--tokenizer", base, "--template", out / "template.jinja", "--val-one-in", 16]
    seconds += call(prepare / "conversations.py", out / "talks.jsonl", *form, "--out", out / "talks")
    tune = [train / "finetune.py", base, f"--config={out / 'tuned.yaml'}", f"--data.path={out / 'talks'}"]
    tune += ["--objective=sft", *root]

    asked_pairs = pairs(back=True)
    asked = [question for a, b in asked_pairs for question in questions(a, b)]
    seconds += call(*tune, "--run.name=before", "--run.max_steps=1", "--optim.lr=1e-12", "--schedule.warmup=0")
    result: dict[str, Any] = {"base_exact_in_its_own_form": continued(base, asked_pairs), "seeds": {}}
    result["before"] = answered(runs / "before", asked)
    for kind, more in {"all": [], "adapters": ["--lora.rank=8", "--optim.lr=2e-3"]}.items():
        for seed in SEEDS if kind == "all" else SEEDS[:1]:
            name = f"{kind}-{seed}"
            options = [f"--run.seed={seed}", f"--run.max_steps={arguments.steps}", *more]
            seconds += call(*tune, f"--run.name={name}", *options)
            result["seeds"][name] = answered(runs / name, asked)
            result |= {"core_minutes": seconds / 60, "minutes": (time.monotonic() - started) / 60}
            arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            print(name, result["seeds"][name], flush=True)


if __name__ == "__main__":
    main()
