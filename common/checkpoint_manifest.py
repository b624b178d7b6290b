"""What `checkpoint.json` holds, as declared types.

All versions have written format 1. Format 2 differs in that it names the optimizer, which is AdamW in format 1:
it is written for others only, so that older versions read all that they can resume from.
"""

from typing import Annotated, Any, Literal, NotRequired

from pydantic import AfterValidator, Field
from typing_extensions import TypedDict

from common.json_file import Count, Finite, Positive, Sha256, keep_others
from common.paths import is_plain_name

FORMAT_VERSIONS = (1, 2)
OPTIMIZER_OF_FORMAT_1 = "adamw"
LOSS_SCALE = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}


def _plain_name(name: str) -> str:
    if not is_plain_name(name):
        raise ValueError("it is not a plain name of a file in the checkpoint's folder")
    return name


def _length(value: int | float) -> int | float:
    if value < 0 or (value >= 1 and value != int(value)):
        raise ValueError("it is neither whole steps nor a fraction below 1")
    return value


def _loss_scale(values: dict[str, float]) -> dict[str, float]:
    if values and (LOSS_SCALE - values.keys() or values["scale"] <= 0):
        raise ValueError("it is not a loss scale")
    return values


Name = Annotated[str, AfterValidator(_plain_name)]
OptimizerName = Annotated[str, Field(pattern=r"^[a-z0-9_]{1,40}$")]
Length = Annotated[int | Finite, AfterValidator(_length)]  # of a schedule: steps, or a fraction of the run
Fraction = Annotated[float, Field(ge=0, le=1)]


@keep_others
class FileEntry(TypedDict):
    """A file as it was written."""

    bytes: Count
    sha256: Sha256


@keep_others
class TokenizerSpec(TypedDict):
    """A tokenizer's identity; what else is in it, `data_prep.tokenization.loading.load_tokenizer` checks."""

    kind: str
    vocab_size: Positive
    end_of_text_id: Count | None
    sha256: Sha256


@keep_others
class RecordedModel(TypedDict):
    block_size: Positive


@keep_others
class RecordedData(TypedDict):
    path: NotRequired[str]
    stride: NotRequired[Positive | None]
    document_mask: NotRequired[bool | Literal["auto"]]
    packing: NotRequired[str]


@keep_others
class RecordedOptim(TypedDict):
    lr: Finite


@keep_others
class RecordedSchedule(TypedDict):
    kind: Literal["cosine", "wsd", "constant"]
    warmup: Length
    decay: Length
    final_lr_fraction: Fraction
    rewarm: NotRequired[bool]


@keep_others
class RecordedBatch(TypedDict):
    micro_batch: NotRequired[Positive | Literal["auto"]]


@keep_others
class RecordedRecompute(TypedDict):
    mode: NotRequired[Literal["auto", "none", "full", "every"]]


@keep_others
class RecordedEval(TypedDict):
    tokens: NotRequired[Positive]


@keep_others
class RecordedRun(TypedDict):
    seed: int
    max_steps: Positive
    dtype: NotRequired[Literal["auto", "bf16", "fp16", "fp32"]]
    compile: NotRequired[bool | Literal["auto"]]


@keep_others
class RecordedConfig(TypedDict):
    """Of a run's resolved configuration what a later start asks it for; other sections and keys are as they are."""

    model: RecordedModel
    data: RecordedData
    optim: RecordedOptim
    schedule: RecordedSchedule
    run: RecordedRun
    batch: NotRequired[RecordedBatch]
    recompute: NotRequired[RecordedRecompute]
    eval: NotRequired[RecordedEval]


@keep_others
class RecordedReading(TypedDict):
    """The order in which `sequences` is a position (`train.startup.position`)."""

    data_identity: Sha256 | None
    block_size: Positive
    stride: Positive
    seed: int
    packing: NotRequired[str]


@keep_others
class RecordedWarmUp(TypedDict):
    start: Count
    steps: Count


@keep_others
class RecordedLora(TypedDict):
    rank: Positive
    alpha: Finite
    dropout: Fraction
    targets: list[str]
    new_rows: NotRequired[Count]


@keep_others
class RecordedBase(TypedDict):
    """What a fine-tuning started from; `folder` (beside the checkpoint) and manifest hash where it has adapters."""

    identity: Sha256
    folder: NotRequired[Name]
    sha256: NotRequired[Sha256]


@keep_others
class RecordedSpikes(TypedDict):
    """What a later start judges its steps by (`train.run.spikes`). `trend`: (loss, gradient norm) of a step each."""

    trend: list[Annotated[list[Finite], Field(min_length=2, max_length=2)]]
    measured_in: dict[str, Any]
    skips: Count
    skipped: list[Count]
    raised: Count
    raised_from: Count
    rollbacks: list[dict[str, Any]]


@keep_others
class RecordedEma(TypedDict):
    """An exponential average of the weights, in files of its own. start_tokens: of the run when it started."""

    half_life_tokens: Positive
    start_tokens: Count


