"""Hugging Face folders with something wrong in them, given to the import."""

import json
import random
import shutil
import struct
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.fuzz.cases import Case
from tests.fuzz.checkpoints import DTYPES, SIZES
from tests.fuzz.hub_pickles import PICKLE_ACTS, Act
from tests.fuzz.mutations import STRANGE_TEXTS, json_bytes, mutate_bytes, mutate_json, replace_by

MODELS = ("llama", "llama", "pieces", "pieces", "carried", "bytes", "parts", "pickled", "pickled-parts", "old-pickle")
WITH_GPT2_FILES = "gpt2"  # whose vocabulary takes a second to compare
NAMES = ["../x", "/etc/x", "", ".", "..", "a\x00b", "a" * 5_000, "\ud800", "x/y", "config.json", 5, None, [], {}]
DESCRIPTIONS = ("config.json", "config.json", "config.json", "tokenizer.json", "tokenizer.json",
                "tokenizer_config.json", "generation_config.json", "added_tokens.json", "longhaul_tokenizer.json",
                "vocab.json")  # fmt: skip


def prepare(bases: Path) -> None:
    """A folder of every form: GPT-2's files, tokenizers of a model's own, exported ones, in parts, pickled."""
    from eval import import_hf
    from eval.hugging_face.export import write_files
    from eval.shared.loading import load_checkpoint
    from tests.eval.checkpoints import write_checkpoint
    from tests.eval.hf_folders import gpt2_folder, llama_folder, two_id_folder

    gpt2_folder(bases / "gpt2")
    shutil.rmtree(bases / "gpt2-tokenizer")
    llama_folder(bases / "llama")
    (bases / "llama" / "added_tokens.json").write_text('{"<|other|>": 1}', encoding="utf-8")
    two_id_folder(bases / "pieces", "prepended")
    sys.argv = ["eval/import_hf.py", str(bases / "pieces"), str(bases / "checkpoints" / "pieces")]
    assert import_hf.main() == 0
    for name, checkpoint in (
        ("carried", bases / "checkpoints" / "pieces"),
        ("bytes", write_checkpoint(bases / "checkpoints" / "bytes", bias=False)),
    ):
        (bases / name).mkdir()
        write_files(load_checkpoint(checkpoint), bases / name)
    for name in ("parts", "pickled", "pickled-parts", "old-pickle"):
        shutil.copytree(bases / "llama", bases / name)
        _store_otherwise(bases / name, name)
    shutil.rmtree(bases / "checkpoints")


def cases(rng: random.Random, count: int, bases: Path) -> Iterator[Case]:
    for _ in range(count):
        model = WITH_GPT2_FILES if rng.random() < 0.05 else rng.choice(MODELS)
        seed = rng.randrange(1 << 60)
        pickled = any((bases / model).glob("*.bin"))
        name, act = rng.choice(PICKLE_ACTS if pickled and rng.random() < 0.5 else ACTS)
        arguments = ["eval/import_hf.py", "model", "imported"]
        if rng.random() < 0.1:
            arguments += ["--tokenizer", rng.choice(["gpt2", "byte"])]
        yield Case("hugging_face", f"{model}: {name} {seed}", arguments, partial(_make, bases / model, act, seed))


def _store_otherwise(folder: Path, form: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if form in ("pickled", "old-pickle"):
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=form == "pickled")
        return
    stem, suffix = ("model", "safetensors") if form == "parts" else ("pytorch_model", "bin")
    weight_map: dict[str, str] = {}
    for part in (1, 2):
        file = f"{stem}-0000{part}-of-00002.{suffix}"
        held = {name: tensor for number, (name, tensor) in enumerate(tensors.items()) if number % 2 == part - 1}
        weight_map |= dict.fromkeys(held, file)
        save_file(held, folder / file) if form == "parts" else torch.save(held, folder / file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index), encoding="utf-8")


def _make(base: Path, act: Act, seed: int, folder: Path) -> None:
    shutil.copytree(base, folder / "model")
    act(random.Random(seed), folder / "model")


def _change_description(rng: random.Random, folder: Path) -> None:
    path = _description(rng, folder)
    value = json.loads(path.read_text(encoding="utf-8"))
    if path.name == "tokenizer.json" and rng.random() < 0.8:  # most of whose places are in the vocabulary
        model = value["model"]
        kept = {name: model.pop(name) for name in ("vocab", "merges")}
        changed, _ = mutate_json(rng, value)
        if isinstance(changed, dict) and isinstance(changed.get("model"), dict):
            changed["model"] |= kept
        value = changed
    else:
        value, _ = mutate_json(rng, value)
    path.write_bytes(json_bytes(value))


def _change_size(rng: random.Random, folder: Path) -> None:
    values = _read(folder / "config.json")
    sizes = [key for key, value in values.items() if value is None or isinstance(value, int | float)]
    for key in rng.sample(sizes, rng.choice([1, 1, 2])):
        values[key] = rng.choice(SIZES)
    if rng.random() < 0.2:
        values["longhaul"] = {rng.choice(["vocab_multiple", "dropout", "bias"]): rng.choice(SIZES)}
    (folder / "config.json").write_bytes(json_bytes(values))


