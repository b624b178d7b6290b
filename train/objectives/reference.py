"""Log-probabilities of all answers by the policy that a run started from: computed once, and kept in the run's folder.

They don't change over a run, so that no second model has to be held beside the one that learns.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from common.publish import canonical_json, write_whole
from model.gpt import GPT
from model.number_formats import Dtype
from model.precision import autocast
from model.ranks import Ranks, agreed
from train.batches.loader import MicroBatch, StepBatch, StepLoader
from train.objectives.dpo import trimmed
from train.objectives.preference_loss import FIGURES, log_probs_of_answers, preference_figures
from train.settings.sections import PreferenceConfig

FILE = "reference_log_probs.bin"  # in a run's folder: a line of JSON, then all numbers as little-endian float32
FORMAT_VERSION = 1
STORED = np.dtype("<f4")


@dataclass(frozen=True)
class HeldBack:
    """Pairs to validate on: a loader of this rank's share, and (sequences,) log-probabilities by the start policy."""

    loader: StepLoader
    reference: npt.NDArray[np.float32]
    config: PreferenceConfig
    trims: bool
    names: ClassVar[tuple[str, ...]] = ("loss", *FIGURES)

    def figures(self, model: GPT, ranks: Ranks, dtype: Dtype) -> npt.NDArray[np.float64]:
        """(P, 1 + F): each pair's loss and FIGURES by a model, on all ranks. All ranks call."""

        def rows(batch: StepBatch) -> StepBatch:
            own = torch.from_numpy(self.reference[batch.windows])  # (A, M)
            return replace(trimmed(batch) if self.trims else batch, more={"reference": own})

        def figures(part: MicroBatch) -> Sequence[Tensor]:
            answers = log_probs_of_answers(model, part.tokens, part.targets)
            return preference_figures(answers, part.more["reference"], self.config)

        return figures_of_pairs(self.loader, ranks, dtype, rows, figures)


