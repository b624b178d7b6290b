"""A recorder that only keeps what it is given."""

from typing import Any


class Notes:
    """What stands in a run's log and metrics."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.records: list[dict[str, Any]] = []

    def log(self, line: str) -> None:
        self.lines.append(line)

    def note(self, record: dict[str, Any]) -> None:
        self.records.append(record)
