"""The cached engine against a plain loop that computes the whole context for every token."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from eval.generation.decoding import COUNT, END, FULL, Decoding, context_start, goes_on
from eval.generation.options import Sampling
from tests.model.small import option_id, pairwise_options, small_model

BLOCK = 16
GREEDY = Sampling(temperature=0.0)


def model_of(**options):
    return small_model(noise=0.2, **{"block_size": BLOCK, **options}).eval()


def prompt_of(length, seed=0):
    return torch.randint(0, 61, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def written_without_cache(model, prompt, count, slide=None):
    """Greedy tokens, every one from a forward over all that the text still sees."""
    tokens = list(prompt)
    for _ in range(count):
        if len(tokens) > BLOCK and slide is None and not goes_on(model.config):
            break
        start = 0 if goes_on(model.config) else context_start(len(tokens), BLOCK, slide or 1)
        tokens.append(int(model(torch.tensor([tokens[start:]]))[0, -1].argmax()))
    return tokens[len(prompt) :]


def written(model, prompts, count, **options: Any):
    decoding = Decoding(model, prompts, options.pop("sampling", GREEDY), count=count, **options)
    for _ in decoding:
        pass
    return decoding.rows


@pytest.mark.parametrize("options", pairwise_options(), ids=option_id)
def test_greedy_equals_recomputing_for_every_option_up_to_and_past_the_context(options):
    model = model_of(**options)
    for length in (1, 2, BLOCK - 1, BLOCK):
        for slide in (None, 1, BLOCK // 2):
            (row,) = written(model, [prompt_of(length)], 22, slide=slide)
            expected = written_without_cache(model, prompt_of(length), 22, slide)
            assert row.continuation == expected
            assert row.ended == (COUNT if len(expected) == 22 else FULL)


@pytest.mark.parametrize("options", pairwise_options(), ids=option_id)
@pytest.mark.parametrize("slide", [None, 3])
def test_prompts_of_unequal_length_side_by_side_equal_each_alone(options, slide):
    """The longest fills its context first and leaves; the others go on as if it had never been there."""
    model = model_of(**options)
    prompts = [prompt_of(length, seed=length) for length in (3, 14, 1, 9)]
    for row, prompt in zip(written(model, prompts, 18, slide=slide), prompts, strict=True):
        assert row.continuation == written_without_cache(model, prompt, 18, slide)


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=4), slide=st.integers(1, BLOCK), count=st.integers(1, 30)
)
def test_any_lengths_and_any_slide(lengths, slide, count):
    model = model_of(n_layer=1)
    prompts = [prompt_of(length, seed) for seed, length in enumerate(lengths)]
    for row, prompt in zip(written(model, prompts, count, slide=slide), prompts, strict=True):
        assert row.continuation == written_without_cache(model, prompt, count, slide)
        assert row.ended == COUNT


def test_windows_with_rotary_positions_go_on_without_end():
    model = model_of(position="rope", window=5)
    (row,) = written(model, [prompt_of(3 * BLOCK)], 2 * BLOCK)
    assert row.continuation == written_without_cache(model, prompt_of(3 * BLOCK), 2 * BLOCK)
    assert row.ended == COUNT
    assert not goes_on(model_of(position="rope", window=5, window_pattern="SL").config)
    assert not goes_on(model_of(position="rope", window=BLOCK + 1).config)


def test_a_sample_is_the_same_whatever_is_written_beside_it():
    model, sampling = model_of(position="rope"), Sampling(temperature=1.0, top_p=0.95)
    prompts = [prompt_of(4, seed=1), prompt_of(2, seed=2)]
    many = written(model, prompts, 10, sampling=sampling, samples=3, seed=5)
    assert [(row.prompt, row.sample) for row in many] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    alone = written(model, prompts[1:], 10, sampling=sampling, samples=2, seed=5)
    assert [row.continuation for row in alone] == [row.continuation for row in many[3:5]]
    assert len({tuple(row.continuation) for row in many[:3]}) == 3
    other_seed = written(model, prompts[1:], 10, sampling=sampling, samples=2, seed=6)
    assert [row.continuation for row in other_seed] != [row.continuation for row in alone]


def test_an_end_of_text_ends_a_row_and_stays_out_of_it():
    model = model_of()
    expected = written_without_cache(model, prompt_of(3), 8)
    end = expected[4]
    rows = written(model, [prompt_of(3), prompt_of(5, seed=3)], 8, end_ids=(end,))
    assert rows[0].continuation == expected[: expected.index(end)]
    assert rows[0].ended == END
    other = written_without_cache(model, prompt_of(5, seed=3), 8)
    assert rows[1].continuation == (other[: other.index(end)] if end in other else other)


def test_a_row_that_is_finished_from_outside_leaves_the_others_undisturbed():
    model = model_of()
    decoding = Decoding(model, [prompt_of(3), prompt_of(5, seed=3)], GREEDY, count=8)
    for number, step in enumerate(decoding):
        if number == 2:
            decoding.finish(0)
        assert [row for row, _ in step] == ([0, 1] if number <= 2 else [1])
    assert decoding.rows[0].continuation == written_without_cache(model, prompt_of(3), 3)
    assert decoding.rows[1].continuation == written_without_cache(model, prompt_of(5, seed=3), 8)


def test_repetition_penalty_counts_prompt_and_continuation():
    model = model_of(position="rope")
    (row,) = written(model, [prompt_of(4)], 12, sampling=Sampling(temperature=0.0, repetition_penalty=1e6))
    assert len(set(row.tokens)) == len(set(prompt_of(4))) + 12


def test_prompts_that_can_not_be_continued_are_refused():
    with pytest.raises(UserError, match="--slide"):
        Decoding(model_of(), [prompt_of(BLOCK + 1)], GREEDY, count=1)
    with pytest.raises(UserError, match="empty"):
        Decoding(model_of(), [[]], GREEDY, count=1)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling()])
def test_predictions_that_are_no_numbers_are_said(sampling):
    """Activations that float32 and bfloat16 hold and float16 doesn't, as models trained in bfloat16 may have them."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = model_of()
        with torch.no_grad():
            model.h[0].mlp.c_proj.weight.mul_(3e5)
        if dtype == torch.float16:
            with pytest.raises(UserError, match="use --dtype bf16 or fp32"):
                written(model.to(dtype), [prompt_of(3)], 4, sampling=sampling)
        else:
            assert written(model.to(dtype), [prompt_of(3)], 4, sampling=sampling)[0].ended == COUNT
