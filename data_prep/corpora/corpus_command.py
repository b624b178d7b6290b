"""The course of a preparation command: print the plan, check the disk, keep a complete set, finish a started one."""

import argparse
import contextlib
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.plain_text import one_line
from common.progress import format_bytes, format_count
from common.publish import TEMPORARY_SUFFIX
from data_prep.corpora.corpus import Corpus, Files, Settings, prepare
from data_prep.corpora.document_encoders import SPELLINGS
from data_prep.corpora.encode_pool import START_METHODS, warm_up
from data_prep.corpora.file_kinds import suffix_of
from data_prep.corpora.file_walk import LeftOut, describe_left_out
from data_prep.corpora.journal import JOURNAL_FILE, Begun, source_difference
from data_prep.corpora.preparation import VALIDATION_ONE_IN, complete_set, positive_count, report, writing_alone
from data_prep.corpora.skipping import describe_skipped
from data_prep.corpora.workers import choose_workers
from data_prep.token_sets.manifest import MANIFEST_FILE, Manifest
from data_prep.token_sets.shard_writer import remove_file, shard_files
from data_prep.tokenization.tokenizer import Tokenizer
from data_prep.tokenization.tokenizer_choice import TokenizerChoice, add_tokenizer_option

FEW_TOKENS = 8_000_000  # this process has encoded them before worker processes would have started and done so


@dataclass(frozen=True)
class Opened:
    """A source that has been looked at. `origin` is for the manifest; `extra_disk_bytes` is for downloads.
    `left_out` and `note` are for people.
    """

    files: Files
    origin: dict[str, Any]
    label: str
    tokens_per_byte: float
    extra_disk_bytes: int = 0
    left_out: LeftOut = field(default_factory=dict)
    note: str | None = None
    close: Callable[[bool], None] = lambda complete: None


@dataclass(frozen=True)
class Command:
    """What is particular to one command. `asked` is the part of its command line about the source, for comparison."""

    name: str
    asked: dict[str, Any]
    settings: Settings
    token_bytes: int
    open_source: Callable[[dict[str, Any] | None], Opened]  # given what an interrupted run found
    load_tokenizer: Callable[[Files], Tokenizer]
    count_absent: bool = False  # these as Corpus has them
    conversations: bool = False
    longest: int | None = None
    pairs: bool = False


def add_amount_options(parser: argparse.ArgumentParser, tokenizers: Sequence[str]) -> None:
    """`--max-tokens`, `--val-tokens`, `--tokenizer` (one of these kinds, or a model's), `--field`."""
    group = parser.add_argument_group("amounts and text")
    group.add_argument("--max-tokens", type=positive_count, help="training tokens to make, as 1B or 1e9 (default: all)")
    group.add_argument("--val-tokens", type=count_or_none, default=10_000_000, help="validation tokens (default: 10M)")
    add_tokenizer_option(group, tokenizers)
    group.add_argument("--field", default="text", help="column or field with the text (default: text)")


def add_work_options(parser: argparse.ArgumentParser) -> None:
    """`--skip-bad`, `--workers`, `--start-method`, `--dry-run`."""
    group = parser.add_argument_group("work")
    group.add_argument(
        "--skip-bad",
        type=count_or_none,
        default=0,
        metavar="N",
        help="skip up to N unreadable lines, row groups or ends of files, and list them (default: 0)",
    )
    group.add_argument(
        "--workers", type=count_or_none, help="processes; 0: only this one (default: one per core, 0 for little text)"
    )
    group.add_argument("--start-method", choices=START_METHODS, default=START_METHODS[0], help="of the processes")
    group.add_argument("--dry-run", action="store_true", help="print what would be done and whether the disk has room")


