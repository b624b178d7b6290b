"""Folders that are no model's, perhaps on purpose: a sentence, before memory is taken and without anything left."""

import json
import os
import shutil
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.eval.hf_folders import llama_folder, refused

WEIGHTS, PICKLED = "model.safetensors", "pytorch_model.bin"
NORM = "model.norm.weight"
Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "llama"
    llama_folder(folder)
    return folder


@pytest.fixture
def model(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "model"))


def check_refused(monkeypatch: pytest.MonkeyPatch, model: Path, words: str) -> None:
    before = sorted(model.parent.iterdir())
    assert words in refused(monkeypatch, model, model.parent / "in")
    assert sorted(model.parent.iterdir()) == before


def put(name: str, value: Any) -> Damage:
    """A file of the folder as JSON, or as the bytes it has."""
    content = value if isinstance(value, bytes) else json.dumps(value).encode()
    return lambda folder: (folder / name).write_bytes(content)


def change(name: str, **values: Any) -> Damage:
    return lambda folder: put(name, json.loads((folder / name).read_bytes()) | values)(folder)


def deep(name: str) -> Damage:
    return put(name, b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (change("config.json", hidden_size=10**9, head_dim=None), "config.json's model has 3,000,000,625,"),
        (change("config.json", num_hidden_layers=10**9), "in 1,000,000,000 layers, the folder's weights"),
        (change("config.json", hidden_size=10**25), "config.json is damaged (hidden_size: input should be less"),
        (change("config.json", longhaul={"vocab_multiple": 2**31 - 1}), "vocab_multiple is 2147483647"),
        (change("config.json", longhaul={"bias": "no"}), "config.json is damaged (longhaul.bias: "),
        (change("config.json", num_attention_heads=[2]), "config.json is damaged (num_attention_heads: "),
        (change("config.json", architectures=[["x"]]), "config.json is damaged (architectures.0: it is not text)"),
        (change("config.json", rope_scaling=5), "config.json is damaged (rope_scaling: it is not an object)"),
        (change("config.json", hidden_act=["silu"]), "config.json is damaged (hidden_act: it is not text)"),
        (change("config.json", eos_token_id=5000), "the id that ends a text is 5000, but the tokenizer has "),
        (
            change("config.json", eos_token_id=[0, 10**25]),
            "eos_token_id is [0, 10000000000000000000000000]: use an id or",
        ),
        (deep("config.json"), "config.json is damaged (it is not JSON: recursion limit exceeded"),
        (put("generation_config.json", [1]), "generation_config.json is damaged (it is not an object)"),
        (put("added_tokens.json", {"<x>": "7"}), "added_tokens.json is damaged (<x>: it is not a whole number)"),
        (put("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "y"}}}), "'x' is not an id"),
        (put("tokenizer_config.json", {"eos_token": [1]}), "tokenizer_config.json is damaged (eos_token"),
        (put("longhaul_tokenizer.json", {"kind": "byte"}), "damaged (vocab_size: it is missing)"),
        (deep("tokenizer.json"), "tokenizer.json is damaged (it is not JSON: recursion limit exceeded"),
        (change("tokenizer.json", normalizer=[5]), "tokenizer.json is damaged (normalizer: it is not an object)"),
        (change("tokenizer.json", added_tokens=[{"content": 5}]), "tokenizer.json is damaged (added_tokens.0."),
        (
            change("tokenizer.json", post_processor={"type": "TemplateProcessing", "single": [{"SpecialToken": {}}]}),
            "tokenizer.json is damaged (its template lacks 'special_tokens')",
        ),
    ],
)  # fmt: skip
def test_descriptions_of_no_model_are_a_sentence(
    model: Path, monkeypatch: pytest.MonkeyPatch, damage: Damage, words: str
) -> None:
    damage(model)
    check_refused(monkeypatch, model, words)


def in_the_vocabulary(**changes: Any) -> Damage:
    def damage(folder: Path) -> None:
        description = json.loads((folder / "tokenizer.json").read_bytes())
        description["model"] |= changes
        description["model"]["vocab"] |= changes.get("more", {})
        put("tokenizer.json", description)(folder)

    return damage


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (in_the_vocabulary(more={"x y": "7"}), "tokenizer.json is damaged (the id of 'x y' is 7)"),
        (in_the_vocabulary(more={"": -1}), "tokenizer.json is damaged (the id of '' is -1)"),
        (in_the_vocabulary(merges=[5]), "tokenizer.json can't be read"),
        (
            change(
                "tokenizer.json",
                normalizer={
                    "type": "Sequence",
                    "normalizers": [{"type": "Replace", "pattern": {"String": "t"}, "content": "t" * 200}] * 4,
                },
            ),
            "tokenizer.json's normalizer makes texts over 4,096 times as long",
        ),
        (in_the_vocabulary(continuing_subword_prefix="#" * 100), "don't fit its continuing_subword_prefix"),
    ],
)
def test_vocabularies_of_no_tokenizer_are_a_sentence(
    model: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], damage: Damage, words: str
) -> None:
    damage(model)
    check_refused(monkeypatch, model, words)
    assert "panicked" not in capfd.readouterr().err


