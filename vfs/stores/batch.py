"""Many files of a store at once: list, read into a directory, upload, move, delete, and where they are on this machine.

Used by whoever works with a store as such, from `from vfs.stores import open_store` on. Every call gives an `Outcome`
for each file, in the order in which they end; what goes wrong with one (it is missing, its name is no name here, its
deadline passed) is in its outcome and never stops the others. The calls are generators: they take names from any
iterable as they go, run `threads` files at a time, and keep no more than that in memory, so a hundred thousand files
need no more than ten. They block for the store and the local disk; `deadline` (seconds) is each file's, from its start
to its end. Closing the generator, or setting the event given as `cancel`, lets the files under way end at their next
piece (their outcome is `Cancelled`) and begins no more; files that were not begun have no outcome.
"""

import os
import stat as modes
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

from vfs.errors import Conflict, RunfsError, StoreError, StoreTimeout, UsageError
from vfs.events import Events
from vfs.format import MARKER
from vfs.stores import keys
from vfs.stores.batch_target import Target
from vfs.stores.checksums import Checksum
from vfs.stores.directory import write_all
from vfs.stores.limits import Budget, Limits
from vfs.stores.protocol import Stat, Store

__all__ = [
    "Cancelled",
    "Outcome",
    "Wanted",
    "delete_files",
    "list_files",
    "list_pages",
    "local_files",
    "move_files",
    "read_files",
    "upload_files",
]

THREADS = 16  # requests wait for the network most of the time; opendal's own limit is higher
PAGE = 1000  # what S3 gives in one answer
PIECE = 8 * 1024 * 1024  # bytes in memory for each file under way

T = TypeVar("T")


class Cancelled(StoreError):
    """The batch was cancelled while this file was under way."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one file.

    `key`: its key, after an upload or a move the one the store answered with. `path`: the local file, where there is
    one. `size`: bytes moved (0 for a link, a delete, a failure). `error`: why it failed, None when it did not.
    `verified`: the store's checksum was compared with the bytes and is equal; without it the sizes were compared.
    `kept`: it was left alone, as asked.
    """

    key: str
    path: Path | None = None
    size: int = 0
    error: RunfsError | OSError | None = None
    verified: bool = False
    kept: bool = False


@dataclass(frozen=True, slots=True)
class Wanted:
    """One object to be read into a file.

    `name`: the file's name below the directory, with "/" between its parts; None: the path that the key stands for (of
    a long path's hashed key: the key). `start`, `length` in bytes: the file gets only that range of the object, and
    holds nothing else (fewer bytes where the object ends). Raises UsageError for negative ones.
    """

    key: str
    name: str | None = None
    start: int = 0
    length: int | None = None

    def __post_init__(self) -> None:
        if self.start < 0 or (self.length is not None and self.length < 0):
            raise UsageError(f"{self.key}: start and length must not be negative")

    @property
    def is_whole(self) -> bool:
        """Whether all of the object is wanted."""
        return self.start == 0 and self.length is None


@dataclass(frozen=True, slots=True)
class _Job:
    """What all files of one batch share."""

    store: Store
    what: str
    deadline: float | None
    cancel: threading.Event
    closed: threading.Event
    events: Events

    def budget(self) -> Budget | None:
        return None if self.deadline is None else Limits().budget(self.deadline)

    def go_on(self, key: str, budget: Budget | None) -> float | None:
        """The seconds left for this file's next call. Raises Cancelled, StoreTimeout."""
        if self.cancel.is_set() or self.closed.is_set():
            raise Cancelled(f"{self.store.name}: {self.what} {key}: cancelled")
        if budget is None:
            return None
        if not budget.left():
            raise StoreTimeout(f"{self.store.name}: {self.what} {key}: not done within {budget.total_s:g} s")
        return budget.left()


def list_files(
    store: Store, prefix: str = "", *, recursive: bool = True, deadline: float | None = None
) -> Iterator[tuple[str, int]]:
    """Key and size in bytes of every object under a prefix, lazily, as the store's pages come; no order is promised.

    `recursive` as `Store.list`; `deadline` in seconds for each page. Raises UsageError for a bad prefix, StoreError.
    """
    return ((stat.key, stat.size) for stat in store.list(prefix, recursive=recursive, deadline=deadline))


def list_pages(
    store: Store, prefix: str = "", *, recursive: bool = True, page: int = PAGE, deadline: float | None = None
) -> Iterator[list[tuple[str, int]]]:
    """`list_files` in lists of at most `page`; the last one may be shorter, none is empty."""
    listing = list_files(store, prefix, recursive=recursive, deadline=deadline)
    while some := list(islice(listing, page)):
        yield some


