"""Weights through real files: any number of shares, and refusals that name what is wrong."""

import dataclasses
import json
import resource
import struct
from pathlib import Path

import pytest
import torch

from common.checkpoint_files import CHECKPOINT_MANIFEST
from common.errors import UserError
from common.publish import sha256_file
from model.config import config_from_dict
from model.lora import add_lora, lora_tensors
from model.lora_config import LoraConfig
from model.weights import load_model, load_weights, read_tensors, save_tensors
from tests.helpers.manifests import WHOLE
from tests.model.small import random_tokens, small_config, small_model


def write_checkpoint(folder, model, shares=2):
    folder.mkdir()
    names = list(model.state_dict())
    for share in range(shares):
        mine = {name: model.state_dict()[name] for name in names[share::shares]}
        save_tensors(folder / f"weights-{share:05d}-of-{shares:05d}.safetensors", mine)
    save_tensors(folder / "optimizer-00000-of-00001.safetensors", {"wte.weight": torch.zeros(3)})
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)} for path in folder.iterdir()}
    manifest = {**WHOLE, "model": dataclasses.asdict(model.config), "files": files}
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


def rewritten(folder, **facts):
    """The checkpoint with other facts and the right sizes and hashes, as somebody who means harm would write them."""
    manifest = json.loads((folder / CHECKPOINT_MANIFEST).read_text())
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)} for path in folder.glob("*.safe*")}
    manifest |= {"files": files} | facts
    (folder / CHECKPOINT_MANIFEST).write_text(json.dumps(manifest))
    return folder


PROMISES = [
    ({"n_embd": 10**9, "n_head": 1}, "does not hold this model: it has .* parameters in 2 layers, the files"),
    ({"n_embd": 2**31 - 1, "n_head": 1}, "does not hold this model"),
    ({"n_layer": 10**9}, "does not hold this model: it has .* in 1,000,000,000 layers"),
    ({"block_size": 2**31 - 1}, "does not hold this model"),
    ({"vocab_multiple": 2**30}, "does not hold this model"),
    ({"mlp_hidden": 2**30}, "does not hold this model"),
    ({"block_size": 170}, r"wpe.weight has shape \(160, 32\) instead of \(170, 32\)"),
    ({"n_embd": 10**25}, "its model is impossible: model.n_embd is .*use less than"),
    ({"n_embd": "32"}, "its model is impossible: n_embd: it is not a whole number"),
    ({"n_layer": 2.0}, "its model is impossible: n_layer: it is not a whole number"),
    ({"bias": "no"}, "its model is impossible: bias: it is neither true nor false"),
    ({"norm": ["rmsnorm"]}, "its model is impossible: norm: "),
    ({"norm_eps": float("nan")}, "its model is impossible: model.norm_eps is nan"),
]


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("options", "message"), PROMISES, ids=str)
def test_a_model_that_the_files_do_not_hold_is_refused_before_memory_is_taken(tmp_path, options, message):
    folder = write_checkpoint(tmp_path / "step", model := small_model())
    rewritten(folder, model=dataclasses.asdict(model.config) | options)
    limit = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), limit[1]))
    try:
        with pytest.raises(UserError, match=message) as error:
            load_model(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limit)
    assert str(error.value).startswith(str(folder))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_weights_that_are_no_floats_are_refused(tmp_path, dtype):
    folder = write_checkpoint(tmp_path / "step", model := small_model(), shares=1)
    weights = {name: value.detach() for name, value in model.named_parameters()}
    save_tensors(folder / "weights-00000-of-00001.safetensors", weights | {"ln_f.bias": weights["ln_f.bias"].to(dtype)})
    with pytest.raises(UserError, match=r"00001.safetensors holds ln_f.bias as \w+, not as one of F64"):
        load_model(rewritten(folder))
    for kept in (torch.float16, torch.bfloat16, torch.float64):
        save_tensors(
            folder / "weights-00000-of-00001.safetensors", {name: value.to(kept) for name, value in weights.items()}
        )
        assert load_model(rewritten(folder)).ln_f.bias.dtype == torch.float32


@pytest.mark.timeout(60)
def test_headers_that_lie_are_one_line(tmp_path):
    folder = write_checkpoint(tmp_path / "step", small_model(), shares=1)
    path = folder / "weights-00000-of-00001.safetensors"
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    norm = header["ln_f.bias"]
    for entry in (
        norm | {"shape": [2**62, 2**62]},
        norm | {"dtype": "X7"},
        norm | {"data_offsets": [0, 2**63]},
        norm | {"data_offsets": norm["data_offsets"][::-1]},
        norm | {"shape": "32"},
        None,
    ):
        text = json.dumps(header | {"ln_f.bias": entry}).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data)
        with pytest.raises(UserError, match="can't be read as safetensors"):
            load_model(rewritten(folder))
    for damaged in (b"", struct.pack("<Q", 2**62) + content[8:], struct.pack("<Q", 0) + content[8:], content[:-1]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="can't be read as safetensors"):
            load_model(rewritten(folder))


ADAPTERS = {"rank": 2, "alpha": 4.0, "dropout": 0.0, "targets": ["c_fc"]}


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"rank": 2**40}, "holds 640 adapter parameters, but its rank and targets make"),
        ({"targets": ["c_attn"]}, "holds 640 adapter parameters, but its rank and targets make 512"),
        ({"targets": ["c_gate"]}, "holds 640 adapter parameters, but its rank and targets make 0"),
        ({"targets": ["lm_head"]}, "its adapters are impossible: lora.targets"),
        ({"dropout": 1.0}, "its adapters are impossible: lora.dropout"),
        ({"alpha": "4"}, "lora.alpha: it is not a number"),
    ],
    ids=str,
)
def test_adapters_that_the_files_do_not_hold_are_refused(tmp_path, facts, message):
    base = write_checkpoint(tmp_path / "base", model := small_model(), shares=1)
    add_lora(model, LoraConfig(2, 4.0, 0.0, ("c_fc",)), seed=0)
    folder = tmp_path / "step"
    folder.mkdir()
    save_tensors(folder / "weights-00000-of-00001.safetensors", lora_tensors(model))
    known = {"identity": "0" * 64, "folder": "base", "sha256": sha256_file(base / CHECKPOINT_MANIFEST)}
    manifest = json.loads((base / CHECKPOINT_MANIFEST).read_text())
    (folder / CHECKPOINT_MANIFEST).write_text(json.dumps(manifest | {"base": known, "lora": ADAPTERS}))
    assert load_model(rewritten(folder)).config == model.config
    with pytest.raises(UserError, match=message):
        load_model(rewritten(folder, lora=ADAPTERS | facts))
