"""The objective that a configuration names."""

from train.objectives.answers import Answers
from train.objectives.language_modelling import LanguageModelling
from train.objectives.objective import Objective
from train.settings.sections import Config


def build_objective(config: Config) -> Objective:
    kind = Answers if config.objective.kind == "sft" else LanguageModelling
    return kind(config.optim.z_loss)