def _change_tokenizer(rng: random.Random, folder: Path) -> None:
    """Ids, merges and steps that no single wrong value makes."""
    path = folder / "tokenizer.json"
    if not path.exists():
        return _change_description(rng, folder)
    value = _read(path)
    model, number = value["model"], rng.choice([-1, 0, 10**6, 2**31, 2**32 - 1, 2**32, 2**63, 10**25, "1", 1.5, None])
    step = rng.choice(
        [
            {"type": "Sequence"},
            {"type": "Replace", "pattern": {"Regex": "(" * 2_000}, "content": "x"},
            {"type": "Replace", "pattern": {"Regex": "(a*)*{1000}{1000}"}, "content": "x"},
            {"type": "Replace", "pattern": {"String": ""}, "content": "x" * 100_000},
            {"type": "Split", "pattern": {"Regex": "["}, "behavior": "Isolated", "invert": False},
            {"type": "Split", "pattern": {"String": ""}, "behavior": "Isolated", "invert": False},
            {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
            {"type": "Prepend", "prepend": ""},
            {"type": "ByteLevel"},
            {"type": "Metaspace", "replacement": "", "prepend_scheme": "always"},
            {"type": 5},
            {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "x", "type_id": 0}}],
                "pair": [],
                "special_tokens": {},
            },
        ]
    )
    act = rng.choice(["id", "added", "merge", "step", "step", "many", "few", "prefix", "padding"])
    if act == "id":
        model["vocab"][rng.choice([*STRANGE_TEXTS, *model["vocab"]])] = number
    elif act == "added":
        value["added_tokens"].append({"id": number, "content": rng.choice(STRANGE_TEXTS), "special": True})
    elif act == "merge":
        model["merges"].insert(0, rng.choice(["x", "", "a b c", ["a"], ["zz", "zz"], [1, 2], None, "\ud800 a", "Ġ Ġ"]))
    elif act == "step":
        key = rng.choice(["normalizer", "pre_tokenizer", "decoder", "post_processor"])
        listed = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}
        steps = {"type": "Sequence", listed.get(key, "processors"): [step] * rng.choice([1, 300])}
        value[key] = rng.choice([step, steps])
    elif act == "many":
        model["vocab"] |= {f"many {number}": number for number in range(100_000)}
    elif act == "few":
        model["vocab"] = {}
    elif act == "prefix":
        model["continuing_subword_prefix"] = rng.choice(["#" * 1_000, "é"])
    else:
        value["padding"] = {"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None,
                            "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}  # fmt: skip
    path.write_bytes(json_bytes(value))
    return None


def _change_ids(rng: random.Random, folder: Path) -> None:
    name = rng.choice(["config.json", "generation_config.json"])
    values = _read(folder / name) if (folder / name).exists() else {}
    ids = [*SIZES, [0, 10**25], [-1, 0], [[0]], {}, "</s>", [0] * 100_000]
    values[rng.choice(["eos_token_id", "bos_token_id"])] = rng.choice(ids)
    (folder / name).write_bytes(json_bytes(values))


def _change_index(rng: random.Random, folder: Path) -> None:
    """An index of parts, there or not before."""
    found = next(folder.glob("*.index.json"), folder / "model.safetensors.index.json")
    index = _read(found) if found.exists() else {"weight_map": {}}
    for name in ("model.safetensors", "pytorch_model.bin"):
        if rng.random() < 0.7:
            (folder / name).unlink(missing_ok=True)
    if rng.random() < 0.5:
        index["weight_map"]["wte.weight"] = rng.choice(NAMES)
    else:
        index, _ = mutate_json(rng, index)
    found.write_bytes(json_bytes(index))


def _damage_bytes(rng: random.Random, folder: Path) -> None:
    path = rng.choice(sorted(path for path in folder.iterdir() if path.name != "README.md"))
    content = path.read_bytes()
    head = rng.choice([8, 64, 1_000, len(content)])
    path.write_bytes(mutate_bytes(rng, content[:head])[0] + content[head:])


def _change_header(rng: random.Random, folder: Path) -> None:
    if not (files := sorted(folder.glob("*.safetensors"))):
        return _damage_bytes(rng, folder)
    path = rng.choice(files)
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header, _ = mutate_json(rng, json.loads(content[8 : 8 + length]))
    text = json_bytes(header)
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    return None


def _change_tensors(rng: random.Random, folder: Path) -> None:
    """Other dtypes, shapes, names, values."""
    path = rng.choice(sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]))
    tensors = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    for name in rng.sample(sorted(tensors), min(len(tensors), rng.choice([1, 1, 100]))):
        act = rng.choice(["dtype", "dtype", "shape", "rename", "drop", "scalar", "empty", "nan", "head", "bias"])
        tensor = tensors.pop(name)
        if act == "dtype":
            tensors[name] = tensor.to(rng.choice(DTYPES))
        elif act == "shape":
            shape = rng.choice([(-1, 1), (1, -1), (1, 1, -1), tuple(reversed(tensor.shape))])
            tensors[name] = tensor.reshape(shape)
        elif act == "rename":
            tensors[rng.choice(["", "x", "/", "h.0.foo", name.replace("0", "1"), "wte.weight", "\x00"])] = tensor
        elif act == "scalar":
            tensors[name] = torch.tensor(1.0)
        elif act == "empty":
            tensors[name] = tensor.flatten()[:0].clone()
        elif act == "nan":
            tensors[name] = torch.full_like(tensor, rng.choice([float("nan"), float("inf"), 1e38]))
        elif act != "drop":
            more = "lm_head.weight" if act == "head" else name.replace("weight", "bias")
            tensors |= {name: tensor, more: rng.choice([tensor.flatten(), torch.tensor(1.0), tensor * 2]).clone()}
    save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)


