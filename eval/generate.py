"""Let a trained model write.

    python eval/generate.py runs/demo --prompt "The function returns"
    python eval/generate.py runs/demo --prompt "def f" --preset nucleus --samples 3 --seed 7
    python eval/generate.py runs/demo --interactive

A prompt begins a document, as documents of the training data do. One text is shown while it is written.
"""

import argparse
import contextlib
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

if __package__ in (None, ""):  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.command_line import CommandParser
from common.errors import UserError, advising_on_memory, exit_on_user_error
from common.os_errors import refusal
from common.paths import expand_path
from common.plain_text import as_typed, print_text
from common.publish import write_json_output
from eval.generation.decoding import FULL, STOPPED, Decoding, Row
from eval.generation.sampling import Sampling
from eval.generation.text_stream import TextStream
from eval.shared.arguments import add_device, add_dtype, add_json, add_run
from eval.shared.loading import Loaded, device_for, load_checkpoint
from model.cpu_inference import pack
from model.precision import TORCH_DTYPES

LESS_MEMORY = "give fewer --samples and prompts at once, fewer --max-tokens, or --dtype bf16"
PRESETS = {
    "greedy": Sampling(temperature=0.0),
    "conservative": Sampling(temperature=0.6, top_k=40),
    "nucleus": Sampling(temperature=0.8, top_p=0.9),
}
OVERRIDES = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")  # options that replace a preset's


@dataclass(frozen=True)
class Wish:
    """What is to be written, apart from the prompts."""

    sampling: Sampling
    max_tokens: int
    samples: int
    seed: int
    stops: tuple[str, ...]
    past_end: bool
    slide: int | None


@dataclass(frozen=True)
class Text:
    """One finished text. `ended`: count, end of text, stop string or context full."""

    prompt: str
    sample: int
    text: str
    tokens: int
    ended: str


