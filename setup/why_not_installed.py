"""Why an installation failed, in one line with what to do: found in what pip or uv printed."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

OTHER_PYTHON = "make PYTHON=/path/to/python3 uses another Python (3.11, 3.12 and 3.13 have all packages)"


@dataclass(frozen=True)
class Words:
    """How one tool says it. Each expression finds the package, where there is one, as its first group that matched."""

    other_files: str  # a file whose SHA-256 is not listed; a second group: the file
    no_network: str
    not_built: str
    not_found: str
    error: str  # what its own closing line starts with
    places: str  # what names other places for its files


OF_PIP = Words(
    other_files=r"DO NOT MATCH THE HASHES.*\n(\S+) from \S*?([^/\s#]+)(?:#\S*)? ",
    no_network=r"Retrying \(Retry\(",
    # the last package that it had started with
    not_built=r"(?s:.*)^(?:Collecting|Processing|Building wheel for) (?:\S*/)?(\S+)(?s:.*?)"
    r"(?i:subprocess-exited-with-error|backend-?unavailable)|(?i:subprocess-exited-with-error|backend-?unavailable)",
    not_found=r"(No matching distribution found for \S+)",
    error="ERROR:",
    places="TMPDIR and PIP_CACHE_DIR name other places for pip's own files",
)
OF_UV = Words(
    other_files=r"Hash mismatch for `([^`]+)`",
    no_network=r"(?i)error sending request|dns error|operation timed out|Could not connect",
    not_built=r"Failed to build `([^`]+)`|Failed to prepare.*?`([^`]+)`",
    not_found=r"(?:no version of|there (?:are|is) no versions? of|Because) ([\w.=-]+)",
    error="error:",
    places="UV_CACHE_DIR names another place for uv's own files",
)


def reason(said: Sequence[str], words: Words) -> str:
    """The line with the reason, and what to do where that is known. Args: said: the lines that were printed."""
    text = "\n".join(said)
    if "No space left on device" in text or "Disk quota exceeded" in text:
        return f"the disk is full: free some space; {words.places}"
    if found := re.search(words.other_files, text):
        file = f"the SHA-256 of {found[2]}" if found.re.groups > 1 else "its SHA-256"
        return (
            f"{found[1]}: {file} is not in setup/hashes.txt and setup/hashes-dev.txt, so it is not the file that was"
            " tested: take it from another index or folder, or, if you trust it, install without make (pip install -r"
            " requirements.txt -c constraints.txt)"
        )
    if re.search(words.no_network, text):
        return "no package index answers: check the network, or make the environment where there is one"
    if found := re.search(words.not_built, text, re.MULTILINE):
        name = next(filter(None, found.groups()), "a package")
        return f"{name} has no wheel for this Python and machine and can't be built here; {OTHER_PYTHON}"
    if found := re.search(words.not_found, text):
        return f"{found[1]}: the index lacks it, or has nothing for this Python and machine; {OTHER_PYTHON}"
    lines = [line for line in said if line.startswith(words.error)] or list(said) or ["it printed nothing"]
    return lines[-1].removeprefix("error: ")
