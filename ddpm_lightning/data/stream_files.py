"""Byte ranges of files, here or over HTTP: checked against what was there at first, and retried."""

import http
import io
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar
from urllib.parse import urlsplit

import numpy as np
import requests

from ddpm_lightning.errors import InputError

START_DELAYS = (1.0, 2.0, 4.0, 8.0)
"""Seconds between attempts before training: a wrong address should not take minutes to tell."""

RETRY_DELAYS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 64.0, 64.0)
"""The same while training: a server may have been started anew by then."""

ANNOUNCE_AFTER = 10.0  # seconds of waiting that a user would wonder about
TIMEOUT = (10.0, 30.0)  # seconds to connect, and between two pieces of an answer

_GONE = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_TEMPORARY = (408, 425, 429)  # and 5xx

_log = logging.getLogger(__name__)
_local = threading.local()

T = TypeVar("T")


class StreamError(InputError):
    """A stream cannot be read on. What was trained until then is sound, and is kept."""


class Hiccup(OSError):
    """A failure to read that may pass; its message is one line that begins with the file's name."""


class Stamp(NamedTuple):
    """What tells a file from its next version.

    Attributes:
        size: Bytes.
        version: The time of change, or what the server calls the version; "" if it does not.
    """

    size: int
    version: str


class File(Protocol):
    """A file whose bytes are read in any order. Several threads read it at once."""

    @property
    def name(self) -> str:
        """Path or URL."""

    def stat(self) -> Stamp:
        """Look at it."""

    def read(self, start: int, stop: int, stamp: Stamp) -> bytes:
        """Read bytes [start, stop), in one attempt.

        Raises:
            Hiccup: Another attempt may succeed.
            StreamError: None will: it is gone, or it is not what `stamp` says any more.
        """

    def read_all(self) -> bytes:
        """Read it whole; see `read`."""


@dataclass(frozen=True)
class LocalFile:
    """A file on this machine.

    Args:
        name: Its path.
    """

    name: str

    def stat(self) -> Stamp:
        """Look at its size and time of change."""
        with _Translated(self.name):
            status = Path(self.name).stat()
        return Stamp(status.st_size, str(status.st_mtime_ns))

    def read(self, start: int, stop: int, stamp: Stamp) -> bytes:
        """Read bytes [start, stop) of the file that `stamp` is of."""
        with _Translated(self.name), Path(self.name).open("rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            _check_unchanged(self.name, Stamp(status.st_size, str(status.st_mtime_ns)), stamp)
            file.seek(start)
            return _whole(self.name, file.read(stop - start), stop - start)

    def read_all(self) -> bytes:
        """Read it whole."""
        with _Translated(self.name):
            return Path(self.name).read_bytes()


class LocalFiles(Sequence[LocalFile]):
    """Many files below a folder, in as little memory as their names take.

    Args:
        folder: Where they are.
        paths: From there on.
    """

    def __init__(self, folder: Path, paths: Iterable[str]) -> None:
        encoded = [os.fsencode(path) for path in paths]
        self._folder = folder
        self._ends = np.cumsum([0, *map(len, encoded)])
        self._text = b"".join(encoded)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: Any) -> Any:
        """Give one file; no slices."""
        path = self._text[self._ends[index] : self._ends[index + 1]]
        return LocalFile(str(self._folder / os.fsdecode(path)))


