"""Longhaul's tokenizers as the files that `transformers` loads."""

import json
import shutil
from pathlib import Path
from typing import Any

from common.publish import write_json_whole, write_whole
from data_prep.chat.chat_tokenizer import ChatTokenizer
from data_prep.tokenization.byte_level import BYTE_SHOWN_AS
from data_prep.tokenization.cached_files import gpt2_cache_file, place_gpt2_files
from data_prep.tokenization.huggingface_tokenizer import HuggingFaceTokenizer
from data_prep.tokenization.tokenizer import END_OF_TEXT, Gpt2Tokenizer, Tokenizer

SPEC_FILE = "longhaul_tokenizer.json"
TEMPLATE_FILE = "chat_template.jinja"


def write_tokenizer_files(tokenizer: Tokenizer, folder: Path, block_size: int) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json`, our own identity, and for GPT-2 its two vocabulary files.

    A text is encoded with the id before it that our prompts start with, unless `add_special_tokens` is off.
    """
    from tokenizers import AddedToken

    if isinstance(tokenizer, ChatTokenizer):
        write_tokenizer_files(tokenizer.base, folder, block_size)
        _add_chat(tokenizer, folder)
        return
    if isinstance(tokenizer, HuggingFaceTokenizer):
        _write_theirs(tokenizer, folder, block_size)
        return
    is_gpt2s = isinstance(tokenizer, Gpt2Tokenizer)
    built = _gpt2(tokenizer, folder) if is_gpt2s else {"byte": _byte, "char": _char}[tokenizer.spec["kind"]](tokenizer)
    end = None if tokenizer.end_of_text_id is None else END_OF_TEXT
    if end and tokenizer.end_of_text_id is not None:
        built.add_special_tokens([AddedToken(end, special=True, normalized=False)])
        built.post_processor = _opening(end, tokenizer.end_of_text_id)
    built.save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # GPT-2's own class would drop what opens a text
        "model_max_length": block_size,
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
    }
    if end:
        settings |= {"bos_token": end, "eos_token": end}
    if is_gpt2s:
        settings["unk_token"] = end
    write_json_whole(folder / "tokenizer_config.json", settings)
    write_json_whole(folder / SPEC_FILE, tokenizer.spec)


def _add_chat(tokenizer: ChatTokenizer, folder: Path) -> None:
    """Add the tokens around turns and the template to the files of the tokenizer's base."""
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Built

    built = Built.from_file(str(folder / "tokenizer.json"))
    built.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in tokenizer.turn_tokens])
    built.save(str(folder / "tokenizer.json"))
    path = folder / "tokenizer_config.json"
    settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    # in this file, too: it is where transformers before 4.43, vLLM and llama.cpp's converter look for it
    write_json_whole(path, settings | {"chat_template": tokenizer.template.text})
    write_whole(folder / TEMPLATE_FILE, tokenizer.template.text)
    write_json_whole(folder / SPEC_FILE, tokenizer.spec)


def _write_theirs(tokenizer: HuggingFaceTokenizer, folder: Path, block_size: int) -> None:
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": block_size}
    settings |= {
        "bos_token": tokenizer.text_of(tokenizer.begin_of_text_id),
        "eos_token": tokenizer.text_of(tokenizer.end_of_text_id),
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer.json").write_text(_with_opening(tokenizer), encoding="utf-8")
    write_json_whole(folder / "tokenizer_config.json", settings)
    write_json_whole(folder / SPEC_FILE, tokenizer.spec)


def _with_opening(tokenizer: HuggingFaceTokenizer) -> str:
    """Its tokenizer.json, which puts the id before a text that our prompts start with."""
    begin = tokenizer.begin_of_text_id
    if tokenizer.begins_contexts or begin is None:
        return tokenizer.json
    from tokenizers import Tokenizer as Built
    from tokenizers import processors

    built = Built.from_str(tokenizer.json)
    opening = _opening(tokenizer.text_of(begin), begin)
    own = built.post_processor
    built.post_processor = opening if own is None else processors.Sequence([own, opening])
    text: str = built.to_str()
    return text


def _opening(token: str, number: int) -> Any:
    """What puts a token before a text, as `Tokenizer.prompt` does, and before each of two."""
    from tokenizers import processors

    return processors.TemplateProcessing(
        single=f"{token}:0 $A:0", pair=f"{token}:0 $A:0 {token}:1 $B:1", special_tokens=[(token, number)]
    )


def _gpt2(tokenizer: Tokenizer, folder: Path) -> Any:
    from tokenizers import models

    place_gpt2_files()
    shutil.copyfile(gpt2_cache_file("encoder.json"), folder / "vocab.json")
    shutil.copyfile(gpt2_cache_file("vocab.bpe"), folder / "merges.txt")
    if tokenizer.spec["kind"] != "gpt2":
        _shorten(folder, tokenizer.vocab_size - 1)
    return _byte_level(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")), split=True)


def _shorten(folder: Path, end_of_text_id: int) -> None:
    """Leave only ids before the end of text's, and the merges that make them."""
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    ids: dict[str, int] = json.loads(vocabulary.read_text(encoding="utf-8"))
    kept = {token: number for token, number in ids.items() if number < end_of_text_id}
    vocabulary.write_text(json.dumps(kept | {END_OF_TEXT: end_of_text_id}), encoding="utf-8")
    version, *pairs = merges.read_text(encoding="utf-8").splitlines()
    merges.write_text("\n".join([version, *pairs[: end_of_text_id - len(BYTE_SHOWN_AS)], ""]), encoding="utf-8")


def _byte(tokenizer: Tokenizer) -> Any:
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


def _char(tokenizer: Tokenizer) -> Any:
    from tokenizers import Tokenizer as Built
    from tokenizers import decoders, models

    vocabulary = {symbol: number for number, symbol in enumerate(tokenizer.spec["symbols"])}
    if tokenizer.end_of_text_id is not None:
        vocabulary[END_OF_TEXT] = tokenizer.end_of_text_id
    built = Built(models.BPE(vocabulary, []))
    built.decoder = decoders.Fuse()
    return built