def figures_of_pairs(
    loader: StepLoader,
    ranks: Ranks,
    dtype: Dtype,
    rows: Callable[[StepBatch], StepBatch],
    figures: Callable[[MicroBatch], Sequence[Tensor]],
) -> npt.NDArray[np.float64]:
    """(P, F) of a loader's pairs in their order, on all ranks. All ranks call.

    Args: rows: makes of a batch what is measured. figures: of a micro-batch, (M / 2,) each.
    """
    mine: list[npt.NDArray[np.float64]] = []
    for batch in _epoch(loader):
        with torch.no_grad(), autocast(dtype, ranks.device):
            found = [figures(part) for part in rows(batch).micro_batches(ranks.device)]
        mine += [torch.stack(list(each), dim=1).double().cpu().numpy() for each in found]  # (M / 2, F) each
    shares = ranks.gather_array(np.stack(mine))  # (steps, M / 2, F) each
    in_order = np.concatenate([share[step] for step in range(len(mine)) for share in shares])
    return in_order[: loader.sequences.count // 2]  # the last ones are the first again


LogProbs = dict[str, npt.NDArray[np.float32]]  # (sequences,) by split


def reference_key(facts: Mapping[str, Any]) -> str:
    """SHA-256 of all that decides the numbers: weights, data with their template, and how they are computed."""
    return hashlib.sha256(canonical_json({"format_version": FORMAT_VERSION, **facts}).encode()).hexdigest()


def stored_reference(path: Path, key: str, counts: Mapping[str, int]) -> LogProbs | None:
    """Those of a file, where it is whole and has this key; else None. NaN are those that a stop has left.

    Args: counts: sequences by split, in the order of the file.
    """
    with suppress(OSError, ValueError, KeyError, TypeError):
        line, _, content = path.read_bytes().partition(b"\n")
        header = json.loads(line)
        if header["key"] == key and header["sha256"] == hashlib.sha256(content).hexdigest():
            values = np.frombuffer(content, dtype=STORED).astype(np.float32)
            if len(values) == sum(counts.values()):
                ends = np.cumsum(list(counts.values()))
                return dict(zip(counts, np.split(values, ends[:-1]), strict=True))
    return None


def write_reference(path: Path, key: str, found: LogProbs) -> None:
    """Publish them, whole or not at all. Raises OSError."""
    content = b"".join(values.astype(STORED).tobytes() for values in found.values())
    header = {"key": key, "sha256": hashlib.sha256(content).hexdigest()}
    write_whole(path, json.dumps(header).encode() + b"\n" + content)


def reference_log_probs(
    path: Path,
    key: str,
    loaders: Mapping[str, StepLoader],
    start: Callable[[], GPT],
    ranks: Ranks,
    dtype: Dtype,
    *,
    trims: bool,
    on_act: Callable[[str], None] = lambda act: None,
    log: Callable[[str], None] = lambda line: None,
    stop_code: Callable[[], int] = lambda: 0,
) -> LogProbs:
    """Those of every sequence by split, from the run's file or computed and kept there. All ranks call.

    They are computed in the batches in which a run goes through its first epoch, so that on a CPU the first step finds
    the very same numbers. Where a stop is requested between two batches, what is computed by then is kept, and the
    others are NaN, which the next start computes.

    Args:
        loaders: by split, of this rank's share. start: gives the policy that the run started from.
        trims: as `Dpo.prepare`. on_act: called before every batch, by which a rank that hangs is named.
        stop_code: of what has requested a stop of this rank so far; 0 is nothing.

    Raises OSError as `agreed` does where they can't be written.
    """
    counts = {split: loader.sequences.count for split, loader in loaders.items()}
    kept = stored_reference(path, key, counts) if ranks.is_first else None
    mine = np.full(sum(counts.values()), np.nan) if kept is None else np.concatenate(list(kept.values()))
    first = ranks.gather_array(mine.astype(np.float64))[0].astype(np.float32)
    found = dict(zip(counts, np.split(first, np.cumsum(list(counts.values()))[:-1]), strict=True))
    if not np.isnan(first).any():
        return found
    model = start()
    for split, loader in loaders.items():
        if not (count := _left(found[split])):
            continue
        log(f"log-probabilities of {count:,} answers of the {split} split by the start policy")
        if _compute(found[split], model, loader, ranks, dtype, trims=trims, on_act=on_act, stop_code=stop_code):
            left, of = sum(map(_left, found.values())), sum(counts.values())
            log(f"stopping: log-probabilities of {left:,} of {of:,} answers are left to the next start")
            break
    agreed(ranks, lambda: write_reference(path, key, found))
    return found


def _left(values: npt.NDArray[np.float32]) -> int:
    return int(np.isnan(values).sum())


def _compute(
    found: npt.NDArray[np.float32],
    model: GPT,
    loader: StepLoader,
    ranks: Ranks,
    dtype: Dtype,
    *,
    trims: bool,
    on_act: Callable[[str], None],
    stop_code: Callable[[], int],
) -> bool:
    """Put the numbers of all ranks in place of NaN in (sequences,); return whether a stop has come first."""
    mine: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]] = []
    stops = 0
    for batch in _epoch(loader):
        on_act("log-probabilities of the start policy")
        stops, wanted = ranks.agree([stop_code(), _left(found[batch.windows])])
        if stops:
            break
        if wanted:
            rows = trimmed(batch) if trims else batch
            mine.append((batch.windows.ravel(), score(model, rows, ranks.device, dtype).ravel()))
    if mine:
        numbers = ranks.gather_array(np.stack([numbers for numbers, _ in mine]).astype(np.float64))
        values = ranks.gather_array(np.stack([values for _, values in mine]))  # (steps, A·M) of each rank
        for step in range(len(mine)):  # the last may begin another epoch: the first to come counts
            for its_numbers, its_values in zip(numbers, values, strict=True):
                places = its_numbers[step].astype(np.int64)
                found[places] = np.where(np.isnan(found[places]), its_values[step], found[places])
    return bool(stops)


def _epoch(loader: StepLoader) -> Iterator[StepBatch]:
    """The steps in which every sequence occurs."""
    for position in range(0, loader.sequences.count, loader.plan.sequences):
        yield loader.step_at(position)


def score(model: GPT, rows: StepBatch, device: torch.device, dtype: Dtype) -> npt.NDArray[np.float64]:
    """Log-probabilities (A, M) of this rank's rows, by the very forward that a step learns with."""
    with torch.no_grad(), autocast(dtype, device):
        found = [
            log_probs_of_answers(model, part.tokens, part.targets).log_probs for part in rows.micro_batches(device)
        ]
    return torch.stack(found).double().cpu().numpy()
