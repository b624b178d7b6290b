"""Every architecture and every pair of options trains, resumes to the bit, writes, and is exported or refused."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from eval import export_hf
from eval.hugging_face.hf_config import home_of
from tests.helpers.token_sets import make_token_set
from tests.helpers.training import PROJECT, curve, losses, run_of, tiny_arguments, train
from tests.model.small import option_id, pairwise_options, small_config

OVERLAYS = sorted((PROJECT / "train" / "configs" / "architectures").glob("*.yaml"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_token_set(folder, train_tokens=5_000, val_tokens=500)
    return folder


def check_it_trains_samples_and_resumes_to_the_bit(folder: Path, data: Path, options: list[str]) -> None:
    """A run `calm` of 8 steps, and one `halved` that stopped after 4 and went on."""
    more = (
        "--eval.sample_every_steps=8",
        '--eval.prompts=["ab"]',
        "--eval.sample_tokens=4",
        "--schedule.kind=constant",
    )
    for name, max_steps in (("calm", 8), ("halved", 4), ("halved", 8)):
        arguments = tiny_arguments(folder, data, name, *options, f"--run.max_steps={max_steps}", *more)
        train(1, folder, ["--checkpoint.every_steps=4", *arguments])
    calm = losses(run_of(folder, "calm"))
    assert calm[8] < calm[1] - 0.1
    halved = [row for row in curve(run_of(folder, "halved")) if row[1] != "None"]
    assert halved == [row for row in curve(run_of(folder, "calm")) if row[1] != "None"]
    assert run_of(folder, "calm").samples.read_text().count("\n") == 1


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.stem)
def test_it_trains_samples_and_resumes_to_the_bit(tmp_path: Path, data: Path, overlay: Path) -> None:
    check_it_trains_samples_and_resumes_to_the_bit(tmp_path, data, [f"--config={overlay}"])


def has_a_home(options: dict[str, Any]) -> bool:
    """Whether a class of `transformers` computes such a model."""
    try:
        return bool(home_of(small_config(**options)))
    except UserError:
        return False


@pytest.mark.parametrize("options", pairwise_options(), ids=option_id)
def test_every_pair_of_options_goes_all_the_way(
    tmp_path: Path, data: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    given = [f"--model.{name}={str(value).lower()}" for name, value in options.items() if value is not None]
    check_it_trains_samples_and_resumes_to_the_bit(tmp_path, data, ["--model.n_head=4", "--model.n_layer=2", *given])
    monkeypatch.setattr(sys, "argv", ["export", str(run_of(tmp_path, "calm").path), str(tmp_path / "out")])
    if has_a_home(options):
        assert export_hf.main() == 0  # which compares logits with transformers' own
    else:
        with pytest.raises(UserError, match=r"^[^\n]+$"):
            export_hf.main()
        assert not (tmp_path / "out").exists()


def test_its_page_has_a_row_for_each() -> None:
    rows = re.findall(
        r"^\| .*`--config train/configs/architectures/(\S+)\.yaml`",
        (PROJECT / "docs" / "architectures.md").read_text(),
        re.M,
    )
    assert sorted(rows) == sorted(path.stem for path in OVERLAYS)
