"""The configuration made to fit the training data."""

import itertools
from dataclasses import replace

from common.errors import UserError
from data_prep.token_sets.manifest import document_start
from data_prep.token_sets.token_mix import sources_of
from data_prep.token_sets.token_set import TokenSet
from train.settings.sections import Config


def fit_to_data(config: Config, tokens: TokenSet) -> Config:
    """Give the model the vocabulary of the data's tokenizer, and settle whether attention stays inside documents.

    Raises UserError where the configuration asks for another vocabulary, or for documents that the data don't mark, or
    the data hold too few tokens for one step.
    """
    vocab_size = tokens.tokenizer_spec["vocab_size"]
    if config.model.vocab_size not in (type(config.model)().vocab_size, vocab_size):
        raise UserError(
            f"model.vocab_size is {config.model.vocab_size}, but the tokenizer of {tokens.folder} has {vocab_size} "
            "ids: leave model.vocab_size out"
        )
    length = config.model.block_size
    alone = not config.data.mix
    wanted = (("train", (config.batch.tokens_per_step if alone else length) + 1), ("val", length + 1))
    for source, (split, needed) in itertools.product(sources_of(tokens), wanted):
        found, folder = len(source.tokens.split(split)), source.tokens.folder
        if not found:
            raise UserError(
                f"{folder} has no {split} split: make the set from more documents, or from one long text with "
                "data_prep/shakespeare.py --file"
            )
        if found < needed:
            raise UserError(
                f"{folder} has {found:,} tokens in its {split} split, but one "
                f"{'step' if split == 'train' and alone else 'sequence'} needs {needed:,}: prepare more, or lower "
                f"{'batch.tokens_per_step' if split == 'train' and alone else 'model.block_size'}"
            )
    masked, packed = config.data.masks_documents, config.data.is_packed
    measured = config.eval.masked_loss is True
    if (masked or packed or measured) and document_start(tokens.tokenizer_spec) is None:
        asked = "data.packing whole_documents" if packed else "data.document_mask" if masked else "eval.masked_loss"
        raise UserError(
            f"{asked} needs documents, but the tokenizer of {tokens.folder} has no end-of-text token: leave it out"
        )
    data = replace(config.data, document_mask=masked)
    return replace(config, data=data, model=replace(config.model, vocab_size=vocab_size))
