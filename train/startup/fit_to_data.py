"""The data that a run reads, one token set or a mix of several, and the configuration made to fit them."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from common.errors import UserError
from data_prep.token_sets.manifest import document_start
from data_prep.token_sets.token_mix import Source, TokenMix, sources_of
from data_prep.token_sets.token_set import TokenSet, find_token_set
from train.batches.mixture import Level, Mixture, levels_of_mix
from train.settings.sections import Config, DataConfig

OF_GRPO, OF_PPO = ("deviation_term", "length_term"), ("gamma", "gae_lambda", "value_clip", "value_weight")
MANY_EPOCHS = 4.0  # up to which repeated text is nearly as good as new (Muennighoff et al. 2023, arXiv:2305.16264)


def fit_to_data(config: Config, tokens: TokenSet, known: int | None = None) -> Config:
    """Give the model the vocabulary of the data's tokenizer, and settle whether attention stays inside documents.

    With sft conversations are packed whole, and attention stays inside them.

    Args:
        known: the vocabulary of the weights that the run starts from, which the data's may extend.

    Raises UserError where the configuration asks for another vocabulary, or for documents that the data don't mark, or
    the data hold too few tokens for one step, or are not what the objective learns from.
    """
    config = _fit_to_objective(config, tokens)
    vocab_size = tokens.tokenizer_spec["vocab_size"]
    config = config.for_tokenizer(tokens.tokenizer_spec)
    if config.model.vocab_size not in (type(config.model)().vocab_size, vocab_size, known):
        raise UserError(
            f"model.vocab_size is {config.model.vocab_size}, but the tokenizer of {tokens.folder} has {vocab_size} "
            "ids: leave model.vocab_size out"
        )
    length = config.model.block_size
    alone = not config.data.mix
    whole = config.objective.kind != "language_modelling"  # padded, however short
    wanted = (
        (
            "train",
            1 if whole and config.objective.kind != "sft" else (config.batch.tokens_per_step if alone else length) + 1,
        ),
        ("val", 1 if whole else length + 1),
    )
    for source, (split, needed) in itertools.product(sources_of(tokens), wanted):
        found, folder = len(source.tokens.split(split)), source.tokens.folder
        if not found:
            raise UserError(
                f"{folder} has no {split} split: make the set from more documents or with a smaller --val-one-in, or "
                "from one long text with data_prep/shakespeare.py --file"
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


def _fit_to_objective(config: Config, tokens: TokenSet) -> Config:
    """Raises UserError where the data are not what it learns from, or it is asked for another packing."""
    kind, data = config.objective.kind, config.data
    answers = kind != "language_modelling"
    for source in sources_of(tokens):
        if source.tokens.has_conversations != answers:
            what = "prompts" if config.objective.rolls_out else "answers"
            makes = "preferences" if config.objective.compares else "conversations"
            raise UserError(
                f"{source.tokens.folder} does not mark {what}, which --objective {kind} learns from: make a set of "
                f"{makes} with data_prep/{makes}.py"
                if answers
                else f"{source.tokens.folder} holds conversations: add --objective sft, which learns their answers only"
            )
        if source.tokens.has_pairs and config.objective.rolls_out:
            raise UserError(
                f"{source.tokens.folder} holds preferences: make a set of prompts with data_prep/prompts.py"
            )
        if source.tokens.has_pairs and kind == "sft":
            raise UserError(
                f"{source.tokens.folder} holds preferences: --objective sft would learn the rejected answers, too: "
                "make a set of conversations with data_prep/conversations.py"
            )
        counts = source.tokens.manifest.conversations
        if kind == "sft" and counts is not None and not counts["train"]["answer_tokens"]:
            raise UserError(
                f"{source.tokens.folder} holds prompts without answers: --objective grpo and ppo answer them, but "
                "--objective sft needs conversations"
            )
        if config.objective.compares and not source.tokens.has_pairs:
            raise UserError(
                f"{source.tokens.folder} holds no preferences, which --objective {kind} learns from: make a set of "
                "them with data_prep/preferences.py"
            )
    if config.objective.compares:
        return _fit_to_pairs(config)
    if config.objective.rolls_out:
        return _fit_to_rollouts(config, tokens)
    if kind != "sft":
        return config
    if data.stride is not None or data.document_mask is False:
        option = "data.stride" if data.stride is not None else "data.document_mask false"
        raise UserError(f"{option} doesn't go with --objective sft, which keeps conversations whole: leave it out")
    return replace(config, data=replace(data, packing="whole_documents", document_mask=True))


def _refuse_unused(config: Config, why_exact: str) -> None:
    """Raises UserError for options that rollouts and pairs can't have.

    Args: why_exact: why dropout is one of them, where the objective is exact.
    """
    kind, data = config.objective.kind, config.data
    unused = {
        "data.mix": bool(data.mix),
        "data.stride": data.stride is not None,
        "data.packing": data.is_packed,
        "data.document_mask": data.document_mask is True,
        "batch.warmup": bool(config.batch.warmup),
        "optim.z_loss": config.optim.z_loss > 0,
        "run.on_spike": config.run.on_spike != "record",
    }
    if found := next((name for name, is_set in unused.items() if is_set), None):
        raise UserError(f"{found} doesn't go with --objective {kind}: leave it out")
    adapters = config.adapters()
    for name, dropout in (("model", config.model.dropout), ("lora", adapters.dropout if adapters else 0.0)):
        if dropout and config.objective.is_exact:
            raise UserError(
                f"{name}.dropout is {dropout}, but with --objective {kind} {why_exact}: use --{name}.dropout 0"
            )


def _fit_to_pairs(config: Config) -> Config:
    """With the batch of so many pairs: either answer is a sequence of `model.block_size` tokens.

    Raises UserError for options that pairs have no use for.
    """
    scores = config.objective.scores
    _refuse_unused(config, "what the start policy thought of the answers must be exact")
    batch = config.batch
    if isinstance(batch.micro_batch, int) and batch.micro_batch % 2:
        raise UserError(
            f"batch.micro_batch is {batch.micro_batch}, but pairs of two sequences stay together: use an even number"
        )
    tokens = 2 * batch.pairs_per_step * config.model.block_size
    return replace(
        config,
        batch=replace(batch, tokens_per_step=tokens),
        data=replace(config.data, document_mask=False),
        model=replace(config.model, scalar_head=scores),
    )


def _fit_to_rollouts(config: Config, tokens: TokenSet) -> Config:
    """With the batch that section rollout states: every answer is a sequence of `model.block_size` tokens.

    Raises UserError for a mistake in that section, a reward model that reads other ids, and options that rollouts have
    no use for.
    """
    from train.objectives.rewards import check_models, load_rewards  # which needs no torch

    rollout, data = config.rollout, config.data
    _refuse_unused(config, "the policy that learns must be the one that answers")
    kind, as_it_is = config.objective.kind, type(rollout)()
    for name in OF_PPO if kind == "grpo" else OF_GRPO:
        if getattr(rollout, name) != getattr(as_it_is, name):
            raise UserError(f"rollout.{name} doesn't go with --objective {kind}: leave it out")
    if kind == "grpo" and rollout.samples < 2:
        raise UserError(f"rollout.samples is {rollout.samples}: use 2 or more, as grpo compares answers in groups")
    if rollout.max_tokens >= config.model.block_size:
        raise UserError(
            f"rollout.max_tokens is {rollout.max_tokens}, which leaves no room for prompts in model.block_size "
            f"{config.model.block_size}: use less"
        )
    check_models(load_rewards(rollout.reward), tokens.tokenizer_spec, config.model.block_size)
    size = rollout.sequences // rollout.minibatches
    if isinstance(config.batch.micro_batch, int) and size % config.batch.micro_batch:
        raise UserError(
            f"batch.micro_batch is {config.batch.micro_batch}, which doesn't divide the {size} answers of an update "
            "(rollout.prompts_per_step times rollout.samples, by rollout.minibatches): use a divisor"
        )
    return replace(
        config,
        batch=replace(config.batch, tokens_per_step=rollout.sequences * config.model.block_size),
        data=replace(data, document_mask=False),
        model=replace(config.model, scalar_head=config.objective.learns_scalar_head),
    )


def open_data(config: Config) -> TokenSet:
    """Raises UserError where a set is missing or damaged, or the sets of a mix have different tokenizers."""
    data = config.data
    if not data.mix:
        return TokenSet.open(find_token_set(data.path))
    total = sum(source.weight for source in data.mix)
    sources = [
        Source(source.name, TokenSet.open(find_token_set(source.path)), source.weight / total, source.max_epochs)
        for source in data.mix
    ]
    levels = levels_of_mix(*data.planned_mix, config.model.block_size)
    return TokenMix(sources, [[level.start, list(level.shares)] for level in levels])


def mixture_of(tokens: TokenSet, first: Mapping[str, int]) -> Mixture | None:
    """The order of a mix's sources; None for a single set. Args: first: where each starts, by name; else at 0."""
    if not isinstance(tokens, TokenMix):
        return None
    return _mixture(tokens.order, [first.get(source.name, 0) for source in tokens.sources])


