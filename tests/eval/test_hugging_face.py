"""Export and import against the real classes of `transformers`, on a random grid of configurations for each."""

import dataclasses
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.checkpoint_files import verify_checkpoint
from common.errors import UserError
from common.version import VERSION
from data_prep.tokenization.loading import load_tokenizer
from data_prep.tokenization.tokenizer import END_OF_TEXT, CharTokenizer
from eval import export_hf, generate, import_hf
from eval.hugging_face import export
from eval.hugging_face.hf_config import (
    GPT2,
    LLAMA,
    MISTRAL,
    QWEN3,
    STARCODER2,
    from_config,
    home_of,
    to_config,
)
from eval.hugging_face.hf_tensors import to_tensors
from eval.hugging_face.tokenizer_files import write_tokenizer_files
from eval.hugging_face.tokenizer_import import recognise_tokenizer
from eval.shared.loading import load_checkpoint
from model.config import PRESETS, ModelConfig
from model.precision import TORCH_DTYPES
from model.weights import load_model
from tests.eval.checkpoints import write_checkpoint
from tests.eval.hf_folders import call, two_id_folder
from tests.model.small import all_options, small_config, small_model

transformers = pytest.importorskip("transformers")

PROJECT = Path(__file__).resolve().parents[2]
CLASSES = [GPT2, STARCODER2, LLAMA, MISTRAL, QWEN3]


def random_options(home, seed):
    choose = random.Random(f"{home}{seed}")
    heads, size = choose.choice([1, 2, 4, 6]), choose.choice([4, 8, 16])
    options: dict[str, Any] = {
        "block_size": choose.randint(8, 40),
        "vocab_multiple": choose.choice([1, 16, 128]),
        "n_layer": choose.randint(1, 3),
        "n_head": heads,
        "n_embd": heads * size,
        "norm_eps": choose.choice([1e-5, 1e-6]),
        "mlp_hidden": choose.choice([None, 24, 40]),
        "tie_weights": choose.random() < 0.5,
        "bias": choose.random() < 0.5,
        "dropout": choose.choice([0.0, 0.1]),
    }
    if home == GPT2:
        return options | {"mlp": choose.choice(["gelu", "gelu_exact", "relu2"])}
    options |= {"position": "rope", "rope_base": choose.choice([100.0, 10000.0, 500000.0])}
    options["rope_scaling"] = scaling = choose.choice(["none", "linear", "llama3"])
    if scaling != "none":
        options["rope_factor"] = choose.choice([2.0, 8.0])
    if scaling == "llama3":
        options |= {
            "rope_original_length": choose.choice([6, 100, 8192]),
            "rope_high_factor": choose.choice([2.0, 4.0]),
        }
    options["n_kv_head"] = choose.choice([None, *(d for d in (1, 2, 3, 4) if heads % d == 0)])
    if home == STARCODER2:
        window = choose.choice([None, 1, 5])
        return options | {"mlp": choose.choice(["gelu", "gelu_exact", "relu2"]), "window": window}
    options |= {"norm": "rmsnorm", "mlp": "swiglu"}
    if home == LLAMA:
        return options
    options |= {"bias": False, "window": choose.choice([1, 3, 7])}
    if home == MISTRAL:
        return options
    options |= {"qk_norm": True, "n_layer": choose.choice([2, 3, 5])}
    return options | {"window_pattern": choose.choice(["SL", "LLS", "L", None])}


def plain(config):
    """With every default written out, and every layer's window."""
    windows = "".join("L" if window is None else "S" for window in config.windows)
    pattern = (config.window, windows) if "S" in windows else (None, None)
    filled = {"n_kv_head": config.kv_heads, "mlp_hidden": config.hidden_size}
    return dataclasses.replace(config, window=pattern[0], window_pattern=pattern[1], **filled)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("home", CLASSES)
