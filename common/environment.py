"""Numbers in environment variables, which launchers, Slurm and people set: one reader, one sentence for a wrong one."""

import os
from collections.abc import Mapping

from common.errors import UserError

HIGHEST = 2**31 - 1  # what launchers, Slurm and torch count with


def whole_number(
    name: str,
    default: int | None = None,
    *,
    lowest: int = 0,
    highest: int = HIGHEST,
    advice: str = "",
    environment: Mapping[str, str] | None = None,
) -> int:
    """$NAME as a whole number from `lowest` to `highest`; the default where it is not set, or empty.

    Args:
        default: None where there has to be a number.
        advice: what to do about a wrong one, where that is more than to correct it.
        environment: the process's own by default.

    Raises UserError for anything else: no text of a variable ends in a traceback, or in a count that nothing can hold.
    """
    text = (os.environ if environment is None else environment).get(name, "").strip()
    if not text and default is not None:
        return default
    digits = text.isascii() and text.isdecimal() and len(text) <= len(str(highest)) + 9  # some zeros may lead
    if digits and lowest <= int(text) <= highest:
        return int(text)
    shown = repr(text if len(text) <= 40 else f"{text[:40]}…") if text else "empty"
    bounds = f"from {lowest} to {highest}" if highest < HIGHEST else f"of {lowest} or more"
    advice = advice or ("unset it, or give one" if default is not None else "give one")
    raise UserError(f"{name} is {shown} in the environment, not a whole number {bounds}: {advice}")
