"""Download one file whose length and digest are known, over a link that breaks.

What has arrived is in ``FOLDER/NAME.part``, and survives cuts, restarts and kills; ``NAME.json``
beside it keeps the server's validator. A resumed request has ``Range`` and, where the server gave a
strong validator, ``If-Range``, so that a file which was changed on the server is sent whole. What
counts in the end is the digest: a partial file that was damaged costs one more download, no more.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tuf.api.exceptions import (
    DownloadError,
    DownloadHTTPError,
    DownloadLengthMismatchError,
    LengthOrHashMismatchError,
)
from tuf.api.metadata import TargetFile

from fedlora.errors import ReleaseError, StoreError
from fedlora.files import write_atomic
from fedlora.ota.fetcher import Answer, Fetcher
from fedlora.ota.limits import Limits, Pace, TooSlow

__all__ = ["clear", "download"]

_RANGE = re.compile(r"bytes (\d{1,15})-(\d{1,15})/(\d{1,15}|\*)")


def download(fetcher: Fetcher, url: str, target: TargetFile, folder: Path, limits: Limits) -> bytes:
    """Return a target's bytes, resuming what is in `folder`; leaves the partial file there.

    Raises python-tuf's `DownloadError` and its kinds, `ReleaseError` when what came is not the
    target, and `StoreError` when the folder cannot be written.
    """
    name = next(iter(target.hashes.values()))  # in hex, as `Client.download` looked at
    with _own_errors(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        keep = {f"{name}.part", f"{name}.json"}
        for path in folder.iterdir():  # of another release, or half written
            if path.name not in keep:
                path.unlink()
    part = _Part(folder / f"{name}.part", folder / f"{name}.json", target.length)
    pace = Pace(limits, limits.deadline)
    for again in (True, False):
        resumed = part.size() > 0
        _complete(fetcher, url, part, limits, pace)
        data = part.read()
        try:
            target.verify_length_and_hashes(data)
            return data
        except LengthOrHashMismatchError as error:
            part.discard()
            if not (resumed and again):
                raise ReleaseError(
                    f"{url}: expected {target.length:,} bytes with digest {name[:12]}…, found "
                    f"others ({error}); nothing was installed"
                ) from None
    raise AssertionError("unreachable")


def clear(folder: Path) -> None:
    """Remove the partial files. Raises `StoreError`."""
    with _own_errors(folder):
        for path in folder.iterdir() if folder.is_dir() else ():
            path.unlink()


def _complete(fetcher: Fetcher, url: str, part: _Part, limits: Limits, pace: Pace) -> None:
    """Ask until the file has its length; give up when nothing comes any more."""
    without, largest = 0, part.size()
    while part.size() < part.length:
        pace.left()
        try:
            _ask_for_rest(fetcher, url, part, pace)
        except TooSlow:
            raise
        except DownloadLengthMismatchError:
            part.discard()
            raise
        except DownloadHTTPError as error:
            if error.status_code == 416 and part.size() > 0:  # not the file that we have a part of
                part.discard()
            elif error.status_code < 500:
                raise
            failed: DownloadError = error
        except DownloadError as error:
            failed = error
        else:
            failed = DownloadError(f"{url}: the server ended before {part.length:,} bytes")
        # Progress is a file that has grown, not bytes: a server may begin anew each time.
        without = 0 if part.size() > largest else without + 1
        largest = max(largest, part.size())
        if without >= limits.attempts:
            raise failed
        if without:
            time.sleep(min(limits.pause * 2 ** (without - 1), pace.left()))


def _ask_for_rest(fetcher: Fetcher, url: str, part: _Part, pace: Pace) -> None:
    have = part.size()
    headers = {}
    if have:
        headers["Range"] = f"bytes={have}-"
        if validator := part.validator():
            headers["If-Range"] = validator
    with fetcher.get(url, pace, headers) as answer:
        start = _start(url, answer, have, part.length)
        if start == 0:
            part.begin(_validator(answer))
        with part.appending(start) as append:
            for chunk in answer.body:
                append(chunk)


def _start(url: str, answer: Answer, have: int, length: int) -> int:
    """Return where an answer's body begins in the file; 0 where the server ignores ranges."""
    if answer.status == 200:
        whole, start = answer.length, 0
    else:
        match = _RANGE.fullmatch(answer.headers.get("content-range", ""))
        if match is None or int(match[1]) != have:
            raise DownloadHTTPError(f"{url}: the server sent another range than asked for", 416)
        whole, start = (None if match[3] == "*" else int(match[3])), have
    if whole is not None and whole != length:
        raise DownloadLengthMismatchError(
            f"{url}: expected {length:,} bytes, the server has {whole:,}"
        )
    return start


def _validator(answer: Answer) -> str | None:
    """Return a strong ETag; a weak one, or a date, does not tell versions of a second apart."""
    tag = answer.headers.get("etag", "")
    return tag if re.fullmatch(r'"[\x21\x23-\x7e]{1,200}"', tag) else None


class _Part:
    """The file that grows, and its validator. Raises `StoreError` when it cannot."""

    def __init__(self, path: Path, about: Path, length: int) -> None:
        self._path, self._about, self.length = path, about, length

    def size(self) -> int:
        with _own_errors(self._path):
            size = self._path.stat().st_size if self._path.is_file() else 0
        if size > self.length:
            self.discard()
            return 0
        return size

    def read(self) -> bytes:
        with _own_errors(self._path):
            return self._path.read_bytes()

    def validator(self) -> str | None:
        try:
            value = json.loads(self._about.read_bytes())
        except (OSError, ValueError):
            return None
        return value if isinstance(value, str) else None

    def begin(self, validator: str | None) -> None:
        """Start from nothing: a server's validator never stands beside another's bytes."""
        self.discard()
        with _own_errors(self._path):
            if validator is not None:
                write_atomic(self._about, json.dumps(validator).encode(), mode=0o600)

    @contextlib.contextmanager
    def appending(self, start: int) -> Iterator[Callable[[bytes], None]]:
        """Yield what writes further bytes; `start` is the file's size."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
        with _own_errors(self._path):
            descriptor = os.open(self._path, flags, 0o600)
        size = start
        with os.fdopen(descriptor, "wb", buffering=0) as file:

            def append(chunk: bytes) -> None:
                nonlocal size
                size += len(chunk)
                if size > self.length:
                    raise DownloadLengthMismatchError(
                        f"expected {self.length:,} bytes, the server sends more"
                    )
                left = memoryview(chunk)
                with _own_errors(self._path):
                    while left:
                        left = left[file.write(left) :]

            yield append

    def discard(self) -> None:
        with _own_errors(self._path):
            self._path.unlink(missing_ok=True)
            self._about.unlink(missing_ok=True)


@contextlib.contextmanager
def _own_errors(path: Path) -> Iterator[None]:
    """Tell the disk's errors from the network's, which are `OSError` too."""
    try:
        yield
    except OSError as error:
        raise StoreError(f"{path}: cannot be written: {error.strerror or error}") from None
