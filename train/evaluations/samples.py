"""Texts that the model generates from fixed prompts, distributed over ranks; with sft its answers to them."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from common.errors import UserError
from common.metrics_file import read_records, record_kind
from common.seeds import seed_of
from data_prep.chat.chat_tokenizer import ChatTokenizer
from data_prep.chat.messages import USER, Message
from data_prep.tokenization.loading import load_tokenizer
from train.evaluations.evaluation import Evaluation, Parts, Tools, Written, is_due
from train.progress import Progress

if TYPE_CHECKING:
    from data_prep.token_sets.token_set import TokenSet
    from data_prep.tokenization.tokenizer import Tokenizer


class Samples(Evaluation):
    """Its parts are the configured prompts, by number."""

    name, phase = "samples", "sampling"

    def check(self, tokens: TokenSet) -> None:
        """Raises UserError also where the data's tokenizer is not available: the start would be in vain."""
        tokenizer, config = load_tokenizer(tokens.tokenizer_spec), self.config.eval
        for prompt in config.prompts if config.sample_every_steps else ():
            try:
                empty = not self._ids(tokenizer, prompt)
            except UserError as error:
                raise UserError(f"eval.prompts has {prompt!r}, but {error}: give other --eval.prompts") from None
            if empty:
                raise UserError(
                    "eval.prompts contains an empty prompt, which this tokenizer can't start from (it has no "
                    "end-of-text token): remove it or add text"
                )

    def _ids(self, tokenizer: Tokenizer, prompt: str) -> list[int]:
        """What the model continues: the prompt, or where it learns to answer the start of an answer to it."""
        answers = self.config.objective.kind != "language_modelling"
        if answers and isinstance(tokenizer, ChatTokenizer):
            return tokenizer.prompt_of([Message(USER, prompt)])
        return tokenizer.prompt(prompt)

    def due(self, step: int, *, last: bool) -> Parts:
        wished = self.config.eval
        return tuple(range(len(wished.prompts))) if is_due(step, wished.sample_every_steps) else ()

    def missing(self, parts: Parts, written: Written) -> Parts:
        found = Counter(str(sample.get("prompt")) for sample in _samples_of(written))
        unwritten = []
        for index in parts:
            prompt = self.config.eval.prompts[index]
            if found[prompt] == 0:
                unwritten.append(index)
            found[prompt] -= 1
        return tuple(unwritten)

    def build(self, tools: Tools) -> None:
        self._tools = tools

    def measure(self, progress: Progress, parts: Parts) -> None:
        """The same step gives the same text for any number of ranks."""
        from model.devices import without_compiling

        ranks, step = self._tools.ranks, progress.step
        texts: dict[int, str | None] = {}
        # a context grows with every token: compiled blocks would be compiled again for each length
        share = parts[ranks.rank :: ranks.world_size]
        size = f"{len(parts):,} texts of {self.config.eval.sample_tokens:,} tokens"
        with without_compiling(), self._tools.recorder.working("sampling", size, len(share), "text") as done:
            for index in share:
                texts[index] = self._generate(step, index)
                done(1)
        for index, text in sorted(item for share in ranks.gather(texts) for item in share.items()):
            if text is None:
                self._tools.recorder.log(f"WARNING: no sample at step {step}: the model's predictions are NaN or inf")
            else:
                self._tools.recorder.sample(step, self.config.eval.prompts[index], text)

    def _generate(self, step: int, index: int) -> str | None:
        """None where the predictions are NaN or inf: the step or the save will report it."""
        from eval.generation.sampling import continue_tokens

        config, tokenizer = self.config.eval, self._tools.tokenizer
        prompt = config.prompts[index]
        try:
            generated = continue_tokens(
                self._tools.model,
                self._ids(tokenizer, prompt),
                config.sample_tokens,
                temperature=config.temperature,
                top_k=config.top_k,
                seed=seed_of(f"sample {self.config.run.seed} {step} {index}", bits=63),
                stops=tokenizer.end_ids,
            )
        except UserError:
            return None
        return tokenizer.decode(generated, continues=bool(prompt))


def _samples_of(written: Written) -> list[dict[str, Any]]:
    """The step's samples. The file keeps those of a pass that was overwritten: they are older than the step."""
    times = (record.get("time") or 0.0 for record in written.records if record_kind(record) == "train")
    trained = max(times, default=0.0)
    found = [sample for sample in read_records(written.folder.samples) if sample.get("step") == written.step]
    return [sample for sample in found if (sample.get("time") or 0.0) >= trained]
