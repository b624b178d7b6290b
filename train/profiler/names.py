"""Which part of a step an operator or a kernel belongs to, by its name.

The parts are those of `common.step_profile.PARTS`. Operators' names are PyTorch's (`aten::mm`), kernels' those of the
libraries that hold them and of inductor.
"""

import re
from functools import cache

# Ranges that the profiler marks itself. All other annotations in a trace are PyTorch's.
HEAD, WAIT = "head and loss", "waiting for data"
STEP = re.compile(r"step (\d+)")

BACKWARD = "autograd::engine::evaluate_function: "  # before the name of a backward function that is being run
OVERRIDING = "communication"  # what is sent inside of another part is still communication
_LEADING = re.compile(r"TorchDynamo |Torch-Compiled Region|Pregraph bytecode|AOTDispatcher ")

_PRODUCT = r"(_?(b?add)?b?m[mv](_activation|_dtype)?_?|linear|matmul|dot|_scaled_mm|_grouped_mm)$"
_OPERATORS = (
    ("communication", re.compile(r"c10d::|nccl:|record_param_comms|torch::distributed::")),
    ("head", re.compile(f"{HEAD}$")),
    ("data", re.compile(f"{WAIT}$")),
    ("optimizer", re.compile(r"Optimizer\.|aten::_fused_(adam|sgd|adagrad)|aten::_foreach_")),
    ("attention", re.compile(r"\w+::\w*(scaled_dot_product|flash_attention|efficient_attention|flex_attention)")),
    ("matrix_products", re.compile(f"aten::{_PRODUCT}")),
    ("matrix_products", re.compile(r"(aten|mkldnn|onednn|mkl)::_?\w*linear")),
)
_KERNELS = (
    ("communication", re.compile(r"nccl", re.IGNORECASE)),
    ("attention", re.compile(r"fmha|flash|attention|sdpa", re.IGNORECASE)),
    ("matrix_products", re.compile(r"gemm|gemv|cutlass|cublas|nvjet|xmma|splitk|triton_tem_\w*mm", re.IGNORECASE)),
)


@cache
def part_of_operator(name: str) -> str | None:
    """None where the name tells nothing: it is a part of what it runs in, or elementwise."""
    return next((part for part, pattern in _OPERATORS if pattern.match(name)), None)


@cache
def only_leads(name: str) -> bool:
    """Whether an operator, as a trace has it, only leads to what torch.compile has made."""
    return _LEADING.match(name) is not None


@cache
def part_of_kernel(name: str) -> str:
    """Of a kernel whose operator tells nothing (inductor runs several as one)."""
    return next((part for part, pattern in _KERNELS if pattern.search(name)), "elementwise")
