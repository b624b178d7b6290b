"""GPT-2's vocabulary files where tiktoken looks for them.

tiktoken downloads these two on first use; Longhaul puts the same files (same SHA-256) where tiktoken keeps its
downloads (`TIKTOKEN_CACHE_DIR`), so nothing is ever downloaded. The project carries GPT-2's merges
(`data_prep/tokenization/gpt2_vocabulary`); the ids follow from them.
"""

import hashlib
import json
import os
from pathlib import Path

from common.cache_folder import cache_folder
from common.errors import UserError
from common.publish import sha256_file, write_whole

GPT2_FOLDER = Path(__file__).resolve().parent / "gpt2_vocabulary"
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main"
GPT2_FILES = {  # name: SHA-256, both as tiktoken expects them
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}


def tokenizer_cache_folder() -> Path:
    """Where tiktoken's files are: $TIKTOKEN_CACHE_DIR, $LONGHAUL_CACHE/tiktoken or the project's .cache/tiktoken."""
    if folder := os.environ.get("TIKTOKEN_CACHE_DIR"):
        return Path(folder)
    return cache_folder() / "tiktoken"


def gpt2_cache_file(name: str) -> Path:
    """Where tiktoken looks for a vocabulary file: the SHA-1 of its address is the file's name."""
    return tokenizer_cache_folder() / hashlib.sha1(f"{GPT2_URL}/{name}".encode()).hexdigest()


def place_gpt2_files() -> None:
    """Make sure that tiktoken finds GPT-2's two vocabulary files on this disk, whole; safe in many processes at once.

    Raises UserError where the project's own are damaged or tiktoken's can't be written.
    """
    for name, sha256 in GPT2_FILES.items():
        target = gpt2_cache_file(name)
        if target.is_file() and sha256_file(target) == sha256:
            continue
        data = carried_gpt2_file(name)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            write_whole(target, data)
        except OSError as error:
            raise UserError(
                f"{target} can't be written ({error.strerror}): set TIKTOKEN_CACHE_DIR to a writable folder"
            ) from None


def carried_gpt2_file(name: str) -> bytes:
    """The bytes of a vocabulary file, from the project's copy. Raises UserError where that is not GPT-2's."""
    path = GPT2_FOLDER / "vocab.bpe"
    remedy = f"'git checkout -- {path.name}' in {path.parent} restores GPT-2's merges"
    try:
        merges = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror}): {remedy}") from None
    if hashlib.sha256(merges).hexdigest() != GPT2_FILES["vocab.bpe"]:
        raise UserError(f"{path} is not GPT-2's, its SHA-256 differs (were its line ends changed?): {remedy}")
    data = merges if name == "vocab.bpe" else ids_of(merges)
    assert hashlib.sha256(data).hexdigest() == GPT2_FILES[name]
    return data


def ids_of(merges: bytes) -> bytes:
    """encoder.json, as OpenAI wrote it, from vocab.bpe: the bytes, the results of the merges, the end of text."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    stand_ins = range(256, 512 - len(printable))  # each other byte, in order, is shown as one of these characters
    made = [pair.replace(" ", "") for pair in merges.decode("utf-8").splitlines()[1:]]
    tokens = [*map(chr, printable), *map(chr, stand_ins), *made, "<|endoftext|>"]
    return json.dumps({token: i for i, token in enumerate(tokens)}).encode("ascii")
