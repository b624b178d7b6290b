"""Every section of the configuration, and all their keys: `section.key` in YAML and on the command line.

    model       architecture                          recompute   activation checkpointing
    data        what the run reads                    checkpoint  when to save, what to keep
    batch       tokens of a step, micro-batch         eval        validation, HellaSwag, samples
    objective   what is learned from the data         log         log lines, wandb
    rollout     answers that are sampled, and judged  profile     which steps to profile
    preference  pairs of answers that are compared    run         name, seed, length, device, deadline
    optim       the optimizer                         schedule    learning rate over the run
    lora        adapters: train/finetune.py only

Each section checks itself; what needs two sections is checked by `Config`, what needs the data or the machine in
`train.startup`. Nothing here imports torch. docs/options.md is made from these docstrings.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from typing import Any, Literal

from common.batch_stages import BatchStages
from model.config import ModelConfig, preset_config
from model.lora_config import TARGETS, LoraConfig, adapter_count

ScheduleKind = Literal["cosine", "wsd", "constant"]
DecayKind = Literal["constant", "linear", "cosine"]
MOST_PROFILED_STEPS = 20
TAKEN_NAMES = ("val", "hellaswag")  # of other figures


@dataclass(frozen=True)
class ModelSection(ModelConfig):
    """The architecture.

    Args:
        preset: a named size to start from; the other options of this section change it.
    """

    preset: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preset is not None:
            preset_config(self.preset)

    def architecture(self) -> ModelConfig:
        """The model's own configuration, without the preset's name."""
        values = asdict(self)
        del values["preset"]
        return ModelConfig(**values)


@dataclass(frozen=True)
class MixSource:
    """One token set of `data.mix`. `weight`: its share of the trained tokens, among all weights.

    Args:
        start: how many sequences of its order are passed over, as read before; null: none, and on a branch those that
            the run it comes from has read, which its config.yaml then has.
    """

    name: str
    path: str
    weight: float = 1.0
    max_epochs: float | None = None
    start: int | None = None


@dataclass(frozen=True)
class MixStage:
    """The weights of `data.mix` up to so many trained tokens; null: to the end. They are reached over `ramp_tokens`."""

    weights: dict[str, float]
    until_tokens: int | None = None
    ramp_tokens: int = 0


@dataclass(frozen=True)
class DataConfig:
    """What the run reads.

    Args:
        path: folder of a token set (manifest.json and shards). A relative path is looked for in the working directory,
            then in the project. In this and all other paths `~` and `$VARIABLE` are replaced at each start.
        mix: several token sets in place of `path`, each with a name, its path, its weight (share of the trained
            tokens), max_epochs, above which a run is refused, and start, the sequences to pass over. Shares are kept to
            within one sequence at any position.
        stages: other weights of the mix up to a number of trained tokens (until_tokens), reached at once or over
            ramp_tokens; a source that a stage doesn't name is not read in it.
        verify: check at the start the shards' sizes, or also their SHA-256 (full; reads all of the data once).
        stage_to: a folder on a disk of every node's own, to which the shards are copied and verified before the first
            step; where the disk has no room, or no permission is given, the run reads them where they are, and logs so.
        packing: stream lays documents end to end and cuts them into sequences; whole_documents cuts no document that
            fits into a sequence, and pads the little that is left of some.
        document_mask: keep attention inside documents; without it a sequence is one text, whatever documents it holds;
            auto: with packing whole_documents.
        stride: tokens from one training sequence's start to the next's; null: model.block_size, so that an epoch reads
            each token once. With less, sequences overlap and an epoch is longer; 1 starts one at every token.
            Validation never overlaps.
        seed: of the order of the training sequences; null: run.seed. With one of the two held, several runs differ only
            in initialisation (and dropout), or only in the order.
    """

    path: str = "data/fineweb-edu"
    mix: list[MixSource] = field(default_factory=list)
    stages: list[MixStage] = field(default_factory=list)
    verify: Literal["size", "full"] = "size"
    stage_to: str | None = None
    packing: Literal["stream", "whole_documents"] = "stream"
    document_mask: bool | Literal["auto"] = "auto"
    stride: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.stride is not None and self.stride < 1:
            raise ValueError(f"data.stride is {self.stride}: use 1 token or more, or null for model.block_size")
        if self.stride is not None and self.packing != "stream":
            raise ValueError(
                f"data.stride is {self.stride}, but data.packing {self.packing} overlaps nothing: use null"
            )
        self._check_mix()
        if self.stage_to == "":
            raise ValueError("data.stage_to is empty (a variable that is not set, in a shell?): give a folder, or null")

    def _check_mix(self) -> None:
        names = [source.name for source in self.mix]
        for name in names:
            if not re.fullmatch("[A-Za-z0-9][A-Za-z0-9_.-]{0,31}", name) or names.count(name) > 1:
                raise ValueError(f"data.mix has the name {name!r}: give each source one of letters, digits, _ . and -")
        for source in self.mix:
            if source.max_epochs is not None and not source.max_epochs > 0:
                raise ValueError(f"data.mix: max_epochs of {source.name} is {source.max_epochs}: use more than 0")
            if source.start is not None and source.start < 0:
                raise ValueError(f"data.mix: start of {source.name} is {source.start}: use 0 or more, or leave it out")
        if self.stages and not self.mix:
            raise ValueError("data.stages is set and data.mix is empty: name the sources there")
        until = 0
        for number, stage in enumerate(self.stages, start=1):
            if unknown := sorted(set(stage.weights) - set(names)):
                raise ValueError(f"data.stages: {unknown[0]} is not in data.mix ({', '.join(names)})")
            end = math.inf if stage.until_tokens is None else stage.until_tokens
            if end <= until or (number < len(self.stages) and stage.until_tokens is None):
                raise ValueError(f"data.stages: stage {number} ends at {stage.until_tokens}: give rising until_tokens")
            if not 0 <= stage.ramp_tokens < end - until:
                raise ValueError(
                    f"data.stages: ramp_tokens of stage {number} is {stage.ramp_tokens}: use 0 or more, and fewer than "
                    "the stage has tokens"
                )
            until = stage.until_tokens or 0
        for weights in [{source.name: source.weight for source in self.mix}, *(s.weights for s in self.stages)]:
            values = [*weights.values()]
            if self.mix and not (values and min(values) >= 0 and 0 < sum(values) < math.inf):
                raise ValueError(f"data.mix: the weights {weights} must not be negative, and one must be above 0")

    @property
    def planned_mix(self) -> tuple[dict[str, float], list[tuple[dict[str, float], int | None, int]]]:
        """The weights of all sources, and of each stage with where it ends and its ramp, in tokens."""
        stages = [(stage.weights, stage.until_tokens, stage.ramp_tokens) for stage in self.stages]
        return {source.name: source.weight for source in self.mix}, stages

    @property
    def masks_documents(self) -> bool:
        """Whether attention stays inside documents."""
        return self.is_packed if self.document_mask == "auto" else self.document_mask

    @property
    def is_packed(self) -> bool:
        """Whether sequences are made of whole documents."""
        return self.packing == "whole_documents"


@dataclass(frozen=True)
class ObjectiveConfig:
    """What the run learns from its data. It stays the same over a run.

    Args:
        kind: what is learned, as docs/after-pretraining.md describes. language_modelling: every token from those before
            it; or sft (`--objective sft`), supervised fine-tuning (Ouyang et al. 2022, arXiv:2203.02155): the answers
            of conversations, which data_prep/conversations.py prepares. Conversations are packed whole, and attention
            stays inside them; or grpo (Shao et al. 2024, arXiv:2402.03300): answers that the model samples to the
            conversations' prompts, by their rewards (section rollout; train/finetune.py only); or ppo (Schulman et al.
            2017, arXiv:1707.06347), which learns from the same, and from a value of every token, by a scalar head; or
            dpo (Rafailov et al. 2023, arXiv:2305.18290): which of two answers was preferred (section preference; data
            of data_prep/preferences.py, train/finetune.py only); or reward, a reward model that scores answers, learned
            from the same data (Ouyang et al. 2022, section 3.5).
    """

    kind: Literal["language_modelling", "sft", "grpo", "ppo", "dpo", "reward"] = "language_modelling"

    @property
    def rolls_out(self) -> bool:
        """Whether it learns from answers that the model samples in every step."""
        return self.kind in ("grpo", "ppo")

    @property
    def compares(self) -> bool:
        """Whether it learns from pairs of answers."""
        return self.kind in ("dpo", "reward")

    @property
    def is_exact(self) -> bool:
        """Whether it compares log-probabilities of one policy with another's, which dropout would blur."""
        return self.rolls_out or self.kind == "dpo"

    @property
    def scores(self) -> bool:
        """Whether only the model's scalar head gives what is learned."""
        return self.kind == "reward"

    @property
    def learns_scalar_head(self) -> bool:
        """Whether the model has a scalar head, which learns scores or values."""
        return self.kind in ("reward", "ppo")


