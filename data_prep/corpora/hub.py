"""Data sets on the Hugging Face hub: a configuration's files at a fixed revision, fetched as they are needed."""

import fnmatch
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable
from concurrent import futures
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypeVar

from typing_extensions import TypedDict

from common.errors import UserError
from common.json_file import BadJson, parse_json
from common.paths import is_inner_path
from common.progress import progress_bar
from common.publish import sha256_file
from data_prep.corpora.corpus import InputFile
from data_prep.corpora.download import ATTEMPTS, BUSY, Stopped, download, retry_after, wait

DEFAULT_ENDPOINT = "https://huggingface.co"
POLL_SECONDS = 0.2
STOP_SECONDS = 2.0  # a stalled server may keep a download from noticing that it should stop
_NO_ACCESS = "check its name, or set HF_TOKEN if it needs a token"
_LATER = "try again later, or give a folder with --source DIR"
Answer = TypeVar("Answer")


class CardFiles(TypedDict):
    """Files of a split in a data set's card."""

    split: NotRequired[Any]
    path: str | list[str]


class CardConfig(TypedDict):
    """A configuration in a data set's card."""

    config_name: Any  # YAML takes some names for numbers or dates
    data_files: NotRequired[str | list[str | CardFiles] | None]


@dataclass(frozen=True)
class HubSource:
    """A configuration of a data set at a commit: everything needed to fetch its files."""

    repo: str
    config: str
    revision: str
    files: tuple[InputFile, ...]

    def url(self, file: InputFile) -> str:
        return f"{endpoint()}/datasets/{self.repo}/resolve/{self.revision}/{file.name}"


def endpoint() -> str:
    """The hub's address; a mirror's where HF_ENDPOINT names one."""
    return os.environ.get("HF_ENDPOINT", DEFAULT_ENDPOINT).rstrip("/")


def find_on_hub(repo: str, config: str, revision: str) -> HubSource:
    """Resolve a configuration and a revision (a commit, tag or branch) to a commit and its parquet files, by name.

    Raises UserError where the hub can't be reached, or has no such data set, revision or configuration.
    """
    check_revision(revision)
    import huggingface_hub

    api = huggingface_hub.HfApi(endpoint=endpoint())
    try:
        info = patiently(lambda: api.dataset_info(repo, revision=revision, expand=["sha", "cardData"], timeout=30))
        card = info.card_data.to_dict() if info.card_data is not None else {}
        patterns = config_patterns(card, config, f"{repo} at {revision}")
        found: dict[str, InputFile] = {}
        for folder in sorted({_fixed_folder(pattern) for pattern in patterns}):
            for entry in api.list_repo_tree(repo, folder, recursive=True, revision=info.sha, repo_type="dataset"):
                if isinstance(entry, huggingface_hub.hf_api.RepoFile) and matches(entry.path, patterns):
                    digest = {"sha256": entry.lfs.sha256} if entry.lfs else {"blob": entry.blob_id}
                    found[entry.path] = InputFile(entry.path, entry.size, digest)
    except Exception as error:
        raise hub_error(error, repo, revision) from None
    if not found:
        raise UserError(
            f"{repo} at {revision} has no parquet files for the configuration {config!r}: choose another --config"
        )
    if info.sha is None:
        raise UserError(f"{endpoint()} gives no commit for {repo} at {revision}: {_LATER}")
    return HubSource(repo, config, info.sha, tuple(found[name] for name in sorted(found)))


def hub_error(error: Exception, repo: str, revision: str) -> UserError:
    """What to tell of an error that a request to the hub ended in."""
    from huggingface_hub import errors

    if isinstance(error, UserError):
        return error
    if isinstance(error, errors.RevisionNotFoundError):
        return UserError(f"{repo} has no revision {revision!r}: choose another --revision")
    if isinstance(error, errors.RepositoryNotFoundError):
        return UserError(f"{endpoint()} doesn't show {repo}: {_NO_ACCESS}")
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code if error.response is not None else 0
        hint = _NO_ACCESS if status in (401, 403, 404) else _LATER
        return UserError(f"{endpoint()} answers {status} for {repo}: {hint}")
    return UserError(  # whatever the current HTTP library raises without a network
        f"{endpoint()} can't be reached ({type(error).__name__}): give a folder with the data set's files "
        "(--source DIR, or in DATASET's place)"
    )


def resumed_source(begun: dict[str, Any], where: Path) -> HubSource:
    """The source as an interrupted run found it. Raises UserError where what it recorded lacks something."""
    if not {"repo", "config", "revision"} <= begun.keys():
        raise UserError(f"{where} lacks the hub's repo, config or revision: use --force to start again")
    listed = tuple(InputFile(file["name"], file["bytes"], file["digest"]) for file in begun["files"])
    return HubSource(begun["repo"], begun["config"], begun["revision"], listed)


def check_revision(revision: str) -> None:
    """Raises UserError for what can't be the name of a commit, tag or branch in git, or part of a URL."""
    if not revision or " " in revision or not revision.isprintable():
        raise UserError(f"--revision is {revision!r}: give a commit, a tag or a branch")


