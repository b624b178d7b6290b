"""Where fetched files are kept."""

import os
from pathlib import Path

from common.paths import PROJECT, expand_path


def cache_folder() -> Path:
    """The folder for everything that is fetched once: $LONGHAUL_CACHE, else .cache in the project."""
    return expand_path(os.environ.get("LONGHAUL_CACHE") or PROJECT / ".cache")


def hellaswag_file() -> Path:
    """Where data_prep/prepare_offline.py puts HellaSwag's validation examples, and evaluations look for them."""
    return cache_folder() / "hellaswag" / "hellaswag_val.jsonl"
