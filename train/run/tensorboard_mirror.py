"""TensorBoard as a mirror of `metrics.jsonl`: event files in the run's `tensorboard/`, over steps and over tokens.

TensorBoard has one axis, so there are two of its runs in there: `steps` and `tokens`. Show them, of all runs, with
`tensorboard --logdir runs`.
"""

import shutil
from typing import Any

from common.metric_fields import NUMBER
from common.packages import require_packages
from common.run_folder import RunFolder
from train.run.mirror import AXES, grouped

FLUSH_SECONDS = 5
FOLDERS = ("steps", "tokens")


class TensorboardWriter:
    """Writes event files. Those of steps that a resume has overwritten are hidden by TensorBoard."""

    name = "TensorBoard"

    def __init__(self, folder: RunFolder, first_step: int, first_tokens: int) -> None:
        """Args: first_step, first_tokens: what a resumed run starts from; what is there of later ones is void."""
        self._folder = folder
        self._first = {"steps": first_step, "tokens": first_tokens}
        self._writers: dict[str, Any] = {}
        self._tokens = first_tokens

    def open(self) -> str:
        """Raises UserError where TensorBoard isn't installed."""
        require_packages({"tensorboard": "tensorboard"}, "a mirror for TensorBoard")
        from torch.utils.tensorboard import SummaryWriter

        for name, first in self._first.items():
            purge = first + 1 if first else None
            options: dict[str, Any] = {"purge_step": purge, "flush_secs": FLUSH_SECONDS}
            self._writers[name] = SummaryWriter(str(self._folder.tensorboard / name), **options)
        return str(self._folder.tensorboard)

    def take(self, record: dict[str, Any]) -> bool:
        values = grouped(record)
        step, when = values["step"], values.get("time")
        self._tokens = tokens = values["tokens"] if type(values.get("tokens")) is int else self._tokens
        for name, value in values.items():
            if name not in AXES and (NUMBER.has(value) or isinstance(value, bool)):
                self._writers["steps"].add_scalar(name, float(value), step, walltime=when)
                self._writers["tokens"].add_scalar(name, float(value), tokens, walltime=when)
        return True

    def take_samples(self, step: int, texts: list[tuple[str, str]]) -> bool:
        for prompt, text in texts:
            self._writers["steps"].add_text(f"samples/{prompt or 'no prompt'}", f"    {prompt}{text}", step)
        return True

    def finish(self) -> None:
        for writer in self._writers.values():
            writer.close()


def forget(folder: RunFolder) -> None:
    """Remove what is there, to be written anew. Raises OSError."""
    for name in FOLDERS:
        if (folder.tensorboard / name).is_dir():
            shutil.rmtree(folder.tensorboard / name)
