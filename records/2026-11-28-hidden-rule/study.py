"""What DPO, and what a reward model with PPO, make of preferences that follow a hidden rule.

    .venv/bin/python records/2026-11-28-hidden-rule/study.py --out /tmp/rule --json /tmp/rule.json --png /tmp/rule.png

For each of three seeds a model learns conversations in random styles by supervised fine-tuning from random weights. Who
prefers polite and short answers (`hidden_rule.py`) chooses between pairs of answers, with noise. DPO learns from the
pairs; apart from it, a reward model learns from them and PPO from the reward model. Measured is the rule's score of
answers sampled to held-back questions, how many are right, and the KL from the start, in nats an answer. Given again,
the command continues.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    sys.path.append(str(Path(__file__).resolve().parent))

import hidden_rule
import numpy as np
import torch

from common.metrics_file import read_metrics
from common.run_folder import RunFolder
from data_prep.token_sets.packing import IGNORE
from data_prep.token_sets.token_set import TokenSet
from eval.shared.loading import load_checkpoint
from model.gpt import GPT
from train.batches.prompts import Prompts
from train.objectives.policy import log_probabilities
from train.objectives.sampling import Sampled, random_numbers, sample_answers

PROJECT = Path(__file__).resolve().parents[2]
SEEDS = (1, 2, 3)
LONGEST, EACH = 40, 8  # tokens of an answer; samples of a held-back question
HELD_BACK_ONE_IN = 8
MODEL = """
model: {block_size: 96, n_layer: 2, n_head: 4, n_embd: 128}
optim: {lr: 2.0e-3, weight_decay: 0.01}
schedule: {warmup: 50}
batch: {tokens_per_step: 6144, micro_batch: 64}
checkpoint: {every_steps: 0, keep_best: false}
eval: {every_steps: 300, tokens: 4096, prompts: []}
run: {max_steps: 400, dtype: bf16, device: cpu, compile: false}
"""
PAIRS = """
lora: {rank: 0}
optim: {lr: 1.0e-4, weight_decay: 0.0, beta2: 0.99}
schedule: {warmup: 10}
batch: {pairs_per_step: 32, micro_batch: 64}
checkpoint: {every_steps: 0, keep_best: false}
eval: {every_steps: 50, tokens: 8192, prompts: []}
run: {max_steps: 200, dtype: bf16, device: cpu, compile: false}
"""
PPO = """
lora: {rank: 0}
optim: {lr: 3.0e-5, weight_decay: 0.0, beta2: 0.99}
schedule: {kind: constant, warmup: 10}
batch: {micro_batch: 64}
rollout: {prompts_per_step: 64, samples: 2, max_tokens: 40, prompts_per_block: 64, kl: 0.05, epochs: 2, minibatches: 2}
checkpoint: {every_steps: 0, keep_best: false}
eval: {every_steps: 50, prompts: [], sample_every_steps: 100}
run: {max_steps: 150, dtype: bf16, device: cpu, compile: false}
"""


def write_files(folder: Path, seed: int) -> None:
    """Conversations and preferences of a seed, as JSON lines."""
    generator = random.Random(seed)
    asked = hidden_rule.questions()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "talks.jsonl").open("w", encoding="utf-8") as talks:
        for _ in range(6000):
            question, noun, kind = generator.choice(asked)
            said = hidden_rule.answer(generator, noun, kind)
            talks.write(json.dumps({"prompt": question, "completion": said}) + "\n")
    with (folder / "preferences.jsonl").open("w", encoding="utf-8") as preferences:
        for _ in range(5000):
            question, noun, kind = generator.choice(asked)
            one, other = (hidden_rule.answer(generator, noun, kind) for _ in range(2))
            if not hidden_rule.prefers(generator, one, other):
                one, other = other, one
            preferences.write(json.dumps({"prompt": question, "chosen": one, "rejected": other}) + "\n")
    with (folder / "questions.jsonl").open("w", encoding="utf-8") as questions:
        for question, _, _ in asked:
            questions.write(json.dumps({"prompt": question, "question": question}) + "\n")
    text = (folder / "talks.jsonl").read_text(encoding="utf-8").splitlines()
    plain = [" ".join(json.loads(line).values()) for line in text]
    (folder / "words.txt").write_text("\n".join(plain), encoding="utf-8")


def call(*command: object) -> float:
    """Run one of the project's commands; seconds of processor time."""
    before = os.times()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *map(str, command)], check=True, env=environment, stdout=subprocess.DEVNULL)
    after = os.times()
    return sum(after[2:4]) - sum(before[2:4])


