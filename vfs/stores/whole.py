"""Stores whose unit is a whole record: it is brought into a directory of ours once, and its files are read there.

Used by the `machinable` and `command` stores, which say how a record is brought (`_bring`). The first question about a
record waits until it is here, at most for its deadline; bringing goes on meanwhile and a later question finds it.

Layout of `place`, a directory of this store alone (several processes may use it):

- `<uuid>/`: a record, whole. `<uuid>.lock`: held while the record is brought; its time is when that ended.
- `<uuid>.making-<random>/`: what a record is brought into; renamed when it is whole, so a crash leaves no half record.
- `<uuid>.log`: what the last try had to say.
"""

import logging
import os
import shutil
import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager, suppress
from pathlib import Path

from vfs.errors import Denied, NotFound, RunfsError, StoreError, StoreTimeout
from vfs.format import is_safe_uuid
from vfs.stores import keys, urls
from vfs.stores.base import BaseStore, Source, is_wanted
from vfs.stores.directory import DIRECTORY, explain, open_file
from vfs.stores.limits import Budget, Limits
from vfs.stores.protocol import Check, Info, Stat
from vfs.stores.whole_files import put, regular_files, try_lock

log = logging.getLogger(__name__)

RETRY_S = 60.0  # a record that could not be brought is not tried again for so long
_LOCK_POLL_S = 0.05
_FAILED_KEPT = 1000
_PRIVATE = 0o700


