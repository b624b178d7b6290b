"""A real Slurm cluster on this machine: one munged, one slurmctld and a slurmd per node, taken down without a trace.

With `isolated`, every node has its own network, host name, processes, /dev/shm and /etc/hosts, as separate machines
have. The host names differ from Slurm's node names and stand for 127.0.1.1 on the machine itself, as Debian does it.
Without (no network namespaces here), all daemons share the machine and differ by port alone.
"""

import contextlib
import itertools
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests.slurm.cluster_files import write_cluster_files

SUBNET = "10.77.0"  # exists only inside the namespaces made here
FREEZER = Path("/sys/fs/cgroup/freezer")
_NUMBERS = itertools.count(1)  # of this process's clusters


class MissingSlurm(Exception):
    """Why no cluster can run here."""


def network_namespaces_work() -> bool:
    name = f"lhprobe{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode == 0
    if made:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return made


def remove_leftovers() -> None:
    """Delete networks and process groups of test processes that are gone; what ran in them went with those."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    for name in re.findall(r"^lh\d+\w*", listed, re.MULTILINE):
        if _is_left_over(name):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
    for group in FREEZER.glob("slurm_lh*"):
        if _is_left_over(group.name.removeprefix("slurm_")):
            remove_process_group(group)


def _is_left_over(name: str) -> bool:
    pid = re.match(r"lh(\d+)", name)
    return pid is not None and not Path("/proc", pid[1]).exists()


def remove_process_group(group: Path) -> None:
    """Take a freezer group and what is below it away, as far as it is empty."""
    with contextlib.suppress(OSError):
        for folder in sorted(group.glob("**/"), reverse=True):
            folder.rmdir()


def check_requirements() -> None:
    """Raises MissingSlurm in one line."""
    missing = [name for name in ("slurmctld", "slurmd", "sbatch", "munged", "ip") if shutil.which(name) is None]
    if missing:
        raise MissingSlurm(f"{', '.join(missing)} not found: apt-get install slurm-wlm munge iproute2")
    if os.geteuid() != 0:
        raise MissingSlurm("a cluster of this machine's own needs root")


class Cluster:
    """`up`, `down`, and what can befall a cluster in between."""

    def __init__(self, folder: Path, nodes: int = 2, *, isolated: bool = True, tracking: str = "cgroup") -> None:
        """A cluster of `nodes` nodes that keeps its files in `folder`.

        Args:
            isolated: as above; where the machine allows no network namespaces, nodes share it all the same.
            tracking: how Slurm knows a task's processes: `cgroup`, as on production clusters, where a signal reaches
                the task alone; or `linuxproc`, where it reaches everything the task has started.
        """
        check_requirements()
        self.folder = folder
        self.isolated = isolated and network_namespaces_work()
        remove_leftovers()
        number = next(_NUMBERS)
        self.tag = f"lh{os.getpid()}c{number}"
        self.nodes = [f"{self.tag}n{i}" for i in range(1, nodes + 1)]
        self.port = 6000 + (os.getpid() + 97 * number) % 400 * 10  # below those where ranks meet
        self.tracking = tracking if FREEZER.is_dir() else "linuxproc"
        self._login: subprocess.Popen[bytes] | None = None
        self._daemons: list[subprocess.Popen[bytes]] = []  # in the order of their starts
        self._machines: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = os.environ | {"SLURM_CONF": str(folder / "etc" / "slurm.conf")}

    def address(self, node: str) -> str:
        return f"{SUBNET}.{10 + self.number(node)}" if self.isolated else "127.0.0.1"

    def number(self, node: str) -> int:
        return self.nodes.index(node) + 1

    # --- life

    def up(self) -> None:
        write_cluster_files(self)
        self._start_munged()
        if self.isolated:
            self._lay_cables()
            self._start_login_node()
        self.start_controller("-i")
        for node in self.nodes:
            self.start_node(node)
        self.wait_for(self._all_idle, "all nodes idle", seconds=60)

    def down(self) -> None:
        """Stop everything that `up` and the tests started. Safe to call at any time, and twice."""
        for command in (["scancel", "--full", "--signal=KILL"], ["scancel"]):
            self._quietly([*command, "--user=root"])
        until = time.monotonic() + 10
        while self._quietly(["squeue", "-h"]) and time.monotonic() < until:
            time.sleep(0.1)
        self._quietly(["scontrol", "shutdown"])
        for node in list(self._machines):
            self.power_failure(node)
        if not self.isolated:
            for node in self.nodes:
                _kill_by_file(self.folder / "run" / f"slurmd-{node}.pid")
        while self._daemons:
            _kill(self._daemons.pop())
        if self.isolated:
            for name in [*self.nodes, self.tag]:
                subprocess.run(["ip", "netns", "del", name], capture_output=True)
        for node in self.nodes:
            remove_process_group(FREEZER / f"slurm_{node}")

    # --- commands

    def inside(self, command: list[str]) -> list[str]:
        """The command line that runs `command` on the login node."""
        if self._login is None:
            return command
        here = f"--wdns={os.getcwd()}"
        return ["nsenter", f"--target={self._login.pid}", "--net", "--uts", "--mount", here, "--", *command]

    def run(self, *command: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a command on the login node to its end."""
        line = [*command]
        if cwd is not None:
            line = ["env", f"--chdir={cwd}", *line]
        return subprocess.run(
            self.inside(line), env=self.environment | environment, capture_output=True, text=True, timeout=120
        )

    def ask(self, *command: str) -> str:
        """The output of a command that must succeed."""
        done = self.run(*command)
        assert done.returncode == 0, f"{command}: {done.stderr or done.stdout}"
        return done.stdout.strip()

    def start(self, command: list[str], *, log: str, login: bool = True) -> subprocess.Popen[bytes]:
        """Start a process that lives no longer than this one, however this one ends."""
        with open(self.folder / "log" / log, "ab") as output:
            return subprocess.Popen(
                ["setpriv", "--pdeathsig=KILL", *(self.inside(command) if login else command)],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def job(self, job_id: str) -> dict[str, str]:
        """What the controller knows of a job."""
        words = self.ask("scontrol", "-o", "show", "job", job_id).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(self, happened: Callable[[], object], what: str, *, seconds: float = 60.0) -> None:
        """Look five times a second until `happened()` is true."""
        until = time.monotonic() + seconds
        while not happened():
            assert time.monotonic() < until, f"not within {seconds:.0f} s: {what}"
            time.sleep(0.2)

    # --- what can befall it

    def start_controller(self, *options: str) -> None:
        self._controller = self.start(["slurmctld", *options, "-D"], log="slurmctld.out")
        self._daemons.append(self._controller)

    def stop_controller(self) -> None:
        """As at a restart: it writes down what it knows."""
        self._controller.terminate()
        self._controller.wait(60)

    def start_node(self, node: str) -> None:
        """Switch a node on, or start its slurmd again."""
        if not self.isolated:
            subprocess.run(["slurmd", "-N", node], env=self.environment, check=True)
        elif node in self._machines:
            subprocess.run(self.on_node(node, ["slurmd", "-N", node]), env=self.environment, check=True)
        else:
            self._machines[node] = self._switch_on(node)

    def power_failure(self, node: str) -> None:
        """Every process of the node is gone at once."""
        machine = self._machines.pop(node)
        _kill(machine)  # with --kill-child its child goes too, and that is pid 1 of all others

    def kill_slurmd(self, node: str) -> None:
        """slurmd alone; what it started lives on."""
        pid = (self.folder / "run" / f"slurmd-{node}.pid").read_text().strip()
        subprocess.run(self.on_node(node, ["kill", "-9", pid]), check=True)

    def on_node(self, node: str, command: list[str]) -> list[str]:
        """The command line that runs `command` on an isolated node."""
        if not self.isolated:
            return command
        first = _children(self._machines[node].pid)[0]
        spaces = ["--net", "--uts", "--ipc", "--mount", "--pid", f"--wdns={os.getcwd()}"]
        return ["nsenter", f"--target={first}", *spaces, "--", *command]

    def block_ports(self, node: str, first: int, last: int) -> None:
        """The node reaches nobody on these TCP ports."""
        rule = ["rule", "add", "ipproto", "tcp", "dport", f"{first}-{last}", "blackhole"]
        subprocess.run(["ip", "-n", node, *rule], check=True)

    def unblock_ports(self, node: str) -> None:
        subprocess.run(["ip", "-n", node, "rule", "del", "ipproto", "tcp", "blackhole"], check=True)

    # --- parts of `up`

    def _all_idle(self) -> bool:
        states = self._quietly(["sinfo", "-h", "-N", "-p", "main", "-o", "%t"]).split()
        return states == ["idle"] * len(self.nodes)

    def _quietly(self, command: list[str]) -> str:
        """Output of a command that may fail, such as any while the controller is not there."""
        line = self.inside(["timeout", "10", *command])
        return subprocess.run(line, env=self.environment, capture_output=True, text=True).stdout.strip()

    def _start_munged(self) -> None:
        run, munge, log = (self.folder / name for name in ("run", "munge", "log"))
        key = munge / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        paths = {"key-file": key, "socket": run / "munge.sock", "pid-file": run / "munged.pid"}
        paths |= {"log-file": log / "munged.log", "seed-file": munge / "seed"}
        options = [f"--{name}={path}" for name, path in paths.items()]
        command = ["munged", "--foreground", "--force", "--num-threads=4", *options]
        self._daemons.append(self.start(command, log="munged.out"))
        self.wait_for(paths["socket"].exists, "munged", seconds=10)

    def _lay_cables(self) -> None:
        """A bridge in the login node's network, a cable from it to each node."""

        def ip(*words: str) -> None:
            subprocess.run(["ip", *words], check=True, capture_output=True)

        ip("netns", "add", self.tag)
        ip("-n", self.tag, "link", "set", "lo", "up")
        ip("-n", self.tag, "link", "add", "br0", "type", "bridge")
        ip("-n", self.tag, "addr", "add", f"{SUBNET}.1/24", "dev", "br0")
        ip("-n", self.tag, "link", "set", "br0", "up")
        for node in self.nodes:
            cable = f"v{self.number(node)}"
            ip("netns", "add", node)
            ip("-n", node, "link", "set", "lo", "up")
            ip("-n", self.tag, "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", node)
            ip("-n", self.tag, "link", "set", cable, "master", "br0", "up")
            ip("-n", node, "addr", "add", f"{self.address(node)}/24", "dev", "eth0")
            ip("-n", node, "link", "set", "eth0", "up")

    def _start_login_node(self) -> None:
        """A process that holds the login node's namespaces; `inside` enters them."""
        ready = self.folder / "run" / "login"
        hosts = self.folder / "etc" / "hosts"
        script = f"hostname ctl && mount --bind {hosts} /etc/hosts && touch {ready} && exec sleep infinity"
        enter = ["nsenter", f"--net=/run/netns/{self.tag}", "unshare", "--uts", "--mount"]
        login = self.start([*enter, "bash", "-c", script], log="login.out")
        self.wait_for(ready.exists, "the login node", seconds=10)
        self._login = login
        self._daemons.append(login)

    def _switch_on(self, node: str) -> subprocess.Popen[bytes]:
        """Pid 1 of the node is a small bash, which reaps; its death ends every process of the node."""
        hosts = self.folder / "etc" / f"hosts-{node}"
        script = (
            f"hostname host-{self.number(node)}; mount --bind {hosts} /etc/hosts; mount -t tmpfs tmpfs /dev/shm; "
            f"slurmd -N {node}; while :; do sleep 60 & wait $!; done"
        )
        spaces = ["unshare", "--uts", "--ipc", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        enter = ["nsenter", f"--net=/run/netns/{node}"]
        return self.start([*enter, *spaces, "bash", "-c", script], log=f"{node}.out", login=False)


def _children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait(10)


def _kill_by_file(path: Path) -> None:
    """Kill the daemon whose pid the file holds, if it is there."""
    if path.exists() and path.read_text().strip():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(path.read_text()), signal.SIGKILL)
        path.unlink(missing_ok=True)