def prepare(folder: Path, seed: int) -> None:
    """The token sets of a seed, with a vocabulary of their own; equal questions are held back in all of them."""
    if (folder / "questions" / "manifest.json").exists():
        return
    write_files(folder, seed)
    made = PROJECT / "data_prep"
    call(
        made / "train_tokenizer.py",
        folder / "words.txt",
        "--vocab-size",
        512,
        "--out",
        folder / "tokenizer.json",
        "--force",
    )
    common = ["--template", "chatml", "--val-one-in", HELD_BACK_ONE_IN, "--force"]
    for name, script in (("talks", "conversations"), ("preferences", "preferences"), ("questions", "prompts")):
        call(
            made / f"{script}.py", folder / f"{name}.jsonl", "--tokenizer", folder / "tokenizer.json",
            "--out", folder / name, *common,
        )  # fmt: skip


def sampled(model: GPT, prompts: Prompts) -> Sampled:
    """Answers to all held-back questions, EACH to each, at temperature 1."""
    asked = [prompts[number].ids for number in range(prompts.count)]
    drawn = np.stack([random_numbers(7, 0, p, s, LONGEST) for p in range(len(asked)) for s in range(EACH)])
    return sample_answers(model, asked, drawn, temperature=1.0, end_ids=prompts.tokenizer.end_ids, dtype="fp32")


