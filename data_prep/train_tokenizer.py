"""Learn a vocabulary of your own from a corpus: a byte-level BPE tokenizer, as the file tokenizer.json.

SOURCE is what text_files.py reads (files or folders), or a token set of any preparation, whose training text is read.
A seeded sample of it is learned from; documents that preparations choose for validation are held back, and the
tokenizer is compared with GPT-2's on them. Give the file to any preparation: --tokenizer FILE.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from common.early_end import end_in_one_line

    sys.excepthook = end_in_one_line

import argparse
import hashlib
import time
from collections.abc import Iterator
from typing import Any

from common.command_line import CommandParser
from common.errors import UserError, exit_on_user_error
from common.plain_text import one_line
from common.progress import format_bytes, format_duration
from common.publish import file_to_write, write_json_output, write_output
from data_prep.corpora.file_walk import describe_left_out
from data_prep.corpora.local_files import find_files
from data_prep.corpora.preparation import positive_count
from data_prep.corpora.text_sample import FileSource, Sample, Source, TokenSetSource
from data_prep.corpora.workers import choose_workers
from data_prep.token_sets.manifest import MANIFEST_FILE, padded_size
from data_prep.tokenization.bpe_training import (
    MEMORY_PER_BYTE,
    MOST_SAMPLE_BYTES,
    PATTERNS,
    SMALLEST,
    describe_size,
    train_bpe,
)
from data_prep.tokenization.loading import load_tokenizer
from data_prep.tokenization.own_vocabulary import read_tokenizer_file
from data_prep.tokenization.tokenizer import Tokenizer

HELD_BACK_BYTES = 4 << 20
LARGEST = 1 << 20  # ids; those in use have a quarter of it at most


def parse_arguments() -> argparse.Namespace:
    parser = CommandParser(__doc__)
    parser.add_argument("source", type=Path, nargs="+", metavar="SOURCE", help="files, folders, or one token set")
    parser.add_argument("--out", type=file_to_write, required=True, metavar="FILE", help="the tokenizer.json to write")
    parser.add_argument("--vocab-size", type=positive_count, default=32768, help="ids, all included (default: 32768)")
    parser.add_argument(
        "--pattern",
        choices=list(PATTERNS),
        default="gpt4",
        help="how text is split before merging: gpt4 takes up to three digits and any case's contractions (default)",
    )
    parser.add_argument("--field", default="text", help="column or field with the text (default: text)")
    parser.add_argument("--all-splits", action="store_true", help="also read files that are named for test")
    group = parser.add_argument_group("sample")
    group.add_argument("--seed", type=int, default=0, help="which part of a larger corpus is learned from (default: 0)")
    group.add_argument("--sample-bytes", type=positive_count, default=256_000_000, help="of text (default: 256M)")
    group.add_argument(
        "--max-distinct",
        type=positive_count,
        default=32_000_000,
        metavar="BYTES",
        help=f"of different words, about {MEMORY_PER_BYTE} bytes of memory each (default: 32M)",
    )
    parser.add_argument("--workers", type=positive_count, help="threads (default: one per core)")
    parser.add_argument("--force", action="store_true", help="replace the file that is there")
    parser.add_argument("--json", type=file_to_write, help="also write the figures to this file")
    return parser.parse_args()


def check(arguments: argparse.Namespace) -> None:
    """Raises UserError for what can't work."""
    if not SMALLEST < arguments.vocab_size <= LARGEST:
        raise UserError(
            f"--vocab-size is {arguments.vocab_size}: use {SMALLEST + 1} (256 bytes, one merge and the end of a text) "
            f"to {LARGEST:,}"
        )
    if arguments.sample_bytes > MOST_SAMPLE_BYTES:
        raise UserError(
            f"--sample-bytes is {arguments.sample_bytes:,}: use {MOST_SAMPLE_BYTES:,} or less, as the package "
            "tokenizers counts in 32 bits"
        )
    if arguments.out.exists() and not arguments.force:
        raise UserError(f"{arguments.out} is there already: choose another --out, or --force to replace it")