def parse_arguments() -> argparse.Namespace:
    parser = CommandParser("Let a trained model write.")
    add_run(parser)
    source = parser.add_argument_group("what to go on from")
    source.add_argument("--prompt", action="append", metavar="TEXT", help="may be given several times: side by side")
    source.add_argument("--prompt-file", metavar="FILE", help="a prompt from this file; - is standard input")
    source.add_argument("--interactive", action="store_true", help="ask for prompts until end of input (Ctrl-D)")
    choice = parser.add_argument_group("how tokens are chosen")
    choice.add_argument(
        "--preset",
        choices=sorted(PRESETS),
        default="nucleus",
        help="greedy; conservative (temperature 0.6, top-k 40); nucleus (temperature 0.8, top-p 0.9, the default); "
        "the options below replace its values",
    )
    choice.add_argument("--temperature", type=float, metavar="T", help="0 takes the most likely token")
    choice.add_argument("--top-k", type=int, metavar="K", help="only the K most likely tokens; 0: all")
    choice.add_argument("--top-p", type=float, metavar="P", help="only the nucleus of probability P; 1: all")
    choice.add_argument("--min-p", type=float, metavar="P", help="only tokens P times as likely as the likeliest")
    choice.add_argument("--repetition-penalty", type=float, metavar="R", help="above 1: repeat less")
    extent = parser.add_argument_group("how much, and where to stop")
    extent.add_argument("--max-tokens", type=int, default=200, metavar="N", help="for each text (default 200)")
    extent.add_argument("--samples", type=int, default=1, metavar="N", help="texts for each prompt (default 1)")
    extent.add_argument("--seed", type=int, default=0, help="the same seed, the same texts (default 0)")
    extent.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends a text; may be repeated")
    extent.add_argument("--past-end", action="store_true", help="write on after an end of text")
    extent.add_argument(
        "--slide",
        type=int,
        nargs="?",
        const=-1,
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
        raise UserError("--interactive asks for its prompts itself: leave out --prompt, --prompt-file and --json")
    prompts = [] if arguments.interactive else read_prompts(arguments)
    sampling = sampling_of(arguments)
    loaded = load_checkpoint(arguments.run, device_for(arguments.device))
    pack(loaded.model.to(TORCH_DTYPES[arguments.dtype]))
    wish = wish_of(arguments, sampling, loaded.model.config.block_size)
    if arguments.interactive:
        return converse(loaded, wish)
    started = time.monotonic()
    texts = write(loaded, prompts, wish)
    seconds = time.monotonic() - started
    if arguments.json:
        report = {
            "checkpoint": str(loaded.checkpoint),
            "step": loaded.manifest["step"],
            **asdict(wish),
            "texts": [asdict(text) for text in texts],
            "seconds": seconds,
            "tokens_per_second": sum(text.tokens for text in texts) / seconds,
        }
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
            raise UserError(f"{arguments.prompt_file} is no UTF-8 text ({error}): save it as such") from None
    if not prompts:
        raise UserError('nothing to go on from: give --prompt "…", --prompt-file FILE or --interactive')
    return prompts


def sampling_of(arguments: argparse.Namespace) -> Sampling:
    given = {name: value for name in OVERRIDES if (value := getattr(arguments, name)) is not None}
    return replace(PRESETS[arguments.preset], **given)


def wish_of(arguments: argparse.Namespace, sampling: Sampling, block_size: int) -> Wish:
    """Raises UserError for numbers that can't be."""
    for name, least in (("max_tokens", 1), ("samples", 1), ("seed", 0)):
        if getattr(arguments, name) < least:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}; it must be at least {least}")
    if arguments.seed >= 1 << 63:
        raise UserError("--seed must be below 2^63")
    if not all(arguments.stop):
        raise UserError("--stop is empty: give the text to stop at")
    slide = max(1, block_size // 2) if arguments.slide == -1 else arguments.slide
    if slide is not None and not 1 <= slide <= block_size:
        raise UserError(f"--slide is {slide}; it must be between 1 and the context of {block_size} tokens")
    return Wish(
        sampling,
        arguments.max_tokens,
        arguments.samples,
        arguments.seed,
        tuple(as_typed(stop) for stop in arguments.stop),
        arguments.past_end,
        slide,
    )


def write(loaded: Loaded, prompts: list[str], wish: Wish) -> list[Text]:
    """Write and show every text: a single one as it comes, several one after the other when all are done."""
    tokenizer = loaded.tokenizer
    decoding = Decoding(
        loaded.model,
        [tokenizer.prompt(prompt) for prompt in prompts],
        wish.sampling,
        count=wish.max_tokens,
        samples=wish.samples,
        seed=wish.seed,
        end_ids=() if wish.past_end else tokenizer.end_ids,
        slide=wish.slide,
    )
    streams = [TextStream(tokenizer, wish.stops, continues=bool(prompts[row.prompt])) for row in decoding.rows]
    alone = len(streams) == 1
    if alone:
        print_text(prompts[0])
    for step in decoding:
        for index, token in step:
            new = streams[index].push(token)
            if alone:
                print_text(new)
            if streams[index].stopped:
                decoding.finish(index)
    for number, (row, stream) in enumerate(zip(decoding.rows, streams, strict=True), 1):
        rest = stream.finish()
        if stream.stopped:
            row.ended = STOPPED
        print_text(f"{rest}\n" if alone else f"── {number} of {len(streams)}\n{prompts[row.prompt]}{stream.text}\n")
    complain(decoding.rows, loaded.model.config.block_size)
    return [
        Text(prompts[row.prompt], row.sample, stream.text, row.written, str(row.ended))
        for row, stream in zip(decoding.rows, streams, strict=True)
    ]


def complain(rows: list[Row], block_size: int) -> None:
    full = sum(row.ended == FULL for row in rows)
    if full:
        which = "the text" if len(rows) == 1 else f"{full} of {len(rows)} texts"
        print(
            f"{which} ended where the model's context of {block_size} tokens is full: --slide goes on past it",
            file=sys.stderr,
        )


def converse(loaded: Loaded, wish: Wish) -> int:
    """Ask for a prompt, write, ask again. Ctrl-C ends a text, end of input the conversation."""
    with contextlib.suppress(ImportError):  # Windows has none
        import readline  # noqa: F401 (arrow keys and history)
    while True:
        try:
            prompt = as_typed(input("> "))
        except (EOFError, KeyboardInterrupt):
            print()
            return 0
        try:
            write(loaded, [prompt], wish)
        except KeyboardInterrupt:
            print()
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)


if __name__ == "__main__":
    exit_on_user_error(main)
