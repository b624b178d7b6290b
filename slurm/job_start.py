"""The start of a job, on its first node, before any trainer is started.

Checks the options and the data, refuses a job that comes back repeatedly without progress, and writes the
start into the run's folder.
"""

import os
import secrets

from common.checkpoint_files import list_checkpoints
from common.errors import UserError
from common.os_errors import refusal
from common.paths import expand_path
from common.run_folder import RunFolder
from data_prep.token_sets.token_set import TokenSet, find_token_set
from slurm.history import StartId, append_start, fruitless_limit, fruitless_starts, read_starts, saved_step, starts_file
from slurm.rendezvous import choose_port, ephemeral_ports, head_address, port_range
from slurm.start_info import Beginning
from train.settings.command_line import read_config

SECRET_BYTES = 32


def begin(options: list[str], nodes: list[str], addresses: list[str], launch: str) -> Beginning:
    """Check what can be checked on the first node, and write the start into the run's folder.

    Args:
        options: the trainer's. nodes: the job's, the first one first. addresses: those Slurm uses for them, if known.
            $LONGHAUL_HEAD is the address of the first one for the others, where a site knows better than Slurm.

    Raises UserError for options or data that no trainer would accept, and for a job that makes no progress.
    """
    config, _ = read_config(options)
    if config.data.stage_to is not None:  # every trainer would fail at a variable that is not set, after minutes
        expand_path(config.data.stage_to)
    folder = RunFolder.find(config.run.root, str(config.run.name))
    tokens = TokenSet.open(find_token_set(config.data.path))
    start = StartId.of_environment()
    refuse_a_crash_loop(folder, start)
    try:
        append_start(folder, start, nodes, launch)
    except OSError as error:
        raise UserError(refusal("written", error, starts_file(folder))) from None
    others = addresses[1:] or nodes[1:]
    return Beginning(
        run_folder=str(folder.path),
        data_folder=str(tokens.folder.absolute()),
        data_identity=tokens.identity,
        head=os.environ.get("LONGHAUL_HEAD") or head_address(nodes[0], others) if len(nodes) > 1 else "127.0.0.1",
        port=choose_port(start, port_range(ephemeral_ports())),
        meeting_id=str(start),
        secret=secrets.token_hex(SECRET_BYTES),
        # a job that comes back resumes, whatever its first start started from
        resume="auto" if start.restart_count > 0 and list_checkpoints(folder.checkpoints) else "",
        device=config.run.device,
    )


def refuse_a_crash_loop(folder: RunFolder, start: StartId) -> None:
    """Raises UserError where the job's last starts all started where this one would."""
    limit = fruitless_limit()
    step = saved_step(folder)
    count = fruitless_starts(read_starts(folder), start, step)
    if count >= limit:
        raise UserError(
            f"the last {count} starts of job {start.job_id} saved nothing after step {step}: "
            f"look into {folder.log}, then submit again"
        )
