"""Nodes that a requeued job does without, on a cluster of four."""

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from slurm.host_list import expand
from tests.slurm.conftest import cluster_with_data
from tests.slurm.jobs import Bench

pytestmark = pytest.mark.slurm

LIAR = """
import runpy, sys
sys.path.insert(0, {project!r})
import train.run.sniff_test as sniffing
honest = sniffing.matrix_tflops
sniffing.matrix_tflops = lambda *asked: honest(*asked) / 1000
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
PYTHON = """#!/bin/bash
if [[ $(hostname) == {host} && $1 == */train/pretrain.py ]]; then set -- {liar} "$@"; fi
exec {python} "$@"
"""


@pytest.fixture(scope="module")
def large_bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    for bench in cluster_with_data(tmp_path_factory, nodes=4):
        if not bench.cluster.isolated:
            pytest.skip("no network namespaces here: the nodes have one host name")
        yield bench


def lying_python(bench: Bench, node: str) -> str:
    """A Python that trains, but whose sniff test finds the node's processor a thousand times slower than it is."""
    liar, python = bench.folder / "liar.py", bench.folder / "python"
    liar.write_text(LIAR.format(project=str(Path.cwd())))
    host = f"host-{bench.cluster.number(node)}"
    python.write_text(PYTHON.format(host=host, liar=liar, python=sys.executable))
    python.chmod(0o755)
    return str(python)


def test_a_node_that_looks_sick_twice_and_a_frozen_rank_s_are_left_out(large_bench: Bench):
    """One job: a start that may be chance, a second that is not, then one that hangs on another node."""
    first, sick, *others = large_bench.cluster.nodes
    patience = ["--run.hang_seconds=5", "--run.hang_limit_seconds=13"]
    python = lying_python(large_bench, sick)
    one_task = ("--ntasks-per-node=1",)
    job = large_bench.submit("sick", *patience, sbatch=one_task, LONGHAUL_LAUNCH="srun", LONGHAUL_PYTHON=python)
    for start in range(2):
        job.wait_for_step(job.step() + 1, start=start)
        large_bench.cluster.ask("scancel", "--signal=USR1", job.id)
        job.wait_for_restart(start + 1)
    job.wait_for_step(job.step() + 1, start=2)
    job.signal_rank(1, signal.SIGSTOP)
    job.wait_for_restart(3)
    job.wait_for_step(job.step() + 1, start=3)
    job.run.stop_file.touch()
    job.wait_for_state("COMPLETED")

    starts = [line["nodes"] for line in job.lines if line["kind"] == "start"]
    assert starts[:2] == [[first, sick]] * 2, job.output
    assert sick not in starts[2], job.output
    hung = starts[2][1]
    assert set(starts[3]) == {first, *others} - {hung}, job.output
    left_out = [line.get("left_out", []) for line in job.lines if line["kind"] == "end"]
    assert left_out == [[], [sick], [hung, sick], []]
    findings = [(line["node"], line["what"], line["restart_count"]) for line in job.lines if line["kind"] == "finding"]
    assert findings == [(sick, "sniff_test", 0), (sick, "sniff_test", 1), (hung, "hung", 2)]
    assert set(expand(job.facts["ExcNodeList"])) == {sick, hung}
    assert f"rank 1 on {sick} stands out: matrix product" in job.output
    assert f"the next start does without nodes: {hung},{sick}" in job.output
