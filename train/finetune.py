"""Fine-tune a checkpoint, our own or an imported one, on other data: with adapters (LoRA) or all of its weights.

    python train/finetune.py runs/demo --data.path data/mine --run.name demo-mine
    python train/launch.py --nproc_per_node=8 train/finetune.py imported/gpt2 --lora.rank 16

The same command line continues the same run. Everything in eval/ takes the run's folder; adapters are merged there.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from common.early_end import end_in_one_line

    sys.excepthook = end_in_one_line

from common.errors import UserError, exit_on_user_error
from common.paths import PROJECT, expand_path
from common.run_folder import RunFolder
from model.config import ModelConfig
from train.pretrain import train
from train.settings.command_line import QUESTIONS, Command, read_command
from train.settings.finetune import check_targets, fit_to_base
from train.settings.sections import FinetuneConfig
from train.startup.from_checkpoint import find_base, with_adapters
from train.startup.request import check_request

USAGE = "python train/finetune.py RUN_OR_CHECKPOINT [--config FILE] [--section.key value …]"


def main() -> int:
    given, arguments = split_base(sys.argv[1:])
    command = finetune_command(given)
    config, options = read_command(command, arguments)
    folder = RunFolder.find(config.run.root, str(config.run.name))
    base = find_base(given, folder)
    fit_to_base(config.model, base.model)
    check_targets(config.lora, base.model)
    request = check_request(config, options, with_adapters(base, config.lora.adapters()))
    if request is None:
        return 0
    from torch.distributed.elastic.multiprocessing.errors import record  # from here on it takes torch

    return record(train)(request) or 0


def split_base(arguments: list[str]) -> tuple[str, list[str]]:
    """The first argument and the others. Raises UserError where it is not a folder's name."""
    if questions := [argument for argument in arguments if argument.split("=")[0] in QUESTIONS]:
        return "", questions[:1]
    if not arguments or arguments[0].startswith("-"):
        raise UserError(f"missing RUN_OR_CHECKPOINT: {USAGE}")
    return str(expand_path(arguments[0])), arguments[1:]


def finetune_command(given: str) -> Command[FinetuneConfig]:
    def base_model(folder: RunFolder) -> ModelConfig:
        return find_base(given, folder).model

    return Command(
        FinetuneConfig,
        prog="finetune.py RUN_OR_CHECKPOINT",
        description="Fine-tune a checkpoint (our own or an imported one) with adapters, or all of its weights.",
        default_config=PROJECT / "train" / "configs" / "finetune.yaml",
        base_of=base_model,
    )


if __name__ == "__main__":
    exit_on_user_error(main)
