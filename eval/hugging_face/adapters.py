"""Adapters that `train/finetune.py` trained as a folder that PEFT loads on the exported base, verified with it.

R rank, P adapted parts of a matrix.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.checkpoint_files import base_folder, find_checkpoint, read_checkpoint_manifest
from common.errors import UserError
from common.publish import TEMPORARY_SUFFIX, fsync_file, publish_folder, write_json_whole, write_whole
from eval.hugging_face.comparing import check_logits, logits_of, probe_tokens
from eval.hugging_face.hf_config import GPT2, home_of
from eval.hugging_face.hf_tensors import Module, modules
from model.gpt import GPT
from model.lora import LoraLinear, lora_layers
from model.lora_config import part_rows
from model.weights import load_adapted_model, write_safetensors

PREFIX = "base_model.model"  # PEFT's name of the model that is adapted


def export_adapter(run: Path, base: Path, out: Path, weights: str = "trained") -> dict[str, Any]:
    """Publish the adapters of a run's newest good checkpoint, or of this one, as the folder `out`; return the figures.

    Args:
        base: the export of the model that they were trained on.
        weights: trained, or ema: their exponential average.

    Raises UserError where there are none, the base is missing, or PEFT gives other logits with it.
    """
    checkpoint = find_checkpoint(run)
    manifest = read_checkpoint_manifest(checkpoint)
    lora = manifest.get("lora")
    if lora is None:
        raise UserError(f"{checkpoint} has no adapters, all of its weights were trained: leave --adapter out")
    if not (base / "config.json").is_file():
        raise UserError(
            f"{base} holds no exported model: python eval/export_hf.py {base_folder(checkpoint, manifest)} {base}"
        )
    model = load_adapted_model(checkpoint, weights=weights)
    home = home_of(model.config)
    if lora.get("new_rows"):
        raise UserError(
            f"{checkpoint} has trained rows of its embedding table beside its adapters, for the tokens around turns: "
            "leave --adapter out, which exports all of it merged"
        )
    temporary = out.with_name(f".{out.name}{TEMPORARY_SUFFIX}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        write_adapter(model, base, temporary)
        difference = verify_adapter(model, base, temporary)
        write_whole(temporary / "README.md", adapter_card(base, manifest["step"], difference))
        publish_folder(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"{out}: adapters of a {home}, logits equal to {difference:.1e} relative")
    return {"checkpoint": str(checkpoint), "class": home, "base": str(base), "relative_difference": difference}


def write_adapter(model: GPT, base: Path, folder: Path) -> None:
    """`adapter_model.safetensors` and `adapter_config.json`."""
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, tuple[int, float]] = {}
    for theirs, a, b, scale in adapters(model):
        tensors[f"{PREFIX}.{theirs}.lora_A.weight"] = a.detach().contiguous().clone()
        tensors[f"{PREFIX}.{theirs}.lora_B.weight"] = b.detach().contiguous().clone()
        ranks[".".join(theirs.split(".")[-2:])] = (len(a), len(a) * scale)
    write_safetensors(folder / "adapter_model.safetensors", tensors, metadata={"format": "pt"})
    (rank, alpha), dropout = min(ranks.values()), next(lora_layers(model))[1].dropout
    others = {name: found for name, found in ranks.items() if found != (rank, alpha)}
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: its for name, (its, _) in others.items()},
        "alpha_pattern": {name: its for name, (_, its) in others.items()},
        "lora_dropout": dropout,
        "target_modules": sorted(ranks),
        "fan_in_fan_out": home_of(model.config) == GPT2,  # its layers store (in, out)
        "bias": "none",
    }
    write_json_whole(folder / "adapter_config.json", settings)
    fsync_file(folder / "adapter_model.safetensors")


def adapters(model: GPT) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """Their module's name, A (R, in), B (out, R) and alpha/R of every adapter as they have it.

    Where their module holds queries, keys and values in one matrix, the adapters of its parts become one of rank P·R.
    """
    ours = {module.ours: module for module in modules(model.config, home_of(model.config))}
    for name, layer in lora_layers(model):
        yield from ((theirs, a, b, layer.scale) for theirs, a, b in _split(model, ours[name], layer))


def _split(model: GPT, module: Module, layer: LoraLinear) -> Iterator[tuple[str, Tensor, Tensor]]:
    if len(module.theirs) == 1:
        a = torch.cat([a for a, _, _ in layer.sides()])  # (P·R, in)
        b = torch.zeros(layer.out_features, len(a), dtype=a.dtype)
        used = 0
        for _, own, (first, rows) in layer.sides():
            b[first : first + rows, used : used + own.shape[1]] = own
            used += own.shape[1]
        yield module.theirs[0], a, b
        return
    for theirs, (first, rows) in zip(module.theirs, part_rows(model.config).values(), strict=True):
        for a, b, (start, count) in layer.sides():
            if start <= first and first + rows <= start + count:
                yield theirs, a, b[first - start : first - start + rows]


@torch.no_grad()
def verify_adapter(model: GPT, base: Path, folder: Path) -> float:
    """Load base and adapters with PEFT; return the largest difference of logits relative to the largest logit.

    Raises UserError where they differ, as with an export of another base.
    """
    import peft
    import transformers

    transformers.utils.logging.disable_progress_bar()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base).float()
    if theirs.config.vocab_size != model.config.vocab_size:
        raise UserError(f"{base} is not an export of the base that the adapters were trained on: export that one")
    adapted = peft.PeftModel.from_pretrained(theirs, str(folder)).eval()
    tokens = probe_tokens(model.config)
    return check_logits(logits_of(adapted, tokens), model, tokens, f"PEFT {peft.__version__} on {base}")


def adapter_card(base: Path, step: int, difference: float) -> str:
    """README.md of the exported folder."""
    return (
        f"---\nlibrary_name: peft\nbase_model: {base}\n---\n\n# Adapters trained with Longhaul\n\n"
        f"LoRA adapters of step {step:,} for the model in `{base}`. With it, logits are equal to Longhaul's within "
        f"{difference:.1e} relative, in float32.\n\n"
        "```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{base}")\n'
        'model = PeftModel.from_pretrained(model, "PATH")\n```\n'
    )
