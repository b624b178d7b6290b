"""Tiny Shakespeare (or any one text with --file) as tokens: the first 90 % for training, the rest for validation.

At character level the vocabulary is the text's own symbols in order (65 for Tiny Shakespeare), kept in the manifest.
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

from common.cache_folder import cache_folder
from common.command_line import CommandParser
from common.errors import UserError, exit_on_user_error
from common.os_errors import refusal
from data_prep.corpora.download import download
from data_prep.corpora.preparation import (
    add_output_options,
    complete_set,
    finish_set,
    report,
    writing_alone,
)
from data_prep.token_sets.manifest import Manifest
from data_prep.token_sets.shard_writer import ShardWriter, clear_token_set
from data_prep.tokenization.loading import load_tokenizer
from data_prep.tokenization.tokenizer import CharTokenizer
from data_prep.tokenization.tokenizer_choice import TokenizerChoice, add_tokenizer_option, choose_tokenizer

SOURCE_NAME = "shakespeare"
URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
TRAIN_TENTHS = 9
TOKENIZERS = ("char", "gpt2", "byte")


def parse_arguments() -> argparse.Namespace:
    parser = CommandParser(__doc__)
    add_output_options(parser, "shakespeare")
    parser.add_argument("--file", type=Path, help="a text on this disk, instead of a download")
    parser.add_argument("--url", default=URL, help="where Tiny Shakespeare is (its SHA-256 is checked)")
    add_tokenizer_option(parser, TOKENIZERS, default="char")
    return parser.parse_args()


def read_text(arguments: argparse.Namespace) -> str:
    path = arguments.file
    if path is None:
        path = cache_folder() / "tinyshakespeare.txt"
        if not path.exists():
            download(arguments.url, path, sha256=SHA256)
    try:
        text: str = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(refusal("read", error, path, otherwise="name another --file")) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start:,})") from None
    if len(text) < 10:
        raise UserError(f"{path} is too short to be split: use a longer text")
    return text


def write_set(arguments: argparse.Namespace, text: str, choice: TokenizerChoice) -> Manifest:
    own = choice.spec == "char"
    tokenizer = CharTokenizer("".join(sorted(set(text)))) if own else load_tokenizer(choice.spec)
    clear_token_set(arguments.out)
    border = len(text) * TRAIN_TENTHS // 10
    splits = {}
    for split, part in (("train", text[:border]), ("val", text[border:])):
        with ShardWriter(arguments.out, split, tokenizer, arguments.shard_tokens) as writer:
            writer.write(tokenizer.encode(part))
        splits[split] = tuple(writer.shards)
    source = {
        "name": SOURCE_NAME,
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "settings": {"tokenizer": choice.name, "shard_tokens": arguments.shard_tokens},
        "split": f"the first {TRAIN_TENTHS} tenths of the characters for training, the rest for validation",
    }
    return finish_set(arguments.out, tokenizer, source, ["tiktoken", "numpy"], splits)


def check_same(arguments: argparse.Namespace, manifest: Manifest, choice: TokenizerChoice) -> None:
    """Raise UserError where the complete set was made of another text or with another vocabulary."""
    same = manifest.source["settings"]["tokenizer"] == choice.name
    wanted = hashlib.sha256(read_text(arguments).encode()).hexdigest() if arguments.file else SHA256
    if not same or manifest.source["sha256"] != wanted:
        raise UserError(f"{arguments.out} was made of another text or vocabulary: choose another --out, or --force")


def main() -> int:
    arguments = parse_arguments()
    started = time.monotonic()
    choice = choose_tokenizer(arguments.tokenizer, TOKENIZERS)
    with writing_alone(arguments.out):
        manifest = complete_set(arguments.out, SOURCE_NAME, force=arguments.force)
        made = manifest is None
        if manifest is not None:
            check_same(arguments, manifest, choice)
        else:
            manifest = write_set(arguments, read_text(arguments), choice)
    print(f"{arguments.out} is complete" + ("" if made else " already (--force makes it again)"))
    seconds = time.monotonic() - started if made else None
    report(arguments.out, manifest, seconds=seconds, json_file=arguments.json, made=made)
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
