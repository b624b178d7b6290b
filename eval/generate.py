"""Generate text with a trained model.

    python eval/generate.py runs/demo --prompt "The function returns"
    python eval/generate.py runs/demo --prompt "def f" --preset nucleus --samples 3 --seed 7
    python eval/generate.py runs/demo --interactive
    python eval/generate.py runs/demo-chat --chat --prompt "What is 2+2?"

A prompt starts a document, as documents of the training data do. A single text is shown while it is generated.
"""

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from common.early_end import end_in_one_line

    sys.excepthook = end_in_one_line

from common.command_line import CommandParser
from common.errors import UserError, advising_on_memory, exit_on_user_error
from common.os_errors import refusal
from common.paths import expand_path
from common.plain_text import as_typed
from common.publish import write_json_output
from eval.generation.options import HALF_OF_THE_CONTEXT, GenerationOptions
from eval.generation.sampling_options import add_sampling, sampling_of
from eval.shared.arguments import add_device, add_dtype, add_json, add_run, require_run

LESS_MEMORY = "give fewer --samples and prompts at once, fewer --max-tokens, or --dtype bf16"
COMMON = ("prompt", "interactive", "chat", "preset", "temperature", "max_tokens", "samples", "seed")  # of --help


def parse_arguments() -> argparse.Namespace:
    parser = CommandParser("Generate text with a trained model.", common=COMMON)
    add_run(parser)
    source = parser.add_argument_group("the text to continue")
    source.add_argument("--prompt", action="append", metavar="TEXT", help="may be given several times")
    source.add_argument("--prompt-file", metavar="FILE", help="a prompt from this file; - is standard input")
    source.add_argument("--interactive", action="store_true", help="ask for prompts until end of input (Ctrl-D)")
    source.add_argument("--chat", action="store_true", help="each prompt is a message, by the model's chat template")
    add_sampling(parser)
    extent = parser.add_argument_group("how much, and where to stop")
    extent.add_argument("--max-tokens", type=int, default=200, metavar="N", help="for each text (default 200)")
    extent.add_argument("--samples", type=int, default=1, metavar="N", help="texts for each prompt (default 1)")
    extent.add_argument("--seed", type=int, default=0, help="the same seed gives the same texts (default 0)")
    extent.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends a text; may be repeated")
    extent.add_argument("--past-end", action="store_true", help="continue after an end of text")
    extent.add_argument(
        "--slide",
        type=int,
        nargs="?",
        const=HALF_OF_THE_CONTEXT,
        metavar="N",
        help="when the context is full, forget its N oldest tokens (default: half of it) instead of stopping",
    )
    machine = parser.add_argument_group("where")
    add_device(machine)
    add_dtype(machine, "the weights")
    add_json(parser, "texts and figures")
    return parser.parse_args()


@advising_on_memory(LESS_MEMORY)
def main() -> int:
    arguments = parse_arguments()
    if arguments.interactive and (arguments.prompt or arguments.prompt_file or arguments.json):
        raise UserError("--interactive asks for prompts itself: leave out --prompt, --prompt-file and --json")
    prompts = [] if arguments.interactive else read_prompts(arguments)
    options = options_of(arguments)
    require_run(arguments.run)
    from eval.generation.texts import converse, generate_all, load  # here, as it imports torch

    loaded, options = load(arguments.run, options, arguments.device, arguments.dtype, arguments.weights)
    if arguments.interactive:
        return converse(loaded, options)
    report = generate_all(loaded, prompts, options)
    if arguments.json:
        write_json_output(arguments.json, report)
    return 0


def read_prompts(arguments: argparse.Namespace) -> list[str]:
    """The prompts of the command line. Raises UserError where there are none or a file can't be read."""
    prompts = [as_typed(prompt) for prompt in arguments.prompt or []]
    if arguments.prompt_file == "-":
        prompts.append(as_typed(sys.stdin.read()).removeprefix("\ufeff"))
    elif arguments.prompt_file:
        try:
            prompts.append(expand_path(arguments.prompt_file).read_text(encoding="utf-8-sig"))
        except OSError as error:
            raise UserError(refusal("read", error, arguments.prompt_file, otherwise="name another file")) from None
        except UnicodeDecodeError as error:
            raise UserError(f"{arguments.prompt_file} is not UTF-8 text ({error}): save it as such") from None
    if not prompts:
        raise UserError('no prompt: give --prompt "…", --prompt-file FILE or --interactive')
    return prompts


def options_of(arguments: argparse.Namespace) -> GenerationOptions:
    """The options. Raises UserError for impossible numbers."""
    for name, least in (("max_tokens", 1), ("samples", 1), ("seed", 0)):
        if getattr(arguments, name) < least:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}: use {least} or more")
    if arguments.seed >= 1 << 63:
        raise UserError("--seed is {arguments.seed}: use less than 2^63")
    if not all(arguments.stop):
        raise UserError("--stop is empty: give the text to stop at")
    return GenerationOptions(
        sampling_of(arguments),
        arguments.max_tokens,
        arguments.samples,
        arguments.seed,
        tuple(as_typed(stop) for stop in arguments.stop),
        arguments.past_end,
        arguments.slide,
        arguments.chat,
    )


if __name__ == "__main__":
    exit_on_user_error(main)
