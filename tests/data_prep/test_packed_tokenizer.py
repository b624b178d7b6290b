"""Tokenizer specs that strangers wrote: a sentence, before memory is taken."""

import base64
import json
import os
import tracemalloc
import zlib
from typing import Any

import pytest

from common.errors import UserError
from data_prep.tokenization import packed_tokenizer
from data_prep.tokenization.huggingface_tokenizer import HuggingFaceTokenizer
from data_prep.tokenization.loading import load_tokenizer
from data_prep.tokenization.packed_tokenizer import pack, parse, unpack
from data_prep.tokenization.tokenizer import ByteTokenizer, CharTokenizer
from tests.helpers.hf_tokenizers import tokenizer_json

pytest.importorskip("tokenizers")

TEXT = tokenizer_json("gpt2")
SPEC = HuggingFaceTokenizer.of(TEXT, 1).spec


def compressed(block: bytes, times: int) -> str:
    """Many times the same, packed, without having it all at once."""
    packing = zlib.compressobj(9)
    parts = [packing.compress(block) for _ in range(times)]
    return base64.b64encode(b"".join(parts) + packing.flush()).decode()


def test_a_spec_is_read_as_it_was_packed():
    assert unpack(pack(TEXT)) == TEXT
    assert load_tokenizer(SPEC).spec == SPEC


@pytest.mark.parametrize(
    ("packed", "words"),
    [
        (compressed(b'"' + b" " * (1 << 20), 400), "the carried tokenizer.json has more than 67,108,864 bytes"),
        (compressed(b"[]," * (1 << 18), 60), "tokenizer.json has 47,185,920 characters and 31,457,280 values"),
        (compressed(b"[" * 100_000, 1), "tokenizer.json is nested too deeply"),
        (pack(json.dumps(json.loads(TEXT)["model"])), "tokenizer.json can't be read: "),
    ],
)
def test_a_bomb_is_refused_before_it_takes_memory(packed: str, words: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=words):
            load_tokenizer(SPEC | {"packed": packed})
        assert tracemalloc.get_traced_memory()[1] < 3 * packed_tokenizer.MOST_BYTES
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"packed": "x"}, "the carried tokenizer.json is damaged"),
        ({"packed": pack(TEXT)[:800]}, "the carried tokenizer.json is damaged .*: copy the checkpoint"),
        ({"packed": 7}, "the carried tokenizer.json is damaged"),
        ({"packed": pack("[]")}, "tokenizer.json holds no object"),
        ({"packed": pack("{")}, "tokenizer.json is damaged"),
        ({"end_of_text_id": 1_000_000}, "the id that ends a text is 1000000, but the tokenizer has 340 ids"),
        ({"end_of_text_id": -1}, "the id that ends a text is -1"),
        ({"end_of_text_id": "1"}, "the id that ends a text is '1'"),
        ({"begin_of_text_id": 5000, "begins_contexts": True, "other_end_ids": []}, "the id that starts a text is 5000"),
        ({"begin_of_text_id": 0}, "the tokenizer's spec is damaged"),
        ({"vocab_size": 1 << 40}, "the huggingface tokenizer has 340 ids, but its spec records 1099511627776"),
        ({"kind": ["char"]}, "unknown tokenizer"),
        ({"sha256": None}, "is not the one the data were made with"),
    ],
)
def test_a_spec_with_something_wrong_is_one_line(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_tokenizer(SPEC | changed)


@pytest.mark.parametrize("changed", [{"symbols": 5}, {"symbols": ["a", "bc"]}, {"symbols": ""}, {"vocab_size": 10**9}])
def test_a_character_vocabulary_with_something_wrong_is_one_line(changed: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        load_tokenizer(CharTokenizer("abc").spec | changed)


def test_the_ids_of_a_kind_are_those_of_its_spec():
    with pytest.raises(UserError, match="the byte tokenizer has 257 ids, but its spec records 2000000000"):
        load_tokenizer(ByteTokenizer().spec | {"vocab_size": 2_000_000_000})


def test_an_id_far_beyond_the_number_of_tokens_takes_no_memory():
    description = json.loads(TEXT)
    description["model"]["vocab"]["zzz"] = 2**32 - 1
    with pytest.raises(UserError, match=r"tokenizer\.json has 341 tokens and 4,294,967,296 ids"):
        HuggingFaceTokenizer.of(json.dumps(description), 1)


@pytest.mark.parametrize("step", [7, ["ByteLevel"], {"type": "Sequence", "pretokenizers": 3}])
def test_a_file_of_another_shape_is_one_line(step: Any) -> None:
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        HuggingFaceTokenizer.of(json.dumps(json.loads(TEXT) | {"pre_tokenizer": step}), 1)


def test_the_largest_files_in_use_are_read():
    """As many tokens and merges as Gemma's, in no less text."""
    vocabulary = ",".join(f'"{number:07d} of many": {number}' for number in range(262_000))
    merges = ",".join(f'["{number:07d}", "and {number:07d}"]' for number in range(514_000))
    assert len(parse(f'{{"model": {{"vocab": {{{vocabulary}}}, "merges": [{merges}]}}}}')["model"]["vocab"]) == 262_000


def test_what_a_manifest_could_not_carry_is_refused_when_it_is_packed() -> None:
    with pytest.raises(UserError, match="more than a checkpoint can carry"):
        pack(os.urandom(10_000_000).hex())
