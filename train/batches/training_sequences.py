"""What a run trains on: the training split as one stream cut into sequences, or its documents packed whole."""

from pathlib import Path

from common.cache_folder import cache_folder
from common.errors import UserError
from data_prep.token_sets.manifest import document_start
from data_prep.token_sets.marked_writer import check_marks
from data_prep.token_sets.packing import BY_MARKS, FORMAT_VERSION, PackedSequences, framing_of, make_plan
from data_prep.token_sets.sequences import JoinedSequences, Sequences, Windows
from data_prep.token_sets.token_mix import TokenMix
from data_prep.token_sets.token_set import TokenSet
from model.ranks import Ranks, agreed
from train.batches.loader import StepLoader
from train.batches.mixture import MixedOrder, Mixture
from train.batches.plan import BatchPlans

MUCH_PADDING = 0.05


def training_sequences(
    tokens: TokenSet, length: int, *, stride: int | None, packed: bool, mask_documents: bool
) -> Sequences:
    """The training split in sequences; of a mix those of all its sets, one set after another.

    Args:
        length: tokens of a sequence. stride: tokens from one's start to the next's; None: the length.
        packed: whole documents, by the plan that `prepare_packing` has made.
        mask_documents: attention is to stay inside documents.

    Raises UserError where that plan is gone, or is one for another length.
    """
    if isinstance(tokens, TokenMix):
        return JoinedSequences({
            source.name: training_sequences(
                source.tokens, length, stride=stride, packed=packed, mask_documents=mask_documents
            )
            for source in tokens.sources
        })  # fmt: skip
    stream = tokens.split("train")
    if packed:
        folder = next((place for place in _places(tokens, length) if (place / "plan.json").is_file()), None)
        if folder is None:
            raise UserError(f"the packing plan of {tokens.folder} is gone: run the same command again")
        packing = PackedSequences.read(stream, folder, masked=mask_documents, marks=tokens.marks("train"))
        if packing.block_size != length:
            raise UserError(
                f"{folder} is for sequences of {packing.block_size} tokens, not {length}: delete the folder, it is "
                "made again"
            )
        return packing
    border = document_start(tokens.tokenizer_spec) if mask_documents else None
    return Windows(stream, length, stride, split_documents_at=border)


def open_loader(
    tokens: TokenSet,
    plans: BatchPlans,
    ranks: Ranks,
    *,
    length: int,
    stride: int | None,
    packed: bool,
    mask_documents: bool,
    seed: int,
    mixture: Mixture | None,
) -> StepLoader:
    """A loader of this rank's share of what a run trains on.

    Args: as `training_sequences`; mixture: the order of a mix's sources. Raises UserError as that.
    """
    sequences = training_sequences(tokens, length, stride=stride, packed=packed, mask_documents=mask_documents)
    order = None
    if mixture is not None and isinstance(sequences, JoinedSequences):
        order = MixedOrder(mixture, {name: part.count for name, part in sequences.parts.items()}, seed)
    pin = ranks.device.type == "cuda"
    return StepLoader(sequences, plans.full, rank=ranks.rank, seed=seed, order=order, pin_memory=pin, plans=plans)


def prepare_packing(tokens: TokenSet, length: int, ranks: Ranks) -> None:
    """Make the plan of a token set and a length where there is none yet: once on every node. (All ranks call.)

    Raises UserError on all ranks where it can't be written anywhere, or the set has no documents.
    """
    if isinstance(tokens, TokenMix):
        for source in tokens.sources:
            prepare_packing(source.tokens, length, ranks)
        return
    agreed(ranks, lambda: _make(tokens, length))  # on a shared file system the others find it
    problem = None
    if ranks.local_rank == 0 and not ranks.is_first:
        try:
            _make(tokens, length)
        except UserError as error:
            problem = error
    for found in ranks.gather(problem):
        if found is not None:
            raise found


def _make(tokens: TokenSet, length: int) -> None:
    marks = tokens.marks("train")
    framing = framing_of(tokens.tokenizer_spec) if marks is None else BY_MARKS
    assert framing is not None, "fit_to_data has refused it"
    stream, whole = tokens.split("train") if marks is None else marks, marks is not None
    problem: OSError | None = None
    for place in _places(tokens, length):
        if (place / "plan.json").is_file():
            return
    check_marks(tokens, "train")
    for place in _places(tokens, length):
        try:
            make_plan(stream, framing, length, place, data_identity=tokens.identity, whole=whole)
            return
        except OSError as error:
            problem = error
    raise UserError(
        f"the packing plan of {tokens.folder} can't be written there, nor in {cache_folder()} "
        f"({problem.strerror if problem else 'unknown'}): give LONGHAUL_CACHE a folder with room"
    )


def _places(tokens: TokenSet, length: int) -> tuple[Path, Path]:
    """Beside the shards, else in the cache; by everything that the plan depends on."""
    name = f"packing-{FORMAT_VERSION}-{length}-{tokens.identity[:16]}"
    return tokens.folder / name, cache_folder() / "packing" / name