@dataclass(frozen=True)
class HttpFile:
    """A file on a server that answers range requests.

    Args:
        url: Its address.
        headers: What to send with each request.
    """

    url: str
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def name(self) -> str:
        """The URL, without what may be a password or a key."""
        parts = urlsplit(self.url)
        return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="").geturl()

    def stat(self) -> Stamp:
        """Ask for one byte, since not all servers that answer GET answer HEAD."""
        response = self._get({"Range": "bytes=0-0"})
        return self._stamp(response)

    def read(self, start: int, stop: int, stamp: Stamp) -> bytes:
        """Read bytes [start, stop) of the version that `stamp` is of."""
        response = self._get({"Range": f"bytes={start}-{stop - 1}"})
        _check_unchanged(self.name, self._stamp(response), stamp)
        return _whole(self.name, response.content, stop - start)

    def read_all(self) -> bytes:
        """Read it whole."""
        response = self._get({})
        length = response.headers.get("Content-Length")
        return _whole(self.name, response.content, int(length or len(response.content)))

    def _get(self, headers: dict[str, str]) -> requests.Response:
        try:
            response = _session().get(
                self.url,
                # compressed answers would have other lengths
                headers={**self.headers, **headers, "Accept-Encoding": "identity"},
                timeout=TIMEOUT,
            )
        except requests.exceptions.InvalidURL as error:
            raise StreamError(f"{self.name}: no address of a file ({error})") from error
        except requests.RequestException as error:
            reason = (
                "does not answer in time" if isinstance(error, requests.Timeout) else _of(error)
            )
            raise Hiccup(f"{self.name}: {reason}") from error
        status = response.status_code
        if status in _TEMPORARY or status >= 500:
            raise Hiccup(f"{self.name}: the server answers {_phrase(status)}")
        if status not in (200, 206):
            raise StreamError(
                f"{self.name}: the server answers {_phrase(status)}; see that the address is right "
                "and may be read"
            )
        return response

    def _stamp(self, response: requests.Response) -> Stamp:
        size = response.headers.get("Content-Range", "").rpartition("/")[2]
        if response.status_code != 206 or not size.isdecimal():
            raise StreamError(
                f"{self.name}: the server sends files only whole, not ranges of bytes; download it "
                "and give its path"
            )
        headers = response.headers
        return Stamp(int(size), headers.get("ETag") or headers.get("Last-Modified") or "")


class RangeFile(io.RawIOBase):
    """A file as Python's readers want one, each read being one range.

    Args:
        file: The file.
        stamp: Which version of it.
        delays: Between the attempts of a read; see `patiently`.
    """

    def __init__(self, file: File, stamp: Stamp, delays: Sequence[float]) -> None:
        self._file = file
        self._stamp = stamp
        self._delays = delays
        self._position = 0

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def tell(self) -> int:
        """Where the next read begins."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move there."""
        bases = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._stamp.size}
        self._position = bases[whence] + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer, but for the end of the file."""
        start = min(self._position, self._stamp.size)
        stop = min(start + len(buffer), self._stamp.size)
        if start < stop:
            buffer[: stop - start] = patiently(
                lambda: self._file.read(start, stop, self._stamp), self._delays
            )
        self._position = stop
        return stop - start


def patiently(read: Callable[[], T], delays: Sequence[float]) -> T:
    """Read; where that fails, try again after each of the delays, in seconds.

    Raises:
        StreamError: The last attempt failed too; names the file and says what to do.
    """
    waited = 0.0
    for delay in delays:
        try:
            return read()
        except Hiccup as hiccup:
            if waited < ANNOUNCE_AFTER <= waited + delay:  # once, however often it is tried
                _log.warning("%s; trying again for %.0f s", hiccup, sum(delays) - waited)
        time.sleep(delay)
        waited += delay
    try:
        return read()
    except Hiccup as hiccup:
        raise StreamError(
            f"{hiccup} (tried {len(delays) + 1} times in {waited:.0f} s); when it can be read "
            "again, --ckpt_path last goes on with the run"
        ) from hiccup


def _session() -> requests.Session:
    """Give this thread's connections; a process that was forked must not use its parent's."""
    owner, session = getattr(_local, "session", (None, None))
    if session is None or owner != os.getpid():
        session = requests.Session()
        _local.session = (os.getpid(), session)
    return session


class _Translated:
    """Raise the errors of the file system as `Hiccup` or `StreamError`."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, OSError) and not isinstance(error, Hiccup):
            reason = error.strerror or _of(error)
            if isinstance(error, _GONE):
                raise StreamError(f"{self._name}: {reason}; put it back, or name another source")
            raise Hiccup(f"{self._name}: {reason}") from error


def _check_unchanged(name: str, found: Stamp, expected: Stamp) -> None:
    if found != expected:
        raise StreamError(
            f"{name}: has changed since it was opened ({expected.size:,} bytes then, "
            f"{found.size:,} now); put the old file back, or start a new run"
        )


def _whole(name: str, data: bytes, num_bytes: int) -> bytes:
    if len(data) != num_bytes:
        raise Hiccup(f"{name}: only {len(data):,} of {num_bytes:,} bytes came")
    return data


def _phrase(status: int) -> str:
    try:
        return f"{status} {http.HTTPStatus(status).phrase}"
    except ValueError:
        return str(status)


def _of(error: Exception) -> str:
    """Give the innermost reason: the outer ones name the library's objects."""
    cause: BaseException = error
    while (inner := cause.__context__) is not None:
        cause = inner
    return " ".join(str(cause).split()) or type(cause).__name__