def _mixture(order: Any, first: list[int]) -> Mixture:
    return Mixture([Level(start, tuple(shares)) for start, shares in order], first)


@dataclass(frozen=True)
class MixStart:
    """Where a mix starts.

    Attributes:
        first: by a source's name, the sequence that is its first here; those not named start at 0.
        elsewhere: by a set's identity, how many sequences the run has read of sets that this mix leaves out.
    """

    first: dict[str, int] = field(default_factory=dict)
    elsewhere: dict[str, int] = field(default_factory=dict)

    def stated(self, config: Config) -> Config:
        """The configuration with the starts, where there are any."""
        if not any(self.first.values()):
            return config
        mix = [replace(source, start=self.first.get(source.name, 0)) for source in config.data.mix]
        return replace(config, data=replace(config.data, mix=mix))


def mix_facts(tokens: TokenSet, start: MixStart) -> dict[str, Any]:
    """What a checkpoint's manifest records of a mix: its order, its sets, and where each started."""
    if not isinstance(tokens, TokenMix):
        return {}
    starts = {source.name: start.first.get(source.name, 0) for source in tokens.sources}
    sets = list(tokens.identities.items())
    return {"mix": {"order": tokens.order, "sets": sets, "first": starts, "elsewhere": start.elsewhere}}


