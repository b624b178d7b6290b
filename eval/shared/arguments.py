"""Options that the evaluation commands share, so that they are called and explained alike."""

import argparse
from pathlib import Path

from common.errors import UserError
from common.paths import expand_path
from common.publish import file_to_write

Parser = argparse.ArgumentParser | argparse._ArgumentGroup


def add_run(parser: Parser) -> None:
    parser.add_argument("run", type=Path, help="a run's folder (its newest good checkpoint) or one checkpoint")


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


def add_dtype(parser: Parser, of: str = "matrix products") -> None:
    from model.precision import TORCH_DTYPES  # here, so that reports need not wait for torch

    parser.add_argument("--dtype", choices=sorted(TORCH_DTYPES), default="fp32", help=f"of {of} (default fp32)")


def add_json(parser: Parser, what: str = "figures") -> None:
    parser.add_argument("--json", type=file_to_write, metavar="FILE", help=f"write the {what} to this file as well")
