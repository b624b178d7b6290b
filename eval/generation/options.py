"""How texts are to be generated: values and their limits. What they do to logits is `eval.generation.sampling`."""

from dataclasses import dataclass

from common.errors import UserError

HALF_OF_THE_CONTEXT = -1  # in `GenerationOptions.slide`, until the model is known


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from the logits. The defaults draw from the model's own distribution.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token (greedy) and ignores what follows.
        top_k: only the k most likely tokens stay; 0 keeps all.
        top_p: only the fewest most likely tokens stay that have this probability together ("nucleus", Holtzman et al.
            2019, arXiv:1904.09751); 1 keeps all.
        min_p: only tokens at least this fraction as likely as the likeliest stay (Nguyen et al. 2024,
            arXiv:2407.01082); 0 keeps all.
        repetition_penalty: tokens that are in the text already have their logits divided by this if positive,
            multiplied if negative (Keskar et al. 2019, arXiv:1909.05858); 1 changes nothing. It applies to greedy
            choices too.

    Raises UserError for an impossible value.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, good, range_ in (
            ("temperature", 0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            ("top-k", self.top_k >= 0, "0 (all tokens) or more"),
            ("top-p", 0 <= self.top_p <= 1, "a value from 0 to 1"),
            ("min-p", 0 <= self.min_p <= 1, "a value from 0 to 1"),
            ("repetition-penalty", 0 < self.repetition_penalty < float("inf"), "more than 0"),
        ):
            if not good:
                raise UserError(f"{name} is {getattr(self, name.replace('-', '_'))}: use {range_}")


@dataclass(frozen=True)
class GenerationOptions:
    """How texts are to be generated from prompts.

    Attributes:
        max_tokens: for each text.
        samples: texts for each prompt.
        stops: strings that end a text.
        past_end: whether a text continues after an end of text.
        slide: oldest tokens to forget when the context is full; None ends the text there.
        chat: each prompt is a user's message, and the text the answer to it.
    """

    sampling: Sampling
    max_tokens: int
    samples: int
    seed: int
    stops: tuple[str, ...]
    past_end: bool
    slide: int | None
    chat: bool = False
