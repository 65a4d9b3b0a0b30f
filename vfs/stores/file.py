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
from functools import partial
from pathlib import Path
from typing import Any

from vfs.errors import ConfigError, Conflict, NotFound, StoreTimeout
from vfs.stores import keys, places, urls
from vfs.stores.base import BaseBroker, BaseStore, is_wanted, take_piece
from vfs.stores.directory import (
    Directory,
    copy_piece,
    explain,
    open_directory,
    open_file,
    open_if_there,
    put_at_first,
    remove_file,
    replace,
    write_all,
)
from vfs.stores.limits import Budget, Limits, read_limits
from vfs.stores.places import Place
from vfs.stores.protocol import Arrived, Info, Stat

PIECE = 8 * 1024 * 1024  # bytes copied between looks at the deadline

KeyOf = Callable[[Place], str | None]


@dataclass(frozen=True, slots=True)
class Found:
    """An object that is there, and where."""

    place: Place
    stat: Stat


@dataclass(frozen=True, slots=True)
class Listing:
    """What a walk looks for: keys under `prefix`, and how a place becomes a key."""

    prefix: str
    recursive: bool
    key_of: KeyOf

    def may_be_below(self, place: Place) -> bool:
        """Whether keys under this directory can be wanted."""
        if place[0] == places.ALTERNATIVE:
            return True
        here = "/".join(place) + "/"
        return self.prefix.startswith(here) or (self.recursive and here.startswith(self.prefix))


@dataclass(frozen=True, slots=True)
class Condition:
    """What must hold for a write to count."""

    if_absent: bool
    if_version: str | None

    @property
    def free(self) -> bool:
        return not self.if_absent and self.if_version is None


