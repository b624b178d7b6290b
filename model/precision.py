"""Which number format the matrix multiplications use, chosen from what the hardware does well."""

import contextlib

import torch

from common.errors import UserError
from model.number_formats import Dtype, DtypeChoice, StreamDtype, cuda_dtype

TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def resolve_dtype(choice: DtypeChoice, device: torch.device) -> tuple[Dtype, str]:
    """The format to use and, in a few words, the reason.

    `auto` takes bf16 only where the hardware multiplies in it: emulated bf16 is several times slower than fp32.
    Raises UserError for fp16 on Apple GPUs, where there is no loss scaling.
    """
    if choice == "fp16" and device.type == "mps":
        raise UserError("run.dtype fp16 needs loss scaling, which Apple GPUs don't have: use --run.dtype auto")
    if choice != "auto":
        return choice, "as asked"
    if device.type == "cuda":
        return cuda_dtype(torch.cuda.get_device_capability(device), torch.cuda.get_device_name(device))
    if device.type == "cpu":
        if _cpu_multiplies_bf16():
            return "bf16", "this CPU multiplies in bf16"
        return "fp32", "this CPU has no bf16 multiplication"
    return "fp32", f"the safe choice on {device.type}"


def stream_dtype(stream: StreamDtype) -> torch.dtype | None:
    """As `GPT.stream_dtype`."""
    return None if stream == "fp32" else TORCH_DTYPES[stream]


def _cpu_multiplies_bf16() -> bool:
    # Private names that exist in torch 2.11 to 2.13; where one is gone the answer is the safe one.
    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, check, lambda: False)() for check in checks)


def non_finite_predictions(dtype: Dtype | torch.dtype) -> str:
    """The message for a model that predicts NaN: the range may be at fault in fp16, and only there."""
    if dtype in ("fp16", torch.float16):
        return "the model's predictions are non-finite (NaN or inf), and fp16 ends at 65,504: use --dtype bf16 or fp32"
    return (
        "the model's predictions are non-finite (NaN or inf), and no --dtype helps: its weights have diverged or "
        "are damaged, use an earlier checkpoint"
    )


def matmul_dtype(operand: torch.Tensor) -> torch.dtype:
    """What matrix products of this tensor are computed in: autocast's format where it is on."""
    kind = operand.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else operand.dtype


def autocast(dtype: Dtype, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Run matrix multiplications in `dtype`, with the weights kept in float32."""
    if dtype == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=TORCH_DTYPES[dtype])
