"""Which examples of an evaluation stand in a token set's training text?

An example is found where a run of 13 words (--words) of its context and right ending stands in a training document, as
in Brown et al. (2020), appendix C. Words are letters and digits in lower case; line breaks, punctuation and case don't
count. Runs in more than --frequent documents are common phrases and don't count by themselves; an example of which half
the runs are found counts whatever their frequency. Examples with fewer words can't be judged, and are listed.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from common.early_end import end_in_one_line

    sys.excepthook = end_in_one_line

import argparse
import time
from typing import Any

import numpy as np

from common.command_line import CommandParser
from common.errors import UserError, exit_on_user_error
from common.plain_text import one_line
from common.progress import format_count, format_duration
from common.publish import file_to_write, write_json_output
from data_prep.corpora.corpus_command import count_or_none
from data_prep.corpora.preparation import positive_count
from data_prep.overlap.evaluation_items import Evaluation, read_evaluation
from data_prep.overlap.scan import Occurrences, scan
from data_prep.overlap.word_ngrams import NgramIndex
from data_prep.token_sets.token_set import TokenSet

SHOWN = 5
FEWEST_WORDS = 5


def parse_arguments() -> argparse.Namespace:
    parser = CommandParser(__doc__)
    parser.add_argument("folder", type=Path, metavar="SET", help="folder of the token set")
    parser.add_argument(
        "--against", type=Path, required=True, metavar="FILE", help="the evaluation's examples, such as HellaSwag's"
    )
    parser.add_argument("--fields", default="", metavar="A,B", help="its JSON lines' fields, joined (default: by kind)")
    parser.add_argument("--split", choices=["train", "val"], default="train", help="which split (default: train)")
    parser.add_argument("--words", type=positive_count, default=13, metavar="N", help="in a row (default: 13)")
    parser.add_argument(
        "--frequent", type=positive_count, default=10, metavar="N", help="documents of a common phrase (default: 10)"
    )
    parser.add_argument("--workers", type=count_or_none, help="processes (default: one per core, 0 for little text)")
    parser.add_argument("--json", type=file_to_write, help="also write the result to this file, example by example")
    return parser.parse_args()


def judge(index: NgramIndex, found: Occurrences, frequent: int) -> dict[str, list[Any]]:
    """Which examples are `found`, which share only `frequent` phrases, and which are `unchecked`.

    An example's entry has its number in the file, from 0; its N-grams, and how many of them stand in training text; the
    rarest of these, the first document that has it, and how many do.
    """
    judged: dict[str, list[Any]] = {"found": [], "frequent": [], "unchecked": []}
    for item, grams in enumerate(index.of_item):
        if not len(grams):
            judged["unchecked"].append(item)
            continue
        counts = found.documents[grams]  # (n,)
        present = counts > 0
        if not present.any():
            continue
        rarest = int(grams[np.flatnonzero(present)[np.argmin(counts[present])]])
        entry = {
            "item": item,
            "ngrams": len(grams),
            "ngrams_found": int(present.sum()),
            "ngram": index.text(rarest),
            "document": int(found.first[rarest]),
            "documents": int(found.documents[rarest]),
        }
        rare = (present & (counts <= frequent)).any() or present.mean() >= 0.5
        judged["found" if rare else "frequent"].append(entry)
    return judged


def report(arguments: argparse.Namespace, evaluation: Evaluation, judged: dict[str, list[Any]], tokens: int) -> None:
    """Print how many examples were found, and the first of them."""
    total = len(evaluation.texts)
    clean = total - len(judged["found"]) - len(judged["unchecked"])
    print(f"{evaluation.name}: {total:,} examples, {format_count(tokens)} tokens of {arguments.split} searched")
    print(
        f"  found      {len(judged['found']):>8,}  a run of {arguments.words} words of theirs stands in training text"
    )
    print(f"  clean      {clean:>8,}  of which {len(judged['frequent']):,} share only common phrases")
    print(f"  unchecked  {len(judged['unchecked']):>8,}  fewer than {arguments.words} words")
    for entry in judged["found"][:SHOWN]:
        where = f"example {entry['item']}, document {entry['document']:,} (of {entry['documents']:,})"
        print(one_line(f"  {where}: {entry['ngram']}"))
    if judged["found"]:
        print(f"(inspect_shards.py {arguments.folder} --document N shows a document; --json lists all examples)")


def main() -> int:
    arguments = parse_arguments()
    if arguments.words < FEWEST_WORDS:
        raise UserError(f"--words is {arguments.words}: use {FEWEST_WORDS} or more, as fewer are found everywhere")
    fields = [field for field in arguments.fields.split(",") if field]
    evaluation = read_evaluation(arguments.against, fields)
    identity = TokenSet.open(arguments.folder).identity
    index = NgramIndex(evaluation.texts, arguments.words)
    started = time.monotonic()
    found = scan(arguments.folder, arguments.split, index, arguments.workers)
    seconds = time.monotonic() - started
    judged = judge(index, found, arguments.frequent)
    report(arguments, evaluation, judged, found.tokens)
    print(f"{format_duration(seconds)}, {format_count(found.tokens / max(seconds, 1e-9))} tokens/s")
    if arguments.json:
        against = {"file": evaluation.name, "sha256": evaluation.sha256, "items": len(evaluation.texts)}
        rule = {"words": arguments.words, "frequent_documents": arguments.frequent, "fields": fields}
        read = {"split": arguments.split, "tokens": found.tokens, "documents": found.count, "seconds": seconds}
        write_json_output(arguments.json, {"data_identity": identity, "against": against, "rule": rule} | read | judged)
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
