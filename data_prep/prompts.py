"""Turn prompts into a token set for train/finetune.py --objective grpo or ppo, which answers them: .jsonl (.ndjson)
files, or folders of them.

A record has `prompt`, a text or a list of messages, or `messages` up to a user's turn; all its other fields are kept
for the functions that judge answers (as `answer`, what is right). Where messages or `completion` hold an answer
already, it is left out of the prompt and kept as the field `answer`. A template writes prompts as the model will see
them. What can't be used is left out and counted by reason. One prompt in --val-one-in is held back, by a hash of its
first question: equal questions stay on one side.
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
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np

from common.command_line import CommandParser
from common.errors import UserError, exit_on_user_error
from common.publish import canonical_json, sha256_file
from data_prep.chat.chat_tokenizer import ChatTokenizer
from data_prep.chat.messages import BadConversation, Conversation, prompt_and_answer, question_key
from data_prep.conversations import SHARD_TOKENS, TOKENIZERS, chat_tokenizer
from data_prep.corpora.fields import WHOLE_RECORD, record_of
from data_prep.corpora.local_files import find_files
from data_prep.corpora.preparation import (
    VALIDATION_ONE_IN,
    add_output_options,
    complete_set,
    finish_set,
    positive_count,
    report,
    writing_alone,
)
from data_prep.text_files import two_or_more
from data_prep.token_sets.manifest import SPLITS, Manifest, fields_of, marks_of
from data_prep.token_sets.marked_writer import MarkedWriter, with_marks
from data_prep.token_sets.prompt_fields import FieldsWriter
from data_prep.token_sets.shard_writer import clear_token_set
from data_prep.tokenization.tokenizer_choice import add_tokenizer_option, choose_tokenizer

SOURCE_NAME = "prompts"
OF_CONVERSATION = ("messages", "prompt", "completion")  # the fields that make the prompt


def parse_arguments() -> argparse.Namespace:
    parser = CommandParser(__doc__)
    parser.add_argument("paths", type=Path, nargs="+", metavar="FILE", help="files, or folders to search")
    add_output_options(parser, "prompts", SHARD_TOKENS)
    group = parser.add_argument_group("prompts")
    add_tokenizer_option(group, TOKENIZERS)
    group.add_argument(
        "--template",
        metavar="NAME_OR_FILE",
        help="chatml, llama3, or a file with a jinja template (default: the tokenizer's own, or else chatml)",
    )
    group.add_argument("--longest", type=positive_count, metavar="N", help="leave out prompts of more than N tokens")
    group.add_argument(
        "--val-one-in",
        type=two_or_more,
        default=VALIDATION_ONE_IN,
        metavar="N",
        help=f"hold back one prompt in N, chosen by hash (default: {VALIDATION_ONE_IN})",
    )
    return parser.parse_args()


class Asked(NamedTuple):
    """A prompt and its further fields."""

    turns: Conversation
    fields: dict[str, Any]


def prompts_of(path: Path, left_out: Counter[str]) -> Iterator[Asked]:
    """The prompts of a file of JSON lines. Args: left_out: counts what can't be used, by reason."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = record_of(line)
                turns, answer = prompt_and_answer(record)
            except BadConversation as error:
                left_out[str(error.problem)] += 1
                continue
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}, line {number}: {error}: mend it, or remove it") from None
            fields = {key: value for key, value in record.items() if key not in OF_CONVERSATION}
            yield Asked(turns, fields if answer is None else {"answer": answer} | fields)


def write_set(arguments: argparse.Namespace, tokenizer: ChatTokenizer, source: dict[str, Any]) -> Manifest:
    """Write all prompts, and what was left out into the source."""
    clear_token_set(arguments.out)
    left_out: Counter[str] = Counter()
    with ExitStack() as stack:
        out, size = arguments.out, arguments.shard_tokens
        tokens = {split: stack.enter_context(MarkedWriter(out, split, tokenizer, size)) for split in SPLITS}
        fields = {split: stack.enter_context(FieldsWriter(out, split, tokenizer.dtype, size)) for split in SPLITS}
        for path in arguments.paths:
            for asked in prompts_of(path, left_out):
                try:
                    ids = np.array(tokenizer.prompt_of(asked.turns), dtype=tokenizer.dtype)
                except BadConversation as error:
                    left_out[str(error.problem)] += 1
                    continue
                if arguments.longest is not None and len(ids) > arguments.longest:
                    left_out[f"more than {arguments.longest:,} tokens (--longest)"] += 1
                    continue
                split = "train" if question_key(asked.turns) % arguments.val_one_in else "val"
                tokens[split].write(with_marks(ids, np.zeros(len(ids), dtype=np.bool_)))
                fields[split].add(asked.fields)
    for reason, count in left_out.most_common():
        print(f"left out: {count:,} prompts: {reason}")
    splits = {split: tuple(tokens[split].shards) for split in SPLITS}
    splits |= {marks_of(split): tuple(tokens[split].marks) for split in SPLITS}
    splits |= {fields_of(split): tuple(fields[split].shards) for split in SPLITS}
    for split in SPLITS:
        if not splits[split]:
            raise UserError(f"no prompt is left for the split {split}: give more, or another --val-one-in")
    return finish_set(arguments.out, tokenizer, source | {"left_out": dict(left_out)}, ["numpy"], splits, marked=True)


def settings_of(paths: Sequence[Path], arguments: argparse.Namespace, tokenizer: ChatTokenizer) -> dict[str, Any]:
    """What decides the set: another command may not take it for its own."""
    return {
        "sha256": hashlib.sha256(canonical_json([sha256_file(path) for path in paths]).encode()).hexdigest(),
        "tokenizer": f"chat {tokenizer.spec['sha256'][:12]}",
        "longest": arguments.longest,
        "val_one_in": arguments.val_one_in,
        "shard_tokens": arguments.shard_tokens,
    }


def main() -> int:
    arguments = parse_arguments()
    started = time.monotonic()
    found = find_files(arguments.paths, WHOLE_RECORD, suffixes=[".jsonl", ".ndjson"])
    arguments.paths = [found.files.path(number) for number in range(len(found.files.listed))]
    choice = choose_tokenizer(arguments.tokenizer, TOKENIZERS)
    tokenizer = chat_tokenizer(choice, arguments.template)
    settings = settings_of(arguments.paths, arguments, tokenizer)
    with writing_alone(arguments.out):
        manifest = complete_set(arguments.out, SOURCE_NAME, force=arguments.force)
        made = manifest is None
        if manifest is None:
            manifest = write_set(arguments, tokenizer, {"name": SOURCE_NAME, "settings": settings})
        elif manifest.source["settings"] != settings:
            raise UserError(f"{arguments.out} was made of other prompts or otherwise: choose another --out, or --force")
    print(f"{arguments.out} is complete" + ("" if made else " already (--force makes it again)"))
    seconds = time.monotonic() - started if made else None
    report(arguments.out, manifest, seconds=seconds, json_file=arguments.json, made=made)
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
