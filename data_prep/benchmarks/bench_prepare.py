"""How fast preparation is, compared with what is possible: one run, medians and ratios.

Three contenders over the same parquet files, on the same number of processes, with the same output: Longhaul's
preparation from start to end; the plain writer everybody copies (multiprocessing.Pool.imap over documents, lists of ids
back to a parent that fills shards); and the ceiling, tiktoken's encode_ordinary in a loop on one core without any IO,
times the processes. Beside wall-clock time it reports the processor time of all processes together, which other
people's work on the machine disturbs less. The text is the embedded corpus, several docstrings to a document of
FineWeb-Edu's length.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import multiprocessing
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from common.command_line import CommandParser
from common.errors import UserError, exit_on_user_error
from common.progress import format_bytes, format_count
from common.publish import file_to_write, sha256_file, write_json_output
from data_prep.corpora.preparation import DATA_FOLDER
from data_prep.corpora.workers import choose_workers
from data_prep.token_sets.token_set import TokenSet
from data_prep.tokenization.loading import load_tokenizer
from data_prep.tokenization.tokenizer import END_OF_TEXT, Ids

DOCUMENT_CHARACTERS = 4_700  # FineWeb-Edu's mean
ROW_GROUP = 1_000
FILE_DOCUMENTS = 10_000
CEILING_DOCUMENTS = 4_000
SAMPLE_SECONDS = 0.25


def parse_arguments() -> argparse.Namespace:
    parser = CommandParser(__doc__)
    parser.add_argument("--corpus", type=Path, default=DATA_FOLDER / "docstrings", help="token set whose text is used")
    parser.add_argument("--megabytes", type=int, default=200, help="text to prepare (default: 200)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each contender, taking turns (default: 3)")
    parser.add_argument("--workers", type=int, help="processes (default: all cores)")
    parser.add_argument("--shard-tokens", type=int, default=10_000_000, help="tokens per shard (default: 10 million)")
    parser.add_argument("--json", type=file_to_write, help="also write the figures to this file")
    parser.add_argument("--plain-writer", nargs=4, help=argparse.SUPPRESS)
    return parser.parse_args()


def make_documents(corpus: Path) -> list[str]:
    """The corpus's text as documents of about FineWeb-Edu's mean length."""
    opened = TokenSet.open(corpus)
    stream = opened.split("train")
    texts = load_tokenizer(opened.tokenizer_spec).decode(stream.read(0, len(stream))).split(END_OF_TEXT)
    documents, current, size = [], [], 0
    for text in texts:
        current.append(text)
        size += len(text)
        if size >= DOCUMENT_CHARACTERS:
            documents.append("\n\n".join(current))
            current, size = [], 0
    return documents


def write_source(folder: Path, documents: list[str], megabytes: int) -> int:
    """Write parquet files with at least so much text, each a new order of the documents; return the bytes of text."""
    generator, written = np.random.default_rng(0), 0
    for number in range(10_000):
        order = generator.permutation(len(documents))[:FILE_DOCUMENTS]
        texts = [documents[index] for index in order]
        sizes = np.cumsum([len(text.encode()) for text in texts])
        count = int(np.searchsorted(sizes, megabytes * 1_000_000 - written)) + 1
        table = pa.table({"text": texts[:count], "id": [f"{number}-{i}" for i in range(len(texts[:count]))]})
        pq.write_table(table, folder / f"{number:03d}.parquet", row_group_size=ROW_GROUP, compression="zstd")
        written += int(sizes[min(count, len(sizes)) - 1])
        if written >= megabytes * 1_000_000:
            break
    return written


def measure_ceiling(documents: list[str]) -> tuple[float, float]:
    """Tokens of plain tiktoken on one core: per second, and per second of processor time."""
    load_tokenizer("gpt2")  # puts the vocabulary where tiktoken looks for it
    import tiktoken

    encode = tiktoken.get_encoding("gpt2").encode_ordinary
    count, started, used = 0, time.perf_counter(), time.process_time()
    for text in documents[:CEILING_DOCUMENTS]:
        count += len(encode(text))
    return count / (time.perf_counter() - started), count / (time.process_time() - used)


def _encode_plainly(text: str) -> list[int]:
    import tiktoken

    encoding = tiktoken.get_encoding("gpt2")
    return [encoding.eot_token, *encoding.encode_ordinary(text)]


def _texts(source: Path) -> Iterator[str]:
    for path in sorted(source.glob("*.parquet")):
        for batch in pq.ParquetFile(path).iter_batches(columns=["text"]):
            yield from batch.column(0).to_pylist()


def write_plainly(source: Path, out: Path, workers: int, shard_tokens: int) -> None:
    """The plain writer: texts pickled to a pool, lists of ids pickled back, shards filled in the parent."""
    load_tokenizer("gpt2")
    out.mkdir()
    buffer, filled, index = np.empty(shard_tokens, dtype="<u2"), 0, 0
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        for ids in pool.imap(_encode_plainly, _texts(source), chunksize=16):
            tokens: Ids = np.array(ids, dtype="<u2")
            while len(tokens):
                part, tokens = tokens[: shard_tokens - filled], tokens[shard_tokens - filled :]
                buffer[filled : filled + len(part)] = part
                filled += len(part)
                if filled == shard_tokens:
                    buffer.tofile(out / f"train-{index:05d}.bin")
                    index, filled = index + 1, 0
    if filled:
        buffer[:filled].tofile(out / f"train-{index:05d}.bin")


class Measured(NamedTuple):
    """What a command took. `memory` is its peak in bytes: proportional set sizes of all its processes together."""

    seconds: float
    processor_seconds: float
    memory: int


def measure(command: list[str]) -> Measured:
    """Run a command and watch all its processes. Raises UserError where it fails."""
    started = time.perf_counter()
    process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peak, used = 0, dict[int, float]()  # processor seconds by process id
    while True:
        peak = max(peak, _look(process, used))
        try:
            process.wait(timeout=SAMPLE_SECONDS)
            break
        except psutil.TimeoutExpired:
            continue
    seconds = time.perf_counter() - started
    if process.returncode:
        raise UserError(f"{' '.join(command)} failed: {process.stderr.read().decode()[-500:]}")
    return Measured(seconds, sum(used.values()), peak)


def _look(process: psutil.Process, used: dict[int, float]) -> int:
    total = 0
    try:
        for one in [process, *process.children(recursive=True)]:
            memory, times = one.memory_full_info(), one.cpu_times()
            total += getattr(memory, "pss", memory.rss)
            used[one.pid] = times.user + times.system
    except psutil.Error:  # one of them just ended
        pass
    return total


def compare(arguments: argparse.Namespace, folder: Path, workers: int) -> dict[str, Any]:
    """Run the contenders in turns and return the figures."""
    documents = make_documents(arguments.corpus)
    source = folder / "source"
    source.mkdir()
    text_bytes = write_source(source, documents, arguments.megabytes)
    shard = str(arguments.shard_tokens)
    here = Path(__file__).resolve()
    longhaul = [
        sys.executable,
        str(here.parents[1] / "fineweb.py"),
        "--source",
        str(source),
        "--out",
        str(folder / "longhaul"),
    ]
    longhaul += ["--val-tokens", "0", "--shard-tokens", shard, "--workers", str(workers), "--force"]
    plain = [sys.executable, str(here), "--plain-writer", str(source), str(folder / "plain"), str(workers), shard]
    runs: dict[str, list[Measured]] = {"longhaul": [], "plain": []}
    ceilings = []
    for number in range(arguments.repeats):
        ceilings.append(measure_ceiling(documents))
        runs["longhaul"].append(measure(longhaul))
        if number:
            _remove(folder / "plain")
        runs["plain"].append(measure(plain))
        print(f"round {number + 1} of {arguments.repeats} done", file=sys.stderr, flush=True)
    names = sorted(path.name for path in (folder / "longhaul").glob("*.bin"))
    equal = [sha256_file(folder / "longhaul" / n) == sha256_file(folder / "plain" / n) for n in names]
    if not all(equal) or names != sorted(path.name for path in (folder / "plain").glob("*.bin")):
        raise UserError("the two writers' shards differ, so the comparison is meaningless")
    tokens = TokenSet.open(folder / "longhaul").manifest.total("train", "tokens")
    ceiling = statistics.median(rate for rate, _ in ceilings)
    processor_ceiling = statistics.median(rate for _, rate in ceilings)
    figures: dict[str, Any] = {
        "workers": workers,
        "repeats": arguments.repeats,
        "text_bytes": text_bytes,
        "tokens": tokens,
        "ceiling_tokens_per_second_per_core": ceiling,
        "ceiling_tokens_per_processor_second": processor_ceiling,
    }
    for name, measured in runs.items():
        rate = tokens / statistics.median(one.seconds for one in measured)
        processor_rate = tokens / statistics.median(one.processor_seconds for one in measured)
        figures[name] = {
            "tokens_per_second": rate,
            "share_of_ceiling": rate / (ceiling * workers),
            "tokens_per_processor_second": processor_rate,
            "share_of_processor_ceiling": processor_rate / processor_ceiling,
            "peak_memory_bytes": max(one.memory for one in measured),
        }
    rates = [figures[name]["tokens_per_processor_second"] for name in ("longhaul", "plain")]
    figures["processor_ratio"] = rates[0] / rates[1]
    figures["speed_ratio"] = figures["longhaul"]["tokens_per_second"] / figures["plain"]["tokens_per_second"]
    return figures


def _remove(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def print_figures(figures: dict[str, Any]) -> None:
    workers = figures["workers"]
    size = f"{format_count(figures['tokens'])} tokens, {format_bytes(figures['text_bytes'])} of text"
    print(f"{size}, {workers} processes, median of {figures['repeats']}")
    print(f"{'':10}{'tokens/s':>10}{'of ceiling':>12}{'per processor s':>17}{'of ceiling':>12}{'memory':>12}")
    ceiling = figures["ceiling_tokens_per_second_per_core"]
    rows = [("ceiling", ceiling * workers, 1.0, figures["ceiling_tokens_per_processor_second"], 1.0, "")]
    for name in ("longhaul", "plain"):
        row = figures[name]
        shares = row["tokens_per_processor_second"], row["share_of_processor_ceiling"]
        rows.append(
            (name, row["tokens_per_second"], row["share_of_ceiling"], *shares, format_bytes(row["peak_memory_bytes"]))
        )
    for name, rate, share, processor_rate, processor_share, memory in rows:
        print(
            f"{name:10}{format_count(rate):>10}{share:>12.0%}"
            f"{format_count(processor_rate):>17}{processor_share:>12.0%}{memory:>12}"
        )
    print(
        f"Longhaul is {figures['speed_ratio']:.2f} times as fast as the plain writer by wall-clock time, "
        f"{figures['processor_ratio']:.2f} times by processor time; the shards are the same"
    )


def main() -> int:
    arguments = parse_arguments()
    if arguments.plain_writer:
        source, out, workers, shard_tokens = arguments.plain_writer
        write_plainly(Path(source), Path(out), int(workers), int(shard_tokens))
        return 0
    with tempfile.TemporaryDirectory(prefix="bench_prepare_") as folder:
        figures = compare(arguments, Path(folder), max(1, choose_workers(arguments.workers)))
    print_figures(figures)
    if arguments.json:
        write_json_output(arguments.json, figures)
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
