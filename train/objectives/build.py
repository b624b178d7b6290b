"""The objective that a configuration names."""

from collections.abc import Sequence

from train.objectives.answers import Answers
from train.objectives.language_modelling import LanguageModelling
from train.objectives.objective import Objective


def build_objective(kind: str, z_loss: float, sources: Sequence[str] = ()) -> Objective:
    """Args: as options `objective.kind` and `optim.z_loss` have them; sources: names of those of a mix."""
    return {"language_modelling": LanguageModelling, "sft": Answers}[kind](z_loss, sources)
