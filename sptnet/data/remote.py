"""Files behind an fsspec URL, fetched whole, with retries."""

import errno
import logging
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from sptnet.data.manifest import DatasetError, UnreachableError

FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds before the second attempt, doubled for every further one
log = logging.getLogger(__name__)
T = TypeVar("T")


def is_url(root: str) -> bool:
    return "://" in root


class Remote:
    """A folder behind a URL.

    Args:
        url: s3://bucket/folder, https://host/folder, gs://..., whatever fsspec has a filesystem for.
        attempts: how often a file is tried before it is given up.
        timeout_s: how long a connection may go without a byte, where the protocol lets us say so (http, s3).
        options: further arguments of the fsspec filesystem, e.g. {"anon": True}.
    """

    def __init__(self, url: str, attempts: int, timeout_s: float, options: dict[str, Any]):
        self.url, self.attempts = url.rstrip("/"), attempts
        self._protocol = url.partition("://")[0]
        self._options = _timeouts(self._protocol, timeout_s) | options

    def where(self, file: str) -> str:
        return f"{self.url}/{file}"

    def _filesystem(self) -> Any:
        # fsspec keeps one instance per process and arguments, so that a forked loader worker gets its own
        try:
            return fsspec.filesystem(self._protocol, **self._options)
        except (ImportError, ValueError) as error:
            raise DatasetError(
                f"{self.url} cannot be read: {error} (in the checkout: pip install -c constraints.txt -e '.[remote]')"
            ) from None

    def read(self, file: str) -> bytes:
        """A small file's bytes; raises DatasetError."""
        filesystem = self._filesystem()
        return self._try(file, lambda: bytes(filesystem.cat_file(self.where(file))))

    def fetch(self, file: str, check: Callable[[Path], None], path: Path) -> None:
        """Write a file to `path`; `check` raises OSError on a copy that is not whole, which is then fetched again.

        Raises:
            DatasetError: not there, or not to be had in `attempts` attempts.
        """
        filesystem = self._filesystem()

        def attempt() -> None:
            filesystem.get_file(self.where(file), str(path))
            check(path)

        self._try(file, attempt)

    def _try(self, file: str, attempt: Callable[[], T]) -> T:
        wait = FIRST_WAIT
        for number in range(1, self.attempts + 1):
            try:
                return attempt()
            except (FileNotFoundError, PermissionError) as error:
                raise DatasetError(f"{self.where(file)} is not there or may not be read: {error}") from None
            except DatasetError:
                raise
            except Exception as error:  # the backends of fsspec have no error class in common
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise  # of the cache's disk, not of the remote: trying again does not mend it
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                if number == self.attempts:
                    raise UnreachableError(f"{self.where(file)} failed {number} times: {reason}") from None
                log.warning("%s: attempt %d of %d failed (%s)", self.where(file), number, self.attempts, reason)
                # spread out, so that a thousand ranks do not come back in the same second
                time.sleep(wait * (0.5 + random.random()))
                wait = min(2 * wait, LONGEST_WAIT)
        raise AssertionError("unreachable: attempts is at least 1")


def _timeouts(protocol: str, seconds: float) -> dict[str, Any]:
    if protocol in ("http", "https"):
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=seconds, sock_read=seconds)
        return {"client_kwargs": {"timeout": timeout}}
    if protocol in ("s3", "s3a"):
        # retrying is done here, where it is logged
        return {"config_kwargs": {"read_timeout": seconds, "connect_timeout": seconds, "retries": {"max_attempts": 1}}}
    return {}
