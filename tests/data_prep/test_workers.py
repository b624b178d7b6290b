"""How much memory there is for workers, within the limits that containers and Slurm jobs put on them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.workers import cgroup_memory_bytes

PROJECT = Path(__file__).resolve().parents[2]
MIB = 1 << 20


def make_group(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")


def test_the_limits_of_a_job_and_of_what_is_around_it(tmp_path):
    """As Slurm lays them out by the second version: the job's limit is some folders below the root, which has none."""
    job = tmp_path / "system.slice" / "slurmstepd.scope" / "job_7"
    stat = f"anon 5\nactive_file {200 * MIB}\ninactive_file {300 * MIB}"
    make_group(job, memory__max=f"{4_000 * MIB}", memory__current=f"{1_500 * MIB}", memory__stat=stat)
    make_group(job / "step_0", memory__max="max", memory__current=f"{1_500 * MIB}", memory__stat=stat)
    assert cgroup_memory_bytes("0::/system.slice/slurmstepd.scope/job_7/step_0\n", tmp_path) == [3_000 * MIB]
    assert cgroup_memory_bytes("0::/\n", tmp_path) == []


def test_a_container_that_shows_its_own_group_as_the_root(tmp_path):
    stat = f"total_active_file 0\ntotal_inactive_file {2_000 * MIB}"
    files = {"memory__limit_in_bytes": f"{2_048 * MIB}", "memory__usage_in_bytes": f"{2_040 * MIB}"}
    make_group(tmp_path / "memory", **files, memory__stat=stat)
    for own in ("", "4:memory:/docker/0123\n1:name=systemd:/docker/0123\n"):
        assert cgroup_memory_bytes(own, tmp_path) == [2_008 * MIB]  # all but 40 MiB is files that were read


def test_a_real_group_s_limit(tmp_path):
    group = Path("/sys/fs/cgroup/memory") / f"longhaul-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no memory group of the first version can be made here: {error}")
    code = "from data_prep.workers import available_memory_bytes; print(available_memory_bytes())"
    script = (
        f'echo {700 * MIB} > {group}/memory.limit_in_bytes && echo $$ > {group}/cgroup.procs && exec "$0" -c "{code}"'
    )
    try:
        done = subprocess.run(["sh", "-c", script, sys.executable], cwd=PROJECT, capture_output=True, text=True)
    finally:
        group.rmdir()
    assert done.returncode == 0, done.stderr
    assert 500 * MIB < int(done.stdout) <= 700 * MIB
