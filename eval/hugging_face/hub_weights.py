"""A Hugging Face folder's weights: safetensors or pickled, in one file or in parts with an index."""

import re
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from common.errors import UserError
from common.regular_file import what_stands_at
from eval.hugging_face.hf_tensors import PLAIN_DTYPES
from eval.hugging_face.hub_files import read_described, stands
from eval.hugging_face.hub_models import PICKLED, SAFETENSORS
from eval.hugging_face.hub_shapes import WeightIndex
from eval.hugging_face.pickled_weights import read_pickled
from model.weights import reading_tensors

PART = re.compile(r"-(\d+)-of-(\d+)\.")
# causal masks and wavelengths, which older versions of `transformers` stored beside the weights
BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's weights, as stored; no buffers.

    Raises UserError where files are missing or damaged, or hold anything but tensors of plain numbers.
    """
    tensors: dict[str, Tensor] = {}
    for path in weight_files(folder):
        part = _safetensors(path) if path.suffix == ".safetensors" else read_pickled(path)
        part = {name: tensor for name, tensor in part.items() if not name.endswith(BUFFERS)}
        for name, tensor in part.items():
            if tensor.dtype not in PLAIN_DTYPES:
                raise UserError(f"{path}: its tensor {name} is {tensor.dtype}: give the model in bf16, fp16 or fp32")
        _add(tensors, part, path)
    return tensors


def weight_files(folder: Path) -> list[Path]:
    """The files that `transformers` loads, in its order: one file before the parts that an index lists (an index may be
    older than the file beside it), safetensors before PyTorch's pickled files. Parts without an index must be complete.

    Raises UserError where there are none or some are missing.
    """
    for stem, suffix in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        whole, index = folder / f"{stem}{suffix}", folder / f"{stem}{suffix}.index.json"
        if whole.is_file():
            return [whole]
        names = sorted(set(_indexed(index))) if index.is_file() else _parts(folder, stem, suffix)
        if missing := next((name for name in names if not (folder / name).is_file()), None):
            which = f"which {index.name} lists" if index.is_file() else "one of its parts"
            raise UserError(f"{folder} lacks {missing}, {which}: download the model again")
        if names:
            return [folder / name for name in names]
    raise UserError(
        f"{folder} has neither {SAFETENSORS} nor {PICKLED}{_what_else(folder)}: give a folder with a model's weights"
    )


def _what_else(folder: Path) -> str:
    """What might be mistaken for the weights, for the message."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if stands(folder / name):
            return f" ({name} is {what_stands_at(folder / name) or 'nothing that can be read'})"
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    return f" ({others[0]} is a name that transformers doesn't load either)" if others else ""


def _parts(folder: Path, stem: str, suffix: str) -> list[str]:
    """The names of all parts of the sets that are there; of very many that can't exist, the first ones."""
    found = [match for path in folder.glob(f"{stem}-*{suffix}") if (match := PART.search(path.name))]
    counts = {match[2] for match in found}
    if len(counts) > 1:
        raise UserError(f"{folder} has parts of {' and of '.join(sorted(counts))} files: keep those of one model")
    return [
        f"{stem}-{part:0{len(count)}}-of-{count}{suffix}"
        for count in counts
        for part in range(1, min(int(count), len(found) + 1) + 1)
    ]


def _indexed(index: Path) -> list[str]:
    return list(read_described(index, WeightIndex)["weight_map"].values())


def _safetensors(path: Path) -> dict[str, Tensor]:
    with reading_tensors(path), safe_open(path, framework="pt", device="cpu") as file:
        names = [name for name in file.keys() if not name.endswith(BUFFERS)]  # noqa: SIM118 (no mapping)
        return {name: file.get_tensor(name) for name in names}


def _add(tensors: dict[str, Tensor], part: dict[str, Tensor], path: Path) -> None:
    """Raises UserError where two files hold a tensor of the same name, of which one would be ignored."""
    if twice := sorted(tensors.keys() & part.keys()):
        raise UserError(
            f"{path} repeats {twice[0]} of another part: the parts are of several models, download the model again"
        )
    tensors.update(part)
