"""What others' models of these sizes reach, each figure with its public source.

Only figures of one kind are in one column: HellaSwag is the accuracy by mean log-likelihood per token of the endings
(`acc_norm`, completion style), losses are nats per GPT-2 token and comparable only on the same validation data.
"""

import math
from dataclasses import dataclass

CHANCE = 0.25
HELLASWAG_EXAMPLES = 10_042
GPT2_VOCABULARY = 50_257

LLMC = "https://github.com/karpathy/llm.c/blob/master/dev/vislog.ipynb"
BUILD_NANOGPT = "https://github.com/karpathy/build-nanogpt/blob/master/play.ipynb"
GPT3 = "Brown et al. 2020, arXiv:2005.14165, table H.1, zero-shot"
ARCANE = "https://github.com/Schiller-Lab/Arcane"


@dataclass(frozen=True)
class Reference:
    """A published model. None where its makers or measurers give no figure."""

    model: str
    family: str
    parameters: int
    data: str
    tokens: float
    rope: bool
    hellaswag: float | None
    source: str
    train_loss: float | None = None
    val_loss: float | None = None
    val_data: str | None = None


REFERENCES = (
    Reference("GPT-2 124M", "GPT-2", 124_439_808, "WebText", 100e9, False, 0.2945, LLMC, None, 3.4250, "FineWeb"),
    Reference(
        "GPT-2 124M", "GPT-2", 124_439_808, "WebText", 100e9, False, 0.2945, BUILD_NANOGPT, None, 3.2924, "FineWeb-Edu"
    ),
    Reference("GPT-2 355M", "GPT-2", 354_823_168, "WebText", 100e9, False, 0.3752, LLMC, None, 3.0831, "FineWeb"),
    Reference("GPT-2 774M", "GPT-2", 774_030_080, "WebText", 100e9, False, 0.4320, LLMC, None, 3.0006, "FineWeb"),
    Reference("GPT-2 1.56B", "GPT-2", 1_557_611_200, "WebText", 100e9, False, 0.4889, LLMC, None, 2.8313, "FineWeb"),
    Reference("GPT-3 125M", "GPT-3", 125_000_000, "GPT-3's mixture", 300e9, False, 0.337, GPT3),
    Reference("GPT-3 350M", "GPT-3", 350_000_000, "GPT-3's mixture", 300e9, False, 0.436, GPT3),
    Reference("GPT-3 760M", "GPT-3", 760_000_000, "GPT-3's mixture", 300e9, False, 0.510, GPT3),
    Reference("GPT-3 1.3B", "GPT-3", 1_300_000_000, "GPT-3's mixture", 300e9, False, 0.547, GPT3),
    Reference("Arcane's kin 124M", "Arcane", 124_000_000, "FineWeb-Edu", 10e9, False, 0.3036, ARCANE),
    Reference("Arcane 124M", "Arcane", 124_000_000, "FineWeb-Edu", 10e9, True, 0.3083, ARCANE, 3.07, 3.00, "its own"),
    Reference("Arcane 355M", "Arcane", 355_000_000, "FineWeb-Edu", 10e9, True, 0.3266, ARCANE, 2.89, 2.88, "its own"),
    Reference("Arcane 1.3B", "Arcane", 1_300_000_000, "FineWeb-Edu", 10e9, True, 0.3414, ARCANE, 2.88, 2.87, "its own"),
    Reference("Arcane 1.3B", "Arcane", 1_300_000_000, "FineWeb-Edu", 20e9, True, 0.3881, ARCANE),
)

NOTES = (
    "HellaSwag is acc_norm: of the four endings the one with the highest mean log-likelihood per token, over all "
    "10,042 validation examples unless a number of examples is given beside it. GPT-3's is its paper's own zero-shot "
    "evaluation; Arcane's page names no definition.",
    "Losses are nats per token of GPT-2's vocabulary, unless another number of symbols is given beside the data, and "
    "comparable only where the validation data are the same. GPT-2 was measured by "
    "others on data it was not trained on. The 100B tokens of GPT-2 are an estimate; OpenAI gave no number.",
    f"Sources: GPT-2 {LLMC} and {BUILD_NANOGPT}; GPT-3 {GPT3}; Arcane {ARCANE}.",
)


def lines_for(parameters: int | None) -> list[Reference]:
    """GPT-2 and GPT-3 of the size nearest to a model's (124M where that is unknown), for a plot's lines."""
    wanted = math.log(parameters or 124_439_808)
    return [
        min(
            (reference for reference in REFERENCES if reference.family == family),
            key=lambda reference: abs(math.log(reference.parameters) - wanted),
        )
        for family in ("GPT-2", "GPT-3")
    ]
