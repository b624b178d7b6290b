"""The options by which commands choose how tokens are drawn; without torch."""

import argparse
from dataclasses import replace

from eval.generation.options import Sampling

PRESETS = {
    "greedy": Sampling(temperature=0.0),
    "conservative": Sampling(temperature=0.6, top_k=40),
    "nucleus": Sampling(temperature=0.8, top_p=0.9),
}
OVERRIDES = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")  # options that replace a preset's


def add_sampling(parser: argparse.ArgumentParser) -> None:
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


def sampling_of(arguments: argparse.Namespace) -> Sampling:
    """Raises UserError for an impossible value."""
    given = {name: value for name in OVERRIDES if (value := getattr(arguments, name)) is not None}
    return replace(PRESETS[arguments.preset], **given)
