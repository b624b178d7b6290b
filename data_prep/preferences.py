"""Turn preferences into a token set to fine-tune on with train/finetune.py --objective dpo: .jsonl (.ndjson, .json with
lines) and .parquet files, or folders.

A record has `chosen` and `rejected`, two answers to `prompt`: texts, lists of messages, or lists that start with the
prompt. A template writes both conversations as the model will see them; of each only the last answer counts, to its
end-of-turn token. Records that can't be used are left out, counted by reason. One preference in --val-one-in is held
back, by a hash of its first question: equal questions stay on one side. Stopped in any way, the same command resumes.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from common.early_end import end_in_one_line

    sys.excepthook = end_in_one_line

from common.errors import exit_on_user_error
from data_prep.conversations import parse_arguments, prepare
from data_prep.token_sets.manifest import PREFERENCES


def main() -> int:
    return prepare(parse_arguments(__doc__, PREFERENCES), PREFERENCES, pairs=True)


if __name__ == "__main__":
    exit_on_user_error(main)
