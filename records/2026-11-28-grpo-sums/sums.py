"""GRPO on sums of two numbers below 100, from a reward that is 1 for the right answer and 0 otherwise.

    .venv/bin/python records/2026-11-28-grpo-sums/sums.py --out /tmp/sums --json /tmp/sums.json --png /tmp/sums.png

For each of three seeds a model learns sums by supervised fine-tuning from random weights, stopped early; then GRPO
continues from there. One unordered pair of numbers in eight, by a hash, is in neither. Given again, the command
continues.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from common.metrics_file import read_metrics
from common.run_folder import RunFolder
from common.seeds import seed_of
from data_prep.chat.chat_tokenizer import ChatTokenizer
from data_prep.chat.messages import ASSISTANT, USER, Message
from data_prep.chat.template import Template
from data_prep.corpora.preparation import finish_set
from data_prep.token_sets.manifest import marks_of
from data_prep.token_sets.marked_writer import MarkedWriter, with_marks
from data_prep.tokenization.tokenizer import CharTokenizer

PROJECT = Path(__file__).resolve().parents[2]
REWARD = f"{Path(__file__).resolve().parent / 'rewards.py'}:exact_answer"
BELOW, HELD_BACK_ONE_IN, SEEDS = 100, 8, (1, 2, 3)
SFT = """
model: {block_size: 32, n_layer: 4, n_head: 4, n_embd: 128}
optim: {lr: 1.0e-3, weight_decay: 0.01}
schedule: {kind: constant, warmup: 50}
batch: {tokens_per_step: 4096, micro_batch: 128}
checkpoint: {every_steps: 0, keep_best: false}
eval: {every_steps: 500, tokens: 8192, prompts: []}
run: {dtype: bf16, device: cpu, compile: false}
"""
GRPO = """
model: {dropout: 0.0}
lora: {rank: 0}
optim: {lr: 1.0e-4, weight_decay: 0.0, beta2: 0.99}
schedule: {kind: wsd, warmup: 20, decay: 0.7, final_lr_fraction: 0.0}
batch: {micro_batch: 256}
rollout: {prompts_per_step: 32, samples: 8, max_tokens: 5, prompts_per_block: 32, kl: 0.0, held_out_prompts: 625}
checkpoint: {every_steps: 600, keep_best: false}
eval: {every_steps: 100, tokens: 8192, prompts: [], sample_every_steps: 100}
run: {dtype: bf16, device: cpu, compile: false}
"""
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ ('<|user|>' if message['role'] == 'user' else '<|bot|>') + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|bot|>' }}{% endif %}"
)


def held_back(a: int, b: int) -> bool:
    return seed_of(f"{min(a, b)} and {max(a, b)}") % HELD_BACK_ONE_IN == 0


def make_set(folder: Path) -> None:
    """All sums in either order, those of the held-back pairs as the validation split."""
    folder.mkdir(parents=True)
    tokenizer = ChatTokenizer.of(CharTokenizer("0123456789+", end_of_text=True), Template(TEMPLATE))
    pairs = [(a, b) for a in range(BELOW) for b in range(BELOW)]
    splits: dict[str, Any] = {}
    for split in ("train", "val"):
        chosen = sorted((p for p in pairs if held_back(*p) is (split == "val")), key=lambda p: seed_of(f"order {p}"))
        with MarkedWriter(folder, split, tokenizer, 1_000_000) as writer:
            for a, b in chosen:
                rendered = tokenizer.render([Message(USER, f"{a}+{b}"), Message(ASSISTANT, str(a + b))])
                writer.write(with_marks(rendered.ids, rendered.counted))
        splits |= {split: tuple(writer.shards), marks_of(split): tuple(writer.marks)}
    finish_set(folder, tokenizer, {"name": "sums below 100"}, [], splits, marked=True)


def call(*command: object) -> float:
    """Run one of the project's commands; seconds of processor time."""
    before = os.times()
    subprocess.run([sys.executable, *map(str, command)], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    after = os.times()
    return sum(after[2:4]) - sum(before[2:4])


def curves(run: Path) -> dict[str, Any]:
    """Of every validation the step and the exact share of held-back sums; of every 20th step the sampled reward."""
    records = read_metrics(RunFolder(run).metrics)
    held = [(r["step"], r["held_out_reward"]) for r in records if r.get("kind") == "held_out_reward"]
    rollouts = [r for r in records if r.get("kind") == "rollout"]
    kept = ("step", "reward", "kl", "entropy", "cut_share", "equal_groups", "clip_share", "repetition", "answer_length")
    trained = [r for r in records if "grad_norm" in r]
    return {
        "held_out": held,
        "rollouts": [{key: r[key] for key in kept if key in r} for r in rollouts[::20]],
        "generation_tokens_per_second": sum(r["generation_tokens_per_second"] for r in rollouts) / len(rollouts),
        "training_tokens_per_second": sum(r["training_tokens_per_second"] for r in rollouts) / len(rollouts),
        "rollout_seconds": sum(r["rollout_seconds"] for r in rollouts),
        "step_seconds": sum(r["step_seconds"] for r in trained),
    }


def draw(result: dict[str, Any], file: Path) -> None:
    """Exact shares over steps, of held-back sums answered greedily and of those sampled in training."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for number, (seed, found) in enumerate(result["seeds"].items()):
        steps, shares = zip(*found["held_out"], strict=True)
        axes.plot(steps, shares, f"C{number}-o", markersize=3, label=f"seed {seed}, held back, greedy")
        rollouts = found["rollouts"]
        axes.plot([r["step"] for r in rollouts], [r["reward"] for r in rollouts], f"C{number}:", alpha=0.6)
    axes.set(xlabel="steps of GRPO", ylabel="exact answers", ylim=(0, 1), title="GRPO on sums of two numbers below 100")
    axes.plot([], [], "k:", alpha=0.6, label="sampled in training")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--png", type=Path)
    parser.add_argument("--sft-steps", type=int, default=260)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--option", action="append", default=[], help="a further option of GRPO")
    arguments = parser.parse_args()
    out: Path = arguments.out
    runs = out / "runs"
    if not (out / "sums" / "manifest.json").exists():
        make_set(out / "sums")
    (out / "sft.yaml").write_text(SFT, encoding="utf-8")
    (out / "grpo.yaml").write_text(GRPO, encoding="utf-8")
    result: dict[str, Any] = {"sft_steps": arguments.sft_steps, "steps": arguments.steps, "seeds": {}}
    if arguments.json.exists():
        result = json.loads(arguments.json.read_text(encoding="utf-8"))
    common = [f"--data.path={out / 'sums'}", f"--run.root={runs}"]
    for seed in arguments.seeds:
        if str(seed) in result["seeds"]:
            continue
        own = [*common, f"--run.seed={seed}"]
        sft = call(
            PROJECT / "train" / "pretrain.py", f"--config={out / 'sft.yaml'}", "--objective=sft",
            f"--run.name=sft-{seed}", f"--run.max_steps={arguments.sft_steps}", *own,
        )  # fmt: skip
        started = time.monotonic()
        seconds = call(
            PROJECT / "train" / "finetune.py", runs / f"sft-{seed}", f"--config={out / 'grpo.yaml'}",
            "--objective=grpo", "--reward", REWARD, f"--run.name=grpo-{seed}", f"--run.max_steps={arguments.steps}",
            *own, *arguments.option,
        )  # fmt: skip
        minutes = (time.monotonic() - started) / 60
        found = {"sft_core_minutes": sft / 60, "core_minutes": seconds / 60, "minutes": minutes}
        result["seeds"][str(seed)] = found | curves(runs / f"grpo-{seed}")
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(seed, found, result["seeds"][str(seed)]["held_out"], flush=True)
    if arguments.png:
        draw(result, arguments.png)


if __name__ == "__main__":
    main()
