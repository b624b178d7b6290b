"""Ranks add up, agree and gather; devices and threads are shared out, or it is said why not."""

import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import UserError
from common.host_limits import allowed_cores
from model.devices import COMPILE_THREADS, choose_device, share_threads
from model.ranks import Ranks, agreed, start_ranks
from tests.helpers.ranks import run_ranks
from train.progress import Progress
from train.startup.announce import describe_unused_gpus
from train.startup.auto import resolve_compile, set_determinism


def talk() -> tuple[object, ...]:
    ranks = start_ranks("cpu")
    rank = ranks.rank
    answers = (
        ranks.sum([1.0, rank * 0.1]),
        ranks.agree([0, int(rank == 1), 7 - rank]),
        ranks.gather({"rank": rank}),
        ranks.from_first(f"said by {rank}"),
        ranks.gather(("of another length" * rank, {rank: Path("x")}, math.nan)),
        ranks.from_first(Progress(step=rank, tokens=7), Progress),
        ranks.gather_array(np.full((2, 3), rank / 3)),
        ranks.gather_array(np.zeros((0, 2))),
    )
    ranks.close()
    return answers


def test_three_ranks_add_up_agree_and_gather(tmp_path: Path) -> None:
    for sums, flags, gathered, said, mixed, due, arrays, empty in run_ranks(3, tmp_path / "store", talk):
        assert sums == pytest.approx([3.0, 0.3])
        assert flags == [0, 1, 7]
        assert gathered == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
        assert said == "said by 0"
        assert repr(mixed) == repr([("of another length" * rank, {rank: Path("x")}, math.nan) for rank in range(3)])
        assert due == Progress(step=0, tokens=7)
        assert [array.tolist() for array in arrays] == [[[rank / 3] * 3] * 2 for rank in range(3)]
        assert [array.shape for array in empty] == [(0, 2)] * 3


class Refused(UserError):
    """A mistake that somebody tells from others."""


def decide_wrongly() -> str:
    ranks = start_ranks("cpu")

    def decide() -> None:
        raise Refused(f"by {ranks.rank}: no\nway")

    with pytest.raises(Refused) as mistake:
        agreed(ranks, decide, Refused)
    with pytest.raises(UserError) as plain:
        agreed(ranks, decide)
    ranks.close()
    return f"{mistake.value}; {plain.value}"


def test_a_mistake_that_the_first_rank_meets_is_everyone_s(tmp_path: Path) -> None:
    assert run_ranks(2, tmp_path / "store", decide_wrongly) == ["by 0: no way; by 0: no way"] * 2


def test_one_process_needs_no_group() -> None:
    ranks = Ranks(0, 1, 0, 1, torch.device("cpu"))
    assert ranks.sum([2.5]) == [2.5]
    assert ranks.agree([3]) == [3]
    assert ranks.gather("x") == ["x"]
    assert ranks.from_first("y") == "y"
    ranks.barrier()


def be_a_rank(monkeypatch: pytest.MonkeyPatch, **environment: str) -> None:
    """Have the variables of a launcher that is not there."""
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")  # so that what is exported goes again, too
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "as under a launcher, but MASTER_ADDR and MASTER_PORT are not set: for one"),
        (
            {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a"},
            "but MASTER_PORT is not set: for one process: unset RANK",
        ),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "b"},
            "MASTER_PORT is 'b' .*, not a whole number",
        ),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "99999"},
            "MASTER_PORT is '99999' in the environment, not a whole number from 0 to 65535",
        ),
    ],
)
def test_variables_left_over_by_a_launcher_are_one_line(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], message: str
) -> None:
    be_a_rank(monkeypatch, **environment)
    with pytest.raises(UserError, match=message):
        start_ranks("cpu")


