"""A store in a directory of this machine: an external disk, a network mount, a second volume.

Used through `open_store("file:///directory")`. Blocks as long as the kernel does: a call to a hung disk
cannot be ended from here; the deadline is looked at between the pieces of a transfer and while waiting for
the lock.

Safe against power cuts and other processes: bytes go to a temporary file, which is synced, then gets its name
in one step under the store's lock, then the directory is synced. Readers take no lock. Nothing outside the
directory is ever reached: every name is opened relative to its parent, and symbolic links are never followed.

An unmounted disk must not look like an empty store: the first write leaves a marker file, and a store that
was used before and has no marker, or another one, is Unreachable.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vfs.errors import ConfigError, Conflict, NotFound, StoreError, StoreTimeout, Unreachable, UsageError
from vfs.stores import keys, places, urls
from vfs.stores.directory import (
    Directory,
    explain,
    open_file,
    open_if_there,
    put_at_first,
    remove_file,
    replace,
    write_all,
)
from vfs.stores.limits import Budget, Limits, read_limits
from vfs.stores.places import Place
from vfs.stores.probing import check_store
from vfs.stores.protocol import Check, Info, Stat

PIECE = 8 * 1024 * 1024  # bytes copied between looks at the deadline
PROBLEMS_KEPT = 100

KeyOf = Callable[[Place], str | None]


@dataclass(frozen=True, slots=True)
class Found:
    """An object that is there, and where."""

    place: Place
    stat: Stat


@dataclass(frozen=True, slots=True)
class Condition:
    """What must hold for a write to count."""

    if_absent: bool
    if_version: str | None

    @property
    def free(self) -> bool:
        return not self.if_absent and self.if_version is None


class FileStore:
    """A directory as a store. Made by `Broker.open`. Any number of threads and processes may use the same
    directory."""

    def __init__(
        self,
        root: Path,
        *,
        name: str | None = None,
        url: str | None = None,
        used: bool = False,
        read_only: bool = False,
        limits: Limits | None = None,
    ) -> None:
        self.name = name or root.name or "file"
        self.url = url or root.as_uri()
        self.problems: list[str] = []
        self._read_only = read_only
        self._limits = limits or Limits()
        self._directory = Directory(root, self.name, used)
        self._closed = False
        with self._explained("open", ""):
            if not read_only and not used:
                self._directory.make()
            with self._directory.root():
                pass

    def info(self) -> Info:
        return Info("file", True, True, True, True, None, self._read_only)

    def check(self) -> Check:
        return check_store(self)

    def close(self) -> None:
        self._closed = True

    def stat(self, key: str, *, deadline: float | None = None) -> Stat:
        with self._opened("stat", keys.check_readable(key)) as file:
            return _stat(key, os.fstat(file))

    def read(self, key: str, start: int = 0, length: int | None = None, *, deadline: float | None = None) -> bytes:
        if start < 0 or (length is not None and length < 0):
            raise UsageError(f"{self.name}: read {key}: start and length must not be negative")
        with self._opened("read", keys.check_readable(key)) as file:
            wanted = max(0, os.fstat(file).st_size - start)
            wanted = wanted if length is None else min(length, wanted)
            budget = self._limits.budget(deadline, wanted)
            return self._read(file, key, start, wanted, budget)

    def write(
        self,
        key: str,
        data: bytes,
        *,
        if_absent: bool = False,
        if_version: str | None = None,
        deadline: float | None = None,
    ) -> Stat:
        view = memoryview(data)
        return self.upload(
            key,
            lambda offset, length: bytes(view[offset : offset + length]),
            len(data),
            if_absent=if_absent,
            if_version=if_version,
            deadline=deadline,
        )

    def upload(
        self,
        key: str,
        source: Callable[[int, int], bytes],
        size: int,
        *,
        if_absent: bool = False,
        if_version: str | None = None,
        progress: Callable[[int], None] | None = None,
        deadline: float | None = None,
    ) -> Stat:
        keys.check_writable(key)
        budget = self._limits.budget(deadline, size)
        condition = Condition(if_absent, if_version)
        with self._rooted("upload", key, writing=True) as root:
            if not condition.free:  # a look before the work; what counts is decided under the lock
                self._check(key, condition, self._find(root, key))
            with self._directory.temporary(root) as (directory, name, file):
                self._fill(file, key, source, size, progress, budget)
                # The clock of the file system ticks every few milliseconds; the version needs a finer time.
                os.utime(file, ns=(now := time.time_ns(), now))
                os.fsync(file)
                self._publish(root, key, (directory, name), condition, budget)
                return _stat(key, os.fstat(file))

    def list(self, prefix: str = "", *, deadline: float | None = None) -> Iterator[Stat]:
        reason = keys.why_not_readable(prefix.removesuffix("/")) if prefix else None
        if reason is not None:
            raise UsageError(f"{self.name}: list: the prefix {prefix!r} {reason}")
        with self._rooted("list", prefix) as root:
            yield from self._walk_from(root, places.plain(prefix)[:-1], prefix, _plain_key)
            yield from self._walk_from(root, (places.ALTERNATIVE,), prefix, _alternative_key)

    def delete(self, key: str, *, deadline: float | None = None) -> None:
        keys.check_readable(key)
        budget = self._limits.budget(deadline)
        with self._rooted("delete", key, writing=True) as root, self._directory.lock(root, budget):
            found = self._find(root, key)
            if found is not None:
                remove_file(root, found.place)

    def copy(self, source: str, target: str, *, if_absent: bool = False, deadline: float | None = None) -> Stat:
        with self._opened("copy", keys.check_readable(source)) as file:
            size = os.fstat(file).st_size

            def piece(offset: int, length: int) -> bytes:
                return os.pread(file, length, offset)

            return self.upload(target, piece, size, if_absent=if_absent, deadline=deadline)

    # Reading
    # ----------------------------------------------------------------------------------------------------------

    def _read(self, file: int, key: str, start: int, wanted: int, budget: Budget) -> bytes:
        pieces: list[bytes] = []
        while wanted > 0:
            piece = os.pread(file, min(wanted, PIECE), start)
            if not piece:
                break
            pieces.append(piece)
            start += len(piece)
            wanted -= len(piece)
            self._check_time("read", key, budget)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _find(self, root: int, key: str) -> Found | None:
        """Where the object is and what it is, or None."""
        for place in (places.plain(key), places.alternative(key)):
            if place[0] in places.HIDDEN - {places.ALTERNATIVE}:
                continue
            file = open_file(root, place)
            if file is not None:
                try:
                    return Found(place, _stat(key, os.fstat(file)))
                finally:
                    os.close(file)
        return None

    @contextmanager
    def _opened(self, operation: str, key: str) -> Iterator[int]:
        with self._rooted(operation, key) as root:
            file = open_file(root, places.plain(key))
            file = open_file(root, places.alternative(key)) if file is None else file
            if file is None:
                raise NotFound(f"{self.name}: {operation} {key}: there is no such object")
            try:
                yield file
            finally:
                os.close(file)

    def _walk_from(self, root: int, names: Place, prefix: str, key_of: KeyOf) -> Iterator[Stat]:
        directory = open_if_there(root, names)
        if directory is None:
            return
        try:
            yield from self._walk(directory, names, prefix, key_of)
        finally:
            os.close(directory)

    def _walk(self, directory: int, names: Place, prefix: str, key_of: KeyOf) -> Iterator[Stat]:
        with os.scandir(directory) as entries:
            for entry in entries:
                if not names and entry.name in places.HIDDEN:
                    continue
                place = (*names, entry.name)
                if entry.is_dir(follow_symlinks=False):
                    below = open_if_there(directory, (entry.name,)) if _may_hold(place, prefix) else None
                    if below is not None:
                        try:
                            yield from self._walk(below, place, prefix, key_of)
                        finally:
                            os.close(below)
                else:
                    yield from self._listed(entry, place, prefix, key_of(place))

    def _listed(self, entry: os.DirEntry[str], place: Place, prefix: str, key: str | None) -> Iterator[Stat]:
        reason = "is no name of ours" if key is None else keys.why_not_readable(key)
        if reason is None and not entry.is_file(follow_symlinks=False):
            reason = "is no regular file"
        if reason is None and key is not None and key.startswith(prefix):
            try:
                yield _stat(key, entry.stat(follow_symlinks=False))
            except FileNotFoundError:
                return  # removed since its name was read
        elif reason is not None and len(self.problems) < PROBLEMS_KEPT:
            self.problems.append(f"{self.name}: left out of the listing: {'/'.join(place)[:200]!r} {reason}")

    # Changes
    # ----------------------------------------------------------------------------------------------------------

    def _fill(
        self,
        file: int,
        key: str,
        source: Callable[[int, int], bytes],
        size: int,
        progress: Callable[[int], None] | None,
        budget: Budget,
    ) -> None:
        for offset in range(0, size, PIECE):
            wanted = min(PIECE, size - offset)
            piece = _asked(source, offset, wanted)
            if len(piece) != wanted:
                raise StoreError(
                    f"{self.name}: upload {key}: the file gave {len(piece)} of {wanted} bytes: it changed meanwhile"
                )
            write_all(file, piece)
            if progress is not None:
                progress(offset + wanted)
            self._check_time("upload", key, budget)

    def _publish(self, root: int, key: str, temporary: tuple[int, str], condition: Condition, budget: Budget) -> None:
        with self._directory.lock(root, budget):
            found = self._find(root, key)
            self._check(key, condition, found)
            if found is not None:
                directory = replace(root, temporary, found.place)
            else:
                directory = put_at_first(root, temporary, (places.plain(key), places.alternative(key)))
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def _check(self, key: str, condition: Condition, found: Found | None) -> None:
        if condition.if_absent and found is not None:
            raise Conflict(f"{self.name}: {key} exists already")
        if condition.if_version is not None and (found is None or found.stat.version != condition.if_version):
            raise Conflict(f"{self.name}: {key} was changed by somebody else meanwhile")

    def _check_time(self, operation: str, key: str, budget: Budget) -> None:
        if not budget.left():
            raise StoreTimeout(
                f"{self.name}: {operation} {key}: no end within {budget.total_s:g} s; is the disk overloaded or hung?"
            )

    @contextmanager
    def _rooted(self, operation: str, key: str, *, writing: bool = False) -> Iterator[int]:
        if self._closed:
            raise Unreachable(f"{self.name}: {operation} {key}: the store was closed")
        if writing and self._read_only:
            raise urls.read_only_error(self.name, operation)
        with self._explained(operation, key), self._directory.root(writing=writing) as root:
            yield root

    @contextmanager
    def _explained(self, operation: str, key: str) -> Iterator[None]:
        try:
            yield
        except _SourceError as error:
            raise error.reason from None
        except OSError as error:
            raise explain(error, self.name, operation, key) from error


class _SourceError(Exception):
    """What the caller's `source` raised: not this store's fault, so it goes back as it came."""

    def __init__(self, reason: OSError) -> None:
        super().__init__(str(reason))
        self.reason = reason


def _asked(source: Callable[[int, int], bytes], offset: int, length: int) -> bytes:
    try:
        return source(offset, length)
    except OSError as error:
        raise _SourceError(error) from error


def _stat(key: str, found: os.stat_result) -> Stat:
    version = f"{found.st_ino:x}-{found.st_mtime_ns:x}-{found.st_size:x}"
    return Stat(key, found.st_size, version, found.st_mtime_ns, None)


def _plain_key(place: Place) -> str | None:
    return "/".join(place)


def _alternative_key(place: Place) -> str | None:
    return places.key_of_alternative(place[1:])


def _may_hold(place: Place, prefix: str) -> bool:
    """Whether keys under this directory can start with the prefix."""
    if place[0] == places.ALTERNATIVE:
        return True
    here = "/".join(place) + "/"
    return here.startswith(prefix) or prefix.startswith(here)


class Broker:
    """`file:///directory`. Options: `read_only`; `used` says that it was written to before."""

    schemes: tuple[str, ...] = ()

    def validate(self, config: Mapping[str, Any]) -> list[str]:
        location = urls.split(config)
        urls.refuse_unknown(config, location, {"read_only"})
        urls.truth(config, location, "read_only")
        read_limits(config)
        if location.host not in ("", "localhost") or not location.path:
            raise ConfigError(f"url = {location.url!r}: give file:///directory with three slashes")
        return []

    def open(self, config: Mapping[str, Any]) -> FileStore:
        self.validate(config)
        location = urls.split(config)
        return FileStore(
            Path("/" + location.path),
            name=config.get("name"),
            url=location.url,
            used=bool(config.get("used")),
            read_only=urls.truth(config, location, "read_only"),
            limits=read_limits(config),
        )
