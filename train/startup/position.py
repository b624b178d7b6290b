"""Where a run continues to read: the loader's position, and the order in which it counts."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from train.progress import Progress
from train.settings.sections import Config

RECORDED = "position_in"  # in a checkpoint's manifest, beside `sequences`


@dataclass(frozen=True)
class Reading:
    """An endless order of sequences, of which the loader's position counts those consumed.

    Attributes:
        data_identity: the token set's; None for an imported checkpoint, which has read nothing here.
        block_size: tokens of a sequence. stride: tokens from one sequence's start to the next one's.
        seed: of the order.
        packing: how documents become sequences.
    """

    data_identity: str | None
    block_size: int
    stride: int
    seed: int
    packing: str = "stream"

    @classmethod
    def of(cls, config: Config, data_identity: str) -> "Reading":
        """The order that a run with this configuration reads."""
        length, stride = config.model.block_size, config.data.stride
        packing = config.data.packing
        return cls(data_identity, length, length if stride is None else stride, config.order_seed(), packing)

    @classmethod
    def recorded(cls, manifest: Mapping[str, Any]) -> "Reading | None":
        """What a checkpoint's `sequences` counts; None for an imported one.

        Older checkpoints leave it to their configuration.
        """
        if RECORDED in manifest:
            known = {item.name for item in fields(cls)}
            return cls(**{name: value for name, value in manifest[RECORDED].items() if name in known})
        if "config" not in manifest:
            return None
        config = manifest["config"]
        length, stride = config["model"]["block_size"], config["data"].get("stride")
        seed = config["run"]["seed"]  # checkpoints of a time without data.seed
        return cls(manifest["data_identity"], length, length if stride is None else stride, seed)

    def cuts_alike(self, other: "Reading | None") -> bool:
        """Whether both cut a token set into the same sequences, and read them in the same order."""
        return other is not None and replace(other, data_identity=self.data_identity) == self

    def facts(self) -> dict[str, Any]:
        """What every checkpoint of the run records of it."""
        return {RECORDED: asdict(self)}


def rolled_past(manifest: Mapping[str, Any]) -> int:
    """How many sequences a run's roll-backs have moved its position by, beyond those of its steps."""
    rollbacks = (manifest.get("spikes") or {}).get("rollbacks", [])
    return sum(each["sequences_to"] - each["sequences_from"] for each in rollbacks)


def begin_progress(manifest: Mapping[str, Any] | None, reading: Reading) -> tuple[Progress, list[str]]:
    """How far a run has come when it starts, and lines for the log.

    A position has no meaning in another order of sequences: there the run reads from the start.

    Args:
        manifest: of the checkpoint that is resumed; None for a new run.
    """
    if manifest is None:
        return Progress(), []
    before, consumed = Reading.recorded(manifest), manifest["sequences"]
    if before == reading or consumed == 0:
        return Progress(manifest["step"], manifest["tokens"], consumed), []
    names = ("token set", "model.block_size", "data.stride", "seed of the order", "data.packing")
    changed = [name for name, old, new in zip(names, _parts(before), _parts(reading), strict=True) if old != new]
    line = (
        f"the {consumed:,} sequences that were read up to the checkpoint were of another order (other "
        f"{', '.join(changed)}): this one starts with its first sequence, and text may be read again"
    )
    sets = dict((manifest.get("mix") or {}).get("sets", ()))
    if reading.data_identity in sets.values() and reading.cuts_alike(before):
        line += "; as the only source of data.mix instead of data.path it would continue where the mix was"
    return Progress(manifest["step"], manifest["tokens"]), [line]


def _parts(reading: Reading | None) -> tuple[Any, ...]:
    return tuple(asdict(reading).values()) if reading else (None,) * 4
