"""Put in place what compute nodes without a network need: the tokenizer's files and HellaSwag. Run it on a login node.

HellaSwag is downloaded, GPT-2's vocabulary comes with the project. Both are kept in one folder: LONGHAUL_CACHE, or
.cache in the project; nothing goes into the home folder. --check only reports what is there, damaged or missing (exit
status 1 unless all is there). To use another folder, set the variable for this command and for training alike.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from common.early_end import end_in_one_line

    sys.excepthook = end_in_one_line

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass

from common.cache_folder import cache_folder, hellaswag_file
from common.command_line import CommandParser
from common.errors import UserError, exit_on_user_error
from common.publish import file_to_write, sha256_file, write_json_output
from data_prep.corpora.download import download
from data_prep.tokenization.cached_files import GPT2_FILES, gpt2_cache_file, place_gpt2_files

HELLASWAG_URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
HELLASWAG_SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"  # 10,042 examples


@dataclass(frozen=True)
class Need:
    """A file that must be there, and how to get it."""

    name: str
    path: Path
    sha256: str
    fetch: Callable[[], None]

    def state(self) -> str:
        if not self.path.is_file():
            return "missing"
        return "there" if sha256_file(self.path) == self.sha256 else "damaged"


def parse_arguments() -> argparse.Namespace:
    parser = CommandParser(__doc__)
    parser.add_argument("--check", action="store_true", help="fetch nothing, only report what is there")
    parser.add_argument("--cache", type=Path, help="the folder (default: LONGHAUL_CACHE, else .cache in the project)")
    parser.add_argument("--hellaswag-url", default=HELLASWAG_URL, help="where hellaswag_val.jsonl is")
    parser.add_argument("--json", type=file_to_write, help="also write the result to this file")
    return parser.parse_args()


def needs(arguments: argparse.Namespace) -> list[Need]:
    found = [
        Need(f"GPT-2 {name}", gpt2_cache_file(name), sha256, place_gpt2_files) for name, sha256 in GPT2_FILES.items()
    ]
    path = hellaswag_file()
    fetch = lambda: download(arguments.hellaswag_url, path, sha256=HELLASWAG_SHA256)  # noqa: E731
    return [*found, Need("HellaSwag validation", path, HELLASWAG_SHA256, fetch)]


def main() -> int:
    arguments = parse_arguments()
    if arguments.cache is not None:
        os.environ["LONGHAUL_CACHE"] = str(arguments.cache.absolute())
    states: dict[str, str] = {}
    failure: UserError | None = None
    for need in needs(arguments):
        state = need.state()
        if state != "there" and not arguments.check:
            try:
                need.path.unlink(missing_ok=True)
                need.fetch()
                state = need.state()
            except UserError as error:  # the others may still succeed
                failure = error
        states[need.name] = state
        print(f"{state:8} {need.name:24} {need.path}", flush=True)
    if arguments.json:
        write_json_output(arguments.json, {"cache": str(cache_folder()), "states": states})
    if failure is not None:
        raise failure
    if any(state != "there" for state in states.values()):
        print("run 'python data_prep/prepare_offline.py' where there is a network, with the same LONGHAUL_CACHE")
        return 1
    print(f"all files are there; compute nodes need: export LONGHAUL_CACHE={cache_folder()}")
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
