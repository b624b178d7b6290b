"""Which tokenizer a Hugging Face folder has: one exported by Longhaul, GPT-2's, or one of its own, stored whole in the
checkpoint.

`tokenizer.json` is what counts. Where the files beside it differ from it, it depends on the version of
`transformers` and the tokenizer's class which one it reads: such a folder is refused.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from common.checkpoint_manifest import TokenizerSpec
from common.errors import UserError
from common.json_file import MOST_BYTES
from data_prep.chat.chat_tokenizer import ChatTokenizer
from data_prep.chat.template import MOST_BYTES as MOST_TEMPLATE_BYTES
from data_prep.chat.template import Template
from data_prep.tokenization.cached_files import gpt2_cache_file, place_gpt2_files
from data_prep.tokenization.huggingface_tokenizer import (
    Framing,
    HuggingFaceTokenizer,
    check_carried,
    without_space_before,
)
from data_prep.tokenization.loading import load_tokenizer
from data_prep.tokenization.packed_tokenizer import merge_pairs
from data_prep.tokenization.tokenizer import END_OF_TEXT, Tokenizer
from eval.hugging_face.hf_config import OWN_FACTS, with_defaults
from eval.hugging_face.hub_files import AGAIN, read_content, read_described, read_tokenizer_json, stands
from eval.hugging_face.hub_shapes import NamedToken, TokenizerDescription, TokenizerSettings
from eval.hugging_face.tokenizer_files import SPEC_FILE, TEMPLATE_FILE

GPT2_CLASS = "GPT2Tokenizer"  # of transformers, with or without Fast
GPT2_CLASS_OF_TYPES = ("gpt2", "starcoder2")  # models whose tokenizer is of that class where no file names another
GPT2_MERGES = "vocab.bpe"
MOST_IDS = 1 << 32  # `tokenizers` counts them in 32 bits


def recognise_tokenizer(folder: Path, values: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a Hugging Face folder.

    Args:
        values: the folder's config.json.

    Raises UserError where it is unclear or can't be used.
    """
    if stands(folder / SPEC_FILE):
        return _exported(folder, values)
    settings: TokenizerSettings = {}
    if stands(path := folder / "tokenizer_config.json"):
        settings = read_described(path, TokenizerSettings)
    if not stands(folder / "tokenizer.json"):
        if _has_gpt2_files(folder, settings):
            return load_tokenizer("gpt2")
        raise UserError(
            f"{folder} has no tokenizer.json: give --tokenizer gpt2 or byte if the model was trained with one of them, "
            "or save its tokenizer there with transformers' save_pretrained"
        )
    text, description = read_tokenizer_json(folder / "tokenizer.json")
    ids = token_ids(description)
    _check_settings(folder, description, settings, ids, values)
    ends = text_ends(folder, values, settings, ids)
    if is_gpt2(description, framed=OWN_FACTS in values) and {ends.begin, *ends.ends} <= {ids[END_OF_TEXT], None}:
        return load_tokenizer("gpt2")
    return _with_template(folder, _carried(folder, text, description, ends))


def template_of(folder: Path) -> str | None:
    """A folder's chat template; None where it has none, or several by name."""
    if stands(path := folder / TEMPLATE_FILE):
        return read_content(path, MOST_TEMPLATE_BYTES).decode("utf-8", "replace")
    found = _object_if_there(folder / "tokenizer_config.json").get("chat_template")
    return found if isinstance(found, str) else None


def _with_template(folder: Path, tokenizer: Tokenizer) -> Tokenizer:
    """With the folder's chat template, where there is one that can be used; a note where it can't be."""
    text = template_of(folder)
    if text is None:
        return tokenizer
    try:
        return ChatTokenizer(tokenizer, (), Template(text))
    except UserError as error:
        print(f"note: imported without its chat template: {error}", file=sys.stderr)
        return tokenizer


