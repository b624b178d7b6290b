"""Talk to a model that was trained on conversations, in a terminal or from a pipe.

    python eval/chat.py runs/demo-chat
    python eval/chat.py runs/demo-chat --system "Answer in one word." --preset greedy
    printf 'What is 2+2?\\nAnd plus 3?\\n' | python eval/chat.py runs/demo-chat

Each line is a message; the answer is shown while it is generated, and the conversation so far is what the model sees.
Lines that start with / are commands: /help lists them. When the context is full, the oldest turns are forgotten, and a
note tells it. Ctrl-C ends an answer or drops the line, end of input (Ctrl-D) ends the conversation.
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
from common.plain_text import as_typed
from eval.generation.sampling_options import add_sampling, sampling_of
from eval.shared.arguments import add_device, add_dtype, add_run, require_run


def parse_arguments() -> argparse.Namespace:
    parser = CommandParser("Talk to a model that was trained on conversations.")
    add_run(parser)
    parser.add_argument("--system", metavar="TEXT", help="the system message that every conversation starts with")
    add_sampling(parser)
    parser.add_argument("--max-tokens", type=int, default=500, metavar="N", help="for each answer (default 500)")
    parser.add_argument(
        "--seed", type=int, default=0, help="the same seed and messages give the same answers (default 0)"
    )
    machine = parser.add_argument_group("where")
    add_device(machine)
    add_dtype(machine, "the weights")
    return parser.parse_args()


@advising_on_memory("give fewer --max-tokens, or --dtype bf16")
def main() -> int:
    arguments = parse_arguments()
    sampling = sampling_of(arguments)
    for name, least in (("max_tokens", 1), ("seed", 0)):
        if getattr(arguments, name) < least:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}: use {least} or more")
    if arguments.seed >= 1 << 62:
        raise UserError(f"--seed is {arguments.seed}: use less than 2^62")
    system = None if arguments.system is None else as_typed(arguments.system)
    if system is not None and not system.strip():
        raise UserError("--system is empty: leave it out")
    require_run(arguments.run)
    from eval.generation.conversation import Chat, talk  # here, as it imports torch
    from eval.generation.texts import load_model_for

    loaded = load_model_for(arguments.run, arguments.device, arguments.dtype, arguments.weights)
    return talk(Chat(loaded, sampling, arguments.max_tokens, arguments.seed, system))


if __name__ == "__main__":
    exit_on_user_error(main)