def open_source(arguments: argparse.Namespace) -> Source:
    """The corpus. Raises UserError where there is none, or it can't be read."""
    if len(arguments.source) == 1 and (arguments.source[0] / MANIFEST_FILE).exists():
        return TokenSetSource(arguments.source[0])
    found = find_files(arguments.source, arguments.field, all_splits=arguments.all_splits)
    for line in describe_left_out(found.left_out):
        print(f"left out {line}")
    if found.note:
        print(one_line(f"note     {found.note}"))
    return FileSource(found.files, arguments.field)


def announced(texts: Iterator[str]) -> Iterator[str]:
    """The texts; says when they end, as learning the merges then takes its time."""
    yield from texts
    print("learning merges from what was read", flush=True)


def compare(tokenizers: dict[str, Tokenizer], held_back: list[str]) -> dict[str, float]:
    """Bytes of text per token on the text held back, by tokenizer."""
    size = sum(len(text.encode("utf-8", "replace")) for text in held_back)
    return {
        name: size / max(1, sum(len(tokenizer.encode(text)) for text in held_back))
        for name, tokenizer in tokenizers.items()
    }


def report(arguments: argparse.Namespace, sample: Sample, tokenizer: Tokenizer, seconds: float) -> None:
    """Print what was made, and write the same figures to --json."""
    print(f"{arguments.out}: {describe_size(tokenizer.vocab_size)}")
    if tokenizer.vocab_size < arguments.vocab_size:
        print(f"warning: the text has no more pairs that repeat, for {arguments.vocab_size:,} ids: give more text")
    drawn = f"{format_bytes(sample.bytes)} of about {format_bytes(sample.source.text_bytes)}"
    print(f"learned from {drawn} in {format_duration(seconds)}")
    if sample.ended_by and sample.bytes < 0.9 * min(sample.most_bytes, sample.source.text_bytes):
        print(f"note: the sample ends before the corpus, as {sample.ended_by}")
    rates: dict[str, float] = {}
    if sample.held_back:
        rates = compare({"own": tokenizer, "gpt2": load_tokenizer("gpt2")}, sample.held_back)
        print(
            f"bytes per token on {format_bytes(sample.held_back_bytes)} held back: {rates['own']:.3f}, GPT-2's "
            f"{rates['gpt2']:.3f} ({rates['own'] / rates['gpt2'] - 1:+.1%})"
        )
    else:
        print("note: no document is among those held back, so nothing is compared with GPT-2's tokenizer: give more")
    if arguments.json:
        figures: dict[str, Any] = {
            "tokenizer_sha256": tokenizer.spec["sha256"],
            "file_sha256": hashlib.sha256(arguments.out.read_bytes()).hexdigest(),
            "tokens": tokenizer.token_count,
            "largest_id": tokenizer.vocab_size - 1,
            "padded": padded_size(tokenizer.vocab_size),
            "pattern": arguments.pattern,
            "seed": arguments.seed,
            "sample_bytes": sample.bytes,
            "sample_stretches": sample.stretches,
            "distinct_bytes": sample.distinct_bytes,
            "sample_ended_by": sample.ended_by,
            "held_back_bytes": sample.held_back_bytes,
            "bytes_per_token": rates,
            "seconds": seconds,
        }
        write_json_output(arguments.json, figures)


def main() -> int:
    arguments = parse_arguments()
    check(arguments)
    source = open_source(arguments)
    started = time.monotonic()
    sample = Sample(source, arguments.seed, arguments.sample_bytes, arguments.max_distinct, HELD_BACK_BYTES)
    text = train_bpe(
        announced(sample.texts()), arguments.vocab_size, arguments.pattern, choose_workers(arguments.workers)
    )
    if not sample.bytes:
        raise UserError("there is no text to learn from: give more, or other files")
    seconds = time.monotonic() - started
    write_output(arguments.out, text)
    report(arguments, sample, read_tokenizer_file(arguments.out), seconds)
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
