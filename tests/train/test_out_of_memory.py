"""What doesn't fit into the memory is a line with what to do: real allocations that fail, in real processes."""

import os
import re
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from common.memory_errors import is_out_of_memory, what_was_asked
from slurm.decision import Facts, decide
from tests.eval.checkpoints import write_checkpoint
from tests.eval.hellaswag_files import official_rows, write_official
from tests.helpers.ranks import RankGroup
from tests.helpers.token_sets import make_token_set
from tests.helpers.training import run_of, tiny_arguments

resource = pytest.importorskip("resource")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits of a process's memory")
MORE_MIB = 400  # for what a process has not loaded yet, and for a step of a tiny model
LARGE = ("--batch.tokens_per_step=131072", "--batch.micro_batch=128", "--eval.tokens=1024", "--recompute.mode=none")


def limited(output: Path, script: str, arguments: list[str], rank: int) -> None:
    """Run a script, as this rank with `MORE_MIB` more of memory than the process has, and what it prints in a file."""
    from common.errors import exit_on_user_error

    main = import_module(script).main
    with open(output, "ab", buffering=0) as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[5])  # of data and stacks
    limit = pages * resource.getpagesize() + (MORE_MIB << 20)
    if os.environ["RANK"] == str(rank):
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    sys.argv = [script, *arguments]
    exit_on_user_error(main)


def run_limited(folder: Path, script: str, *arguments: object) -> list[str]:
    """The lines that a script prints, which must end with status 2."""
    output = folder / "printed.txt"
    output.unlink(missing_ok=True)
    codes = RankGroup(1, folder / "store", limited, output, script, list(map(str, arguments)), 0).join()
    printed = output.read_text(encoding="utf-8")
    assert codes == [2], printed
    assert "Traceback" not in printed
    return printed.splitlines()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_token_set(tmp_path_factory.mktemp("data") / "set", train_tokens=140_000, val_tokens=70_000).folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"), block_size=1024, n_embd=256)


@pytest.mark.parametrize("script", ["train.pretrain", "train.finetune"])
def test_a_batch_that_does_not_fit_ends_the_run_with_a_line(tmp_path: Path, data: Path, model: Path, script: str):
    arguments = [*tiny_arguments(tmp_path, data, "large"), *LARGE]
    if script == "train.finetune":
        config = tmp_path / "tiny.yaml"
        lines = config.read_text().splitlines()
        config.write_text("\n".join(line for line in lines if not line.startswith("model:")))
        arguments.insert(0, str(model))
    else:
        arguments.append("--model.block_size=1024")
    line = run_limited(tmp_path, script, *arguments)[-1]
    assert re.fullmatch(
        r"failed: rank 0 on \S+: out of memory \([\d.]+ [MG]iB more were asked for\): halve batch\.micro_batch \(128: "
        r"--batch\.micro_batch 64; the batch stays the same\), or use --recompute\.mode full \(none now\); the "
        r"estimate for this configuration is [\d.]+ [MG]iB a rank",
        line,
    ), line
    run = run_of(tmp_path, "large")
    state = run.read_state() or {}
    assert (state["status"], state["failure"]) == ("failed", "exception")
    assert f"failed: {state['reason']}" == line
    log = run.log.read_text(encoding="utf-8")
    assert line in log
    assert "Traceback (most recent call last)" in log and "DefaultCPUAllocator" in log
    facts = Facts(state, True, 0, 1, asked=False, pre_empted=False, ended_by_slurm=False, exit_status=2)
    assert decide(facts).action == "failed", "Slurm would meet it again"


def test_one_rank_s_memory_is_reported_by_that_rank(tmp_path: Path, data: Path) -> None:
    more = ["--model.block_size=1024", "--batch.tokens_per_step=131072", "--batch.micro_batch=64"]
    arguments = [*tiny_arguments(tmp_path, data, "large", "--eval.tokens=1024", "--recompute.mode=none"), *more]
    output = tmp_path / "printed.txt"
    codes = RankGroup(2, tmp_path / "store", limited, output, "train.pretrain", arguments, 1).join()
    assert codes == [1, 2], output.read_text()  # the first one lost its peer
    printed = output.read_text()
    state = run_of(tmp_path, "large").read_state() or {}
    assert state["failure"] == "exception"
    assert re.match(
        r"rank 1 on \S+: out of memory .*: halve batch\.micro_batch \(64: --batch\.micro_batch 32;", state["reason"]
    )
    assert f"failed: {state['reason']}" in printed
    assert "Traceback" not in printed


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_s_memory() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 50, device="cuda")
    assert is_out_of_memory(error.value)
    assert re.match(r"[\d.]+ GiB more were asked for, GPU 0 has [\d.]+ GiB, of which", what_was_asked(error.value))


def test_evaluations_name_their_own_options(tmp_path: Path, data: Path, model: Path) -> None:
    examples = write_official(tmp_path / "hellaswag.jsonl", official_rows(300, words_at_most=150))
    prompts = [f"--prompt={'a' * 900}"] * 2
    for script, options, advice in (
        ("eval.perplexity", [f"--data={data}", "--micro-batch=68"], "give a smaller --micro-batch (8 by default)"),
        ("eval.hellaswag", [f"--data={examples}", "--batch=300"], "give a smaller --batch (default 16"),
        ("eval.generate", [*prompts, "--samples=200", "--slide"], "give fewer --samples and prompts at once"),
    ):
        *_, line = run_limited(tmp_path, script, model, *options)
        assert line.startswith("error: out of memory (") and advice in line, line


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (MemoryError(), ""),
        (MemoryError("Unable to allocate 7.45 GiB for an array with shape (1000000000,)"), "7.45 GiB more were asked"),
        (
            RuntimeError(
                "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 3 has a total capacity of 79.11 GiB of which 1.20 "
                "GiB is free. Including non-PyTorch memory, this process has …"
            ),
            "2.00 GiB more were asked for, GPU 3 has 79.11 GiB, of which 1.20 GiB are free",
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), ""),
        (OSError(12, "Cannot allocate memory"), ""),
    ],
)
def test_other_libraries_errors_of_memory(error: Exception, asked: str) -> None:
    """As they word them: a GPU's can't be had here."""
    assert is_out_of_memory(error)
    assert what_was_asked(error).startswith(asked)
    for other in (
        RuntimeError("The size of tensor a (3) must match"),
        OSError(28, "No space left"),
        ValueError("out of memory"),
    ):
        assert not is_out_of_memory(other)
