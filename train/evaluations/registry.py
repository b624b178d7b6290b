"""Which evaluations a run has, in the order in which they are made: a new one is a line here."""

from train.evaluations.evaluation import Evaluation
from train.evaluations.held_back_pairs import HeldBackPairs
from train.evaluations.held_out_reward import HeldOutReward
from train.evaluations.multiple_choice import Choices, HellaSwag
from train.evaluations.samples import Samples
from train.evaluations.validation import Validation

EVALUATIONS: tuple[type[Evaluation], ...] = (Validation, HellaSwag, Choices, Samples)
OF_ROLLOUTS = (Validation, HeldOutReward, HellaSwag, Choices, Samples)  # of runs that sample answers
OF_PAIRS = (HeldBackPairs, HellaSwag, Choices, Samples)  # of runs that compare pairs of answers
