"""Tokenizers out of a tokenizer.json: long texts cut where no id changes, whatever pattern splits them."""

import functools
import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from common.errors import UserError
from data_prep.corpora import readers as inputs
from data_prep.corpora.encode_worker import Selection, Work, encode
from data_prep.corpora.readers import UnitReader
from data_prep.tokenization import huggingface_tokenizer
from data_prep.tokenization import tokenizer as tokenization
from data_prep.tokenization.byte_level import shown_bytes
from data_prep.tokenization.huggingface_tokenizer import Framing, HuggingFaceTokenizer, check_carried
from data_prep.tokenization.loading import load_tokenizer
from data_prep.tokenization.tokenizer import Tokenizer
from eval.generation.text_stream import TextStream
from tests.helpers.hf_tokenizers import BYTE_LEVEL, CORPUS, SENTENCE_PIECE, tokenizer_json

tokenizers = pytest.importorskip("tokenizers")

KINDS = [*BYTE_LEVEL, *SENTENCE_PIECE]

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
    framing = Framing(reference.token_to_id("<s>")) if kind in SENTENCE_PIECE else None
    return HuggingFaceTokenizer.of(text, reference.token_to_id("</s>"), framing), reference


def whole_ids(reference: Any, text: str) -> list[int]:
    return list(reference.encode(text, add_special_tokens=False).ids)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(text=TEXTS, characters=st.integers(1, 12))
@example(text="the thethe a thethethe", characters=1)  # "across": the ids around a cut agree, those further on do not
def test_long_texts_in_pieces_have_the_ids_of_the_whole(kind: str, text: str, characters: int) -> None:
    tokenizer, reference = carried(kind)
    before = tokenization.SEGMENT_CHARACTERS, huggingface_tokenizer.AROUND
    tokenization.SEGMENT_CHARACTERS, huggingface_tokenizer.AROUND = characters, 8
    try:
        assert tokenizer.encode(text).tolist() == whole_ids(reference, text)
    finally:
        tokenization.SEGMENT_CHARACTERS, huggingface_tokenizer.AROUND = before


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(texts=st.lists(TEXTS, min_size=1, max_size=3))
def test_documents_decode_at_once_and_streamed_as_the_package_decodes_each(kind: str, texts: list[str]) -> None:
    tokenizer, reference = carried(kind)
    ids: list[int] = []
    for text in texts:
        ids += [*tokenizer.prompt(text), *tokenizer.closing.tolist()]
    expected = [reference.decode(whole_ids(reference, text), skip_special_tokens=False) for text in texts]
    mark = tokenization.END_OF_TEXT
    whole = f"{mark}{mark.join(expected)}" if not len(tokenizer.closing) else "".join(text + mark for text in expected)
    stream = TextStream(tokenizer)
    assert "".join([*map(stream.push, ids), stream.finish()]) == tokenizer.decode(ids) == whole


def test_a_continuation_keeps_its_space() -> None:
    tokenizer, _ = carried("prepended")
    ids = tokenizer.encode(" three", continues=True).tolist()
    stream = TextStream(tokenizer, continues=True)
    assert "".join([*map(stream.push, ids), stream.finish()]) == tokenizer.decode(ids, continues=True) == " three"
    assert tokenizer.decode(ids) == "three"
    assert tokenizer.encode("three").tolist() == ids


def test_specs_come_back_and_cover_what_frames_and_splits_a_text() -> None:
    text = tokenizer_json("llama3")
    framings = [None, Framing(0), Framing(0, begins_contexts=True), Framing(0, other_end_ids=(5,)), Framing(1)]
    specs = [HuggingFaceTokenizer.of(text, 1, framing).spec for framing in framings]
    split_otherwise = text.replace("{1,3}", "{1,2}")
    specs.append(HuggingFaceTokenizer.of(split_otherwise, 1, Framing(0)).spec)
    assert len({spec["sha256"] for spec in specs}) == len(specs)
    for spec in specs:
        assert load_tokenizer(json.loads(json.dumps(spec))).spec == spec
    # an older Longhaul's, byte for byte
    assert specs[0].keys() == {"kind", "vocab_size", "end_of_text_id", "sha256", "packed"}
    assert specs[0]["sha256"] == older_identity(text, 1)


def older_identity(text: str, end: int) -> str:
    """The identity of a carried tokenizer before there were framings."""
    reference = tokenizers.Tokenizer.from_str(text)
    pieces = [shown_bytes(reference.id_to_token(i)) for i in range(reference.get_vocab_size())]
    pieces[end] = b""
    digest = hashlib.sha256(f"huggingface:{len(pieces)}:{end}:".encode())
    digest.update(b"".join(len(piece).to_bytes(4, "little") + piece for piece in pieces))
    return digest.hexdigest()


@pytest.mark.parametrize(
    ("kind", "change", "names"),
    [
        ("prepended", {"byte_fallback": False}, "byte_fallback"),
        ("prepended", {"dropout": 0.1}, "dropout"),
        ("prepended", {"normalizer": {"type": "Strip"}}, "normalizer Strip"),
        ("llama3", {"pre_tokenizer": {"type": "Whitespace"}}, "pre-tokenizer Whitespace"),
        ("llama3", {"type": "WordPiece"}, "neither a byte-level BPE nor"),
    ],
)
def test_what_would_lose_text_is_refused_by_name(kind: str, change: dict[str, Any], names: str) -> None:
    description = json.loads(tokenizer_json(kind))
    for key, value in change.items():
        (description if key in description else description["model"])[key] = value
    with pytest.raises(UserError, match=names):
        check_carried(description)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "across"])
def test_long_texts_are_cut_in_fact(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, reference = carried(kind)
    text = "".join(CORPUS) * 4
    monkeypatch.setattr(tokenization, "SEGMENT_CHARACTERS", 100)
    pieces = list(tokenization.segments(text, tokenizer.cut))
    assert len(pieces) > len(text) / 250
    assert tokenizer.encode(text).tolist() == whole_ids(reference, text)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_a_text_file_have_the_ids_of_the_whole_and_one_frame(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, reference = carried(kind)
    path, text = tmp_path / "long.txt", "".join(CORPUS) * 3
    path.write_bytes(text.encode())
    (packed := tmp_path / "packed.txt.gz").write_bytes(gzip.compress(text.encode()))
    monkeypatch.setattr(inputs, "BLOCK_BYTES", 101)
    expected = [*tokenizer.prompt(text), *tokenizer.closing.tolist()]
    assert expected[1 : len(text)] == [*whole_ids(reference, text), *tokenizer.closing.tolist()]
    everything = Selection("train")
    for file, units in ((path, len(text.encode()) // 101 + 1), (packed, 1)):
        ids, parts = [], 0
        for unit in range(units):
            work = Work(0, str(file), file.name, unit, 0, None, "text", everything, 0)
            for part in encode(work, tokenizer, UnitReader(tokenizer), [0], 0):
                ids += part.tokens.tolist()
                assert part.counts.sum() == len(part.tokens)
                parts += len(part.rows)
        assert ids == expected
        assert parts > 3 or kind == "across"
