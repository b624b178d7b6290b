"""What every checkpoint's manifest holds, for tests that ask for no more of it."""

from dataclasses import asdict
from typing import Any

from model.config import ModelConfig

FACTS: dict[str, Any] = {
    "model": asdict(ModelConfig()),
    "tokenizer": {"kind": "byte", "vocab_size": 257, "end_of_text_id": 256, "sha256": "0" * 64},
    "data_identity": None,
}
WHOLE: dict[str, Any] = {"format_version": 1, "files": {}, "step": 0, "tokens": 0, "sequences": 0, **FACTS}
