"""Whole documents in sequences: nothing lost, nothing cut that fits, the true next token as every target."""

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from data_prep.token_sets.packing import IGNORE, Framing, PackedSequences, framing_of, make_plan, pack
from model.chunk_kernel import IGNORE_INDEX

END, BEGIN = 0, 1


class Stream:
    """Tokens in memory."""

    def __init__(self, tokens: list[int]) -> None:
        self._tokens = np.array(tokens, dtype=np.uint16)

    def __len__(self) -> int:
        return len(self._tokens)

    def read(self, start: int, stop: int) -> np.ndarray:
        assert 0 <= start <= stop <= len(self)
        return self._tokens[start:stop]


def documents_of(lengths: list[int], *, two_marks: bool) -> list[list[int]]:
    """Documents of different tokens, with as many between their marks."""
    first, found = 2, []
    for length in lengths:
        text = list(range(first, first + length))
        first += length
        found.append([BEGIN, *text, END] if two_marks else [END, *text])
    return found


@settings(max_examples=150)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=2, max_size=60),
    block_size=st.integers(1, 17),
    two_marks=st.booleans(),
)
def test_every_target_is_the_true_next_token_and_stands_there_once(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], block_size: int, two_marks: bool
) -> None:
    documents = documents_of(lengths, two_marks=two_marks)
    stream = Stream([token for document in documents for token in document])
    folder = tmp_path_factory.mktemp("plan") / "plan"
    framing = Framing(BEGIN if two_marks else END, two_marks)
    facts = make_plan(stream, framing, block_size, folder, data_identity="ab" * 32)
    packed = PackedSequences.read(stream, folder)
    assert packed.facts == facts
    rows = packed.rows(np.arange(packed.count))
    counted = rows.targets != IGNORE
    assert facts.targets == counted.sum() == packed.target_count(np.arange(packed.count))
    assert facts.targets + facts.padding == packed.count * block_size

    # the same pairs as in the documents, each followed by its end (the last one's does not stand there)
    wanted: Counter[tuple[int, int]] = Counter()
    for number, document in enumerate(documents):
        last = number == len(documents) - 1
        whole = document if two_marks or last else [*document, END]
        wanted.update(pairwise(whole))
    assert Counter(zip(rows.inputs[counted].tolist(), rows.targets[counted].tolist(), strict=True)) == wanted

    # what fits is there as a whole, and padding is at the end
    assert rows.document_ids is not None
    pieces = set()
    for inputs, ids, row in zip(rows.inputs, rows.document_ids, counted, strict=True):
        assert (np.diff(row.astype(int)) <= 0).all()
        assert (np.diff(ids) >= 0).all()
        pieces |= {tuple(inputs[(ids == number) & row].tolist()) for number in np.unique(ids)}
    for number, document in enumerate(documents):
        read = document[:-1] if two_marks or number == len(documents) - 1 else document
        if 0 < len(read) <= block_size:
            assert tuple(read) in pieces


def textbook_best_fit(lengths: list[int], block_size: int) -> int:
    """How many sequences the plain algorithm needs: longest first, each to where the least room is left."""
    room: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [free for free in room if free >= length]
        if fitting:
            room.remove(min(fitting))
            room.append(min(fitting) - length)
        else:
            room.append(block_size - length)
    return len(room)


@settings(max_examples=200)
@given(lengths=st.lists(st.integers(1, 64), max_size=200), block_size=st.integers(2, 64))
def test_as_few_sequences_as_the_textbook_s_best_fit(lengths: list[int], block_size: int) -> None:
    starts = np.cumsum([0, *lengths[:-1]]) if lengths else np.zeros(0, dtype=np.int64)
    packed = pack(starts.astype(np.int64), np.array(lengths, dtype=np.int64), block_size)
    pieces = [size for length in lengths for size in [block_size] * (length // block_size) + [length % block_size]]
    assert len(packed.ends) == textbook_best_fit([piece for piece in pieces if piece], block_size)
    assert packed.lengths.sum() == sum(lengths)


@pytest.mark.parametrize("length", [15, 16, 17, 33])  # T-1, T, T+1, 2T+1 with the mark
def test_lengths_around_a_sequence_s(length: int, tmp_path: Path) -> None:
    documents = documents_of([length - 1, 4, 2], two_marks=False)
    stream = Stream([token for document in documents for token in document])
    make_plan(stream, Framing(END, False), 16, tmp_path / "plan", data_identity="ab" * 32)
    packed = PackedSequences.read(stream, tmp_path / "plan")
    rows = packed.rows(np.arange(packed.count))
    places = [(row.tolist().index(END), int(n)) for n, row in enumerate(rows.inputs[:, :]) if END in row]
    assert places
    with_rest = [16] * (length // 16) + [length % 16] * bool(length % 16)
    assert packed.count == textbook_best_fit([*with_rest, 5, 2], 16)
    assert packed.facts.cut_documents == (length > 16)


def test_a_plan_is_the_same_in_small_blocks_but_for_its_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(3)
    documents = documents_of(generator.integers(0, 30, 300).tolist(), two_marks=False)
    stream = Stream([token for document in documents for token in document])
    whole = make_plan(stream, Framing(END, False), 16, tmp_path / "whole", data_identity="ab" * 32)
    again = make_plan(stream, Framing(END, False), 16, tmp_path / "again", data_identity="ab" * 32)
    assert whole == again
    (tmp_path / "again" / "lengths.npy").write_bytes((tmp_path / "again" / "lengths.npy").read_bytes()[:-8])
    with pytest.raises(UserError, match=r"again can't be read .*: delete the folder"):
        PackedSequences.read(stream, tmp_path / "again")
    monkeypatch.setattr("data_prep.token_sets.packing.BLOCK_TOKENS", 50)
    assert make_plan(stream, Framing(END, False), 16, tmp_path / "read", data_identity="ab" * 32) == whole
    monkeypatch.setattr("data_prep.token_sets.packing.BLOCK_DOCUMENTS", 40)
    blocks = make_plan(stream, Framing(END, False), 16, tmp_path / "blocks", data_identity="ab" * 32)
    assert (blocks.targets, blocks.pieces) == (whole.targets, whole.pieces)
    assert whole.sequences <= blocks.sequences <= whole.sequences + 10


def test_a_text_of_marks_only_is_refused_or_packed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no document to pack"):
        make_plan(Stream([END]), Framing(END, False), 8, tmp_path / "one", data_identity="ab" * 32)
    assert make_plan(Stream([END] * 9), Framing(END, False), 8, tmp_path / "nine", data_identity="ab" * 32).targets == 8
    assert not list(tmp_path.glob(".*"))


def test_the_ignored_target_is_the_loss_s() -> None:
    assert IGNORE == IGNORE_INDEX
    assert framing_of({"end_of_text_id": None}) is None
    assert framing_of({"end_of_text_id": 5, "begin_of_text_id": 6}) == Framing(6, True)
    assert framing_of({"end_of_text_id": 5}) == Framing(5, False)
