"""Where a Hugging Face model's files are: a folder, or a name on the hub, downloaded once; and its tensors in them."""

import os
import re
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from common.errors import UserError
from common.paths import expand_path
from common.plain_text import others_bars
from common.regular_file import what_stands_at
from data_prep.corpora.hub import check_revision
from data_prep.tokenization.cached_files import cache_folder
from eval.hugging_face.hf_tensors import PLAIN_DTYPES
from eval.hugging_face.hub_files import read_described, stands
from eval.hugging_face.hub_shapes import WeightIndex
from eval.hugging_face.pickled_weights import read_pickled
from model.weights import reading_tensors

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
DESCRIPTIONS = [
    "config.json", "generation_config.json", "adapter_config.json", "tokenizer*", "added_tokens.json", "vocab.json",
    "merges.txt", "longhaul_tokenizer.json", "*.index.json",
]  # fmt: skip
SAFETENSORS, PICKLED = "model*.safetensors", "pytorch_model*.bin"
PART = re.compile(r"-(\d+)-of-(\d+)\.")
# causal masks and wavelengths, which older versions of `transformers` stored beside the weights
BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")


def find_model(name: str, revision: str | None = None) -> Path:
    """The folder of a model: `name` itself, or the hub's model of this name, in the local cache or downloaded into it.

    The cache is huggingface_hub's own where HF_HOME or HF_HUB_CACHE names it or the model is there already, else a
    folder in Longhaul's cache: nothing is written into the home folder unasked.

    Raises UserError where it can't be had.
    """
    if (folder := expand_path(name)).is_dir():
        return folder
    if stands(folder):
        raise UserError(f"{folder} is {what_stands_at(folder) or 'nothing that can be read'}: give a model's folder")
    impossible = UserError(f"{name} is neither a folder nor a model's name on the hub, such as openai-community/gpt2")
    if not HUB_NAME.fullmatch(name):
        raise impossible
    if revision is not None:
        check_revision(revision)
    import huggingface_hub
    from huggingface_hub import constants, errors

    cached = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    own = not ({"HF_HOME", "HF_HUB_CACHE"} & set(os.environ) or cached.exists())
    cache = cache_folder() / "huggingface" if own else None
    try:
        for weights in (SAFETENSORS, PICKLED):
            with others_bars():
                found = huggingface_hub.snapshot_download(
                    name, revision=revision, cache_dir=cache, allow_patterns=[*DESCRIPTIONS, weights]
                )
            folder = Path(found)
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
    """What might be taken for the weights."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if stands(folder / name):
            return f" ({name} is {what_stands_at(folder / name) or 'nothing that can be read'})"
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    return f" ({others[0]} is a name that transformers doesn't load either)" if others else ""


def _parts(folder: Path, stem: str, suffix: str) -> list[str]:
    """The names that all parts have, of which there may be some; of very many that can't be there, the first ones."""
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
    """Raises UserError where two files hold a tensor of the same name, of which one would be passed over."""
    if twice := sorted(tensors.keys() & part.keys()):
        raise UserError(f"{path} repeats {twice[0]} of another part: the parts are not of one model, download it again")
    tensors.update(part)
