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
from data_prep.token_sets.token_set import TokenSet, find_token_set
from eval.perplexity_task.measure import Blocks, measure, window_starts
from eval.shared.loading import Loaded, evaluation_dtype, load_checkpoint, start_evaluation
from model.precision import non_finite_predictions


def evaluate(arguments: argparse.Namespace) -> None:
    """Measure as eval/perplexity.py's arguments ask, and print the figures. Raises UserError. All ranks call."""
    ranks = start_evaluation(arguments.device)
    arguments.dtype = evaluation_dtype(arguments.dtype, ranks.device)
    loaded = load_checkpoint(arguments.run, ranks.device, ranks, weights=arguments.weights)
    settings: Mapping[str, Any] = loaded.manifest.get("config") or {}
    tokens = open_tokens(arguments.data, settings, loaded)
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
    border = document_start(tokens.tokenizer_spec) if settings.get("data", {}).get("document_mask") else None
    started = time.monotonic()
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
            split_documents_at=border,
            done=bar.update,
        )
    if math.isnan(blocks.loss().value):
        raise UserError(non_finite_predictions(arguments.dtype))
    if ranks.is_first:
        report = describe(loaded, tokens, blocks, arguments, stride, border is not None)
        show(report, time.monotonic() - started)
        if arguments.json:
            write_json_output(arguments.json, report | {"seconds": time.monotonic() - started})
    ranks.close()


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
    loaded: Loaded, tokens: TokenSet, blocks: Blocks, arguments: argparse.Namespace, stride: int, document_mask: bool
) -> dict[str, Any]:
    """The figures as JSON."""
    shards, length = tokens.manifest.splits[arguments.split], loaded.model.config.block_size
    return {
        **loaded.facts,
        "data": str(tokens.folder),
        "split": arguments.split,
        "val_sha256": tokens.manifest.val_sha256 if arguments.split == "val" else None,
        "shard_sha256": [shard.sha256 for shard in shards] if arguments.split != "val" else None,
        "targets": int(blocks.targets.sum()),
        "all_targets": int(blocks.targets.sum())
        == (len(tokens.split(arguments.split)) - 1) // loaded.model.config.block_size * loaded.model.config.block_size,
        "bytes": int(blocks.bytes.sum()),
        "block_size": length,
        "stride": stride,
        "document_mask": document_mask,
        "dtype": arguments.dtype,
        **{name: asdict(getattr(blocks, name)()) for name in ("loss", "perplexity", "bits_per_byte")},
    }


def show(report: dict[str, Any], seconds: float) -> None:
    sha256 = f", SHA-256 {report['val_sha256']}" if report["val_sha256"] else ""
    print(f"{report['checkpoint']} on the {report['split']} split of {report['data']}{sha256}")
    which = "all" if report["all_targets"] else "the first"
    sliding = f", stride {report['stride']}" if report["stride"] < report["block_size"] else ""
    print(
        f"{which} {report['targets']:,} target tokens ({report['bytes']:,} bytes), "
        f"sequences of {report['block_size']}{sliding}, in {format_duration(seconds)}"
    )
    for name, unit, digits in (("loss", " nats per token", 4), ("perplexity", "", 2), ("bits_per_byte", "", 4)):
        error = report[name]["standard_error"]
        spread = "" if error is None else f" ± {error:.{digits}f}"
        print(f"  {name.replace('_', ' '):14} {report[name]['value']:.{digits}f}{spread}{unit}")
