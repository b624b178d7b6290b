"""eval/reward.py scores conversations and pairs at their last answer's end, by length, alone as beside others."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import UserError
from data_prep.chat.messages import ASSISTANT, USER, Message
from eval import reward
from eval.shared.loading import load_checkpoint
from tests.eval.checkpoints import write_checkpoint
from tests.helpers.conversation_sets import short_tokenizer

RECORDS = [
    {"prompt": "1+1?", "completion": "2"},
    {"messages": [{"role": (USER, ASSISTANT)[n % 2], "content": c} for n, c in enumerate(("a", "b", "c", "dd"))]},
    {"prompt": "2+2?", "chosen": "4", "rejected": "no idea at all"},
    {"prompt": "what", "chosen": "same", "rejected": "same"},
    {"prompt": "what", "completion": "x" * 90},
    {"text": "nothing"},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = short_tokenizer().spec
    return write_checkpoint(tmp_path_factory.mktemp("m"), tokenizer=spec, block_size=64, noise=0.3, scalar_head=True)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["reward.py", *arguments, "--device=cpu"])
    assert reward.main() == 0


def test_scores_are_those_of_each_conversation_alone(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "some.jsonl", tmp_path / "scores.json"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    run(monkeypatch, str(model), str(path), f"--json={out}", "--micro-batch=3")
    found, told = json.loads(out.read_text()), capsys.readouterr().out
    loaded, tokenizer = load_checkpoint(model), short_tokenizer()

    def alone(*contents: str) -> float:
        turns = [Message((USER, ASSISTANT)[n % 2], content) for n, content in enumerate(contents)]
        ids = tokenizer.prompt_of(turns[:-1]) + tokenizer.encode(contents[-1], continues=True).tolist()
        ids.append(tokenizer.special_spellings["<|end|>"])
        with torch.no_grad():
            return float(loaded.model(torch.tensor([ids]), values=True)[0, -1])

    wanted = [[alone("1+1?", "2")], [alone("a", "b", "c", "dd")], [alone("2+2?", "4"), alone("2+2?", "no idea at all")]]
    assert found["lines"] == [1, 2, 3]
    for got, want in zip(found["scores"], wanted, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)
    assert found["accuracy"] == float(wanted[2][0] > wanted[2][1])
    assert "1 pairs, the chosen answer higher in" in told and "line 3:" in told
    for why in ("chosen and rejected are the same answer", "more than the model's 64 tokens", "no messages"):
        assert f"left out 1 records: {why}" in told


def test_other_models_and_bad_files_are_one_line(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "some.jsonl"
    path.write_text(json.dumps(RECORDS[0]) + "\n")
    plain = write_checkpoint(tmp_path / "plain", tokenizer=short_tokenizer().spec)
    with pytest.raises(UserError, match="is no reward model"):
        run(monkeypatch, str(plain), str(path))
    path.write_text("{\n")
    with pytest.raises(UserError, match="line 1"):
        run(monkeypatch, str(model), str(path))
    path.write_text('{"text": "a"}\n')
    with pytest.raises(UserError, match="no conversation to score"):
        run(monkeypatch, str(model), str(path))
