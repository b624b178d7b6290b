"""torch's AdamW without what it has for torch.compile, whose first use imports the compiler.

That takes over 1 s of processor time and 71 MiB in every process, compiled or not. Nobody compiles the optimizer here:
it runs between compiled blocks, not in one.
"""

from inspect import unwrap
from typing import Any

import torch


class AdamW(torch.optim.AdamW):
    """The same update by the same kernels.

    A torch that hides what it wraps for its compiler is taken as it is.
    """

    add_param_group: Any = unwrap(torch.optim.AdamW.add_param_group)
    zero_grad: Any = unwrap(torch.optim.AdamW.zero_grad)
    state_dict: Any = unwrap(torch.optim.AdamW.state_dict)
    load_state_dict: Any = unwrap(torch.optim.AdamW.load_state_dict)
    step: Any = torch.no_grad()(unwrap(torch.optim.AdamW.step))
