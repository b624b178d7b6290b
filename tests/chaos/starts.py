"""The tiny runs of a campaign, and starting their trainers."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from common.run_folder import RunFolder
from tests.chaos import spikes
from tests.chaos.kind import BLOCK_SIZE, Kind, make_base, make_sets, write_mix
from tests.chaos.marks import OwnMark
from tests.chaos.phases import Trap
from tests.chaos.trainer import Trainer
from tests.eval.checkpoints import write_checkpoint
from tests.helpers.conversation_sets import short_tokenizer

PROJECT = Path(__file__).resolve().parents[2]
LAUNCH = str(PROJECT / "train" / "launch.py")
VICTIM = str(Path(__file__).with_name("victim.py"))
MAX_STEPS = 48
ROLLOUT_LENGTH = 48  # tokens of a sequence, of runs that sample answers or compare them
SAVE_EVERY = 2
KEEP_LAST = 3
MODEL = f"model: {{block_size: {BLOCK_SIZE}, n_layer: 2, n_head: 2, n_embd: 32, dropout: 0.1}}\n"
CONFIG = f"""
data: {{verify: full}}
optim: {{lr: 1.0e-2}}
schedule: {{warmup: 5}}
batch: {{tokens_per_step: 128, micro_batch: 2}}
checkpoint: {{every_steps: {SAVE_EVERY}, keep_last: {KEEP_LAST}}}
eval: {{every_steps: 3, tokens: 128, prompts: []}}
log: {{every_steps: 1, sequences: true, wandb_finish_seconds: 2}}
run: {{max_steps: {MAX_STEPS}, dtype: fp32, device: cpu}}
"""
DEFAULT = Kind()
CONVERSATIONS = "objective.kind=sft"  # the option of runs that learn from conversations
ROLLOUTS = {"objective.kind=grpo", "objective.kind=ppo"}  # of runs that sample answers, which start from a base
PAIRS = {"objective.kind=dpo", "objective.kind=reward"}  # of runs that learn from pairs of answers, with a base, too
REWARDS = """
def digits(prompts, completions, fields):
    return [sum(c.isdigit() for c in text) / 4 for text in completions]
"""
EVENT_SECONDS = 300.0  # without any event for so long, a start hangs


class Starts:
    """Starts trainers of one configuration on the same token sets, each with a mark and a log of its own."""

    def __init__(self, folder: Path, runs: Path, options: Sequence[str] = (), kind: Kind = DEFAULT) -> None:
        """Made once.

        Args:
            folder: for logs, configuration and data. runs: the folder of runs.
            options: of every start. kind: of the runs.
        """
        self.kind = kind
        self._folder = folder
        self._options = [f"--{option}" for option in options]
        self._runs = runs
        self.count = 0
        self._config = folder / "config.yaml"
        rolls_out, compares = not ROLLOUTS.isdisjoint(options), not PAIRS.isdisjoint(options)
        self._config.write_text(CONFIG if kind.adapted or rolls_out or compares else MODEL + CONFIG)
        self._base: list[str] = []  # what a fine-tuning is given before its options
        if kind.adapted:
            self._base = [str(make_base(folder / "base"))]
            self._options += [f"--{CONVERSATIONS}", "--lora.rank=4", "--batch.tokens_per_step=256", "--eval.tokens=320"]
        conversations = kind.adapted or rolls_out or CONVERSATIONS in options
        self._sets = make_sets(folder / "data", kind, conversations=conversations, pairs=compares)
        self._files = [self._config]
        if rolls_out or compares:
            spec = short_tokenizer().spec
            self._base = [str(write_checkpoint(folder / "base", tokenizer=spec, block_size=ROLLOUT_LENGTH, noise=0.3))]
        if compares:
            self._options += ["--batch.pairs_per_step=8", "--eval.tokens=480"]
        if rolls_out:
            (folder / "rewards.py").write_text(REWARDS)
            judge = {
                "tokenizer": short_tokenizer().spec,
                "block_size": ROLLOUT_LENGTH,
                "noise": 0.3,
                "scalar_head": True,
            }
            write_checkpoint(folder / "judge" / "checkpoints", seed=1, **judge)
            self._options += [f"--reward={folder / 'rewards.py'}:digits", f"--reward={folder / 'judge'}"]
        if kind.mixed:
            self._options += [f"--batch.tokens_per_step={BLOCK_SIZE * kind.sequences}", "--batch.micro_batch=1"]
            self._options += ["--data.packing=whole_documents", "--eval.tokens=96", "--eval.masked_loss=false"]
            self._files.append(folder / "mix.yaml")
            write_mix(folder / "mix.yaml", folder / "data")

    def shards(self) -> list[Path]:
        """Of all sets."""
        return sorted(path for tokens in self._sets for path in tokens.folder.glob("*.bin"))

    def forget_plans(self) -> None:
        """Let the next start make the packing plans anew."""
        for tokens in self._sets:
            for plan in tokens.folder.glob("packing-*"):
                shutil.rmtree(plan)

    def undisturbed(self, forked: OwnMark | None) -> RunFolder:
        """The run that the others are compared with, and before it the trunk where they are branches."""
        if self.kind.branched:
            files, self._files = self._files, [self._config]  # it reads the first set by itself
            trunk = self._finish(RunFolder(self._runs / "trunk"), forked, f"--run.max_steps={self.kind.first_step}")
            checkpoint = trunk.checkpoints / f"step-{self.kind.first_step:08d}"
            self._files, self._options = files, [*self._options, f"--resume={checkpoint}", "--allow-change=data.path"]
        return self._finish(RunFolder(self._runs / "reference"), forked)

    def _finish(self, run: RunFolder, forked: OwnMark | None, *more: str) -> RunFolder:
        ranks = 1 if len(self.kind.ranks) > 1 else self.kind.ranks[0]
        trainer = self.start(run, None, forked=forked, world_size=ranks, more=more)
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
        """Start or resume a run: the same command every time, but for `more`. One rank has no launcher."""
        self.count += 1
        launcher = [LAUNCH, "--standalone", f"--nproc_per_node={world_size}"]
        options = [
            *(f"--config={file}" for file in self._files),
            f"--data.path={self._sets[0].folder}",
            f"--run.root={self._runs}",
            f"--run.name={run.path.name}",
            *self._options,
            *(spikes.OPTIONS if self.kind.spiked else ()),
            *more,
        ]
        return Trainer(
            [*(launcher if world_size > 1 else []), VICTIM, *self._base, *options],
            mark=f"{os.getpid():08x}{self.count:08x}",  # no other campaign's, which may run beside this one
            output=self._folder / f"{run.path.name}-{self.count:03d}.log",
            trap=trap,
            environment=(environment or {}) | ({spikes.VARIABLE: str(self.kind.sequences)} if self.kind.spiked else {}),
            forked=forked,
        )
