"""What streams out is the whole text in the end, and never anything that later tokens change."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.tokenization.loading import load_tokenizer
from eval.generation.text_stream import TextStream

TOKENIZERS = {kind: load_tokenizer(kind) for kind in ("byte", "gpt2")}


def stream_of(ids, tokenizer, stops=()):
    stream = TextStream(tokenizer, stops)
    pieces = []
    for token in ids:
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    return [*pieces, stream.finish()], stream


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(text=st.text(st.sampled_from("aé€😀\ufffd \n👩‍🔬"), max_size=12))
def test_characters_come_whole(kind, text):
    tokenizer = TOKENIZERS[kind]
    pieces, stream = stream_of(tokenizer.encode(text), tokenizer)
    assert "".join(pieces) == stream.text == text


@given(ids=st.lists(st.sampled_from([0x61, 0xC3, 0xA9, 0xF0, 0x9F, 0x98, 0x80, 0xFF, 256]), max_size=12))
def test_broken_bytes_stream_as_they_decode_at_once(ids):
    pieces, stream = stream_of(ids, TOKENIZERS["byte"])
    assert "".join(pieces) == stream.text == TOKENIZERS["byte"].decode(ids)


def test_no_half_character_is_shown():
    pieces, _ = stream_of("a😀b".encode(), TOKENIZERS["byte"])
    assert pieces == ["a", "", "", "", "😀", "b", ""]


def test_bad_bytes_do_not_hold_the_text_back_for_long():
    pieces, _ = stream_of([0xFF, 0xFF, 0xFF], TOKENIZERS["byte"])
    assert pieces == ["", "\ufffd", "\ufffd", "\ufffd"]


@given(text=st.text("ab\n", max_size=20), stops=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3))
def test_a_stop_string_cuts_where_it_begins(text, stops):
    """At the first token that completes any stop string, at the earliest place where one begins."""
    pieces, stream = stream_of(text.encode(), TOKENIZERS["byte"], stops)
    ends = [place + len(stop) for stop in stops if (place := text.find(stop)) >= 0]
    seen = text[: min(ends)] if ends else text
    expected = min((seen.find(stop) for stop in stops if stop in seen), default=len(text))
    assert "".join(pieces) == stream.text == text[:expected]
    assert stream.stopped == bool(ends)


def test_what_may_begin_a_stop_string_waits():
    pieces, stream = stream_of(b"one\n\ntwo", TOKENIZERS["byte"], ["\n\nt"])
    assert pieces == ["o", "n", "e", "", "", "", ""]
    assert stream.stopped
    pieces, stream = stream_of(b"one\n\nsix", TOKENIZERS["byte"], ["\n\nt"])
    assert pieces == ["o", "n", "e", "", "", "\n\ns", "i", "x", ""]
    assert not stream.stopped
