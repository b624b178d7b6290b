"""Texts that a model generates after prompts: shown as they are generated; or prompts asked for one after the other."""

import contextlib
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.plain_text import as_typed, print_text
from data_prep.chat.messages import USER, Message
from eval.generation.conversation import chat_tokenizer_of
from eval.generation.decoding import FULL, STOPPED, Decoding, Row
from eval.generation.options import HALF_OF_THE_CONTEXT, GenerationOptions
from eval.generation.text_stream import TextStream
from eval.shared.loading import Loaded, device_for, evaluation_dtype, load_checkpoint
from model.cpu_inference import pack
from model.devices import DeviceChoice
from model.number_formats import DtypeChoice
from model.precision import TORCH_DTYPES


@dataclass(frozen=True)
class Text:
    """One finished text. `ended`: count, end of text, stop string or context full."""

    prompt: str
    sample: int
    text: str
    tokens: int
    ended: str


def load(
    run: Path, options: GenerationOptions, device: DeviceChoice, dtype: DtypeChoice, weights: str = "trained"
) -> tuple[Loaded, GenerationOptions]:
    """The model, ready to generate, and the options with the number of tokens to forget at a time.

    Raises UserError where there is no checkpoint, or more is to be forgotten than the context holds.
    """
    loaded = load_model_for(run, device, dtype, weights)
    context = loaded.model.config.block_size
    slide = max(1, context // 2) if options.slide == HALF_OF_THE_CONTEXT else options.slide
    if slide is not None and not 1 <= slide <= context:
        raise UserError(f"--slide is {slide}: use 1 to {context}, the context in tokens")
    return loaded, replace(options, slide=slide)


def load_model_for(run: Path, device: DeviceChoice, dtype: DtypeChoice, weights: str = "trained") -> Loaded:
    """The model, ready to generate. Raises UserError where there is no checkpoint."""
    where = device_for(device)
    loaded = load_checkpoint(run, where, weights=weights)
    pack(loaded.model.to(TORCH_DTYPES[evaluation_dtype(dtype, where)]))
    return loaded


def generate_all(loaded: Loaded, prompts: list[str], options: GenerationOptions) -> dict[str, Any]:
    """Generate and show every text; return the texts and figures as JSON has them."""
    started = time.monotonic()
    texts = generate(loaded, prompts, options)
    seconds = time.monotonic() - started
    return {
        **loaded.facts,
        **asdict(options),
        "texts": [asdict(text) for text in texts],
        "seconds": seconds,
        "tokens_per_second": sum(text.tokens for text in texts) / seconds,
    }


def generate(loaded: Loaded, prompts: list[str], options: GenerationOptions) -> list[Text]:
    """Generate and show every text: a single one as it is generated, several one after the other when all are done."""
    tokenizer = loaded.tokenizer
    decoding = Decoding(
        loaded.model,
        [_ids_of(loaded, prompt, options) for prompt in prompts],
        options.sampling,
        count=options.max_tokens,
        samples=options.samples,
        seed=options.seed,
        end_ids=() if options.past_end else tokenizer.end_ids,
        slide=options.slide,
    )
    streams = [
        TextStream(tokenizer, options.stops, continues=options.chat or bool(prompts[row.prompt]))
        for row in decoding.rows
    ]
    alone = len(streams) == 1
    if alone and not options.chat:
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
        prompt = f"> {prompts[row.prompt]}\n" if options.chat else prompts[row.prompt]
        print_text(f"{rest}\n" if alone else f"── {number} of {len(streams)}\n{prompt}{stream.text}\n")
    complain(decoding.rows, loaded.model.config.block_size)
    return [
        Text(prompts[row.prompt], row.sample, stream.text, row.generated, str(row.ended))
        for row, stream in zip(decoding.rows, streams, strict=True)
    ]


def _ids_of(loaded: Loaded, prompt: str, options: GenerationOptions) -> list[int]:
    """Raises UserError where the prompt is to be a message, and the model has no template."""
    if options.chat:
        return chat_tokenizer_of(loaded).prompt_of([Message(USER, prompt)])
    return loaded.tokenizer.prompt(prompt)


def complain(rows: list[Row], block_size: int) -> None:
    full = sum(row.ended == FULL for row in rows)
    if full:
        which = "the text" if len(rows) == 1 else f"{full} of {len(rows)} texts"
        print(
            f"{which} ended where the model's context of {block_size} tokens is full: --slide continues past it",
            file=sys.stderr,
        )


def converse(loaded: Loaded, options: GenerationOptions) -> int:
    """Ask for a prompt, generate, ask again. Ctrl-C ends a text, end of input the conversation."""
    with contextlib.suppress(ImportError):  # Windows has none
        import readline  # noqa: F401 (arrow keys and history)
    while True:
        try:
            prompt = as_typed(input("> "))
        except (EOFError, KeyboardInterrupt):
            print()
            return 0
        try:
            generate(loaded, [prompt], options)
        except KeyboardInterrupt:
            print()
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