def _carried(folder: Path, text: str, description: TokenizerDescription, ends: "TextEnds") -> Tokenizer:
    """A tokenizer of the folder's own; without a framing where one id, before every text, is all there is to it."""
    check_carried(description)
    if not ends.ends:
        raise UserError(f"{folder / 'config.json'} has no id that ends a text: write its eos_token_id into it")
    end, *others = ends.ends
    before, after = adds_around(description) or ([], [])
    begin = end if ends.begin is None else ends.begin
    if before not in ([], [begin]) or after not in ([], [end]):
        raise UserError(
            f"tokenizer.json puts the ids {before} before a text and {after} after it, but config.json has {begin} and "
            f"{end}: make them agree"
        )
    plain = not (description.get("normalizer") or puts_space_before(description) or before or others)
    framing = None if plain and begin == end else Framing(begin, begins_contexts=bool(before), other_end_ids=others)
    return HuggingFaceTokenizer.of(text, end, framing)


@dataclass(frozen=True)
class TextEnds:
    """The id that a model's texts start with, if there is one, and those that end them, the tokenizer's own first."""

    begin: int | None
    ends: tuple[int, ...]


def text_ends(folder: Path, values: Mapping[str, Any], settings: TokenizerSettings, ids: Mapping[str, int]) -> TextEnds:
    """The ids in config.json, else in tokenizer_config.json, else the defaults of the model's class.

    Raises UserError where the first two differ.
    """
    generation = _object_if_there(folder / "generation_config.json")
    found: dict[str, list[int]] = {}
    for kind in ("bos", "eos"):
        stated = _ids_in(values, f"{kind}_token_id")
        if stated and kind == "eos":
            stated += [i for i in _ids_in(generation, "eos_token_id") if i not in stated]
        name = _content(settings.get("bos_token") if kind == "bos" else settings.get("eos_token"))
        named = None if name is None else ids.get(name)
        if stated and named is not None and named not in stated:
            verb = "start" if kind == "bos" else "end"
            raise UserError(
                f"texts of the model in {folder} {verb} with id {stated[0]} by config.json, with {named} ({name}) by "
                f"tokenizer_config.json: write the right {kind}_token_id into config.json"
            )
        found[kind] = [*([] if named is None else [named]), *(i for i in stated if i != named)]
    if not any(found.values()) and values.get("model_type"):
        defaults = with_defaults(values)
        found = {kind: _ids_in(defaults, f"{kind}_token_id") for kind in found}
    return TextEnds(next(iter(found["bos"]), None), tuple(found["eos"]))


def token_ids(description: TokenizerDescription) -> dict[str, int]:
    """The ids of a tokenizer.json by their tokens. Raises UserError where it has none."""
    vocabulary = (description.get("model") or {}).get("vocab")
    if not isinstance(vocabulary, dict):
        raise UserError("tokenizer.json has no vocabulary by name, so it is no BPE: Longhaul can't use it")
    added = {token["content"]: token["id"] for token in description.get("added_tokens") or []}
    ids: dict[str, int] = vocabulary | added
    if wrong := [name for name, i in ids.items() if type(i) is not int or not 0 <= i < MOST_IDS]:
        first = f"the id of {wrong[0][:40]!r} is {str(ids[wrong[0]])[:40]}"
        raise UserError(f"tokenizer.json is damaged ({first}): {AGAIN}")
    return ids


