"""lm-evaluation-harness, offline, on exported checkpoints; HellaSwag's answers beside it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import UserError
from data_prep.chat.chat_tokenizer import ChatTokenizer
from data_prep.chat.messages import USER, Message
from eval import import_hf
from eval.harness import main
from eval.shared.loading import load_checkpoint
from tests.eval.checkpoints import write_checkpoint
from tests.eval.hellaswag_files import official_rows, write_official
from tests.eval.hf_folders import call, two_id_folder
from tests.eval.test_chat import chat_spec
from tests.helpers.forked_command import run_command

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed")

TASK = """
task: hellaswag_here
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {data}}}}}
output_type: multiple_choice
validation_split: validation
process_docs: !function utils.process_docs
doc_to_text: "{{{{query}}}}"
doc_to_target: "{{{{label}}}}"
doc_to_choice: choices
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""


def write_task(folder: Path, data: Path) -> Path:
    """lm-eval's own HellaSwag, its preprocessing included, over a file here."""
    folder.mkdir()
    (folder / "here.yaml").write_text(TASK.format(data=data))
    shutil.copyfile(Path(lm_eval.__file__).parent / "tasks" / "hellaswag" / "utils.py", folder / "utils.py")
    return folder


def run(script: str, *options: object, home: Path) -> str:
    """What a command prints."""
    done = run_command([script, *options], home.parent, environment={"HF_HOME": str(home)})
    assert done.status == 0, done
    return done.out


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", ["gpt2", "llama3", "prepended"])
def test_hellaswag_answers_as_lm_eval_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: str) -> None:
    # with such a context some questions fit and some lose their beginning
    if tokenizer == "gpt2":
        checkpoint = write_checkpoint(tmp_path / "run", tokenizer="gpt2", noise=0.3, block_size=60)
    else:
        two_id_folder(tmp_path / "folder", tokenizer, block_size=150)
        checkpoint = tmp_path / "run"
        call(import_hf, monkeypatch, tmp_path / "folder", checkpoint)
    rows = [{**row, "label": int(row["label"])} for row in official_rows(40, seed=5)]  # a column has one type
    data = write_official(tmp_path / "official.jsonl", rows)
    tasks = write_task(tmp_path / "tasks", data)
    own, theirs = tmp_path / "own.json", tmp_path / "theirs.json"
    home = tmp_path / "home"
    run("eval/hellaswag.py", checkpoint, "--data", data, "--json", own, "--device=cpu", home=home)
    options = ("--tasks", "hellaswag_here", "--include-path", tasks, "--json", theirs, "--device=cpu")
    assert "hellaswag_here" in run("eval/harness.py", checkpoint, *options, home=home)
    ours, report = json.loads(own.read_text()), json.loads(theirs.read_text())
    result = report["results"]["hellaswag_here"]
    assert ours["acc_norm_chars"] == result["acc_norm,none"]
    assert ours["acc_norm_chars_stderr"] == pytest.approx(result["acc_norm_stderr,none"])
    samples = report["samples"]["hellaswag_here"]
    assert len(samples) == len(ours["predictions"]) == 40
    for row, sample, prediction in zip(rows, samples, ours["predictions"], strict=True):
        characters = [len(lm_eval_text(ending)) for ending in row["endings"]]
        assert prediction["acc_norm_chars"] == np.argmax(np.array(sample["answers"]) / characters)


def lm_eval_text(text: str) -> str:
    from lm_eval.tasks.hellaswag.utils import preprocess

    return str(preprocess(text))


@pytest.mark.slow
def test_the_lm_eval_command_runs_on_an_exported_folder(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "run", noise=0.3)
    rows = [{**row, "label": int(row["label"])} for row in official_rows(6)]
    tasks = write_task(tmp_path / "tasks", write_official(tmp_path / "official.jsonl", rows))
    home = tmp_path / "home"
    run("eval/export_hf.py", checkpoint, tmp_path / "exported", home=home)
    arguments = ["--model", "hf", "--model_args", f"pretrained={tmp_path / 'exported'}", "--device", "cpu"]
    arguments += ["--tasks", "hellaswag_here", "--include_path", str(tasks), "--output_path", str(tmp_path / "out")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "lm_eval", "run", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    (results,) = (tmp_path / "out").rglob("results_*.json")
    assert 0 <= json.loads(results.read_text())["results"]["hellaswag_here"]["acc_norm,none"] <= 1


def test_mistakes_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = write_checkpoint(tmp_path / "run", block_size=16)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    cases = {
        ("--tasks", "no_such_task"): "lm-eval has no task no_such_task",
        ("--tasks", "piqa", "--limit", "0"): "--limit is 0",
        ("--tasks", "piqa", "--include-path", str(tmp_path / "none")): "is not a folder",
    }
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, "1")  # the script sets them: put back afterwards
    for arguments, message in cases.items():
        monkeypatch.setattr(sys, "argv", ["harness.py", str(checkpoint), *arguments])
        with pytest.raises(UserError, match=message) as error:
            main()
        assert "\n" not in str(error.value)


def test_questions_are_messages_by_the_chat_template(tmp_path: Path) -> None:
    """lm-eval's log-probabilities of the endings are ours after the prompt that eval/chat.py gives the model.

    lm-eval counts white space at a context's end to the ending: here the line break before an answer, of all endings.
    """
    checkpoint = write_checkpoint(tmp_path / "run", tokenizer=chat_spec(), noise=0.3, block_size=600)
    rows = [{**row, "label": int(row["label"])} for row in official_rows(2, seed=5)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tasks = write_task(tmp_path / "tasks", tmp_path / "rows.jsonl")
    options = ("--tasks", "hellaswag_here", "--include-path", tasks, "--chat", "--json", tmp_path / "found.json")
    run("eval/harness.py", checkpoint, *options, home=tmp_path / "home")
    samples = json.loads((tmp_path / "found.json").read_text())["samples"]["hellaswag_here"]
    loaded = load_checkpoint(checkpoint)
    tokenizer = loaded.tokenizer
    assert isinstance(tokenizer, ChatTokenizer)
    for row, sample in zip(rows, samples, strict=True):
        question = lm_eval_text(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
        *prompt, line_break = tokenizer.prompt_of([Message(USER, question)])
        for ending, found in zip(row["endings"], sample["answers"], strict=True):
            answer = [line_break, *tokenizer.encode(lm_eval_text(ending)).tolist()]
            with torch.no_grad():
                logs = loaded.model(torch.tensor([prompt + answer])).log_softmax(-1)[0, len(prompt) - 1 : -1]
            expected = logs.gather(1, torch.tensor(answer)[:, None]).sum()
            assert found == pytest.approx(float(expected), rel=1e-4)
