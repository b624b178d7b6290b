"""What an answer is worth: Python functions of the user's, and their weighted sum.

    def exact_answer(prompts, completions, fields):
        return [float(text == field["answer"]) for text, field in zip(completions, fields)]

A function is named FILE.py:FUNCTION, with a weight as 0.5*FILE.py:FUNCTION. It is given three lists of one length: the
prompts' texts, what the model generated after them (without the token that ends an answer), and the prompts' further
fields as dictionaries. It returns one finite number for each. It runs on the rank that has sampled the answers.
"""

import importlib.util
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from common.errors import UserError
from common.paths import find_path
from common.publish import sha256_file

Function = Callable[[list[str], list[str], list[dict[str, Any]]], Sequence[float]]
_SPEC = re.compile(r"(?:(?P<weight>[^*]+)\*)?(?P<file>.+\.py):(?P<name>[A-Za-z_]\w*)")
FORM = "use FILE.py:FUNCTION, or WEIGHT*FILE.py:FUNCTION"


@dataclass(frozen=True)
class Reward:
    """One of the functions.

    Attributes:
        name: the function's, by which its figures are recorded.
        identity: SHA-256 of what decides its values: of the function's file.
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


def load_rewards(named: Sequence[str]) -> list[Reward]:
    """The functions that option `rollout.reward` names, each file run once.

    Raises UserError where a file or a function in it is missing, it fails, or two have the same name.
    """
    if not named:
        raise UserError(f"no reward is given: add --reward ({FORM})")
    rewards: list[Reward] = []
    for text in named:
        reward = _load(text)
        if reward.name in [other.name for other in rewards]:
            raise UserError(f"rollout.reward has two functions of the name {reward.name}: rename one")
        rewards.append(reward)
    return rewards


def recorded_rewards(named: Sequence[str]) -> list[dict[str, Any]]:
    """What a resumed run is compared by (`common.checkpoint_manifest.RecordedReward`), without running any file.

    Raises UserError as `load_rewards` does.
    """
    found = [(text, *_parsed(text)) for text in named]
    return [
        {"given": text, "name": name, "weight": weight, "identity": sha256_file(path)}
        for text, weight, path, name in found
    ]


def _load(text: str) -> Reward:
    """Raises UserError."""
    weight, path, name = _parsed(text)
    function = getattr(_run(path), name, None)
    if not callable(function):
        raise UserError(f"rollout.reward has {text!r}, but {path} has no function {name}: give one that it has")
    return Reward(name, weight, function, sha256_file(path))


def _parsed(text: str) -> tuple[float, Path, str]:
    """Weight, file and function's name. Raises UserError where there is no such file, or the form is another."""
    found = _SPEC.fullmatch(text)
    try:
        weight = float(found["weight"] or 1) if found else math.nan
    except ValueError:
        weight = math.nan
    if found is None or not math.isfinite(weight):
        raise UserError(f"rollout.reward has {text!r}: {FORM}")
    path, name = find_path(found["file"]), found["name"]
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


def total(rewards: Sequence[Reward], parts: Mapping[str, npt.NDArray[np.float64]]) -> npt.NDArray[np.float64]:
    """The weighted sum of rewards (n,) by name."""
    return sum((reward.weight * parts[reward.name] for reward in rewards), np.zeros(()))


def _short(error: object) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 120 else text[:117] + "..."
