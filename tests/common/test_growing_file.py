"""Every byte of a growing file is read once, and a line without end costs no more than a bound."""

import tracemalloc
from pathlib import Path

import pytest

from common import growing_file, metrics_file
from common.growing_file import GrowingFile
from common.metrics_file import read_json_lines
from common.metrics_table import MetricsTable

MEBIBYTE = 1 << 20


def bytes_read() -> int:
    """That this process has read so far, as Linux counts them."""
    counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counts["rchar"])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="Linux alone counts what a process reads")
def test_a_line_without_end_is_read_once_however_often_it_is_looked_at(tmp_path: Path):
    """40 MiB in 80 pieces, looked at after each: a reader that begins anew would read 1.6 GiB."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 2.5}\n')
    table = MetricsTable(path)
    assert table.update()
    before = bytes_read()
    tracemalloc.start()
    with open(path, "ab") as file:
        for _ in range(80):
            file.write(b"x" * (MEBIBYTE // 2))
            file.flush()
            assert not table.update()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert bytes_read() - before < 50 * MEBIBYTE
    assert peak < growing_file.LINE_BYTES + 8 * MEBIBYTE
    with open(path, "ab") as file:
        file.write(b'\n{"step": 2, "loss": 2.0}\n')
    assert table.update()
    assert table.column("loss").tolist() == [2.5, 2.0]


def test_a_line_is_whole_in_whatever_pieces_it_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Lines up to the bound come, longer ones never, and the lines around those do; however blocks fall."""
    lines = [b"a" * 9, b"b" * 30, b"", b"c" * 10, b"d" * 200, b"e"]
    content = b"".join(line + b"\n" for line in lines) + b"begun"
    monkeypatch.setattr(growing_file, "LINE_BYTES", 12)
    for block in (1, 5, 7, 64):
        monkeypatch.setattr(growing_file, "BLOCK_BYTES", block)
        for piece in (1, 3, 50, len(content)):
            path = tmp_path / f"{block}-{piece}"
            file, come = GrowingFile(path), b""
            for start in range(0, len(content), piece):
                with open(path, "ab") as writer:
                    writer.write(content[start : start + piece])
                come += b"".join(file.blocks())
            come_lines = come.split(b"\n")[:-1]
            assert [line for line in come_lines if len(line) <= 12] == [lines[0], b"", lines[3], b"e"], (block, piece)
            assert not file.was_replaced()


def test_a_whole_file_with_a_line_without_end_stays_out_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(metrics_file, "LINE_BYTES", MEBIBYTE)
    path = tmp_path / "samples.jsonl"
    with open(path, "wb") as file:
        file.write(b'{"step": 1}\n')
        for _ in range(16):
            file.write(b"x" * MEBIBYTE)
        file.write(b'\n{"step": 2}\n{"step": 3}')
    tracemalloc.start()
    records = read_json_lines(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert records == [{"step": 1}, {"step": 2}, {"step": 3}], "the last line needs no newline"
    assert peak < 5 * MEBIBYTE
