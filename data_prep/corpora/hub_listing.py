"""Which files a split of any data set has, as the package `datasets` finds them: on the hub, or in a folder like there.

Only the list is taken from it. The files are then downloaded once and read as all others, from exact places: a stream
of the package could not be resumed after a kill without losing or repeating rows.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.cache_folder import cache_folder
from common.errors import UserError
from common.plain_text import one_line
from data_prep.corpora.corpus import InputFile
from data_prep.corpora.file_kinds import READABLE, suffix_of
from data_prep.corpora.hub import HubSource, check_revision, endpoint, hub_error, patiently
from data_prep.corpora.local_files import LocalFiles


def find_dataset(repo: str, config: str | None, split: str, revision: str, data_dir: str | None = None) -> HubSource:
    """A split's files on the hub, at the commit that `revision` (a commit, tag or branch) leads to now.

    Args:
        data_dir: the folder of the data set to read, of one that has a folder for each language, say; None for all.

    Raises UserError where the hub can't be reached, has no such data set, revision, configuration or split, or where a
    file can't be read here.
    """
    check_revision(revision)
    import huggingface_hub

    api = huggingface_hub.HfApi(endpoint=endpoint())
    try:
        commit = patiently(lambda: api.dataset_info(repo, revision=revision, expand=["sha"], timeout=30)).sha or ""
        builder = patiently(lambda: _builder(repo, config, data_dir, revision=commit))
        start = f"hf://datasets/{repo}@{commit}/"
        names = _names(builder, split, start, repo)
        found: dict[str, InputFile] = {}
        for folder in sorted({name.rpartition("/")[0] for name in names}):
            for entry in api.list_repo_tree(repo, folder or None, revision=commit, repo_type="dataset"):
                if isinstance(entry, huggingface_hub.hf_api.RepoFile):
                    digest = {"sha256": entry.lfs.sha256} if entry.lfs else {"blob": entry.blob_id}
                    found[entry.path] = InputFile(entry.path, entry.size, digest)
        files = tuple(found[name] for name in names)
    except KeyError as error:
        raise UserError(f"{repo} doesn't list {error} any more: run the command again") from None
    except Exception as error:
        raise hub_error(error, repo, revision) from None
    return HubSource(repo, builder.config.name, commit, files)


def local_dataset(folder: Path, config: str | None, split: str, data_dir: str | None = None) -> tuple[str, LocalFiles]:
    """The configuration's name and a split's files of a folder that is laid out as a data set on the hub.

    Raises UserError where it has no such configuration or split, or where a file can't be read here.
    """
    where = folder.absolute()
    try:
        builder = _builder(str(where), config, data_dir)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is no data set: {one_line(str(error))[:300]}") from None
    return builder.config.name, LocalFiles(where, _names(builder, split, f"{where.as_posix()}/", str(folder)))


def _builder(repo_or_folder: str, config: str | None, data_dir: str | None, revision: str | None = None) -> Any:
    """What `datasets` makes of a data set. Raises UserError where it has several configurations, or not this one."""
    for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_MODULES_CACHE"):  # nothing goes into the home folder
        os.environ.setdefault(name, str(cache_folder() / "huggingface" / name.lower()))
    import datasets

    try:
        return datasets.load_dataset_builder(repo_or_folder, config, data_dir=data_dir, revision=revision)
    except datasets.exceptions.DataFilesNotFoundError as error:
        raise UserError(f"{repo_or_folder}: {one_line(str(error))[:300]}") from None
    except ValueError as error:
        words = one_line(str(error))
        if "onfig" not in words:
            raise
        raise UserError(f"{repo_or_folder}: {words[:300]} (choose it with --config)") from None


def _names(builder: Any, split: str, start: str, repo: str) -> Sequence[str]:
    """A split's files, by name, relative to the data set. Raises UserError where it has none, or of another kind."""
    files = builder.config.data_files or {}
    by_split = {str(name): list(paths) for name, paths in files.items()}
    if split not in by_split:
        raise UserError(f"{repo} has no split {split!r}: choose one of {', '.join(by_split)} with --split")
    names = sorted(path.removeprefix(start) for path in by_split[split])
    if outside := [name for name in names if "://" in name or name.startswith("/")]:
        raise UserError(f"{repo} takes {outside[0]} from elsewhere: name the data set that it is in")
    if other := [name for name in names if suffix_of(name) is None]:
        raise UserError(f"{repo} has files such as {other[0]}, and only these can be read: {READABLE}")
    return names
