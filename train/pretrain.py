"""Pre-train a GPT.

    python train/launch.py --nproc_per_node=8 train/pretrain.py --config train/configs/gpt2-124m.yaml --optim.lr 3e-4
    python train/pretrain.py --config train/configs/smoke.yaml

The same command line continues the same run.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from common.early_end import end_in_one_line

    sys.excepthook = end_in_one_line

from common.errors import exit_on_user_error
from train.settings.command_line import read_config
from train.startup.initial_weights import FromScratch
from train.startup.request import Request, check_request


def main() -> int:
    """Read the command, report what is wrong with it or already done, and train."""
    config, options = read_config()
    request = check_request(config, options, FromScratch())
    if request is None:
        return 0
    from torch.distributed.elastic.multiprocessing.errors import record  # from here on it takes torch

    return record(train)(request) or 0


def train(request: Request) -> int:
    """The phases of a start, in order; return the exit status."""
    from train.assemble import assemble
    from train.restore import restore
    from train.startup.open_run import open_run
    from train.startup.plan_start import plan_start
    from train.startup.prepare import prepare_folder
    from train.startup.recording import recording

    with open_run(request) as run:  # ranks, data, signals, deadline, lock
        plan = plan_start(run)  # which checkpoint, what auto means, the batch, what is left to do
        if plan is None:
            return 0  # the run has all its steps
        prepare_folder(run, plan)  # configuration, provenance, state
        with recording(run, plan) as records:  # metrics, log, heartbeat, failures
            trainer = assemble(run, plan, records)
            restore(trainer, plan)
            trainer.finish(trainer.run(plan.progress, plan.missing))
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
