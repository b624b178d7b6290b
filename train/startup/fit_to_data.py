"""The configuration made to fit the training data."""

from dataclasses import replace

from common.errors import UserError
from data_prep.token_sets.manifest import document_start
from data_prep.token_sets.token_set import TokenSet
from train.settings.sections import Config


def fit_to_data(config: Config, tokens: TokenSet) -> Config:
    """Give the model the vocabulary of the data's tokenizer.

    Raises UserError where the configuration asks for another one, or the data hold too few tokens for one step.
    """
    vocab_size = tokens.tokenizer_spec["vocab_size"]
    if config.model.vocab_size not in (type(config.model)().vocab_size, vocab_size):
        raise UserError(
            f"model.vocab_size is {config.model.vocab_size}, but the tokenizer of {tokens.folder} has {vocab_size} "
            "ids: leave model.vocab_size out"
        )
    length = config.model.block_size
    for split, needed in (("train", config.batch.tokens_per_step + 1), ("val", length + 1)):
        found = len(tokens.split(split))
        if not found:
            raise UserError(
                f"{tokens.folder} has no {split} split: make the set from more documents, or from one long text with "
                "data_prep/shakespeare.py --file"
            )
        if found < needed:
            raise UserError(
                f"{tokens.folder} has {found:,} tokens in its {split} split, but one step needs {needed:,}: "
                f"prepare more, or lower {'batch.tokens_per_step' if split == 'train' else 'model.block_size'}"
            )
    if config.data.document_mask and document_start(tokens.tokenizer_spec) is None:
        raise UserError(
            f"data.document_mask needs documents, but the tokenizer of {tokens.folder} has no end-of-text token: leave "
            "it out"
        )
    return replace(config, model=replace(config.model, vocab_size=vocab_size))
