"""Turn FineWeb-Edu into token shards: 10 billion GPT-2 tokens as 100 shards of 100 million, and a fixed validation set.

The source is the Hugging Face hub (a pinned revision) or, with --source, a folder of parquet files as on the hub.
Stopped in any way, the same command goes on from the last whole shard and ends with the very same bytes, whatever the
number of processes. <|endoftext|> precedes every document. The validation split is the first --val-tokens tokens of
documents chosen by hash (one in 32) from the source's first file; it is the same for any --max-tokens.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import shutil
import time
from dataclasses import asdict

from common.errors import UserError, exit_on_user_error
from common.progress import format_bytes, format_count
from data_prep.corpus import JOURNAL_FILE, Corpus, InputFile, Settings, first_difference, prepare
from data_prep.encode_pool import START_METHODS
from data_prep.hub import HubFiles, HubSource, LocalFiles, find_on_hub, local_parquet
from data_prep.manifest import Manifest
from data_prep.preparation import (
    add_output_options,
    complete_set,
    positive_count,
    read_json,
    report,
    writing_alone,
)
from data_prep.tokenization import load_tokenizer
from data_prep.workers import choose_workers

SOURCE_NAME = "fineweb"
REPOSITORY = "HuggingFaceFW/fineweb-edu"
REVISION = "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9"  # of HuggingFaceFW/fineweb-edu; its sample-10BT has 14 files
VALIDATION_ONE_IN = 32
DOWNLOAD_FOLDER = "download"
# The published sample-10BT: 28,518,193,415 bytes of parquet for about 9.95 billion GPT-2 tokens.
TOKENS_PER_INPUT_BYTE = 0.36
TOKEN_BYTES = 2


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_output_options(parser, "fineweb")
    source = parser.add_argument_group("source")
    source.add_argument("--source", type=Path, help="folder of parquet files to read instead of the hub's")
    source.add_argument("--repo", default=REPOSITORY, help=f"data set on the hub (default: {REPOSITORY})")
    source.add_argument("--config", default="sample-10BT", help="its configuration (default: sample-10BT)")
    source.add_argument("--revision", help="commit, tag or branch (default: a pinned commit; elsewhere main)")
    source.add_argument("--field", default="text", help="column with the text (default: text)")
    source.add_argument("--keep-parquet", action="store_true", help="keep downloaded files in OUT/download")
    amount = parser.add_argument_group("amounts")
    amount.add_argument(
        "--max-tokens", type=positive_count, help="training tokens to make (default: all), as 1B or 1e9"
    )
    amount.add_argument("--val-tokens", type=count_or_none, default=10_000_000, help="validation tokens (10M)")
    amount.add_argument("--tokenizer", choices=["gpt2", "byte"], default="gpt2", help="vocabulary (default: gpt2)")
    work = parser.add_argument_group("work")
    work.add_argument("--workers", type=count_or_none, help="processes; 0: none but this one (default: one per core)")
    work.add_argument("--start-method", choices=START_METHODS, default=START_METHODS[0], help="of the processes")
    work.add_argument("--dry-run", action="store_true", help="say what would be done and whether the disk has room")
    return parser.parse_args()


def count_or_none(text: str) -> int:
    return 0 if text == "0" else positive_count(text)


def settings_of(arguments: argparse.Namespace) -> Settings:
    return Settings(
        shard_tokens=arguments.shard_tokens,
        val_tokens=arguments.val_tokens,
        max_tokens=arguments.max_tokens,
        field=arguments.field,
        validation_one_in=VALIDATION_ONE_IN,
        validation_files=1,
    )


def asked_origin(arguments: argparse.Namespace) -> dict[str, str]:
    """Where the text comes from, as far as the command line says. A local folder's path is not what its data are."""
    if arguments.source is not None:
        return {"repo": "local"}
    pinned = REVISION if arguments.repo == REPOSITORY else "main"
    return {"repo": arguments.repo, "config": arguments.config, "asked_revision": arguments.revision or pinned}


def check_same(arguments: argparse.Namespace, stored: dict[str, object], what: str) -> None:
    """Raise UserError where a set or a journal was made with other options."""
    wanted: dict[str, object] = {**asked_origin(arguments), "settings": asdict(settings_of(arguments))}
    if arguments.source is not None and arguments.source.is_dir():
        wanted["files"] = [asdict(file) for file in local_parquet(arguments.source, arguments.config).listed]
    if difference := first_difference({key: stored.get(key) for key in wanted}, wanted):
        raise UserError(f"{arguments.out} {what} with another {difference}: use the same, another --out, or --force")


