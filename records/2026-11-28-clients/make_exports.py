"""Small models of every exported class, exported, and what Longhaul computes with them, for `ask.py` to compare.

    python records/2026-11-28-clients/make_exports.py /tmp/clients

For each kind the folder `KIND` (eval/export_hf.py), `KIND.gguf` where llama.cpp can run it (eval/export_gguf.py), and
`KIND.npz`: ids of a prompt (T,), logits after each of them (T, V) float32, and the ids of a greedy continuation (N,).
`--every-gguf` makes files also of what export_gguf.py refuses, its window stated, to see what llama.cpp computes of it.
"""

import argparse
import sys
from pathlib import Path
from typing import Any
from unittest import mock

if __package__ in (None, ""):  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
import torch

import longhaul
from common.command_line import CommandParser
from common.errors import UserError, exit_on_user_error
from eval.hugging_face import gguf_export
from eval.hugging_face.export import export
from eval.hugging_face.gguf_export import export_gguf
from tests.eval.checkpoints import write_checkpoint

LLAMA: dict[str, Any] = {"norm": "rmsnorm", "position": "rope", "mlp": "swiglu", "bias": False}
KINDS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "gpt2-untied": {"tie_weights": False},
    "gpt2-exact-gelu": {"mlp": "gelu_exact"},
    "gpt2-relu2": {"mlp": "relu2"},
    "starcoder2": {"position": "rope", "n_kv_head": 1},
    "starcoder2-window": {"position": "rope", "n_kv_head": 1, "window": 8},
    "llama": LLAMA | {"bias": True, "n_kv_head": 1},
    "llama3-scaling": LLAMA | {"rope_scaling": "llama3", "rope_factor": 4.0, "rope_original_length": 32},
    "linear-scaling": LLAMA | {"rope_scaling": "linear", "rope_factor": 4.0},
    "mistral": LLAMA | {"n_kv_head": 1, "window": 8},
    "qwen3": LLAMA | {"n_kv_head": 1, "qk_norm": True},
    "qwen3-windows": LLAMA | {"qk_norm": True, "window": 8, "window_pattern": "SL"},
    "weightless-norms-scaled": LLAMA | {"norm_weights": False, "embedding": "scaled"},
    "gpt2-normed": {"embedding": "normed"},
}
SIZE: dict[str, Any] = {"tokenizer": "gpt2-8k", "block_size": 64, "n_embd": 128, "n_head": 2, "noise": 0.05}
PROMPT = "The quick brown fox, naïve café: 12,345\n  x and the others went"
NEW = 24


def write_refused(checkpoint: Path, out: Path, window: int | None) -> None:
    """A file that export_gguf.py refuses to write, with the window as converters of other models state it."""
    write_tokenizer = gguf_export._write_tokenizer

    def write_window_too(writer: Any, *rest: Any) -> None:
        if window:
            writer.add_sliding_window(window)
        write_tokenizer(writer, *rest)

    with (
        mock.patch.object(gguf_export, "losses", return_value=[]),
        mock.patch.object(gguf_export, "_write_tokenizer", write_window_too),
    ):
        export_gguf(checkpoint, out, "fp32")


def main() -> int:
    parser = CommandParser(__doc__)
    parser.add_argument("out", type=Path, help="the folder to make")
    parser.add_argument("--every-gguf", action="store_true", help="make refused GGUF files, too")
    arguments: argparse.Namespace = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "prompt.txt").write_text(PROMPT, encoding="utf-8")
    for kind, options in KINDS.items():
        checkpoint = write_checkpoint(arguments.out / "checkpoints" / kind, **SIZE, **options)
        export(checkpoint, arguments.out / kind)
        try:
            export_gguf(checkpoint, arguments.out / f"{kind}.gguf", "fp32")
        except UserError as error:
            print(f"no GGUF file of {kind}: {error}")
            if arguments.every_gguf:
                write_refused(checkpoint, arguments.out / f"{kind}.gguf", options.get("window"))
        model = longhaul.load(checkpoint)
        ids = [int(token) for token in model.tokenizer.prompt(PROMPT)]
        whole = list(ids)
        with torch.no_grad():
            while len(whole) < len(ids) + NEW:
                logits = model.gpt(torch.tensor([whole]))[0, :, : model.tokenizer.spec["vocab_size"]]
                whole.append(int(logits[-1].argmax()))
            logits = model.gpt(torch.tensor([ids]))[0, :, : model.tokenizer.spec["vocab_size"]]  # (T, V)
        np.savez(arguments.out / f"{kind}.npz", ids=ids, logits=logits.numpy(), new=whole[len(ids) :])
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