def test_a_rank_without_a_launcher_says_at_once_whom_it_waits_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("model.ranks.QUIET_SECONDS", 0.1)  # the shortest wait that torch knows ends before two seconds
    be_a_rank(monkeypatch, RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    with pytest.raises(UserError, match=r"rank 0 of 2 on .* did not meet the others at 127.0.0.1:0 \(Timed out"):
        start_ranks("cpu", timeout_seconds=1)
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(r"rank 0 of 2 on .* waits for the others at 127\.0\.0\.1:0, up to 1 s", line)
    assert "unset RANK WORLD_SIZE" in line


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # what torch would answer on a machine with 2 GPUs, of which there is none here
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert choose_device("auto", 1, 2) == torch.device("cuda", 1)
    with pytest.raises(
        UserError, match=r"4 ranks on .* sees 2 GPUs \(CUDA_VISIBLE_DEVICES=0,1\).*--nproc_per_node=2 .* auto.*RANKS=2"
    ):
        choose_device("auto", 0, 4)
    assert choose_device("cpu", 0, 4) == torch.device("cpu")


def test_a_rank_that_sees_one_gpu_of_its_own_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As srun --gpus-per-task shows them; under torchrun, or on a node of one GPU, two ranks would share it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "4")
    assert [choose_device("auto", rank, 4) for rank in range(4)] == [torch.device("cuda", 0)] * 4
    monkeypatch.delenv("SLURM_GPUS_ON_NODE")
    assert choose_device("cuda", 3, 4) == torch.device("cuda", 0)
    refused = r"4 ranks on .* sees 1 GPU: use --nproc_per_node=1 .*make demo: RANKS=1"
    for name, value in (("SLURM_GPUS_ON_NODE", "1"), ("TORCHELASTIC_RUN_ID", "x")):
        with monkeypatch.context() as launcher:
            launcher.setenv(name, value)
            with pytest.raises(UserError, match=refused):
                choose_device("auto", 0, 4)


def test_one_process_on_a_machine_of_several_gpus_names_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    (line,) = describe_unused_gpus(Ranks(0, 1, 0, 1, torch.device("cuda", 0)))
    assert "1 of the 8 GPUs" in line and "train/launch.py --standalone --nproc_per_node=auto" in line
    assert describe_unused_gpus(Ranks(0, 8, 0, 8, torch.device("cuda", 0))) == []
    assert describe_unused_gpus(Ranks(0, 1, 0, 1, torch.device("cpu"))) == []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert describe_unused_gpus(Ranks(0, 1, 0, 1, torch.device("cuda", 0))) == []


@pytest.mark.parametrize(
    ("environment", "ranks", "expected"),
    [
        ({}, 1, allowed_cores()),
        ({}, allowed_cores() * 2, 1),
        ({"OMP_NUM_THREADS": "3"}, 1, 3),
        ({"OMP_NUM_THREADS": "2,1"}, 1, 2),
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x"}, 1, allowed_cores()),  # torchrun's default, not a wish
    ],
)
def test_ranks_share_the_cores(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], ranks: int, expected: int
) -> None:
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv(COMPILE_THREADS, "1")  # so that what is set here goes again
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    try:
        assert share_threads(ranks) == torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)


def compile_workers(wish: str | None) -> tuple[str, int | None]:
    """What a rank of two leaves in the environment for torch's compiler, and what the compiler makes of it."""
    os.environ.pop(COMPILE_THREADS, None)
    if wish is not None:
        os.environ[COMPILE_THREADS] = wish
    from torch._inductor import config

    before = config.compile_threads
    share_threads(2)
    return os.environ[COMPILE_THREADS], config.compile_threads if wish is None else before


def test_ranks_share_the_compile_workers(tmp_path: Path) -> None:
    """Eight ranks would start 256 of them on a machine of 32 cores."""
    share = max(1, min(32, allowed_cores() // 2))
    assert run_ranks(2, tmp_path / "store", compile_workers, None) == [(str(share), share)] * 2
    ((chosen, _), _) = run_ranks(2, tmp_path / "store", compile_workers, "7")
    assert chosen == "7"


def inductor_is_deterministic(wanted: bool) -> tuple[bool, bool]:
    set_determinism(wanted, torch.device("cuda"))
    from torch._inductor import config

    return config.deterministic, torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("wanted", [False, True])
def test_what_is_compiled_is_deterministic_too(tmp_path: Path, wanted: bool) -> None:
    assert run_ranks(1, tmp_path / "store", inductor_is_deterministic, wanted) == [(wanted, wanted)]


@pytest.mark.parametrize("wish", ["0", "many", "-2", "5000", "9" * 30])
def test_threads_that_are_no_number_are_refused(monkeypatch: pytest.MonkeyPatch, wish: str) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", wish)
    with pytest.raises(UserError, match=f"OMP_NUM_THREADS is '{wish}' .*, not a whole number from 1 to 4096"):
        share_threads(1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a trial on CUDA fails only where there is none")
def test_a_failed_trial_falls_back_under_auto_and_is_refused_under_true() -> None:
    ranks = Ranks(0, 1, 0, 1, torch.device("cuda"))
    chosen, why = resolve_compile("auto", ranks)
    assert not chosen
    assert why.startswith("a trial failed (")
    with pytest.raises(UserError, match=r"run\.compile is true, but a trial failed"):
        resolve_compile(True, ranks)