def test_exported_logits_are_equal_and_the_round_trip_exact(home, seed, tmp_path, monkeypatch):
    checkpoint = write_checkpoint(tmp_path, noise=0.3, seed=seed, **random_options(home, seed))
    model = load_model(checkpoint)
    dtype = ["fp32", "bf16", "fp16"][seed % 3]
    call(export_hf, monkeypatch, checkpoint, tmp_path / "hf", "--dtype", dtype)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert type(theirs).__name__ == home
    assert theirs.dtype == TORCH_DTYPES[dtype]
    theirs.float()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(TORCH_DTYPES[dtype]).float()
    # as llama.cpp's converter and mlx-lm look GPT-2's context up; they know no window
    assert home != GPT2 or json.loads((tmp_path / "hf" / "config.json").read_text())["n_ctx"] == model.config.block_size
    card = (tmp_path / "hf" / "README.md").read_text()
    assert ("ignores windows" in card) is any(window is not None for window in model.config.windows)
    tokens = torch.randint(0, 257, (2, model.config.block_size), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        got, expected = theirs(tokens).logits, model(tokens)[..., :257]
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()

    call(import_hf, monkeypatch, tmp_path / "hf", tmp_path / "back")
    back = load_model(tmp_path / "back", verify_hashes=True)
    assert plain(back.config) == plain(model.config)
    for name, parameter in model.named_parameters():
        rows = 257 if name in ("wte.weight", "lm_head.weight") else len(parameter)
        assert torch.equal(back.get_parameter(name)[:rows], parameter[:rows]), name


THEIR_CONFIGS: dict[str, dict[str, Any]] = {
    GPT2: {"n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 20},
    STARCODER2: {"use_bias": False, "sliding_window": 4, "norm_epsilon": 1e-6},
    LLAMA: {"attention_bias": True, "rope_theta": 5000.0},
    MISTRAL: {"sliding_window": None},
    QWEN3: {"head_dim": 4, "layer_types": ["sliding_attention", "full_attention"], "use_sliding_window": True},
}
SHARED: dict[str, Any] = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2,
    "intermediate_size": 40, "max_position_embeddings": 20, "bos_token_id": 256, "eos_token_id": 256,
}  # fmt: skip


@pytest.mark.parametrize("home", CLASSES)
@pytest.mark.parametrize(("embedding", "tied"), [("scaled", True), ("normed", True), ("scaled", False)])
def test_norms_without_weights_and_other_embeddings_are_exported_as_what_equals_them(
    home, embedding, tied, tmp_path, monkeypatch
):
    options = random_options(home, 3) | {"norm_weights": False, "embedding": embedding, "tie_weights": tied}
    checkpoint = write_checkpoint(tmp_path, noise=0.3, **options)
    call(export_hf, monkeypatch, checkpoint, tmp_path / "hf")
    call(import_hf, monkeypatch, tmp_path / "hf", tmp_path / "back")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert type(theirs).__name__ == home
    model, back = load_model(checkpoint), load_model(tmp_path / "back")
    tokens = torch.randint(0, 257, (2, model.config.block_size), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found, again = model(tokens)[..., :257], theirs(tokens).logits, back(tokens)[..., :257]
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (again - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert back.config.embedding == "plain" and not back.config.tie_weights


@pytest.mark.parametrize("home", CLASSES)
def test_models_that_transformers_made_come_in_with_equal_logits(home, tmp_path, monkeypatch):
    own = getattr(transformers, home)
    theirs = own(own.config_class(vocab_size=257, **(SHARED if home != GPT2 else {}), **THEIR_CONFIGS[home])).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.2)
    theirs.save_pretrained(tmp_path / "hf")
    call(import_hf, monkeypatch, tmp_path / "hf", tmp_path / "in", "--tokenizer", "byte")
    assert verify_checkpoint(tmp_path / "in")["version"] == VERSION
    model = load_model(tmp_path / "in")
    tokens = torch.randint(0, 257, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        got, expected = model(tokens)[..., :257], theirs(tokens).logits
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    if home not in (MISTRAL, LLAMA):  # a Mistral without a window goes home as a Llama, half the biases as all
        exported = to_tensors(model.config, dict(model.named_parameters()))
        for name, tensor in load_file(tmp_path / "hf" / "model.safetensors").items():
            assert torch.equal(exported[name], tensor), name


def test_files_as_openai_published_them(tmp_path, monkeypatch):
    """No prefix, the causal mask beside the weights, a short config.json, GPT-2's two vocabulary files."""
    config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, n_positions=12)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    names = {name.removeprefix("transformer."): tensor.clone() for name, tensor in theirs.state_dict().items()}
    del names["lm_head.weight"]
    names["h.0.attn.bias"] = torch.ones(1, 1, 12, 12).tril()
    names["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    source = tmp_path / "gpt2"
    source.mkdir()
    save_file(names, source / "model.safetensors")
    short = {"architectures": [GPT2], "model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 2, "n_ctx": 12}
    (source / "config.json").write_text(json.dumps({**short, "n_positions": 12, "vocab_size": 50257}))
    write_tokenizer_files(load_tokenizer("gpt2"), tmp_path, 12)
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).rename(source / name)
    call(import_hf, monkeypatch, source, tmp_path / "in")
    model = load_model(tmp_path / "in")
    tokens = torch.randint(0, 50257, (1, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens)[..., :50257], theirs(tokens).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", ["124m", "355m", "774m", "1p3b"])
def test_presets_have_a_home(size):
    assert home_of(PRESETS[f"gpt2-{size}"]) == GPT2
    assert home_of(PRESETS[f"llama-{size}"]) == LLAMA


LLAMA_LIKE = {"position": "rope", "norm": "rmsnorm", "mlp": "swiglu"}


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"attention": "differential"}, "differential"),
        ({"qk_norm": True}, "QK-norm with learned"),
        ({"position": "rope", "qk_norm": True}, "QK-norm with LayerNorm"),
        ({**LLAMA_LIKE, "qk_norm": True}, "biases with QK-norm"),
        ({"position": "rope", "window": 4, "window_pattern": "SL"}, "window_pattern"),
        ({"n_kv_head": 2}, "n_kv_head"),
        ({"value_residual": True}, "model.value_residual True"),
        ({"value_embeddings": 1}, "model.value_embeddings 1"),
        ({"logit_softcap": 30.0}, "model.logit_softcap 30.0"),
        ({"scalar_head": True}, "model.scalar_head True"),
        ({"window": 4}, "window"),
        ({"norm": "rmsnorm"}, "RMSNorm"),
        ({"mlp": "swiglu"}, "SwiGLU"),
        ({"position": "rope", "mlp": "swiglu"}, "SwiGLU"),
        ({"position": "rope", "norm": "rmsnorm", "mlp": "relu2"}, "relu2"),
        ({"position": "rope", "norm": "rmsnorm", "mlp": "swiglu", "window": 4}, "biases"),
    ],
)
def test_what_has_no_home_is_refused_by_name(options, names):
    with pytest.raises(UserError, match=names):
        home_of(small_config(**options))


