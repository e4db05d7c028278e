"""Files behind an fsspec URL, fetched whole, with retries; or parts of them, at once and without."""

import errno
import logging
import random
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

import fsspec
from fsspec.asyn import AsyncFileSystem
from fsspec.callbacks import Callback

from sptnet.data.format.faults import DatasetError, UnreachableError
from sptnet.data.format.files import check_url, without_password
from sptnet.errors import visible

EXTRA = "(in the checkout: pip install -c constraints.txt -e '.[remote]')"

FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds before the second attempt, doubled for every further one
LONGEST_TRYING = 480.0  # seconds, all attempts together; collectives of other ranks wait 600 by default
PROBE = 2  # bytes that are asked for of a file, to see whether a server sends parts
LONGEST_PARTS = 30.0  # seconds; what has not come by then is read another way
SLOWEST = 10**6  # bytes/s; files that take longer than LONGEST_TRYING must come as fast
# what the stores call credentials that must be renewed; trying again does not mend them
EXPIRED = re.compile(
    "expired.?token|token.{0,40}expired|request.?expired|NoCredentials|InvalidAccessKeyId", re.IGNORECASE
)
log = logging.getLogger(__name__)
T = TypeVar("T")


class Remote:
    """A folder behind a URL.

    Args:
        url: s3://bucket/folder, https://host/folder, gs://..., see `check_url`.
        attempts: how often a file is tried before it is given up.
        timeout_s: how long a connection may go without a byte, where the protocol lets us say so (http, s3).
        options: further arguments of the fsspec filesystem, e.g. {"anon": True}.

    Raises:
        DatasetError: another kind of URL.
    """

    def __init__(self, url: str, attempts: int, timeout_s: float, options: dict[str, Any]):
        try:
            check_url(url)
        except ValueError as error:
            raise DatasetError(f"{without_password(url)} {error}") from None
        self.url, self.attempts = url.rstrip("/"), attempts
        self._protocol = url.partition("://")[0]
        self._sends_parts: bool | None = None
        self._options = _timeouts(self._protocol, timeout_s) | options

    def where(self, file: str) -> str:
        return f"{self.url}/{file}"

    def _filesystem(self) -> Any:
        # fsspec keeps one instance per process and arguments, so that a forked loader worker gets its own
        try:
            filesystem = fsspec.filesystem(self._protocol, **self._options)
            if self._protocol in ("s3", "s3a"):
                filesystem.retries = 1  # its own, above those of botocore: five times five connections for one attempt
            return filesystem
        except Exception as error:  # whatever a backend makes of its arguments
            raise DatasetError(f"{self.url} cannot be read: {error} {EXTRA}") from None

    def read(self, file: str, most: int, check: Callable[[Path], None] = lambda path: None) -> bytes:
        """The bytes of a file that has at most so many; as `fetch`."""
        with self.opened(file, most, check) as local:
            return local.read()

    @contextmanager
    def opened(self, file: str, most: int, check: Callable[[Path], None] = lambda path: None) -> Iterator[IO[bytes]]:
        """A local copy of a file that has at most so many bytes, open for reading; as `fetch`."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "file")
            self.fetch(file, most, check, path)
            with path.open("rb", buffering=0) as local:
                yield local

    def fetch(self, file: str, most: int, check: Callable[[Path], None], path: Path) -> None:
        """Write a file to `path`; `check` raises OSError on a copy that is not whole, which is then fetched again.

        Args:
            most: bytes that it may have; a server that sends more is cut off.

        Raises:
            DatasetError: not there, longer than it may be, or not to be had in `attempts` attempts.
        """
        filesystem = self._filesystem()
        seconds = max(LONGEST_TRYING, most / SLOWEST)
        # a server that sends a byte now and then, of a header too, never lets a connection time out
        within = _within(filesystem, seconds)

        def attempt() -> None:
            limit = _Limit(self.where(file), most, time.monotonic() + seconds)
            filesystem.get_file(self.where(file), str(path), callback=limit, **within)
            check(path)

        self._try(file, attempt)

    def sends_parts(self, file: str) -> bool:
        """Whether a part of a file is sent where it is asked for; else all of it is. Asked once, of a small file."""
        if self._sends_parts is None:
            try:
                filesystem = self._filesystem()
                within = _within(filesystem, LONGEST_PARTS)
                came = filesystem.cat_file(self.where(file), start=0, end=PROBE, **within)
                self._sends_parts = len(came) == PROBE
            except Exception as error:  # as in `_try`; whoever fetches the file tries again, and tells
                log.debug("a part of %s did not come: %s", self.where(file), error)
                return False
        return self._sends_parts

    def read_parts(self, parts: Sequence[tuple[str, int, int]]) -> list[bytes | None]:
        """Parts of files, from a byte to before another, all asked for at once; None for those that do not come."""
        filesystem = self._filesystem()
        within = _within(filesystem, LONGEST_PARTS)
        files, begins, ends = zip(*parts, strict=True)
        try:
            came = filesystem.cat_ranges(
                [self.where(file) for file in files], list(begins), list(ends), on_error="return", **within
            )
        except Exception as error:  # as above
            log.debug("parts of %d files did not come: %s", len(set(files)), error)
            return [None] * len(parts)
        return [
            part if isinstance(part, bytes) and len(part) == end - begin else None
            for part, (_, begin, end) in zip(came, parts, strict=True)
        ]

    def _try(self, file: str, attempt: Callable[[], T]) -> T:
        wait, start = FIRST_WAIT, time.monotonic()
        for number in range(1, self.attempts + 1):
            try:
                return attempt()
            except DatasetError:
                raise
            except (FileNotFoundError, PermissionError) as error:
                _need_credentials(self.where(file), error)
                raise DatasetError(f"{self.where(file)} is not there or may not be read: {_line(error)}") from None
            except Exception as error:  # the backends of fsspec have no error class in common
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise  # of the cache's disk, not of the remote: trying again does not mend it
                _need_credentials(self.where(file), error)
                reason = f"{type(error).__name__}: {_line(error)}"
                if number == self.attempts or time.monotonic() - start + wait > LONGEST_TRYING:
                    raise UnreachableError(f"{self.where(file)} failed {number} times: {reason}") from None
                where = visible(self.where(file))
                log.warning("%s: attempt %d of %d failed (%s)", where, number, self.attempts, reason)
                # spread out, so that a thousand ranks do not come back in the same second
                time.sleep(wait * (0.5 + random.random()))
                wait = min(2 * wait, LONGEST_WAIT)
        raise AssertionError("unreachable: attempts is at least 1")


class _Limit(Callback):  # type: ignore[misc]
    """Told of every piece of a file that comes; ends the transfer where it becomes too long, in bytes or in seconds."""

    def __init__(self, where: str, most: int, until: float):
        super().__init__()
        self._where, self._most, self._until, self._come = where, most, until, 0

    def relative_update(self, inc: int = 1) -> None:
        self._come += inc
        if self._come > self._most:
            raise DatasetError(
                f"{self._where} sends more than the {self._most:,} bytes that it may have: copy it again"
            )
        if time.monotonic() > self._until:
            raise TimeoutError(errno.ETIMEDOUT, f"only {self._come:,} bytes came")


def _need_credentials(where: str, error: Exception) -> None:
    """Raise DatasetError where the error is one of credentials that are missing or have expired."""
    if EXPIRED.search(f"{type(error).__name__} {error}"):
        reason = _line(error)
        raise DatasetError(f"{where}: the credentials are missing or have expired, renew them ({reason})") from None


def _line(error: Exception) -> str:
    """What an error says, as one line that a terminal may have: a server's words are in it."""
    return visible(" ".join(str(error).split()))


def _timeouts(protocol: str, seconds: float) -> dict[str, Any]:
    if protocol in ("http", "https"):
        try:
            import aiohttp
        except ImportError as error:
            raise DatasetError(f"{protocol}:// cannot be read: {error} {EXTRA}") from None
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=seconds, sock_read=seconds)
        return {"client_kwargs": {"timeout": timeout}}
    if protocol in ("s3", "s3a"):
        # retrying is done here, where it is logged
        once = {"total_max_attempts": 1, "mode": "standard"}
        return {"config_kwargs": {"read_timeout": seconds, "connect_timeout": seconds, "retries": once}}
    return {}


def _within(filesystem: Any, seconds: float) -> dict[str, float]:
    """The argument by which a call ends after so long, where a filesystem knows it."""
    return {"timeout": seconds} if isinstance(filesystem, AsyncFileSystem) else {}
