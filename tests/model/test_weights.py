"""Weights through real files: any number of shares, and refusals that name what is wrong."""

import dataclasses
import json

import pytest
import torch

from common.checkpoint_files import CHECKPOINT_MANIFEST, FORMAT_VERSION
from common.errors import UserError
from common.publish import sha256_file
from model.weights import config_from_dict, load_model, load_weights, read_tensors, save_tensors
from tests.model.small import random_tokens, small_config, small_model


def write_checkpoint(folder, model, shares=2):
    folder.mkdir()
    names = list(model.state_dict())
    for share in range(shares):
        mine = {name: model.state_dict()[name] for name in names[share::shares]}
        save_tensors(folder / f"weights-{share:05d}-of-{shares:05d}.safetensors", mine)
    save_tensors(folder / "optimizer-00000-of-00001.safetensors", {"wte.weight": torch.zeros(3)})
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)} for path in folder.iterdir()}
    manifest = {"format_version": FORMAT_VERSION, "model": dataclasses.asdict(model.config), "files": files}
    (folder / CHECKPOINT_MANIFEST).write_text(json.dumps(manifest))
    return folder


@pytest.mark.parametrize("shares", [1, 3])
@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_gives_back_its_model(tmp_path, shares, tied):
    model = small_model(noise=0.1, dropout=0.5, tie_weights=tied).eval()
    loaded = load_model(write_checkpoint(tmp_path / "step", model, shares), verify_hashes=True)
    assert loaded.config == model.config
    assert not loaded.training
    assert torch.equal(loaded(random_tokens(1, 9)), model(random_tokens(1, 9)))


def test_a_truncated_file_is_refused_by_name(tmp_path):
    folder = write_checkpoint(tmp_path / "step", small_model())
    path = folder / "weights-00001-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="weights-00001-of-00002"):
        load_model(folder)


def test_a_changed_byte_is_found_when_hashes_are_asked_for(tmp_path):
    folder = write_checkpoint(tmp_path / "step", small_model())
    path = folder / "weights-00000-of-00002.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="weights-00000-of-00002"):
        load_model(folder, verify_hashes=True)


def test_damage_inside_a_file_is_one_line(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"no tensors")
    with pytest.raises(UserError, match="can't be read as safetensors"):
        read_tensors([path])


def test_a_tensor_in_two_files_is_one_line(tmp_path):
    for name in ("a", "b"):
        save_tensors(tmp_path / name, {"wte.weight": torch.zeros(2)})
    with pytest.raises(UserError, match=r"b repeats the tensor wte\.weight of another file: .* copy the checkpoint"):
        read_tensors([tmp_path / "a", tmp_path / "b"])


def test_weights_of_another_model_are_refused(tmp_path):
    model = small_model()
    with pytest.raises(UserError, match=r"missing \['h.1"):
        load_weights(model, small_model(n_layer=1).state_dict(), "file")
    with pytest.raises(UserError, match=r"unknown \['lm_head.weight'\]"):
        load_weights(model, small_model(tie_weights=False).state_dict(), "file")
    with pytest.raises(UserError, match="shape"):
        load_weights(model, small_model(block_size=7).state_dict(), "file")


def test_options_of_a_newer_version_are_refused_and_missing_ones_have_defaults():
    stored = dataclasses.asdict(small_config())
    assert config_from_dict(stored) == small_config()
    del stored["attention"]
    assert config_from_dict(stored) == small_config()
    with pytest.raises(UserError, match="does not know"):
        config_from_dict({**stored, "n_expert": 8})
    with pytest.raises(UserError, match="impossible"):
        config_from_dict({**stored, "n_head": 5})
