"""The directory through which files go to Globus and come from it. Used by `store.py`; blocks on the disk.

It is shown by a collection of this machine, which calls it `called`. This module owns the names in it: `up-<random>` is
on its way out, `in-<random>` on its way in, `down-<hash of key and version>` has come and is read from.
"""

import errno
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from blake3 import blake3

from vfs.errors import StoreError
from vfs.stores.base import Source, take_piece
from vfs.stores.directory import explain
from vfs.stores.protocol import Stat

STAGED_S = 3600.0  # a file that has come and that nobody read for so long is removed
_PIECE = 8 << 20
_OURS = ("up-", "in-", "down-")


class Staging:
    """One store's staging directory. `name`: the store's, for messages."""

    def __init__(self, name: str, directory: Path, called: str) -> None:
        self._name = name
        self._directory = directory
        self._called = called
        self._lock = threading.Lock()
        self._locks: dict[str, threading.Lock] = {}

    def called(self, staged: Path) -> str:
        """How the local collection calls a staged file."""
        return f"{self._called.rstrip('/')}/{staged.name}"

    @contextmanager
    def filled(self, key: str, source: Source, size: int, progress: Callable[[int], None] | None) -> Iterator[Path]:
        """A staged file with the bytes of an upload's source; removed in the end. Raises StoreError, StoreFull, and
        what `source` raises."""
        staged = self._place(f"up-{os.urandom(8).hex()}")
        try:
            self._fill(staged, key, source, size, progress)
            yield staged
        finally:
            staged.unlink(missing_ok=True)

    def brought(self, found: Stat, bring: Callable[[Path], None]) -> Path:
        """The staged file with an object's bytes; `bring` puts them there if they are not: once, however many ask."""
        name = "down-" + blake3(f"{found.key}\n{found.version}".encode()).hexdigest(16)
        with self._one(name):
            staged = self._place(name)
            if not staged.is_file() or staged.stat().st_size != found.size:
                self.remove(STAGED_S)
                self._bring(found, staged, bring)
            os.utime(staged)
            return staged

    def remove(self, older_than_s: float) -> int:
        """Remove files that were not used for so long; how many."""
        count = 0
        for path in self._directory.glob("*-*"):
            with suppress(FileNotFoundError):
                if path.name.startswith(_OURS) and time.time() - path.stat().st_mtime >= older_than_s:
                    path.unlink()
                    count += 1
        return count

    def _place(self, name: str) -> Path:
        with self._explained("stage", str(self._directory)):
            self._directory.mkdir(mode=0o700, exist_ok=True)
        return self._directory / name

    def _fill(self, staged: Path, key: str, source: Source, size: int, progress: Callable[[int], None] | None) -> None:
        with self._explained("upload", key):
            fd = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            for offset in range(0, size, _PIECE):
                length = min(_PIECE, size - offset)
                piece = memoryview(take_piece(self._name, key, source, offset, length))
                with self._explained("upload", key):
                    while piece:
                        piece = piece[os.write(fd, piece) :]
                if progress is not None:
                    progress(offset + length)
        finally:
            os.close(fd)

    def _bring(self, found: Stat, staged: Path, bring: Callable[[Path], None]) -> None:
        room = shutil.disk_usage(self._directory).free
        if room < found.size:
            full = OSError(errno.ENOSPC, f"{room:,} bytes are free in {self._directory}, {found.size:,} are needed")
            raise explain(full, self._name, "read", found.key)
        incoming = self._place(f"in-{os.urandom(8).hex()}")
        try:
            bring(incoming)
            if not incoming.is_file():
                raise StoreError(
                    f"{self._name}: read {found.key}: Globus brought it, but it is not at {incoming}: check that "
                    f"local_path is how the local collection calls local_directory ({self._called})"
                )
            size = incoming.stat().st_size
            if size != found.size:
                raise StoreError(f"{self._name}: read {found.key}: {size} bytes came instead of {found.size}")
            os.replace(incoming, staged)
        finally:
            incoming.unlink(missing_ok=True)

    @contextmanager
    def _one(self, name: str) -> Iterator[None]:
        with self._lock:
            lock = self._locks.setdefault(name, threading.Lock())
        with lock:
            yield
        with self._lock:
            if len(self._locks) > 1000 and not lock.locked():
                self._locks.pop(name, None)

    @contextmanager
    def _explained(self, operation: str, key: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise explain(error, self._name, operation, key) from error
