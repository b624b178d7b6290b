"""torchrun's options as `train/launch.py` takes them: how many ranks, and what is refused before anything starts."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.errors import UserError
from common.host_limits import allowed_cores
from model.devices import choose_device
from tests.helpers.training import PRETRAIN, PROJECT
from train.batches.plan import largest_micro_batch
from train.launching import launch_options
from train.launching.launch_options import check_the_rest, local_ranks, read_options
from train.settings.command_line import read_config

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the launcher's platform")
RANKS_OF_GPUS = {0: min(2, allowed_cores()), 1: 1, 2: 2, 3: 2, 6: 4, 8: 8, 16: 8}


def accept(command: list[str], logs: Path) -> None:
    """Take the options as train/launching/torchrun_agent.py does."""
    options = read_options(command)
    options.log_dir = options.log_dir or str(logs)
    check_the_rest(options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "the following arguments are required: training_script"),
        ("--no-such-option=1 {script}", "unrecognized arguments: --no-such-option=1"),
        ("--config x.yaml", "unrecognized arguments: --config"),
        ("--master_port=x {script}", "argument --master-port.*: invalid int value: 'x'"),
        ("--master_port=99999 {script}", "--master_port is 99999: give a port"),
        ("--nnodes=a {script}", "--nnodes is a: give the number of machines"),
        ("--nnodes 1:4 {script}", "--nnodes is 1:4: give one number"),
        ("--nproc_per_node=two {script}", "--nproc_per_node is two: give the number of ranks"),
        ("--nproc_per_node=0 {script}", "--nproc_per_node is 0: give the number of ranks, 1 or more"),
        ("--nproc_per_node=100000 {script}", "--nproc_per_node is 100000: give the number of ranks"),
        (f"--nnodes={'9' * 5000} {{script}}", "--nnodes is 999.*: give the number of machines"),
        ("--nproc_per_node=auto:0 {script}", "--nproc_per_node is auto:0: give the number of ranks"),
        ("--nnodes=2 --node_rank=2 {script}", "--node_rank is 2: the 2 machines count from 0 to 1"),
        ("--nnodes=2 {script}", "no option names where the machines meet: give --master_addr=HOST"),
        (
            "--nnodes=2 --rdzv-backend=c10d --rdzv-endpoint=host:29400 {script}",
            "--rdzv-backend is c10d, with which a machine executes what anybody sends to its port: "
            ".* give --master_addr",
        ),
        ("--standalone --nnodes=2 {script}", "--standalone is for one machine, and --nnodes is 2"),
        ("--rdzv-backend=etcd {script}", "--rdzv-backend is etcd: use static or c10d"),
        ("--rdzv_endpoint=somewhere {script}", "--rdzv-endpoint is somewhere: give HOST:PORT"),
        ("--rdzv_conf=timeout {script}", "torchrun refuses its options: .*'timeout' must have a value"),
        ("--max-restarts 2 {script}", "--max-restarts is 2 .*: ranks are not restarted inside a launch"),
        ("--max_restarts=1 {script}", "--max-restarts is 1 "),
        ("--max-r=1 {script}", "--max-restarts is 1 "),
        ("--virtual-local-rank {script}", "--virtual-local-rank hides"),
        ("--signals-to-handle=SIGTERM {script}", "--signals-to-handle can't be chosen"),
        ("--event-log-handler=file {script}", "--event-log-handler is file: use null or console"),
        ("--monitor-interval=0 {script}", "--monitor-interval is 0"),
        ("--redirects=x {script}", "torchrun refuses its options: x does not match"),
        ("--no-python -m {script}", "--no-python and --module exclude each other"),
        ("--no-python train/pretrain.py", "train/pretrain.py can't be run by itself: leave --no-python out"),
        ("train/pretran.py --run.name x", "train/pretran.py is not a file: give the script to start"),
    ],
)
def test_a_mistake_in_torchruns_options_is_one_line(tmp_path: Path, options: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        accept(options.format(script=PRETRAIN).split(), tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("PET_MAX_RESTARTS", "3", "--max-restarts is 3 "),
        ("PET_MAX_RESTARTS", "x", "argument --max-restarts/--max_restarts: invalid int value: 'x'"),
        ("PET_NNODES", "1:4", "--nnodes is 1:4"),
        ("PET_STANDALONE", "yes", "torchrun's options can't be read .*'yes'"),
    ],
)
def test_an_option_given_as_a_variable_is_met_alike(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        read_options([str(PRETRAIN)])


@pytest.mark.parametrize(
    "options",
    [
        "--standalone --max-restarts=0",
        "--nnodes=2:2 --master_addr=127.0.0.1 --node_rank=1",
        "--nnodes=2 --rdzv-endpoint=host:29400 --rdzv-id=7",
        "--rdzv-backend=c10d",
        "--standalone --tee 3 --log-dir {folder}",
    ],
)
def test_what_works_is_taken(tmp_path: Path, options: str) -> None:
    accept([*options.format(folder=tmp_path).split(), str(PRETRAIN)], tmp_path)


def pretend_gpus(monkeypatch: pytest.MonkeyPatch, gpus: int) -> None:
    """What torch would answer on a machine with so many GPUs, of which there are none here."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)


def shown_commands() -> list[list[str]]:
    """The commands of README.md and of `make demo` that leave the number of ranks to the launcher."""
    text = (PROJECT / "README.md").read_text()
    if shutil.which("make") is not None:
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
        plan = ["make", "-C", str(PROJECT), "--dry-run", "demo", "RANKS=auto:8"]
        text += subprocess.run(plan, capture_output=True, text=True, check=True, env=environment).stdout
    return [shlex.split(line) for line in re.findall(r"^\.venv/bin/python .*launch\.py .*$", text, flags=re.MULTILINE)]


@pytest.mark.parametrize("gpus", RANKS_OF_GPUS)
def test_the_commands_for_a_newcomer_start_as_many_ranks_as_there_are_gpus(
    monkeypatch: pytest.MonkeyPatch, gpus: int
) -> None:
    pretend_gpus(monkeypatch, gpus)
    monkeypatch.chdir(PROJECT)
    commands = shown_commands()
    assert len(commands) >= 1 + (shutil.which("make") is not None)
    for command in commands:
        at = command.index("train/launch.py")
        options = read_options(command[at + 1 :])
        ranks = int(options.nproc_per_node)
        assert ranks == RANKS_OF_GPUS[gpus]
        for rank in range(ranks):
            assert choose_device("auto", rank, ranks) == (torch.device("cuda", rank) if gpus else torch.device("cpu"))
        config, _ = read_config(options.training_script_args)
        assert config.batch.micro_batch == "auto"
        assert largest_micro_batch(config.batch.tokens_per_step, config.model.block_size, ranks, 8) >= 1


def test_as_many_ranks_as_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for gpus in (0, 1, 2, 8):
        pretend_gpus(monkeypatch, gpus)
        assert local_ranks("3") == 3
        assert local_ranks("cpu") == allowed_cores()
        assert local_ranks("auto") == (gpus or min(2, allowed_cores()))
    assert local_ranks("gpu") == 8
    pretend_gpus(monkeypatch, 0)
    monkeypatch.setattr(launch_options, "allowed_cores", lambda: 1)
    assert (local_ranks("auto"), local_ranks("auto:8")) == (1, 1)
    with pytest.raises(
        UserError, match="--nproc_per_node is gpu and PyTorch sees no GPU here: give the number of ranks"
    ):
        local_ranks("gpu")