@dataclass(frozen=True)
class PreferenceConfig:
    """How pairs of a chosen and a rejected answer are learned from; of --objective dpo.

    Args:
        loss: sigmoid (Rafailov et al. 2023, equation 7), or ipo (Azar et al. 2023, arXiv:2310.12036), whose margin has
            a goal, so that pairs that are told apart well enough are not driven further.
        beta: how dear it is to move away from the policy that the run started from: smaller moves further.
        label_smoothing: share of pairs that are taken to be labelled the wrong way round; of the sigmoid loss.
        likelihood: weight of the chosen answer's mean negative log-probability, added to the loss (Pang et al. 2024,
            arXiv:2404.19733): against chosen answers that become less likely, too.
    """

    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    likelihood: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.beta < math.inf:
            raise ValueError(f"preference.beta is {self.beta}: use more than 0")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"preference.label_smoothing is {self.label_smoothing}: use 0 or more, and less than 0.5")
        if self.label_smoothing and self.loss == "ipo":
            raise ValueError("preference.label_smoothing doesn't go with preference.loss ipo: leave it out")
        if not 0 <= self.likelihood < math.inf:
            raise ValueError(f"preference.likelihood is {self.likelihood}: use 0 or more")


@dataclass(frozen=True)
class RolloutConfig:
    """Answers that the model samples in every step, and what they are worth; of --objective grpo and ppo.

    Args:
        prompts_per_step: prompts of one step, over all ranks.
        samples: answers to each of them, with grpo the group that they are compared in.
        max_tokens: of an answer, its end token included; one that is longer is cut.
        temperature: what logits are divided by, for sampling and for log-probabilities alike.
        prompts_per_block: prompts that a rank answers side by side, with all their samples. It is part of what is
            sampled: other blocks may round otherwise. More are faster and take more memory.
        reward: what judges answers: functions in Python, each as FILE.py:FUNCTION, and reward models, each by its run
            or checkpoint; WEIGHT* before one weighs it. Their weighted sum is learned from (`--reward
            rewards.py:exact_answer`, `--reward 0.5*runs/demo-reward`).
        epochs: how often a step goes through its answers.
        minibatches: updates of the optimizer in each epoch, all of one size.
        clip: how far the ratio of new and old probability may move from 1 to be learned from.
        kl: weight of the KL from the policy that the run started from, with grpo in the loss, with ppo in the reward of
            each token; 0 keeps no such policy.
        deviation_term: divide advantages by their group's standard deviation (Shao et al.); without it, Liu et al.
            2025, arXiv:2503.20783. Of grpo only.
        length_term: what the losses of an answer's tokens are divided by: answers, by their number, and the answers
            count alike (Shao et al.); tokens, by that of all answers, and tokens count alike (Yu et al. 2025,
            arXiv:2503.14476); constant, by max_tokens (Liu et al. 2025). Of grpo only: with ppo tokens count alike.
        mask_cut: learn nothing from answers that were cut; their rewards count in their groups all the same.
        cut_reward: what an answer that was cut is worth, whatever its judges say, which may only know whole ones; null:
            what they say.
        gamma: what a token's reward is worth one token earlier; of ppo, as the following.
        gae_lambda: how far advantages look ahead at rewards, rather than trust the next value: 1 to the end, 0 not at
            all (Schulman et al. 2016, arXiv:1506.02438).
        value_clip: how far a step may move a token's value to learn from it.
        value_weight: of the values' loss, beside the policy's.
        held_out_prompts: how many prompts of the validation split are answered, with the likeliest tokens, at each
            validation, for the held-out reward; 0 none.
    """

    prompts_per_step: int = 32
    samples: int = 8
    max_tokens: int = 128
    temperature: float = 1.0
    prompts_per_block: int = 8
    reward: list[str] = field(default_factory=list)
    epochs: int = 1
    minibatches: int = 1
    clip: float = 0.2
    kl: float = 0.04
    deviation_term: bool = True
    length_term: Literal["answers", "tokens", "constant"] = "answers"
    mask_cut: bool = False
    cut_reward: float | None = None
    gamma: float = 1.0
    gae_lambda: float = 0.95
    value_clip: float = 0.2
    value_weight: float = 0.1
    held_out_prompts: int = 256

    def __post_init__(self) -> None:
        counts = ("prompts_per_step", "samples", "max_tokens", "prompts_per_block", "epochs", "minibatches")
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"rollout.{name} is {getattr(self, name)}: use 1 or more")
        if self.prompts_per_step % self.minibatches:
            raise ValueError(
                f"rollout.minibatches is {self.minibatches}, which doesn't divide rollout.prompts_per_step "
                f"{self.prompts_per_step}: use a divisor of it"
            )
        for name in ("temperature", "clip", "value_clip", "value_weight"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"rollout.{name} is {getattr(self, name)}: use more than 0")
        if not 0 <= self.kl < math.inf or self.held_out_prompts < 0:
            raise ValueError("rollout.kl and rollout.held_out_prompts must not be negative")
        if not 0 < self.gamma <= 1 or not 0 <= self.gae_lambda <= 1:
            raise ValueError("rollout.gamma must be above 0, rollout.gae_lambda 0 or more, and neither above 1")

    @property
    def sequences(self) -> int:
        """Answers of a step."""
        return self.prompts_per_step * self.samples


