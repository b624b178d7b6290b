"""One check of the GPU campaign that no other command makes; `train/benchmarks/gpu_campaign.py` runs it.

python train/benchmarks/campaign/probe.py parity --work /tmp/campaign --data data/docstrings --json parity.json
"""

import argparse
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[3])

from common.cache_folder import hellaswag_file
from common.command_line import CommandParser
from common.errors import exit_on_user_error
from common.publish import file_to_write, write_json_output

PROBES = (
    "data", "facts", "smoke", "parity", "architectures", "resume", "saves", "memory", "steps", "heads", "attentions",
    "ddp",
)  # fmt: skip
LARGEST_TRACE = 15 << 20  # bytes of one that is kept


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = CommandParser(__doc__, usage="probe.py PROBE [options] [--SECTION.KEY=VALUE of train/pretrain.py]")
    parser.add_argument("probe", choices=PROBES)
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="for runs and caches, on a local disk")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="a token set")
    parser.add_argument("--json", type=file_to_write, required=True, metavar="FILE", help="what was found")
    parser.add_argument("--tiny", action="store_true", help="on the CPU, with tiny sizes")
    parser.add_argument("--name", default="steps", help="of the run that steps makes")
    parser.add_argument("--traces", type=Path, metavar="DIR", help="where steps puts the run's trace")
    parser.add_argument("--micro-batch", type=int, default=8, metavar="N", help="of ddp")
    return parser.parse_known_args()


def main() -> int:
    arguments, options = parse_arguments()
    write_json_output(arguments.json, find(arguments, options))
    return 0


def find(arguments: argparse.Namespace, options: list[str]) -> Any:
    """The answer of a probe. Raises UserError, or what a kernel, compiler or driver raises."""
    if arguments.probe == "data":
        return make_data(arguments.data, tiny=arguments.tiny)
    import torch  # here, as the command line is answered first, and data need none

    device = torch.device("cpu") if arguments.tiny else torch.device("cuda", 0)
    return on_device(arguments, options, device, partial(write_json_output, arguments.json))


def make_data(folder: Path, *, tiny: bool) -> dict[str, Any]:
    """What the other checks read, where it is not there yet."""
    from train.benchmarks.campaign.data import make_hellaswag, make_tokens

    made = not (folder / "manifest.json").exists()
    if made:
        make_tokens(folder, tiny=tiny)
    questions = not hellaswag_file().exists()
    if questions:
        make_hellaswag(hellaswag_file(), 8 if tiny else 2000, tiny=tiny)
    return {"folder": str(folder), "tokens_made": made, "hellaswag_made": questions}


def on_device(arguments: argparse.Namespace, options: list[str], device: Any, note: Callable[[Any], None]) -> Any:
    """Args: note: writes down what is known so far."""
    from train.benchmarks.campaign import kernels, machine, parity, runs
    from train.benchmarks.campaign.trainers import trainers

    tiny = arguments.tiny
    if arguments.probe == "ddp":
        return kernels.ddp_of_one(device, options, micro_batch=arguments.micro_batch, tiny=tiny, note=note)
    if arguments.probe == "facts":
        return machine.facts(device, tiny=tiny)
    alone = {
        "parity": parity.parity,
        "architectures": parity.architectures,
        "heads": kernels.heads,
        "attentions": kernels.attentions,
    }
    if arguments.probe in alone:
        return alone[arguments.probe](device, tiny=tiny, note=note)
    with trainers(arguments.work, arguments.data, tiny=tiny) as started:
        if arguments.probe == "steps":
            found = runs.steps(started, arguments.name, options)
            for trace in map(Path, found["traces"]) if arguments.traces else ():
                if trace.stat().st_size <= LARGEST_TRACE:
                    shutil.copyfile(trace, arguments.traces / f"{arguments.name}-{trace.name}")
            return found
        if arguments.probe == "resume":
            return runs.resume(started, arguments.work)
        with_runs = {"smoke": runs.smoke, "saves": runs.saves, "memory": runs.memory}
        return with_runs[arguments.probe](started)


if __name__ == "__main__":
    exit_on_user_error(main)
