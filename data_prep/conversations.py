"""Turn conversations into a token set to fine-tune on with train/finetune.py --objective sft: .jsonl (.ndjson, .json
with lines) and .parquet files, or folders.

A record has `messages`, each with a role (system, user or assistant) and content, or `prompt` and `completion`. A
template writes it as the model will see it; only the assistant's turns are learned from, each to its end-of-turn token,
and the set carries which tokens these are. Conversations stay whole. Those that can't be used are left out, counted by
reason. One conversation in --val-one-in is held back, by a hash of its first question: equal questions stay on one
side. Stopped in any way, the same command resumes.
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
from data_prep.chat.chat_tokenizer import ChatTokenizer
from data_prep.chat.template import read_template
from data_prep.corpora.corpus import Settings
from data_prep.corpora.corpus_command import Command, Opened, add_splits_option, add_work_options, run
from data_prep.corpora.fields import WHOLE_RECORD
from data_prep.corpora.file_kinds import KINDS
from data_prep.corpora.local_files import find_files
from data_prep.corpora.preparation import VALIDATION_ONE_IN, add_output_options, positive_count
from data_prep.text_files import SUBWORDS_PER_BYTE, TOKENS_PER_BYTE, text_bytes, two_or_more
from data_prep.tokenization.loading import load_tokenizer
from data_prep.tokenization.tokenizer_choice import TokenizerChoice, add_tokenizer_option, choose_tokenizer

TOKENIZERS = ("gpt2", "byte")
SHARD_TOKENS = 10_000_000  # 20 MB of tokens, as much of marks


def parse_arguments(description: str, name: str) -> argparse.Namespace:
    """Args: name: of what the set holds, in the plural."""
    parser = CommandParser(description)
    parser.add_argument("paths", type=Path, nargs="+", metavar="FILE", help="files, or folders to search")
    add_splits_option(parser)
    add_output_options(parser, name, SHARD_TOKENS)
    group = parser.add_argument_group(name)
    add_tokenizer_option(group, TOKENIZERS)
    group.add_argument(
        "--template",
        metavar="NAME_OR_FILE",
        help="chatml, llama3, or a file with a jinja template (default: the tokenizer's own, or else chatml)",
    )
    group.add_argument(
        "--longest",
        type=positive_count,
        metavar="N",
        help="leave out conversations of more than N tokens (default: none; training leaves out what its block size "
        "doesn't hold)",
    )
    group.add_argument(
        "--val-one-in",
        type=two_or_more,
        default=VALIDATION_ONE_IN,
        metavar="N",
        help=f"hold back one of the {name} in N, chosen by hash (default: {VALIDATION_ONE_IN})",
    )
    add_work_options(parser)
    return parser.parse_args()


def chat_tokenizer(choice: TokenizerChoice, template: str | None) -> ChatTokenizer:
    """The tokenizer with the template's tokens. Raises UserError where they don't fit, or the template isn't there."""
    base = load_tokenizer(choice.spec)
    if isinstance(base, ChatTokenizer) and template is None:
        return base
    return ChatTokenizer.of(base, read_template(template or "chatml"))


def prepare(arguments: argparse.Namespace, name: str, *, pairs: bool = False) -> int:
    """The command; returns its exit status. Args: name: of the source. pairs: its records are preferences."""
    suffixes = [suffix for suffix, kind in KINDS.items() if kind.content != "text"]
    found = find_files(arguments.paths, WHOLE_RECORD, all_splits=arguments.all_splits, suffixes=suffixes)
    choice = choose_tokenizer(arguments.tokenizer, TOKENIZERS)
    tokenizer = chat_tokenizer(choice, arguments.template)
    listed = found.files.listed
    rate = TOKENS_PER_BYTE.get(choice.name.split()[0], SUBWORDS_PER_BYTE)
    rate *= sum(map(text_bytes, listed)) / max(1, sum(file.bytes for file in listed))
    asked: dict[str, Any] = {"files": [asdict(file) for file in listed], "longest": arguments.longest}
    command = Command(
        name,
        asked,
        Settings(
            shard_tokens=arguments.shard_tokens,
            val_tokens=None,
            max_tokens=None,
            field=WHOLE_RECORD,
            tokenizer=f"chat {tokenizer.spec['sha256'][:12]}",
            validation_one_in=arguments.val_one_in,
            validation_files=None,
        ),
        2 * tokenizer.dtype.itemsize,
        lambda begun: Opened(
            found.files,
            {"longest": arguments.longest},
            ", ".join(map(str, arguments.paths)),
            rate,
            left_out=found.left_out,
            note=found.note,
        ),
        lambda files: tokenizer,
        count_absent=True,
        conversations=True,
        longest=arguments.longest,
        pairs=pairs,
    )
    return run(arguments, command)


def main() -> int:
    return prepare(parse_arguments(__doc__, "conversations"), "conversations")


if __name__ == "__main__":
    exit_on_user_error(main)
