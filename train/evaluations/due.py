"""What is to be measured after a step, and what of it a run that was cut short has not recorded."""

from collections import Counter
from dataclasses import dataclass

from common.errors import UserError
from common.metrics_file import metrics_of_step, read_records, record_kind
from common.os_errors import refusal
from common.run_folder import RunFolder
from train.settings.sections import Config


@dataclass(frozen=True)
class Due:
    """Measurements after one step. samples: which of eval.prompts, by their place."""

    validation: bool = False
    hellaswag: bool = False
    samples: tuple[int, ...] = ()

    def __bool__(self) -> bool:
        return self.validation or self.hellaswag or bool(self.samples)


NOTHING = Due()


def due_after(step: int, config: Config) -> Due:
    """What is due after a step (1 or later), the last one included."""
    last, wished = step >= config.run.max_steps, config.eval
    return Due(
        validation=last or is_due(step, wished.every_steps),
        hellaswag=wished.hellaswag_every_steps > 0 and (last or is_due(step, wished.hellaswag_every_steps)),
        samples=tuple(range(len(wished.prompts))) if is_due(step, wished.sample_every_steps) else (),
    )


def is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def missing_after(step: int, config: Config, folder: RunFolder) -> Due:
    """What was due after the step that a run resumes from, and was not recorded: it was stopped or killed before.

    Cheap where nothing was due, and else reads no more than the end of metrics.jsonl and the samples.

    Raises UserError where these can't be read.
    """
    due = due_after(step, config)
    if not due:
        return due
    try:
        records = metrics_of_step(folder.metrics, step)
        samples = read_records(folder.samples) if due.samples else []
    except OSError as error:
        path = error.filename or folder.metrics
        raise UserError(refusal("read", error, path, otherwise="start the same command again")) from None
    trained = max((record.get("time") or 0.0 for record in records if record_kind(record) == "train"), default=0.0)
    # the file of samples keeps those of a pass that was gone back behind
    texts = [sample for sample in samples if sample.get("step") == step and (sample.get("time") or 0.0) >= trained]
    written = Counter(str(sample.get("prompt")) for sample in texts)
    unwritten = []
    for index in due.samples:
        prompt = config.eval.prompts[index]
        if written[prompt] == 0:
            unwritten.append(index)
        written[prompt] -= 1
    return Due(
        validation=due.validation and not any("val_loss" in record for record in records),
        hellaswag=due.hellaswag and not any(record_kind(record) == "hellaswag" for record in records),
        samples=tuple(unwritten),
    )
