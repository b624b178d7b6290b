"""What takes long says so: its size beforehand, how long it still takes while it runs."""

import json
import os
import re
from pathlib import Path

import pytest

from common import progress
from tests.eval.hellaswag_files import official_rows, write_official
from tests.helpers.ranks import RankGroup
from tests.helpers.token_sets import make_token_set
from tests.helpers.training import run_of, tiny_arguments, train_as_rank
from train.run.compile_seconds import keep_seconds, last_seconds


def train_as_if_slow(arguments: list[str], output: Path) -> None:
    progress.FIRST_SECONDS = progress.LINE_SECONDS = 0.0
    os.dup2(os.open(output, os.O_CREAT | os.O_WRONLY), 1)
    train_as_rank(arguments)


def test_work_between_steps_is_announced_and_shows_how_long_it_takes(tmp_path: Path) -> None:
    make_token_set(tmp_path / "data", train_tokens=2_001, val_tokens=500)
    few = ["--run.max_steps=5", "--eval.sample_every_steps=5", '--eval.prompts=["a"]', "--eval.sample_tokens=2"]
    questions = write_official(tmp_path / "some.jsonl", official_rows(3, words_at_most=1))
    few += ["--eval.hellaswag_every_steps=5", f"--eval.hellaswag_data={questions}"]
    arguments, output = tiny_arguments(tmp_path, tmp_path / "data", "told", *few), tmp_path / "output"

    assert RankGroup(1, tmp_path / "store", train_as_if_slow, arguments, output).join() == [0]

    log, terminal = run_of(tmp_path, "told").log.read_text(), output.read_text()
    for announcement in (
        "warming up: one micro-batch of 4 x 16 tokens",
        "validating at step 0: 16 sequences of 16 tokens (eval.tokens)",
        "sampling: 1 texts of 2 tokens",
    ):
        assert log.count(announcement) == terminal.count(announcement) == 1
    assert re.search(r"^warming up: [\d.]+ s so far$", terminal, re.MULTILINE)
    assert "validating at step 0: 4 of 16 sequences, " in terminal and " left\n" in terminal
    assert "validating at step 5: 16 of 16 sequences, " in terminal
    assert "4 of 16" not in log
    assert len(re.findall(r"^\S+ \S+ answering HellaSwag.*: 3 questions", log, re.MULTILINE)) == 1


def test_a_mix_on_two_ranks_is_validated_to_its_last_sequence_and_no_further(tmp_path: Path) -> None:
    for name, seed in (("web", 1), ("code", 2)):
        make_token_set(tmp_path / name, train_tokens=2_001, val_tokens=80, seed=seed)
    mix = [{"name": name, "path": str(tmp_path / name), "weight": 1} for name in ("web", "code")]
    few = ["--run.max_steps=1", f"--data.mix={json.dumps(mix)}"]
    arguments, output = tiny_arguments(tmp_path, Path("unused"), "mixed", *few), tmp_path / "output"
    arguments.remove("--data.path=unused")

    assert RankGroup(2, tmp_path / "store", train_as_if_slow, arguments, output).join() == [0, 0]

    told = re.findall(r"validating at step 0: (\d+) of (\d+) sequences", output.read_text())
    done, (total, *_) = [int(count) for count, _ in told], {int(total) for _, total in told}
    assert done == sorted(set(done)) and done[-1] == total


def test_the_seconds_of_a_compilation_are_found_again_and_damage_to_them_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "kernels"))
    assert last_seconds("a model") is None
    keep_seconds("a model", 12.5)
    assert (last_seconds("a model"), last_seconds("another")) == (12.5, None)

    (file,) = (tmp_path / "kernels" / "longhaul").iterdir()
    for damage in ("", "[]", '{"seconds": "12"}', '{"seconds": -1.0}', "{}"):
        file.write_text(damage, encoding="utf-8")
        assert last_seconds("a model") is None

    (tmp_path / "file").touch()  # no folder can be made there
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "kernels"))
    keep_seconds("a model", 12.5)
    assert last_seconds("a model") is None
