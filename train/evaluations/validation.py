"""Loss on the same sequences of the validation split every time, divided among all ranks."""

from __future__ import annotations

import hashlib
import math
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from common.curves import MASKED, VALIDATION
from common.errors import UserError
from common.publish import canonical_json
from data_prep.token_sets.manifest import document_start
from data_prep.token_sets.marked_writer import check_marks
from data_prep.token_sets.packing import plan_in_memory
from data_prep.token_sets.sequences import Sequences, Windows
from data_prep.token_sets.token_mix import sources_of
from model.counts import flops_per_token
from train.evaluations.evaluation import WHOLE, Evaluation, Parts, Tools, Written, is_due
from train.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Callable

    from data_prep.token_sets.token_set import TokenSet
    from eval.shared.loss import LossResult

FIRST_LOSS_MARGIN = 0.5  # nats


@dataclass(frozen=True)
class Part:
    """What is validated of one source: its first `count` sequences, and its share of the mean."""

    name: str
    share: float
    windows: Sequences
    count: int


class Validation(Evaluation):
    """The validation loss. The last step is always validated; a checkpoint records the latest one."""

    name, phase, curves = VALIDATION.kind, "validating", (VALIDATION, MASKED)
    before_save = at_start = True
    _has_targets = True
    latest: float | None = None  # nats per token
    latest_step: int | None = None

    def check(self, tokens: TokenSet) -> None:
        counts = tokens.manifest.conversations if tokens.has_conversations else None
        if counts is not None and not counts["val"]["answer_tokens"]:  # a set of prompts
            self._has_targets = self.at_start = False

    def due(self, step: int, *, last: bool) -> Parts:
        if not self._has_targets:
            return ()
        return WHOLE if last or is_due(step, self.config.eval.every_steps) else ()

    def missing(self, parts: Parts, written: Written) -> Parts:
        return () if any("val_loss" in record for record in written.records) else parts

    def build(self, tools: Tools) -> None:
        self._tools, length = tools, self.config.model.block_size
        sources = sources_of(tools.tokens)
        each = max(1, self.config.eval.tokens // length // len(sources))
        self._parts = []
        for source in sources:
            windows = self._sequences_of(source.tokens)
            self._parts.append(Part(source.name, source.share, windows, min(windows.count, each)))
        self._count = sum(part.count for part in self._parts)
        self._targets = sum(part.windows.target_count(np.arange(part.count)) for part in self._parts)
        data, border = self.config.data, document_start(tools.tokens.tokenizer_spec)
        # both packings are validated alike, so that their losses compare
        self._split_documents_at = border if data.masks_documents and not data.is_packed else None
        self._masked_too_at = None
        masked = self.config.eval.masked_loss
        if tools.tokens.has_conversations:  # which are told apart themselves
            masked = False
        if self._split_documents_at is None and (data.is_packed if masked == "auto" else masked):
            self._masked_too_at = border
        self._flops_per_token = flops_per_token(tools.model.config, adapters=self.config.adapter_count())

    def _sequences_of(self, tokens: TokenSet) -> Sequences:
        """Of the validation split. Raises UserError where no conversation of it fits into a sequence."""
        length, marks = self.config.model.block_size, tokens.marks("val")
        if marks is None:
            return Windows(tokens.split("val"), length)
        check_marks(tokens, "val")
        packed = plan_in_memory(tokens.split("val"), marks, length)
        if not packed.count:
            raise UserError(
                f"all conversations that {tokens.folder} holds back are longer than model.block_size {length}: use a "
                "longer one, or shorter conversations"
            )
        return packed

    @property
    def measured_on(self) -> dict[str, Any]:
        """What is recorded with every loss: losses compare where all of it is the same (`common.measured`)."""
        return {
            "val_sha256": self._sha256(),
            "val_tokens": self._targets,
            "val_block_size": self.config.model.block_size,
            "val_document_mask": self._split_documents_at is not None,
        }

    def forget(self) -> None:
        self.latest = self.latest_step = None

    def facts(self) -> dict[str, Any]:
        """The latest loss, the step it was measured at and on what, for a checkpoint's manifest."""
        return {"val_loss": self.latest, "val_step": self.latest_step, **self.measured_on}

    def warm_up(self) -> None:
        if not self._has_targets:
            return
        a_micro_batch_each = (self._tools.ranks.world_size - 1) * self._tools.plan.micro_batch + 1
        part = self._parts[0]
        part = replace(part, count=min(part.count, a_micro_batch_each))
        for border in dict.fromkeys((self._split_documents_at, self._masked_too_at or self._split_documents_at)):
            self._evaluate(part, border)

    def measure(self, progress: Progress, parts: Parts) -> None:
        started = time.monotonic()
        length = self.config.model.block_size
        size = f"{self._count:,} sequences of {length:,} tokens (eval.tokens)"
        work, masked = f"validating at step {progress.step}", None
        with self._tools.recorder.working(work, size, self._count, "sequence") as done:
            results = self._evaluate_all(self._split_documents_at, done)
        if self._masked_too_at is not None:
            with self._tools.recorder.working(f"{work} inside documents", size, self._count, "sequence") as done:
                masked = self._whole(self._evaluate_all(self._masked_too_at, done)).loss
        result = self._whole(results)
        assert result.tokens == self.measured_on["val_tokens"], result
        self.latest, self.latest_step = result.loss, progress.step
        seconds = time.monotonic() - started
        record = {
            "step": progress.step,
            "tokens": progress.tokens,
            "flops": float(progress.tokens * self._flops_per_token),
            "val_loss": result.loss,
            "val_bits_per_byte": result.bits_per_byte,
            "val_bytes": result.bytes,
            **({} if masked is None else {"val_loss_masked": masked}),
            **self._by_source(results),
            **self.measured_on,
            **self._text(),
            **self._causality(progress.step),
            **self.of_weights(),
            "val_seconds": seconds,
            "time": time.time(),
        }
        self._tools.recorder.note(record)
        perplexity = math.exp(result.loss) if result.loss < 50 else math.inf
        bits = f", {result.bits_per_byte:.4f} bits per byte" if result.bytes else ""
        bits += "" if masked is None else f", loss {masked:.4f} with attention inside documents"
        self._tools.recorder.log(
            f"validation at step {progress.step}: loss {result.loss:.4f}, perplexity {perplexity:,.1f}{bits} "
            f"({seconds:.1f} s)"
        )
        if progress.step == 0 and self._tools.untrained:
            self._check_first_loss(result.loss)

    def _text(self) -> dict[str, Any]:
        """What says that losses per byte are of the same text, whatever its tokens; older sets don't know."""
        text = self._tools.tokens.manifest.val_text_sha256
        return {} if text is None or len(self._parts) > 1 else {"val_text_sha256": text}

    def _sha256(self) -> str:
        """Of the whole validation split; of several with their shares."""
        sources = sources_of(self._tools.tokens)
        if len(sources) == 1:
            return sources[0].tokens.manifest.val_sha256
        parts = [[source.tokens.manifest.val_sha256, source.share] for source in sources]
        return hashlib.sha256(canonical_json(parts).encode()).hexdigest()

    def _whole(self, results: list[LossResult]) -> LossResult:
        """The mean over the sources by their shares in data.mix, of losses as of bytes a token."""
        if len(results) == 1:
            return results[0]
        pairs = list(zip(self._parts, results, strict=True))
        tokens = sum(result.tokens for result in results)
        bytes_a_token = sum(part.share * result.bytes / result.tokens for part, result in pairs)
        loss = sum(part.share * result.loss for part, result in pairs)
        return replace(results[0], loss=loss, tokens=tokens, bytes=round(tokens * bytes_a_token))

    def _by_source(self, results: list[LossResult]) -> dict[str, Any]:
        """The losses of a mix's sources by name."""
        if len(results) == 1:
            return {}
        named = {part.name: result for part, result in zip(self._parts, results, strict=True)}
        return {
            "val_loss_by_source": {name: result.loss for name, result in named.items()},
            "val_bits_per_byte_by_source": {name: result.bits_per_byte for name, result in named.items()},
        }

    def _evaluate_all(self, split_documents_at: int | None, done: Callable[[int], object]) -> list[LossResult]:
        """Of each source, in order."""
        ranks = self._tools.ranks.world_size

        def counting(left: int) -> Callable[[int], None]:
            def tell(count: int) -> None:
                nonlocal left
                of_all = min(left, count * ranks)  # the last micro-batches are not full on all ranks
                left -= of_all
                done(of_all)

            return tell

        return [self._evaluate(part, split_documents_at, counting(part.count)) for part in self._parts]

    def _causality(self, step: int) -> dict[str, Any]:
        """At the first validation and the last: whether predictions come from earlier tokens only."""
        if step not in (0, self.config.run.max_steps) or not self._tools.ranks.is_first:
            return {}
        from eval.shared.causality import TOLERANCE, future_moves

        tools = self._tools
        (row,) = self._parts[0].windows.rows(np.arange(1)).inputs
        moved = future_moves(tools.model, row, tools.ranks.device, split_documents_at=self._split_documents_at)
        if math.isnan(moved):
            return {}
        if moved > TOLERANCE:
            tools.recorder.log(
                f"WARNING: the model is not causal: another last token moves earlier logits by up to {moved:.2g}. It "
                "sees what it predicts, so its losses mean nothing: no comparison ranks this run"
            )
        return {"causal": moved <= TOLERANCE}

    def _check_first_loss(self, loss: float) -> None:
        """A model that knows nothing gives every token the same probability: ln V nats."""
        size = self.config.model.vocab_size
        if abs(loss - math.log(size)) > FIRST_LOSS_MARGIN:
            self._tools.recorder.log(
                f"WARNING: the untrained model's loss is {loss:.2f}, far from ln({size}) = {math.log(size):.2f}: check "
                "initialisation, data and tokenizer before spending time on it"
            )

    def _evaluate(
        self, part: Part, split_documents_at: int | None, done: Callable[[int], object] = lambda count: None
    ) -> LossResult:
        from eval.shared.loss import evaluate_loss

        tools = self._tools
        return evaluate_loss(
            tools.model,
            part.windows,
            tools.tokenizer.piece_bytes,
            tools.ranks,
            window_count=part.count,
            micro_batch=tools.plan.micro_batch,
            dtype=tools.dtype,
            split_documents_at=split_documents_at,
            done=done,
        )
