"""Finding and verifying checkpoints only by their files: no torch, no second truth beside the folders.

A checkpoint is a folder `step-00001000` whose `checkpoint.json` lists every other file with its size and SHA-256, and
holds a SHA-256 of its own contents. It is good when all of that holds. The newest good one is found by looking.
"""

import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from common.checkpoint_manifest import FORMAT_VERSIONS, CheckpointManifest, FileEntry, contradiction
from common.errors import UserError
from common.json_file import MOST_BYTES, BadJson, parse_json
from common.progress import progress_bar
from common.publish import canonical_json, finite_or_null, sha256_file, write_json_whole
from common.regular_file import KINDS, read_at_most
from common.run_folder import RunFolder

CHECKPOINT_MANIFEST = "checkpoint.json"
OWN_HASH = "manifest_sha256"
LARGE_BYTES = 2 << 30  # reading so much for its hashes may take seconds
COPY_AGAIN = "copy the checkpoint again, or name another"
_STEP_FOLDER = re.compile(r"step-([0-9]{8,})")
_WITH_WEIGHTS = re.compile(r"(?:step|weights)-([0-9]{8,})")


class BadCheckpoint(Exception):
    """A checkpoint that can't be used; the message says what is wrong with it.

    Attributes:
        refusal: the file system's, where it is no fault of the checkpoint's contents.
    """

    def __init__(self, message: str, refusal: OSError | None = None) -> None:
        super().__init__(message)
        self.refusal = refusal


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def list_checkpoints(checkpoints: Path) -> list[tuple[int, Path]]:
    """(step, folder) of everything named like a published checkpoint, newest first, unverified."""
    if not checkpoints.is_dir():
        return []
    found = [(int(match[1]), path) for path in checkpoints.iterdir() if (match := _STEP_FOLDER.fullmatch(path.name))]
    return sorted(found, reverse=True)


def list_weights(checkpoints: Path) -> list[tuple[int, list[Path]]]:
    """By step, newest first: the folders with that step's weights, a whole checkpoint before weights that were kept."""
    if not checkpoints.is_dir():
        return []
    found: dict[int, list[Path]] = {}
    for path in sorted(checkpoints.iterdir()):
        if (match := _WITH_WEIGHTS.fullmatch(path.name)) is not None:
            found.setdefault(int(match[1]), []).append(path)
    return sorted(found.items(), reverse=True)


def seconds_since_save(checkpoints: Path, now: float) -> float | None:
    """How long ago the newest checkpoint was published; None where there is none that can be seen.

    Args:
        now: seconds since the epoch.
    """
    try:
        newest = [path for _, path in list_checkpoints(checkpoints)][:1]
        return max([max(0.0, now - (path / CHECKPOINT_MANIFEST).stat().st_mtime) for path in newest], default=None)
    except OSError:
        return None


def read_checkpoint_manifest(checkpoint: Path) -> CheckpointManifest:
    """The contents of `checkpoint.json`, keys that this version does not know included.

    Raises BadCheckpoint if it is missing, no JSON, not what was written, of a format this version does not know, or not
    of that format's shape.
    """
    path = checkpoint / CHECKPOINT_MANIFEST
    try:
        content = read_at_most(path, MOST_BYTES)
        manifest = json.loads(content)
        version = manifest["format_version"]
        changed = manifest.get(OWN_HASH) not in (_own_hash(manifest), None)  # another program's manifest may have none
    except OSError as error:
        raise BadCheckpoint(f"{path} can't be read: {error.strerror}", error) from None
    except OverflowError as error:
        raise BadCheckpoint(f"{path} is damaged ({error})") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise BadCheckpoint(f"{path} is damaged") from None
    if version not in FORMAT_VERSIONS:
        raise BadCheckpoint(
            f"{checkpoint} has checkpoint format {version!s:.20}, this version of Longhaul reads formats "
            f"{' and '.join(map(str, FORMAT_VERSIONS))}"
        )
    if changed:
        raise BadCheckpoint(f"{path} has changed since it was written (SHA-256 differs)")
    try:
        wrong = contradiction(parse_json(content, CheckpointManifest))
    except BadJson as error:
        wrong = str(error)
    if wrong:
        raise BadCheckpoint(f"{path} is damaged ({wrong})")
    return cast(CheckpointManifest, manifest)  # as it was written: whoever copies it loses nothing


def write_checkpoint_manifest(checkpoint: Path, facts: Mapping[str, Any]) -> None:
    """Write `checkpoint.json`: these facts (`files` among them), format 1 unless they name one, a SHA-256 of all."""
    facts = finite_or_null({"format_version": 1, **facts})
    manifest = json.loads(json.dumps(facts))  # as it will be read
    write_json_whole(checkpoint / CHECKPOINT_MANIFEST, {**manifest, OWN_HASH: _own_hash(manifest)})


def _own_hash(manifest: dict[str, Any]) -> str:
    content = {key: value for key, value in manifest.items() if key != OWN_HASH}
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()


