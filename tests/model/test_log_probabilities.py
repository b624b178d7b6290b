"""Log-probabilities of tokens: the same however a text is laid out, and those of float64 and of transformers."""

import pytest
import torch

from model.loss import IGNORE_INDEX
from tests.model.small import random_tokens, small_model
from tests.model.test_parity import copy_into, gpt2_pairs, stir

VOCAB, LENGTHS = 61, (5, 17, 11, 2)  # tokens of each text
LEARNED = {"position": "learned"}
CAPPED = {"position": "rope", "logit_softcap": 2.0, "norm": "rmsnorm", "tie_weights": False}


Row = list[torch.Tensor | None]


def texts() -> list[torch.Tensor]:
    return [random_tokens(1, length, VOCAB, seed=seed)[0] for seed, length in enumerate(LENGTHS)]


def scored(model, rows) -> list[torch.Tensor]:
    """Log-probabilities of each text's tokens but its first, (n - 1).

    Args: rows: of texts, None being padding: its id is one that the texts have, too.
    """
    width = max(sum(len(text) if text is not None else 3 for text in row) for row in rows)
    tokens, targets = torch.full((len(rows), width), 7), torch.full((len(rows), width), IGNORE_INDEX)
    documents, where = torch.full((len(rows), width), 99), {}
    for number, row in enumerate(rows):
        place = 0
        for index, text in enumerate(row):
            if text is None:
                documents[number, place : place + 3] = 50 + index
                place += 3
                continue
            part = slice(place, place + len(text))
            tokens[number, part], documents[number, part] = text, index
            targets[number, place : place + len(text) - 1] = text[1:]
            where[id(text)] = (number, slice(place, place + len(text) - 1))
            place += len(text)
    found = -model(tokens, targets, reduction="none", document_ids=documents)
    assert found.dtype == torch.float32 and found.shape == tokens.shape
    return [found[where[id(text)]] for text in texts_of(rows)]


def texts_of(rows):
    return [text for row in rows for text in row if text is not None]


def in_float64(model, options, text) -> torch.Tensor:
    exact = small_model(seed=3, noise=0.2, dtype=torch.float64, **options)
    logits = exact(text[None, :-1])[0, :, :VOCAB]  # (n - 1, V)
    return logits.log_softmax(-1).gather(1, text[1:, None]).squeeze(1)


@pytest.mark.parametrize("options", [LEARNED, CAPPED], ids=["learned", "capped"])
def test_a_text_has_the_same_log_probabilities_wherever_it_stands(options):
    model, found = small_model(seed=3, noise=0.2, **options), texts()
    weights = [torch.linspace(-1, 1, len(text) - 1) for text in found]
    layouts: dict[str, list[Row]] = {
        "alone": [[text] for text in found],
        "left-padded": [[None, text] for text in found],
        "packed": [[found[0], found[1], None], [None, found[2], found[3]]],
    }
    gradients: dict[str, tuple[torch.Tensor, ...]] = {}
    for name, rows in layouts.items():
        groups = [[row] for row in rows] if name == "alone" else [rows]  # side by side they are right-padded
        parts = [each for group in groups for each in scored(model, group)]
        for text, log_probs in zip(found, parts, strict=True):
            torch.testing.assert_close(log_probs.double(), in_float64(model, options, text), atol=1e-5, rtol=0)
        loss = torch.cat([part * weight for part, weight in zip(parts, weights, strict=True)]).sum()
        gradients[name] = torch.autograd.grad(loss, list(model.parameters()))
    padded = scored(model, layouts["alone"])
    for log_probs, text in zip(padded, found, strict=True):
        torch.testing.assert_close(log_probs.double(), in_float64(model, options, text), atol=1e-5, rtol=0)
    for name in ("left-padded", "packed"):
        for got, want in zip(gradients[name], gradients["alone"], strict=True):
            torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_log_probabilities_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    shape = {"n_layer": 2, "n_head": 4, "n_embd": 32}
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=VOCAB, n_positions=160, n_inner=128, **shape, **dropouts)
    )
    stir(theirs)
    model = small_model(**shape)
    copy_into(model, theirs, gpt2_pairs(2))
    for text, log_probs in zip(texts(), scored(model, [[text] for text in texts()]), strict=True):
        expected = theirs(text[None]).logits[0, :-1].log_softmax(-1).gather(1, text[1:, None]).squeeze(1)
        torch.testing.assert_close(log_probs, expected, atol=1e-5, rtol=0)
