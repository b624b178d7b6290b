"""What an answer is worth: Python functions of the user's, reward models, and their weighted sum. Without torch.

    def exact_answer(prompts, completions, fields):
        return [float(text == field["answer"]) for text, field in zip(completions, fields)]

A function is named FILE.py:FUNCTION, with a weight as 0.5*FILE.py:FUNCTION. It is given three lists of one length: the
prompts' texts, what the model generated after them (without the token that ends an answer), and the prompts' further
fields as dictionaries. It returns one finite number for each. It runs on the rank that has sampled the answers.

A reward model is named by its run or checkpoint, with a weight in the same way; `model_reward` scores with it.
"""

import importlib.util
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from common.checkpoint_files import CHECKPOINT_MANIFEST, find_checkpoint, read_checkpoint_manifest, weights_identity
from common.checkpoint_manifest import CheckpointManifest, has_value_function
from common.errors import UserError
from common.paths import find_path
from common.publish import sha256_file
from model.config import ModelConfig, config_from_dict

Function = Callable[[list[str], list[str], list[dict[str, Any]]], Sequence[float]]
_SPEC = re.compile(r"(?:(?P<weight>[^*]+)\*)?(?P<path>.+?)(?P<function>(?<=\.py):[A-Za-z_]\w*)?")
FORM = "use FILE.py:FUNCTION or a reward model's run, with WEIGHT* before it where that is not 1"
LONGEST_NAME = 32  # characters


class Weighted(Protocol):
    """A part of the weighted sum, by the name that records have."""

    @property
    def name(self) -> str: ...

    @property
    def weight(self) -> float: ...


@dataclass(frozen=True)
class Reward:
    """One of the functions.

    Attributes:
        name: the function's, by which its figures are recorded.
        identity: SHA-256 of the function's file, which decides its values.
    """

    name: str
    weight: float
    function: Function
    identity: str

    def __call__(
        self, prompts: list[str], completions: list[str], fields: list[dict[str, Any]]
    ) -> npt.NDArray[np.float64]:
        """A reward for each answer, (n,) float64.

        Raises UserError where the function fails, or does not return a finite number for each.
        """
        try:
            found = list(self.function(prompts, completions, fields))
            values = [float(value) for value in found]
        except Exception as error:  # the user's own code: anything
            raise UserError(f"the reward {self.name} failed: {type(error).__name__}: {_short(error)}") from None
        if len(values) != len(completions):
            raise UserError(
                f"the reward {self.name} returned {len(values)} numbers for {len(completions)} answers: return one each"
            )
        for value, completion in zip(values, completions, strict=True):
            if not math.isfinite(value):
                raise UserError(
                    f"the reward {self.name} is {value} for the answer {_short(repr(completion))}: return finite "
                    "numbers"
                )
        return np.array(values, dtype=np.float64)


@dataclass(frozen=True)
class NamedModel:
    """A reward model that is not loaded yet. identity: of its weights."""

    name: str
    weight: float
    checkpoint: Path
    identity: str

    @property
    def manifest(self) -> CheckpointManifest:
        return read_checkpoint_manifest(self.checkpoint)


def load_rewards(named: Sequence[str]) -> list[Reward | NamedModel]:
    """What option `rollout.reward` names, each function's file run once.

    Raises UserError where a file or a function in it is missing, it fails, a model has no scalar head, or two have the
    same name.
    """
    if not named:
        raise UserError(f"no reward is given: add --reward ({FORM})")
    rewards: list[Reward | NamedModel] = []
    for text in named:
        reward = _load(text)
        if reward.name in [other.name for other in rewards]:
            what = "functions" if isinstance(reward, Reward) else "rewards"
            raise UserError(f"rollout.reward has two {what} of the name {reward.name}: rename one")
        rewards.append(reward)
    return rewards


def recorded_rewards(named: Sequence[str]) -> list[dict[str, Any]]:
    """What a resumed run is compared by (`common.checkpoint_manifest.RecordedReward`), without running any file.

    Raises UserError as `load_rewards` does.
    """
    found = [(text, *_parsed(text)) for text in named]
    return [
        {"given": text, "name": name or _model_name(path), "weight": weight, "identity": _identity(path, name)}
        for text, weight, path, name in found
    ]


def _identity(path: Path, name: str | None) -> str:
    return sha256_file(path) if name else _model_at(path, 1.0).identity