def patiently(ask: Callable[[], Answer]) -> Answer:
    """What the hub answers, asked again while it is busy: huggingface_hub retries only listings and files."""
    from huggingface_hub.errors import HfHubHTTPError

    for attempt in range(ATTEMPTS - 1):
        try:
            return ask()
        except HfHubHTTPError as error:
            if error.response is None or error.response.status_code not in BUSY:
                raise
            asked = retry_after(error.response.headers.get("Retry-After"))
            wait(f"the hub answers {error.response.status_code}", asked, attempt, threading.Event())
    return ask()


def config_patterns(card: dict[str, Any], config: str, where: str, *, all_splits: bool = False) -> list[str]:
    """The file patterns of a configuration (of its train split, or of all), from a data set card's `configs`.

    Raises UserError where it lists no such configuration, or `configs` are of another shape.
    """
    try:
        listed = parse_json(json.dumps(card.get("configs") or [], default=str).encode(), list[CardConfig])
    except (BadJson, RecursionError, TypeError) as error:  # TypeError: of a key that is a date
        raise UserError(
            f"{where} is a data set's card that can't be read (configs.{error}): give --source a folder without one"
        ) from None
    configs = {str(entry["config_name"]): entry for entry in listed}
    if config not in configs:
        names = ", ".join(configs) or "none"
        raise UserError(f"{where} has no configuration {config!r}: choose one of {names} with --config")
    entries = configs[config].get("data_files") or []
    if isinstance(entries, str):
        return [entries]
    patterns: list[str] = []
    for entry in entries:
        if isinstance(entry, str):
            patterns.append(entry)
        elif all_splits or str(entry.get("split", "train")) == "train":
            paths = entry["path"]
            patterns += [paths] if isinstance(paths, str) else paths
    return patterns


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a parquet file's name is meant by one of the patterns (`*` stays within a folder, `**` doesn't)."""
    for pattern in patterns:
        deep = "**" in pattern or name.count("/") == pattern.count("/")
        if name.endswith(".parquet") and deep and fnmatch.fnmatchcase(name, pattern.replace("**/", "*")):
            return True
    return False


def _fixed_folder(pattern: str) -> str:
    """The folder that all files of a pattern are in."""
    fixed = pattern.split("*", 1)[0].split("?", 1)[0].split("[", 1)[0]
    return fixed.rpartition("/")[0]


class HubFiles:
    """A hub source's files, each downloaded while the one before it is read, and deleted once nothing needs it."""

    def __init__(self, source: HubSource, folder: Path, *, keep: bool) -> None:
        if outside := [file.name for file in source.files if not is_inner_path(file.name)]:
            raise UserError(f"{source.repo} lists {outside[0]!r}, which is not a name inside a folder: use another set")
        self.listed = source.files
        self._source, self._folder, self._keep = source, folder, keep
        self._stop = threading.Event()
        self._running: dict[int, Future[None]] = {}
        self._bytes: dict[int, int] = {}

    def path(self, index: int, meanwhile: Callable[[], None] = lambda: None) -> Path:
        self._start(index)
        future, file = self._running[index], self.listed[index]
        if not future.done():
            with progress_bar(file.bytes, "B", f"downloading {Path(file.name).name}", scale=True) as bar:
                while not _finished(future):
                    bar.update(self._bytes.get(index, 0) - bar.n)
                    meanwhile()
        future.result()
        if index + 1 < len(self.listed):
            self._start(index + 1)
        return self._target(index)

    def done_with(self, index: int) -> None:
        for number in range(0 if self._keep else index):
            self._running.pop(number, None)
            self._target(number).unlink(missing_ok=True)

    def _target(self, index: int) -> Path:
        return self._folder / self.listed[index].name

    def _start(self, index: int) -> None:
        """Start a download, on a thread that isn't waited for at exit, as an executor's would be."""
        if index not in self._running:
            self._running[index] = future = Future[None]()
            threading.Thread(target=self._download, args=(index, future), name="download", daemon=True).start()

    def _download(self, index: int, future: "Future[None]") -> None:
        try:
            self._fetch(index)
        except BaseException as error:  # surfaces in the main thread
            future.set_exception(error)
        else:
            future.set_result(None)

    def _fetch(self, index: int) -> None:
        file, target = self.listed[index], self._target(index)
        if target.exists() and _is_listed(target, file):  # not so after --force with another revision
            return
        download(
            self._source.url(file),
            target,
            size=file.bytes,
            sha256=file.digest.get("sha256"),
            headers=_authorization(),
            on_bytes=lambda count: self._bytes.__setitem__(index, count),
            stop=self._stop,
            listed=True,
        )

    def close(self, *, complete: bool) -> None:
        """Stop running downloads; after a complete preparation remove what isn't kept."""
        self._stop.set()
        futures.wait(self._running.values(), STOP_SECONDS)
        if complete and not self._keep:
            shutil.rmtree(self._folder, ignore_errors=True)


def _is_listed(path: Path, file: InputFile) -> bool:
    """Whether the file on this disk is the one that the source lists."""
    return path.stat().st_size == file.bytes and file.digest.get("sha256") in (None, sha256_file(path))


def _finished(future: "Future[None]") -> bool:
    try:
        future.result(timeout=POLL_SECONDS)
    except TimeoutError:
        return False
    except Stopped as error:
        raise KeyboardInterrupt from error
    return True


def _authorization() -> dict[str, str]:
    import huggingface_hub

    token = huggingface_hub.get_token()
    return {"Authorization": f"Bearer {token}"} if token else {}
