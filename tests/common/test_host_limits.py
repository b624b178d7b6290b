"""What memory and cores a process may use, within the limits that containers, Slurm jobs and shells put on it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.host_limits import allowed_cores, cgroup_memory_bytes

PROJECT = Path(__file__).resolve().parents[2]
MIB = 1 << 20
GIB = 1 << 30


def make_group(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")


def mounted(point: Path, kind: str = "cgroup2", root: str = "/", options: str = "rw") -> str:
    """A line of /proc/self/mountinfo."""
    return f"41 31 0:38 {root} {str(point).replace(' ', chr(92) + '040')} rw shared:9 - {kind} {kind} {options}\n"


def test_the_limits_of_a_job_and_of_what_is_around_it(tmp_path: Path) -> None:
    """As Slurm lays them out by the second version: the job's limit is some folders below the root, which has none."""
    job = tmp_path / "system.slice" / "slurmstepd.scope" / "job_7"
    stat = f"anon 5\nactive_file {200 * MIB}\ninactive_file {300 * MIB}"
    make_group(job, memory__max=f"{4_000 * MIB}", memory__current=f"{1_500 * MIB}", memory__stat=stat)
    make_group(job / "step_0", memory__max="max", memory__current=f"{1_500 * MIB}", memory__stat=stat)
    own = "0::/system.slice/slurmstepd.scope/job_7/step_0\n"
    assert cgroup_memory_bytes(own, mounted(tmp_path)) == [3_000 * MIB]
    assert cgroup_memory_bytes("0::/\n", mounted(tmp_path)) == []
    assert cgroup_memory_bytes(own, "") == []


def test_a_group_that_is_slowed_down_before_its_limit_has_less(tmp_path: Path) -> None:
    files = {"memory__current": f"{100 * MIB}", "memory__stat": "anon 1", "memory__max": f"{2_048 * MIB}"}
    make_group(tmp_path / "user", **files, memory__high=f"{800 * MIB}")
    make_group(tmp_path / "user" / "shell", **{**files, "memory__max": "max"}, memory__high=f"{900 * MIB}")
    make_group(tmp_path / "user" / "shell" / "deep", **files, memory__high="max")
    own = "0::/user/shell/deep\n"
    assert cgroup_memory_bytes(own, mounted(tmp_path)) == [1_948 * MIB, 800 * MIB, 700 * MIB]


def test_a_container_that_shows_its_own_group_as_the_root(tmp_path: Path) -> None:
    """The first version: the names in /proc/self/cgroup are the host's, the folder begins at the container's group."""
    point = tmp_path / "a folder"
    stat = f"total_active_file 0\ntotal_inactive_file {2_000 * MIB}"
    files = {"memory__limit_in_bytes": f"{2_048 * MIB}", "memory__usage_in_bytes": f"{2_040 * MIB}"}
    make_group(point, **files, memory__stat=stat)
    make_group(point / "sub", memory__limit_in_bytes=f"{900 * MIB}", memory__usage_in_bytes="0", memory__stat=stat)
    mounts = mounted(tmp_path / "cpu", "cgroup", "/", "rw,cpu") + mounted(point, "cgroup", "/docker/0123", "rw,memory")
    whole = 2_008 * MIB  # all but 40 MiB is files that were read
    assert cgroup_memory_bytes("4:memory:/docker/0123\n1:name=systemd:/docker/0123\n", mounts) == [whole]
    assert cgroup_memory_bytes("4:cpu,memory:/docker/0123/sub\n", mounts) == [900 * MIB, whole]
    assert cgroup_memory_bytes("4:memory:/../elsewhere\n", mounts) == [whole]
    assert cgroup_memory_bytes("", mounts) == [whole]


def test_a_limit_that_is_none_leaves_more_than_any_machine_has(tmp_path: Path) -> None:
    files = {"memory__limit_in_bytes": "9223372036854771712", "memory__usage_in_bytes": "4096", "memory__stat": ""}
    make_group(tmp_path, **files)
    (left,) = cgroup_memory_bytes("4:memory:/\n", mounted(tmp_path, "cgroup", "/", "rw,memory"))
    assert left > 1 << 60


def make_real_group() -> tuple[Path, str]:
    """A memory group of this kernel's, and the name of the file that holds its limit."""
    for root, limit in (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")):
        group = Path(root) / f"longhaul-test-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        if (group / limit).exists():
            return group, limit
        group.rmdir()
    pytest.skip("no memory group can be made here: that takes root, and a writable /sys/fs/cgroup")


def test_a_real_group_s_limit_holds_for_workers_and_is_shared_by_the_ranks_of_a_node() -> None:
    group, limit = make_real_group()
    code = (
        "import torch\n"
        "from common.host_limits import available_memory_bytes\n"
        "from data_prep.corpora.workers import choose_workers\n"
        "from model.devices import free_memory_bytes\n"
        "print(available_memory_bytes(), choose_workers(None), free_memory_bytes(torch.device('cpu'), 4))"
    )
    script = f'echo {GIB} > {group}/{limit} && echo $$ > {group}/cgroup.procs && exec "$0" -c "$1"'
    try:
        command = ["sh", "-c", script, sys.executable, code]
        done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    finally:
        group.rmdir()
    assert done.returncode == 0, done.stderr
    left, workers, share = map(int, done.stdout.split())
    assert GIB // 3 < left < GIB
    assert workers <= 2
    assert GIB // 12 < share <= GIB // 4


def test_cores_are_those_of_the_mask_whatever_is_said_of_threads() -> None:
    one = f"import os; os.sched_setaffinity(0, [{min(os.sched_getaffinity(0))}]); "
    code = "from common.host_limits import allowed_cores; print(allowed_cores())"
    environment = os.environ | {"OMP_NUM_THREADS": "7", "OMP_THREAD_LIMIT": "7"}
    for before, cores in (("", allowed_cores()), (one, 1)):
        command = [sys.executable, "-c", before + code]
        done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, check=True)
        assert int(done.stdout) == cores
