"""Tensors out of PyTorch's pickled files, which may be untrusted: nothing in them is executed, and nothing takes more
memory than the file has bytes."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import OutOfMemory, UserError
from common.memory_errors import is_out_of_memory
from common.regular_file import open_regular
from eval.hugging_face.hub_files import AGAIN

ZIP_START = b"PK\x03\x04"  # by which torch.load recognises archives; files of PyTorch before 1.6 have another start


def read_pickled(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, by name.

    Raises UserError where it is damaged, or holds anything but tensors.
    """
    try:
        size = _checked_size(path)
        content = torch.load(path, map_location="cpu", weights_only=True)  # unpickles tensors and runs nothing
    except Exception as error:  # damaged bytes make its unpickler raise any exception
        if is_out_of_memory(error):
            raise OutOfMemory(error, f"for {path}: use a machine with more, or {AGAIN}") from None
        raise UserError(f"{path} can't be read as PyTorch weights ({_why(error)}): {AGAIN}") from None
    if not isinstance(content, dict) or not all(_is_plain(item) for item in content.items()):
        raise UserError(f"{path} holds more than tensors by name, so it is not a file of weights: give one")
    named = sum(tensor.numel() * tensor.element_size() for tensor in content.values())
    if named > 2 * size:  # tied tables are stored once and named twice
        raise UserError(
            f"{path} has {size:,} bytes, its tensors would have {named:,}: they repeat the same numbers, which no "
            "model's do, download it again"
        )
    return content


def _checked_size(path: Path) -> int:
    """The file's size. Raises ValueError for an archive that unpacks to more, zipfile's errors for a damaged one."""
    with open_regular(path) as file:
        size = file.seek(0, 2)
        file.seek(0)
        if file.read(len(ZIP_START)) == ZIP_START:
            with zipfile.ZipFile(file) as archive:
                parts = archive.infolist()
            if sum(part.file_size for part in parts) > size or any(part.compress_type for part in parts):
                raise ValueError("its parts are compressed, which PyTorch never does")
    return size


def _is_plain(item: tuple[Any, Any]) -> bool:
    name, tensor = item
    return (
        isinstance(name, str)
        and type(tensor) in (Tensor, torch.nn.Parameter)
        and (tensor.layout, tensor.device.type) == (torch.strided, "cpu")
        and not (tensor.is_quantized or tensor.is_nested)
    )


def _why(error: Exception) -> str:
    """The reason in a few words; torch's message is long, and tells how to execute what the file holds."""
    if isinstance(error, pickle.UnpicklingError):
        return "it is damaged, or holds more than tensors"
    words = str(error).strip() or type(error).__name__
    if not isinstance(error, OSError | RuntimeError | ValueError):
        words = f"{type(error).__name__}: {words}"
    return words.splitlines()[0][:100]
