"""Options that the evaluation commands share, with the same names and explanations."""

import argparse
import os
from pathlib import Path

from common.checkpoint_files import find_checkpoint
from common.errors import UserError
from common.paths import expand_path
from common.publish import file_to_write

DTYPES = ("bf16", "fp16", "fp32")  # those of model.precision, which imports torch: a test compares them
WEIGHTS = ("trained", "ema")  # those of model.weights, likewise
Parser = argparse.ArgumentParser | argparse._ArgumentGroup


def add_run(parser: Parser) -> None:
    parser.add_argument("run", type=Path, help="a run's folder (its newest good checkpoint) or one checkpoint")
    parser.add_argument(
        "--weights",
        choices=WEIGHTS,
        default="trained",
        help="trained (default), or ema: the exponential average that training has kept (optim.ema_half_life_tokens)",
    )


def require_run(run: Path) -> None:
    """Raises UserError where there is no such folder; whether its checkpoints are whole is not checked, which takes
    long.
    """
    if not os.path.isdir(run):  # False as well where it may not be read
        find_checkpoint(run)


def folder_to_make(name: str) -> Path:
    """A folder that a command is to publish when its work is done: the type of such an argument.

    Raises UserError where it is there already or can't be made.
    """
    path = expand_path(name)
    if path.name in ("", ".."):
        raise UserError(f"{path} can't be made: name a new folder in it")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} is already there: move it away, or name another folder")
    return path if path.exists() else file_to_write(path)


def add_device(parser: Parser, default: str = "auto") -> None:
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default=default)


def add_dtype(parser: Parser, of: str = "matrix products", *, auto: bool = True) -> None:
    """Args: auto: whether the device may decide, by `loading.evaluation_dtype`."""
    choices = [*DTYPES, "auto"] if auto else DTYPES
    means = "auto: bf16 on a GPU that has it, else fp32, without TensorFloat-32" if auto else "fp32"
    default = "auto" if auto else "fp32"
    parser.add_argument("--dtype", choices=choices, default=default, help=f"of {of} (default {means})")


def add_json(parser: Parser, what: str = "figures") -> None:
    parser.add_argument("--json", type=file_to_write, metavar="FILE", help=f"write the {what} to this file as well")