def begun_source(arguments: argparse.Namespace) -> HubSource | None:
    """What an interrupted preparation found on the hub: going on needs no second look, and no second answer."""
    path = arguments.out / JOURNAL_FILE
    if arguments.source is not None or arguments.force or not path.exists():
        return None
    stored = read_json(path)["plan"]["source"]
    check_same(arguments, stored, "was begun")
    files = tuple(InputFile(**file) for file in stored["files"])
    return HubSource(stored["repo"], stored["config"], stored["revision"], files)


def open_source(arguments: argparse.Namespace) -> tuple[HubFiles | LocalFiles, dict[str, str]]:
    """The source's files, and what the manifest says about where they come from."""
    origin = asked_origin(arguments)
    if arguments.source is not None:
        return local_parquet(arguments.source, arguments.config), origin
    source = begun_source(arguments) or find_on_hub(arguments.repo, arguments.config, origin["asked_revision"])
    files = HubFiles(source, arguments.out / DOWNLOAD_FOLDER, keep=arguments.keep_parquet)
    return files, origin | {"revision": source.revision}


def estimated_disk_bytes(arguments: argparse.Namespace, files: HubFiles | LocalFiles) -> tuple[int, int]:
    """Tokens that will come out, about, and the bytes of disk that takes at most at one time."""
    sizes = [file.bytes for file in files.listed]
    tokens = int(sum(sizes) * TOKENS_PER_INPUT_BYTE)
    tokens = min(tokens, arguments.max_tokens or tokens)
    shards = (tokens + arguments.val_tokens) * TOKEN_BYTES
    if isinstance(files, LocalFiles):
        return tokens, shards
    needed = min(sum(sizes), int(tokens / TOKENS_PER_INPUT_BYTE) + max(sizes))
    return tokens, shards + (needed if arguments.keep_parquet else min(needed, 3 * max(sizes)))


def say_plan(arguments: argparse.Namespace, files: HubFiles | LocalFiles, origin: dict[str, str], workers: int) -> bool:
    """Print what will be done; returns whether the disk has room for it."""
    tokens, needed = estimated_disk_bytes(arguments, files)
    folder = arguments.out
    while not folder.exists():
        folder = folder.absolute().parent
    free = shutil.disk_usage(folder).free
    where = arguments.source or f"{origin['repo']} {origin['config']} at {origin['revision'][:12]}"
    size = sum(file.bytes for file in files.listed)
    shards = -(-tokens // arguments.shard_tokens)
    print(f"source   {where}: {len(files.listed)} parquet files, {format_bytes(size)}")
    print(f"output   {arguments.out}: about {format_count(tokens)} tokens in {shards} shards, "
          f"and {format_count(arguments.val_tokens)} for validation")  # fmt: skip
    print(f"disk     about {format_bytes(needed)} needed, {format_bytes(free)} free")
    print(f"workers  {workers} ({arguments.start_method})", flush=True)
    return needed <= free


def make_set(arguments: argparse.Namespace, workers: int) -> Manifest:
    files, origin = open_source(arguments)
    complete = False
    try:
        if not say_plan(arguments, files, origin, workers):
            print("warning: that may not fit; should the disk fill up, make room and run the same command again")
        tokenizer = load_tokenizer(arguments.tokenizer)
        corpus = Corpus(SOURCE_NAME, dict(origin), files, settings_of(arguments), tokenizer)
        manifest = prepare(corpus, arguments.out, workers, arguments.start_method)
        complete = True
    finally:
        if isinstance(files, HubFiles):
            files.close(complete=complete)
    return manifest


def dry_run(arguments: argparse.Namespace, workers: int) -> int:
    files, origin = open_source(arguments)
    if isinstance(files, HubFiles):
        files.close(complete=False)
    if not say_plan(arguments, files, origin, workers):
        raise UserError(f"{arguments.out} lacks room: free some, choose another --out, or a smaller --max-tokens")
    return 0


def main() -> int:
    arguments = parse_arguments()
    workers = choose_workers(arguments.workers)
    if arguments.dry_run:
        return dry_run(arguments, workers)
    started = time.monotonic()
    with writing_alone(arguments.out):
        manifest = complete_set(arguments.out, SOURCE_NAME, force=arguments.force)
        made = manifest is None
        if manifest is not None:
            check_same(arguments, manifest.source, "was made")
        else:
            if arguments.force:
                (arguments.out / JOURNAL_FILE).unlink(missing_ok=True)
            manifest = make_set(arguments, workers)
    seconds = time.monotonic() - started if made else None
    print(f"{arguments.out} is complete" + ("" if made else " already (--force makes it again)"))
    report(arguments.out, manifest, seconds=seconds, json_file=arguments.json, made=made)
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
