"""The reward of the record: 1 for the right sum and nothing else, 0 otherwise."""

from typing import Any


def exact_answer(prompts: list[str], completions: list[str], fields: list[dict[str, Any]]) -> list[float]:
    return [float(text == field["answer"]) for text, field in zip(completions, fields, strict=True)]
