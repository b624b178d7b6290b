"""Small tokenizers of the kinds that models on the hub have, trained in a moment: their tokenizer.json as text."""

import json
from typing import Any

CORPUS = [
    "The theory of the thing: it's there, isn't it?\n\n\tWell.\n    return x + 12345.67\n",
    "one two  three   four\r\n. Then!\n?\n.)\n\n 2024 naïve café 日本語 😀\u00a0x\n",
] * 4
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "llama3": rf"{WORDS}|\p{{N}}{{1,3}}|{REST}",
    "qwen2": rf"{WORDS}|\p{{N}}|{REST}",
    "o200k": (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "across": r"[^ ]+ [^ ]+|[\s\S]",  # of no model: lets pieces run over a space
}
BYTE_LEVEL = [*PATTERNS, "digits", "space before"]
SENTENCE_PIECE = ["prepended", "metaspace first", "metaspace always"]


def tokenizer_json(kind: str, *, special: tuple[str, ...] = ("<s>", "</s>"), begins_with: int | None = None) -> str:
    """A tokenizer's description; `begins_with` is the special token that its template puts before a text."""
    built = _byte_level(kind, special) if kind in BYTE_LEVEL else _sentence_piece(kind, special)
    if begins_with is not None:
        from tokenizers import processors

        name = special[begins_with]
        template = processors.TemplateProcessing(
            single=f"{name} $A", pair=f"{name} $A {name} $B", special_tokens=[(name, built.token_to_id(name))]
        )
        both = [processors.ByteLevel(trim_offsets=False), template]  # as Llama 3's has it
        built.post_processor = processors.Sequence(both) if kind in BYTE_LEVEL else template
    text: str = built.to_str()
    return text


def _byte_level(kind: str, special: tuple[str, ...]) -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    built = Tokenizer(models.BPE())
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if kind in PATTERNS:
        split = pre_tokenizers.Split(Regex(PATTERNS[kind]), "isolated", invert=False)
        built.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    elif kind == "digits":
        built.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    else:
        built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    built.decoder = decoders.ByteLevel()
    names = [AddedToken(name, special=True, normalized=False) for name in special]
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=names, initial_alphabet=alphabet, show_progress=False, min_frequency=1
    )
    built.train_from_iterator(CORPUS, trainer)
    return built


def _sentence_piece(kind: str, special: tuple[str, ...]) -> Any:
    """Llama 2's layout: <unk>, the special tokens, 256 bytes, then pieces in which ▁ stands for a space."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=200, show_progress=False, min_frequency=1))
    model = json.loads(trained.to_str())["model"]
    names = ["<unk>", *special, *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    vocabulary = {name: number for number, name in enumerate(names)}
    merges = [tuple(merge) for merge in model["merges"]]
    runs = ["▁▁", "▁▁▁▁"]
    vocabulary |= {name: len(vocabulary) + number for number, name in enumerate(runs)}
    merges += [("▁", "▁"), ("▁▁", "▁▁")]
    built = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if kind == "prepended":
        built.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        built.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind.split()[1], split=False)
    built.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    built.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in ("<unk>", *special)])
    return built
