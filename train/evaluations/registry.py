"""Which evaluations a run has, in the order in which they are made: a new one is a line here."""

from train.evaluations.evaluation import Evaluation
from train.evaluations.multiple_choice import Choices, HellaSwag
from train.evaluations.samples import Samples
from train.evaluations.validation import Validation

EVALUATIONS: tuple[type[Evaluation], ...] = (Validation, HellaSwag, Choices, Samples)
