"""Longhaul, `transformers` and re-running the context take turns: `bench_generate.py` without its command line."""

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from common.errors import UserError
from common.missing_packages import install_command
from common.progress import progress_bar
from common.publish import write_json_output, write_json_whole
from eval.generation.decoding import Decoding
from eval.generation.options import Sampling
from eval.hugging_face.hf_config import to_config
from eval.hugging_face.hf_tensors import to_tensors
from eval.shared.loading import device_for, load_checkpoint
from model.config import preset_config
from model.cpu_inference import pack
from model.gpt import GPT
from model.initialisation import initialise
from model.precision import TORCH_DTYPES

LONGHAUL, TRANSFORMERS, RERUN = "longhaul", "transformers", "rerun"
Contestant = Callable[[], list[list[int]]]


@dataclass(frozen=True)
class Figure:
    """Tokens per second of each contestant in one setting, over prefill and decoding together.

    `same_texts`: the fraction of tokens in which Longhaul and transformers agree (rounding decides near ties).
    """

    batch: int
    threads: int
    tokens_per_second: dict[str, float]
    times_transformers: float
    times_rerun: float | None
    same_texts: float


def compare_generation(arguments: argparse.Namespace) -> None:
    if min(*arguments.batch, *arguments.threads, arguments.tokens, arguments.prompt_tokens, arguments.turns) < 1:
        raise UserError("--batch, --threads, --tokens, --prompt-tokens and --turns take 1 or more: give such")
    device = device_for(arguments.device)
    model = build_model(arguments, device)
    if arguments.prompt_tokens + arguments.tokens > model.config.block_size:
        raise UserError(f"prompt and text must fit into the model's context of {model.config.block_size} tokens")
    theirs = load_in_transformers(model)
    packed = pack(model)
    figures = []
    total = len(arguments.batch) * len(arguments.threads) * arguments.turns
    with progress_bar(total, "turn", "benchmark") as bar:
        for threads in arguments.threads:
            torch.set_num_threads(threads)
            for batch in arguments.batch:
                contestants = contestants_of(model, theirs, batch, arguments)
                figures.append(measure(contestants, batch, threads, arguments, bar))
    print_figures(figures)
    if arguments.json:
        setting = {"model": asdict(model.config), "dtype": arguments.dtype, "device": str(device)}
        setting |= {
            "packed": packed,
            "prompt_tokens": arguments.prompt_tokens,
            "tokens": arguments.tokens,
            "torch": torch.__version__,
        }
        write_json_output(arguments.json, setting | {"figures": [asdict(figure) for figure in figures]})


def build_model(arguments: argparse.Namespace, device: torch.device) -> GPT:
    if arguments.run:
        model = load_checkpoint(arguments.run).model
    else:
        try:
            model = GPT(preset_config(arguments.preset))
        except ValueError as error:
            raise UserError(str(error)) from None
        initialise(model, 0)
    return model.to(device, TORCH_DTYPES[arguments.dtype]).eval()


def load_in_transformers(model: GPT) -> Any:
    """The same weights, dtype and device in `transformers`. Raises UserError where it is not installed."""
    try:
        import transformers
    except ImportError:
        raise UserError(f"transformers is not installed: {install_command(['transformers'])}") from None
    transformers.utils.logging.disable_progress_bar()
    parameters = {name: parameter.detach().float() for name, parameter in model.named_parameters()}
    with tempfile.TemporaryDirectory() as folder:
        save_file(to_tensors(model.config, parameters), Path(folder) / "model.safetensors", metadata={"format": "pt"})
        write_json_whole(Path(folder) / "config.json", to_config(model.config, None))
        theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return theirs.to(model.wte.weight.device, model.wte.weight.dtype).eval()


def contestants_of(model: GPT, theirs: Any, batch: int, arguments: argparse.Namespace) -> dict[str, Contestant]:
    """The contestants by name: each generates the tokens after the prompts, (B, T) to (B, tokens)."""
    generator = torch.Generator().manual_seed(batch)
    shape = (batch, arguments.prompt_tokens)
    prompts = torch.randint(0, model.config.vocab_size, shape, generator=generator)  # (B, T)
    prompts, count = prompts.to(model.wte.weight.device), arguments.tokens
    contestants = {
        LONGHAUL: lambda: generate_cached(model, prompts, count),
        TRANSFORMERS: lambda: generate_with_transformers(theirs, prompts, count),
    }
    return (
        contestants
        if arguments.no_rerun
        else contestants | {RERUN: lambda: generate_by_rerunning(model, prompts, count)}
    )


def generate_cached(model: GPT, prompts: Tensor, count: int) -> list[list[int]]:
    decoding = Decoding(model, prompts.tolist(), Sampling(temperature=0.0), count=count)
    for _ in decoding:
        pass
    return [row.continuation for row in decoding.rows]


@torch.no_grad()
def generate_with_transformers(theirs: Any, prompts: Tensor, count: int) -> list[list[int]]:
    generated = theirs.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=False,
        max_new_tokens=count,
        min_new_tokens=count,
        use_cache=True,
    )
    texts: list[list[int]] = generated[:, prompts.shape[1] :].tolist()
    return texts


@torch.no_grad()
def generate_by_rerunning(model: GPT, prompts: Tensor, count: int) -> list[list[int]]:
    """`count` tokens after each prompt (B, T), without a cache: the whole text through the model for every token."""
    tokens = prompts
    for _ in range(count):
        chosen = model.logits(model.hidden(tokens)[:, -1]).argmax(dim=-1, keepdim=True)  # (B, 1)
        tokens = torch.cat((tokens, chosen), dim=1)
    generated: list[list[int]] = tokens[:, prompts.shape[1] :].tolist()
    return generated


def measure(
    contestants: dict[str, Contestant], batch: int, threads: int, arguments: argparse.Namespace, bar: Any
) -> Figure:
    """Let them take turns; tokens/s of each one's fastest."""
    fastest = dict.fromkeys(contestants, float("inf"))
    texts = {}
    for _ in range(arguments.turns):
        for name, write in contestants.items():
            started = time.perf_counter()
            texts[name] = write()  # ends with the tokens on the CPU, so a GPU has finished too
            fastest[name] = min(fastest[name], time.perf_counter() - started)
        bar.update(1)
    speed = {name: batch * arguments.tokens / seconds for name, seconds in fastest.items()}
    ours, theirs = torch.tensor(texts[LONGHAUL]), torch.tensor(texts[TRANSFORMERS])
    return Figure(
        batch=batch,
        threads=threads,
        tokens_per_second=speed,
        times_transformers=speed[LONGHAUL] / speed[TRANSFORMERS],
        times_rerun=speed[LONGHAUL] / speed[RERUN] if RERUN in speed else None,
        same_texts=float((ours == theirs).float().mean()),
    )


def print_figures(figures: list[Figure]) -> None:
    print("threads  batch   tokens/s   ×transformers   ×re-running   same tokens")
    for figure in figures:
        rerun = "-" if figure.times_rerun is None else f"{figure.times_rerun:.2f}"
        print(
            f"{figure.threads:7}  {figure.batch:5}  {figure.tokens_per_second[LONGHAUL]:9.1f}  "
            f"{figure.times_transformers:14.2f}  {rerun:>12}  {figure.same_texts:12.1%}"
        )
