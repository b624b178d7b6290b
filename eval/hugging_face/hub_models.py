"""Where a Hugging Face model's files are: a folder, or a name on the hub, downloaded once; and its tensors in them."""

import os
import re
from pathlib import Path

from common.cache_folder import cache_folder
from common.errors import UserError
from common.paths import expand_path
from common.plain_text import others_bars
from common.regular_file import what_stands_at
from data_prep.corpora.hub import check_revision
from eval.hugging_face.hub_files import stands

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
DESCRIPTIONS = [
    "config.json", "generation_config.json", "adapter_config.json", "tokenizer*", "added_tokens.json", "vocab.json",
    "merges.txt", "longhaul_tokenizer.json", "*.index.json",
]  # fmt: skip
SAFETENSORS, PICKLED = "model*.safetensors", "pytorch_model*.bin"


def find_model(name: str, revision: str | None = None) -> Path:
    """The folder of a model: `name` itself, or the hub's model of this name, in the local cache or downloaded into it.

    The cache is huggingface_hub's own where HF_HOME or HF_HUB_CACHE names it or the model is there already, else a
    folder in Longhaul's cache: nothing is written into the home folder unasked.

    Raises UserError where it is not available.
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
        raise UserError(
            f"{name} is neither a folder nor a model on the hub: check it, or set HF_TOKEN if it needs a token"
        ) from None
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError) as error:
        cause = error.__cause__ or error  # what huggingface_hub says about it is on its cache
        raise UserError(
            f"{name} is not a folder, and the hub can't be reached ({type(cause).__name__}): run "
            f"'hf download {name} --local-dir DIR' where there is a network, and give DIR"
        ) from None
    return folder
