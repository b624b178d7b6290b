"""What bench_step.py measures: cases, from its command line and the trainer's options. Nothing here needs torch."""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

from common.command_line import CommandParser
from common.errors import UserError
from common.host_limits import allowed_cores
from common.paths import PROJECT
from common.publish import file_to_write
from data_prep.corpora.preparation import positive_count
from model.config import PRESETS
from train.settings.command_line import read_config
from train.settings.sections import Config

CONTESTANTS = ("longhaul", "textbook", "nanogpt", "transformers", "ceiling")
CONFIGS = PROJECT / "train" / "configs"
# What `--cases record` measures, as command lines: one contestant after the other takes its turn in each of them.
RECORD = (
    f"--config {CONFIGS / 'demo.yaml'} --model.n_embd 192 --optim.kind adamw --block-size 256 --dtype fp32"
    " --micro-batch 8 1 --steps 3 --turns 3",
    "--preset gpt2-124m --dtype fp32 --micro-batch 1 --steps 1 --turns 3",
    "--preset llama-124m --dtype fp32 --micro-batch 1 --steps 1 --turns 2",
    "--preset gpt2-124m --block-size 256 --dtype fp32 --micro-batch 8 --steps 1 --turns 2",
    "--preset gpt2-124m --dtype bf16 --micro-batch 1 --steps 1 --turns 2",
)
SHORT = {  # the trainer's options that have a short name here
    "block_size": "model.block_size",
    "window": "model.window",
    "dtype": "run.dtype",
    "recompute": "recompute.mode",
    "compile": "run.compile",
}


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        config: of a run; `batch` is the case's own, the rest is read as the trainer reads it.
        turns: of each contestant. steps: of a turn. warm_up: steps before the first turn.
        threads: of the CPU, for each contestant.
        profile: where to put a trace of one more step of each contestant; None: nowhere.
    """

    name: str
    config: Config
    contestants: tuple[str, ...]
    turns: int
    steps: int
    warm_up: int
    threads: int
    profile: Path | None

    @property
    def micro_batch(self) -> int:
        assert isinstance(self.config.batch.micro_batch, int)
        return self.config.batch.micro_batch

    @property
    def accumulation(self) -> int:
        return self.config.batch.tokens_per_step // (self.micro_batch * self.config.model.block_size)


@dataclass(frozen=True)
class Request:
    """What a contestant's process is asked for: so many steps, and a trace of the last of them, if a file is named."""

    steps: int
    trace: Path | None = None


def build_parser(description: str | None) -> argparse.ArgumentParser:
    parser = CommandParser(
        description,
        usage="bench_step.py [options] [--SECTION.KEY VALUE of train/pretrain.py]",
        epilog="Options of train/pretrain.py that make a step another one (--model.…, --optim.…, --recompute.…) are "
        "taken as well: docs/options.md.",
    )
    model = parser.add_argument_group("the step")
    model.add_argument("--preset", choices=sorted(PRESETS), help="a size, with its configuration in train/configs")
    model.add_argument("--config", type=Path, help="a run's YAML file instead (default: --preset gpt2-124m)")
    model.add_argument(
        "--micro-batch", type=positive_count, nargs="+", default=[8], metavar="N", help="a case for each (default: 8)"
    )
    model.add_argument(
        "--accumulation", type=positive_count, default=1, metavar="N", help="micro-batches of a step (default: 1)"
    )
    model.add_argument("--block-size", metavar="T", help="--model.block_size: tokens of a sequence")
    model.add_argument("--window", metavar="W", help="--model.window: keys that a query sees")
    model.add_argument("--documents", action="store_true", help="--data.document_mask true, with random documents")
    model.add_argument("--dtype", help="--run.dtype: auto, bf16, fp16 or fp32")
    model.add_argument("--recompute", metavar="MODE", help="--recompute.mode: auto, none, full or every")
    model.add_argument(
        "--compile", metavar="CHOICE", help="--run.compile: auto, true or false; longhaul block by block, as it "
        "trains, nanogpt and transformers as a whole, textbook never",
    )  # fmt: skip
    how = parser.add_argument_group("the measurement")
    how.add_argument(
        "--contestants",
        nargs="+",
        default=list(CONTESTANTS),
        choices=CONTESTANTS,
        help="who takes turns (default: all)",
    )
    how.add_argument("--turns", type=positive_count, default=3, metavar="N", help="of each contestant (default: 3)")
    how.add_argument("--steps", type=positive_count, default=2, metavar="N", help="of a turn (default: 2)")
    how.add_argument(
        "--warm-up", type=positive_count, default=1, metavar="N", help="steps before the first turn (default: 1)"
    )
    how.add_argument("--threads", type=positive_count, metavar="N", help="of the CPU (default: a core each)")
    how.add_argument("--device", metavar="DEVICE", help="--run.device: auto, cpu or cuda")
    how.add_argument("--cases", choices=["record"], help="the cases of the committed record instead of one's own")
    how.add_argument(
        "--profile", type=Path, metavar="DIR", help="put a trace of one more step of each contestant there"
    )
    how.add_argument("--json", type=file_to_write, metavar="FILE", help="the figures, rewritten after each turn")
    return parser


def read_cases(parser: argparse.ArgumentParser, arguments: list[str]) -> tuple[list[Case], Path | None]:
    """The cases that a command line asks for, and where their figures go.

    Raises UserError in one line for whatever is wrong with it.
    """
    asked, _ = parser.parse_known_args(arguments)
    lines = [line.split() for line in RECORD] if asked.cases else [[]]
    cases: list[Case] = []
    for line in lines:
        options, others = parser.parse_known_args([*line, *arguments])
        for micro_batch in options.micro_batch:
            case = _case(options, others, micro_batch)
            alike = sum(other.name.partition("#")[0] == case.name for other in cases)  # by other options, or by none
            cases.append(replace(case, name=f"{case.name}#{alike + 1}") if alike else case)
    if asked.profile is not None and not asked.profile.is_dir():
        raise UserError(f"--profile {asked.profile} is not a folder: make it, or leave --profile out")
    return cases, asked.json


def _case(options: argparse.Namespace, others: list[str], micro_batch: int) -> Case:
    if options.preset and options.config:
        raise UserError("--preset and --config both name a model: give one of them")
    file = options.config or CONFIGS / f"{options.preset or 'gpt2-124m'}.yaml"
    given = {name: getattr(options, short) for short, name in SHORT.items()} | {"run.device": options.device}
    given["data.document_mask"] = "true" if options.documents else None
    named = [f"--{name}={value}" for name, value in given.items() if value is not None]
    config, asked = read_config([f"--config={file}", *named, *others])
    if asked.resume != "auto" or asked.allow_change or asked.print_config:
        raise UserError("--resume, --allow-change and --print_config are options of train/pretrain.py only")
    if config.run.device == "mps":
        raise UserError("--device mps is not measured here: use cpu or cuda")
    tokens = micro_batch * config.model.block_size * options.accumulation
    name = "-".join(
        [str(config.run.name), f"t{config.model.block_size}", f"b{micro_batch}"]
        + ([f"x{options.accumulation}"] if options.accumulation > 1 else [])
        + ([config.run.dtype] if config.run.dtype != "auto" else [])
    )
    return Case(
        name=name,
        config=replace(config, batch=replace(config.batch, micro_batch=micro_batch, tokens_per_step=tokens)),
        contestants=tuple(name for name in CONTESTANTS if name in options.contestants),
        turns=options.turns,
        steps=options.steps,
        warm_up=options.warm_up,
        threads=options.threads or allowed_cores(),
        profile=options.profile,
    )