def add_splits_option(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """`--all-splits`."""
    parser.add_argument(
        "--all-splits",
        action="store_true",
        help="also read files that are named for validation or test, such as test-00000.parquet",
    )


def count_or_none(text: str) -> int:
    return 0 if text == "0" else positive_count(text)


def settings_of(arguments: argparse.Namespace, tokenizer: TokenizerChoice, validation_files: int | None) -> Settings:
    return Settings(
        shard_tokens=arguments.shard_tokens,
        val_tokens=arguments.val_tokens,
        max_tokens=arguments.max_tokens,
        field=arguments.field,
        tokenizer=tokenizer.name,
        validation_one_in=VALIDATION_ONE_IN,
        validation_files=validation_files,
    )


def run(arguments: argparse.Namespace, command: Command) -> int:
    """The whole command; returns its exit status."""
    if arguments.dry_run:
        if (there := complete_set(arguments.out, command.name, force=arguments.force)) is not None:
            _check_same(arguments.out, command, there.source, "was made")
            print(f"{arguments.out} is complete already (--force makes it again)")
            return 0
        with _opened(command, _begun(arguments, command)) as opened:
            if not _say_plan(arguments, command, opened, _workers(arguments, command, opened)):
                raise UserError(f"{arguments.out} lacks disk space: free some, or use another --out or --max-tokens")
        return 0
    started = time.monotonic()
    with writing_alone(arguments.out):
        _remove_leftovers(arguments.out)
        manifest = complete_set(arguments.out, command.name, force=arguments.force)
        made = manifest is None
        if manifest is not None:
            _check_same(arguments.out, command, manifest.source, "was made")
            remove_file(arguments.out / JOURNAL_FILE)  # left by a command that was killed at its very end
        else:
            manifest = _make_set(arguments, command)
    seconds = time.monotonic() - started if made else None
    print(f"{arguments.out} is complete" + ("" if made else " already (--force makes it again)"))
    report(arguments.out, manifest, seconds=seconds, json_file=arguments.json, made=made)
    if skipped := manifest.source.get("skipped"):
        print(f"warning: skipped {len(skipped)} unreadable: {describe_skipped(skipped)} (manifest.json has them all)")
    if absent := manifest.source.get("without_text", {}).get("counts"):
        if command.conversations:
            _say_left_out(manifest)
            return 0
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(absent.items()))
        first = describe_skipped(manifest.source["without_text"]["first"][:1])
        print(f"records without text in {command.settings.field!r}: {kinds}; the first is {first}")
    if not manifest.splits["val"] and command.settings.val_tokens != 0:
        print(
            "warning: no validation split, which training needs: none of the documents is the one in "
            f"{command.settings.validation_one_in} that a hash chooses; give more documents or, to "
            "data_prep/text_files.py or conversations.py, a smaller --val-one-in (with --force, as the set is there); "
            "one long text goes to data_prep/shakespeare.py --file"
        )
    return 0


def _say_left_out(manifest: Manifest) -> None:
    """Print which records of conversations can't be used, by reason, or were used with something to tell."""
    absent = manifest.source.get("without_text", {})
    counts = dict(absent["counts"])
    spelled = counts.pop(SPELLINGS, 0)
    for why, count in sorted(counts.items()):
        print(f"left out {count:,} records: {why}")
    if spelled:
        print(f"note     {spelled:,} conversations have {SPELLINGS}")
    print(f"note     the first of these records: {describe_skipped(absent['first'][:3])}")


def _remove_leftovers(folder: Path) -> None:
    """Remove temporary files of the journal and the manifest that a killed command left."""
    for name in (JOURNAL_FILE, MANIFEST_FILE):
        for path in folder.glob(f"{name}.*{TEMPORARY_SUFFIX}"):
            remove_file(path)


def _workers(arguments: argparse.Namespace, command: Command, opened: Opened) -> int:
    """As many as are asked for, else one per core, and none for little text."""
    few = sum(_expected_tokens(command.settings, opened)) < FEW_TOKENS
    return 0 if few and arguments.workers is None else choose_workers(arguments.workers)