@pytest.mark.parametrize(
    "change", [{"attention": "linear"}, {"position": "alibi"}, {"norm": "none"}, {"mlp": "geglu"}], ids=str
)
def test_kinds_that_export_does_not_know_are_refused(change):
    """By lists of what it knows: another kind in the model's code must not pass for one that is like it."""
    config = small_config(position="rope", norm="layernorm")
    [(name, value)] = change.items()
    object.__setattr__(config, name, value)  # as if it were one of the model's kinds
    with pytest.raises(UserError, match=f"has model.{name} {value}: this model can't be exported"):
        home_of(config)


def test_an_option_that_export_does_not_know_is_refused_where_it_is_used():
    @dataclasses.dataclass(frozen=True)
    class LaterConfig(ModelConfig):
        softcap: float = 0.0

    assert home_of(LaterConfig()) == GPT2
    with pytest.raises(UserError, match=r"has model.softcap 30.0: this model can't be exported"):
        home_of(LaterConfig(softcap=30.0))


@pytest.mark.parametrize(
    "tokenizer",
    [
        load_tokenizer("gpt2"),
        load_tokenizer("gpt2-8k"),
        load_tokenizer("byte"),
        CharTokenizer("añ \n😀"),
        CharTokenizer("ab", end_of_text=True),
    ],
    ids=["gpt2", "gpt2-8k", "byte", "char", "char with end"],
)
def test_tokenizers_read_the_same_in_transformers(tokenizer, tmp_path):
    write_tokenizer_files(tokenizer, tmp_path, 64)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    symbols = tokenizer.spec.get("symbols", "Hello  world,\n\n\tit's 1234 naïve 日本語 😀 ﬁ \u00a0 e\u0301")
    for text in (symbols, symbols[::-1], symbols * 3):
        ids = tokenizer.encode(text).tolist()
        assert theirs.encode(text, add_special_tokens=False) == ids
        assert theirs.decode(ids) == text
    if tokenizer.end_of_text_id is not None:
        assert theirs.convert_tokens_to_ids(END_OF_TEXT) == theirs.eos_token_id == tokenizer.end_of_text_id
        assert theirs(text).input_ids == tokenizer.prompt(text)
    assert theirs("").input_ids == tokenizer.prompt("")
    assert recognise_tokenizer(tmp_path, {}).spec == tokenizer.spec


def test_gpt2_is_recognised_in_files_that_transformers_saved(tmp_path):
    write_tokenizer_files(load_tokenizer("gpt2"), tmp_path / ".", 64)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    transformers.AutoTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path / "saved")
    # what it saves lacks our own description; any other that puts an id before a text is not quite GPT-2's
    assert recognise_tokenizer(tmp_path / "saved", {"longhaul": {}}).spec["kind"] == "gpt2"
    assert recognise_tokenizer(tmp_path / "saved", {"model_type": "gpt2"}).spec["kind"] == "huggingface"
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        recognise_tokenizer(tmp_path / "nothing", {})


