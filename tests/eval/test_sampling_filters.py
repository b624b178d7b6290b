"""The filters equal Hugging Face's logits processors; padding ids are never chosen; draws follow the distribution."""

import pytest
import torch

from common.errors import UserError
from eval.generation.options import Sampling
from eval.generation.sampling import choose_tokens, filtered, keep_min_p, keep_top_k, keep_top_p, penalise_repetition

ROWS, VOCAB, PADDING = 40, 61, 3


def random_rows(seed):
    """(B, V) logits of all temperatures, the last ids padding, some rows with ties."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(ROWS, VOCAB, generator=generator) * torch.logspace(-2, 1.5, ROWS)[:, None]
    rows[::4] = rows[::4].round()
    rows[:, -PADDING:] = float("-inf")
    return rows


@pytest.fixture(scope="module")
def processors():
    pytest.importorskip("transformers")
    from transformers.generation import logits_process

    return logits_process


@pytest.mark.parametrize("p", [1e-12, 1e-4, 0.1, 0.5, 0.9, 0.999999, 1.0])
def test_top_p_and_min_p_equal_hugging_face(processors, p):
    rows = random_rows(0)
    assert torch.equal(keep_top_p(rows, p), processors.TopPLogitsWarper(p)(None, rows))
    assert torch.equal(keep_min_p(rows, p), processors.MinPLogitsWarper(p)(None, rows))


@pytest.mark.parametrize("k", [1, 2, 20, VOCAB, 1000])
def test_top_k_equals_hugging_face(processors, k):
    rows = random_rows(1)
    assert torch.equal(keep_top_k(rows, k), processors.TopKLogitsWarper(k)(None, rows))


@pytest.mark.parametrize("penalty", [0.5, 1.3, 5.0])
def test_repetition_penalty_equals_hugging_face(processors, penalty):
    rows = random_rows(2)
    texts = torch.randint(0, VOCAB - PADDING, (ROWS, 9), generator=torch.Generator().manual_seed(0))
    seen = torch.zeros(ROWS, VOCAB, dtype=torch.bool).scatter(1, texts, True)
    expected = processors.RepetitionPenaltyLogitsProcessor(penalty)(texts, rows)
    assert torch.equal(penalise_repetition(rows, seen, penalty), expected)


def test_all_filters_come_in_hugging_faces_order(processors):
    rows = random_rows(3)
    texts = torch.randint(0, VOCAB - PADDING, (ROWS, 9), generator=torch.Generator().manual_seed(0))
    expected = rows
    for processor in (
        processors.RepetitionPenaltyLogitsProcessor(1.2),
        processors.TemperatureLogitsWarper(0.7),
        processors.TopKLogitsWarper(30),
        processors.TopPLogitsWarper(0.8),
        processors.MinPLogitsWarper(0.05),
    ):
        expected = processor(texts, expected)
    seen = torch.zeros(ROWS, VOCAB, dtype=torch.bool).scatter(1, texts, True)
    sampling = Sampling(temperature=0.7, top_k=30, top_p=0.8, min_p=0.05, repetition_penalty=1.2)
    assert torch.equal(filtered(rows, sampling, seen), expected)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.0),
        Sampling(temperature=1e-6),
        Sampling(temperature=100.0),
        Sampling(top_k=1000),
        Sampling(top_p=1.0, min_p=0.0),
        Sampling(top_p=0.999999),
        Sampling(top_p=0.0),
        Sampling(min_p=1.0),
        Sampling(repetition_penalty=9.0),
    ],
)
def test_padding_ids_are_never_chosen(sampling):
    generators = [torch.Generator().manual_seed(row) for row in range(ROWS)]
    seen = torch.ones(ROWS, VOCAB, dtype=torch.bool)
    for seed in range(20):
        assert (choose_tokens(random_rows(seed), sampling, generators, seen) < VOCAB - PADDING).all()


def test_nothing_left_but_the_likeliest_is_greedy():
    rows = random_rows(5)[1:4]  # rows without ties
    for sampling in (Sampling(top_k=1), Sampling(top_p=0.0), Sampling(min_p=1.0), Sampling(temperature=1e-6),
                     Sampling(temperature=1e-40), Sampling(temperature=1e-300)):  # fmt: skip
        chosen = choose_tokens(rows, sampling, [torch.Generator() for _ in rows])
        assert torch.equal(chosen, choose_tokens(rows, Sampling(temperature=0.0), []))


def test_draws_follow_the_softmax():
    """4,000 draws of four tokens: each count within five standard deviations."""
    logits, count = torch.tensor([[0.0, 1.0, -1.0, 0.5]]), 4000
    generator = torch.Generator().manual_seed(0)
    drawn = [int(choose_tokens(logits, Sampling(temperature=0.5), [generator])) for _ in range(count)]
    expected = (logits[0] / 0.5).softmax(0)
    for token, probability in enumerate(expected.tolist()):
        deviation = (count * probability * (1 - probability)) ** 0.5
        assert abs(drawn.count(token) - count * probability) < 5 * deviation


@pytest.mark.parametrize(
    "options",
    [{"temperature": -0.1}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 1.1}, {"min_p": -1.0},
     {"repetition_penalty": 0.0}],
)  # fmt: skip
def test_impossible_values_are_refused_by_name(options):
    with pytest.raises(UserError, match=next(iter(options)).replace("_", "-")):
        Sampling(**options)
