"""Longhaul's tokenizers as the files that `transformers` loads, and recognising them in such a folder."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.publish import write_json_whole
from data_prep.byte_level import BYTE_SHOWN_AS
from data_prep.cached_files import gpt2_cache_file, place_gpt2_files
from data_prep.tokenization import (
    END_OF_TEXT,
    HuggingFaceTokenizer,
    Tokenizer,
    load_tokenizer,
)

SPEC_FILE = "longhaul_tokenizer.json"


def write_tokenizer_files(tokenizer: Tokenizer, folder: Path, block_size: int) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json`, our own identity, and for GPT-2 its two vocabulary files.

    Raises UserError where the `tokenizers` package, which comes with `transformers`, is missing.
    """
    try:
        from tokenizers import AddedToken
    except ImportError:
        raise UserError("exporting a tokenizer needs transformers: pip install transformers") from None
    kind = tokenizer.spec["kind"]
    if isinstance(tokenizer, HuggingFaceTokenizer):
        _write_theirs(tokenizer, folder, block_size)
        return
    built = {"gpt2": _gpt2, "byte": _byte, "char": _char}[kind](tokenizer, folder)
    end = None if tokenizer.end_of_text_id is None else END_OF_TEXT
    if end:
        built.add_special_tokens([AddedToken(end, special=True, normalized=False)])
    built.save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {
        "tokenizer_class": "GPT2Tokenizer" if kind == "gpt2" else "PreTrainedTokenizerFast",
        "model_max_length": block_size,
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
    }
    if end:
        settings |= {"bos_token": end, "eos_token": end}
    if kind == "gpt2":
        settings["unk_token"] = end
    write_json_whole(folder / "tokenizer_config.json", settings)
    write_json_whole(folder / SPEC_FILE, tokenizer.spec)


def _write_theirs(tokenizer: HuggingFaceTokenizer, folder: Path, block_size: int) -> None:
    end = tokenizer.text_of(tokenizer.end_of_text_id)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": block_size}
    settings |= {"bos_token": end, "eos_token": end, "clean_up_tokenization_spaces": False}
    (folder / "tokenizer.json").write_text(tokenizer.json, encoding="utf-8")
    write_json_whole(folder / "tokenizer_config.json", settings)
    write_json_whole(folder / SPEC_FILE, tokenizer.spec)


def _gpt2(tokenizer: Tokenizer, folder: Path) -> Any:
    from tokenizers import models

    place_gpt2_files()
    shutil.copyfile(gpt2_cache_file("encoder.json"), folder / "vocab.json")
    shutil.copyfile(gpt2_cache_file("vocab.bpe"), folder / "merges.txt")
    return _byte_level(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")), split=True)


def _byte(tokenizer: Tokenizer, folder: Path) -> Any:
    from tokenizers import models, pre_tokenizers

    shown = {byte: character for character, byte in BYTE_SHOWN_AS.items()}
    assert set(shown.values()) == set(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {shown[byte]: byte for byte in range(256)} | {END_OF_TEXT: 256}
    return _byte_level(models.BPE(vocabulary, []), split=False)


def _byte_level(model: Any, *, split: bool) -> Any:
    from tokenizers import Tokenizer as Built
    from tokenizers import decoders, pre_tokenizers

    built = Built(model)
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split)
    built.decoder = decoders.ByteLevel()
    return built


def _char(tokenizer: Tokenizer, folder: Path) -> Any:
    from tokenizers import Tokenizer as Built
    from tokenizers import decoders, models

    vocabulary = {symbol: number for number, symbol in enumerate(tokenizer.spec["symbols"])}
    if tokenizer.end_of_text_id is not None:
        vocabulary[END_OF_TEXT] = tokenizer.end_of_text_id
    built = Built(models.BPE(vocabulary, []))
    built.decoder = decoders.Fuse()
    return built


def recognise_tokenizer(folder: Path, values: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a Hugging Face folder: one exported by Longhaul, GPT-2's, or theirs, carried along whole.

    Args:
        values: the folder's config.json.

    Raises UserError where it can't be told or carried.
    """
    if (folder / SPEC_FILE).is_file():
        return load_tokenizer(_read_json(folder / SPEC_FILE))
    for name, keys in (("vocab.json", []), ("tokenizer.json", ["model", "vocab"])):
        if (folder / name).is_file():
            vocabulary = _read_json(folder / name)
            for key in keys:
                vocabulary = vocabulary.get(key, {})
            place_gpt2_files()
            expected = json.loads(gpt2_cache_file("encoder.json").read_text(encoding="utf-8"))
            if isinstance(vocabulary, dict) and {END_OF_TEXT: expected[END_OF_TEXT]} | vocabulary == expected:
                return load_tokenizer("gpt2")
    if not (folder / "tokenizer.json").is_file():
        raise UserError(
            f"{folder} has no tokenizer.json: give --tokenizer gpt2 or byte if the model was trained with one of them, "
            "or save its tokenizer there with transformers' save_pretrained"
        )
    begin, end = values.get("bos_token_id"), values.get("eos_token_id")
    if not isinstance(end, int) or begin not in (end, None):
        raise UserError(
            f"texts of the model in {folder} begin with id {begin} and end with {end}: Longhaul has one id for both "
            "and can't prompt such a model rightly"
        )
    return HuggingFaceTokenizer.of((folder / "tokenizer.json").read_text(encoding="utf-8"), end)


def _read_json(path: Path) -> Any:
    """Raises UserError for a file that broke off, or a Git LFS pointer in its place."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read as JSON ({error}): download the model again") from None