def read_files(
    store: Store,
    wanted: Iterable[Wanted | str],
    directory: Path,
    *,
    partial: bool = False,
    threads: int = THREADS,
    deadline: float | None = None,
    cancel: threading.Event | None = None,
    events: Events | None = None,
) -> Iterator[Outcome]:
    """Read objects into files below `directory`, which is made if its parent is there.

    A file appears whole under its name or not at all, and replaces what had that name; nothing outside `directory` is
    ever touched, whatever the names say (`..`, absolute ones and ways through symbolic links are UsageErrors).
    `partial`: the reader wants to begin without waiting for all of it; where the store has an object as a file of this
    machine, a symbolic link to that file is made instead of a copy (to be read, never written).

    Errors in outcomes: NotFound, UsageError (the name), Conflict (it was replaced while it was read), OSError of the
    local disk, StoreError. Raises OSError when `directory` cannot be made or opened.
    """
    target = Target(directory)

    def read(job: _Job, each: Wanted) -> Outcome:
        return _read(job, target, each, partial)

    every = (Wanted(each) if isinstance(each, str) else each for each in wanted)
    with target:
        yield from _run(store, "read", every, read, lambda each: each.key, threads, deadline, cancel, events)


def upload_files(
    store: Store,
    files: Iterable[tuple[Path, str]],
    *,
    if_absent: bool = False,
    threads: int = THREADS,
    deadline: float | None = None,
    cancel: threading.Event | None = None,
    events: Events | None = None,
) -> Iterator[Outcome]:
    """Upload local files, each to the key beside it. `if_absent`: never replace an object.

    Errors in outcomes: OSError for the local file, UsageError (it is no regular file, or the key cannot be stored),
    Conflict (`if_absent`, or the file changed while it was uploaded: upload it again), StoreError.
    """

    def upload(job: _Job, pair: tuple[Path, str]) -> Outcome:
        return _upload(job, *pair, if_absent)

    yield from _run(store, "upload", files, upload, lambda pair: pair[1], threads, deadline, cancel, events)


def move_files(
    store: Store,
    pairs: Iterable[tuple[str, str]],
    *,
    if_absent: bool = False,
    threads: int = THREADS,
    deadline: float | None = None,
    cancel: threading.Event | None = None,
    events: Events | None = None,
) -> Iterator[Outcome]:
    """Give objects other keys: pairs of old and new. An outcome has the new key, that of a failure the old one.

    Errors in outcomes: NotFound, Conflict (`if_absent` and the new key is taken), UsageError, StoreError.
    """

    def move(job: _Job, pair: tuple[str, str]) -> Outcome:
        stat = store.move(*pair, if_absent=if_absent, deadline=job.go_on(pair[0], job.budget()))
        return Outcome(stat.key, size=stat.size, verified=stat.verified)

    yield from _run(store, "move", pairs, move, lambda pair: pair[0], threads, deadline, cancel, events)


def delete_files(
    store: Store,
    doomed: Iterable[str],
    *,
    keep_records: bool = False,
    threads: int = THREADS,
    deadline: float | None = None,
    cancel: threading.Event | None = None,
    events: Events | None = None,
) -> Iterator[Outcome]:
    """Delete objects; what is not there is NotFound, unlike with `Store.delete`.

    `keep_records`: what makes a record a record is left alone (`Outcome.kept`): `.runfs/...`, which is runfs's own, and
    machinable's marker. Errors in outcomes: NotFound, UsageError, StoreError.
    """

    def delete(job: _Job, key: str) -> Outcome:
        if keep_records and is_record_keeping(key):
            return Outcome(key, kept=True)
        budget = job.budget()
        store.stat(key, deadline=job.go_on(key, budget))
        store.delete(key, deadline=job.go_on(key, budget))
        return Outcome(key)

    yield from _run(store, "delete", doomed, delete, lambda key: key, threads, deadline, cancel, events)


def local_files(store: Store, asked: Iterable[str], *, threads: int = THREADS) -> Iterator[Outcome]:
    """Where this machine has objects as ordinary files, to be read with no copy: `path`, None where it has none.

    Errors in outcomes: NotFound (of a store that has files; the others are not asked), StoreError.
    """

    def look(job: _Job, key: str) -> Outcome:
        return Outcome(key, store.local_path(key))

    yield from _run(store, "look for", asked, look, lambda key: key, threads, None, None, None)


def is_record_keeping(key: str) -> bool:
    """Whether an object is what runfs or machinable knows a record by, rather than a file of its user's."""
    return key.startswith(f"{keys.RESERVED}/") or key.rsplit("/", 1)[-1] == MARKER


# One file
# ----------------------------------------------------------------------------------------------------------------------


