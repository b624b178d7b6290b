"""The peak memory of real training processes."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.helpers.training import PROJECT
from train.estimates.run_memory import MMAP_THRESHOLD

RETURNED = {MMAP_THRESHOLD: "65536"}  # glibc keeps no freed tensor: what is measured is what is in use

# Linux begins a process's ru_maxrss with what its parent holds: hundreds of MiB in a test process, little in this one
WAIT = """
import os, subprocess, sys
process = subprocess.Popen([sys.executable, *sys.argv[1:]], stdout=sys.stderr)
_, status, usage = os.wait4(process.pid, 0)
print(usage.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def peak_bytes(
    ranks: int, options: Sequence[str], log: Path, environment: dict[str, str] = RETURNED, entry: str = "pretrain.py"
) -> int:
    """The largest resident set (VmHWM) among the processes of an entry of train/, compilers and launcher among them.

    Args:
        options: of the entry, before them the base of a fine-tuning.
        log: where their output goes.
        environment: beside this process's, in which glibc is as it is by default.
    """
    command = [str(PROJECT / "train" / entry)]
    if ranks > 1:
        command = [str(PROJECT / "train" / "launch.py"), "--standalone", f"--nproc_per_node={ranks}", *command]
    mine = {key: value for key, value in os.environ.items() if key != MMAP_THRESHOLD} | {"OMP_NUM_THREADS": "1"}
    with open(log, "w", encoding="utf-8") as file:
        done = subprocess.run(
            [sys.executable, "-c", WAIT, *command, *options],
            stdout=subprocess.PIPE, stderr=file, env=mine | environment, encoding="utf-8",
        )  # fmt: skip
    assert done.returncode == 0, log.read_text(encoding="utf-8", errors="replace")[-2000:]
    return 1024 * int(done.stdout)
