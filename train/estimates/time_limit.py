"""The time limit of a job, as sbatch takes it; without torch."""

import re

from common.errors import UserError


def minutes(text: str) -> int:
    """A time as sbatch takes it (M, M:SS, H:MM:SS, D-HH:MM:SS), in whole minutes."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if match is None:
        raise UserError(f"--time {text}: give minutes, H:MM:SS or D-HH:MM:SS")
    days, first, second, third = (int(part or 0) for part in match.groups())
    if not any((days, first, second, third)):  # no limit, to sbatch; one minute would be too short to save anything
        raise UserError(f"--time {text}: a job needs a limit: give one, such as the longest that the partition allows")
    if match[1] is not None or match[4] is not None:  # hours come first
        return max(1, (days * 24 + first) * 60 + second + (third > 0))
    return max(1, first + (second > 0))


def seconds_of_limit(text: str) -> float:
    return 60.0 * minutes(text)
