"""Pre-train a GPT.

    torchrun --nproc_per_node=8 train/pretrain.py --config train/configs/gpt2-124m.yaml --optim.lr 3e-4
    python train/pretrain.py --config train/configs/smoke.yaml

The same command line continues the same run.
"""

import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import yaml
from torch.distributed.elastic.multiprocessing.errors import record

from common.checkpoint_files import list_checkpoints, read_checkpoint_manifest
from common.errors import UserError, exit_on_user_error
from common.progress import format_bytes, format_count
from common.publish import write_whole
from common.run_folder import RunFolder
from data_prep.token_set import TokenSet
from data_prep.tokenization import Tokenizer, load_tokenizer
from data_prep.windows import Windows
from model.counts import flops_per_token, memory_estimate, parameter_count, peak_flops
from model.gpt import GPT
from model.initialisation import initialise
from model.ranks import Ranks, share_threads, start_ranks
from train.batch import BatchPlan, plan_batch
from train.between import SampleWriter, Validator
from train.checkpoint import CheckpointWriter, Progress, load_training_state
from train.choices import recompute_every, resolve, set_determinism
from train.config import PROJECT, Config, Options, as_dict, read_config, to_yaml
from train.loader import StepLoader
from train.loop import Outcome, TrainingLoop
from train.optimizer import build_optimizer
from train.parallel import Parallel
from train.provenance import describe_rank, record_start
from train.recorder import Recorder
from train.resume import changed_fields, check_same_run, choose_checkpoint
from train.retention import CheckpointKeeper, sweep_leftovers
from train.step import NonFiniteLoss, Stepper
from train.stopping import StopRequest


@record
def main() -> int:
    config, options = read_config()
    if options.print_config:
        print(to_yaml(config), end="")
        return 0
    folder = RunFolder(Path(config.run.root) / str(config.run.name))
    tokens = open_tokens(config)
    ranks = start_ranks(config.run.device, timeout_seconds=config.run.collective_timeout_seconds)
    threads = share_threads(ranks.local_world_size)
    stop = StopRequest(folder, watch_file=ranks.is_first)
    with stop.listening():
        status = pretrain(config, options, folder, tokens, ranks, threads, stop)
    ranks.close()
    return status
