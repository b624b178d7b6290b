"""An import gives what `transformers` loads from the same folder, or is refused by name."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.errors import UserError
from data_prep.tokenization.loading import load_tokenizer
from eval import import_hf
from eval.hugging_face.hf_config import DEFAULTS, MODEL_TYPES, with_defaults
from eval.hugging_face.tokenizer_files import write_tokenizer_files
from eval.hugging_face.tokenizer_import import recognise_tokenizer
from tests.eval.hf_folders import call, check_equal, gpt2_folder, llama_folder, refused

transformers = pytest.importorskip("transformers")

WEIGHTS = "model.safetensors"
TEXT = "Hello world  Naïve\n\n日本 it's 12345 <new> <|endoftext|>"


def change(folder: Path, name: str, **values: Any) -> None:
    """Set keys of a JSON file; None removes one."""
    path = folder / name
    merged = (json.loads(path.read_text()) if path.exists() else {}) | values
    path.write_text(json.dumps({key: value for key, value in merged.items() if value is not None}))


def retouch(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Replace, add or (None) remove tensors; `__` in a name stands for a dot."""
    held = load_file(folder / WEIGHTS) | {name.replace("__", "."): value for name, value in tensors.items()}
    kept = {name: tensor for name, tensor in held.items() if tensor is not None}
    save_file(kept, folder / WEIGHTS, metadata={"format": "pt"})


def theirs(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("tied", [True, False, None])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_head_that_differs_from_the_table_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str, tied: bool | None
) -> None:
    source = tmp_path / kind
    if kind == "gpt2":
        gpt2_folder(source)
        table, count = "wte.weight", 50257
    else:
        table, count = "model.embed_tokens.weight", llama_folder(source)[1]
    head = torch.randn(load_file(source / WEIGHTS)[table].shape, generator=torch.Generator().manual_seed(0))
    retouch(source, lm_head__weight=head)
    change(source, "config.json", tie_word_embeddings=tied)
    call(import_hf, monkeypatch, source, tmp_path / "in")
    check_equal(tmp_path / "in", theirs(source), count)
    unexpected = tied or (tied is None and kind == "gpt2")
    assert ("imported as two matrices" in capsys.readouterr().out) is bool(unexpected)


def test_a_tied_table_may_be_stored_once_under_either_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, names in enumerate((["model.embed_tokens.weight"], ["lm_head.weight"], ["lm_head.weight"] * 2)):
        source = tmp_path / str(number)
        _, count = llama_folder(source)
        change(source, "config.json", tie_word_embeddings=True)
        table = load_file(source / WEIGHTS)["model.embed_tokens.weight"]
        held: dict[str, torch.Tensor | None] = {"model__embed_tokens__weight": table, "lm_head__weight": table.clone()}
        if len(names) == 1:
            held = {name: value if name.replace("__", ".") in names else None for name, value in held.items()}
        retouch(source, **held)
        call(import_hf, monkeypatch, source, tmp_path / f"in{number}")
        check_equal(tmp_path / f"in{number}", theirs(source), count)


