"""The campaign's table: what each part asks, how long it may take, and what was predicted for one NVIDIA H100.

Part 1: is all of it right? Part 2: where does 124M's time go? Part 3: and that of 1.3B? The predictions were reckoned
from a step's operations, before any GPU was measured.
"""

from train.benchmarks.campaign.checks_of_speed import LARGE, SMALL
from train.benchmarks.campaign.figures import GENERATE, GENERATED, at, differences, probe, tiny_probe
from train.benchmarks.campaign.running import EVERY_PART, Check, Figure

GPU_TESTS = ("tests/train/test_on_a_gpu.py", "tests/model/test_masks.py", "tests/train/test_out_of_memory.py")
CPU_TESTS = (
    "tests/model/test_gpt.py",
    "tests/model/test_loss.py",
    "tests/train/test_batch.py",
    "tests/train/test_step.py",
)
PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider")

FIRST = (
    Check(
        "facts", EVERY_PART, 15, probe("facts"), "card, driver, versions, clocks, and the rates that bound the rest",
        (
            Figure("bytes copied per second", at("rates", "copy_bytes_per_second"), 3.0e12),
            Figure("FLOP/s of 124M's MLP", at("rates", "124m_mlp_flops"), 602e12),
            Figure("FLOP/s of 124M's head", at("rates", "124m_head_flops"), 602e12),
            Figure("FLOP/s of 1.3B's MLP", at("rates", "1p3b_mlp_flops"), 642e12),
        ),
        tiny_probe("facts"),
    ),
    Check(
        "data", EVERY_PART, 10, probe("data"), "tokens and questions are there, or are made", (), tiny_probe("data")
    ),
)  # fmt: skip

RIGHT = (
    Check(
        "parity", 1, 45, probe("parity"),
        "20 steps in float32 learn the same on CPU and GPU, and so do the compiled ones, bf16 and each attention",
        differences(
            ("device fp32 from cpu fp32", 1e-3),
            ("device fp32 compiled from device fp32", 1e-3),
            ("device bf16 from device fp32", 0.02),
            ("device bf16 compiled from device bf16", 0.02),
            *((f"device bf16 {name} from device bf16", 0.02) for name in ("math", "efficient", "flash", "cudnn")),
        ),
        tiny_probe("parity"),
    ),
    Check(
        "smoke", 1, 45, probe("smoke"),
        "smoke.yaml learns, compiled and not, and with two ranks on one GPU, whose gradients go by gloo (NCCL refuses)",
        (
            *differences(("compiled", 0.03), ("two ranks", 0.03)),
            Figure("runs that failed", lambda result: len(result["errors"]), 0, most=0),
        ),
        tiny_probe("smoke"),
    ),
    Check(
        "gpu tests", 1, 100, (*PYTEST, "-m", "gpu", *GPU_TESTS), "the tests that need a GPU pass",
        tiny=(*PYTEST, "-m", "gpu", GPU_TESTS[0]),
    ),
    Check(
        "architectures", 1, 80, probe("architectures"),
        "each architecture's file, with documents and without, compiles once, and learns as without compilation",
        (
            Figure("that failed", at("errors"), 0, most=0),
            Figure("compilations in the first step, least", at("least_first_compilations"), least=1, gpu_only=True),
            Figure("compilations after the first step", at("late_compilations"), 0, most=0),
            Figure("largest difference to eager", at("largest_difference"), 0.0, most=0.02),
            Figure("largest difference to the other masks", at("largest_flex_difference"), 0.0, most=0.02),
        ),
        tiny_probe("architectures"),
    ),
    Check(
        "resume", 1, 75, probe("resume"),
        "with run.deterministic, a run that SIGTERM stops in a step and kill -9 ends in a save is resumed to the bit",
        (
            Figure("stopped by SIGTERM, saved, status 0", at("preempted"), 1, least=1),
            Figure("killed in a save", at("killed_in_a_save"), 1),
            Figure("steps that differ", at("differing_steps"), 0, most=0),
            Figure("the same weights", at("same_weights"), 1, least=1),
        ),
        tiny_probe("resume"),
    ),
    Check(
        "saves", 1, 50, probe("saves"), "training waits less for a save that is written beside it",
        (
            Figure("seconds waited, asynchronous", at("asynchronous", "blocked_seconds")),
            Figure("seconds waited, blocking", at("waited for", "blocked_seconds")),
            Figure("share of the blocking save", at("ratio"), most=1.0, gpu_only=True),
        ),
        tiny_probe("saves"),
    ),
    Check(
        "memory", 1, 60, probe("memory"),
        "fp16 fits with auto; out of memory names what to change; a run is resumed where less memory is free",
        (
            Figure("out of memory names the options", at("names_the_options"), 1, least=1),
            Figure("resumed with less memory", at("resumed_with_less"), 1, least=1),
        ),
        "needs a GPU (tests/train/test_out_of_memory.py limits a process's memory)",
    ),
    Check(
        "generation-124m", 1, 25,
        (*GENERATE, "--preset=gpt2-124m", "--device=cuda", "--dtype=fp32", "--batch", "1", "16", "--turns=1"),
        "in float32 the texts are those of transformers", GENERATED, "on a CPU the same command as part 3's",
    ),
    Check(
        "cpu tests", 1, 40, (*PYTEST, *CPU_TESTS), "tests of the CPU pass on this machine with no device visible",
        tiny="needs a machine with a GPU", hides_gpus=True,
    ),
)  # fmt: skip

CHECKS = (*FIRST, *RIGHT, *SMALL, *LARGE)
