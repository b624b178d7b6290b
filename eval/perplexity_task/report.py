"""The perplexity of a checkpoint on a token set, measured and reported."""

import argparse
import math
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.progress import format_duration, progress_bar
from common.publish import write_json_output
from data_prep.token_sets.manifest import document_start
from data_prep.token_sets.marked_writer import check_marks
from data_prep.token_sets.packing import plan_in_memory
from data_prep.token_sets.token_set import TokenSet, find_token_set
from eval.perplexity_task.measure import Blocks, measure, measure_answers, window_starts
from eval.shared.loading import Loaded, evaluation_dtype, load_checkpoint, start_evaluation
from model.precision import non_finite_predictions
from model.ranks import Ranks


def evaluate(arguments: argparse.Namespace) -> None:
    """Measure as eval/perplexity.py's arguments ask, and print the figures. Raises UserError. All ranks call."""
    ranks = start_evaluation(arguments.device)
    arguments.dtype = evaluation_dtype(arguments.dtype, ranks.device)
    loaded = load_checkpoint(arguments.run, ranks.device, ranks, weights=arguments.weights)
    settings: Mapping[str, Any] = loaded.manifest.get("config") or {}
    tokens = open_tokens(arguments.data, settings, loaded)
    started = time.monotonic()
    masked = bool(settings.get("data", {}).get("document_mask"))
    if tokens.has_conversations:
        blocks, facts = _answers(arguments, loaded, tokens, ranks)
    else:
        blocks, facts = _texts(arguments, loaded, tokens, ranks, masked=masked)
    if math.isnan(blocks.loss().value):
        raise UserError(non_finite_predictions(arguments.dtype))
    if ranks.is_first:
        report = describe(loaded, tokens, blocks, arguments, facts)
        show(report, time.monotonic() - started)
        if arguments.json:
            write_json_output(arguments.json, report | {"seconds": time.monotonic() - started})
    ranks.close()


def _texts(
    arguments: argparse.Namespace, loaded: Loaded, tokens: TokenSet, ranks: Ranks, *, masked: bool
) -> tuple[Blocks, dict[str, Any]]:
    """All tokens of texts, and what the report says of how. Raises UserError."""
    length = loaded.model.config.block_size
    stride = length if arguments.stride is None else arguments.stride
    if stride > length:
        raise UserError(
            f"--stride is {stride}, more than the model's context, and would leave tokens out: use at most {length}"
        )
    stream = tokens.split(arguments.split)
    targets = min(len(stream) - 1, arguments.tokens or len(stream)) // length * length
    if targets < length:
        raise UserError(f"a sequence has {length} targets, but {tokens.folder} or --tokens has fewer: give more")
    share = len(range(ranks.rank, len(window_starts(targets, length, stride)), ranks.world_size))  # nearly
    with progress_bar(share, "sequence", "perplexity", disable=not ranks.is_first) as bar:
        blocks = measure(
            loaded.model,
            stream,
            loaded.tokenizer.piece_bytes,
            ranks,
            targets=targets,
            stride=stride,
            micro_batch=arguments.micro_batch,
            dtype=arguments.dtype,
            split_documents_at=document_start(tokens.tokenizer_spec) if masked else None,
            done=bar.update,
        )
    every = targets == (len(stream) - 1) // length * length
    return blocks, {"all_targets": every, "stride": stride, "document_mask": masked}


