"""One hostile input: files in a folder of its own, and the entry that meets them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Case:
    """`make` fills the case's empty folder; `arguments` are an entry and its options, from within that folder.

    `stopped` is a case that may train for long: after some seconds it gets the Ctrl-C that a person would type.
    `keeps` names folders in which a command that refused may leave what it goes on with the next time (temporary files
    are leftovers there, too).
    """

    kind: str
    label: str  # what is wrong with the input, for people
    arguments: list[str]  # the entry's path within the project first
    make: Callable[[Path], None]
    stopped: bool = False
    also: tuple[int, ...] = ()  # exit statuses that this entry has beside those of the judge
    keeps: tuple[str, ...] = ()
