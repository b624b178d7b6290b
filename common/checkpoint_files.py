"""Finding and verifying checkpoints by their files alone: no torch, no second truth beside the folders.

A checkpoint is a folder `step-00001000` whose `checkpoint.json` lists every other file with its size and SHA-256, and
holds a SHA-256 of its own contents. It is good when all of that holds. The newest good one is found by looking.
"""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.publish import canonical_json, finite_or_null, sha256_file, write_json_whole
from common.run_folder import RunFolder

CHECKPOINT_MANIFEST = "checkpoint.json"
OWN_HASH = "manifest_sha256"
FORMAT_VERSION = 1
_STEP_FOLDER = re.compile(r"step-(\d{8,})")


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


def read_checkpoint_manifest(checkpoint: Path) -> dict[str, Any]:
    """The contents of `checkpoint.json`.

    Raises BadCheckpoint if it is missing, no JSON, not what was written, or of a format this version does not know.
    """
    path = checkpoint / CHECKPOINT_MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["format_version"]
    except OSError as error:
        raise BadCheckpoint(f"{path} can't be read: {error.strerror}", error) from None
    except (ValueError, KeyError, TypeError):
        raise BadCheckpoint(f"{path} is damaged") from None
    if version != FORMAT_VERSION:
        raise BadCheckpoint(
            f"{checkpoint} has checkpoint format {version}, this version of Longhaul reads format {FORMAT_VERSION}"
        )
    assert isinstance(manifest, dict)
    if manifest.get(OWN_HASH) not in (_own_hash(manifest), None):  # another program's manifest may have none
        raise BadCheckpoint(f"{path} has changed since it was written (SHA-256 differs)")
    return manifest


def write_checkpoint_manifest(checkpoint: Path, facts: dict[str, Any]) -> None:
    """Write `checkpoint.json`: these facts (`files` among them), the format's version, and a SHA-256 of all of it."""
    facts = finite_or_null({"format_version": FORMAT_VERSION, **facts})
    manifest = json.loads(json.dumps(facts))  # as it will be read
    write_json_whole(checkpoint / CHECKPOINT_MANIFEST, {**manifest, OWN_HASH: _own_hash(manifest)})


def _own_hash(manifest: dict[str, Any]) -> str:
    content = {key: value for key, value in manifest.items() if key != OWN_HASH}
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()


def verify_checkpoint(checkpoint: Path, *, hashes: bool = True) -> dict[str, Any]:
    """Check every listed file's size, and its SHA-256 if `hashes`; return the manifest. Adapters' base is checked too.

    Raises BadCheckpoint naming the first file that is missing, short, unreadable or changed.
    """
    manifest = read_checkpoint_manifest(checkpoint)
    for name, expected in manifest["files"].items():
        path = checkpoint / name
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            raise BadCheckpoint(f"{path} is missing") from None
        except OSError as error:
            raise BadCheckpoint(f"{path} can't be read: {error.strerror}", error) from None
        if size != expected["bytes"]:
            raise BadCheckpoint(f"{path} has {size} bytes instead of {expected['bytes']}")
    if hashes:
        for name, expected in manifest["files"].items():
            if _sha256(checkpoint / name) != expected["sha256"]:
                raise BadCheckpoint(f"{checkpoint / name} has changed since it was written (SHA-256 differs)")
    if manifest.get("lora") is not None:
        base = base_folder(checkpoint, manifest)
        if not (base / CHECKPOINT_MANIFEST).exists():
            raise BadCheckpoint(
                f"{checkpoint} holds adapters alone and {base}, beside which they work, is missing: copy the run's "
                "folder whole"
            )
        if _sha256(base / CHECKPOINT_MANIFEST) != manifest["base"]["sha256"]:
            raise BadCheckpoint(f"{base} is another base than the one the adapters of {checkpoint} were trained on")
        verify_checkpoint(base, hashes=hashes)
    return manifest


def _sha256(path: Path) -> str:
    """Raises BadCheckpoint for what a disk can't read, or a run has deleted in the meantime."""
    try:
        return sha256_file(path)
    except OSError as error:
        raise BadCheckpoint(f"{path} can't be read: {error.strerror}", error) from None


def base_folder(checkpoint: Path, manifest: dict[str, Any]) -> Path:
    """The weights that a checkpoint's adapters were trained beside: a checkpoint of its own in the same run."""
    return checkpoint.resolve().parent / str(manifest["base"]["folder"])


def weights_identity(manifest: dict[str, Any]) -> str:
    """SHA-256 of what a checkpoint's model is: its configuration and the hashes of its weights, of its base's too."""
    weights = {name: entry["sha256"] for name, entry in manifest["files"].items() if name.startswith("weights-")}
    content = {"model": manifest["model"], "weights": weights, "lora": manifest.get("lora")}
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
    if not path.is_dir():
        raise UserError(f"{path} is not a folder: give a run's folder (runs/NAME) or one checkpoint")
    if (path / CHECKPOINT_MANIFEST).exists():
        try:
            verify_checkpoint(path)
        except BadCheckpoint as error:
            raise UserError(str(error)) from None
        return path
    checkpoint, complaints = newest_good_checkpoint(RunFolder(path).checkpoints)
    if checkpoint is None:
        why = f" ({'; '.join(complaints)})" if complaints else ""
        raise UserError(f"{path} holds no whole checkpoint{why}: train first, or name another folder")
    return checkpoint
