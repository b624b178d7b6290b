"""The `--tokenizer` option of the commands that read any text: a kind by name, the file of an own vocabulary, or the
tokenizer of a trained model."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common.checkpoint_files import find_checkpoint, read_checkpoint_manifest
from common.errors import UserError
from common.paths import expand_path
from data_prep.token_sets.manifest import token_dtype
from data_prep.tokenization.own_vocabulary import read_tokenizer_file


@dataclass(frozen=True)
class TokenizerChoice:
    """`spec` is what load_tokenizer takes. `name` identifies the tokenizer in a token set's settings."""

    name: str
    spec: dict[str, Any] | str

    @property
    def token_bytes(self) -> int:
        """Bytes that a stored token takes; of a bare kind 2, as no text has more characters than 16 bits count."""
        return 2 if isinstance(self.spec, str) else token_dtype(self.spec["vocab_size"]).itemsize


Parser = argparse.ArgumentParser | argparse._ArgumentGroup


def add_tokenizer_option(parser: Parser, kinds: Sequence[str], default: str = "gpt2") -> None:
    parser.add_argument(
        "--tokenizer",
        default=default,
        metavar="KIND_FILE_OR_MODEL",
        help=f"{', '.join(kinds)}, a file of data_prep/train_tokenizer.py, or a run or checkpoint (such as an imported "
        f"model), whose tokenizer is used (default: {default})",
    )


def choose_tokenizer(asked: str, kinds: Sequence[str]) -> TokenizerChoice:
    """What was asked for: one of `kinds`, else the tokenizer of a file, or the one that a run's or a checkpoint's model
    was trained with.

    Raises UserError where it is none of these.
    """
    if asked in kinds:
        return TokenizerChoice(asked, asked)
    path = expand_path(asked)
    if path.is_file():
        spec: Mapping[str, Any] = read_tokenizer_file(path).spec
    else:
        try:
            checkpoint = find_checkpoint(path)
        except UserError as error:
            takes = f"--tokenizer takes {', '.join(kinds)}, a tokenizer.json, a run or a checkpoint"
            raise UserError(f"{takes}: {error}") from None
        spec = read_checkpoint_manifest(checkpoint)["tokenizer"]
    kind = spec["kind"]
    whole = {"kind", "vocab_size", "end_of_text_id", "sha256"} == spec.keys()  # then the kind is enough to identify it
    return TokenizerChoice(kind if whole else f"{kind} {spec['sha256'][:12]}", dict(spec))
