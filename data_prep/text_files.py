"""Turn your own text into token shards: .txt, .md, .jsonl (.ndjson, .json with lines) and .parquet files, or folders.

A text file is one document, a line of JSON or a row of parquet is one (--field says where its text is). All but parquet
may be compressed (.gz, .zst, .bz2, .xz). Files are taken in the order of their names; those named for validation or
test are left out beside others for training. The validation split is the first --val-tokens tokens of documents chosen
by hash, one in --val-one-in. Stopped in any way, the same command resumes. One long text is better split with
shakespeare.py --file.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from common.early_end import end_in_one_line

    sys.excepthook = end_in_one_line

import argparse
from dataclasses import asdict, replace
from typing import Any

from common.command_line import CommandParser
from common.errors import UserError, exit_on_user_error
from common.plain_text import one_line
from common.progress import progress_bar
from data_prep.corpora.corpus import Files, InputFile
from data_prep.corpora.corpus_command import (
    Command,
    Opened,
    add_amount_options,
    add_splits_option,
    add_work_options,
    run,
    settings_of,
)
from data_prep.corpora.encode_worker import ENCODING_ERRORS
from data_prep.corpora.file_kinds import is_utf8, kind_of
from data_prep.corpora.local_files import find_files
from data_prep.corpora.preparation import VALIDATION_ONE_IN, add_output_options, positive_count
from data_prep.corpora.readers import TEXT_PER_COMPRESSED_BYTE, Fragment, UnitReader, Unreadable, units
from data_prep.tokenization.loading import load_tokenizer
from data_prep.tokenization.tokenizer import CharTokenizer, Tokenizer
from data_prep.tokenization.tokenizer_choice import TokenizerChoice, choose_tokenizer

COMMON = ("out", "max_tokens", "tokenizer", "field", "val_one_in", "dry_run")  # of --help
TOKENIZERS = ("gpt2", "char", "byte")
TOKENS_PER_BYTE = {"byte": 1.0, "char": 1.0}
SUBWORDS_PER_BYTE = 0.3  # of English, in GPT-2's and later vocabularies


def parse_arguments() -> argparse.Namespace:
    parser = CommandParser(__doc__, common=COMMON)
    parser.add_argument("paths", type=Path, nargs="+", metavar="PATH", help="files, or folders to search")
    add_splits_option(parser)
    add_output_options(parser, "text_files")
    add_amount_options(parser, TOKENIZERS)
    parser.add_argument(
        "--val-one-in",
        type=two_or_more,
        default=VALIDATION_ONE_IN,
        metavar="N",
        help=f"validate on one document in N, chosen by hash: a smaller N for few (default: {VALIDATION_ONE_IN})",
    )
    add_work_options(parser)
    return parser.parse_args()


def two_or_more(text: str) -> int:
    if (value := positive_count(text)) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} leaves nothing for training: use 2 or more")
    return value


def warn_of_other_encodings(files: Files) -> None:
    """Warn of text files that are not UTF-8: training on replacement characters is seldom intended."""
    texts = [index for index, file in enumerate(files.listed) if kind_of(file.name).content == "text"]
    others = [index for index in texts if not is_utf8(files.path(index))]
    if others:
        name = one_line(files.listed[others[0]].name)
        which = f"{name} is" if len(others) == 1 else f"{len(others)} files, {name} among them, are"
        print(f"warning: {which} not UTF-8, and undecodable bytes become U+FFFD: convert with iconv", file=sys.stderr)


def text_bytes(file: InputFile) -> int:
    """Roughly how much text a file holds, in bytes."""
    return file.bytes * (TEXT_PER_COMPRESSED_BYTE if kind_of(file.name).compression else 1)


def collect_symbols(files: Files, field: str, skip_bad: int) -> str:
    """Every character that occurs in the files, sorted. With `skip_bad` of what can be read: it is counted later."""
    symbols: set[str] = set()
    with progress_bar(len(files.listed), "file", "characters") as bar:
        for index in range(len(files.listed)):
            path, reader = files.path(index), UnitReader()
            for number, unit in enumerate(units(path, field)):
                try:
                    for fragment in reader.read_all(str(path), number, field, 0, unit.rows):
                        if isinstance(fragment, Fragment):
                            symbols.update(fragment.text)
                        elif isinstance(fragment, Unreadable) and not skip_bad:
                            raise fragment.error
                except ENCODING_ERRORS as error:
                    raise UserError(f"{path} can't be read ({error}): fix it, or leave it out") from None
            reader.close()
            bar.update()
    return "".join(sorted(symbols))


def make_tokenizer(choice: TokenizerChoice, files: Files, field: str, skip_bad: int) -> Tokenizer:
    if choice.spec == "char":
        if not (symbols := collect_symbols(files, field, skip_bad)):
            raise UserError("there is no text in the files: give others")
        return CharTokenizer(symbols, end_of_text=True)
    return load_tokenizer(choice.spec)


def main() -> int:
    arguments = parse_arguments()
    found = find_files(arguments.paths, arguments.field, all_splits=arguments.all_splits)
    files = found.files
    warn_of_other_encodings(files)
    asked: dict[str, Any] = {"files": [asdict(file) for file in files.listed]}
    label = ", ".join(map(str, arguments.paths))
    tokenizer = choose_tokenizer(arguments.tokenizer, TOKENIZERS)
    rate = TOKENS_PER_BYTE.get(tokenizer.name.split()[0], SUBWORDS_PER_BYTE)
    rate *= sum(map(text_bytes, files.listed)) / max(1, sum(file.bytes for file in files.listed))
    command = Command(
        "text_files",
        asked,
        replace(settings_of(arguments, tokenizer, validation_files=None), validation_one_in=arguments.val_one_in),
        tokenizer.token_bytes,
        lambda begun: Opened(files, {}, label, rate, left_out=found.left_out, note=found.note),
        lambda files: make_tokenizer(tokenizer, files, arguments.field, arguments.skip_bad),
    )
    return run(arguments, command)


if __name__ == "__main__":
    exit_on_user_error(main)