def test_one_file_counts_before_an_index_and_parts_must_be_of_one_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "llama"
    _, count = llama_folder(source)
    tensors = load_file(source / WEIGHTS)
    names = sorted(tensors)
    parts = {f"model-0000{n + 1}-of-00002.safetensors": names[n::2] for n in range(2)}
    for file, held in parts.items():  # of an older save: other weights
        save_file({name: tensors[name] + 1 for name in held}, source / file, metadata={"format": "pt"})
    index = {name: file for file, held in parts.items() for name in held}
    (source / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    call(import_hf, monkeypatch, source, tmp_path / "in")
    check_equal(tmp_path / "in", theirs(source), count)
    (source / WEIGHTS).unlink()
    call(import_hf, monkeypatch, source, tmp_path / "old")
    check_equal(tmp_path / "old", theirs(source), count)
    (source / f"{WEIGHTS}.index.json").unlink()
    save_file(tensors, source / "model-00002-of-00002.safetensors")
    assert f"repeats {parts['model-00001-of-00002.safetensors'][0]}" in refused(monkeypatch, source, tmp_path / "x")
    (source / "model-00002-of-00002.safetensors").rename(source / "consolidated.safetensors")
    assert "lacks model-00002-of-00002" in refused(monkeypatch, source, tmp_path / "x")
    (source / "model-00001-of-00002.safetensors").unlink()
    assert "consolidated.safetensors is a name" in refused(monkeypatch, source, tmp_path / "x")


def test_tensors_that_are_not_the_configurations_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, fresh = tmp_path / "llama", tmp_path / "fresh"
    _, count = llama_folder(fresh)
    tensors = load_file(fresh / WEIGHTS)
    table, norm = tensors["model.embed_tokens.weight"], "model__norm__weight"
    broken = tensors["model.norm.weight"].clone()
    broken[3] = float("inf")
    for tensor, message in (
        ({"model__embed_tokens__weight": table[:-1].clone()}, f"has {count + 2} rows, but config.json's vocab_size"),
        ({"lm_head__weight": torch.cat((table, table[:1]))}, f"has {count + 4} rows"),
        ({norm: broken}, "model.norm.weight holds NaN or inf"),
        ({norm: broken.to(torch.float8_e4m3fn)}, "model.norm.weight is torch.float8_e4m3fn"),
        ({norm: torch.ones(16, dtype=torch.int8)}, "model.norm.weight is torch.int8"),
        ({"model__layers__0__self_attn__q_proj__bias": torch.ones(16)}, "that config.json doesn't have"),
    ):
        shutil.rmtree(source, ignore_errors=True)
        shutil.copytree(fresh, source)
        retouch(source, **tensor)
        assert message in refused(monkeypatch, source, tmp_path / "in")
    for values, message in (
        ({"attention_bias": True}, "config.json has a model.layers.0.self_attn.q_proj.bias, and the folder lacks it"),
        ({"model_type": "mistral"}, "the architecture LlamaForCausalLM, another one's"),
        ({"model_type": "qwen2"}, "qwen2"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"partial_rotary_factor": 0.5}, "rotary positions"),
        ({"eos_token_id": "0"}, "eos_token_id"),
    ):
        shutil.rmtree(source)
        shutil.copytree(fresh, source)
        change(source, "config.json", **values)
        assert message in refused(monkeypatch, source, tmp_path / "in")
    (source / "adapter_config.json").write_text("{}")
    assert "adapters" in refused(monkeypatch, source, tmp_path / "in")


def test_other_words_for_the_same_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "llama"
    _, count = llama_folder(source)
    removed = dict.fromkeys(("tie_word_embeddings", "rms_norm_eps", "mlp_bias", "rope_parameters", "architectures"))
    change(source, "config.json", eos_token_id=[0], hidden_act="swish", **removed)
    call(import_hf, monkeypatch, source, tmp_path / "in")
    check_equal(tmp_path / "in", theirs(source), count)
    gpt2 = tmp_path / "gpt2"
    gpt2_folder(gpt2)
    renamed = {"n_embd": None, "hidden_size": 4, "n_head": None, "num_attention_heads": 2, "vocab_size": None}
    change(gpt2, "config.json", activation_function="gelu_python", **renamed)
    call(import_hf, monkeypatch, gpt2, tmp_path / "in2")
    check_equal(tmp_path / "in2", theirs(gpt2))


@pytest.mark.parametrize("home", DEFAULTS)
def test_fields_left_out_are_what_transformers_takes_them_for(home: str) -> None:
    config = getattr(transformers, home).config_class()
    for name, value in with_defaults({"model_type": MODEL_TYPES[home]}).items():
        if name != "architectures":
            assert value == getattr(config, name), name


@pytest.fixture(scope="module")
def gpt2_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2")
    write_tokenizer_files(load_tokenizer("gpt2"), folder, 64)
    (folder / "longhaul_tokenizer.json").unlink()
    for name, change in (  # as OpenAI's: of GPT-2's own class, and nothing before a text
        ("tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer"}),
        ("tokenizer.json", {"post_processor": None}),
    ):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", "bos_token_id": 50256}))
    return folder


def lowercase(description: dict[str, Any]) -> None:
    description["normalizer"] = {"type": "Lowercase"}


def space_before(description: dict[str, Any]) -> None:
    description["pre_tokenizer"]["add_prefix_space"] = True