def start_of_mix(
    tokens: TokenSet, manifest: Mapping[str, Any] | None, *, same_sequences: bool, data: DataConfig | None = None
) -> tuple[MixStart, list[str]]:
    """Where each source of a mix starts, and lines for the log.

    What a run has read before its mix changed is not read again before its epoch ends: a source that it has read, in
    another mix or by itself, continues, also one that a mix between has left out.

    Args:
        manifest: of the checkpoint that is resumed; None for a new run.
        same_sequences: the checkpoint's run cut its sets into the same sequences, in the same order.
        data: of the configuration, whose mix may give a `start`.

    Raises UserError where another start is given than the checkpoint's run leads to.
    """
    if not isinstance(tokens, TokenMix):
        return MixStart(), []
    given = {source.name: source.start for source in (data.mix if data else ()) if source.start is not None}
    recorded = None if manifest is None else manifest.get("mix")
    lines = []
    if manifest is not None and recorded is not None and manifest["data_identity"] == tokens.identity:
        start = MixStart(dict(recorded["first"]), dict(recorded.get("elsewhere", {})))
    elif manifest is None or not same_sequences:
        start = MixStart(given)
        lines = [
            f"data.mix: {name} starts after its first {count:,} sequences" for name, count in given.items() if count
        ]
    else:
        read = _read_by_set(manifest)
        first = {name: read[identity] for name, identity in tokens.identities.items() if read.get(identity)}
        elsewhere = {identity: count for identity, count in read.items() if identity not in tokens.identities.values()}
        start = MixStart(first, elsewhere)
        lines = [f"data.mix: {name} continues after its first {count:,} sequences" for name, count in first.items()]
    for name, count in given.items():
        if count != (right := start.first.get(name, 0)):
            raise UserError(
                f"data.mix: {name} is to start after {count:,} sequences, but of the checkpoint's run it starts after "
                f"{right:,}: leave its start out"
            )
    if (
        manifest is not None
        and manifest["data_identity"] != tokens.identity
        and manifest["tokens"]
        and data
        and data.stages
    ):
        lines.append(f"data.stages: until_tokens counts from here, where the run has {manifest['tokens']:,} tokens")
    return start, lines


def _read_by_set(manifest: Mapping[str, Any]) -> dict[str, int]:
    """By identity, how many sequences of each set a checkpoint's run has read, with those that it branched from."""
    recorded = manifest.get("mix")
    if recorded is None:
        return {manifest["data_identity"]: manifest["sequences"]}
    before = _mixture(recorded["order"], [recorded["first"][name] for name, _ in recorded["sets"]])
    counts = before.consumed(manifest["sequences"]).tolist()
    sets = {identity: count for (_, identity), count in zip(recorded["sets"], counts, strict=True)}
    return {**recorded.get("elsewhere", {}), **sets}


def check_epochs(
    tokens: TokenSet, config: Config, first: Mapping[str, int], end: int, passed_over: int = 0
) -> list[str]:
    """The table of a mix's sources: what there is of each, and how often the run reads it.

    Args:
        end: the position at which the run ends.
        passed_over: sequences that roll-backs have added to it, for which no run is refused.

    Raises UserError naming a source that would be read more often than its max_epochs.
    """
    from train.batches.training_sequences import training_sequences  # torch: a mistake is reported before it is loaded

    mixture = mixture_of(tokens, first)
    if mixture is None or not isinstance(tokens, TokenMix):
        return []
    lines, data, length = [], config.data, config.model.block_size
    counts = zip(
        tokens.sources, mixture.consumed(end).tolist(), mixture.consumed(end - passed_over).tolist(), strict=True
    )
    for source, count, wanted in counts:
        part = training_sequences(
            source.tokens, length, stride=data.stride, packed=data.is_packed, mask_documents=data.masks_documents
        )
        planned, epochs = count - first.get(source.name, 0), count / part.count
        most = MANY_EPOCHS if source.max_epochs is None else min(MANY_EPOCHS, source.max_epochs)
        if source.max_epochs is not None and wanted / part.count > source.max_epochs:
            raise UserError(
                f"data.mix: {source.name} would be read {wanted / part.count:.2f} times, max_epochs is "
                f"{source.max_epochs:g}: lower its weight or run.max_steps, or prepare more of it"
            )
        line = (
            f"data.mix: {source.name}: {source.tokens.folder}, {part.count * length:,} tokens at hand, "
            f"{planned * length:,} planned, {epochs:.2f} epochs"
        )
        lines.append(line if epochs <= most else f"WARNING: {line}: repeated text teaches less and less")
    return lines
