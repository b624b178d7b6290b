"""`import longhaul` from any folder, after `pip install -e .`: a run's weights, losses and texts in three lines."""

import json
import math
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import longhaul
from common.errors import UserError
from data_prep.chat.messages import Message
from eval.generation.conversation import Chat
from eval.generation.options import Sampling
from eval.reward_task.scoring import judged_ids
from eval.shared.loading import load_checkpoint
from tests.eval.checkpoints import write_checkpoint
from tests.helpers.conversation_sets import short_tokenizer

PROJECT = Path(__file__).resolve().parents[1]
TEXT = "The quick brown fox jumps over the lazy dog, again and again and again. " * 4
THREE_LINES = """
import sys, longhaul
assert "torch" not in sys.modules
model = longhaul.load(sys.argv[1])
print([model.loss(sys.argv[2]), model.generate("The", max_tokens=3), longhaul.__file__])
"""


def test_losses_are_those_of_the_model_and_texts_repeat(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "run")
    model = longhaul.load(str(checkpoint))
    losses = model.losses(TEXT)

    assert losses.shape == (len(model.tokenizer.prompt(TEXT)) - 1,), "sequences share a token, so none is left out"
    assert len(losses) > model.gpt.config.block_size
    assert model.loss(TEXT) == pytest.approx(losses.mean(), rel=1e-6)
    assert abs(model.loss(TEXT) - math.log(model.gpt.config.vocab_size)) < 1.0, "nobody has trained it"
    assert np.allclose(longhaul.load(checkpoint, dtype="bf16").losses(TEXT), losses, atol=0.1)
    texts = [model.generate("The", max_tokens=40, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_conversations_are_answered_and_scored_as_the_commands_do(tmp_path: Path) -> None:
    """The answer is eval/chat.py's, the score eval/reward.py's."""
    tokenizer = short_tokenizer()
    options: dict[str, Any] = {"tokenizer": tokenizer.spec, "block_size": 64, "noise": 0.3}
    asked = [{"role": "system", "content": "s"}, {"role": "user", "content": "2+2?"}]
    turns = [Message(entry["role"], entry["content"]) for entry in (*asked, {"role": "assistant", "content": "4"})]
    path = write_checkpoint(tmp_path / "chat", **options)

    model, chat = longhaul.load(path), Chat(load_checkpoint(path), Sampling(temperature=0), 8, 0, "s")
    assert model.answer(asked, temperature=0, max_tokens=8) == "".join(chat.answer("2+2?"))
    assert model.answer("2+2?", seed=3) == model.answer(asked[1:], seed=3) != model.answer(asked[1:], seed=4)

    judge = longhaul.load(write_checkpoint(tmp_path / "judge", **options, scalar_head=True))
    ids = torch.tensor([judged_ids(tokenizer, turns)])
    with torch.no_grad():
        expected = judge.gpt(ids, values=True)[0, -1].item()
    assert judge.score([*asked, {"role": "assistant", "content": "4"}]) == pytest.approx(expected, abs=1e-6) != 0

    plain = longhaul.load(write_checkpoint(tmp_path / "plain"))
    for mistake, words in (
        (lambda: plain.answer("a"), "has no chat template"),
        (lambda: plain.score(asked), "is no reward model"),
        (lambda: judge.score(asked), "is of the role user"),
        (lambda: model.answer("a" * 99), "shorten it"),
        (lambda: model.answer([{"role": "poet", "content": "a"}]), "a role other than"),
    ):
        with pytest.raises(UserError, match=words) as told:
            mistake()
        assert "\n" not in str(told.value)


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        longhaul.load(str(tmp_path / "none"))
    with pytest.raises(UserError, match="is not a run's folder"):
        longhaul.metrics(str(tmp_path))


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python that sees this one's packages, into which a copy of the project was installed with `pip install -e`."""
    folder = tmp_path_factory.mktemp("installed")
    copy, environment = folder / "clone", folder / "environment"
    shutil.copytree(
        PROJECT, copy, ignore=shutil.ignore_patterns(".*", "data", "runs", "records", "tests", "__pycache__")
    )
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    packages = next((environment / "lib").glob("python*")) / "site-packages"
    (packages / "these.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = environment / "bin" / "python"
    done = subprocess.run(
        [python, "-m", "pip", "install", "--no-index", "--no-deps", "--no-build-isolation", "-e", str(copy)],
        capture_output=True, text=True, env=os.environ | {"PIP_CONFIG_FILE": os.devnull},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return python


def test_three_lines_do_in_another_folder_after_an_editable_install(installed: Path, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "run")
    done = subprocess.run(
        [installed, "-c", THREE_LINES, str(checkpoint), TEXT], cwd=tmp_path, capture_output=True, text=True
    )

    assert done.returncode == 0, done.stderr
    assert str(installed.parents[2] / "clone" / "longhaul.py") in done.stdout
    about = subprocess.run(
        [installed, "-c", "import importlib.metadata as m, json; print(json.dumps(m.metadata('longhaul').json))"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    found = json.loads(about.stdout)
    assert found["version"] == longhaul.__version__
    assert any(requirement.startswith("torch") for requirement in found["requires_dist"])
