"""Where a process listens, read in its own network: psutil reads the caller's, where a test cluster's node is not."""

import ipaddress
import os
from pathlib import Path

LISTENS = "0A"  # of TCP's states in /proc/net/tcp


def listened_at(pid: int) -> set[str]:
    """The addresses at which a process listens for TCP; none if it has ended."""
    process, found = Path(f"/proc/{pid}"), set()
    try:
        sockets = {inode for link in (process / "fd").iterdir() if (inode := _inode(link)) is not None}
        for table in ("tcp", "tcp6"):
            for line in (process / "net" / table).read_text().splitlines()[1:]:
                _, local, _, state, *others = line.split()
                if state == LISTENS and others[5] in sockets:
                    found.add(_address(local.partition(":")[0]))
    except OSError:
        return set()
    return found


def _inode(link: Path) -> str | None:
    """Of the socket that a descriptor is; None for anything else."""
    try:
        target = os.readlink(link)
    except OSError:  # closed since
        return None
    return target[len("socket:[") : -1] if target.startswith("socket:[") else None


def _address(words: str) -> str:
    """The kernel writes an address as words of 4 bytes, each in the machine's own order."""
    packed = b"".join(bytes.fromhex(words[at : at + 8])[::-1] for at in range(0, len(words), 8))
    return str(ipaddress.ip_address(packed))
