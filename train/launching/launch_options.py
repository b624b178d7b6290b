"""torchrun's options as train/launch.py takes them: what can't work here is an error of one line before the start."""

import argparse
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.distributed import run as torchrun

from common.command_line import CommandParser
from common.errors import UserError
from common.host_limits import allowed_cores
from model.rank_environment import PORTS

CPU_RANKS = 2  # more of them train no faster on a CPU: each has its threads
BACKENDS = ("static", "c10d")
EVENT_LOGS = ("null", "console")
DEFAULT_PORT = 29500  # torchrun's


def read_options(arguments: Sequence[str]) -> argparse.Namespace:
    """torchrun's options, PET_* variables included, with the number of ranks resolved.

    Raises UserError for those at which it would print a page or a traceback, wait long, or leave ranks that hang.
    """
    try:
        parser = torchrun.get_args_parser()
        parser.__class__ = CommandParser  # whose complaints are one line
        if "PET_MASTER_ADDR" not in os.environ:
            parser.set_defaults(master_addr=None)  # torchrun's default can't be distinguished from a choice
        options = parser.parse_args(["--signals-to-handle=SIGQUIT", *arguments])
    except ValueError as error:  # a PET_* variable
        raise UserError(f"torchrun's options can't be read ({error})") from None
    _check_restarts(options)
    options.nnodes = str(_nodes(options))
    _check_meeting(options)
    options.nproc_per_node = str(local_ranks(options.nproc_per_node))
    _check_script(options)
    if options.signals_to_handle != "SIGQUIT":
        raise UserError("--signals-to-handle can't be chosen, train/launch.py forwards signals itself: leave it out")
    if options.event_log_handler not in EVENT_LOGS:
        raise UserError(f"--event-log-handler is {options.event_log_handler}: use {' or '.join(EVENT_LOGS)}")
    if options.virtual_local_rank:
        raise UserError("--virtual-local-rank hides a machine's GPUs from all ranks but one: leave it out")
    if options.numa_binding is not None and torch.cuda.device_count() == 0:
        raise UserError("--numa-binding puts ranks near their GPUs, and PyTorch sees none here: leave it out")
    if options.monitor_interval <= 0:
        raise UserError(f"--monitor-interval is {options.monitor_interval}: give seconds, more than 0")
    return options


def check_the_rest(options: argparse.Namespace) -> None:
    """Raises UserError for what torchrun itself refuses: of --redirects, --tee, --rdzv-conf, --logs-specs, …

    With a --log-dir: without one it makes a temporary folder, and leaves it.
    """
    assert options.log_dir is not None
    try:
        torchrun.config_from_args(options)
    except (ValueError, AssertionError) as error:
        raise UserError(f"torchrun refuses its options: {error}") from None


def local_ranks(wish: str) -> int:
    """How many ranks to start on this machine.

    Args:
        wish: a number; `gpu` or `cpu`, one for each; `auto`: one for each GPU, or without any two, as far as the cores
            go; `auto:N`: as many of those as divide N, for a batch that can't be divided into any number of parts.

    Raises UserError where it is none of these.
    """
    if match := re.fullmatch(r"auto(?::([1-9]\d{0,8}))?", wish):
        found = visible_gpus() or min(CPU_RANKS, allowed_cores())
        whole = int(match[1]) if match[1] else found
        return max(ranks for ranks in range(1, found + 1) if whole % ranks == 0)
    if wish == "cpu":
        return allowed_cores()
    if wish == "gpu" and (gpus := visible_gpus()):
        return gpus
    if re.fullmatch(r"[1-9]\d{0,3}", wish):  # a fifth digit is a mistake that would end in a million processes
        return int(wish)
    because = " and PyTorch sees no GPU here" if wish == "gpu" else ""
    raise UserError(f"--nproc_per_node is {wish}{because}: give the number of ranks, 1 or more, or auto")


def visible_gpus() -> int:
    """GPUs that ranks of this machine could use, without a context on any: CUDA_VISIBLE_DEVICES counts."""
    return torch.cuda.device_count() or int(torch.backends.mps.is_available())


def _check_restarts(options: argparse.Namespace) -> None:
    if options.max_restarts != 0:
        raise UserError(
            f"--max-restarts is {options.max_restarts} (or PET_MAX_RESTARTS): ranks are not restarted inside a launch, "
            "as the new ones would wait for the dead ones; start the same command again, which resumes the run, or let "
            "Slurm do it (slurm/124m.sh)"
        )


def _nodes(options: argparse.Namespace) -> int:
    """The number of machines."""
    match = re.fullmatch(r"([1-9]\d{0,8})(?::([1-9]\d{0,8}))?", options.nnodes)
    if match is None:
        raise UserError(f"--nnodes is {options.nnodes}: give the number of machines")
    if match[2] and match[2] != match[1]:
        raise UserError(f"--nnodes is {options.nnodes}: give one number, as machines can't join or leave a launch")
    nodes = int(match[1])
    if options.standalone and nodes > 1:
        raise UserError(
            f"--standalone is for one machine, and --nnodes is {nodes}: give --master_addr and --node_rank instead"
        )
    if not 0 <= options.node_rank < nodes:
        raise UserError(f"--node_rank is {options.node_rank}: the {nodes} machines count from 0 to {nodes - 1}")
    return nodes


def _check_meeting(options: argparse.Namespace) -> None:
    """Raises UserError where the launchers of several machines could not find where to meet, or not safely."""
    if options.standalone:
        return
    if options.rdzv_backend not in BACKENDS:
        raise UserError(f"--rdzv-backend is {options.rdzv_backend}: use {' or '.join(BACKENDS)}")
    if options.rdzv_backend == "c10d" and options.nnodes != "1":
        raise UserError(
            "--rdzv-backend is c10d, with which a machine executes what anybody sends to its port: for several "
            "machines leave it out, and give --master_addr, --master_port and each one's --node_rank"
        )
    if options.master_port is not None and options.master_port not in PORTS:
        raise UserError(f"--master_port is {options.master_port}: give a port from 0 to {PORTS[-1]}")
    host, _, port = options.rdzv_endpoint.rpartition(":")
    if options.rdzv_endpoint and not (host and re.fullmatch(r"\d{1,5}", port) and int(port) in PORTS):
        raise UserError(f"--rdzv-endpoint is {options.rdzv_endpoint}: give HOST:PORT")
    if options.nnodes != "1" and not options.rdzv_endpoint and options.master_addr is None:
        raise UserError(
            f"--nnodes is {options.nnodes}, but no option names where the machines meet: give --master_addr=HOST, one "
            "of them"
        )


def meeting_address(options: argparse.Namespace) -> tuple[str, int]:
    """Where the launchers of several machines meet: host and port."""
    if options.rdzv_endpoint:
        host, _, port = options.rdzv_endpoint.rpartition(":")
        return host.strip("[]"), int(port)
    return options.master_addr, DEFAULT_PORT if options.master_port is None else options.master_port


def _check_script(options: argparse.Namespace) -> None:
    script = options.training_script
    if options.no_python and options.module:
        raise UserError("--no-python and --module exclude each other: leave one out")
    if options.no_python and shutil.which(script) is None:
        raise UserError(f"{script} can't be run by itself: leave --no-python out")
    if not (options.module or options.no_python or Path(script).is_file()):
        raise UserError(f"{script} is not a file: give the script to start, such as train/pretrain.py")
