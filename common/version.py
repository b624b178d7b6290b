"""The version of Longhaul: what `--version` prints, what runs and checkpoints record, CHANGELOG.md's newest list."""

VERSION = "0.2.0"
VERSION_LINE = f"longhaul {VERSION}"
