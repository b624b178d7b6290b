"""Which machines stand out before the first step; neither noise nor a check that fails is taken for sickness."""

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.run_folder import RunFolder
from model.ranks import start_ranks
from tests.helpers.ranks import run_ranks
from train.run import sniff_test as sniffing
from train.run.failure import is_lost_gpu
from train.run.machines import describe_rank
from train.run.outliers import outliers
from train.run.sniff_test import CHECKS, describe, sniff_test


def lie_and_sniff(folder: RunFolder, liar: int, share: float) -> tuple[dict[str, Any], list[str]]:
    """The record of a rank, of which `liar` finds its processor so much slower, and can't measure its memory."""
    os.environ["SLURM_JOB_ID"] = "7"  # here: ranks are forked from a server that may be older than a test
    ranks = start_ranks("cpu")
    if ranks.rank == liar:
        honest = sniffing.matrix_tflops
        sniffing.matrix_tflops = lambda device, seconds: share * honest(device, seconds)
        sniffing.memory_gb_per_second = lambda device, seconds: int("not a number")
    folder.rank_file(0).parent.mkdir(parents=True, exist_ok=True)
    machines = ranks.gather(describe_rank(ranks, 1))
    record = sniff_test(folder, ranks, machines, [f"n{rank}" for rank in range(ranks.world_size)])
    ranks.close()
    return record, describe(record)


def test_a_rank_that_stands_out_is_named_and_what_fails_is_unknown(tmp_path: Path):
    folder = RunFolder(tmp_path / "run")
    (record, lines), (other, _) = run_ranks(2, tmp_path / "store", lie_and_sniff, folder, 1, 1e-3)
    assert record == other | {"seconds": record["seconds"]}, "all ranks judge alike"
    assert (record["kind"], record["job_id"], record["restart_count"]) == ("sniff_test", "7", 0)
    (found,) = record["sick"]
    assert (found["rank"], found["node"], found["check"]) == (1, "n1", "matrix_tflops")
    assert found["rate"] < found["median"] / 100
    assert record["unknown"] == [[1, "memory_gb_per_second"]]
    assert record["free_gib"] == [None, None], "of a CPU's memory nothing is asked"
    assert record["all_reduce_gb_per_second"][0] > 0 < record["disk_mb_per_second"][0]
    assert lines[1].startswith("WARNING: rank 1 on n1 stands out: matrix product ")
    assert lines[2:] == ["not known of rank 1 on n1: copying memory"]
    assert os.listdir(folder.rank_file(0).parent) == []


def test_a_single_rank_and_a_disk_that_refuses_are_no_finding(tmp_path: Path):
    record = sniff_test(RunFolder(tmp_path / "nowhere"), start_ranks("cpu"), [{"cpu": "x"}], ["n0"])
    assert (record["sick"], record["unknown"]) == ([], [[0, "disk_mb_per_second"]])


@pytest.mark.parametrize(
    ("rates", "found"),
    [
        ([10, 10, 10, 10, 10, 10, 10, 7.4], [7]),
        ([10, 10, 10, 10, 10, 10, 10, 7.6], []),
        ([10, 9, 6, 12, 4, 8, 10, 6], []),  # all differ
        ([10] * 8 + [1] * 8, [*range(8, 16)]),  # a node of two
        ([10, 5], []),
        ([10, 3], [1]),
        ([3, 10, 10], [0]),
        ([math.nan, 10], []),
        ([math.nan, math.nan, 10, 10, 10, 10, 1], [6]),
        ([10], []),
        ([0.0, 0.0], []),
    ],
)
def test_outliers(rates: list[float], found: list[int]):
    assert outliers(np.array(rates), ["GPU"] * len(rates), 0.75) == found


@given(
    rates=st.lists(st.floats(0.5, 1.0), min_size=1, max_size=64),
    unknown=st.sets(st.integers(0, 63)),
    scale=st.floats(1e-3, 1e12),
)
def test_a_noisy_machine_gives_no_alarm(rates: list[float], unknown: set[int], scale: float):
    """As long as none is slower than half of another, a CPU's checks (all have a smaller share) name nobody."""
    seen = np.array([math.nan if place in unknown else rate * scale for place, rate in enumerate(rates)])
    for check in CHECKS.values():
        assert outliers(seen, ["CPU"] * len(seen), check.least_cpu) == []


@given(ranks=st.integers(2, 64), data=st.data())
def test_the_slowest_by_far_is_named_wherever_it_is(ranks: int, data: st.DataObject):
    kinds = data.draw(st.lists(st.sampled_from(["A100", "H100"]), min_size=ranks, max_size=ranks))
    usual = {"A100": 300.0, "H100": 600.0}  # which are no outliers of each other
    rates = np.array([usual[kind] * data.draw(st.floats(0.95, 1.05)) for kind in kinds])
    sick = data.draw(st.integers(0, ranks - 1))
    rates[sick] /= 10
    assert outliers(rates, kinds, 0.75) == ([sick] if kinds.count(kinds[sick]) > 1 else [])


@pytest.mark.parametrize(
    ("words", "lost"),
    [
        ("CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might be …", True),
        ("CUDA error: unknown error", True),
        ("Unable to determine the device handle: GPU is lost.  Reboot the system to recover this GPU", True),
        ("CUDA error: device-side assert triggered", False),
        ("CUDA error: an illegal memory access was encountered", False),
        ("CUDA out of memory. Tried to allocate 2 GiB", False),
    ],
)
def test_a_gpu_that_failed_is_known_by_the_driver_s_words(words: str, lost: bool):
    assert is_lost_gpu(RuntimeError(words)) is lost
    assert not is_lost_gpu(ValueError(words))
