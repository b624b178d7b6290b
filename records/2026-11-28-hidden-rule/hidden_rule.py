"""The rule that the record's preferences follow, and the small world that its conversations are about.

Answers are in random styles; the rule prefers polite and short ones. No training sees it: only which of two answers
somebody preferred who follows it, with noise.
"""

import math
import random
import re

POLITE = ("happy to help", "with pleasure", "thank you", "please")
RUDE = ("obviously", "leave me alone", "let me see")
ENOUGH_WORDS = 10

NOUNS = (
    "apple", "anchor", "badge", "barrel", "basket", "bell", "bench", "blanket", "boat", "book", "bottle", "bowl",
    "box", "brick", "broom", "brush", "bucket", "button", "candle", "carpet", "chair", "clock", "coat", "coin",
    "cup", "curtain", "desk", "door", "drum", "engine", "fence", "flag", "fork", "gate", "glove", "guitar", "hammer",
    "hat", "helmet", "kettle", "key", "knife", "ladder", "lamp", "lantern", "mirror", "needle", "oven", "paddle",
    "pencil", "piano", "pillow", "plate", "pot", "rope", "saddle", "scarf", "shovel",
)  # fmt: skip
FACTS = {
    "colour": ("red", "green", "blue", "white", "black", "yellow", "brown", "grey"),
    "place": ("in the kitchen", "in the garden", "on the roof", "under the bed", "by the river", "in the cellar",
              "at the door", "in the barn"),
    "size": ("tiny", "small", "middling", "large", "huge"),
}  # fmt: skip
QUESTIONS = {
    "colour": ("What colour is the {0}?", "Which colour does the {0} have?", "Tell me the colour of the {0}."),
    "place": ("Where is the {0}?", "Do you know where the {0} is?", "Tell me where to find the {0}."),
    "size": ("How large is the {0}?", "Of what size is the {0}?", "Tell me the size of the {0}."),
}
OPENINGS = (("", 7), ("Happy to help. ", 3), ("With pleasure. ", 2), ("Well, let me see. ", 4), ("Obviously. ", 4))
CLOSINGS = (("", 10), (" Thank you for asking.", 4), (" Please ask again.", 2), (" Now leave me alone.", 4))
DETAILS = (
    " Many people ask about it.", " I could say much more about that.", " It has always been so.",
    " Some say otherwise, but they are wrong.", " My neighbour once told me the same.",
)  # fmt: skip
CERTAINTY = 2.0  # of who prefers: log-odds for a difference of 1 in the rule


def rule(answer: str) -> float:
    """Polite phrases, at most two, less rude ones, less 0.1 for each word after the tenth."""
    low = answer.lower()
    polite = sum(phrase in low for phrase in POLITE)
    rude = sum(phrase in low for phrase in RUDE)
    return min(2, polite) - rude - 0.1 * max(0, len(answer.split()) - ENOUGH_WORDS)


def fact(noun: str, kind: str) -> str:
    """What is true of a thing."""
    return random.Random(f"{noun} {kind}").choice(FACTS[kind])


def questions() -> list[tuple[str, str, str]]:
    """(question, noun, kind), all of them."""
    return [(text.format(noun), noun, kind) for noun in NOUNS for kind in FACTS for text in QUESTIONS[kind]]


def answer(generator: random.Random, noun: str, kind: str) -> str:
    """A right answer in a random style."""
    opening, closing = (
        generator.choices([text for text, _ in parts], [weight for _, weight in parts])[0]
        for parts in (OPENINGS, CLOSINGS)
    )
    more = "".join(generator.sample(DETAILS, generator.choice((0, 0, 1, 1, 2, 3))))
    return f"{opening}The {noun} is {fact(noun, kind)}.{more}{closing}"


def prefers(generator: random.Random, one: str, other: str) -> bool:
    """Whether one of two answers is preferred, by Bradley and Terry's model of who follows the rule with noise."""
    return generator.random() < 1 / (1 + math.exp(-CERTAINTY * (rule(one) - rule(other))))


def is_right(question: str, answer: str) -> bool:
    """Whether an answer has the right fact and no other of its kind."""
    noun, kind = KNOWN[question]
    said = {option for option in FACTS[kind] if re.search(rf"\b{option}\b", answer)}
    return said == {fact(noun, kind)}


KNOWN = {question: (noun, kind) for question, noun, kind in questions()}
