"""Turn FineWeb-Edu into token shards: 10 billion GPT-2 tokens as 100 shards of 100 million, and a fixed validation set.

The source is the Hugging Face hub (a pinned revision) or, with --source, a folder of parquet files as on the hub.
Stopped in any way, the same command resumes from the last whole shard and ends with the very same bytes, whatever the
number of processes. <|endoftext|> precedes every document. The validation split is the first --val-tokens tokens of
documents chosen by hash (one in 32) from the source's first file; it is the same for any --max-tokens.
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
from common.errors import UserError, exit_on_user_error
from data_prep.corpora.corpus_command import (
    Command,
    Opened,
    add_amount_options,
    add_splits_option,
    add_work_options,
    run,
    settings_of,
)
from data_prep.corpora.hub import HubFiles, find_on_hub, resumed_source
from data_prep.corpora.journal import JOURNAL_FILE
from data_prep.corpora.local_files import LocalSource, local_parquet
from data_prep.corpora.preparation import add_output_options
from data_prep.tokenization.loading import load_tokenizer
from data_prep.tokenization.tokenizer_choice import choose_tokenizer

COMMON = ("out", "config", "max_tokens", "tokenizer", "source", "dry_run")  # of --help
REPOSITORY = "HuggingFaceFW/fineweb-edu"
REVISION = "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9"  # of HuggingFaceFW/fineweb-edu; its sample-10BT has 14 files
TOKENIZERS = ("gpt2", "byte")
DOWNLOAD_FOLDER = "download"
# The published sample-10BT: 28,518,193,415 bytes of parquet for about 9.95 billion GPT-2 tokens of some 4.6 bytes.
TOKENS_PER_INPUT_BYTE = {"byte": 1.6}
SUBWORDS_PER_INPUT_BYTE = 0.36


def parse_arguments() -> argparse.Namespace:
    parser = CommandParser(__doc__, common=COMMON)
    add_output_options(parser, "fineweb-edu")
    source = parser.add_argument_group("source")
    source.add_argument("--source", type=Path, help="folder of parquet files to read instead of the hub's")
    add_splits_option(source)
    source.add_argument("--repo", default=REPOSITORY, help=f"data set on the hub (default: {REPOSITORY})")
    source.add_argument("--config", default="sample-10BT", help="its configuration (default: sample-10BT)")
    source.add_argument("--revision", help="commit, tag or branch (default: a pinned commit; of other data sets, main)")
    source.add_argument("--keep-parquet", action="store_true", help="keep downloaded files in OUT/download")
    add_amount_options(parser, TOKENIZERS)
    add_work_options(parser)
    return parser.parse_args()


def open_source(
    arguments: argparse.Namespace, asked: dict[str, Any], local: LocalSource | None, begun: dict[str, Any] | None
) -> Opened:
    """The files to read: a local folder's or the hub's, as an interrupted run found them where there was one."""
    rate = TOKENS_PER_INPUT_BYTE.get(arguments.tokenizer, SUBWORDS_PER_INPUT_BYTE)
    if arguments.source is not None:
        found = local or local_parquet(arguments.source, arguments.config, all_splits=arguments.all_splits)
        label = str(arguments.source)
        return Opened(found.files, asked, label, rate, left_out=found.left_out, note=found.note)
    if begun is not None:
        source = resumed_source(begun, arguments.out / JOURNAL_FILE)
    else:
        source = find_on_hub(arguments.repo, arguments.config, asked["asked_revision"])
    sizes = [file.bytes for file in source.files]
    wanted = sum(sizes)
    if arguments.max_tokens:
        wanted = min(wanted, int(arguments.max_tokens / rate) + max(sizes))
    hub_files = HubFiles(source, arguments.out / DOWNLOAD_FOLDER, keep=arguments.keep_parquet)
    return Opened(
        hub_files,
        asked | {"revision": source.revision},
        f"{source.repo} {source.config} at {source.revision[:12]}",
        rate,
        wanted if arguments.keep_parquet else min(wanted, 3 * max(sizes)),
        close=lambda complete: hub_files.close(complete=complete),
    )


def main() -> int:
    arguments = parse_arguments()
    asked: dict[str, Any] = {"repo": "local"}  # a folder's path does not identify its data
    local = None
    if arguments.source is None:
        if arguments.all_splits:
            raise UserError("--all-splits needs --source: of the hub's data sets only the train split is read")
        pinned = REVISION if arguments.repo == REPOSITORY else "main"
        asked = {"repo": arguments.repo, "config": arguments.config, "asked_revision": arguments.revision or pinned}
    elif arguments.source.is_dir():
        local = local_parquet(arguments.source, arguments.config, all_splits=arguments.all_splits)
        asked["files"] = [asdict(file) for file in local.files.listed]
    tokenizer = choose_tokenizer(arguments.tokenizer, TOKENIZERS)
    command = Command(
        "fineweb",
        asked,
        settings_of(arguments, tokenizer, validation_files=1),
        tokenizer.token_bytes,
        lambda begun: open_source(arguments, asked, local, begun),
        lambda files: load_tokenizer(tokenizer.spec),
    )
    return run(arguments, command)


if __name__ == "__main__":
    exit_on_user_error(main)
