"""Generation with the cache equals generation without it, for every option, prompt length and grouping of tokens."""

from typing import Any

import pytest
import torch

from common.errors import UserError
from model import attention_masks
from model.cache import KVCache
from tests.model.small import option_id, pairwise_options, random_tokens, small_config, small_model

CAPACITY = 40
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(autouse=True)
def setting(monkeypatch):
    monkeypatch.setattr(attention_masks, "SMALLEST_BLOCK", 1)
    with torch.no_grad():
        yield


def grow_without_cache(model, prompt, count):
    """Greedy tokens and the logits they came from, the whole context anew each time."""
    tokens, seen = prompt, []
    for _ in range(count):
        seen.append(model(tokens)[:, -1])
        tokens = torch.cat((tokens, seen[-1].argmax(-1, keepdim=True)), dim=1)
    return tokens, torch.stack(seen)


def grow(model, cache, logits, count):
    tokens, seen = [], []
    for _ in range(count):
        seen.append(logits)
        tokens.append(logits.argmax(-1, keepdim=True))
        logits = model.next_logits(tokens[-1], cache)
    return torch.cat(tokens, dim=1), torch.stack(seen)


@pytest.mark.parametrize("pattern", ["S", "SL"])
@pytest.mark.parametrize("options", pairwise_options(), ids=option_id)
def test_greedy_is_equal_with_and_without(options, pattern):
    extra = {"window_pattern": pattern} if options["window"] else {}
    model = small_model(noise=0.2, **options, **extra).eval()
    for length in (1, 3, 5, 17):
        prompt = random_tokens(2, length)
        expected, expected_logits = grow_without_cache(model, prompt, 12)
        cache = KVCache(model.config, 2, CAPACITY)
        tokens, logits = grow(model, cache, model.next_logits(prompt, cache), 12)
        assert torch.equal(tokens, expected[:, length:])
        torch.testing.assert_close(logits, expected_logits, **CLOSE)
        assert cache.longest == length + 12


@pytest.mark.parametrize("options", pairwise_options(), ids=option_id)
def test_prompts_of_unequal_length_side_by_side_equal_each_alone(options):
    model = small_model(noise=0.2, **options).eval()
    lengths, prompt = torch.tensor([4, 1, 13, 9]), random_tokens(4, 13)
    cache = KVCache(model.config, 4, CAPACITY)
    tokens, logits = grow(model, cache, model.next_logits(prompt, cache, lengths), 10)
    for row, length in enumerate(lengths.tolist()):
        expected, expected_logits = grow_without_cache(model, prompt[row : row + 1, :length], 10)
        assert torch.equal(tokens[row : row + 1], expected[:, length:])
        torch.testing.assert_close(logits[:, row], expected_logits[:, 0], **CLOSE)


@pytest.mark.parametrize("options", pairwise_options(), ids=option_id)
def test_a_text_may_come_in_pieces(options):
    """Also in pieces that differ in length between the rows, and longer than the window."""
    model = small_model(noise=0.2, **options).eval()
    rows = random_tokens(2, 30)
    cache = KVCache(model.config, 2, CAPACITY)
    fed = torch.zeros(2, dtype=torch.int64)
    for pieces in ([3, 3], [1, 1], [9, 2], [1, 1], [4, 8], [7, 6]):
        lengths = torch.tensor(pieces)
        padded = torch.zeros(2, max(pieces), dtype=torch.int64)
        for row, piece in enumerate(pieces):
            padded[row, :piece] = rows[row, fed[row] : fed[row] + piece]
        logits = model.next_logits(padded, cache, None if max(pieces) == 1 else lengths)
        fed += lengths
        for row in range(2):
            expected = model(rows[row : row + 1, : fed[row]])[0, -1]
            torch.testing.assert_close(logits[row], expected, **CLOSE)
    assert cache.longest == int(fed.max())


@pytest.mark.parametrize("unequal", [False, True])
@pytest.mark.parametrize("window", [None, 5])
def test_samples_of_one_prompt_go_on_apart(unequal, window):
    model = small_model(noise=0.2, position="rope", window=window).eval()
    prompt, lengths = random_tokens(2, 8), torch.tensor([8, 3] if unequal else [8, 8])
    cache = KVCache(model.config, 2, CAPACITY)
    model.next_logits(prompt, cache, lengths if unequal else None)
    rows = torch.tensor([1, 0, 1])
    samples, next_tokens = cache.select(rows), torch.tensor([[7], [8], [9]])
    logits = model.next_logits(next_tokens, samples)
    for sample, row in enumerate(rows.tolist()):
        alone = torch.cat((prompt[row, : lengths[row]], next_tokens[sample]))[None]
        torch.testing.assert_close(logits[sample], model(alone)[0, -1], **CLOSE)
    original = model.next_logits(torch.tensor([[1], [2]]), cache)  # untouched by its samples
    alone = torch.cat((prompt[0], torch.tensor([1])))[None]
    torch.testing.assert_close(original[0], model(alone)[0, -1], **CLOSE)


def test_a_window_goes_on_for_ever_in_constant_memory():
    model = small_model(noise=0.2, position="rope", window=5, block_size=16).eval()
    cache = KVCache(model.config, 1, 5)
    prompt = random_tokens(1, 12)
    tokens, _ = grow(model, cache, model.next_logits(prompt, cache), 40)
    assert torch.equal(tokens, grow_without_cache(model, prompt, 40)[0][:, 12:])
    keys, _ = cache.room_of(0, torch.empty(0))
    assert keys.shape[2] == 5


def test_grouped_queries_keep_few_heads():
    model = small_model(n_kv_head=1).eval()
    cache = KVCache(model.config, 3, CAPACITY)
    model.next_logits(random_tokens(3, 4), cache)
    assert cache.room_of(0, torch.empty(0))[0].shape == (3, 1, CAPACITY, 8)


def test_no_room_is_said_before_anything_is_written():
    model = small_model(position="rope").eval()
    cache = KVCache(model.config, 1, 6)
    model.next_logits(random_tokens(1, 5), cache)
    assert cache.has_room(1)
    assert not cache.has_room(2)
    with pytest.raises(ValueError, match="holds 5 of 6 tokens and has no room for 2 more"):
        model.next_logits(random_tokens(1, 2), cache)
    assert cache.longest == 5


def test_learned_positions_end_with_a_message():
    model = small_model(position="learned", block_size=8).eval()
    cache = KVCache(model.config, 1, 20)
    model.next_logits(random_tokens(1, 8), cache)
    with pytest.raises(UserError, match="the text has 9 tokens, more than the 8 learned positions"):
        model.next_logits(random_tokens(1, 1), cache)
    with pytest.raises(UserError, match="10 tokens"):
        model(random_tokens(1, 10))


def test_a_cache_is_refused_while_gradients_are_recorded():
    model = small_model()
    with torch.enable_grad(), pytest.raises(AssertionError, match="no_grad"):
        model(random_tokens(1, 3), cache=KVCache(small_config(), 1, 8))
