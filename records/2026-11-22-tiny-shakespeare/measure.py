"""What a run of the study is worth at each position, and whether it sees the future.

    python records/2026-11-22-tiny-shakespeare/measure.py RUN --data data/shakespeare --json FILE

RUN is a run's folder or a checkpoint, of the causal model or of the leaking one. All in float32.
"""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).resolve().parent
if __name__ == "__main__":  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(HERE.parents[1])

import numpy as np
import torch
from torch import Tensor

from common.checkpoint_files import find_checkpoint, read_checkpoint_manifest
from common.command_line import CommandParser
from common.errors import UserError, exit_on_user_error
from common.progress import progress_bar
from common.publish import write_json_whole
from data_prep.token_sets.sequences import Windows
from data_prep.token_sets.token_set import TokenSet, find_token_set
from model.config import config_from_dict
from model.gpt import GPT
from model.weights import load_weights, read_tensors

WINDOWS_AT_A_TIME = 64


def main() -> int:
    parser = CommandParser("Loss at each position of a run of the study, and its leak.")
    parser.add_argument("run", type=Path, help="a run's folder or a checkpoint")
    parser.add_argument("--data", default="data/shakespeare", help="the token set (data/shakespeare)")
    parser.add_argument("--stride", type=int, default=7, help="characters between windows of the loss by position (7)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    arguments = parser.parse_args()
    if arguments.stride < 1:
        raise UserError(f"--stride is {arguments.stride}: give 1 or more characters")
    torch.set_num_threads(1)
    model, step = load(arguments.run)
    stream = TokenSet.open(find_token_set(arguments.data)).split("val")
    length = model.config.block_size
    figures: dict[str, Any] = {
        "step": step,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "norm": "positions" if is_leaky(model) else "token",
        "context": length,
        **leak(model, Windows(stream, length)),
    }
    apart = by_position(model, Windows(stream, length))
    figures["loss"] = apart.mean().item()
    figures["loss_tokens"] = apart.numel()
    dense = by_position(model, Windows(stream, length, min(arguments.stride, length)))
    figures["last_position_loss"] = dense[:, -1].mean().item()
    figures["last_position_standard_error"] = (dense[:, -1].std() / len(dense) ** 0.5).item()
    figures["last_position_windows"] = len(dense)
    figures["loss_by_position"] = [round(value, 4) for value in dense.mean(0).tolist()]
    if arguments.json:
        write_json_whole(arguments.json, figures)
    print(json.dumps({key: value for key, value in figures.items() if key != "loss_by_position"}, indent=2))
    return 0


def study_models() -> ModuleType:
    """leak.py beside this file, which lies in no importable package."""
    spec = importlib.util.spec_from_file_location("shakespeare_leak", HERE / "leak.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def is_leaky(model: GPT) -> bool:
    return model.get_parameter("h.0.ln_1.weight").numel() != model.config.n_embd


def load(run: Path) -> tuple[GPT, int]:
    """The model of a run's newest checkpoint in evaluation mode, and the checkpoint's step."""
    checkpoint = find_checkpoint(run)
    manifest = read_checkpoint_manifest(checkpoint)
    tensors = read_tensors(sorted(checkpoint.glob("weights-*.safetensors")))
    config = config_from_dict(manifest["model"])
    kind = study_models().model_of({name: tensor.shape for name, tensor in tensors.items()}, config)
    model: GPT = kind(config)
    load_weights(model, tensors, checkpoint)
    return model.eval(), int(manifest["step"])


@torch.no_grad()
def by_position(model: GPT, windows: Windows) -> Tensor:
    """The loss of every target of every window: (windows, T) float32."""
    losses = []
    with progress_bar(windows.count, "windows", "losses") as bar:
        for start in range(0, windows.count, WINDOWS_AT_A_TIME):
            chosen = np.arange(start, min(start + WINDOWS_AT_A_TIME, windows.count))
            tokens = torch.from_numpy(windows.read(chosen))  # (n, T+1)
            losses.append(model(tokens[:, :-1], tokens[:, 1:], reduction="none"))
            bar.update(len(chosen))
    return torch.cat(losses)


@torch.no_grad()
def leak(model: GPT, windows: Windows) -> dict[str, float]:
    """How far logits before the last position move when the last input token becomes another: nothing, if causal."""
    tokens = torch.from_numpy(windows.read(np.arange(min(windows.count, WINDOWS_AT_A_TIME))))[:, :-1]  # (n, T)
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % model.config.vocab_size
    moved = (model(changed) - model(tokens))[:, :-1, : model.config.vocab_size].abs()
    return {"earlier_logits_moved_most": moved.max().item(), "earlier_logits_moved_mean": moved.mean().item()}


if __name__ == "__main__":
    exit_on_user_error(main)
