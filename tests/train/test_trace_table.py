"""Traces as PyTorch's profiler leaves them, planted by hand: every moment of a step goes to one part."""

import json
from typing import Any

import pytest

from common.step_profile import PARTS, TimeByPart
from train.profiler.intervals import Interval, Shares
from train.profiler.names import BACKWARD, HEAD, WAIT, part_of_kernel, part_of_operator
from train.profiler.trace_table import read_events, tabulate

MAIN, ENGINE, GLOO, STREAM, COMM_STREAM = 1, 2, 3, 7, 9  # threads of the process, streams of the device


def operator(name: str, start: float, end: float, tid: int = MAIN, cat: str = "cpu_op", **more: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "pid": 5, "tid": tid, "ts": start, "dur": end - start, "args": more}


def marked(name: str, start: float, end: float, tid: int = MAIN) -> dict[str, Any]:
    return operator(name, start, end, tid, cat="user_annotation")


def kernel(name: str, start: float, end: float, launched: float, tid: int = MAIN, stream: int = STREAM) -> list[Any]:
    """A kernel, and the call that started it at `launched` on a thread."""
    return [
        operator("cudaLaunchKernel", launched, launched + 0.5, tid, cat="cuda_runtime", correlation=launched),
        operator(name, start, end, stream, cat="kernel", correlation=launched),
    ]


def linked(forward: float, backward: float, number: int, tid: int = MAIN) -> list[dict[str, Any]]:
    """The arrow from a forward operator of the main thread to its backward function."""
    ends = (("s", MAIN, forward), ("f", tid, backward))
    return [{"ph": ph, "id": number, "tid": at, "ts": ts, "cat": "fwdbwd", "name": "fwdbwd"} for ph, at, ts in ends]


def microseconds(table: TimeByPart) -> dict[str, float]:
    """Of the parts that took any time."""
    return {part: round(1e6 * seconds, 6) for part, seconds in table["parts"].items() if seconds > 0}


def test_on_a_cpu_a_moment_is_the_innermost_operators_and_of_the_outermost_part() -> None:
    events = [
        marked("step 3", 0, 1000),
        marked(WAIT, 10, 60),
        marked("DistributedDataParallel.forward", 100, 400),
        operator("aten::layer_norm", 110, 130),
        operator("aten::linear", 130, 200),
        operator("aten::addmm", 140, 190),
        operator("aten::scaled_dot_product_attention", 200, 260),
        operator("aten::bmm", 210, 250),  # a product of attention's
        marked(HEAD, 300, 390),
        operator("aten::mm", 320, 380),  # the head's
        operator(f"{BACKWARD}AddmmBackward0", 400, 480),
        operator("aten::mm", 410, 460),
        operator("aten::sum", 460, 475),  # the bias's gradient is no product
        operator(f"{BACKWARD}BmmBackward0", 480, 530),
        operator("BmmBackward0", 482, 528),
        operator("aten::bmm", 490, 520),
        *linked(210, 482, 1),
        operator(f"{BACKWARD}MmBackward0", 530, 600),
        operator("MmBackward0", 530, 600),
        operator("aten::mm", 540, 590),
        operator("c10d::allreduce_", 591, 597),  # sent within the head's backward
        *linked(320, 530, 2),
        operator("aten::linalg_vector_norm", 620, 640),  # after the last backward: clipping
        marked("gloo:all_reduce", 593, 720, GLOO),
        marked("Optimizer.step#AdamW.step", 750, 800),
        operator("aten::_fused_adamw_", 760, 790),
        operator("aten::mm", 1100, 1200),  # after the step: a validation
    ]

    table = tabulate(events)

    assert table["measured"] == "main thread"
    assert microseconds(table) == {
        "matrix_products": 70 + 50,
        "attention": 60 + 46,
        "elementwise": 20 + (80 - 50) + (50 - 46),
        "head": 90 + 70 - 6,
        "optimizer": 20 + 50,
        "communication": 6 + (620 - 600) + (720 - 640),  # what nothing hides
        "data": 50,
        "idle": 10 + 40 + 10 + 40 + 10 + (750 - 720) + (1000 - 800),
    }
    assert 1e6 * table["hidden_communication_seconds"] == pytest.approx((600 - 597) + (640 - 620))
    assert table["seconds"] == pytest.approx(1000e-6)
    assert sum(table["parts"].values()) == pytest.approx(table["seconds"])
    assert sum(table["shares"].values()) == pytest.approx(1)
    assert set(table["parts"]) == set(table["shares"]) == set(PARTS)
    assert table["largest"][:2] == [
        {"name": "aten::mm", "part": "head", "seconds": pytest.approx(110e-6)},
        {"name": "gloo:all_reduce", "part": "communication", "seconds": pytest.approx(100e-6)},
    ]


