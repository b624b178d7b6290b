"""The GPT against a textbook in float64, and causality, windows and documents over all combinations of options."""

import pytest
import torch
from torch.nn import functional as F

from model import attention_masks
from tests.model.small import all_options, option_id, pairwise_options, random_tokens, small_model
from tests.model.textbook import textbook_logits

LENGTH = 24


@pytest.fixture(autouse=True)
def tiny_blocks(monkeypatch):
    """Lets a window of 5 run block by block in sequences of 24."""
    monkeypatch.setattr(attention_masks, "SMALLEST_BLOCK", 1)


def real_logits(model, tokens, **options):
    return model(tokens, **options)[..., : model.config.vocab_size]


def test_changing_a_token_changes_no_logit_before_it_whatever_the_options():
    """And does change its own, so that the comparison means something."""
    tokens = random_tokens(1, LENGTH)
    changed = tokens.clone()
    changed[0, 13] = (tokens[0, 13] + 1) % 61
    for options in [*all_options(), *pairwise_options()]:
        model = small_model(**options)
        with torch.no_grad():
            before, after = real_logits(model, tokens), real_logits(model, changed)
        assert torch.equal(before[:, :13], after[:, :13]), options
        assert not torch.equal(before[:, 13], after[:, 13]), options


@pytest.mark.parametrize("pattern", ["S", "SL"])
@pytest.mark.parametrize("options", pairwise_options(), ids=option_id)
def test_a_window_ends_where_it_says(options, pattern):
    """Two sliding layers of 5 keys reach back 8 tokens; with a full layer everything after the change is touched."""
    model = small_model(noise=0.1, **{**options, "window": 5, "window_pattern": pattern})
    tokens = random_tokens(1, LENGTH)
    changed = tokens.clone()
    changed[0, 4] = (tokens[0, 4] + 1) % 61
    with torch.no_grad():
        difference = (real_logits(model, tokens) - real_logits(model, changed)).abs().amax(-1)[0]
    touched = difference > 0
    reach = 4 + 8 if pattern == "S" else LENGTH - 1
    assert touched[4 : reach + 1].all()
    assert not touched[reach + 1 :].any()


@pytest.mark.parametrize("documents", [False, True], ids=["one", "documents"])
@pytest.mark.parametrize("options", pairwise_options(), ids=option_id)
def test_logits_and_gradients_equal_the_textbook(options, documents):
    model = small_model(noise=0.2, dtype=torch.float64, **options)
    tokens, targets = random_tokens(2, LENGTH), random_tokens(2, LENGTH, seed=1)
    ids = torch.tensor([[0] * 11 + [1] * 2 + [2] * 11, [5] * 24]) if documents else None
    parameters = {name: value.detach().clone().requires_grad_() for name, value in model.named_parameters()}
    expected = textbook_logits(model.config, parameters, tokens, ids)
    torch.testing.assert_close(real_logits(model, tokens, document_ids=ids), expected, rtol=1e-5, atol=1e-6)
    model(tokens, targets, document_ids=ids).backward()
    F.cross_entropy(expected.flatten(0, 1), targets.flatten(), reduction="sum").backward()
    wanted = {name: value.grad for name, value in parameters.items() if value.grad is not None}
    largest = max(want.norm() for want in wanted.values())  # float32 angles and λ round beside it
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert (parameter.grad - wanted[name]).norm() <= 1e-5 * wanted[name].norm() + 1e-7 * largest, name


@pytest.mark.parametrize("options", pairwise_options(), ids=option_id)
def test_documents_in_one_sequence_equal_documents_apart(options):
    model = small_model(noise=0.1, **options)
    tokens = random_tokens(1, LENGTH)
    ids = torch.tensor([[3] * 9 + [7] * 1 + [3] * 14])[:, :LENGTH]
    ids[0, 10:] = 9
    with torch.no_grad():
        together = real_logits(model, tokens, document_ids=ids)
        apart = torch.cat([real_logits(model, part) for part in tokens.split([9, 1, 14], dim=1)], dim=1)
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)


def test_positions_can_be_given():
    model = small_model(position="learned", noise=0.1)
    tokens = random_tokens(2, LENGTH)
    with torch.no_grad():
        shifted = real_logits(model, tokens, positions=torch.arange(3, 3 + LENGTH))
        assert not torch.equal(shifted, real_logits(model, tokens))
        torch.testing.assert_close(shifted, real_logits(model, tokens, positions=torch.arange(3, 27).expand(2, -1)))
    rotary = small_model(position="rope", noise=0.1)
    with torch.no_grad():  # only distances count
        torch.testing.assert_close(
            real_logits(rotary, tokens, positions=torch.arange(3, 27)),
            real_logits(rotary, tokens),
            rtol=1e-4,
            atol=1e-5,
        )


def test_padding_ids_never_get_probability():
    model = small_model()
    logits = model(random_tokens(1, 8))
    assert logits.shape[-1] == 64
    assert (logits[..., 61:] == -float("inf")).all()


def test_the_loss_is_the_cross_entropy_of_the_logits():
    model, tokens, targets = small_model(noise=0.1), random_tokens(2, LENGTH), random_tokens(2, LENGTH, seed=1)
    targets[0, :5] = -100
    with torch.no_grad():
        per_token = model(tokens, targets, reduction="none")
        expected = F.cross_entropy(real_logits(model, tokens).flatten(0, 1), targets.flatten(), reduction="none")
        torch.testing.assert_close(per_token.flatten(), expected)
        torch.testing.assert_close(model(tokens, targets), expected.sum())


def test_the_first_loss_is_that_of_guessing():
    model = small_model(n_layer=4)
    with torch.no_grad():
        loss = model(random_tokens(4, 64), random_tokens(4, 64, seed=1)) / 256
    assert abs(loss.item() - torch.log(torch.tensor(61.0)).item()) < 0.1
