"""Sets of prompts with further fields: made, read back by number, verified, refused where they can't be used."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from common.errors import UserError
from data_prep.token_sets.packing import IGNORE
from data_prep.token_sets.token_set import TokenSet
from tests.helpers.training import PROJECT
from train.batches.prompts import PromptOrder, Prompts, PromptSequences
from train.settings.command_line import read_config
from train.startup.fit_to_data import fit_to_data


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(PROJECT / "data_prep" / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prompts")
    records: list[object] = [
        {"prompt": f"{n}+1?", "answer": str(n + 1), "level": {"ä": n}, "prompt_of": "x\ny"} for n in range(90)
    ]
    records += [{"messages": [{"role": "user", "content": f"n{n}"}, {"role": "assistant", "content": "yes"}]} for n in range(9)]  # fmt: skip  # noqa: E501
    records += [{"prompt": ""}, {"text": "no prompt"}, {"prompt": "x" * 200}]
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    asked = (path, "--tokenizer=byte", "--out", folder / "set", "--val-one-in=4", "--longest=100", "--shard-tokens=500")
    done = run("prompts.py", *asked)
    assert done.returncode == 0, done.stderr
    assert "1 prompts: an empty turn" in done.stdout and "more than 100 tokens" in done.stdout
    assert "complete already" in run("prompts.py", *asked).stdout
    assert "made of other prompts or otherwise" in run("prompts.py", *asked, "--longest=99").stderr
    return folder / "set"


def test_prompts_and_fields_are_read_back_by_their_numbers(made: Path) -> None:
    assert "all is well" in run("verify.py", made).stdout
    tokens = TokenSet.open(made, verify="full")
    seen = {}
    for split in ("train", "val"):
        prompts = Prompts(tokens, split, 100)
        for number in range(prompts.count):
            prompt = prompts[number]
            question = prompt.text.split("<|im_start|>user\n")[1].split("<|im_end|>")[0]
            assert prompt.text.endswith("<|im_start|>assistant\n")
            seen[question] = prompt.fields
    assert len(seen) == 99
    assert seen["7+1?"] == {"answer": "8", "level": {"ä": 7}, "prompt_of": "x\ny"}
    assert seen["n3"] == {"answer": "yes"}
    shorter = Prompts(tokens, "train", len(Prompts(tokens, "train", 100)[0].ids))
    assert shorter.left_out and all(f"{shorter[n].fields.get('answer')}" for n in range(shorter.count))
    with pytest.raises(UserError, match="have more than 3 tokens"):
        Prompts(tokens, "train", 3)
    config, _ = read_config([f"--data.path={made}", "--objective=sft"])
    with pytest.raises(UserError, match="holds prompts without answers"):
        fit_to_data(config, tokens)


def test_a_step_has_whole_groups_and_an_epoch_every_prompt_once(made: Path) -> None:
    prompts = Prompts(TokenSet.open(made), "train", 100)
    order, sequences = PromptOrder(prompts.count, 3, seed=1), PromptSequences(prompts, 128, 3)
    numbers = order.numbers(0, 3 * prompts.count)
    assert sorted(numbers.tolist()) == list(range(sequences.count))
    assert (numbers.reshape(-1, 3) == numbers[::3, None] + np.arange(3)).all()
    np.testing.assert_array_equal(np.concatenate([order.numbers(0, 6), order.numbers(6, 3)]), order.numbers(0, 9))
    assert (order.numbers(3 * prompts.count, 9) != numbers[:9]).any()
    rows = sequences.rows(numbers[:2])
    ids = prompts[int(numbers[0]) // 3].ids
    assert rows.inputs[0, : len(ids)].tolist() == ids.tolist() and (rows.inputs[0, len(ids) :] == 0).all()
    assert (rows.targets == IGNORE).all() and (rows.inputs[0] == rows.inputs[1]).all()


def test_a_damaged_field_is_found(made: Path, tmp_path: Path) -> None:
    import shutil

    copy = Path(shutil.copytree(made, tmp_path / "copy"))
    path = sorted(copy.glob("train-fields-*.bin"))[0]
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)
    assert "SHA-256" in run("verify.py", copy).stdout
    with pytest.raises(UserError, match="is not what was written"):
        TokenSet.open(copy, verify="full")
