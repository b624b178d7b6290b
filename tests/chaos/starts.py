"""The tiny runs of a campaign, and starting their trainers."""

import os
from collections.abc import Sequence
from pathlib import Path

from common.run_folder import RunFolder
from tests.chaos import spikes
from tests.chaos.marks import OwnMark
from tests.chaos.phases import Trap
from tests.chaos.trainer import Trainer
from tests.helpers.token_sets import make_token_set

PROJECT = Path(__file__).resolve().parents[2]
LAUNCH = str(PROJECT / "train" / "launch.py")
VICTIM = str(Path(__file__).with_name("victim.py"))
MAX_STEPS = 48
SAVE_EVERY = 2
KEEP_LAST = 3
CONFIG = f"""
model: {{block_size: 16, n_layer: 2, n_head: 2, n_embd: 32, dropout: 0.1}}
data: {{verify: full}}
optim: {{lr: 1.0e-2}}
schedule: {{warmup: 5}}
batch: {{tokens_per_step: 128, micro_batch: 2}}
checkpoint: {{every_steps: {SAVE_EVERY}, keep_last: {KEEP_LAST}}}
eval: {{every_steps: 3, tokens: 128, prompts: []}}
log: {{every_steps: 1, sequences: true, wandb_finish_seconds: 2}}
run: {{max_steps: {MAX_STEPS}, dtype: fp32, device: cpu}}
"""
EVENT_SECONDS = 300.0  # without any event for so long, a start hangs


class Starts:
    """Starts trainers of one configuration on one token set, each with a mark and a log of its own."""

    def __init__(self, folder: Path, runs: Path, options: Sequence[str] = (), *, spiked: bool = False) -> None:
        """Made once.

        Args:
            folder: for logs, configuration and data. runs: the folder of runs.
            options: of every start. spiked: the runs have loss spikes.
        """
        self._spiked = spiked
        self._folder = folder
        self._options = [f"--{option}" for option in options]
        self._runs = runs
        self.count = 0
        self._config = folder / "config.yaml"
        self._config.write_text(CONFIG)
        self.data = folder / "data"
        make_token_set(self.data, train_tokens=2_001, val_tokens=500, shard_tokens=300)

    def undisturbed(self, forked: OwnMark | None) -> RunFolder:
        """The run that the others are compared with."""
        run = RunFolder(self._runs / "reference")
        trainer = self.start(run, None, forked=forked)
        trainer.wait_until_gone(EVENT_SECONDS)
        trainer.close()
        state = run.read_state() or {}
        if trainer.status != 0 or state.get("status") != "done":
            raise AssertionError(f"the undisturbed run failed:\n{trainer.said()}")
        return run

    def start(
        self,
        run: RunFolder,
        trap: Trap | None,
        *,
        forked: OwnMark | None,
        world_size: int = 2,
        more: tuple[str, ...] = (),
        environment: dict[str, str] | None = None,
    ) -> Trainer:
        """Start a run, or go on with it: the same command every time, but for `more`."""
        self.count += 1
        launcher = [LAUNCH, "--standalone", f"--nproc_per_node={world_size}"]
        options = [
            f"--config={self._config}",
            f"--data.path={self.data}",
            f"--run.root={self._runs}",
            f"--run.name={run.path.name}",
            *self._options,
            *(spikes.OPTIONS if self._spiked else ()),
            *more,
        ]
        return Trainer(
            [*(launcher if world_size > 1 else []), VICTIM, *options],
            mark=f"{os.getpid():08x}{self.count:08x}",  # no other campaign's, which may run beside this one
            output=self._folder / f"{run.path.name}-{self.count:03d}.log",
            trap=trap,
            environment=(environment or {}) | ({spikes.VARIABLE: "1"} if self._spiked else {}),
            forked=forked,
        )