def test_on_a_gpu_a_kernel_is_its_operators_and_idle_is_what_the_device_waits_for() -> None:
    events = [
        marked("step 8", 0, 400),
        marked("step 9", 500, 600),
        operator("step 8", 0, 400, STREAM, cat="gpu_user_annotation"),  # the device's copy of the range
        marked(WAIT, 0, 40),
        operator("aten::linear", 40, 50),
        *kernel("nvjet_tst_128x64", 60, 100, launched=45),
        operator("aten::gelu", 50, 55),
        *kernel("void at::native::vectorized_elementwise_kernel<4>", 100, 120, launched=52),
        operator("Torch-Compiled Region: 0/0", 55, 70),
        operator("## Call CompiledFxGraph f3ct ##", 56, 69),
        *kernel("triton_poi_fused_add_mul_0", 120, 130, launched=57),
        *kernel("triton_tem_fused_mm_1", 130, 140, launched=59),
        *kernel("void flash_fwd_kernel<cutlass::half_t>", 140, 160, launched=61),
        marked(HEAD, 70, 80),
        operator("aten::mm", 72, 78),
        *kernel("nvjet_tst_256x128", 160, 200, launched=74),
        operator(f"{BACKWARD}MmBackward0", 90, 99, ENGINE),  # another thread runs the backward
        operator("MmBackward0", 91, 98, ENGINE),
        operator("aten::mm", 92, 97, ENGINE),
        *kernel("nvjet_tst_64x64", 200, 240, launched=93, tid=ENGINE),
        *linked(72, 91, 1, tid=ENGINE),
        operator("c10d::allreduce_", 94.5, 96, ENGINE),
        *kernel("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", 220, 270, launched=95, tid=ENGINE, stream=COMM_STREAM),
        *kernel("void multi_tensor_apply_kernel<Norm>", 270, 280, launched=110),  # after the backward: clipping
        marked("Optimizer.step#AdamW.step", 120, 130),
        *kernel("void multi_tensor_apply_kernel<FusedAdam>", 280, 300, launched=125),
        operator("Memcpy DtoH (Device -> Pageable)", 300, 305, STREAM, cat="gpu_memcpy", correlation=135),
        operator("cudaMemcpyAsync", 135, 305, cat="cuda_runtime", correlation=135),
        marked("gloo:all_reduce", 310, 350, GLOO),
    ]

    table = tabulate(events)

    assert table["measured"] == "device"
    assert microseconds(table) == {
        "matrix_products": 40 + 10,
        "attention": 20,
        "elementwise": 20 + 10,
        "head": 40 + 40,
        "optimizer": 10 + 20 + 5,
        "communication": (270 - 240) + 40,
        "data": 40,
        "idle": (60 - 40) + (310 - 305) + (400 - 350) + 100,
    }
    assert 1e6 * table["hidden_communication_seconds"] == pytest.approx(240 - 220)
    assert table["seconds"] == pytest.approx(500e-6)


def test_what_torch_compile_made_is_elementwise_and_the_way_to_it_idle() -> None:
    events = [
        marked("step 1", 0, 100),
        operator("TorchDynamo Cache Lookup", 0, 10),
        operator("Torch-Compiled Region: 0/0", 10, 90),
        operator("CompiledFunction", 20, 80),
        operator("aten::mm", 30, 60),
    ]

    assert microseconds(tabulate(events)) == {"matrix_products": 30, "elementwise": 30, "idle": 40}


def test_a_trace_that_is_cut_off_or_has_no_steps_is_refused() -> None:
    whole = json.dumps({"traceEvents": [marked("step 1", 0, 100)], "traceName": "x"}).encode()
    assert microseconds(tabulate(read_events(whole))) == {"idle": 100}
    with pytest.raises(ValueError):
        read_events(whole[:-20])
    with pytest.raises(ValueError, match="no steps"):
        tabulate([operator("aten::mm", 0, 10)])


@pytest.mark.parametrize(
    ("name", "part"),
    [
        *((f"aten::{name}", "matrix_products") for name in ("mm", "addmm", "bmm", "baddbmm", "addmm_", "linear", "mv")),
        ("aten::_addmm_activation", "matrix_products"),
        ("mkldnn::_linear_pointwise", "matrix_products"),
        ("aten::mkldnn_linear", "matrix_products"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("aten::_efficient_attention_forward", "attention"),
        ("aten::_fused_adamw_", "optimizer"),
        ("Optimizer.zero_grad#AdamW.zero_grad", "optimizer"),
        ("nccl:all_reduce", "communication"),
        ("aten::mul", None),
        ("aten::mode", None),
        ("aten::linalg_vector_norm", None),
        ("aten::dot_product_of_another_kind", None),
        ("autograd::engine::evaluate_function: MmBackward0", None),
    ],
)
def test_operators_are_known_by_name(name: str, part: str | None) -> None:
    assert part_of_operator(name) == part


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matrix_products"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16>", "matrix_products"),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80", "attention"),
        ("triton_tem_fused_flex_attention_0", "attention"),
        ("triton_red_fused_native_layer_norm_2", "elementwise"),
        ("Memcpy HtoD (Pinned -> Device)", "elementwise"),
    ],
)
def test_kernels_whose_operator_tells_nothing_are_known_by_name(name: str, part: str) -> None:
    assert part_of_kernel(name) == part


def test_time_is_given_away_once() -> None:
    shares = Shares([(0, 10), (20, 30), (40, 50)])

    covered = shares.give([Interval(5, 45, "a", "x"), Interval(6, 8, "b", "y"), Interval(44, 47, "b", "y")])

    assert covered == 5 + 10 + 5 + 2
    assert shares.given == {("a", "x"): 20, ("b", "y"): 2}
    assert shares.free == [(0, 5), (47, 50)]
    assert shares.give([Interval(-5, 100, "c", "z")]) == 8
    assert shares.free == []
    assert sum(shares.given.values()) == shares.total == 30