class FileStore(BaseStore):
    """A directory as a store. Made by `Broker.open`. Any number of threads and processes may use the same
    directory. `guard` is called before the directory is opened or made, and may raise Unreachable."""

    def __init__(
        self,
        root: Path,
        *,
        name: str | None = None,
        url: str | None = None,
        used: bool = False,
        read_only: bool = False,
        limits: Limits | None = None,
        guard: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(name or root.name or "file", url or root.as_uri(), read_only=read_only, limits=limits)
        self._directory = Directory(root, self.name, used, guard)
        with self._explained("open", ""):
            if not read_only and not used:
                self._directory.make()
            with self._directory.root():
                pass

    def info(self) -> Info:
        return Info(
            broker="file",
            atomic_replace=True,
            conditional_write=True,
            server_copy=True,
            server_move=True,
            read_only=self._read_only,
            sweeps=True,
        )

    def stat(self, key: str, *, deadline: float | None = None) -> Stat:
        with self._opened("stat", keys.check_readable(key)) as file:
            return _stat(key, os.fstat(file))

    def read(self, key: str, start: int = 0, length: int | None = None, *, deadline: float | None = None) -> bytes:
        self._check_range(key, start, length)
        with self._opened("read", keys.check_readable(key)) as file:
            wanted = max(0, os.fstat(file).st_size - start)
            wanted = wanted if length is None else min(length, wanted)
            budget = self._limits.budget(deadline, wanted)
            return self._read(file, key, start, wanted, budget)

    def read_into(
        self,
        key: str,
        buffer: memoryview,
        start: int = 0,
        *,
        arrived: Arrived | None = None,
        deadline: float | None = None,
    ) -> int:
        self._check_range(key, start, len(buffer))
        with self._opened("read", keys.check_readable(key)) as file:
            budget, done = self._limits.budget(deadline, len(buffer)), 0
            while done < len(buffer) and (count := os.preadv(file, [buffer[done : done + PIECE]], start + done)):
                done += count
                if arrived is not None:
                    arrived(done)
                self._check_time("read", key, budget)
            return done

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
        budget = self._limits.budget(deadline, size)

        def fill(file: int) -> None:
            self._fill(file, key, source, size, progress, budget)

        return self._put("upload", key, fill, Condition(if_absent, if_version), budget)

    def _put(self, operation: str, key: str, fill: Callable[[int], None], condition: Condition, budget: Budget) -> Stat:
        """Give the key to a new file; `fill` writes into it."""
        keys.check_writable(key)
        with self._rooted(operation, key, writing=True) as root:
            if not condition.free:  # a look before the work; what counts is decided under the lock
                self._check(key, condition, self._find(root, key))
            with self._directory.temporary(root) as (directory, name, file):
                fill(file)
                # The clock of the file system ticks every few milliseconds; the version needs a finer time.
                os.utime(file, ns=(now := time.time_ns(), now))
                os.fsync(file)
                self._publish(root, key, (directory, name), condition, budget)
                return _stat(key, os.fstat(file))

    def list(self, prefix: str = "", *, recursive: bool = True, deadline: float | None = None) -> Iterator[Stat]:
        self._check_prefix(prefix)
        with self._rooted("list", prefix) as root:
            for names, key_of in ((places.plain(prefix)[:-1], _plain_key), ((places.ALTERNATIVE,), _alternative_key)):
                yield from self._walk_from(root, names, Listing(prefix, recursive, key_of))

    def delete(self, key: str, *, deadline: float | None = None) -> None:
        keys.check_readable(key)
        budget = self._limits.budget(deadline)
        with self._rooted("delete", key, writing=True) as root, self._directory.lock(root, budget):
            found = self._find(root, key)
            if found is not None:
                remove_file(root, found.place)

    def copy(self, source: str, target: str, *, if_absent: bool = False, deadline: float | None = None) -> Stat:
        """By the file system, which may share the blocks, or have its server copy them."""
        with self._opened("copy", keys.check_readable(source)) as there:
            size = os.fstat(there).st_size
            budget = self._limits.budget(deadline, size)

            def fill(file: int) -> None:
                for offset in range(0, size, PIECE):
                    wanted = min(PIECE, size - offset)
                    if copy_piece(there, file, offset, wanted) < wanted:
                        raise Conflict(f"{self.name}: copy {source}: it became shorter meanwhile; try again")
                    self._check_time("copy", source, budget)

            return self._put("copy", target, fill, Condition(if_absent, None), budget)

    def move(self, source: str, target: str, *, if_absent: bool = False, deadline: float | None = None) -> Stat:
        keys.check_readable(source)
        keys.check_writable(target)
        if source == target:
            return self.stat(source, deadline=deadline)
        budget = self._limits.budget(deadline)
        with self._rooted("move", source, writing=True) as root:
            with self._directory.lock(root, budget):
                found = self._find(root, source)
                if found is None:
                    raise NotFound(f"{self.name}: move {source}: there is no such object")
                there = self._find(root, target)
                self._check(target, Condition(if_absent, None), there)
                self._move(root, found.place, target, there)
            return self.stat(target, deadline=deadline)

    def _move(self, root: int, place: Place, target: str, there: Found | None) -> None:
        """Link under the new name, sync, remove the old one: a crash leaves both, never neither."""
        source = open_directory(root, place[:-1])
        try:
            if there is not None:
                directory = replace(root, (source, place[-1]), there.place)
            else:
                directory = put_at_first(root, (source, place[-1]), (places.plain(target), places.alternative(target)))
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
            remove_file(root, place)
            os.fsync(source)
        finally:
            os.close(source)

    def local_path(self, key: str) -> Path | None:
        keys.check_readable(key)
        with self._rooted("find", key) as root:
            found = self._find(root, key)
        if found is None:
            raise NotFound(f"{self.name}: find {key}: there is no such object")
        return self._directory.path.joinpath(*found.place)

    def sweep(self, older_than_s: float = 86400.0, *, deadline: float | None = None) -> int:
        with self._rooted("sweep", "", writing=True) as root:
            return self._directory.sweep(root, older_than_s)

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

    def _walk_from(self, root: int, names: Place, listing: Listing) -> Iterator[Stat]:
        directory = open_if_there(root, names)
        if directory is None:
            return
        try:
            yield from self._walk(directory, names, listing)
        finally:
            os.close(directory)

    def _walk(self, directory: int, names: Place, listing: Listing) -> Iterator[Stat]:
        with os.scandir(directory) as entries:
            for entry in entries:
                if not names and entry.name in places.HIDDEN:
                    continue
                place = (*names, entry.name)
                if entry.is_dir(follow_symlinks=False):
                    below = open_if_there(directory, (entry.name,)) if listing.may_be_below(place) else None
                    if below is not None:
                        try:
                            yield from self._walk(below, place, listing)
                        finally:
                            os.close(below)
                else:
                    yield from self._listed(entry, place, listing)

    def _listed(self, entry: os.DirEntry[str], place: Place, listing: Listing) -> Iterator[Stat]:
        key = listing.key_of(place)
        reason = "is no name of ours" if key is None else keys.why_not_readable(key)
        if reason is None and not entry.is_file(follow_symlinks=False):
            reason = "is no regular file"
        if reason is not None:
            self._note_problem("/".join(place), reason)
        elif key is not None and is_wanted(key, listing.prefix, listing.recursive):
            try:
                yield _stat(key, entry.stat(follow_symlinks=False))
            except FileNotFoundError:
                return  # removed since its name was read

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
            write_all(file, take_piece(self.name, key, partial(_asked, source), offset, wanted))
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
        self._begin(operation, key, changes=writing)
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


class Broker(BaseBroker):
    """`file:///directory`. Options: `read_only`; `used` says that it was written to before."""

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
