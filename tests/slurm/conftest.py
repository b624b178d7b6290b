"""One cluster for all tests of a session, and one undisturbed run to compare with."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.helpers.token_sets import make_token_set
from tests.slurm.cluster import Cluster, MissingSlurm, check_requirements
from tests.slurm.jobs import Bench, Job


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    yield from cluster_with_data(tmp_path_factory)


@pytest.fixture
def isolated_bench(bench: Bench) -> Bench:
    """For what can only befall a node that has its own network and processes."""
    if not bench.cluster.isolated:
        pytest.skip("no network namespaces here: the nodes share this machine, none can fail alone")
    return bench


@pytest.fixture
def plain_bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """All nodes on this machine, and signals that reach every process of a task."""
    yield from cluster_with_data(tmp_path_factory, isolated=False, tracking="linuxproc")


def cluster_with_data(tmp_path_factory: pytest.TempPathFactory, **kind: Any) -> Iterator[Bench]:
    try:
        check_requirements()
    except MissingSlurm as error:
        pytest.skip(f"no Slurm cluster can be made here: {error}")
    folder = tmp_path_factory.mktemp("bench")
    make_token_set(folder / "data")
    cluster = Cluster(tmp_path_factory.mktemp("cluster"), **kind)
    try:
        cluster.up()
        yield Bench(cluster, folder, folder / "data")
    finally:
        cluster.down()


@pytest.fixture(scope="session")
def undisturbed(bench: Bench) -> Job:
    """A run on two nodes that nothing happens to."""
    job = bench.submit("undisturbed")
    job.wait_for_state("COMPLETED", "FAILED", seconds=150)
    return job
