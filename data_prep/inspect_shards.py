"""Look into a token set: how long its documents are, and their text.

With --document N the N-th document (from 0) of a split is decoded; with --plot the lengths are drawn.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from common.early_end import end_in_one_line

    sys.excepthook = end_in_one_line

import argparse
from typing import Any

import numpy as np

from common.command_line import CommandParser
from common.errors import UserError, exit_on_user_error
from common.plain_text import print_text
from common.progress import format_count, progress_bar
from common.publish import file_to_write, write_json_output
from data_prep.corpora.preparation import positive_count
from data_prep.token_sets.manifest import STARTS
from data_prep.token_sets.token_set import TokenSet, TokenStream
from data_prep.tokenization.loading import load_tokenizer
from data_prep.tokenization.tokenizer import Ids, Tokenizer

BLOCK_TOKENS = 16 << 20
PERCENTILES = (1, 10, 25, 50, 75, 90, 99)
SHOWN_DOCUMENTS = 3
SHOWN_CHARACTERS = 300


def parse_arguments() -> argparse.Namespace:
    parser = CommandParser(__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of the token set")
    parser.add_argument("--split", choices=["train", "val"], default="train", help="which split (default: train)")
    parser.add_argument("--document", type=int, metavar="N", help="show this whole document (the first is 0)")
    parser.add_argument("--max-tokens", type=positive_count, help="read only the first N tokens (default: all)")
    parser.add_argument("--plot", type=Path, nargs="?", const="", metavar="PNG", help="draw the lengths")
    parser.add_argument("--json", type=file_to_write, help="also write the statistics to this file")
    return parser.parse_args()


def document_starts(stream: TokenStream, begin: int | None, stop: int) -> Ids:
    """Positions (n,) at which documents start, int64: those of the id before them, or 0 where there is none."""
    if begin is None:
        return np.zeros(min(1, stop), dtype=np.int64)
    found = []
    with progress_bar(stop, "tok", "looking", scale=True) as bar:
        for start in range(0, stop, BLOCK_TOKENS):
            block = stream.read(start, min(stop, start + BLOCK_TOKENS))
            found.append(np.flatnonzero(block == begin) + start)
            bar.update(len(block))
    return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)


def statistics(lengths: Ids, split: str, tokens: int, text_bytes: int) -> dict[str, Any]:
    """Figures about documents of `lengths` (n,) tokens, the ids that mark their start and end included."""
    figures: dict[str, Any] = {"split": split, "tokens": tokens, "documents": len(lengths)}
    if len(lengths):
        figures |= {"mean": float(lengths.mean()), "shortest": int(lengths.min()), "longest": int(lengths.max())}
        values = np.percentile(lengths, PERCENTILES)
        figures["percentiles"] = dict(zip(map(str, PERCENTILES), map(float, values), strict=True))
    figures["bytes_per_token"] = text_bytes / max(1, tokens)
    return figures


def print_statistics(figures: dict[str, Any]) -> None:
    print(f"{figures['split']}: {figures['documents']:,} documents, {format_count(figures['tokens'])} tokens, "
          f"{figures['bytes_per_token']:.2f} bytes of text per token")  # fmt: skip
    if figures["documents"]:
        print(f"tokens per document: mean {figures['mean']:,.1f}, "
              f"shortest {figures['shortest']:,}, longest {figures['longest']:,}")  # fmt: skip
        print("  ".join(f"{name}%: {value:,.0f}" for name, value in figures["percentiles"].items()))


def read_document(stream: TokenStream, starts: Ids, number: int, stop: int, tokenizer: Tokenizer) -> tuple[str, int]:
    """Text and length in tokens of a document. Raises UserError where there is none. Args: starts: (n,) of all."""
    if not 0 <= number < len(starts):
        numbers = f"use a number from 0 to {len(starts) - 1}" if len(starts) else "the split has none"
        raise UserError(f"there is no document {number}: {numbers}")
    begin = int(starts[number])
    end = int(starts[number + 1]) if number + 1 < len(starts) else stop
    ids = stream.read(begin, end)
    return tokenizer.decode(ids[ids != tokenizer.end_of_text_id]), end - begin


def draw_lengths(lengths: Ids, split: str, path: Path) -> None:
    """A histogram of document lengths (n,), and the share of tokens in documents up to a length, over a log axis."""
    from matplotlib.figure import Figure  # here: only drawing needs it

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    count_axes = figure.subplots()
    edges = np.geomspace(1, max(2, int(lengths.max()) + 1), 60)
    count_axes.hist(lengths, bins=edges.tolist(), color="#4477aa")
    count_axes.set(xscale="log", xlabel="tokens in a document", ylabel="documents", title=f"Document lengths: {split}")
    share_axes = count_axes.twinx()
    ordered = np.sort(lengths)
    share_axes.plot(ordered, np.cumsum(ordered) / ordered.sum(), color="#cc6677")
    share_axes.set(ylabel="share of tokens in documents up to this length", ylim=(0, 1))
    figure.savefig(path, dpi=120)


def main() -> int:
    arguments = parse_arguments()
    opened = TokenSet.open(arguments.folder)
    tokenizer = load_tokenizer(opened.tokenizer_spec)
    stream = opened.split(arguments.split)
    stop = min(len(stream), arguments.max_tokens or len(stream))
    marks = opened.marks(arguments.split)
    if marks is not None:  # of conversations, which no id need start
        starts = document_starts(marks, STARTS, stop)
    else:
        starts = document_starts(stream, tokenizer.begin_of_text_id, stop)
    if arguments.document is not None:
        text, count = read_document(stream, starts, arguments.document, stop, tokenizer)
        print(f"document {arguments.document} of {arguments.split}: {count:,} tokens")
        print_text(f"{text}\n")
        return 0
    lengths = np.diff(np.append(starts, stop))
    text_bytes = int(stream.bytes * (stop / max(1, len(stream))))
    figures = statistics(lengths, arguments.split, stop, text_bytes)
    print_statistics(figures)
    for number in range(min(SHOWN_DOCUMENTS, len(starts))):
        text, count = read_document(stream, starts, number, stop, tokenizer)
        shown = text[:SHOWN_CHARACTERS] + ("…" if len(text) > SHOWN_CHARACTERS else "")
        print(f"\n--- document {number}, {count:,} tokens\n{shown}")
    if arguments.plot is not None and len(lengths):
        path = arguments.plot if arguments.plot.name else arguments.folder / f"lengths-{arguments.split}.png"
        try:
            draw_lengths(lengths, arguments.split, path)
        except (OSError, ValueError) as error:  # no such folder, no such format
            raise UserError(f"{path} can't be drawn: {error}") from None
        print(f"\npicture: {path}")
    if arguments.json:
        write_json_output(arguments.json, figures)
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
