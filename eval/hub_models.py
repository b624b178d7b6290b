"""Where a Hugging Face model's files are: a folder, or a name on the hub, downloaded once; and its tensors in them."""

import json
import os
import pickle
import re
from pathlib import Path

import torch
from torch import Tensor

from common.errors import UserError
from common.paths import expand_path
from data_prep.cached_files import cache_folder
from model.weights import read_tensors

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
DESCRIPTIONS = [
    "config.json", "generation_config.json", "adapter_config.json", "tokenizer*", "added_tokens.json", "vocab.json",
    "merges.txt", "longhaul_tokenizer.json", "*.index.json",
]  # fmt: skip
SAFETENSORS, PICKLED = "model*.safetensors", "pytorch_model*.bin"
PART = re.compile(r"-(\d+)-of-(\d+)\.")


def find_model(name: str, revision: str | None = None) -> Path:
    """The folder of a model: `name` itself, or the hub's model of this name, in the local cache or downloaded into it.

    The cache is huggingface_hub's own where HF_HOME or HF_HUB_CACHE names it or the model is there already, else a
    folder in Longhaul's cache: nothing is written into the home folder unasked.

    Raises UserError where it can't be had.
    """
    if (folder := expand_path(name)).is_dir():
        return folder
    impossible = UserError(f"{name} is neither a folder nor a model's name on the hub, such as openai-community/gpt2")
    if not HUB_NAME.fullmatch(name):
        raise impossible
    import huggingface_hub
    from huggingface_hub import constants, errors

    cached = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    own = not ({"HF_HOME", "HF_HUB_CACHE"} & set(os.environ) or cached.exists())
    cache = cache_folder() / "huggingface" if own else None
    try:
        for weights in (SAFETENSORS, PICKLED):
            folder = Path(
                huggingface_hub.snapshot_download(
                    name, revision=revision, cache_dir=cache, allow_patterns=[*DESCRIPTIONS, weights]
                )
            )
            if any(folder.glob(weights)):
                break
    except errors.HFValidationError:
        raise impossible from None
    except errors.RepositoryNotFoundError:
        raise UserError(f"{name} is no folder, and no model on the hub (or a token is needed: HF_TOKEN)") from None
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"{name} is no folder, and the hub can't be reached ({type(error).__name__}: {reason}): run "
            f"'hf download {name} --local-dir DIR' where there is a network, and give DIR"
        ) from None
    return folder


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's weights, as stored.

    Raises UserError where files are missing or damaged, or hold anything but tensors.
    """
    files = weight_files(folder)
    return _safetensors(files) if files[0].suffix == ".safetensors" else _unpickled(files)


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
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            which = f"which {index.name} lists" if index.is_file() else "one of its parts"
            raise UserError(f"{folder} lacks {missing[0]}, {which}: download the model again")
        if names:
            return [folder / name for name in names]
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    hint = f" ({others[0]} is a name that transformers doesn't load either)" if others else ""
    raise UserError(f"{folder} has neither {SAFETENSORS} nor {PICKLED}{hint}: give a folder with a model's weights")


def _parts(folder: Path, stem: str, suffix: str) -> list[str]:
    """The names that all parts have, of which there may be some."""
    counts = {match[2] for path in folder.glob(f"{stem}-*{suffix}") if (match := PART.search(path.name))}
    if len(counts) > 1:
        raise UserError(f"{folder} has parts of {' and of '.join(sorted(counts))} files: keep those of one model")
    return [f"{stem}-{part:0{len(count)}}-of-{count}{suffix}" for count in counts for part in range(1, int(count) + 1)]


def _indexed(index: Path) -> list[str]:
    try:
        names = list(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{index} can't be read: {error!r}") from None
    if any(Path(name).name != name for name in names):
        raise UserError(f"{index} lists files of other folders")
    return names


def _safetensors(files: list[Path]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in files:
        _add(tensors, read_tensors([path]), path)
    return tensors


def _add(tensors: dict[str, Tensor], part: dict[str, Tensor], path: Path) -> None:
    """Raises UserError where two files hold a tensor of the same name, of which one would be passed over."""
    if twice := sorted(tensors.keys() & part.keys()):
        raise UserError(f"{path} repeats {twice[0]} of another part: the parts are not of one model, download it again")
    tensors.update(part)


def _unpickled(files: list[Path]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in files:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)  # unpickles tensors and runs nothing
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise UserError(f"{path} can't be read as PyTorch weights: {str(error).splitlines()[0][:150]}") from None
        if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
            raise UserError(f"{path} holds more than tensors by name: it is no file of weights")
        _add(tensors, content, path)
    return tensors
