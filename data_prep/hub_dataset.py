"""Turn any text data set of the Hugging Face hub into token shards, or a folder that is laid out like one.

The package `datasets` finds the files of a configuration and split; what --revision names is resolved to a commit once,
and recorded. Files (parquet, lines of JSON, text) are downloaded while others are read, and removed when their tokens
are in shards. Stopped in any way, the same command resumes; the shards are the same for any number of processes.
Records whose field is null, empty or missing are counted.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from common.early_end import end_in_one_line

    sys.excepthook = end_in_one_line

import argparse
from dataclasses import asdict
from typing import Any

from common.command_line import CommandParser
from common.errors import exit_on_user_error
from common.paths import expand_path
from data_prep.corpora.corpus import Files, InputFile
from data_prep.corpora.corpus_command import Command, Opened, add_amount_options, add_work_options, run, settings_of
from data_prep.corpora.file_kinds import kind_of
from data_prep.corpora.hub import HubFiles, resumed_source
from data_prep.corpora.hub_listing import find_dataset, local_dataset
from data_prep.corpora.journal import JOURNAL_FILE
from data_prep.corpora.preparation import add_output_options
from data_prep.corpora.readers import TEXT_PER_COMPRESSED_BYTE
from data_prep.tokenization.loading import load_tokenizer
from data_prep.tokenization.tokenizer_choice import choose_tokenizer

COMMON = ("out", "config", "split", "max_tokens", "tokenizer", "field", "dry_run")  # of --help
TOKENIZERS = ("gpt2", "byte")
DOWNLOAD_FOLDER = "download"
TEXT_PER_PARQUET_BYTE = 1.6  # as in FineWeb-Edu's
SUBWORDS_PER_BYTE = 0.23


def parse_arguments() -> argparse.Namespace:
    parser = CommandParser(__doc__, common=COMMON)
    parser.add_argument("dataset", metavar="DATASET", help="its name on the hub, as allenai/c4, or a folder")
    add_output_options(parser, "hub_dataset")
    source = parser.add_argument_group("source")
    source.add_argument("--config", help="its configuration (default: its only one)")
    source.add_argument("--data-dir", metavar="FOLDER", help="only files of this folder of it (default: all)")
    source.add_argument("--split", default="train", help="its split (default: train)")
    source.add_argument("--revision", default="main", help="commit, tag or branch (default: main)")
    source.add_argument("--keep-files", action="store_true", help="keep downloaded files in OUT/download")
    add_amount_options(parser, TOKENIZERS)
    add_work_options(parser)
    return parser.parse_args()


def text_bytes(file: InputFile) -> float:
    """Roughly how much text a file holds."""
    kind = kind_of(file.name)
    if kind.content == "parquet":
        return file.bytes * TEXT_PER_PARQUET_BYTE
    return file.bytes * (TEXT_PER_COMPRESSED_BYTE if kind.compression else 1)


def tokens_per_byte(tokenizer: str, files: tuple[InputFile, ...]) -> float:
    """About how many tokens a byte of the files makes."""
    share = sum(map(text_bytes, files)) / max(1, sum(file.bytes for file in files))
    return share * (1.0 if tokenizer == "byte" else SUBWORDS_PER_BYTE)


def open_hub(arguments: argparse.Namespace, asked: dict[str, Any], begun: dict[str, Any] | None) -> Opened:
    """The hub's files, as an interrupted run found them where there was one."""
    if begun is not None:
        source = resumed_source(begun, arguments.out / JOURNAL_FILE)
    else:
        source = find_dataset(
            arguments.dataset, arguments.config, arguments.split, arguments.revision, arguments.data_dir
        )
    rate = tokens_per_byte(arguments.tokenizer, source.files)
    sizes = [file.bytes for file in source.files]
    wanted = sum(sizes)
    if arguments.max_tokens:
        wanted = min(wanted, int(arguments.max_tokens / rate) + max(sizes))
    files = HubFiles(source, arguments.out / DOWNLOAD_FOLDER, keep=arguments.keep_files)
    return Opened(
        files,
        asked | {"revision": source.revision, "config": source.config},
        f"{source.repo} {source.config} {arguments.split} at {source.revision[:12]}",
        rate,
        wanted if arguments.keep_files else min(wanted, 3 * max(sizes)),
        close=lambda complete: files.close(complete=complete),
    )


def main() -> int:
    arguments = parse_arguments()
    tokenizer = choose_tokenizer(arguments.tokenizer, TOKENIZERS)
    asked: dict[str, Any] = {"split": arguments.split}
    if arguments.data_dir is not None:
        asked["data_dir"] = arguments.data_dir
    folder, local = expand_path(arguments.dataset), None
    if folder.is_dir():
        config, local = local_dataset(folder, arguments.config, arguments.split, arguments.data_dir)
        asked |= {"repo": "local", "config": config, "files": [asdict(file) for file in local.listed]}
    else:
        asked |= {"repo": arguments.dataset, "asked_config": arguments.config, "asked_revision": arguments.revision}

    def open_source(begun: dict[str, Any] | None) -> Opened:
        if local is None:
            return open_hub(arguments, asked, begun)
        files: Files = local
        return Opened(files, asked, arguments.dataset, tokens_per_byte(arguments.tokenizer, local.listed))

    command = Command(
        "hub_dataset",
        asked,
        settings_of(arguments, tokenizer, validation_files=None),
        tokenizer.token_bytes,
        open_source,
        lambda files: load_tokenizer(tokenizer.spec),
        count_absent=True,
    )
    return run(arguments, command)


if __name__ == "__main__":
    exit_on_user_error(main)