def verify_checkpoint(checkpoint: Path, *, hashes: bool = True) -> CheckpointManifest:
    """Check every listed file's size, and its SHA-256 if `hashes`; return the manifest. Adapters' base is checked too.

    Raises BadCheckpoint naming the first file that is missing, short, unreadable or changed.
    """
    manifest = read_checkpoint_manifest(checkpoint)
    for name, expected in manifest["files"].items():
        _check_size(checkpoint / name, expected)
    if hashes:
        size = sum(expected["bytes"] for expected in manifest["files"].values())
        with progress_bar(size, "B", f"verifying {checkpoint}", scale=True, disable=size < LARGE_BYTES) as bar:
            for name, expected in manifest["files"].items():
                if _sha256(checkpoint / name) != expected["sha256"]:
                    raise BadCheckpoint(f"{checkpoint / name} has changed since it was written (SHA-256 differs)")
                bar.update(expected["bytes"])
    if manifest.get("lora") is not None:
        _verify_base(checkpoint, manifest, hashes=hashes)
    return manifest


def _check_size(path: Path, expected: FileEntry) -> None:
    try:
        found = path.stat()
    except FileNotFoundError:
        raise BadCheckpoint(f"{path} is missing") from None
    except OSError as error:
        raise BadCheckpoint(f"{path} can't be read: {error.strerror}", error) from None
    if not stat.S_ISREG(found.st_mode):
        kind = KINDS.get(stat.S_IFMT(found.st_mode), "not a regular file")
        raise BadCheckpoint(f"{path} can't be read: it is {kind}, not a file")
    if found.st_size != expected["bytes"]:
        raise BadCheckpoint(f"{path} has {found.st_size} bytes instead of {expected['bytes']}")


def _verify_base(checkpoint: Path, manifest: CheckpointManifest, *, hashes: bool) -> None:
    """Raises BadCheckpoint where the base that adapters were trained on is missing or another one."""
    base = base_folder(checkpoint, manifest)
    if not os.path.exists(base / CHECKPOINT_MANIFEST):
        raise BadCheckpoint(
            f"{checkpoint} holds only adapters, and their base {base} is missing: copy the run's folder whole"
        )
    if _sha256(base / CHECKPOINT_MANIFEST) != manifest["base"]["sha256"]:
        raise BadCheckpoint(f"{base} is not the base that the adapters of {checkpoint} were trained on")
    if read_checkpoint_manifest(base).get("lora") is not None:
        raise BadCheckpoint(f"{base} holds only adapters, so it can't be a base")
    verify_checkpoint(base, hashes=hashes)


def _sha256(path: Path) -> str:
    """Raises BadCheckpoint where the disk can't read a file, or the run has deleted it in the meantime."""
    try:
        return sha256_file(path)
    except OSError as error:
        raise BadCheckpoint(f"{path} can't be read: {error.strerror}", error) from None


def base_folder(checkpoint: Path, manifest: CheckpointManifest) -> Path:
    """The base that a checkpoint's adapters were trained on: a checkpoint of its own in the same run."""
    return checkpoint.resolve().parent / manifest["base"]["folder"]


def weights_identity(manifest: CheckpointManifest) -> str:
    """SHA-256 of what a checkpoint's model is: its configuration and the hashes of its weights, of its base's too."""
    weights = {name: entry["sha256"] for name, entry in manifest["files"].items() if name.startswith("weights-")}
    content: dict[str, Any] = {"model": manifest["model"], "weights": weights, "lora": manifest.get("lora")}
    if manifest.get("lora") is not None:
        content["base"] = manifest["base"]["sha256"]
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()


def newest_good_checkpoint(
    checkpoints: Path, try_again: Callable[[OSError], bool] = lambda refusal: False
) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and what is wrong with each newer one that was passed over.

    Args:
        try_again: asked where the file system refuses to read one: whether to look at it once more.
    """
    complaints = []
    for _, path in list_checkpoints(checkpoints):
        while True:
            try:
                verify_checkpoint(path)
            except BadCheckpoint as error:
                if error.refusal is None or not try_again(error.refusal):
                    complaints.append(str(error))
                    break
            else:
                return path, complaints
    return None, complaints


def find_checkpoint(run_or_checkpoint: Path | str) -> Path:
    """The checkpoint that an evaluation's argument means: a run's newest good one, or the folder itself.

    Raises UserError where there is none.
    """
    path = Path(run_or_checkpoint)
    try:
        return _find_checkpoint(path)
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror}): give a run's folder or one checkpoint") from None


def _find_checkpoint(path: Path) -> Path:
    if not path.is_dir():
        raise UserError(f"{path} is not a folder: give a run's folder (runs/NAME) or one checkpoint")
    if (path / CHECKPOINT_MANIFEST).exists():
        try:
            verify_checkpoint(path)
        except BadCheckpoint as error:
            raise UserError(f"{error}: {COPY_AGAIN}") from None
        return path
    checkpoint, complaints = newest_good_checkpoint(RunFolder(path).checkpoints)
    if checkpoint is None:
        why = f" ({'; '.join(complaints)})" if complaints else ""
        raise UserError(f"{path} holds no whole checkpoint{why}: train first, or name another folder")
    return checkpoint
