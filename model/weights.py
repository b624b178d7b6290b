"""Tensors on disk as safetensors, and a model out of a checkpoint's folder without a process group."""

import contextlib
import dataclasses
import errno
import os
import re
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.checkpoint_files import BadCheckpoint, base_folder, read_checkpoint_manifest, verify_checkpoint
from common.errors import UserError
from common.publish import fsync_file
from model.config import ModelConfig
from model.gpt import GPT
from model.lora import LoraConfig, add_lora, drop_lora, lora_tensors

WEIGHTS_PREFIX = "weights-"
SUFFIX = ".safetensors"
_OS_ERROR_CODE = re.compile(r"(?:os error|code:) (\d+)")  # as safetensors' Rust code prints an operating system's error


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors to one safetensors file and make it durable.

    The file appears under its final name at once: write into a folder that is published whole.

    Raises OSError where it can't be written, safetensors' own error for a full disk included.
    """
    try:
        write_safetensors(path, {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()})
    except SafetensorError as error:
        found = _OS_ERROR_CODE.search(str(error))
        code = int(found[1]) if found else errno.EIO
        raise OSError(code, os.strerror(code) if found else str(error), str(path)) from None
    fsync_file(path)


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """safetensors' `save_file`, with the permissions that any other new file has there.

    From 0.8 on it writes a temporary file that only its owner may read, whatever the umask, and renames it.
    """
    with open(path, "wb") as file:  # asks for the umask without changing it, which is the whole process's
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    try:
        save_file(dict(tensors), str(path), metadata=metadata)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    with contextlib.suppress(PermissionError):  # a file system that knows no permissions
        os.chmod(path, mode)


def read_tensors(paths: Iterable[Path]) -> dict[str, Tensor]:
    """All tensors of several safetensors files, on the CPU.

    Raises:
        UserError: a file is no whole safetensors file, or repeats a tensor of another.
    """
    tensors: dict[str, Tensor] = {}
    for path in paths:
        try:
            part = load_file(str(path))
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} can't be read as safetensors: {error}") from None
        if repeated := sorted(tensors.keys() & part.keys()):
            raise UserError(
                f"{path} repeats the tensor {repeated[0]} of another file: files of several checkpoints are mixed, "
                "copy the checkpoint again"
            )
        tensors.update(part)
    return tensors


def config_from_dict(values: Mapping[str, Any]) -> ModelConfig:
    """A ModelConfig as a checkpoint keeps it; a field the checkpoint is too old to know has its default.

    Raises:
        UserError: a field this version does not know, or an impossible combination.
    """
    unknown = sorted(set(values) - {field.name for field in dataclasses.fields(ModelConfig)})
    if unknown:
        raise UserError(f"the checkpoint's model has options this version of Longhaul does not know: {unknown}")
    try:
        return ModelConfig(**values)
    except ValueError as error:
        raise UserError(f"the checkpoint's model is impossible: {error}") from None


def load_weights(model: GPT, tensors: Mapping[str, Tensor], source: object) -> None:
    """Copy tensors into the model's parameters by name.

    Raises:
        UserError: missing, unknown or misshapen tensors, named with `source`.
    """
    _fill(dict(model.named_parameters()), tensors, source)


def _fill(parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: object) -> None:
    missing, unknown = sorted(parameters.keys() - tensors.keys()), sorted(tensors.keys() - parameters.keys())
    if missing or unknown:
        raise UserError(f"{source} does not hold this model: missing {missing[:3]}, unknown {unknown[:3]}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.shape != tensors[name].shape:
                shapes = f"{tuple(tensors[name].shape)} instead of {tuple(parameter.shape)}"
                raise UserError(f"{source} does not hold this model: {name} has shape {shapes}")
            parameter.copy_(tensors[name])


def load_model(checkpoint: Path, device: torch.device | str = "cpu", *, verify_hashes: bool = False) -> GPT:
    """The model of a checkpoint's folder, in evaluation mode; adapters are merged into the base they were trained on.

    Args:
        checkpoint: a folder with `checkpoint.json` and weights of any number of ranks.
        device: where the weights go.
        verify_hashes: also compare every file's SHA-256 (sizes always are).

    Raises:
        UserError: a listed file is missing, short or changed, or weights and configuration do not belong together.
    """
    try:
        manifest = verify_checkpoint(checkpoint, hashes=verify_hashes)
    except BadCheckpoint as error:
        raise UserError(str(error)) from None
    config = config_from_dict(manifest["model"])
    with torch.device("meta"):
        model = GPT(config)
    model.to_empty(device=device)
    if manifest.get("lora") is None:
        load_weights(model, _weights_of(checkpoint, manifest), checkpoint)
        return model.eval()
    base = base_folder(checkpoint, manifest)
    load_weights(model, _weights_of(base, read_checkpoint_manifest(base)), base)
    add_lora(model, LoraConfig(**manifest["lora"] | {"targets": tuple(manifest["lora"]["targets"])}), seed=0)
    _fill(lora_tensors(model), _weights_of(checkpoint, manifest), checkpoint)
    drop_lora(model)
    return model.eval()


def _weights_of(checkpoint: Path, manifest: Mapping[str, Any]) -> dict[str, Tensor]:
    files = sorted(name for name in manifest["files"] if name.startswith(WEIGHTS_PREFIX) and name.endswith(SUFFIX))
    return read_tensors(checkpoint / name for name in files)
