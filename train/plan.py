"""Plan a run before it is submitted: does it fit, how long does it take, what does it cost, what could be changed.

    python train/plan.py --config train/configs/gpt2-1p3b.yaml --gpu h100 --nodes 4
    python train/plan.py --config train/configs/gpt2-124m.yaml --gpu 4090 --gpus-per-node 1 --json plan.json
    python train/plan.py --config train/configs/demo.yaml --measure
    python train/plan.py runs/demo --objective sft --data.path data/talks --gpu a100

All options of train/pretrain.py may follow; after a base (a run or checkpoint) those of train/finetune.py, which needs
its data, and with which --measure runs that. Else neither data nor a GPU nor torch is needed, except by --measure,
which runs a few real steps on this machine. The exit status is 1 where the run does not fit. docs/planning.md derives
the figures.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

if __package__ in (None, ""):  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from common.early_end import end_in_one_line

    sys.excepthook = end_in_one_line

from common.command_line import CommandParser
from common.errors import UserError, exit_on_user_error
from common.publish import write_json_output
from common.run_folder import RunFolder
from data_prep.corpora.preparation import positive_count
from data_prep.token_sets.manifest import MANIFEST_FILE
from data_prep.token_sets.token_set import find_token_set
from eval.shared.arguments import add_json
from model.device_table import GPUS
from train.estimates.machines import Machine, machine_at_hand, machine_of
from train.estimates.plan_text import as_json, as_text
from train.estimates.run_plan import make_plan
from train.estimates.time_limit import seconds_of_limit
from train.finetune import finetune_command, split_base
from train.settings.command_line import Options, read_command, read_config
from train.settings.finetune import check_targets, fit_to_base
from train.settings.sections import Config
from train.startup.fit_to_data import fit_to_data, open_data
from train.startup.from_checkpoint import find_base

STEPS = 20  # that --measure runs unless it is told how many


def build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(__doc__)
    parser.add_argument("--gpu", metavar="NAME", help=f"one of {', '.join(GPUS)}; default: the machine at hand")
    parser.add_argument("--nodes", type=positive_count, default=1, metavar="N", help="default: 1")
    parser.add_argument(
        "--gpus-per-node", type=positive_count, metavar="G", help="default: 8; without --gpu what is here"
    )
    parser.add_argument(
        "--time", default="24:00:00", metavar="LIMIT", help="of one start on the cluster, as sbatch has it"
    )
    parser.add_argument("--price-per-gpu-hour", type=float, metavar="X", help="in any currency")
    parser.add_argument(
        "--measure", nargs="?", type=positive_count, const=STEPS, metavar="STEPS",
        help=f"run so many real steps on this machine (default: {STEPS}), instead of an estimate",
    )  # fmt: skip
    add_json(parser)
    return parser


def main() -> int:
    arguments, options = build_parser().parse_known_args()
    limit_seconds = seconds_of_limit(arguments.time)
    if arguments.measure and arguments.gpu:
        raise UserError("--measure is for the machine at hand: leave --gpu out")
    if options and not options[0].startswith("-"):
        config, asked = read_finetuning(options)
        submitted = None  # slurm's scripts start train/pretrain.py
        command = "train/finetune.py"
    else:
        config, asked = read_config(options)
        config, submitted = with_vocabulary(config), (options, arguments.time)
        command = "train/pretrain.py"
    if asked.resume != "auto" or asked.allow_change or asked.print_config:
        raise UserError("--resume, --allow-change and --print_config are options of train/pretrain.py only")
    machine = machine_for(arguments, config)
    pace = None
    if arguments.measure:
        from train.estimates.measuring import measure

        pace = measure(config, options, machine, arguments.measure, command=command)
    limit = limit_seconds if arguments.gpu else None
    plan = make_plan(config, machine, limit_seconds=limit, pace=pace)
    print(as_text(plan, arguments.price_per_gpu_hour, submitted))
    if arguments.json:
        write_json_output(arguments.json, as_json(plan, arguments.price_per_gpu_hour))
    return 0 if plan.fits else 1


def with_vocabulary(config: Config) -> Config:
    """With the vocabulary of the data, where they are at hand. Raises UserError where they are damaged."""
    folders = [source.path for source in config.data.mix] or [config.data.path]
    is_open = config.model.vocab_size == type(config.model)().vocab_size
    if not is_open or not all((find_token_set(folder) / MANIFEST_FILE).is_file() for folder in folders):
        return config
    return replace(config, model=replace(config.model, vocab_size=open_data(config).tokenizer_spec["vocab_size"]))


def read_finetuning(options: list[str]) -> tuple[Config, Options]:
    """What train/finetune.py would train with these arguments, its base before the options, fitted to its data.

    Raises UserError as that does.
    """
    given, others = split_base(options)
    config, asked = read_command(finetune_command(given), others)
    base = find_base(given, RunFolder.find(config.run.root, str(config.run.name)))
    fit_to_base(config.model, base.model)
    check_targets(config.lora, base.model)
    tokens = open_data(config)
    fitted = fit_to_data(config, tokens, base.fitted(tokens, config).vocab_size)
    return fitted.for_tokenizer(tokens.tokenizer_spec), asked


def machine_for(arguments: argparse.Namespace, config: Config) -> Machine:
    """Raises UserError for an unknown card, or several nodes of the machine at hand."""
    if arguments.gpu:
        return machine_of(arguments.gpu, arguments.nodes, arguments.gpus_per_node or 8)
    if arguments.nodes > 1:
        raise UserError("--nodes is for a cluster: name its cards with --gpu")
    return machine_at_hand(config, arguments.gpus_per_node)


if __name__ == "__main__":
    exit_on_user_error(main)
