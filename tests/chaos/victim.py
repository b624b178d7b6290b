"""What the launcher starts in place of `train/pretrain.py`: the same `main`, with traps laid around named functions.

Where a checkpoint comes before the options, it is that of `train/finetune.py`.

Nothing of the product knows of this. A wrapped function that is no longer there ends the process with a status of its
own, so that a harness that hits nothing can't pass.
"""

import contextlib
import importlib
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from tests.chaos import spikes
from tests.chaos.phases import BROKEN_HOOK_STATUS, SOCKET_VARIABLE, TRAP_VARIABLE, Trap

# phase: (module, class or None, function) around which its trap lies
WRAPPED: dict[str, list[tuple[str, str | None, str]]] = {
    "start": [
        ("train.startup.open_run", None, "start_ranks"),
        ("train.assemble", None, "build_model"),
        ("train.restore", None, "load_on_all_ranks"),
    ],
    "forward": [("model.gpt", "GPT", "forward"), ("model.gpt", "GPT", "next_logits")],  # the second one samples
    "backward": [("torch", "Tensor", "backward")],
    "optimizer": [("train.optimization.adamw", "AdamW", "step")],
    "snapshot": [("train.checkpoints.snapshot", None, "take")],
    "write": [("train.checkpoints.background_write", None, "save_tensors")],
    "hash": [("train.checkpoints.background_write", None, "sha256_file")],
    "rename": [("train.checkpoints.writer", None, "publish_folder")],
    "validation": [  # one of them in a run
        ("train.evaluations.validation", "Validation", "measure"),
        ("train.evaluations.held_back_pairs", "HeldBackPairs", "measure"),
        ("train.evaluations.held_out_reward", "HeldOutReward", "measure"),
    ],
    "data": [("train.batches.loader", "StepBatch", "micro_batches")],
    "agreement": [("train.trainer", "Trainer", "_agree")],
    "end": [("train.trainer", "Trainer", "finish")],
}
WITHIN_A_STEP = ("forward", "backward", "optimizer", "data")  # validation and warm-up go forward too


class HookGone(Exception):
    """A function that a trap wraps is not where it was."""


class Harness:
    """The connection to the harness; one lock-step conversation."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect("\0" + os.environ[SOCKET_VARIABLE])
        self._answers = self._socket.makefile("rb")

    def tell(self, event: str, **facts: Any) -> None:
        message = {"event": event, "rank": self._rank, "pid": os.getpid(), **facts}
        self._socket.sendall(json.dumps(message).encode() + b"\n")

    def wait(self) -> None:
        """Until told to go on, or the harness is gone."""
        self._answers.readline()


class Snare:
    """Counts entries of the trap's phase and springs once."""

    def __init__(self, trap: Trap, harness: Harness) -> None:
        self.trap = trap
        self._harness = harness
        self._entries = 0
        self.sprung = False
        self.in_step = False
        self.step = 0

    @contextlib.contextmanager
    def around(self) -> Iterator[None]:
        """Put this around one entry of the phase."""
        counts = not self.sprung and (self.in_step or self.trap.phase not in WITHIN_A_STEP)
        self._entries += counts
        springs = counts and self._entries == self.trap.entry
        if springs and self.trap.moment != "after":
            self.spring()
        yield
        if springs and self.trap.moment == "after":
            self.spring()

    def spring(self) -> None:
        if self.sprung:
            return
        self.sprung = True
        self._harness.tell("reached", phase=self.trap.phase, step=self.step)
        if self.trap.moment != "during":
            self._harness.wait()


def lay(snare: Snare) -> None:
    """Wrap the functions of the snare's phase, and the step, which counts."""
    for module, owner, name in WRAPPED[snare.trap.phase]:
        wrap(module, owner, name, lambda original: surround(original, snare))
    wrap("train.optimization.step", "Stepper", "__call__", lambda original: watch_step(original, snare))
    objective = ("train.objectives.rollout_objective", "RolloutObjective")
    wrap(*objective, "updates", lambda original: watch_rollout(original, snare))


def surround(original: Callable[..., Any], snare: Snare) -> Callable[..., Any]:
    def surrounded(*arguments: Any, **keywords: Any) -> Any:
        with snare.around():
            return original(*arguments, **keywords)

    return surrounded


def watch_step(original: Callable[..., Any], snare: Snare) -> Callable[..., Any]:
    def watched(stepper: Any, batch: Any, step: int) -> Any:
        snare.step = step
        if snare.trap.phase == "start":
            snare.spring()  # this start had fewer entries than the trap counts: it is still the start
        snare.in_step = True
        try:
            return original(stepper, batch, step)
        finally:
            snare.in_step = False
            if snare.sprung:
                time.sleep(snare.trap.slow_seconds)

    return watched


def watch_rollout(original: Callable[..., Any], snare: Snare) -> Callable[..., Any]:
    """A step that samples begins with that."""

    def watched(objective: Any, batch: Any, step: int) -> Iterator[Any]:
        snare.step = step
        parts = original(objective, batch, step)
        while True:
            snare.in_step = True
            try:
                part = next(parts)
            except StopIteration:
                return
            finally:
                snare.in_step = False
            yield part

    return watched


def wrap(module: str, owner: str | None, name: str, wrapper: Callable[[Callable[..., Any]], Any]) -> None:
    """Replace a function by its wrapped self. Raises HookGone where it is no more."""
    try:
        place: Any = importlib.import_module(module)
        place = getattr(place, owner) if owner else place
        setattr(place, name, wrapper(getattr(place, name)))
    except (ImportError, AttributeError) as error:
        raise HookGone(f"{module}.{f'{owner}.' if owner else ''}{name}: {error}") from None


def main() -> None:
    rank = int(os.environ.get("RANK", "0"))
    harness = Harness(rank)
    harness.tell("hello")
    if os.environ.get(spikes.VARIABLE):
        spikes.plant(wrap)
    trap = Trap.from_json(os.environ[TRAP_VARIABLE]) if os.environ.get(TRAP_VARIABLE) else None
    if trap is not None and trap.rank == rank:
        snare = Snare(trap, harness)
        if trap.phase == "start":
            with snare.around():  # the first entry: nothing is imported yet
                pass
        try:
            lay(snare)
        except HookGone as error:
            print(f"a trap can't be laid any more: {error}", file=sys.stderr, flush=True)
            sys.exit(BROKEN_HOOK_STATUS)
    from common.errors import exit_on_user_error
    from train import finetune, pretrain

    tunes = len(sys.argv) > 1 and not sys.argv[1].startswith("-")
    exit_on_user_error(finetune.main if tunes else pretrain.main)


if __name__ == "__main__":
    main()
