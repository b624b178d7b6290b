"""Tiny token sets of conversations for tests, made through the real renderer and writer."""

from pathlib import Path

import numpy as np

from data_prep.chat.chat_tokenizer import ChatTokenizer
from data_prep.chat.messages import ASSISTANT, USER, Message
from data_prep.chat.template import Template
from data_prep.corpora.preparation import finish_set
from data_prep.token_sets.manifest import PREFERENCES, marks_of
from data_prep.token_sets.marked_writer import MarkedWriter, with_marks
from data_prep.token_sets.token_set import TokenSet
from data_prep.tokenization.tokenizer import CharTokenizer

SYMBOLS = "".join(map(chr, range(32, 127))) + "\n"
SHORT = (  # as short as a template can be: rows of few tokens hold several conversations
    "{% for message in messages %}{{ ('<|user|>' if message['role'] == 'user' else '<|bot|>') + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|bot|>' }}{% endif %}"
)


def short_tokenizer() -> ChatTokenizer:
    """Printable ASCII, and the tokens of SHORT."""
    return ChatTokenizer.of(CharTokenizer(SYMBOLS, end_of_text=True), Template(SHORT))


def make_conversation_set(
    folder: Path, *, count: int = 300, val_count: int = 30, seed: int = 0, silent: int = 0, shard_tokens: int = 2_000
) -> TokenSet:
    """Sums of small numbers with more or less around them, in one or two turns.

    Args: silent: how many conversations of 63 tokens stand in front of which nothing counts, as no preparation makes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer, generator = short_tokenizer(), np.random.default_rng(seed)
    splits = {}
    for split, number in (("train", count), ("val", val_count)):
        with MarkedWriter(folder, split, tokenizer, shard_tokens) as writer:
            for _ in range(silent if split == "train" else 0):
                ids = tokenizer.encode("x" * 63)
                writer.write(with_marks(ids, np.zeros(len(ids), dtype=bool)))
            for _ in range(number):
                turns: list[Message] = []
                for _ in range(int(generator.integers(1, 3))):
                    a, b = generator.integers(0, 20, 2).tolist()
                    turns += [
                        Message(USER, f"{a}+{b}" + "?" * int(generator.integers(0, 9))),
                        Message(ASSISTANT, str(a + b)),
                    ]
                rendered = tokenizer.render(turns)
                writer.write(with_marks(rendered.ids, rendered.counted))
        splits |= {split: tuple(writer.shards), marks_of(split): tuple(writer.marks)}
    finish_set(folder, tokenizer, {"name": "test", "seed": seed}, [], splits, marked=True)
    return TokenSet.open(folder)


def make_pairs(folder: Path, *, count: int = 40, seed: int = 0) -> TokenSet:
    """Sums, of which the chosen answer is right, and the rejected one is not and often longer."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer, generator, splits = short_tokenizer(), np.random.default_rng(seed), {}
    for split, number in (("train", count), ("val", 9)):
        with MarkedWriter(folder, split, tokenizer, 2_000) as writer:
            for _ in range(number):
                a, b = generator.integers(0, 20, 2).tolist()
                asked = Message(USER, f"{a}+{b}" + "?" * int(generator.integers(0, 9)))
                for answer in (str(a + b), f"{a * b}" + "!" * int(generator.integers(0, 4))):
                    rendered = tokenizer.render([asked, Message(ASSISTANT, answer)])
                    writer.write(with_marks(rendered.ids, rendered.counted))
        splits |= {split: tuple(writer.shards), marks_of(split): tuple(writer.marks)}
    finish_set(folder, tokenizer, {"name": PREFERENCES, "seed": seed}, [], splits, marked=True)
    return TokenSet.open(folder)
