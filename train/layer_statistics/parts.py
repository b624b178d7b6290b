"""The parts of a model that layer statistics tell apart: embedding, each block's attention and MLP, head."""

from collections.abc import Iterable

EMBEDDING, HEAD = "embedding", "head"
_OF_BLOCK = {"attn": "attn", "ln_1": "attn", "mlp": "mlp", "ln_2": "mlp"}
_OTHERS = {"wte": EMBEDDING, "wpe": EMBEDDING, "wve": EMBEDDING, "ln_f": HEAD, "lm_head": HEAD}


def part_of(name: str) -> str:
    """The part that a parameter belongs to: h.3.ln_1.weight to h.3.attn.

    A norm belongs to what it feeds, a tied table to the embedding; whatever else a model has is a part by itself.
    """
    first, *rest = name.split(".")
    if first == "h" and len(rest) > 1:
        return f"h.{rest[0]}.{_OF_BLOCK.get(rest[1], rest[1])}"
    return _OTHERS.get(first, first)


def parts_of(names: Iterable[str]) -> list[str]:
    """Each once, in the order of the parameters: from the embedding to the head."""
    return list(dict.fromkeys(map(part_of, names)))