def _read(job: _Job, target: Target, wanted: Wanted, partial: bool) -> Outcome:
    key, store = wanted.key, job.store
    place = target.place(os.fsencode(wanted.name) if wanted.name is not None else keys.name_of(key))
    if partial and wanted.is_whole and (local := store.local_path(key)) is not None:
        target.link(place, local)
        return Outcome(key, target.path(place))
    budget = job.budget()
    found = store.stat(key, deadline=job.go_on(key, budget))
    end = found.size if wanted.length is None else min(found.size, wanted.start + wanted.length)
    range_ = (min(wanted.start, end), end)
    checksum = Checksum(found.size) if wanted.is_whole and found.checksum is not None else None
    size = end - range_[0]
    with target.part(place) as part, job.events.progress("read", key, size, store=store.name) as step:
        _fill(job, found, range_, budget, part.file, checksum, step)
        part.publish()
    return Outcome(key, target.path(place), size, verified=checksum is not None and checksum.value() == found.checksum)


def _fill(
    job: _Job,
    found: Stat,
    range_: tuple[int, int],
    budget: Budget | None,
    file: int,
    checksum: Checksum | None,
    step: Callable[[int], None],
) -> None:
    """Write a range of an object into an open file. Raises StoreError when the store gives less, Conflict when the
    object is another one by the end: the pieces may be of both. One piece is of one object, if it ends where it did."""
    start, end = range_
    buffer = memoryview(bytearray(min(PIECE, end - start) + 1))
    for position in range(start, end, PIECE):
        length = min(PIECE, end - position)
        more = position + length == found.size  # ask for one byte more than there is
        got = job.store.read_into(found.key, buffer[: length + more], position, deadline=job.go_on(found.key, budget))
        if got < length:
            raise StoreError(f"{job.store.name}: read {found.key}: it ends at {position + got} of {found.size} bytes")
        if got > length:
            raise _replaced(job, found)
        write_all(file, buffer[:length])
        if checksum is not None:
            checksum.update(buffer[:length])
        step(position - start + length)
    if end - start > PIECE:
        now = job.store.stat(found.key, deadline=job.go_on(found.key, budget))
        if (now.version, now.size) != (found.version, found.size):
            raise _replaced(job, found)


def _replaced(job: _Job, found: Stat) -> Conflict:
    return Conflict(f"{job.store.name}: read {found.key}: it was replaced meanwhile; read it again")


def _upload(job: _Job, path: Path, key: str, if_absent: bool) -> Outcome:
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # NONBLOCK: a FIFO there must not stop us
    try:
        before = os.fstat(file)
        if not modes.S_ISREG(before.st_mode):
            raise UsageError(f"{path}: not a regular file; only those can be uploaded")
        budget = job.budget()

        def piece(offset: int, length: int) -> bytes:
            job.go_on(key, budget)
            return os.pread(file, length, offset)

        with job.events.progress("upload", key, before.st_size, store=job.store.name) as step:
            left = job.go_on(key, budget)
            stat = job.store.upload(key, piece, before.st_size, if_absent=if_absent, progress=step, deadline=left)
        after = os.fstat(file)
        if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            raise Conflict(f"{path} changed while it was uploaded to {stat.key}; upload it again")
        return Outcome(stat.key, path, stat.size, verified=stat.verified)
    finally:
        os.close(file)


# Many files
# ----------------------------------------------------------------------------------------------------------------------


def _run(
    store: Store,
    what: str,
    items: Iterable[T],
    work: Callable[[_Job, T], Outcome],
    key_of: Callable[[T], str],
    threads: int,
    deadline: float | None,
    cancel: threading.Event | None,
    events: Events | None,
) -> Iterator[Outcome]:
    """Do the work on every item, `threads` at a time; outcomes as they come."""
    job = _Job(store, what, deadline, cancel or threading.Event(), threading.Event(), events or Events())
    broken: list[Exception] = []

    def given() -> Iterator[T]:
        try:
            yield from items
        except Exception as error:  # those under way end first
            broken.append(error)

    def one(item: T) -> Outcome:
        try:
            return work(job, item)
        except (RunfsError, OSError) as error:
            return Outcome(key_of(item), error=error)

    running: set[Future[Outcome]] = set()
    with ThreadPoolExecutor(threads, f"{what} files") as pool:
        try:
            for item in given():
                if job.cancel.is_set():
                    break
                running.add(pool.submit(one, item))
                if len(running) >= 2 * threads:  # the next ones wait at hand, no more
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        finally:
            job.closed.set()  # of use when the caller left early
            for future in running:
                future.cancel()
    if broken:
        raise broken[0]
