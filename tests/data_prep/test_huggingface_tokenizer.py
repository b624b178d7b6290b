"""Tokenizers out of a tokenizer.json: long texts cut where no id changes, whatever pattern splits them."""

import functools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import huggingface_tokenizer, inputs, tokenization
from data_prep.huggingface_tokenizer import HuggingFaceTokenizer
from data_prep.inputs import UnitReader
from data_prep.tokenization import Tokenizer
from tests.helpers.hf_tokenizers import BYTE_LEVEL, CORPUS, tokenizer_json

tokenizers = pytest.importorskip("tokenizers")

TEXTS = st.lists(
    st.sampled_from(
        ["the", "a", ".", "?)", "1", "234", " ", "  ", "\n", "\r\n", "\t", "日", "é", "😀", "'s", "\u00a0", "▁"]
    ),
    max_size=60,
).map("".join)


@functools.cache
def carried(kind: str) -> tuple[Tokenizer, Any]:
    """A tokenizer and what the package itself makes of the same file."""
    text = tokenizer_json(kind)
    reference = tokenizers.Tokenizer.from_str(text)
    return HuggingFaceTokenizer.of(text, reference.token_to_id("</s>")), reference


def whole_ids(reference: Any, text: str) -> list[int]:
    return list(reference.encode(text, add_special_tokens=False).ids)


@pytest.mark.parametrize("kind", BYTE_LEVEL)
@settings(max_examples=150, deadline=None)
@given(text=TEXTS, characters=st.integers(1, 12))
def test_long_texts_in_pieces_have_the_ids_of_the_whole(kind: str, text: str, characters: int) -> None:
    tokenizer, reference = carried(kind)
    before = tokenization.SEGMENT_CHARACTERS, huggingface_tokenizer.AROUND
    tokenization.SEGMENT_CHARACTERS, huggingface_tokenizer.AROUND = characters, 8
    try:
        assert tokenizer.encode(text).tolist() == whole_ids(reference, text)
    finally:
        tokenization.SEGMENT_CHARACTERS, huggingface_tokenizer.AROUND = before


@pytest.mark.parametrize("kind", [kind for kind in BYTE_LEVEL if kind != "across"])
def test_long_texts_are_cut_in_fact(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, reference = carried(kind)
    text = "".join(CORPUS) * 4
    monkeypatch.setattr(tokenization, "SEGMENT_CHARACTERS", 100)
    pieces = list(tokenization.segments(text, tokenizer.cut))
    assert len(pieces) > len(text) / 250
    assert tokenizer.encode(text).tolist() == whole_ids(reference, text)


@pytest.mark.parametrize("kind", BYTE_LEVEL)
def test_blocks_of_a_text_file_have_the_ids_of_the_whole(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, reference = carried(kind)
    path, text = tmp_path / "long.txt", "".join(CORPUS) * 3
    path.write_bytes(text.encode())
    monkeypatch.setattr(inputs, "BLOCK_BYTES", 101)
    found, ids = "", []
    for unit in range(len(text.encode()) // 101 + 1):
        for fragment in UnitReader(tokenizer).read(str(path), unit, "text"):
            found += fragment.text
            ids += tokenizer.encode(fragment.text, continues=not fragment.begins).tolist()
    assert found == text
    assert ids == whole_ids(reference, text)
