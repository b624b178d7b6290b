"""docs/after-pretraining.md goes from a base checkpoint to a chat: its commands, on a tiny base, and what they make."""

import json
import re
import shlex
from pathlib import Path

from data_prep.chat.chat_tokenizer import ChatTokenizer
from eval.shared.loading import load_checkpoint
from tests.eval.checkpoints import write_checkpoint
from tests.helpers.forked_command import run_command
from tests.helpers.training import PROJECT

SMALLER = {
    "data_prep/conversations.py": ["--workers=0", "--val-one-in=4"],
    "data_prep/preferences.py": ["--workers=0", "--val-one-in=4"],
    "data_prep/prompts.py": ["--val-one-in=4"],
    "train/finetune.py": [
        "--batch.tokens_per_step=256", "--batch.micro_batch=2", "--eval.tokens=128", "--run.max_steps=2",
        "--eval.sample_every_steps=2", "--eval.sample_tokens=4", '--eval.prompts=["2+2?"]', "--run.device=cpu",
    ],
}  # fmt: skip
FEW_ANSWERS = [
    "--rollout.prompts_per_step=2", "--rollout.samples=2", "--rollout.max_tokens=6", "--rollout.held_out_prompts=2",
    "--rollout.prompts_per_block=2", "--rollout.minibatches=1",
]  # fmt: skip


def test_every_command_of_the_page_works(tmp_path: Path) -> None:
    text = (PROJECT / "docs" / "after-pretraining.md").read_text()
    lines = "".join(re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)).splitlines()
    write_checkpoint(tmp_path / "runs" / "demo" / "checkpoints", block_size=64)
    with (tmp_path / "talks.jsonl").open("w") as file:
        for number in range(60):
            file.write(json.dumps({"prompt": f"{number}+1?", "completion": str(number + 1)}) + "\n")
    with (tmp_path / "preferences.jsonl").open("w") as file:
        for number in range(60):
            answers = {"chosen": str(number + 1), "rejected": str(number)}
            file.write(json.dumps({"prompt": f"{number}+1?"} | answers) + "\n")
    with (tmp_path / "questions.jsonl").open("w") as file:
        for number in range(60):
            file.write(json.dumps({"prompt": f"{number}+1?", "answer": str(number + 1)}) + "\n")
    (tmp_path / "rewards.py").write_text(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)[0])
    for line in lines:
        python, script, *options = shlex.split(line)
        few = (
            FEW_ANSWERS if {"grpo", "ppo"} & set(options) else ["--batch.pairs_per_step=4"] if "dpo" in options else []
        )
        assert python == "python"
        done = run_command([script, *options, *SMALLER.get(script, []), *few], tmp_path, given="Hello\n")
        assert done.status == 0, (line, done)
    for name in ("demo-talks", "demo-whole", "demo-dpo", "demo-grpo", "demo-ppo"):
        loaded = load_checkpoint(tmp_path / "runs" / name)
        assert isinstance(loaded.tokenizer, ChatTokenizer)
        assert loaded.model.config.vocab_size == 259
        assert "2+2?" in (tmp_path / "runs" / name / "samples.jsonl").read_text()
