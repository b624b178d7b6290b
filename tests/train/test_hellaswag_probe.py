"""HellaSwag during training: what is recorded is what the finished model scores, and nothing else changes."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.checkpoint_files import list_checkpoints
from common.errors import UserError
from common.metrics_file import read_metrics
from eval.hellaswag_task.examples import evenly_spaced, read_hellaswag
from eval.hellaswag_task.metrics import accuracy, choose_all, choose_by_token, plain_question
from eval.hellaswag_task.multiple_choice import Question
from eval.hellaswag_task.own_examples import read_own_examples
from eval.reporting.key_figures import key_figures
from eval.reporting.run_data import load_run
from eval.shared.loading import load_checkpoint
from model.ranks import start_ranks
from tests.eval.hellaswag_files import official_rows, write_official
from tests.helpers.token_sets import make_token_set
from tests.helpers.training import curve, run_of, tiny_arguments, train, train_by_path, weights_hashes
from train.settings.sections import EvalConfig


def test_the_curve_is_the_same_to_the_bit_with_and_without(tmp_path: Path) -> None:
    make_token_set(tmp_path / "data", train_tokens=5_000, val_tokens=500)
    file = write_official(tmp_path / "official.jsonl", official_rows(40, words_at_most=1))
    own = tmp_path / "own.jsonl"  # the same questions
    rows = [{"context": e.context, "endings": e.endings, "label": e.label} for e in read_hellaswag(file).examples]
    own.write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    wish = ["--eval.hellaswag_every_steps=2", "--eval.hellaswag_examples=37", f"--eval.hellaswag_data={file}"]
    wish += ["--eval.choices_every_steps=3", "--eval.choices_examples=37", f'--eval.choices={{"own": "{own}"}}']
    for name, more in (("without", []), ("with", [*wish, "--eval.sample_every_steps=3", '--eval.prompts=["ab"]'])):
        train(2, tmp_path, tiny_arguments(tmp_path, tmp_path / "data", name, "--run.max_steps=7", *more))
    assert curve(run_of(tmp_path, "with")) == curve(run_of(tmp_path, "without"))
    newest = [list_checkpoints(run_of(tmp_path, name).checkpoints)[0][1] for name in ("with", "without")]
    assert weights_hashes(newest[0]) == weights_hashes(newest[1])

    found = [r for r in read_metrics(run_of(tmp_path, "with").metrics) if "hellaswag_acc_norm" in r]
    assert [record["step"] for record in found] == [2, 4, 6, 7]  # the last step always
    data, loaded = read_hellaswag(file), load_checkpoint(newest[0])
    examples = evenly_spaced(data.examples, 37)
    choices = choose_all(loaded.model, examples, loaded.tokenizer, start_ranks("cpu"))
    expected = accuracy(choices["acc_norm"], examples)
    assert found[-1]["hellaswag_acc_norm"] == expected.value
    assert found[-1]["hellaswag_acc_norm_stderr"] == expected.standard_error
    questions = [plain_question(example, loaded.tokenizer) for example in examples]
    nats = size = 0.0
    for example, question in zip(examples, questions, strict=True):
        ending = question.endings[example.label]
        with torch.no_grad():
            ids = torch.tensor([(*question.context, *ending)[-17:]])  # as much as the model can see
            losses = loaded.model(ids[:, :-1], ids[:, 1:], reduction="none")[0]
        nats += losses[-len(ending) :].sum().item()
        size += len(f" {example.endings[example.label]}".encode())
    assert found[-1]["hellaswag_bits_per_byte"] == pytest.approx(nats / size / math.log(2), abs=1e-5)
    assert found[-1]["hellaswag_examples"] == 37
    assert found[-1]["hellaswag_sha256"] == data.sha256
    assert found[-1]["hellaswag_official"]
    assert f"acc_norm {expected.value:.4f}" in run_of(tmp_path, "with").log.read_text()
    run = load_run(run_of(tmp_path, "with").path)
    assert run.table.curves.get("hellaswag_bits_per_byte") is not None
    # one's own file of the same questions gives the same
    answers = [r for r in read_metrics(run.folder.metrics) if r.get("kind") == "choices"]
    assert [record["step"] for record in answers] == [3, 6, 7]
    for figure in ("acc_norm", "acc_norm_stderr", "bits_per_byte", "examples"):
        assert answers[-1][f"own_{figure}"] == found[-1][f"hellaswag_{figure}"]
    outcome = key_figures(run).evaluations["own_acc_norm"]
    assert (outcome.step, outcome.label) == (7, "own")


def test_a_missing_file_is_told_before_anything_begins(tmp_path: Path) -> None:
    make_token_set(tmp_path / "data", train_tokens=2_000, val_tokens=500)
    arguments = tiny_arguments(tmp_path, tmp_path / "data", "a", "--eval.hellaswag_every_steps=2")
    done = train_by_path(*arguments, LONGHAUL_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 2, done.stderr
    assert "python data_prep/prepare_offline.py" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_endings_too_long_for_the_model_are_left_out_and_told_before_the_first_step(tmp_path: Path) -> None:
    """Unless all are."""
    make_token_set(tmp_path / "data", train_tokens=2_000, val_tokens=500)
    rows = official_rows(8)
    few = write_official(
        tmp_path / "few.jsonl", [{**row, "endings": ["no", "is", "on", "3"]} for row in rows[:3]] + rows
    )
    none = write_official(tmp_path / "none.jsonl", rows)
    wish = ["--eval.hellaswag_every_steps=2", f"--eval.hellaswag_data={few}"]
    train(1, tmp_path, tiny_arguments(tmp_path, tmp_path / "data", "few", "--run.max_steps=2", *wish))
    run = run_of(tmp_path, "few")
    (found,) = (record for record in read_metrics(run.metrics) if "hellaswag_acc_norm" in record)
    assert found["hellaswag_examples"] == 3
    assert "HellaSwag: 8 of 11 examples (72.7 %) are left out" in run.log.read_text().partition("step 1/2")[0]

    done = train_by_path(*tiny_arguments(tmp_path, tmp_path / "data", "none", *wish, f"--eval.hellaswag_data={none}"))
    assert done.returncode == 2, done.stderr
    assert "more than the model's context of 16" in done.stderr.splitlines()[-1]
    assert not [record for record in read_metrics(run_of(tmp_path, "none").metrics) if "loss" in record]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"context": "a", "endings": ["b"], "label": 0}', r"line 2 is no question \(1 endings and the label 0\)"),
        ('{"context": "a", "endings": ["b", "c"], "label": 2}', r"line 2 is no question \(2 endings and the label 2\)"),
        ('{"context": "a", "endings": ["b", ""], "label": 0}', r"line 2 is no question \(ending 1 is empty\)"),
        ('{"context": "a", "endings": "bc", "label": 0}', r"line 2 is no question \(endings: "),
        ("a,b,c", "line 2 is no question"),
    ],
)
def test_a_line_that_is_no_question_is_named(tmp_path: Path, line: str, words: str) -> None:
    file = tmp_path / "own.jsonl"
    file.write_text('{"context": "a", "endings": ["b", "c", "d"], "label": 2}\n' + line + "\n")
    with pytest.raises(UserError, match=words):
        read_own_examples(file)
    file.write_text("\n")
    with pytest.raises(UserError, match="holds no question"):
        read_own_examples(file)
    with pytest.raises(UserError, match="can't be read"):
        read_own_examples(tmp_path)


def test_questions_may_have_different_numbers_of_endings() -> None:
    questions = [Question((1,), ((2, 3), (4,))), Question((1,), ((2,), (3, 4), (5,)))]
    scores = np.array([[-3.0, -2.0, 0.0], [-4.0, -5.0, -3.0]])
    assert choose_by_token(scores, questions).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"choices": {"val": "a"}}, "other than val and hellaswag"),
        ({"choices": {"Sums": "a"}}, "lower-case"),
        ({"choices_every_steps": 2}, r"eval\.choices is empty"),
    ],
)
def test_names_of_files_are_checked(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        EvalConfig(**options)
