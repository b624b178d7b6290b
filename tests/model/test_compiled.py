"""The model is one graph for torch.compile, with every option, and gives the same losses and gradients."""

import pytest
import torch

from tests.model.small import option_id, pairwise_options, random_tokens, small_model

LENGTH = 160


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("options", pairwise_options()[:2], ids=option_id)
def test_compiled_equals_eager(options, documents):
    """aot_eager traces forward and backward as inductor does, and leaves out only the making of kernels."""
    torch._dynamo.reset()
    model = small_model(noise=0.1, **options)
    model.recompute_every = int(documents)  # both ways
    tokens, targets = random_tokens(2, LENGTH), random_tokens(2, LENGTH, seed=1)
    ids = (torch.arange(LENGTH) // 70).expand(2, -1) if documents else None
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected = model(tokens, targets, document_ids=ids)
    want = torch.autograd.grad(expected, list(model.parameters()))
    loss = compiled(tokens, targets, document_ids=ids)
    got = torch.autograd.grad(loss, list(model.parameters()))
    torch.testing.assert_close(loss, expected)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_training_evaluation_and_sampling_compile_once_each():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    model = small_model(window=5, window_pattern="SL", position="rope", dropout=0.1)
    compiled = torch.compile(model, backend=counter, dynamic=False)
    tokens = random_tokens(2, LENGTH)

    def all_three():
        model.train()
        compiled(tokens, tokens).backward()
        model.eval()
        with torch.no_grad():
            compiled(tokens, tokens)
            compiled(tokens)

    all_three()
    frames = counter.frame_count
    for _ in range(3):
        all_three()
    assert counter.frame_count == frames == 3
