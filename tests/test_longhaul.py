"""`import longhaul` from any folder, after `pip install -e .`: a run's weights, losses and texts in three lines."""

import json
import math
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest

import longhaul
from common.errors import UserError
from tests.eval.checkpoints import write_checkpoint

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