@keep_others
class AveragedCheckpoint(TypedDict):
    """One of the checkpoints of a mean. sha256: of its model and weights (`checkpoint_files.weights_identity`)."""

    checkpoint: Name
    step: Count
    sha256: Sha256


@keep_others
class RecordedAverage(TypedDict):
    """Where averaged weights come from: the checkpoints of a run (its folder as it was given), oldest first."""

    kind: Literal["mean"]
    run: str
    of: Annotated[list[AveragedCheckpoint], Field(min_length=1)]


@keep_others
class RecordedMix(TypedDict):
    """The order of a mix's sources, and where each of them started in its own. `elsewhere`: sequences read before of
    sets that are not in it, by their identities.
    """

    order: list[tuple[Count, list[Count]]]
    sets: list[tuple[str, Sha256]]  # by name, in the order of the shares
    first: dict[str, Count]
    elsewhere: NotRequired[dict[Sha256, Count]]


@keep_others
class RecordedReward(TypedDict):
    """What judges answers. identity: SHA-256 of a function's file, or of a reward model's weights."""

    given: str  # of option rollout.reward
    name: str
    weight: Finite
    identity: Sha256


@keep_others
class CheckpointManifest(TypedDict):
    """A checkpoint's description of itself. What is not required, only some have: imported ones have no `config`."""

    format_version: int
    version: NotRequired[str]  # of the Longhaul that saved or imported it; from 0.2.0 on
    files: dict[Name, FileEntry]
    model: dict[str, Any]  # model.weights.config_from_dict reads it
    tokenizer: TokenizerSpec
    data_identity: Sha256 | None
    step: Count
    tokens: Count
    sequences: Count
    config: NotRequired[RecordedConfig]
    position_in: NotRequired[RecordedReading]
    mix: NotRequired[RecordedMix]
    rewards: NotRequired[list[RecordedReward]]  # in the order of their sum
    warm_up: NotRequired[RecordedWarmUp]
    world_size: NotRequired[Positive]
    optimizer: NotRequired[OptimizerName]  # in format 2 always
    scaler: NotRequired[Annotated[dict[str, Finite], AfterValidator(_loss_scale)]]
    spikes: NotRequired[RecordedSpikes]
    lora: NotRequired[RecordedLora | None]
    base: NotRequired[RecordedBase]
    identity: NotRequired[Sha256]  # a run's copy of its base: of what it was copied from
    weights_only: NotRequired[bool]
    ema: NotRequired[RecordedEma]
    average: NotRequired[RecordedAverage]  # by eval/average.py
    val_loss: NotRequired[float | None]
    val_step: NotRequired[Count | None]
    val_sha256: NotRequired[Sha256 | None]
    val_tokens: NotRequired[Count | None]
    val_block_size: NotRequired[Positive | None]
    val_document_mask: NotRequired[bool | None]
    manifest_sha256: NotRequired[str | None]


def contradiction(manifest: CheckpointManifest) -> str:
    """Which fields of a manifest contradict each other, in words; "" where none do."""
    if manifest.get("lora") is not None and not {"folder", "sha256"} <= manifest.get("base", {}).keys():
        return "base: folder or sha256 is missing, and adapters need both"
    if manifest.get("warm_up", {"start": 0})["start"] > manifest["step"]:
        return f"warm_up.start: it is after step {manifest['step']}"
    if manifest.get("scaler") and "world_size" not in manifest:
        return "world_size: it is missing, and scaler needs it"
    if "ema" in manifest and manifest["ema"]["start_tokens"] > manifest["tokens"]:
        return f"ema.start_tokens: it is after {manifest['tokens']} tokens"
    if manifest["format_version"] == 2 and "optimizer" not in manifest:
        return "optimizer: it is missing, and format 2 needs it"
    return ""


def origin_of(manifest: CheckpointManifest, weights: str = "trained") -> str:
    """What a checkpoint's weights are, as people read it. Args: weights: which of them: trained or ema."""
    if weights == "ema":
        return f"exponential average with a half-life of {manifest['ema']['half_life_tokens']:,} tokens"
    if "average" not in manifest:
        return "as trained"
    steps = [f"{checkpoint['step']:,}" for checkpoint in manifest["average"]["of"]]
    return f"mean of the checkpoints of steps {', '.join(steps)}"


def has_value_function(manifest: CheckpointManifest) -> bool:
    """Whether a checkpoint's scalar head is the value function that PPO learned, which only its training needs; another
    one is a reward model's.
    """
    objective = manifest.get("config", {}).get("objective")
    return isinstance(objective, dict) and objective.get("kind") == "ppo"


def optimizer_of(manifest: CheckpointManifest) -> str:
    """The name of the optimizer whose state a checkpoint holds."""
    return OPTIMIZER_OF_FORMAT_1 if manifest["format_version"] == 1 else manifest["optimizer"]


def optimizer_facts(name: str) -> dict[str, Any]:
    """What a checkpoint records of its optimizer, and its format."""
    return {"format_version": 1} if name == OPTIMIZER_OF_FORMAT_1 else {"format_version": 2, "optimizer": name}
