"""The number formats by name, and which one suits a GPU; without torch."""

from typing import Literal

from common.errors import UserError

DtypeChoice = Literal["auto", "bf16", "fp16", "fp32"]
Dtype = Literal["bf16", "fp16", "fp32"]  # of matrix products
StreamDtype = Literal["fp32", "bf16"]  # of the residual stream

FLOAT32 = 4  # bytes


def matmul_bytes(dtype: Dtype) -> int:
    """Of a number in matrix products."""
    return FLOAT32 if dtype == "fp32" else 2


def stream_bytes(stream: StreamDtype) -> int:
    """Of a number in the residual stream."""
    return FLOAT32 if stream == "fp32" else 2


def check_stream(stream: StreamDtype, dtype: Dtype) -> None:
    """Raises UserError for a residual stream in bf16 beside matrix products in something else."""
    if stream == "bf16" and dtype != "bf16":
        raise UserError(
            f"run.stream_dtype bf16 needs matrix products in bf16, and run.dtype is {dtype}: leave it out, or give "
            "--run.dtype bf16"
        )


def cuda_dtype(capability: tuple[int, int], name: str) -> tuple[Dtype, str]:
    """bf16 from Ampere (compute capability 8.0) on; before it (V100, T4) bf16 is emulated, so fp16."""
    if capability >= (8, 0):
        return "bf16", f"{name} multiplies in bf16"
    return "fp16", f"{name} (compute capability {capability[0]}.{capability[1]}) has no bf16"