def is_gpt2(description: TokenizerDescription, *, framed: bool = False) -> bool:
    """Whether a tokenizer.json gives the same ids as GPT-2's for every text.

    Args:
        framed: it may put its end of text before a text, as those that Longhaul exports do.
    """
    place_gpt2_files()
    expected = json.loads(gpt2_cache_file("encoder.json").read_text(encoding="utf-8"))
    model: Mapping[str, Any] = description.get("model") or {}
    splitting: Mapping[str, Any] = description.get("pre_tokenizer") or {}
    return (
        {END_OF_TEXT: expected[END_OF_TEXT]} | token_ids(description) == expected
        and merge_pairs(model.get("merges")) == _merges(gpt2_cache_file(GPT2_MERGES))
        and not any(model.get(option) for option in ("dropout", "byte_fallback", "ignore_merges"))
        and not any(model.get(option) for option in ("continuing_subword_prefix", "end_of_word_suffix"))
        and not description.get("normalizer")
        and (splitting.get("type"), splitting.get("add_prefix_space")) == ("ByteLevel", False)
        and splitting.get("use_regex", True)
        and adds_around(description) in ([], *([[[expected[END_OF_TEXT]], []]] if framed else []))
        and all(token["content"] == END_OF_TEXT for token in description.get("added_tokens") or [])
    )


def adds_around(description: TokenizerDescription) -> list[list[int]]:
    """The ids that the tokenizer puts before and after a text: two lists, or none where it puts nothing."""
    processor = description.get("post_processor") or {}
    for part in processor.get("processors", [processor]):
        if part.get("type") == "TemplateProcessing":
            if any(around := _template_ids(part)):
                return around
        elif part.get("type") not in (None, "ByteLevel"):
            raise UserError(
                f"tokenizer.json frames texts by {part['type']}, which Longhaul can't: use a model with another "
                "tokenizer"
            )
    return []


def _template_ids(template: Mapping[str, Any]) -> list[list[int]]:
    """The ids before and after a text; a list for each. Raises UserError for a template that lacks something."""
    around: list[list[int]] = [[], []]
    place = 0
    try:
        for piece in template["single"]:
            if "Sequence" in piece:
                place = 1
            else:
                around[place] += template["special_tokens"][str(piece["SpecialToken"]["id"])]["ids"]
    except KeyError as error:
        raise UserError(f"tokenizer.json is damaged (its template lacks {error}): {AGAIN}") from None
    return around


def puts_space_before(description: TokenizerDescription) -> bool:
    """Whether a text's first word gets a space before it."""
    return without_space_before(description) != description


def _check_settings(
    folder: Path,
    description: TokenizerDescription,
    settings: TokenizerSettings,
    ids: Mapping[str, int],
    values: Mapping[str, Any],
) -> None:
    """Raises UserError where the files beside tokenizer.json describe another tokenizer."""
    path = folder / "tokenizer_config.json"
    again = "load the tokenizer with the transformers that the model was trained with, and save it again"
    for name, number in _added(folder, settings).items():
        if ids.get(name) != number:
            raise UserError(f"the files beside {folder / 'tokenizer.json'} add a token {name!r} that it lacks: {again}")
    of_gpt2_class = str(settings.get("tokenizer_class") or "").removesuffix("Fast") == GPT2_CLASS
    if not settings.get("tokenizer_class"):
        of_gpt2_class = values.get("model_type") in GPT2_CLASS_OF_TYPES
    space, puts = settings.get("add_prefix_space"), puts_space_before(description)
    if space is None and of_gpt2_class:
        space = False
    if space is not None and bool(space) != puts:
        does = "puts" if puts else "doesn't put"
        raise UserError(f"tokenizer.json {does} a space before a text, {path} has it otherwise: {again}")
    if of_gpt2_class and description.get("normalizer"):
        raise UserError(f"tokenizer.json has a normaliser, which the class that {path} names ignores: {again}")