def _expected_tokens(settings: Settings, opened: Opened) -> tuple[int, int]:
    """About how many tokens there will be for training and for validation."""
    tokens = int(sum(file.bytes for file in opened.files.listed) * opened.tokens_per_byte)
    chosen = tokens // settings.validation_one_in
    val_tokens = chosen if settings.val_tokens is None else min(settings.val_tokens, chosen)
    return min(tokens, settings.max_tokens or tokens), val_tokens


def _make_set(arguments: argparse.Namespace, command: Command) -> Manifest:
    with _opened(command, _begun(arguments, command)) as opened:
        workers = _workers(arguments, command, opened)
        if not _say_plan(arguments, command, opened, workers):
            print("warning: that may not fit; should the disk fill up, free some space and run the same command again")
        if workers:
            warm_up(arguments.start_method)
        tokenizer = command.load_tokenizer(opened.files)
        if arguments.force:  # only now: a missing source must not cost anybody a set
            remove_file(arguments.out / JOURNAL_FILE)
        how = (command.count_absent, command.conversations, command.longest, command.pairs)
        corpus = Corpus(command.name, opened.origin, opened.files, command.settings, tokenizer, *how)
        manifest = prepare(corpus, arguments.out, workers, arguments.start_method, arguments.skip_bad)
        opened.close(True)
    return manifest


@contextlib.contextmanager
def _closing(opened: Opened) -> Any:
    try:
        yield opened
    finally:
        opened.close(False)


def _opened(command: Command, begun: dict[str, Any] | None) -> AbstractContextManager[Opened]:
    return _closing(command.open_source(begun))


def _begun(arguments: argparse.Namespace, command: Command) -> dict[str, Any] | None:
    """The source as an interrupted run found it: resuming needs no second request to a hub, whose answer may differ.

    None as well where it had written nothing yet and the command asks for something else: that was perhaps a mistake.
    """
    if arguments.force or (begun := Begun.read(arguments.out)) is None:
        return None
    source: dict[str, Any] = begun.plan["source"]
    if not begun.has_shards and _difference(command, source, None):
        return None
    _check_same(arguments.out, command, source, "was started", begun.files_read())
    return source


def _difference(command: Command, stored: dict[str, Any], files_read: int | None) -> str | None:
    """How a recorded source differs from the one that is asked for; None where it doesn't."""
    wanted = {"name": command.name, **command.asked, "settings": asdict(command.settings)}
    return source_difference({key: stored.get(key) for key in wanted}, wanted, files_read)


def _check_same(
    folder: Path, command: Command, stored: dict[str, Any], what: str, files_read: int | None = None
) -> None:
    if difference := _difference(command, stored, files_read):
        raise UserError(f"{folder} {what} with another {difference}: use the same, another --out, or --force")


def _say_plan(arguments: argparse.Namespace, command: Command, opened: Opened, workers: int) -> bool:
    """Print what will be done; returns whether the disk has room for it."""
    settings = command.settings
    size = sum(file.bytes for file in opened.files.listed)
    tokens, val_tokens = _expected_tokens(settings, opened)
    there = sum(path.lstat().st_size for path in shard_files(arguments.out))  # to be resumed, or removed
    needed = max(0, (tokens + val_tokens) * command.token_bytes + opened.extra_disk_bytes - there)
    folder = arguments.out.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    shards = -(-tokens // settings.shard_tokens)
    kinds = Counter(suffix_of(file.name) for file in opened.files.listed)
    told = ", ".join(f"{count:,} {kind}" for kind, count in sorted(kinds.items(), key=str))
    print(f"source   {one_line(opened.label)}: {len(opened.files.listed)} files, {format_bytes(size)} ({told})")
    for line in describe_left_out(opened.left_out):
        print(f"left out {line}")
    if opened.note:
        print(one_line(f"note     {opened.note}"))
    print(f"output   {arguments.out}: about {format_count(tokens)} training tokens in {shards} shards")
    print(f"disk     about {format_bytes(needed)} needed, {format_bytes(free)} free")
    print(f"workers  {workers} ({arguments.start_method if workers else 'this process encodes'})", flush=True)
    return needed <= free