def _answers(
    arguments: argparse.Namespace, loaded: Loaded, tokens: TokenSet, ranks: Ranks
) -> tuple[Blocks, dict[str, Any]]:
    """The answers' tokens of conversations, as training's validation counts them, and what the report says of how.

    Raises UserError.
    """
    length, marks = loaded.model.config.block_size, tokens.marks(arguments.split)
    assert marks is not None
    if arguments.stride is not None:
        raise UserError("--stride doesn't go with conversations, which are packed whole into sequences: leave it out")
    check_marks(tokens, arguments.split)
    packed = plan_in_memory(tokens.split(arguments.split), marks, length)
    count = min(packed.count, (arguments.tokens or packed.count * length) // length)
    if not count:
        raise UserError(
            f"no conversation of {tokens.folder} fits into the model's {length} tokens, or --tokens is less than that"
        )
    share = len(range(ranks.rank, count, ranks.world_size))  # nearly
    with progress_bar(share, "sequence", "perplexity", disable=not ranks.is_first) as bar:
        blocks = measure_answers(
            loaded.model,
            packed,
            loaded.tokenizer.piece_bytes,
            ranks,
            count=count,
            micro_batch=arguments.micro_batch,
            dtype=arguments.dtype,
            done=bar.update,
        )
    if not blocks.targets.sum():
        raise UserError(f"{tokens.folder} has no answer in these sequences: give more --tokens, or another set")
    return blocks, {
        "all_targets": count == packed.count,
        "stride": length,
        "document_mask": True,
        "targets_are": "answers",
        "sequences": count,
        "left_out_conversations": packed.facts.left_out,
    }


def open_tokens(folder: Path | None, settings: Mapping[str, Any], loaded: Loaded) -> TokenSet:
    """The token set that is asked for, or the run's own. Raises UserError where its tokenizer is not the model's."""
    data = settings.get("data", {})
    if folder is None and data.get("mix"):
        sets = " or ".join(f"--data {source['path']}" for source in data["mix"])
        raise UserError(f"the run was trained on a mix of token sets: give {sets}")
    named = folder or data.get("path")
    if named is None:
        raise UserError("the checkpoint doesn't record what it was trained on: give --data DIR")
    tokens = TokenSet.open(find_token_set(named))
    if tokens.tokenizer_spec["sha256"] != loaded.tokenizer.spec["sha256"]:
        raise UserError(
            f"{tokens.folder} was made with another tokenizer than the model: prepare the text with its own"
        )
    return tokens


def describe(
    loaded: Loaded, tokens: TokenSet, blocks: Blocks, arguments: argparse.Namespace, facts: dict[str, Any]
) -> dict[str, Any]:
    """The figures as JSON."""
    shards = tokens.manifest.splits[arguments.split]
    return {
        **loaded.facts,
        "data": str(tokens.folder),
        "split": arguments.split,
        "val_sha256": tokens.manifest.val_sha256 if arguments.split == "val" else None,
        "shard_sha256": [shard.sha256 for shard in shards] if arguments.split != "val" else None,
        "targets": int(blocks.targets.sum()),
        "bytes": int(blocks.bytes.sum()),
        "block_size": loaded.model.config.block_size,
        **facts,
        "dtype": arguments.dtype,
        **{name: asdict(getattr(blocks, name)()) for name in ("loss", "perplexity", "bits_per_byte")},
    }


def show(report: dict[str, Any], seconds: float) -> None:
    sha256 = f", SHA-256 {report['val_sha256']}" if report["val_sha256"] else ""
    print(f"{report['checkpoint']} on the {report['split']} split of {report['data']}{sha256}")
    which = "all" if report["all_targets"] else "the first"
    sliding = f", stride {report['stride']}" if report["stride"] < report["block_size"] else ""
    kind = "tokens of answers" if "targets_are" in report else "target tokens"
    print(
        f"{which} {report['targets']:,} {kind} ({report['bytes']:,} bytes), "
        f"sequences of {report['block_size']}{sliding}, in {format_duration(seconds)}"
    )
    if left := report.get("left_out_conversations"):
        print(f"{left:,} conversations longer than a sequence left out")
    for name, unit, digits in (("loss", " nats per token", 4), ("perplexity", "", 2), ("bits_per_byte", "", 4)):
        error = report[name]["standard_error"]
        spread = "" if error is None else f" ± {error:.{digits}f}"
        print(f"  {name.replace('_', ' '):14} {report[name]['value']:.{digits}f}{spread}{unit}")
