"""Where a Hugging Face model's files are: a folder, or a name on the hub, downloaded once; and its tensors in them."""

import json
import os
import pickle
import re
from pathlib import Path

import torch
from torch import Tensor

from common.errors import UserError
from data_prep.cached_files import cache_folder
from model.weights import read_tensors

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
DESCRIPTIONS = ["config.json", "tokenizer*", "vocab.json", "merges.txt", "longhaul_tokenizer.json", "*.index.json"]
SAFETENSORS, PICKLED = "model*.safetensors", "pytorch_model*.bin"


def find_model(name: str, revision: str | None = None) -> Path:
    """The folder of a model: `name` itself, or the hub's model of this name, in the local cache or downloaded into it.

    The cache is huggingface_hub's own where HF_HOME or HF_HUB_CACHE names it or the model is there already, else a
    folder in Longhaul's cache: nothing is written into the home folder unasked.

    Raises UserError where it can't be had.
    """
    if Path(name).is_dir():
        return Path(name)
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
    """All tensors of a folder: safetensors, in one file or listed by an index, else PyTorch's pickled files, the same.

    Raises UserError where files are missing or damaged, or hold anything but tensors.
    """
    for stem, suffix in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        index = folder / f"{stem}{suffix}.index.json"
        files = [folder / f"{stem}{suffix}"]
        if index.is_file():
            files = [folder / name for name in sorted(set(_indexed(index)))]
        elif not files[0].is_file():
            files = sorted(folder.glob(f"*{suffix}"))
        missing = [path.name for path in files if not path.is_file()]
        if missing:
            raise UserError(f"{folder} lacks {missing[0]}, which {index.name} lists: download the model again")
        if files:
            return read_tensors(files) if suffix == ".safetensors" else _unpickled(files)
    raise UserError(f"{folder} has neither {SAFETENSORS} nor {PICKLED}: give a folder with a model's weights")


def _indexed(index: Path) -> list[str]:
    try:
        names = list(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{index} can't be read: {error!r}") from None
    if any(Path(name).name != name for name in names):
        raise UserError(f"{index} lists files of other folders")
    return names


def _unpickled(files: list[Path]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in files:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)  # unpickles tensors and runs nothing
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise UserError(f"{path} can't be read as PyTorch weights: {str(error).splitlines()[0][:150]}") from None
        if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
            raise UserError(f"{path} holds more than tensors by name: it is no file of weights")
        tensors.update(content)
    return tensors