@dataclass(frozen=True)
class BatchConfig:
    """The size of one optimizer step's batch, and how it is divided.

    Args:
        tokens_per_step: target tokens of one optimizer step, over all ranks.
        warmup: a batch that grows by stages, as pairs of tokens: [from so many tokens of the run on, tokens a step].
            The first stage starts at 0, the last has tokens_per_step: [[0, 131072], [104857600, 524288]]. Empty: the
            same batch in every step.
        micro_batch: sequences of one forward and backward on one rank; `auto` takes the most that fit in memory.
        pairs_per_step: with --objective dpo or reward the batch, in pairs over all ranks, each of two sequences;
            tokens_per_step follows from it.
    """

    tokens_per_step: int = 524_288
    warmup: list[list[int]] = field(default_factory=list)
    micro_batch: int | Literal["auto"] = "auto"
    pairs_per_step: int = 64

    def __post_init__(self) -> None:
        if self.tokens_per_step < 1:
            raise ValueError(f"batch.tokens_per_step is {self.tokens_per_step}: use a positive number of tokens")
        _ = self.stages
        if isinstance(self.micro_batch, str) and self.micro_batch != "auto":
            raise ValueError(f"batch.micro_batch is {self.micro_batch!r}: use a number of sequences, or auto")
        if isinstance(self.micro_batch, int) and self.micro_batch < 1:
            raise ValueError(f"batch.micro_batch is {self.micro_batch}: use 1 or more sequences, or auto")
        if self.pairs_per_step < 1:
            raise ValueError(f"batch.pairs_per_step is {self.pairs_per_step}: use 1 or more")

    @property
    def stages(self) -> BatchStages:
        """The batch over the run. Raises ValueError where warmup makes no stages."""
        return BatchStages.of(self.warmup, self.tokens_per_step)


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer.

    Args:
        kind: adamw (Loshchilov & Hutter 2017), or muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/)
            for the matrices of the blocks, with adamw for embeddings, head, norms, biases and all else.
        lr: peak learning rate.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay, applied to parameters of two or more dimensions.
        z_loss: coefficient of the z-loss, logsumexp(logits)² of each target, which is learned from beside the
            cross-entropy (PaLM, Chowdhery et al. 2022, arXiv:2204.02311, with 1e-4) and recorded as z_loss; 0: none.
        grad_clip: largest global gradient norm (L2); larger gradients are scaled down to it. 0 switches clipping off.
        fused: one kernel for the whole update, several times faster than a kernel per tensor, on CPU as well; with muon
            for adamw's part.
        shard: each rank keeps and updates only its part of the optimizer's state, and sends the weights of that part to
            the others after every step; the weights stay the same to the bit. auto: only where the whole state would
            not fit into a rank's memory. It may change from one start to the next.
        muon_lr: peak learning rate of muon's matrices; it follows the same schedule. null: optim.lr, which fits with
            muon_scale rms.
        muon_momentum: decay of muon's mean of gradients.
        muon_momentum_warmup: steps over which muon_momentum is reached, linearly from muon_momentum_start (Jordan et
            al. 2024, https://github.com/KellerJordan/modded-nanogpt, with 300); 0: none.
        muon_momentum_start: muon's momentum in the first step of muon_momentum_warmup.
        muon_nesterov: look one step ahead of that mean.
        muon_iterations: Newton-Schulz iterations that make an update orthogonal; 5 in Jordan et al. and in Liu et al.
        muon_weight_decay: decoupled weight decay of muon's matrices, times muon_lr without any scale; null:
            optim.weight_decay (Liu et al. 2025 decay both alike; without decay their weights grew).
        muon_scale: how large an orthogonal update is: rms, 0.2 sqrt(max(rows, columns)), as large as adamw's usually
            are, so that its rates and decay fit (Liu et al. 2025, arXiv:2502.16982); or shape, sqrt(max(1, rows /
            columns)), for rates around 0.02 (Jordan et al. 2024).
        ema_half_life_tokens: keep an exponential average of the weights beside them, in which what is so many tokens
            older counts half; null keeps none. Training is the same to the bit with and without. Evaluations take it
            with eval.weights ema, and commands with --weights ema.
    """

    kind: Literal["adamw", "muon"] = "adamw"
    lr: float = 6e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    z_loss: float = 0.0
    grad_clip: float = 1.0
    fused: bool = True
    shard: bool | Literal["auto"] = "auto"
    muon_lr: float | None = None
    muon_momentum: float = 0.95
    muon_momentum_warmup: int = 0
    muon_momentum_start: float = 0.85
    muon_nesterov: bool = True
    muon_iterations: int = 5
    muon_weight_decay: float | None = None
    muon_scale: Literal["rms", "shape"] = "rms"
    ema_half_life_tokens: int | None = None

    def __post_init__(self) -> None:
        for name, rate in (("lr", self.lr), ("muon_lr", self.muon_lr)):
            if rate is not None and rate <= 0:
                raise ValueError(f"optim.{name} is {rate}: use a positive learning rate")
        for name, momentum in (("", self.muon_momentum), ("_start", self.muon_momentum_start)):
            if not 0 <= momentum < 1:
                raise ValueError(f"optim.muon_momentum{name} is {momentum}: use 0 or more, below 1")
        if self.muon_momentum_warmup < 0:
            raise ValueError(f"optim.muon_momentum_warmup is {self.muon_momentum_warmup}: use a number of steps, or 0")
        if not 1 <= self.muon_iterations <= 20:
            raise ValueError(f"optim.muon_iterations is {self.muon_iterations}: use 1 to 20")
        if (self.muon_weight_decay or 0) < 0:
            raise ValueError(f"optim.muon_weight_decay is {self.muon_weight_decay}: use 0 or more, or null")
        if self.ema_half_life_tokens is not None and self.ema_half_life_tokens < 1:
            raise ValueError(
                f"optim.ema_half_life_tokens is {self.ema_half_life_tokens}: use a positive number of tokens, or null"
            )
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ValueError(f"optim.beta1 and optim.beta2 are {self.beta1} and {self.beta2}: use 0 or more, below 1")
        if not 0 <= self.z_loss < math.inf:
            raise ValueError(f"optim.z_loss is {self.z_loss}: use 0 or more")
        if self.eps <= 0 or self.weight_decay < 0 or self.grad_clip < 0:
            raise ValueError("optim.eps must be positive, optim.weight_decay and optim.grad_clip not negative")

    def is_sharded(self, world_size: int) -> bool:
        """Whether several ranks share the state. `auto` counts as no: it has been replaced once that is decided."""
        return self.shard is True and world_size > 1


@dataclass(frozen=True)
class ScheduleConfig:
    """How the learning rate and the weight decay move over the run.

    Args:
        kind: cosine (Loshchilov & Hutter 2016, one half period after the warm-up), wsd (warm-up, stable, decay; Hu et
            al. 2024, MiniCPM; with final_lr_fraction 0 a linear decay to zero), or constant (after the warm-up).
        warmup: linear warm-up, in steps, or as a fraction of the run below 1. It is fixed in steps at the run's first
            start: an extension or a branch does not move it.
        decay: wsd's linear decay at the end, in steps, or as a fraction of the run below 1.
        final_lr_fraction: the last learning rate as a fraction of the peak.
        weight_decay: optim.weight_decay (and optim.muon_weight_decay) over the run, beside the learning rate that it is
            multiplied by: constant, or falling from the first step to run.max_steps, linear or cosine (linear to zero:
            Karpathy 2025, https://github.com/karpathy/nanochat).
        final_weight_decay_fraction: where linear and cosine end, as a fraction of the weight decay.
        independent_weight_decay: multiply the weight decay by the peak learning rate in every step, not by the
            schedule's: a step that learns less does not decay less (Loshchilov & Hutter 2017, arXiv:1711.05101;
            Wortsman et al. 2023, arXiv:2309.14322).
        rewarm: start the schedule again at the step that is resumed from, in a branch or at the first start of the run
            that asks for it: a warm-up of schedule.warmup, then what follows up to run.max_steps. It is recorded:
            later starts don't warm up once more.
    """

    kind: ScheduleKind = "cosine"
    warmup: int | float = 0.01
    decay: int | float = 0.2
    final_lr_fraction: float = 0.1
    weight_decay: DecayKind = "constant"
    final_weight_decay_fraction: float = 0.0
    independent_weight_decay: bool = False
    rewarm: bool = False

    def __post_init__(self) -> None:
        for name in ("warmup", "decay"):
            value = getattr(self, name)
            if value < 0 or (value >= 1 and value != int(value)):
                raise ValueError(f"schedule.{name} is {value}: use whole steps, or a fraction of the run below 1")
        if not 0 <= self.final_lr_fraction <= 1:
            raise ValueError(f"schedule.final_lr_fraction is {self.final_lr_fraction}: use a number from 0 to 1")
        if not 0 <= (share := self.final_weight_decay_fraction) <= 1:
            raise ValueError(f"schedule.final_weight_decay_fraction is {share}: use a number from 0 to 1")


@dataclass(frozen=True)
class RecomputeConfig:
    """Activation checkpointing (Chen et al. 2016): forget activations, compute them again in the backward.

    Args:
        mode: none, full (every block), every (every `every_blocks`-th block), or auto: none where the estimated memory
            allows, else full.
        every_blocks: with mode every, how many blocks there are from one recomputed block to the next.
        norms: in blocks that are kept, recompute each norm together with the projection after it.
    """

    mode: Literal["auto", "none", "full", "every"] = "auto"
    every_blocks: int = 2
    norms: bool = False

    def __post_init__(self) -> None:
        if self.every_blocks < 1:
            raise ValueError(f"recompute.every_blocks is {self.every_blocks}: use 1 or more")


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep. The last step is always saved.

    Args:
        every_steps: save after every so many steps; 0 saves only at the end.
        asynchronous: training continues while a checkpoint is written, and waits only for a copy to host memory; false
            waits until it is published.
        on_failure: what a save that fails (disk full, quota, read-only, a file system that doesn't answer for longer
            than a moment) means: continue with a warning and try again when the next save is due, or stop the run. The
            last save of a run must succeed either way.
        max_failures: after so many failed saves in a row the run stops anyway.
        keep_last: how many of the newest checkpoints are kept.
        keep_every_steps: checkpoints at multiples of this are kept for good; 0 keeps none for good.
        keep_best: the checkpoint with the lowest validation loss, measured at its own step and on what the newest was
            measured on, is kept as well.
        weights_every_steps: at multiples of this, which must be multiples of every_steps, only the weights are kept for
            good (checkpoints/weights-…), to be evaluated; 0 keeps none.
    """

    every_steps: int = 500
    asynchronous: bool = True
    on_failure: Literal["continue", "stop"] = "continue"
    max_failures: int = 3
    keep_last: int = 2
    keep_every_steps: int = 0
    keep_best: bool = True
    weights_every_steps: int = 0

    def __post_init__(self) -> None:
        if min(self.every_steps, self.keep_every_steps, self.weights_every_steps) < 0:
            raise ValueError(
                "checkpoint.every_steps, checkpoint.keep_every_steps and checkpoint.weights_every_steps must not be "
                "negative"
            )
        if self.max_failures < 1:
            raise ValueError(f"checkpoint.max_failures is {self.max_failures}: use 1 or more")
        if self.keep_last < 1:
            raise ValueError(f"checkpoint.keep_last is {self.keep_last}: use 1 or more")
        if self.weights_every_steps and (not self.every_steps or self.weights_every_steps % self.every_steps):
            raise ValueError(
                f"checkpoint.weights_every_steps is {self.weights_every_steps}: use a multiple of "
                f"checkpoint.every_steps ({self.every_steps}), as the weights come from a checkpoint"
            )


@dataclass(frozen=True)
class EvalConfig:
    """Validation, HellaSwag and samples during the run. The last step is always validated.

    Args:
        every_steps: validate after every so many steps; 0 validates only at the end.
        weights: which weights validation, HellaSwag, choices and samples use: trained, or ema, the exponential average
            of optim.ema_half_life_tokens.
        tokens: how many tokens of the validation split to use, from its start: the same ones every time.
        masked_loss: also validate with attention inside documents (val_loss_masked), to compare runs with and without
            data.document_mask; auto: for data.packing whole_documents.
        sample_every_steps: let the model generate text after every so many steps; 0 never.
        sample_tokens: tokens of each sample.
        temperature: sampling temperature; 0 always takes the most likely token.
        top_k: sample among the k most likely tokens; 0 among all.
        prompts: what the samples start with.
        hellaswag_every_steps: answer HellaSwag after every so many steps and at the end; 0 never.
        hellaswag_examples: how many of its examples, spread over the file: the same ones every time.
        hellaswag_data: its JSONL, or six lines an example; null takes what data_prep/prepare_offline.py fetched.
        choices: multiple-choice files of your own, by the name of their figures; a line is JSON with context, endings
            and label.
        choices_every_steps: answer them after every so many steps and at the end; 0 never.
        choices_examples: how many of each file's, spread over it: the same ones every time.
    """

    every_steps: int = 250
    weights: Literal["trained", "ema"] = "trained"
    tokens: int = 1_048_576
    masked_loss: bool | Literal["auto"] = "auto"
    sample_every_steps: int = 0
    sample_tokens: int = 48
    temperature: float = 0.8
    top_k: int = 50
    prompts: list[str] = field(default_factory=lambda: ["The purpose of education is", "Once upon a time"])
    hellaswag_every_steps: int = 0
    hellaswag_examples: int = 1000
    hellaswag_data: str | None = None
    choices: dict[str, str] = field(default_factory=dict)
    choices_every_steps: int = 0
    choices_examples: int = 1000

    def __post_init__(self) -> None:
        intervals = (self.every_steps, self.sample_every_steps, self.hellaswag_every_steps, self.choices_every_steps)
        if min(*intervals, self.temperature, self.top_k) < 0:
            raise ValueError("the numbers of section eval must not be negative")
        if min(self.tokens, self.sample_tokens, self.hellaswag_examples, self.choices_examples) < 1:
            raise ValueError(
                "eval.tokens, eval.sample_tokens, eval.hellaswag_examples and eval.choices_examples must be positive"
            )
        for name in self.choices:
            if not re.fullmatch("[a-z][a-z0-9_]{0,31}", name) or name in TAKEN_NAMES:
                raise ValueError(
                    f"eval.choices has {name!r}: give a name of lower-case letters, digits and _, other than "
                    f"{' and '.join(TAKEN_NAMES)}"
                )
        if self.choices_every_steps and not self.choices:
            raise ValueError("eval.choices_every_steps is set and eval.choices is empty: name files there")


@dataclass(frozen=True)
class LogConfig:
    """The terminal and mirrors of metrics.jsonl, which records every step whatever is set here.

    Args:
        every_steps: a line in the log after every so many steps.
        sequences: record the numbers of the sequences that each step used.
        statistics_every: record after every so many steps how large each layer's gradients, weights, updates and
            activations are; 0 never. Training is the same to the bit with and without.
        tensorboard: write the record for TensorBoard, too, into the run's `tensorboard/`, over steps and over tokens.
        wandb: mirror the record to Weights & Biases; offline unless the environment variable WANDB_MODE is online.
        wandb_project: the wandb project, unless the environment variable WANDB_PROJECT names one.
        wandb_finish_seconds: how long the end of the run waits for a mirror.
    """

    every_steps: int = 10
    sequences: bool = False
    statistics_every: int = 0
    tensorboard: bool = False
    wandb: bool = False
    wandb_project: str = "longhaul"
    wandb_finish_seconds: float = 60.0

    def __post_init__(self) -> None:
        if self.every_steps < 1:
            raise ValueError(f"log.every_steps is {self.every_steps}: use 1 or more")
        if self.statistics_every < 0:
            raise ValueError(f"log.statistics_every is {self.statistics_every}: use 0 for never, or a number of steps")


@dataclass(frozen=True)
class ProfileConfig:
    """PyTorch's profiler over a few steps: traces, and a table of where the time went, in the run's `profile/`.

    Args:
        first: the first step to profile, counted from the start of the run; 0 profiles none. A resumed run leaves out
            those that are already done.
        steps: how many steps to profile, at most 20: each adds megabytes to the traces.
    """

    first: int = 0
    steps: int = 3

    def __post_init__(self) -> None:
        if self.first < 0:
            raise ValueError(f"profile.first is {self.first}: give a step, or 0 to profile none")
        if not 1 <= self.steps <= MOST_PROFILED_STEPS:
            raise ValueError(f"profile.steps is {self.steps}: give 1 to {MOST_PROFILED_STEPS}")


@dataclass(frozen=True)
class RunConfig:
    """The run.

    Args:
        root: folder of all runs. A relative path is looked for in the working directory, then in the project; where
            neither has the run it is a new one in the working directory.
        name: the run's folder under `root`; null takes the configuration file's name. The same name continues the run.
        seed: of initialisation, dropout and samples, and of the data's order unless data.seed is given.
        max_steps: optimizer steps of the whole run, which the schedule spans.
        device: where to compute; auto takes a GPU where there is one.
        dtype: of matrix multiplications; auto takes bf16 where the hardware has it.
        stream_dtype: of the residual stream that the blocks add to, in training and its evaluations; bf16 (with dtype
            bf16) moves half the bytes between a GPU's kernels, at some cost in loss.
        compile: torch.compile; auto compiles on GPUs and falls back with a message where a trial fails.
        deterministic: the same bits on every run on CUDA too, compiled or not, without TensorFloat-32, at some cost in
            speed.
        collective_timeout_seconds: how long a rank waits for the others before the run is given up.
        hang_seconds: after so long without progress the rank that the others wait for is named; null: 60, or 5 times
            the longest step, validation or save so far, and 1,800 for the first of each kind and for compilations. A
            rank that has stopped altogether is named within a minute in any case.
        hang_limit_seconds: without any progress for so long the run ends itself, with each rank's stacks in ranks/.
        deadline: save and stop in time for this moment: an ISO time such as 2026-05-01T06:00 (local, or with its
            offset), slurm (the end of the job as scontrol gives it, asked for every minute; SLURM_JOB_END_TIME where it
            never answers), auto (slurm inside a Slurm job, else none) or null.
        deadline_margin_seconds: start to stop at least so long before; more where steps, validations and saves so far
            have taken longer.
        on_nonfinite: what a step whose loss or gradient norm is NaN or inf means: stop the run before the update, or
            skip the step.
        on_spike: what a step means whose loss or gradient norm lies far above those of the last 128 steps: record it
            (and learn from it), skip it, or skip it and roll the run back to a checkpoint from before it, past the
            data, if the run does not get over it.
        max_skips: how many of the last 128 steps may be skipped; one more stops the run, or rolls it back.
        max_rollbacks: how often the run may be rolled back before it stops.
        check_replicas_every_steps: compare the weights of all ranks after every so many steps, beside each save; 0
            only at saves.
        record_diff: keep the uncommitted changes of the sources in provenance.json, credentials masked.
        lock_patience_seconds: how long the lock of a trainer on another machine must go without a renewal before that
            trainer is taken for dead. One on the same machine is looked for, without any wait.
    """

    root: str = "runs"
    name: str | None = None
    seed: int = 1337
    max_steps: int = 19_073
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    stream_dtype: Literal["fp32", "bf16"] = "fp32"
    compile: bool | Literal["auto"] = "auto"
    deterministic: bool = False
    collective_timeout_seconds: float = 1800.0
    hang_seconds: float | None = None
    hang_limit_seconds: float = 600.0
    deadline: str | None = "auto"
    deadline_margin_seconds: float = 60.0
    lock_patience_seconds: float = 60.0
    on_nonfinite: Literal["stop", "skip"] = "stop"
    on_spike: Literal["record", "skip", "rollback"] = "record"
    max_skips: int = 8
    max_rollbacks: int = 3
    check_replicas_every_steps: int = 0
    record_diff: bool = True

    def __post_init__(self) -> None:
        if self.max_steps < 1:
            raise ValueError(f"run.max_steps is {self.max_steps}: use 1 or more")
        if self.name is not None and (not self.name or "/" in self.name or self.name.startswith(".")):
            raise ValueError(f"run.name is {self.name!r}: use a plain folder name")
        if self.deadline not in ("auto", "slurm", None):
            try:
                parse_time(self.deadline)
            except ValueError:
                raise ValueError(
                    f"run.deadline is {self.deadline!r}: use a time such as 2026-05-01T06:00, slurm, auto or null"
                ) from None
        if self.deadline_margin_seconds < 0:
            raise ValueError("run.deadline_margin_seconds must not be negative")
        if self.hang_seconds is not None and self.hang_seconds < 1:
            raise ValueError(f"run.hang_seconds is {self.hang_seconds}: give 1 or more, or null")
        if self.hang_limit_seconds < (self.hang_seconds or 1):
            raise ValueError(
                f"run.hang_limit_seconds is {self.hang_limit_seconds}: give at least {self.hang_seconds or 1}"
            )
        if min(self.max_skips, self.max_rollbacks, self.check_replicas_every_steps) < 0:
            raise ValueError("run.max_skips, run.max_rollbacks and run.check_replicas_every_steps must not be negative")
        if self.collective_timeout_seconds <= 0 or self.lock_patience_seconds <= 0:
            raise ValueError("run.collective_timeout_seconds and run.lock_patience_seconds must be positive")


@dataclass(frozen=True)
class Config:
    """Everything a run is made from."""

    model: ModelSection = field(default_factory=ModelSection)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        if self.data.stride is not None and self.data.stride > self.model.block_size:
            raise ValueError(
                f"data.stride is {self.data.stride}, which leaves out tokens between sequences of model.block_size "
                f"{self.model.block_size}: use at most that"
            )
        if self.model.scalar_head and not self.objective.learns_scalar_head:
            raise ValueError(
                f"model.scalar_head is true, a reward model's or a value function, but --objective "
                f"{self.objective.kind} would not train it: add --model.scalar_head false"
            )
        if self.eval.weights == "ema" and self.optim.ema_half_life_tokens is None:
            raise ValueError("eval.weights is ema, but no average is kept: set optim.ema_half_life_tokens")
        if self.profile.first > self.run.max_steps:
            raise ValueError(
                f"profile.first is {self.profile.first}, the run ends at run.max_steps {self.run.max_steps}: "
                "give an earlier step"
            )

    def for_tokenizer(self, spec: Mapping[str, Any]) -> "Config":
        """With what follows from the data's tokenizer, beside its vocabulary."""
        return self

    def adapters(self) -> LoraConfig | None:
        """What is trained beside a frozen model; None where all weights are trained, as in pre-training."""
        return None

    @property
    def of_answers(self) -> RolloutConfig | PreferenceConfig | None:
        """The section of an objective that samples answers, or compares them."""
        if self.objective.compares:
            return self.preference
        return self.rollout if self.objective.rolls_out else None

    @property
    def needs_reference(self) -> bool:
        """Whether the run compares itself with the policy that it started from."""
        return self.objective.kind == "dpo" or (self.objective.rolls_out and self.rollout.kl > 0)

    @property
    def unit_sequences(self) -> int:
        """Sequences that a micro-batch can't take apart: a pair's two."""
        return 2 if self.objective.compares else 1

    def order_seed(self) -> int:
        """The seed of the order in which training sequences are read."""
        return self.run.seed if self.data.seed is None else self.data.seed

    def adapter_count(self) -> int | None:
        """Parameters of the adapters; None where all weights are trained."""
        adapters = self.adapters()
        return None if adapters is None else adapter_count(self.model.architecture(), adapters)


@dataclass(frozen=True)
class LoraSection:
    """Adapters (LoRA, Hu et al. 2021, arXiv:2106.09685) beside the base's frozen matrices.

    Args:
        rank: columns and rows of an adapter's two matrices; 0 trains all of the base's weights instead, and the rest of
            this section has no effect then.
        alpha: the adapters' correction is scaled by alpha/rank.
        dropout: on the input of the adapters. train/configs/finetune.yaml has 0.05; with the objectives dpo,
            grpo and ppo it is 0.
        targets: which matrices get an adapter: c_attn (queries, keys and values together) or some of q, k, v (one
            each), o (out of attention), up, gate (SwiGLU), down (the MLP's); c_proj is o and down, c_fc up, c_gate
            gate; null: all that the model has.
        new_rows: how many of the last ids have their rows of the embedding table and the head trained as well, whole.
            At 0 these are the tokens around turns, where the data are conversations: without their rows the model
            could not learn to end an answer.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: list[str] | None = None
    new_rows: int = 0

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"lora.rank is {self.rank}: use 1 or more, or 0 to train all weights")
        if self.adapters() is not None and self.alpha <= 0:
            raise ValueError(f"lora.alpha is {self.alpha}: use a positive number")

    def adapters(self) -> LoraConfig | None:
        """None where all weights are trained. Raises ValueError for an impossible setting."""
        if self.rank == 0:
            return None
        targets = TARGETS if self.targets is None else tuple(self.targets)
        return LoraConfig(self.rank, self.alpha, self.dropout, targets, self.new_rows)


@dataclass(frozen=True)
class FinetuneConfig(Config):
    """Everything a fine-tuning is made from. Its model is the base's."""

    lora: LoraSection = field(default_factory=LoraSection)

    def for_tokenizer(self, spec: Mapping[str, Any]) -> "FinetuneConfig":
        """Beside adapters, the rows of the tokens around turns are trained."""
        rows = self.lora.new_rows or len(spec.get("turn_tokens", ()))
        return self if self.lora.rank == 0 else replace(self, lora=replace(self.lora, new_rows=rows))

    def adapters(self) -> LoraConfig | None:
        return self.lora.adapters()


def parse_time(text: str) -> float:
    """Seconds since the epoch of an ISO time, local where it names no offset. Raises ValueError."""
    return datetime.fromisoformat(text).timestamp()
