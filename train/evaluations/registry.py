"""Which evaluations a run has, in the order in which they are made: a new one is a line here."""

from train.evaluations.choices import Choices
from train.evaluations.evaluation import Evaluation
from train.evaluations.hellaswag import HellaSwag
from train.evaluations.samples import Samples
from train.evaluations.validation import Validation

EVALUATIONS: tuple[type[Evaluation], ...] = (Validation, HellaSwag, Choices, Samples)
