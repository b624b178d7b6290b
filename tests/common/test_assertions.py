"""Assertions are for broken invariants, as `python -O` takes them away: none checks what a user or a file can cause."""

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.helpers.source_code import product_code

CALLERS = "its callers in the code"
# What a statement that does more than narrow a type rests on. A new one needs a reason why nobody outside can break it.
INVARIANTS = {
    "data_prep/tokenization/cached_files.py: hashlib.sha256(data).hexdigest() == GPT2_FILES[name]": "the merges' hash",
    "data_prep/token_sets/shard_writer.py: shard_tokens > 0": "the option's type",
    "data_prep/token_sets/shard_writer.py: split in _NAMES": CALLERS,
    "data_prep/token_sets/shard_writer.py: tokens.dtype == self.dtype": CALLERS,
    "data_prep/token_sets/sequences.py: 1 <= self.stride <= block_size": "train/settings/command_line.py",
    "eval/generation/decoding.py: not model.training": CALLERS,
    "eval/generation/decoding.py: slide is None or 1 <= slide <= model.config.block_size": "eval/generation/texts.py",
    "eval/shared/loss.py: 0 < window_count <= windows.count": "train/startup/fit_to_data.py",
    "eval/perplexity_task/measure.py: targets % length == 0": CALLERS,
    "eval/generation/text_stream.py: all(stops)": "eval/generate.py's check",
    "eval/hugging_face/tokenizer_files.py: set(shown.values()) == set(pre_tokenizers.ByteLevel.alphabet())": "its rule",
    "model/attention_masks.py: dropout == 0": CALLERS,
    "model/cache.py: lengths is None or length > 1": CALLERS,
    "model/cache.py: not (torch.is_grad_enabled() and k.requires_grad)": CALLERS,
    "model/gpt.py: positions is None": CALLERS,
    "model/gpt.py: document_ids is None": CALLERS,
    "model/messages.py: is_dataclass(value)": CALLERS,
    "train/evaluations/validation.py: result.tokens == self.measured_on['val_tokens']": "arithmetic",
    "train/checkpoints/ownership.py: not kept or shapes == shapes_of(kept.items())": "the optimizer's code",
    "train/checkpoints/writer.py: self._pending is None": CALLERS,
    "train/batches/mixture.py: levels and levels[0].start == 0": "train/startup/fit_to_data.py",
    "train/batches/mixture.py: min(counts.values()) > 0": "train/startup/fit_to_data.py",
    "train/batches/shuffle.py: count > 0": "train/startup/fit_to_data.py",
    "train/batches/prompts.py: first % self._samples == count % self._samples == 0": "train/startup/fit_to_data.py",
    "train/optimization/optimizer.py: len(owned) == len(set(owned)) and set(owned) == trainable": "arithmetic",
    "train/batches/shuffle.py: 0 < size < 1 << 62": "train/startup/fit_to_data.py",
    "train/optimization/schedule.py: 1 <= done": "arithmetic",
}


def test_every_assertion_has_a_reason() -> None:
    found = {f"{path}: {ast.unparse(test)}" for path, test in assertions() if not only_narrows(test)}
    assert found == INVARIANTS.keys()


def assertions() -> Iterator[tuple[Path, ast.expr]]:
    for path, tree in product_code():
        if "records" not in path.parts:
            yield from ((path, node.test) for node in ast.walk(tree) if isinstance(node, ast.Assert))


def only_narrows(test: ast.expr) -> bool:
    """Whether it is `x is not None`, or the kind of x: for the type checker, where the code around makes it so."""
    if isinstance(test, ast.Compare):
        return isinstance(test.ops[0], ast.IsNot)
    return isinstance(test, ast.Call) and isinstance(test.func, ast.Name) and test.func.id in ("isinstance", "callable")


def test_nothing_waits_for_an_assertion_of_its_own() -> None:
    """`except AssertionError` around one's own code is a check by assertion. (torchrun's own are its affair.)"""
    found = {
        str(path)
        for path, tree in product_code()
        for node in ast.walk(tree)
        if isinstance(node, ast.ExceptHandler) and node.type is not None and "AssertionError" in ast.unparse(node.type)
    }
    assert found <= {"train/launching/launch_options.py"}
