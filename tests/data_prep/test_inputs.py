"""Documents out of files: all of them, in order, from any place, whatever the format and the blocks."""

import bz2
import gzip
import json
import lzma
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.errors import UserError
from data_prep.corpora import readers as inputs
from data_prep.corpora.file_kinds import fingerprint
from data_prep.corpora.readers import UnitReader, units
from data_prep.tokenization.loading import load_tokenizer
from tests.helpers.parquet_files import texts, write_parquet

DOCUMENTS = texts(230, seed=5)


def read_all(path, field="text", reader=None):
    reader = reader or UnitReader()
    return [
        (unit, fragment)
        for unit, about in enumerate(units(path, field))
        for fragment in reader.read(str(path), unit, field, 0, about.rows)
    ]


def write_lines(path, documents, field="text"):
    data = b"".join(json.dumps({"id": 1, field: text}).encode() + b"\n" for text in documents)
    if path.name.endswith(".gz"):
        data = gzip.compress(data[:1000]) + gzip.compress(data[1000:])  # several members, as pigz and cat make
    elif path.name.endswith(".bz2"):
        data = bz2.compress(data[:1000]) + bz2.compress(data[1000:])
    elif path.name.endswith(".xz"):
        data = lzma.compress(data[:1000]) + lzma.compress(data[1000:])
    elif path.name.endswith(".zst"):
        data = b"".join(pa.compress(part, "zstd", asbytes=True) for part in (data[:1000], data[1000:]))
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["d.parquet", "d.jsonl", "d.jsonl.gz", "d.json.zst", "d.ndjson.bz2", "d.jsonl.xz"])
def test_every_format_gives_all_documents_in_order(name, tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "BLOCK_BYTES", 5_000)
    path = tmp_path / name
    if name == "d.parquet":
        write_parquet(path, DOCUMENTS, row_group=100)
    else:
        write_lines(path, DOCUMENTS)
    found = read_all(path)
    assert [fragment.text for _, fragment in found] == [text for text in DOCUMENTS if text]
    assert all(fragment.begins and fragment.key == fragment.text for _, fragment in found)
    if name == "d.jsonl":
        assert len(units(path, "text")) > 20


@given(start=st.integers(0, 100), stop=st.integers(0, 100), again=st.integers(0, 100))
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_parquet_rows_from_any_place(start, stop, again, tmp_path):
    path = tmp_path / "d.parquet"
    if not path.exists():
        write_parquet(path, DOCUMENTS, row_group=100)
    reader = UnitReader()
    for begin in (start, again):  # further on or back again with the same reader
        found = [fragment.row for fragment in reader.read(str(path), 1, "text", begin, stop)]
        assert found == [row for row in range(begin, stop) if DOCUMENTS[100 + row]]