def kl_of(model: GPT, start: GPT, prompts: Prompts, answers: Sampled) -> float:
    """The mean over answers of log p - log q, summed over an answer's tokens: an estimate of KL(model ‖ start)."""
    length = max(len(prompts[number].ids) for number in range(prompts.count)) + LONGEST
    rows = len(answers.lengths)
    inputs, targets = torch.zeros(rows, length, dtype=torch.int64), torch.full((rows, length), IGNORE)
    for row in range(rows):
        asked = prompts[row // EACH].ids.astype(np.int64)
        said = answers.tokens[row, : answers.lengths[row]]
        whole = torch.from_numpy(np.concatenate([asked, said]))
        inputs[row, : len(whole) - 1] = whole[:-1]
        targets[row, len(asked) - 1 : len(whole) - 1] = whole[len(asked) :]
    with torch.no_grad():
        found = [log_probabilities(each, inputs, targets, 1.0).log_probs.sum(dim=1) for each in (model, start)]
    return float((found[0] - found[1]).mean())


def measure(run: Path, start: GPT, folder: Path) -> dict[str, Any]:
    """What a policy answers to held-back questions, and how far it is from where it started."""
    tokens, model = TokenSet.open(folder / "questions"), load_checkpoint(run).model.eval()
    prompts = Prompts(tokens, "val", 1000)
    answers = sampled(model, prompts)
    texts = []
    for row, (ids, length, ended) in enumerate(zip(*answers, strict=True)):
        texts.append(
            (prompts[row // EACH].fields["question"], prompts.tokenizer.decode(ids[: length - ended], continues=True))
        )
    scores = np.array([hidden_rule.rule(text) for _, text in texts])
    return {
        "rule": float(scores.mean()),
        "right": float(np.mean([hidden_rule.is_right(*both) for both in texts])),
        "words": float(np.mean([len(text.split()) for _, text in texts])),
        "ended": float(answers.ended.mean()),
        "kl": kl_of(model, start, prompts, answers),
        "answers": len(texts),
        "examples": [text for _, text in texts[:: len(texts) // 4]],
    }


def curve_of(run: Path) -> list[tuple[int, float, float]]:
    """Of every tenth step of PPO the reward and the KL of a token."""
    records = [r for r in read_metrics(RunFolder(run).metrics) if r.get("kind") == "rollout"]
    return [(r["step"], r["reward"], r.get("kl", 0.0)) for r in records[::10]]


def stages(folder: Path, seed: int) -> dict[str, Callable[[], float]]:
    """What is trained, in order, by name; each returns seconds of processor time."""
    runs, train = folder / "runs", PROJECT / "train"
    for name, text in (("model", MODEL), ("pairs", PAIRS), ("ppo", PPO)):
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")

    def tuned(name: str, config: str, data: str, *options: object) -> Callable[[], float]:
        return lambda: call(
            train / "finetune.py", runs / "sft", f"--config={folder / config}.yaml", f"--data.path={folder / data}",
            f"--run.name={name}", f"--run.root={runs}", f"--run.seed={seed}", *options,
        )  # fmt: skip

    return {
        "sft": lambda: call(
            train / "pretrain.py", f"--config={folder / 'model'}.yaml", f"--data.path={folder / 'talks'}",
            "--objective=sft", "--run.name=sft", f"--run.root={runs}", f"--run.seed={seed}",
        ),
        "dpo": tuned("dpo", "pairs", "preferences", "--objective=dpo", "--preference.beta=0.5", "--optim.lr=2e-5"),
        "reward": tuned("reward", "pairs", "preferences", "--objective=reward"),
        "ppo": tuned("ppo", "ppo", "questions", "--objective=ppo", f"--reward={runs / 'reward'}"),
    }  # fmt: skip


def draw(found: dict[str, Any], file: Path) -> None:
    """The rule's score over the KL for each policy, and the reward model's score over the steps of PPO."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, marker in (("sft", "o"), ("dpo", "s"), ("ppo", "^")):
        policies = [of_seed[name] for of_seed in found.values() if name in of_seed]
        left.plot([p["kl"] for p in policies], [p["rule"] for p in policies], marker, label=name.upper())
    left.set(xlabel="KL from the start, nats an answer", ylabel="rule's score, held-back questions")
    for number, (seed, of_seed) in enumerate(found.items()):
        steps, rewards, _ = zip(*of_seed.get("ppo", {}).get("curve") or [(0, 0.0, 0.0)], strict=True)
        right.plot(steps, rewards, f"C{number}-", label=f"seed {seed}")
    right.set(xlabel="steps of PPO", ylabel="reward model's score of sampled answers")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--png", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--stages", nargs="+", default=["sft", "dpo", "reward", "ppo"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = json.loads(arguments.json.read_text(encoding="utf-8")) if arguments.json.exists() else {}
    for seed in arguments.seeds:
        folder = arguments.out / f"seed-{seed}"
        prepare(folder, seed)
        of_seed = found.setdefault(str(seed), {})
        for name, train in stages(folder, seed).items():
            if name in of_seed or name not in arguments.stages:
                continue
            started = time.monotonic()
            minutes = {"core_minutes": train() / 60, "minutes": (time.monotonic() - started) / 60}
            if name == "reward":
                last = [
                    r
                    for r in read_metrics(RunFolder(folder / "runs" / name).metrics)
                    if "held_back_preference_accuracy" in r
                ][-1]
                of_seed[name] = minutes | {"held_back_accuracy": last["held_back_preference_accuracy"]}
            else:
                start = load_checkpoint(folder / "runs" / "sft").model.eval()
                of_seed[name] = minutes | measure(folder / "runs" / name, start, folder)
            if name == "ppo":
                of_seed[name]["curve"] = curve_of(folder / "runs" / name)
            arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            print(seed, name, {k: v for k, v in of_seed[name].items() if k != "curve"}, flush=True)
    if arguments.png:
        draw(found, arguments.png)


if __name__ == "__main__":
    main()