def test_an_export_that_differs_is_not_published(tmp_path, monkeypatch):
    checkpoint = write_checkpoint(tmp_path, noise=0.3)
    honest = to_config

    def with_another_activation(*arguments):
        return honest(*arguments) | {"activation_function": "gelu"}

    monkeypatch.setattr(export, "to_config", with_another_activation)
    monkeypatch.setattr(sys, "argv", ["script", str(checkpoint), str(tmp_path / "hf")])
    with pytest.raises(UserError, match="other logits"):
        export_hf.main()
    assert not list(tmp_path.glob("*hf*"))


def test_folders_in_the_way_and_foreign_models_are_refused(tmp_path, monkeypatch):
    checkpoint = write_checkpoint(tmp_path)
    for script, source in ((export_hf, checkpoint), (import_hf, tmp_path)):
        monkeypatch.setattr(sys, "argv", ["script", str(source), str(checkpoint)])
        with pytest.raises(UserError, match="already there"):
            script.main()
        for out, message in ((".", "name a new folder"), (checkpoint / "checkpoint.json" / "x", "can't be written")):
            monkeypatch.setattr(sys, "argv", ["script", str(source), str(out)])
            with pytest.raises(UserError, match=message):
                script.main()
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    save_file({"a": torch.zeros(1)}, foreign / "model.safetensors")
    plain_gpt2 = to_config(small_config(), None, ())
    for change, names in (
        ({"architectures": ["BloomForCausalLM"]}, "Bloom"),
        ({"activation_function": "relu"}, "relu"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ):
        (foreign / "config.json").write_text(json.dumps(plain_gpt2 | change))
        monkeypatch.setattr(sys, "argv", ["script", str(foreign), str(tmp_path / "in"), "--tokenizer", "byte"])
        with pytest.raises(UserError, match=names):
            import_hf.main()


def test_transformers_is_imported_only_where_it_is_used():
    code = (
        "import sys, eval.hugging_face.export, eval.hugging_face.import_model, eval.generation.texts; "
        "sys.exit(bool({'transformers', 'tokenizers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT, timeout=120).returncode == 0


def test_tensors_are_a_copy_of_the_model_cropped_to_the_vocabulary():
    model = small_model(vocab_size=61, vocab_multiple=16)
    tensors = to_tensors(model.config, dict(model.named_parameters()))
    assert tensors["transformer.wte.weight"].shape == (61, 32)
    assert "lm_head.weight" not in tensors


@pytest.mark.parametrize("kind", ["gpt2", "llama3", "prepended"])
def test_texts_are_those_that_generate_writes(kind, tmp_path, monkeypatch):
    checkpoint = tmp_path / "checkpoint"
    if kind == "gpt2":
        checkpoint = write_checkpoint(tmp_path, tokenizer="gpt2", noise=0.3, block_size=40)
    else:  # whose texts start with another id than they end with; without a template, as some on the hub are
        two_id_folder(tmp_path / "source", kind, template=kind == "prepended", block_size=40)
        call(import_hf, monkeypatch, tmp_path / "source", checkpoint)
    call(export_hf, monkeypatch, checkpoint, tmp_path / "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokenizer, own = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf"), load_checkpoint(checkpoint).tokenizer
    for prompt in ("the theory of", ""):
        call(generate, monkeypatch, checkpoint, "--prompt", prompt, "--preset=greedy", "--max-tokens=12",
             "--json", tmp_path / "texts.json")  # fmt: skip
        (ours,) = json.loads((tmp_path / "texts.json").read_text())["texts"]
        given = tokenizer(prompt, return_tensors="pt") if prompt else {}  # generate itself puts the id
        ids = model.generate(**given, max_new_tokens=12, do_sample=False)[0]
        opened = len(own.prompt(prompt))
        assert ids[:opened].tolist() == own.prompt(prompt)
        assert own.decode(ids[opened:].numpy(), continues=bool(prompt)) == ours["text"], prompt


def test_every_combination_of_options_has_a_home_and_comes_back_or_is_refused_in_one_line():
    homes = set()
    for options in all_options():
        config = small_config(**options)
        refusal = None
        try:
            values = to_config(config, 0, (0,))
        except UserError as error:
            refusal = str(error)
        if refusal is not None:
            assert refusal.endswith("this model can't be exported")
            assert "\n" not in refusal
            continue
        homes.add(values["architectures"][0])
        assert plain(from_config(values, {"a.bias": torch.ones(1)} if config.bias else {})) == plain(config)
    assert homes == set(CLASSES)