class WholeRecordStore(BaseStore):
    """A read-only store of whole records. `place`: where they are kept, `keep_s` seconds each (None: until `sweep`);
    `most`: how many at most. `patience_s`: how long a question may wait when it names no deadline."""

    def __init__(
        self,
        name: str,
        url: str,
        place: Path,
        *,
        patience_s: float,
        keep_s: float | None = None,
        most: int = 64,
        retry_s: float = RETRY_S,
        limits: Limits | None = None,
    ) -> None:
        super().__init__(name, url, read_only=True, limits=limits)
        self.place = place
        self._patience_s = patience_s
        self._keep_s = keep_s
        self._most = most
        self._retry_s = retry_s
        self._lock = threading.Lock()  # both below
        self._flights: dict[str, Future[Path]] = {}
        self._failed: dict[str, tuple[float, RunfsError]] = {}

    @abstractmethod
    def info(self) -> Info: ...

    @abstractmethod
    def _bring(self, uuid: str, into: Path) -> Path:
        """Bring a record into an empty directory; the record's own directory in it. Raises StoreError, NotFound."""

    @abstractmethod
    def _uuids(self, deadline: float | None, most: int | None = None) -> Iterator[str]:
        """The records that a listing shows; no more than `most`."""

    # --- reading -------------------------------------------------------------------------------------------------

    def stat(self, key: str, *, deadline: float | None = None) -> Stat:
        with self._opened("stat", keys.check_readable(key), deadline) as file:
            return _stat(key, os.fstat(file))

    def read(self, key: str, start: int = 0, length: int | None = None, *, deadline: float | None = None) -> bytes:
        self._check_range(key, start, length)
        with self._opened("read", keys.check_readable(key), deadline) as file:
            wanted = max(0, os.fstat(file).st_size - start)
            return _read(file, start, wanted if length is None else min(length, wanted))

    def local_path(self, key: str) -> Path | None:
        """In our copy, if the record is here; nothing is brought for it."""
        self._begin("find", keys.check_readable(key))
        uuid, path = self._split(key)
        directory = self._kept(uuid)
        return None if directory is None else directory / os.fsdecode(self._path(directory, key, path))

    def list(self, prefix: str = "", *, recursive: bool = True, deadline: float | None = None) -> Iterator[Stat]:
        self._begin("list", prefix)
        self._check_prefix(prefix)
        uuid, slash, _rest = prefix.partition("/")
        if not slash and not recursive:
            return
        if slash:
            found = self._listed(uuid, deadline) if is_safe_uuid(uuid) else None
            if found is not None:
                yield from self._files(found, uuid, prefix, recursive)
            return
        for each in self._uuids(deadline):
            if not is_safe_uuid(each):
                self._note_problem(each, "is no uuid of a record")
            elif each.startswith(prefix):
                found = self._listed(each, deadline)
                if found is not None:
                    yield from self._files(found, each, prefix, recursive)

    def _listed(self, uuid: str, deadline: float | None) -> Path | None:
        """The directory a listing reads: here the record is brought for it."""
        try:
            return self._whole(uuid, deadline)
        except NotFound:
            return None

    def _files(self, directory: Path, uuid: str, prefix: str, recursive: bool) -> Iterator[Stat]:
        try:
            for path, status in regular_files(os.fsencode(directory)):
                key = f"{uuid}/{keys.encode(path)}"
                if is_wanted(key, prefix, recursive):
                    yield _stat(key, status)
        except OSError as error:
            raise explain(error, self.name, "list", prefix) from error

    def check(self) -> Check:
        result = Check()
        began = time.monotonic()
        try:
            next(iter(self._uuids(None, 1)), None)
            result.reachable = result.readable = True
            result.latency_s = time.monotonic() - began
        except RunfsError as error:
            result.problems.append(str(error))
        return result

    @contextmanager
    def _opened(self, operation: str, key: str, deadline: float | None) -> Iterator[int]:
        self._begin(operation, key)
        uuid, path = self._split(key)
        try:
            directory = self._whole(uuid, deadline)
            root = os.open(directory, DIRECTORY)
        except FileNotFoundError:
            raise NotFound(f"{self.name}: {operation} {key}: the record was just removed; ask again") from None
        try:
            file = open_file(root, tuple(os.fsdecode(self._path(directory, key, path)).split("/")))
        finally:
            os.close(root)
        if file is None:
            raise NotFound(f"{self.name}: {operation} {key}: the record {uuid} is there, but holds no such file")
        try:
            yield file
        except OSError as error:
            raise explain(error, self.name, operation, key) from error
        finally:
            os.close(file)

    def _split(self, key: str) -> tuple[str, str]:
        """The record and the rest of a key. Raises NotFound for what is in no record (manifests)."""
        uuid, slash, rest = key.partition("/")
        if not slash or not is_safe_uuid(uuid):
            raise NotFound(f"{self.name}: there is no {key}: this store has records only, as UUID/PATH")
        return uuid, rest

    def _path(self, directory: Path, key: str, rest: str) -> bytes:
        """The file's path in its record. Raises NotFound for what could lead out of it."""
        if keys.is_hashed(rest):
            for path, _status in regular_files(os.fsencode(directory)):
                if keys.encode(path) == rest:
                    return path
            raise NotFound(f"{self.name}: there is no {key}")
        path = keys.name_of(rest)
        if b"\0" in path or any(part in (b"", b".", b"..") for part in path.split(b"/")):
            raise NotFound(f"{self.name}: there is no {key}")
        return path

    # --- bringing ------------------------------------------------------------------------------------------------

    def _whole(self, uuid: str, deadline: float | None) -> Path:
        """The directory of a record, brought if need be: one flight, however many ask. Raises StoreError."""
        kept = self._kept(uuid)
        if kept is not None:
            return kept
        budget = self._limits.budget(self._patience_s if deadline is None else deadline)
        with self._lock:
            self._raise_failed(uuid)
            flight = self._flights.get(uuid)
            if flight is None:
                flight = self._flights[uuid] = Future()
                threading.Thread(target=self._fly, args=(uuid, flight), name=f"bring-{uuid}", daemon=True).start()
        try:
            return flight.result(budget.left())
        except FutureTimeout:
            raise StoreTimeout(
                f"{self.name}: {uuid} was not here within {budget.total_s:g} s; it is still being brought, ask again"
            ) from None
        except RunfsError as error:
            raise type(error)(str(error)) from error  # several threads may raise it

    def _raise_failed(self, uuid: str) -> None:
        at, error = self._failed.get(uuid, (0.0, None))
        if error is None:
            return
        if time.monotonic() - at < self._retry_s:
            raise type(error)(str(error)) from error
        del self._failed[uuid]

    def _fly(self, uuid: str, flight: "Future[Path]") -> None:
        made: Path | None = None
        problem: RunfsError | None = None
        try:
            made = self._make(uuid)
        except OSError as error:
            problem = explain(error, self.name, "bring", uuid)
        except RunfsError as error:
            problem = error
        except BaseException as error:
            log.exception("%s: bringing %s ended unexpectedly", self.name, uuid)
            problem = StoreError(f"{self.name}: {uuid} could not be brought: {error!r}")
        with self._lock:
            del self._flights[uuid]
            if problem is not None and self._retry_s > 0:
                self._failed[uuid] = (time.monotonic(), problem)
                while len(self._failed) > _FAILED_KEPT:
                    del self._failed[next(iter(self._failed))]
        if made is not None:
            flight.set_result(made)
        else:
            flight.set_exception(problem or StoreError(f"{self.name}: {uuid} could not be brought"))

    def _make(self, uuid: str) -> Path:
        """Bring a record, under its lock: two processes never do it at once, the second finds it made."""
        self.place.mkdir(mode=_PRIVATE, parents=True, exist_ok=True)
        with self._locked(uuid, self._limits.budget(self._patience_s)) as lock:
            kept = self._kept(uuid)
            if kept is not None:
                return kept
            self._remove_leftovers(uuid)
            making = self.place / f"{uuid}.making-{os.urandom(6).hex()}"
            making.mkdir(mode=_PRIVATE)
            try:
                found = self._bring(uuid, making)
                put(found, self.place / uuid, making / ".before")
            finally:
                shutil.rmtree(making, ignore_errors=True)
            os.utime(lock)
        self._remove_most()
        return self.place / uuid

    def _kept(self, uuid: str) -> Path | None:
        """A record that is here and not too old."""
        directory = self.place / uuid
        if not directory.is_dir():
            return None
        age = time.time() - self._made_at(uuid)
        return directory if self._keep_s is None or age < self._keep_s else None

    def _made_at(self, uuid: str) -> float:
        try:
            return os.stat(self.place / f"{uuid}.lock").st_mtime
        except FileNotFoundError:
            return 0.0

    @contextmanager
    def _locked(self, uuid: str, budget: Budget) -> Iterator[int]:
        lock = os.open(self.place / f"{uuid}.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            while not try_lock(lock):
                if not budget.left():
                    raise StoreTimeout(f"{self.name}: another process brings {uuid} since {budget.total_s:g} s")
                time.sleep(_LOCK_POLL_S)
            yield lock
        finally:
            os.close(lock)

    # --- removing ------------------------------------------------------------------------------------------------

    def sweep(self, older_than_s: float = 86400.0, *, deadline: float | None = None) -> int:
        """Remove our copies that were brought so long ago, and what a crash left; how many. The store loses nothing."""
        self._begin("sweep")
        count = 0
        for uuid in self._here():
            lock = os.open(self.place / f"{uuid}.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                if try_lock(lock):  # nobody is bringing it
                    count += self._remove_leftovers(uuid)
                    if time.time() - self._made_at(uuid) >= older_than_s:
                        count += self._remove(uuid)
            finally:
                os.close(lock)
        return count

    def _here(self) -> Sequence[str]:
        """The records something is kept of."""
        try:
            names = os.listdir(self.place)
        except FileNotFoundError:
            return []
        return sorted({name.split(".")[0] for name in names if is_safe_uuid(name.split(".")[0])})

    def _remove_leftovers(self, uuid: str) -> int:
        left = list(self.place.glob(f"{uuid}.making-*"))
        for path in left:
            shutil.rmtree(path, ignore_errors=True)
        return len(left)

    def _remove(self, uuid: str) -> int:
        directory = self.place / uuid
        if not directory.is_dir():
            return 0
        aside = self.place / f"{uuid}.making-{os.urandom(6).hex()}"  # whoever crashes here leaves a leftover
        with suppress(FileNotFoundError):
            os.rename(directory, aside)
        shutil.rmtree(aside, ignore_errors=True)
        return 1

    def _remove_most(self) -> None:
        """Keep no more copies than allowed: those brought first go first."""
        kept = [uuid for uuid in self._here() if (self.place / uuid).is_dir()]
        kept.sort(key=self._made_at)
        for uuid in kept[: max(0, len(kept) - self._most)]:
            with self._locked(uuid, self._limits.budget(None)):
                self._remove(uuid)

    # --- changes: none -------------------------------------------------------------------------------------------

    def upload(
        self,
        key: str,
        source: Source,
        size: int,
        *,
        if_absent: bool = False,
        if_version: str | None = None,
        progress: Callable[[int], None] | None = None,
        deadline: float | None = None,
    ) -> Stat:
        keys.check_writable(key)
        raise self._refused("upload", key)

    def delete(self, key: str, *, deadline: float | None = None) -> None:
        raise self._refused("delete", keys.check_readable(key))

    def copy(self, source: str, target: str, *, if_absent: bool = False, deadline: float | None = None) -> Stat:
        raise self._refused("copy", keys.check_readable(source))

    def move(self, source: str, target: str, *, if_absent: bool = False, deadline: float | None = None) -> Stat:
        raise self._refused("move", keys.check_readable(source))

    def _refused(self, operation: str, key: str) -> Denied:
        self._begin(operation, key)
        return urls.read_only_error(self.name, operation)


def _read(file: int, start: int, wanted: int) -> bytes:
    pieces: list[bytes] = []
    while wanted > 0 and (piece := os.pread(file, wanted, start)):
        pieces.append(piece)
        start, wanted = start + len(piece), wanted - len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _stat(key: str, status: os.stat_result) -> Stat:
    return Stat(key, status.st_size, f"{status.st_mtime_ns:x}-{status.st_size:x}", status.st_mtime_ns, None)
