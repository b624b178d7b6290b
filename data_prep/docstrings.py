"""Make the embedded corpus: docstrings of the standard library and of the installed packages Longhaul uses.

Nothing is downloaded. About 25 MB of technical English, 6 million GPT-2 tokens, in well under a minute. Documents are
what `help()` shows: one per module, class or function and one per topic of the language reference; exact copies are
dropped, <|endoftext|> precedes each document, and every 25th (by a hash of its first 200 characters) is for validation.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from common.early_end import end_in_one_line

    sys.excepthook = end_in_one_line

import argparse
import contextlib
import hashlib
import itertools
import multiprocessing
import time
from collections.abc import Generator
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import Distribution
from typing import Any

import numpy as np

from common.command_line import CommandParser
from common.errors import UserError, exit_on_user_error
from common.paths import PROJECT
from common.progress import progress_bar
from data_prep.corpora.docstring_sources import SourceFile, docstrings_in, required_distributions, source_files, topics
from data_prep.corpora.preparation import (
    add_output_options,
    chosen_for_validation,
    complete_set,
    finish_set,
    first_difference,
    positive_count,
    report,
    writing_alone,
)
from data_prep.corpora.workers import choose_workers, ignoring_interrupts
from data_prep.token_sets.manifest import Manifest
from data_prep.token_sets.shard_writer import ShardWriter, clear_token_set
from data_prep.tokenization.loading import load_tokenizer
from data_prep.tokenization.tokenizer import Tokenizer
from data_prep.tokenization.tokenizer_choice import TokenizerChoice, add_tokenizer_option, choose_tokenizer

SOURCE_NAME = "docstrings"
VALIDATION_ONE_IN = 25
FILES_PER_TASK = 32
TOKENIZERS = ("gpt2", "gpt2-8k", "byte")
LEFT_OUT = {"scipy", "tokenizers"}  # required since 0.2.0: the corpus stays the one that the demo was measured on
REQUIREMENTS = PROJECT / "requirements.txt"


def parse_arguments() -> argparse.Namespace:
    parser = CommandParser(__doc__)
    add_output_options(parser, "docstrings")
    parser.add_argument("--requirements", type=Path, default=REQUIREMENTS, help="whose packages are read")
    add_tokenizer_option(parser, TOKENIZERS)
    parser.add_argument("--workers", type=int, help="parsing processes (default: one per core, as memory allows)")
    parser.add_argument("--max-documents", type=positive_count, help="stop after so many documents (for a quick look)")
    return parser.parse_args()


def documents(files: list[SourceFile], workers: int) -> Generator[str, None, None]:
    """All documents, each text once, in the order of topics, then file names, then lines."""
    seen: set[str] = set()
    for text in topics():
        if text not in seen:
            seen.add(text)
            yield text
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(max(1, workers), mp_context=context) as pool,
        progress_bar(len(files), "file", "parsing") as bar,
    ):
        with ignoring_interrupts():  # all processes start with the first task
            results = pool.map(docstrings_in, files, chunksize=FILES_PER_TASK)
        for found in results:
            bar.update()
            for text in found:
                if text not in seen:
                    seen.add(text)
                    yield text


def corpus_distributions(requirements: Path) -> dict[str, Distribution]:
    """The packages that are read, by name."""
    return {name: found for name, found in required_distributions(requirements).items() if name not in LEFT_OUT}


def write_set(arguments: argparse.Namespace, choice: TokenizerChoice, tokenizer: Tokenizer) -> Manifest:
    """Write both splits, then the manifest, in place of what is there."""
    folder, shard_tokens = arguments.out, arguments.shard_tokens
    distributions = corpus_distributions(arguments.requirements)
    clear_token_set(folder)
    with (
        ShardWriter(folder, "train", tokenizer, shard_tokens) as train,
        ShardWriter(folder, "val", tokenizer, shard_tokens) as val,
    ):
        with contextlib.closing(documents(source_files(distributions), choose_workers(arguments.workers))) as found:
            texts = list(itertools.islice(found, arguments.max_documents))
        # shuffled across packages, so that any part of a split represents the whole
        for text in sorted(texts, key=lambda text: hashlib.sha256(text.encode("utf-8", "replace")).digest()):
            writer = val if chosen_for_validation(text, VALIDATION_ONE_IN) else train
            writer.write(np.concatenate([tokenizer.opening, tokenizer.encode(text), tokenizer.closing]))
    source = {
        "name": SOURCE_NAME,
        "packages": {name: distribution.version for name, distribution in distributions.items()},
        "settings": settings_of(arguments, choice),
        "validation": f"1 document in {VALIDATION_ONE_IN}, by a hash of its first 200 characters",
    }
    splits = {"train": tuple(train.shards), "val": tuple(val.shards)}
    return finish_set(folder, tokenizer, source, ["tiktoken", "numpy"], splits, shared_documents=0)


def settings_of(arguments: argparse.Namespace, choice: TokenizerChoice) -> dict[str, Any]:
    return {"tokenizer": choice.name, "max_documents": arguments.max_documents}


def check_same(arguments: argparse.Namespace, choice: TokenizerChoice, manifest: Manifest) -> None:
    """Raise UserError where the complete set has another vocabulary, or is part of a corpus (or another part)."""
    made = manifest.source.get("settings", {"tokenizer": manifest.tokenizer["kind"], "max_documents": None})
    if difference := first_difference(made, settings_of(arguments, choice)):
        raise UserError(f"{arguments.out} was made with another {difference}: choose another --out, or --force")


def main() -> int:
    arguments = parse_arguments()
    started = time.monotonic()
    choice = choose_tokenizer(arguments.tokenizer, TOKENIZERS)
    with writing_alone(arguments.out):
        manifest = complete_set(arguments.out, SOURCE_NAME, force=arguments.force)
        made = manifest is None
        if manifest is not None:
            check_same(arguments, choice, manifest)
        else:
            manifest = write_set(arguments, choice, load_tokenizer(choice.spec))
    seconds = time.monotonic() - started if made else None
    print(f"{arguments.out} is complete" + ("" if made else " already (--force makes it again)"))
    report(arguments.out, manifest, seconds=seconds, json_file=arguments.json, made=made)
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
