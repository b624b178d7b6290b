"""Every architecture trains, resumes to the bit, and is in README's table."""

import re
from pathlib import Path

import pytest

from tests.helpers.token_sets import make_token_set
from tests.helpers.training import PROJECT, curve, losses, run_of, tiny_arguments, train

OVERLAYS = sorted((PROJECT / "train" / "configs" / "architectures").glob("*.yaml"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_token_set(folder, train_tokens=5_000, val_tokens=500)
    return folder


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.stem)
def test_it_trains_samples_and_resumes_to_the_bit(tmp_path: Path, data: Path, overlay: Path) -> None:
    more = (
        "--eval.sample_every_steps=8",
        '--eval.prompts=["ab"]',
        "--eval.sample_tokens=4",
        "--schedule.kind=constant",
    )
    for name, max_steps in (("calm", 8), ("halved", 4), ("halved", 8)):
        arguments = tiny_arguments(tmp_path, data, name, f"--config={overlay}", f"--run.max_steps={max_steps}", *more)
        train(1, tmp_path, ["--checkpoint.every_steps=4", *arguments])
    calm = losses(run_of(tmp_path, "calm"))
    assert calm[8] < calm[1] - 0.1
    halved = [row for row in curve(run_of(tmp_path, "halved")) if row[1] != "None"]
    assert halved == [row for row in curve(run_of(tmp_path, "calm")) if row[1] != "None"]


def test_readme_has_a_row_for_each() -> None:
    rows = re.findall(
        r"^\| .*`--config train/configs/architectures/(\S+)\.yaml`", (PROJECT / "README.md").read_text(), re.M
    )
    assert sorted(rows) == sorted(path.stem for path in OVERLAYS)
