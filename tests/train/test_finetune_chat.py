"""A base learns the tokens around turns: rows for new ids, trained beside adapters or with all weights, to the bit."""

import shutil
from pathlib import Path

import pytest
import torch

from common.checkpoint_files import list_checkpoints, read_checkpoint_manifest
from data_prep.chat.chat_tokenizer import ChatTokenizer
from data_prep.chat.template import read_template
from data_prep.tokenization.loading import load_tokenizer
from eval.shared.loading import load_checkpoint
from model.weights import load_model, read_tensors
from tests.eval.checkpoints import write_checkpoint
from tests.helpers.token_sets import make_token_set
from tests.helpers.training import curve, losses, run_of, weights_hashes
from tests.train.test_finetune import arguments, finetune, refusal, start

CHAT = ChatTokenizer.of(load_tokenizer("byte"), read_template("chatml"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_token_set(folder, train_tokens=5_000, val_tokens=500, tokenizer=CHAT)
    return folder


@pytest.mark.parametrize(
    ("world_size", "rank", "options"),
    [(2, 2, {"tie_weights": False}), (1, 2, {}), (1, 0, {"vocab_multiple": 1})],
    ids=["untied", "tied", "all weights"],
)
def test_rows_of_new_ids_are_trained_saved_and_resumed_to_the_bit(
    tmp_path: Path, data: Path, world_size: int, rank: int, options: dict[str, object]
) -> None:
    base = write_checkpoint(tmp_path / "base", block_size=16, dropout=0.1, **options)
    more = ("--checkpoint.every_steps=2", "--run.max_steps=6", f"--lora.rank={rank}")
    finetune(world_size, tmp_path, arguments(base, tmp_path, data, "calm", *more))
    calm, killed = run_of(tmp_path, "calm"), run_of(tmp_path, "killed")
    group = start(world_size, tmp_path, arguments(base, tmp_path, data, "killed", *more))
    while not list_checkpoints(killed.checkpoints):
        assert group.processes[0].is_alive(), "the run ended before it could be killed"
    group.kill()
    before = load_model(base)
    shutil.rmtree(base)
    finetune(world_size, tmp_path, arguments(base, tmp_path, data, "killed", *more))
    assert curve(killed) == curve(calm)
    newest = list_checkpoints(calm.checkpoints)[0][1]
    assert weights_hashes(list_checkpoints(killed.checkpoints)[0][1]) == weights_hashes(newest)

    loaded, manifest = load_checkpoint(newest), read_checkpoint_manifest(newest)
    assert loaded.tokenizer.spec == CHAT.spec and loaded.model.config.vocab_size == 259
    tables = ["wte.weight"] if "tie_weights" not in options else ["wte.weight", "lm_head.weight"]
    for name in tables:
        old, new = before.get_parameter(name), loaded.model.get_parameter(name)
        mean = old[:257].double().mean(0).float()
        assert torch.equal(new[:257], old[:257]) == (rank > 0)
        assert all(0 < (row - mean).abs().max() < 0.5 for row in new[257:259])
        if rank:
            rows = read_tensors(newest.glob("weights-*"))[name.replace("weight", "lora_rows")]
            assert torch.equal(rows, new[257:259])
    assert rank == 0 or (manifest["lora"] is not None and manifest["lora"]["new_rows"] == 2)
    assert "2 ids more than the base has" in calm.log.read_text()
    assert losses(calm)[6] < losses(calm)[1]


def test_a_tokenizer_that_gives_ids_another_meaning_is_refused(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = write_checkpoint(tmp_path, tokenizer=ChatTokenizer.of(CHAT.base, read_template("llama3")).spec)

    assert "prepare the data again with --tokenizer" in refusal(monkeypatch, arguments(other, tmp_path, data, "x"))
