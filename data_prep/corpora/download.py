"""Downloads that finish: resumed where they stopped, patient with busy servers, checked before they count as done."""

import email.utils
import hashlib
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from common.errors import UserError
from common.os_errors import refusal
from common.progress import format_duration
from common.publish import fsync_folder

if TYPE_CHECKING:
    import requests

PART_SUFFIX = ".part"
BLOCK_BYTES = 1 << 16  # at most so much is lost when a connection breaks
CONNECT_SECONDS, FIRST_CONNECT_SECONDS = 15, 5  # to connect, once a server has answered, and before
READ_SECONDS = 60  # between bytes
ATTEMPTS = 8  # in a row without a single new byte
UNREACHED_ATTEMPTS = 3  # of a server that has not answered this process yet: most likely there is no network
DAMAGED_ATTEMPTS = 3  # whole files with the wrong bytes
MISSING_ATTEMPTS = 3  # of a file that the server has listed: busy servers are known to deny it for a while
BACKOFF_SECONDS = 1.0  # doubled at every attempt, up to
LONGEST_BACKOFF_SECONDS = 120.0
TOLD_SECONDS = 3.0  # longer waits are logged
BUSY = {408, 425, 429, 500, 502, 503, 504}


_ANSWERED: set[str] = set()  # servers, as host:port


class Stopped(Exception):
    """The download was asked to stop; what has arrived so far is kept."""


class _TryAgainError(Exception):
    """A failure that may be temporary. `seconds` is how long the server asks to wait."""

    def __init__(self, reason: str, seconds: float | None = None) -> None:
        super().__init__(reason)
        self.seconds = seconds


class _UnreachedError(_TryAgainError):
    """The server can't be reached, and has never answered."""


class _MissingError(_TryAgainError):
    """The server answers that it has no such file."""


class _DamagedError(_TryAgainError):
    """What has arrived is not the start of the right file."""


def download(
    url: str,
    target: Path,
    *,
    size: int | None = None,
    sha256: str | None = None,
    headers: Mapping[str, str] | None = None,
    on_bytes: Callable[[int], None] = lambda _: None,
    stop: threading.Event | None = None,
    listed: bool = False,
) -> None:
    """Fetch `url` into `target`, which appears only when it is whole and has the size and SHA-256 that are given.

    What arrived before an interruption is kept in `target`.part and continued. Answers 429 and 5xx, broken connections
    and damaged files are tried again, after the time the server asks for (Retry-After) or ever longer ones; so is 404
    for a file that the server has `listed`, up to 3 times. `on_bytes` gets the bytes that are there so far.

    Raises UserError where the server refuses, nothing new arrives in 8 attempts, or it has never answered and can't be
    reached in 3: without a network that takes seconds.
    """
    part = target.with_name(target.name + PART_SUFFIX)
    stop = stop or threading.Event()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        attempt = damaged = missing = 0
        while True:
            before = _size(part)
            try:
                _fetch_rest(url, part, headers or {}, size, on_bytes, stop)
                _check(part, size, sha256)
                break
            except _TryAgainError as error:
                if isinstance(error, _DamagedError):  # it isn't known which bytes are wrong: all are fetched again
                    part.unlink(missing_ok=True)
                    damaged += 1
                missing += isinstance(error, _MissingError)
                if missing >= (MISSING_ATTEMPTS if listed else 1):
                    raise UserError(f"{url} can't be downloaded ({error})") from None
                attempt = 0 if _size(part) > before else attempt + 1
                if isinstance(error, _UnreachedError) and attempt >= UNREACHED_ATTEMPTS:
                    raise UserError(
                        f"{url} can't be downloaded: {error}; is there a network here? Else run the same command where "
                        "there is one, and copy what it makes"
                    ) from None
                if attempt >= ATTEMPTS or damaged >= DAMAGED_ATTEMPTS:
                    raise UserError(f"{url} can't be downloaded ({error}): run the same command again later") from None
                wait(str(error), error.seconds, attempt, stop)
        os.replace(part, target)
        fsync_folder(target.parent)
    except OSError as error:
        raise UserError(f"{refusal('written', error, target)}; then run the same command again, it continues") from None


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _fetch_rest(
    url: str,
    part: Path,
    headers: Mapping[str, str],
    size: int | None,
    on_bytes: Callable[[int], None],
    stop: threading.Event,
) -> None:
    have = _size(part)
    if size is not None and have >= size:
        return
    import requests  # 13 MiB and 0.2 s that preparing a local folder can do without

    asked = dict(headers) | {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    server = urlsplit(url).netloc
    connect = CONNECT_SECONDS if server in _ANSWERED else FIRST_CONNECT_SECONDS
    try:
        with requests.get(url, headers=asked, stream=True, timeout=(connect, READ_SECONDS)) as answer:
            _ANSWERED.add(server)
            mode = _understand(answer, have, url)
            if mode == "done":
                return
            with open(part, mode) as file:
                for block in answer.iter_content(BLOCK_BYTES):
                    file.write(block)
                    on_bytes(file.tell())
                    if stop.is_set():
                        raise Stopped
                expected = answer.headers.get("Content-Length")
                file.flush()
                os.fsync(file.fileno())
        if expected is not None and _size(part) < int(expected) + (have if mode == "ab" else 0):
            raise _TryAgainError("the connection ended early")
    except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
        if server not in _ANSWERED:
            raise _UnreachedError(f"no connection to {server} ({type(error).__name__})") from None
        raise _TryAgainError(f"no connection ({type(error).__name__})") from None
    except requests.RequestException as error:
        raise UserError(f"can't download {url}: {error}") from None


def _understand(answer: "requests.Response", have: int, url: str) -> str:
    """How to open the partial file for what the server sends: append, overwrite, or not at all, as it is complete."""
    status = answer.status_code
    if status in BUSY:
        raise _TryAgainError(f"the server answers {status}", retry_after(answer.headers.get("Retry-After")))
    if status == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
        return "ab"
    if status == 416 and answer.headers.get("Content-Range", "").endswith(f"/{have}"):
        return "done"
    if status in (206, 416):
        raise _DamagedError("the server has another file than the part that is here")
    if status == 200:
        return "wb"
    if status == 404:
        raise _MissingError("status 404: there is no such file")
    hints = {401: "a token is needed (HF_TOKEN)", 403: "access is refused"}
    raise UserError(f"{url} can't be downloaded (status {status}): {hints.get(status, 'the server refuses')}")


def retry_after(value: str | None) -> float | None:
    """Seconds from a Retry-After header, which holds seconds or a date."""
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


def wait(reason: str, asked: float | None, attempt: int, stop: threading.Event) -> None:
    """Wait as long as a server asks, else longer at every attempt. Raises Stopped."""
    seconds = min(LONGEST_BACKOFF_SECONDS, BACKOFF_SECONDS * 2**attempt) * random.uniform(0.75, 1.25)
    if asked is not None:
        seconds = min(asked, threading.TIMEOUT_MAX)
    if seconds >= TOLD_SECONDS:
        print(f"download: {reason}; trying again in {format_duration(seconds)}", file=sys.stderr, flush=True)
    if stop.wait(seconds):
        raise Stopped


def _check(part: Path, size: int | None, sha256: str | None) -> None:
    found = _size(part)
    if size is not None and found != size:
        kind = _DamagedError if found > size else _TryAgainError
        raise kind(f"{found:,} bytes arrived, not {size:,}")
    if sha256 is None:
        return
    with open(part, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != sha256:
        raise _DamagedError(f"it arrived damaged (SHA-256 {digest[:16]}…, not {sha256[:16]}…)")