def check_models(rewards: Sequence[Reward | NamedModel], spec: Mapping[str, Any], block_size: int) -> None:
    """Whether reward models read what a policy writes: they are given its ids.

    Args: spec: of the tokenizer of the policy's data. block_size: of the policy.

    Raises UserError.
    """
    for reward in rewards:
        if not isinstance(reward, NamedModel):
            continue
        if reward.manifest["tokenizer"]["sha256"] != spec["sha256"]:
            raise UserError(
                f"the reward model {reward.checkpoint} has another tokenizer or template than data.path: make its "
                "preferences with the same --tokenizer, and train it again"
            )
        if (longest := reward.manifest["model"]["block_size"]) < block_size:
            raise UserError(
                f"the reward model {reward.checkpoint} reads {longest} tokens, model.block_size is {block_size}: use "
                f"at most {longest}"
            )


def judging_models(named: Sequence[str]) -> list[ModelConfig]:
    """The reward models that are named. Raises UserError where one can't be read."""
    folders = [text for text in named if (found := _SPEC.fullmatch(text)) is None or not found["function"]]
    models = [_model_at(path, weight) for weight, path, _ in map(_parsed, folders)]
    return [config_from_dict(model.manifest["model"], model.checkpoint) for model in models]


def _load(text: str) -> Reward | NamedModel:
    """Raises UserError."""
    weight, path, name = _parsed(text)
    if name is None:
        return _model_at(path, weight)
    function = getattr(_run(path), name, None)
    if not callable(function):
        raise UserError(f"rollout.reward has {text!r}, but {path} has no function {name}: give one that it has")
    return Reward(name, weight, function, sha256_file(path))


def _model_at(path: Path, weight: float) -> NamedModel:
    """A run's newest reward model, or that of one checkpoint. Raises UserError where there is none."""
    checkpoint = find_checkpoint(path)
    manifest = read_checkpoint_manifest(checkpoint)
    if not manifest["model"].get("scalar_head"):
        raise UserError(f"{checkpoint} is no reward model, as it has no scalar head: train one with --objective reward")
    if has_value_function(manifest):
        raise UserError(f"{checkpoint} is no reward model: its scalar head is the value function of --objective ppo")
    return NamedModel(_model_name(path), weight, checkpoint, weights_identity(manifest))


def _model_name(path: Path) -> str:
    """Its run's, as records name it: lower-case letters, digits and _."""
    path = path.resolve()
    is_of_run = (path / CHECKPOINT_MANIFEST).exists() and path.parent.name == "checkpoints"
    name = re.sub("[^a-z0-9]+", "_", (path.parent.parent if is_of_run else path).name.lower()).strip("_")
    return (name if name[:1].isalpha() else f"model_{name}")[:LONGEST_NAME]


def _parsed(text: str) -> tuple[float, Path, str | None]:
    """Weight, a function's file and its name, or a reward model's folder and None.

    Raises UserError where there is no such file or folder, or the form is another.
    """
    found = _SPEC.fullmatch(text)
    try:
        weight = float(found["weight"] or 1) if found else math.nan
    except ValueError:
        weight = math.nan
    if found is None or not math.isfinite(weight):
        raise UserError(f"rollout.reward has {text!r}: {FORM}")
    path, name = find_path(found["path"]), (found["function"] or "")[1:]
    if not name:
        if path.is_file() or path.suffix == ".py" or "*" in text.partition("*")[2]:
            raise UserError(f"rollout.reward has {text!r}: {FORM}")
        if not path.is_dir():
            raise UserError(f"rollout.reward has {text!r}, but there is no run or checkpoint {path}: {FORM}")
        return weight, path, None
    if not path.is_file():
        raise UserError(f"rollout.reward has {text!r}, but there is no file {path}: give the file of the function")
    if not re.fullmatch("[a-z][a-z0-9_]{0,31}", name):
        raise UserError(f"rollout.reward has the function {name}: name it by lower-case letters, digits and _")
    return weight, path, name


def _run(path: Path) -> object:
    """The module in a file, which need not be importable otherwise. Raises UserError where it fails."""
    spec = importlib.util.spec_from_file_location(f"longhaul_reward_{path.stem}", path)
    try:
        if spec is None or spec.loader is None:
            raise ImportError("it is no Python module")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except Exception as error:  # the user's own code: anything
        raise UserError(f"{path} can't be run: {type(error).__name__}: {_short(error)}") from None
    return module


def total(rewards: Sequence[Weighted], parts: Mapping[str, npt.NDArray[np.float64]]) -> npt.NDArray[np.float64]:
    """The weighted sum of rewards (n,) by name."""
    return sum((reward.weight * parts[reward.name] for reward in rewards), np.zeros(()))


def _short(error: object) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 120 else text[:117] + "..."
