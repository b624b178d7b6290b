"""What the parts of a run work with from its start on."""

from dataclasses import dataclass, field

from common.run_folder import RunFolder
from data_prep.token_sets.token_set import TokenSet
from model.ranks import Ranks
from train.run.lock import RunLock
from train.settings.command_line import Options
from train.settings.sections import Config
from train.startup.initial_weights import Base
from train.stopping.deadline import Deadline, StopMargin
from train.stopping.stop_requests import StopRequest


@dataclass(frozen=True)
class RunContext:
    """One start of a run, as this rank sees it.

    Attributes:
        config: fitted to the data; what it leaves to the machine is resolved once the checkpoint is known.
        threads: of this rank's CPU work.
        stop: what has asked for the end.
        lock: the run's, held by the first rank.
        margin: how long leaving in good order may take.
        deadline: by when the first rank must have led all others out.
        base: what a fine-tuning begins with.
        in_place: by host, why its ranks read data from where they lie that were to be staged.
    """

    config: Config
    options: Options
    tokens: TokenSet
    folder: RunFolder
    ranks: Ranks
    threads: int
    stop: StopRequest
    lock: RunLock
    margin: StopMargin
    deadline: Deadline
    base: Base | None = None
    in_place: dict[str, str] = field(default_factory=dict)