def _replace_something(rng: random.Random, folder: Path) -> None:
    paths = sorted(folder.iterdir())
    replace_by(rng, rng.choice([*paths, folder]))


def _add_something(rng: random.Random, folder: Path) -> None:
    names = ["generation_config.json", "added_tokens.json", "adapter_config.json", "tokenizer_config.json",
             "vocab.json", "merges.txt", "longhaul_tokenizer.json", "model.safetensors", "pytorch_model.bin",
             "tokenizer.json", "model.safetensors.index.json", "model-00001-of-99999999999999.safetensors",
             "model-00001-of-٣.safetensors", "model-1-of-0.safetensors"]  # fmt: skip
    name = rng.choice(names)
    path = folder / name
    for whole in ("model.safetensors", "pytorch_model.bin"):
        if name.startswith("model-"):
            (folder / whole).unlink(missing_ok=True)
    contents = [b"", b"x", b"[]", b"null", b'{"a": "b"}', b"{}", b"[" * 100_000, b'{"x":' * 5_000, b"\xff", b"1e999"]
    path.write_bytes(rng.choice(contents))
    if rng.random() < 0.4:
        replace_by(rng, path)


def _say_otherwise(rng: random.Random, folder: Path) -> None:
    """What no single wrong value makes: facts that contradict each other, sizes that agree with each other only."""
    many = 10**9
    values = _read(folder / "config.json") | rng.choice(
        [
            {"hidden_size": many, "n_embd": many, "num_attention_heads": 1, "n_head": 1},
            {"hidden_size": 2**30, "n_embd": 2**30, "num_attention_heads": 2, "n_head": 2, "intermediate_size": 2**30},
            {"num_hidden_layers": many, "n_layer": many},
            {"num_hidden_layers": 3_000, "n_layer": 3_000},
            {"max_position_embeddings": many, "n_positions": many},
            {"vocab_size": many},
            {"vocab_size": 2**31 - 1, "longhaul": {"vocab_multiple": 2**31 - 1}},
            {"longhaul": {"vocab_multiple": 2**31 - 1}},
            {"longhaul": {"vocab_multiple": 10**7}},
            {"longhaul": {"dropout": "0.1", "bias": "no"}},
            {"intermediate_size": many, "n_inner": many},
            {"architectures": [rng.choice(["GPT2LMHeadModel", "MistralForCausalLM", "T5Model", "", 5])]},
            {"model_type": rng.choice(["gpt2", "mistral", "starcoder2", "", 5])},
            {"architectures": "LlamaForCausalLM"},
            {"_name_or_path": {"x": [1]}},
            {"rope_scaling": {"rope_type": "llama3"}},
            {"rope_scaling": {"rope_type": "linear", "factor": "2"}},
            {"rope_scaling": {"rope_type": "linear", "factor": 10**400}},
            {"rope_scaling": {"type": ["x"]}},
            {"rope_scaling": 5},
            {"quantization_config": {}},
            {"tie_word_embeddings": None},
            {"attention_bias": True, "mlp_bias": True},
            {"hidden_act": ["silu"], "activation_function": {}},
            {"sliding_window": many},
            {"n_ctx": None, "n_positions": None},
            {"max_position_embeddings": 10**400},
        ]
    )
    (folder / "config.json").write_bytes(json_bytes(values))


def _description(rng: random.Random, folder: Path) -> Path:
    return folder / rng.choice([name for name in DESCRIPTIONS if (folder / name).exists()])


def _read(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value


ACTS: list[tuple[str, Act]] = [
    *[("description", _change_description)] * 12,
    *[("sizes", _change_size)] * 4,
    *[("tokenizer", _change_tokenizer)] * 4,
    *[("ids", _change_ids)] * 2,
    *[("index", _change_index)] * 2,
    *[("bytes", _damage_bytes)] * 3,
    *[("header of tensors", _change_header)] * 2,
    *[("tensors", _change_tensors)] * 4,
    *[("something else in its place", _replace_something)] * 3,
    *[("something beside it", _add_something)] * 3,
    *[("contradiction", _say_otherwise)] * 4,
]
