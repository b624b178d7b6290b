"""Nodes that a requeued job does without, on a cluster of four."""

import signal
from collections.abc import Iterator

import pytest

from tests.slurm.conftest import cluster_with_data
from tests.slurm.jobs import Bench

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def large_bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    yield from cluster_with_data(tmp_path_factory, nodes=4)


def test_a_frozen_rank_leads_to_a_requeue_without_its_node(large_bench: Bench):
    patience = ["--run.hang_seconds=5", "--run.hang_limit_seconds=15"]
    job = large_bench.submit("frozen", *patience, LONGHAUL_LAUNCH="srun", sbatch=("--ntasks-per-node=1",))
    job.wait_for_step(2)
    job.signal_rank(1, signal.SIGSTOP)
    job.wait_for_restart(1)
    job.wait_for_step(3, start=1)
    _, node = next(line["nodes"] for line in job.lines if line["kind"] == "start")
    assert [line["left_out"] for line in job.lines if line["kind"] == "end"] == [[node]]
    assert job.facts["ExcNodeList"] == node
    job.run.stop_file.touch()
    job.wait_for_state("COMPLETED")
    print(job.output)
