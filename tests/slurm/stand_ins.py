"""A job without a cluster: the real scripts of a job between stand-ins for what a site has, in a clone of the project.

`module`, `conda` and an environment's `activate` behave as the real ones do where it matters: they use unset variables
and failing commands, which a shell under `set -eu -o pipefail` does not survive. Each Python greets with a banner. The
stand-ins for the trainers' launcher and for the check of the nodes write down how they were started.
"""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.helpers.training import PROJECT

MODULE = """() {
    local found
    echo "$LMOD_UNSET" | grep -q nothing
    found=$(false | cat)
    export MODULES="$MODULES $*"
}"""
CONDA_SH = (
    'conda() { PS1="($2) $PS1"; export CONDA_ENV=$2 PATH="$STAND_INS/conda:$PATH"; [ -n "$CONDA_UNSET" ]; true; }\n'
)
ACTIVATE = 'PS1="(env) $PS1"; false; export CONDA_ENV=$1 PATH="$STAND_INS/conda:$PATH"\n'
PYTHON = f"""#!/bin/bash
printf 'Loading the environment of /nowhere... head=evil port=$(touch {{touched}})\\nlonghaul:PATH=/nowhere'
case "$1" in
    */train/launch.py | slurm/preflight.py) exec {sys.executable} -c '
import json, os, sys
with open(os.environ["STAND_INS"] + "/started", "a") as file:
    print(json.dumps({{"argv": sys.argv[1:], "environment": dict(os.environ), "cwd": os.getcwd()}}), file=file)
' "$0" "$@" ;;
    slurm/requeue.py) echo; echo "finished: $2"; exit "${{DECISION:-0}}" ;;
    *) exec {sys.executable} "$@" ;;
esac
"""
CONTAINER = """#!/bin/bash
if [ "$1" = exec ]; then
    shift
    while [[ $1 == -* ]]; do shift; done
    INSIDE=$1
    shift
fi
export INSIDE=${INSIDE:-image} PATH="$STAND_INS/inside:$PATH"
unset STAND_IN_HOST
echo "WARNING: the container's own greeting"
exec "$@"
"""
SRUN = """#!/bin/bash
for word in "$@"; do
    case $word in
        --container-image=*) export INSIDE=${word#*=} PATH="$STAND_INS/inside:$PATH" ;;
        -*) ;;
        *) break ;;
    esac
    shift
done
export SLURM_STEP_NUM_NODES=$SLURM_JOB_NUM_NODES SLURM_NODEID=0 SLURM_PROCID=0
exec "$@"
"""
SCONTROL = """#!/bin/bash
if [ -n "$INSIDE" ]; then echo "no Slurm in a container" >&2; exit 1; fi
case "$*" in
    "show hostnames n[1-2]") printf 'n1\\nn2\\n' ;;
    "-o show node "*) echo "NodeName=$4 Arch=x86_64 NodeAddr=127.0.0.1 NodeHostName=$4 Comment=x NodeAddr=evil" ;;
    "-o show job "*) echo "JobId=$4 JobState=RUNNING EndTime=$(($(date +%s) + 3600)) Comment=x EndTime=1" ;;
    "requeue "*) echo "$*" >> "$STAND_INS/requeued"; [ -n "$LEFT_OUT" ] || kill -9 $PPID; kill $PPID ;;
    "update JobId=77 ExcNodeList="*)
        echo "$*" >> "$STAND_INS/requeued"
        if [ "$LEFT_OUT" = refused ]; then echo "slurm_update error: Job is not pending" >&2; exit 1; fi
        ;;
    *) exit 1 ;;
esac
"""


@dataclass
class Site:
    """A clone of the project in which jobs run as on a site's first of two nodes."""

    folder: Path

    @property
    def clone(self) -> Path:
        return self.folder / "clone"

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """A job's script, with what a site and Slurm give it."""
        mine = {
            "PATH": f"{self.folder / 'bin'}:/usr/bin:/bin",
            "HOME": str(self.folder / "home"),
            "USER": "me",
            "STAND_INS": str(self.folder),
            "BASH_FUNC_module%%": MODULE,
            "BASH_FUNC_ml%%": MODULE,
            "SLURM_SUBMIT_DIR": str(self.clone),
            "SLURM_JOB_ID": "77",
            "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_CPUS_ON_NODE": "8",
            "SLURM_GPUS_ON_NODE": "8",
            "GLOO_SOCKET_IFNAME": "lo",
        }
        return subprocess.run(
            ["bash", *command], cwd=self.clone, env=mine | environment, capture_output=True, text=True, timeout=120
        )

    def started(self) -> list[dict[str, Any]]:
        """How the check of the nodes and the trainers were started."""
        path = self.folder / "started"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def write_site(self, *lines: str) -> None:
        (self.clone / "slurm" / "site.sh").write_text("\n".join(lines) + "\n")


def make_site(folder: Path) -> Site:
    """A site's folders and commands below `folder`."""
    site = Site(folder)
    site.clone.mkdir(parents=True)
    for path in PROJECT.iterdir():
        if path.name in ("common", "data_prep", "model", "train"):
            (site.clone / path.name).symlink_to(path)
    shutil.copytree(PROJECT / "slurm", site.clone / "slurm", ignore=shutil.ignore_patterns("site.sh", "__pycache__"))
    python = PYTHON.replace("{touched}", str(folder / "touched"))
    programs = {"bin/singularity": CONTAINER, "bin/apptainer": CONTAINER, "bin/shifter": CONTAINER, "bin/srun": SRUN}
    programs |= {"bin/scontrol": SCONTROL, "bin/sinfo": "#!/bin/bash\nexit 1\n"}
    programs |= {"bin/activate": ACTIVATE, "home/miniforge3/etc/profile.d/conda.sh": CONDA_SH}
    places = ("clone/.venv/bin/python", "conda/python", "inside/python", "inside/python3")
    for name, text in (programs | dict.fromkeys(places, python)).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    return site