def _exported(folder: Path, values: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a folder that Longhaul exported. Raises UserError where its files have been changed since."""
    tokenizer = load_tokenizer(read_described(folder / SPEC_FILE, TokenizerSpec))
    begin, ends = _ids_in(values, "bos_token_id"), _ids_in(values, "eos_token_id")
    changed = begin not in ([], [tokenizer.begin_of_text_id]) or not set(ends) <= {*tokenizer.end_ids}
    if stands(path := folder / "tokenizer.json"):
        changed |= not _describes(*read_tokenizer_json(path), tokenizer)
    if isinstance(tokenizer, ChatTokenizer):
        changed |= template_of(folder) != tokenizer.template.text
    if changed:
        raise UserError(
            f"{folder / SPEC_FILE} describes another tokenizer than the files beside it: if these have been changed "
            "since the export, remove it"
        )
    return tokenizer


def _describes(text: str, description: TokenizerDescription, tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer.json, perhaps saved again by another version of `tokenizers`, is still this tokenizer."""
    if isinstance(tokenizer, ChatTokenizer):
        ids = token_ids(description)
        if any(ids.get(name) != tokenizer.special_spellings[name] for name in tokenizer.turn_tokens):
            return False
        added = [one for one in description.get("added_tokens") or [] if one["content"] not in tokenizer.turn_tokens]
        without = cast(TokenizerDescription, {**description, "added_tokens": added})
        return _describes(json.dumps(without), without, tokenizer.base)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        ours = HuggingFaceTokenizer.normal_form(tokenizer.json)
        theirs = HuggingFaceTokenizer.normal_form(text)
        return all(ours[part] == theirs[part] for part in ("model", "normalizer", "pre_tokenizer", "added_tokens"))
    if tokenizer.spec["kind"] == "gpt2":
        return is_gpt2(description, framed=True)
    plain = not (description.get("normalizer") or puts_space_before(description))
    return plain and max(token_ids(description).values(), default=-1) + 1 == tokenizer.vocab_size


def _has_gpt2_files(folder: Path, settings: TokenizerSettings) -> bool:
    """Whether `vocab.json` and `merges.txt` are GPT-2's and nothing is added to them."""
    if not all(stands(folder / name) for name in ("vocab.json", "merges.txt")) or settings.get("add_prefix_space"):
        return False
    place_gpt2_files()
    expected = json.loads(gpt2_cache_file("encoder.json").read_text(encoding="utf-8"))
    vocabulary = {END_OF_TEXT: expected[END_OF_TEXT]} | read_described(folder / "vocab.json", dict[str, int])
    vocabulary |= _added(folder, settings)
    return vocabulary == expected and _merges(folder / "merges.txt") == _merges(gpt2_cache_file(GPT2_MERGES))


def _added(folder: Path, settings: TokenizerSettings) -> dict[str, int]:
    """Ids of the tokens that the files beside a vocabulary add to it. Raises UserError for anything else."""
    added: dict[str, int] = {}
    for number, token in (settings.get("added_tokens_decoder") or {}).items():
        if not (number.isdecimal() and len(number) < 20):
            path = folder / "tokenizer_config.json"
            raise UserError(f"{path} is damaged (added_tokens_decoder: {number[:40]!r} is not an id): {AGAIN}")
        added[token["content"]] = int(number)
    if stands(path := folder / "added_tokens.json"):
        added |= read_described(path, dict[str, int])
    return added


def _merges(path: Path) -> list[tuple[str, ...]]:
    try:
        lines = read_content(path, MOST_BYTES).decode().replace("\r\n", "\n").replace("\r", "\n").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged ({error}): {AGAIN}") from None
    return [tuple(line.split()) for line in lines if line.strip() and not line.startswith("#version")]


def _content(token: str | NamedToken | None) -> str | None:
    """A token as tokenizer_config.json has it: its text, or an object with it."""
    return token["content"] if isinstance(token, dict) else token


def _ids_in(values: Mapping[str, Any], name: str) -> list[int]:
    found = values.get(name)
    found = found if isinstance(found, list) else [] if found is None else [found]
    if not all(type(number) is int and abs(number) < MOST_IDS for number in found):
        raise UserError(f"{name} is {str(values[name])[:80]}: use an id or a list of ids")
    return list(dict.fromkeys(found))


def _object_if_there(path: Path) -> dict[str, Any]:
    return read_described(path, dict[str, Any]) if stands(path) else {}
