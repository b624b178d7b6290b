"""torch.compile, a block at a time, and what the head's loss does to its logits.

All blocks share one compiled graph, so a deep model compiles as fast as a shallow one; DDP's hooks still fire block by
block; and activation checkpointing wraps compiled blocks from outside. `Module.compile` works in place: parameter names
stay as they are.
"""

from collections.abc import Callable

import torch
from torch import nn

from model.chunk_kernel import compiled_kernel
from model.gpt import GPT


def compile_blocks(model: GPT) -> None:
    """Let every block compile at its first call, as one graph, with dropout's masks as they are without compilation.

    The head's loss gets its compiled kernel.
    """
    from torch._dynamo import config as dynamo
    from torch._inductor import config as inductor

    # DDP's hooks fire as each block's backward ends: nothing is won by cutting a block where a bucket is full.
    dynamo.optimize_ddp = False
    # Inductor's own random numbers are others than eager mode's, and on CUDA, since torch 2.13, masks that repeat
    # themselves or differ between forward and recomputed forward (github.com/pytorch/pytorch/issues/198333).
    inductor.fallback_random = True
    for block in model.h:
        assert isinstance(block, nn.Module)
        block.compile()
    model.chunk_kernel = compiled_kernel()


def report_compilations(started: Callable[[], None], ended: Callable[[], None]) -> None:
    """Call these around every compilation of this process from now on, later ones for new shapes among them."""
    from torch._dynamo.callback import callback_handler

    callback_handler.register_start_callback(lambda _: started())
    callback_handler.register_end_callback(lambda _: ended())


def trial_compilation(device: torch.device) -> str | None:
    """Compile a toy with its backward; return what went wrong, in one line, or None."""
    try:
        layer = nn.Linear(8, 8, device=device)
        torch.compile(lambda x: layer(x).relu().sum())(torch.ones(4, 8, device=device)).backward()
    except Exception as error:  # whatever a compiler, a missing header or a driver comes up with
        return " ".join(str(error).split())[:300] or type(error).__name__
    return None