def digits_apart(description: dict[str, Any]) -> None:
    digits = {"type": "Digits", "individual_digits": True}
    description["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, description["pre_tokenizer"]]}


def other_merges(description: dict[str, Any]) -> None:
    merges = description["model"]["merges"]
    merges[:200] = merges[:200][::-1]


def more_tokens(description: dict[str, Any]) -> None:
    new = description["added_tokens"][0] | {"content": "<new>", "id": 50257, "special": False}
    description["added_tokens"].append(new)


PLAIN, OWN, REFUSED = "gpt2", "huggingface", "refused"
GENERIC = {"tokenizer_class": "PreTrainedTokenizerFast", "add_prefix_space": None}


@pytest.mark.parametrize(
    ("edit", "settings", "config", "expected"),
    [
        (None, {}, {}, PLAIN),
        (None, GENERIC, {}, PLAIN),
        (None, {}, {"eos_token_id": [50256]}, PLAIN),
        (lowercase, GENERIC, {}, OWN),
        (lowercase, {}, {}, REFUSED),
        (space_before, GENERIC, {}, OWN),
        (space_before, {"add_prefix_space": True}, {}, OWN),
        (space_before, {}, {}, REFUSED),
        (None, {"add_prefix_space": True}, {}, REFUSED),
        (digits_apart, GENERIC, {}, OWN),
        (other_merges, {}, {}, OWN),
        (more_tokens, {}, {}, OWN),
        (None, {"added_tokens_decoder": {"50257": {"content": "<new>"}}}, {}, REFUSED),
        (None, {}, {"eos_token_id": 0}, REFUSED),
        (None, {"eos_token": "!", "bos_token": "!"}, {"bos_token_id": 0, "eos_token_id": 0}, OWN),
    ],
)
def test_gpt2s_tokenizer_is_recognised_by_all_that_it_does(
    gpt2_files: Path, tmp_path: Path, edit: Any, settings: Any, config: Any, expected: str
) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(gpt2_files, folder)
    description = json.loads((folder / "tokenizer.json").read_text())
    if edit:
        edit(description)
        (folder / "tokenizer.json").write_text(json.dumps(description))
    change(folder, "tokenizer_config.json", **settings)
    change(folder, "config.json", **config)
    values = json.loads((folder / "config.json").read_text())
    if expected == REFUSED:
        with pytest.raises(UserError, match=r"tokenizer(_config)?\.json"):
            recognise_tokenizer(folder, values)
        return
    tokenizer = recognise_tokenizer(folder, values)
    assert tokenizer.spec["kind"] == expected
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    for text in (TEXT.replace("<|endoftext|>", ""), "Hello world", "two\n words", ""):
        assert tokenizer.encode(text).tolist() == reference.encode(text, add_special_tokens=False)


def test_an_exported_tokenizer_that_was_changed_is_not_taken_for_the_old_one(gpt2_files: Path, tmp_path: Path) -> None:
    folder = tmp_path / "exported"
    shutil.copytree(gpt2_files, folder)
    (folder / "longhaul_tokenizer.json").write_text(json.dumps(load_tokenizer("gpt2").spec))
    assert recognise_tokenizer(folder, {}).spec["kind"] == "gpt2"
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)  # as fine-tuning it there does
    assert recognise_tokenizer(folder, {}).spec["kind"] == "gpt2"
    with pytest.raises(UserError, match=r"longhaul_tokenizer\.json describes another tokenizer"):
        recognise_tokenizer(folder, {"eos_token_id": 7})
    changed = transformers.AutoTokenizer.from_pretrained(folder)
    changed.add_tokens(["<new>"])
    changed.save_pretrained(folder)
    with pytest.raises(UserError, match=r"longhaul_tokenizer\.json describes another tokenizer"):
        recognise_tokenizer(folder, {})
    (folder / "longhaul_tokenizer.json").unlink()
    ends = {"bos_token_id": 50256, "eos_token_id": 50256}
    tokenizer = recognise_tokenizer(folder, ends)
    assert tokenizer.encode(TEXT).tolist().count(50257) == 1


def test_two_files_of_gpt2_are_recognised_only_where_nothing_is_added(gpt2_files: Path, tmp_path: Path) -> None:
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(gpt2_files / name, tmp_path)
    assert recognise_tokenizer(tmp_path, {"model_type": "gpt2"}).spec["kind"] == "gpt2"
    (tmp_path / "added_tokens.json").write_text('{"<new>": 50257}')
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        recognise_tokenizer(tmp_path, {"model_type": "gpt2"})
