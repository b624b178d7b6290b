"""Supervised fine-tuning: learn the answers of conversations, with all that was said before as their context.

The first step of Ouyang et al. 2022 (arXiv:2203.02155, section 3.5). For answers y to contexts x the loss of a step is

    - sum over answers, sum over t of log p(y_t | x, y_<t)  /  number of tokens of all answers of the step,

the end of turn included in y, as a model learns to stop only from it. What others said is no target: the batches give
it the target -100. So a micro-batch without any answer has the loss 0 and gradients of 0, and ranks agree on the count.
"""

from train.objectives.language_modelling import LanguageModelling


class Answers(LanguageModelling):
    """The cross-entropy in nats of the targets that a token set of conversations marks."""

    unit = "answer_tokens"