@given(sizes=st.lists(st.integers(0, 40), max_size=30), block=st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_lines_are_read_once_whatever_the_blocks(sizes, block, tmp_path_factory):
    path = tmp_path_factory.mktemp("lines") / "d.jsonl"
    documents = [f"{number}" + "x" * size for number, size in enumerate(sizes)]
    write_lines(path, documents)
    before = inputs.BLOCK_BYTES
    inputs.BLOCK_BYTES = block
    try:
        assert [fragment.text for _, fragment in read_all(path)] == documents
    finally:
        inputs.BLOCK_BYTES = before


@given(text=st.text(alphabet="ab \n\t.é中😀\u00a0\u3000", max_size=300), block=st.integers(1, 50))
@settings(max_examples=150, deadline=None)
def test_text_in_blocks_has_the_ids_of_the_whole(text, block, tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "d.txt"
    path.write_bytes(text.encode())
    (packed := path.with_name("d.txt.gz")).write_bytes(gzip.compress(text.encode()))
    tokenizer = load_tokenizer("gpt2")
    before = inputs.BLOCK_BYTES
    inputs.BLOCK_BYTES = block
    try:
        fragments = [fragment for _, fragment in read_all(path)]
        unpacked = [fragment for _, fragment in read_all(packed)]
    finally:
        inputs.BLOCK_BYTES = before
    assert "".join(fragment.text for fragment in fragments) == text
    ids = [token for fragment in fragments for token in tokenizer.encode(fragment.text)]
    assert ids == tokenizer.encode(text).tolist()
    assert sum(fragment.begins for fragment in fragments) == bool(text)
    assert {fragment.key for fragment in fragments} <= {text.encode()[:800].decode(errors="replace")}
    ids = [token for fragment in unpacked for token in tokenizer.encode(fragment.text)]
    assert ids == tokenizer.encode(text).tolist()
    assert sum(fragment.begins for fragment in unpacked) == bool(text)
    assert {fragment.key for fragment in unpacked} == {fragment.key for fragment in fragments}
    assert [fragment.row for fragment in unpacked] == list(range(len(unpacked)))


def test_a_field_inside_another_is_read(tmp_path):
    rows = [{"text": "one", "n": 1}, None, {"text": None, "n": 2}, {"text": "four", "n": 3}]
    pq.write_table(pa.table({"meta": rows, "a.b": list("wxyz"), "tags": [["t"]] * 4}), tmp_path / "d.parquet")
    lines = [json.dumps({"meta": row, "a.b": letter}) for row, letter in zip(rows, "wxyz", strict=True)]
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    for name in ("d.parquet", "d.jsonl"):
        assert [fragment[:2] for _, fragment in read_all(tmp_path / name, "meta.text")] == [(0, "one"), (3, "four")]
        assert [fragment.text for _, fragment in read_all(tmp_path / name, "a.b")] == list("wxyz")
    with pytest.raises(UserError, match=r"no column 'meta.body': choose one of meta.text, meta.n, a.b, tags with"):
        units(tmp_path / "d.parquet", "meta.body")
    with pytest.raises(UserError, match=r"struct.*, not text, in its column 'meta'"):
        units(tmp_path / "d.parquet", "meta")
    with pytest.raises(ValueError, match=r"no field 'meta.body' \(there is: meta.text, meta.n, a.b\)"):
        read_all(tmp_path / "d.jsonl", "meta.body")


def test_a_page_that_is_not_what_its_checksum_says_is_not_read(tmp_path):
    table = pa.table({"text": ["alpha", "beta", "gamma"]})
    for checksums in (True, False):
        path = tmp_path / f"{checksums}.parquet"
        pq.write_table(table, path, compression="none", use_dictionary=False, write_page_checksum=checksums)
        path.write_bytes(path.read_bytes().replace(b"beta", b"bEta", 1))
    assert [fragment.text for _, fragment in read_all(tmp_path / "False.parquet")] == ["alpha", "bEta", "gamma"]
    with pytest.raises(OSError, match="checksum"):
        read_all(tmp_path / "True.parquet")


def test_text_that_is_not_utf8_is_read_with_replacements(tmp_path):
    (tmp_path / "d.txt").write_bytes(b"\xef\xbb\xbfcaf\xe9 latin")
    assert [fragment.text for _, fragment in read_all(tmp_path / "d.txt")] == ["caf\ufffd latin"]


def test_what_can_not_be_read_says_why(tmp_path):
    write_parquet(tmp_path / "d.parquet", ["text"])
    with pytest.raises(UserError, match=r"no column 'body': choose one of text, id, .* with --field"):
        units(tmp_path / "d.parquet", "body")
    (tmp_path / "e.parquet").write_bytes(b"PAR1 nothing else")
    with pytest.raises(UserError, match=r"e\.parquet"):
        units(tmp_path / "e.parquet", "text")
    with pytest.raises(UserError, match="can be read"):
        units(tmp_path / "d.docx", "text")
    for line, words in [
        (b"{torn", "Expecting"),
        (b'{"body": "x"}', "no field 'text'"),
        (b'{"text": 3}', "holds int, not text"),
        (b'\0\0\0{"text": "x"}', "NUL bytes in it: it is damaged, or in UTF-16"),
        ('{"text": "x"}'.encode("utf-16-le"), "NUL bytes in it"),
    ]:
        (tmp_path / "d.jsonl").write_bytes(b'{"text": "fine"}\n' + line)
        with pytest.raises(ValueError, match=words):
            read_all(tmp_path / "d.jsonl")


def test_byte_order_marks_are_no_text(tmp_path):
    lines = b"".join(b'\xef\xbb\xbf{"text": "word %d"}\n' % number for number in range(3))  # of files put together
    (tmp_path / "d.jsonl").write_bytes(lines)
    assert [fragment.text for _, fragment in read_all(tmp_path / "d.jsonl")] == ["word 0", "word 1", "word 2"]


def zstd_frame(window_log: int) -> bytes:
    """A frame of one stored block, as `zstd --long` makes of a stream whose length it doesn't know."""
    content = b'{"text": "words"}\n'
    block = (len(content) << 3 | 1).to_bytes(3, "little") + content  # the last one, of bytes as they are
    return b"\x28\xb5\x2f\xfd" + bytes([0, (window_log - 10) << 3]) + block


def test_a_window_of_zstd_that_can_not_be_read_is_known_at_once(tmp_path):
    path = tmp_path / "d.jsonl.zst"
    skippable = b"\x55\x2a\x4d\x18" + (100).to_bytes(4, "little") + bytes(100)
    path.write_bytes(skippable + zstd_frame(27))
    fingerprint(path)
    assert [fragment.text for _, fragment in read_all(path)] == ["words"]
    for before in (b"", skippable):
        path.write_bytes(before + zstd_frame(31))
        with pytest.raises(
            UserError, match=r"window of 2.0 GiB \(zstd --long\), and 128.0 MiB .*'zstd -d --long=31 "
        ) as error:
            fingerprint(path)
        assert str(path) in str(error.value)
    with pytest.raises(OSError, match="too much memory"):  # by pyarrow itself: should it take such, the check can go
        read_all(path)


def test_long_documents_are_decoded_a_few_at_a_time(tmp_path):
    path = tmp_path / "d.parquet"
    write_parquet(path, [f"{number} " + "long " * 200_000 for number in range(32)], row_group=32)
    tracemalloc.start()
    first = next(UnitReader().read(str(path), 0, "text", 0, 32))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(first.text) > 1_000_000
    assert peak < 4 << 20


def test_a_parquet_file_that_was_cut_off_is_known_at_once(tmp_path):
    """Whatever its last bytes say: zeros mean a footer of no length."""
    path = tmp_path / "d.parquet"
    write_parquet(path, DOCUMENTS)
    path.write_bytes(path.read_bytes()[:5_000] + bytes(8))
    with pytest.raises(UserError, match="not a whole parquet file"):
        fingerprint(path)


def test_a_fingerprint_notices_another_file(tmp_path):
    prints: set[str] = set()
    for name in ("a.parquet", "b.parquet"):
        write_parquet(tmp_path / name, texts(50, seed=len(prints)))
        prints.add(json.dumps(fingerprint(tmp_path / name)))
    (tmp_path / "a.txt").write_text("a")
    prints.add(json.dumps(fingerprint(tmp_path / "a.txt")))
    assert len(prints) == 3
