"""Every command in docs/evaluation.md is run, in its order, on a tiny run."""

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from common.metrics_file import read_metrics
from tests.eval.hellaswag_files import official_rows, write_official
from tests.helpers.forked_command import run_command
from tests.helpers.token_sets import make_token_set
from tests.helpers.training import PROJECT, run_of, tiny_arguments, train
from train.settings.sections import EvalConfig

DOCUMENT = PROJECT / "docs" / "evaluation.md"
SMALLER = {
    "eval/benchmarks/bench_hellaswag.py": ["--run", "runs/demo", "--limit", "3"],
    "train/pretrain.py": ["--run.max_steps=3", "--run.device=cpu", "--model.block_size=128", "--batch.micro_batch=4"],
}


def commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", DOCUMENT.read_text(), flags=re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line]


def prepare(folder: Path) -> None:
    """What the commands expect to be there."""
    for name in ("demo", "docstrings"):  # of the demo, and of smoke.yaml
        make_token_set(folder / "data" / name, train_tokens=5_000, val_tokens=1_000)
    train(
        1,
        folder,
        tiny_arguments(
            folder,
            folder / "data" / "demo",
            "demo",
            "--model.block_size=128",
            "--run.max_steps=2",
            "--checkpoint.every_steps=1",
        ),
    )
    write_official(folder / "hellaswag_val.jsonl", official_rows(5, words_at_most=6))
    (folder / "tasks").mkdir()
    choices, task = re.findall(r"```yaml\n(.*?)```", DOCUMENT.read_text(), flags=re.DOTALL)
    (folder / "tasks" / "my_task.yaml").write_text(task)
    assert EvalConfig(**yaml.safe_load(choices)["eval"]).choices_every_steps == 500
    questions = [{"question": "one and one is", "choices": ["two", "ten"], "label": 0} for _ in range(3)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))


@pytest.mark.slow
def test_every_command_of_the_evaluation_page_works(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    prepare(tmp_path)
    found = commands()
    assert len(found) >= 7
    for line in found:
        program, *options = shlex.split(line)
        assert program == "python"
        script = [option for option in options if option.endswith(".py")][-1]  # train/launch.py comes before it
        ours = [word for word in options if word.endswith(".py") or word.startswith("train/configs/")]
        options = [str(PROJECT / word) if word in ours else word for word in options]
        home = {"HF_HOME": str(tmp_path / "hf")}
        done = run_command([*options, *SMALLER.get(script, [])], tmp_path, environment=home)
        assert done.status == 0, (line, done)
    for name in ("perplexity.json", "hellaswag.json", "harness.json"):
        assert json.loads((tmp_path / name).read_text())
    recorded = read_metrics(run_of(tmp_path, "smoke").metrics)
    assert [record["step"] for record in recorded if "hellaswag_acc_norm" in record] == [3]