def test_a_tokenizer_that_would_take_gigabytes_is_refused_by_its_text(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model / "tokenizer.json").write_bytes(b'{"x": [' + b"[]," * 15_000_000 + b"[]]}")
    tracemalloc.start()
    try:
        check_refused(monkeypatch, model, "tokenizer.json has 45,000,011 characters")
        assert tracemalloc.get_traced_memory()[1] < 300 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("stands", ["a folder", "a pipe", "a device", "a link to nothing"])
@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer.json", "added_tokens.json", WEIGHTS]
)
def test_what_is_no_file_is_named_and_not_waited_for(
    model: Path, monkeypatch: pytest.MonkeyPatch, name: str, stands: str
) -> None:
    path = model / name
    path.unlink(missing_ok=True)
    if stands == "a folder":
        path.mkdir()
    elif stands == "a pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero" if stands == "a device" else "nowhere")
    check_refused(monkeypatch, model, f"is {stands}")


def stored(change: Callable[[dict[str, Any]], Any], *, archive: bool = True) -> Damage:
    """The folder's weights as a pickle, changed."""

    def damage(folder: Path) -> None:
        tensors: dict[str, Any] = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        torch.save(change(tensors), folder / PICKLED, _use_new_zipfile_serialization=archive)

    return damage


def repacked(member: str, content: bytes, compression: int = zipfile.ZIP_STORED) -> Damage:
    def damage(folder: Path) -> None:
        stored(dict)(folder)
        with zipfile.ZipFile(folder / PICKLED) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(folder / PICKLED, "w", compression) as archive:
            for name, held in members.items():
                archive.writestr(name, content if name.endswith(member) else held)

    return damage


def cut(folder: Path) -> None:
    stored(dict, archive=False)(folder)
    (folder / PICKLED).write_bytes((folder / PICKLED).read_bytes()[:900])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (repacked("data.pkl", b"."), "can't be read as PyTorch weights (IndexError: pop from empty list)"),
        (repacked("data.pkl", b"h\x05."), "can't be read as PyTorch weights (KeyError"),
        (repacked("data.pkl", b"X\x02\x00\x00\x00\xff\xff."), "can't be read as PyTorch weights ('utf-8' codec"),
        (repacked("data/0", bytes(1 << 28), zipfile.ZIP_DEFLATED), "its parts are compressed"),
        (cut, "can't be read as PyTorch weights ("),
        (stored(lambda tensors: tensors | {NORM: torch.zeros(1).expand(10**12)}), "they repeat the same numbers"),
        (stored(lambda tensors: tensors | {NORM: torch.ones(16).to_sparse()}), "holds more than tensors by name"),
        (stored(lambda tensors: tensors | {NORM: torch.ones(16, device="meta")}), "holds more than tensors by name"),
        (stored(lambda tensors: tensors | {5: torch.ones(16)}), "holds more than tensors by name"),
        (stored(lambda tensors: tensors | {NORM: torch.ones(16).bool()}), "its tensor model.norm.weight is torch.bool"),
        (stored(lambda tensors: tensors | {NORM: torch.ones(4, 4)}), "model.norm.weight has shape (4, 4), config.json"),
        (stored(lambda tensors: tensors | {NORM: torch.tensor(1.0)}), "model.norm.weight has shape (), config.json"),
    ],
)
def test_weights_that_are_none_are_a_sentence(
    model: Path, monkeypatch: pytest.MonkeyPatch, damage: Damage, words: str
) -> None:
    damage(model)
    check_refused(monkeypatch, model, words)


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64])
def test_numbers_of_other_kinds_are_a_sentence(
    model: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    tensors = load_file(model / WEIGHTS)
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file(tensors | {name: tensors[name].to(dtype)}, model / WEIGHTS)
    check_refused(monkeypatch, model, f"its tensor {name} is {dtype}: give the model in bf16, fp16 or fp32")


@pytest.mark.parametrize("name", ["../model.safetensors", "", "a\0b", 5, "x" * 300])
def test_an_index_names_files_beside_it(model: Path, monkeypatch: pytest.MonkeyPatch, name: Any) -> None:
    (model / WEIGHTS).rename(model.parent / WEIGHTS)
    put(f"{WEIGHTS}.index.json", {"weight_map": {NORM: name}})(model)
    check_refused(monkeypatch, model, f"{WEIGHTS}.index.json is damaged (weight_map.{NORM}: ")


def test_parts_that_can_not_all_be_there_are_not_listed(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (model / WEIGHTS).rename(model / "model-1-of-99999999999999.safetensors")
    check_refused(monkeypatch, model, "lacks model-00000000000001-of-99999999999999.safetensors")
