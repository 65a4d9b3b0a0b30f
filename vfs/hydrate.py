"""Bring evicted bytes back: checked, from the first replica that has them, one flight a range however many wait.

Used by the daemon's reads and writes (`request`, then `Partial.when_here`), by push and `runfs hydrate` (`bring`).
`request` never blocks on a network; flights run in this object's threads. Every flight ends in bytes or in an error,
at the latest at its store's deadline. Memory: at most one flight's bytes a thread.
"""

import logging
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from blake3 import blake3

from vfs import faults, uploads
from vfs.ahead import Ahead
from vfs.cache import FLIGHT, Partial
from vfs.core import Core, Home, plain_key
from vfs.errors import NoReplica, RunfsError, StoreTimeout, WrongBytes
from vfs.journal import Replica
from vfs.manifest import CHUNK, DIGEST, Content, chunk_count
from vfs.scan import open_file
from vfs.small_files import SmallFiles
from vfs.units import Unit

log = logging.getLogger(__name__)

_READERS = 8
_BACKGROUND = 4
_MAKERS = 8  # mostly they wait for one and the same calculation


class _Calculate(Exception):
    """No store has the bytes, for the reasons given; now those are asked that may make them again."""

    def __init__(self, said: list[str]) -> None:
        super().__init__("; ".join(said))
        self.said = said


class _Landing:
    """Chunks of one flight on their last way: compared with their digests and written while the rest is still coming,
    so that who waits for the first need not wait for the last, and each is in the processor's cache but once.
    `landed` gets how many are here now."""

    def __init__(
        self,
        partial: Partial,
        content: Content,
        offset: int,
        data: memoryview,
        where: str,
        landed: Callable[[int], None],
    ) -> None:
        self._partial = partial
        self._content = content
        self._offset = offset
        self._data = data
        self._where = where
        self._landed = landed
        self._done = 0
        self._error: RunfsError | OSError | None = None

    def arrived(self, count: int) -> None:
        """So many bytes are in the buffer. Raises nothing: what is wrong with them is no fault of the connection."""
        if self._error is None:
            try:
                self._take(count - count % CHUNK)
            except (RunfsError, OSError) as error:
                self._error = error

    def end(self, count: int) -> None:
        """That was all. Raises WrongBytes, OSError of the cache's disk."""
        if self._error is not None:
            raise self._error
        if count != len(self._data):
            given = f"{self._where} gave {count} bytes from {self._offset} on, not {len(self._data)}"
            raise WrongBytes(f"{given}; it is to have {self._content.size}")
        self._take(count)

    def _take(self, end: int) -> None:
        if end <= self._done:
            return
        offset, piece = self._offset + self._done, self._data[self._done : end]
        check(piece, self._content, offset, len(piece), self._where)
        self._partial.fill(offset // CHUNK, piece)
        self._done = end
        self._landed(chunk_count(len(piece)))


class Hydrator:
    """Flights of chunks into partial files."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._readers = ThreadPoolExecutor(_READERS, "hydrate")
        self._background = ThreadPoolExecutor(_BACKGROUND, "hydrate-behind")
        self._makers = ThreadPoolExecutor(_MAKERS, "calculate")  # what takes minutes must not hold up the readers
        self._small = SmallFiles(core, self._bring_whole, self._hand_over)
        self.ahead = Ahead(core, self._small.bring, self._background.submit)
        core.units.moved.append(self.ahead.forget)
        core.content_changed.append(self.ahead.forget)
        self._own = threading.local()

    def close(self) -> None:
        self._small.close()
        self._readers.shutdown(wait=True, cancel_futures=True)
        self._background.shutdown(wait=True, cancel_futures=True)
        self._makers.shutdown(wait=False, cancel_futures=True)
        for home in self._core.sources:
            if home.calculates:
                home.close()  # ends what it is at
        self._makers.shutdown(wait=True)

    def request(self, partial: Partial, numbers: Iterable[int], uuid: str, path: bytes, *, urgent: bool = True) -> None:
        """Have chunks brought; those under way are not asked for twice. Returns at once.

        Raises Full when the cache's disk cannot take them.
        """
        with partial.lock:
            wanted = [number for number in numbers if number not in partial.flying]
            if not wanted:
                return
            self._core.need_space(len(wanted) * CHUNK)
            for number in wanted:
                partial.flying[number] = True
        pool = self._readers if urgent else self._background
        self._core.hold(partial)  # until the flights end; given back in _fly
        flights = list(_grouped(wanted))
        left = [len(flights)]
        for flight in flights:
            pool.submit(self._fly, partial, flight, uuid, path, left)

    def _fly(
        self,
        partial: Partial,
        numbers: list[int],
        uuid: str,
        path: bytes,
        left: list[int],
        said: list[str] | None = None,
    ) -> None:
        """One flight, to its end; chunks leave `numbers` as they land. `said`: why the stores could not give it, when
        it is to be calculated."""
        error: RunfsError | None = None
        try:
            self._bring(partial, numbers, uuid, path, said)
        except _Calculate as turn:
            with suppress(RuntimeError):  # we are closing
                self._makers.submit(self._fly, partial, numbers, uuid, path, left, turn.said)
                return
            error = NoReplica(f"{os.fsdecode(path)} of {uuid}: it is not calculated any more")
        except RunfsError as problem:
            error = problem
        except OSError as problem:
            error = NoReplica(f"{os.fsdecode(path)} of {uuid} cannot be written to the cache: {problem.strerror}")
            error.errno = problem.errno or error.errno
        except BaseException as problem:
            error = NoReplica(f"{os.fsdecode(path)} of {uuid}: {problem!r}")
            log.exception("a flight ended unexpectedly")
        self._end(partial, numbers, uuid, path, left, error)

    def _end(
        self, partial: Partial, numbers: list[int], uuid: str, path: bytes, left: list[int], error: RunfsError | None
    ) -> None:
        """The end of a flight: `numbers` are those that did not land."""
        if path and error:
            self._core.note_trouble(uuid, path, numbers, str(error))
        partial.arrived(numbers, error)
        with partial.lock:
            left[0] -= 1
            last = left[0] == 0
        if last:
            self._core.release(partial)

    def _bring(self, partial: Partial, numbers: list[int], uuid: str, path: bytes, said: list[str] | None) -> None:
        content = self._core.content(partial.digest)
        if content is None:
            raise NoReplica(
                f"{os.fsdecode(path)} of {uuid}: its digests are not known here; `runfs verify {uuid}` reads them again"
            )
        calculating = said is not None
        makers = self._calculated(partial.digest, uuid, path)
        said = said or []
        for replica, home in makers if calculating else self._sources(partial.digest):
            try:
                self._read(home, replica, content, partial, numbers, uuid, path)
            except RunfsError as error:
                said.append(f"{replica.store}: {error}")
                log.warning("%r of %s: %s: %s", path, uuid, replica.store, error)
                continue
            return
        if makers and not calculating:
            raise _Calculate(said)
        raise NoReplica(
            f"{os.fsdecode(path)} of {uuid} cannot be read: " + ("; ".join(said) or self._elsewhere(partial.digest))
        )

    def _elsewhere(self, digest: bytes) -> str:
        """Why no store could be asked for a content, and what to do."""
        known = {home.name for home in self._core.stores}
        away = sorted({replica.store for replica in self._core.journal.replicas(digest)} - known)
        if not away:
            return "no configured store holds it; `runfs stores` shows them"
        return (
            f"no configured store holds it, but {' and '.join(away)} had it: "
            f"mount again with --store {away[0]}=URL, or add [stores.{away[0]}] to the configuration"
        )

    def _buffer(self, length: int) -> memoryview:
        """Memory for one flight, this thread's own: what is in it is over with the next flight."""
        if getattr(self._own, "buffer", None) is None:
            self._own.buffer = bytearray(FLIGHT * CHUNK)
        return memoryview(self._own.buffer)[:length]

    def _sources(self, digest: bytes) -> list[tuple[Replica, Home]]:
        """Replicas in the order to try: healthy stores first, then nearest, then as configured."""
        replicas = {replica.store: replica for replica in self._core.journal.replicas(digest)}
        homes = [home for home in (*self._core.homes, *self._core.sources) if home.name in replicas]
        homes.sort(key=lambda home: home.rank)
        return [(replicas[home.name], home) for home in homes if not home.calculates]

    def _calculated(self, digest: bytes, uuid: str, path: bytes) -> list[tuple[Replica, Home]]:
        """The stores that may make a file again, tried last. They hold nothing: the journal has no replicas there."""
        makers = [home for home in self._core.sources if home.calculates]
        if makers and not path:  # brought ahead of a reader
            known = self._core.journal.known(uuid)
            path = next((each for each, item in known.items() if item.file.digest == digest), b"")
        return [(Replica(digest, home.name, uuid, plain_key(uuid, path), 0, ""), home) for home in makers if path]

    def _read(
        self,
        home: Home,
        replica: Replica,
        content: Content,
        partial: Partial,
        numbers: list[int],
        uuid: str,
        path: bytes,
    ) -> None:
        """Read neighbouring chunks from one store. Those that landed leave `numbers`, also if the others fail."""
        offset = numbers[0] * CHUNK
        length = min((numbers[-1] + 1) * CHUNK, content.size) - offset
        data = self._buffer(length)

        def landed(count: int) -> None:
            there = numbers[:count]
            del numbers[:count]
            if path:
                self._core.note_trouble(uuid, path, there, None)
            partial.arrived(there, None)

        landing = _Landing(partial, content, offset, data, f"{replica.key} in {home.name}", landed)
        told = self._core.events.progress(
            "hydrate", path.decode("utf-8", "replace"), length, uuid=uuid, store=home.name
        )
        with told as step, home.watched():
            count = home.store().read_into(replica.key, data, offset, arrived=landing.arrived)
            step(count)
        faults.point("hydrate.read")
        try:
            landing.end(count)
        except WrongBytes as error:
            if home.calculates:
                raise WrongBytes(f"it was calculated again, with other bytes than the record has: {error}") from error
            raise

    def bring(self, partial: Partial, numbers: list[int], uuid: str, path: bytes, deadline_s: float) -> None:
        """Bring chunks and wait for them. Raises what the flights ended with, StoreTimeout after `deadline_s`
        without any chunk arriving."""
        for start in range(0, len(numbers), 8 * FLIGHT):  # bounded, so that readers get their turn
            self._bring_some(partial, numbers[start : start + 8 * FLIGHT], uuid, path, deadline_s)

    def _bring_some(self, partial: Partial, numbers: list[int], uuid: str, path: bytes, deadline_s: float) -> None:
        landed = threading.Semaphore(0)
        errors: list[RunfsError] = []

        def land(error: RunfsError | None) -> None:
            if error is not None:
                errors.append(error)
            landed.release()

        awaited = sum(partial.when_here(number, land) for number in numbers)
        self.request(partial, [n for n in numbers if partial.missing(n * CHUNK, 1)], uuid, path, urgent=False)
        for _ in range(awaited):
            if not landed.acquire(timeout=deadline_s * 4):
                raise StoreTimeout(f"{os.fsdecode(path)} of {uuid}: nothing arrived for {deadline_s * 4:.0f} s")
            if errors:
                raise errors[0]

    def _bring_whole(self, unit: Unit, path: bytes) -> bool:
        fd = open_file(unit.shadow, path, os.O_RDONLY)
        try:
            partial = self._core.partial(fd)
        finally:
            os.close(fd)
        if partial is None:
            return False
        try:
            self.request(partial, partial.missing(0, partial.size), unit.uuid, path)
        finally:
            self._core.release(partial)
        return True

    def _hand_over(self, partial: Partial, uuid: str, path: bytes) -> None:
        """Go on with a small file that was claimed and did not come. It is held."""
        try:
            self._readers.submit(self._fly, partial, [0], uuid, path, [1])
        except RuntimeError:  # we are closing
            self._end(partial, [0], uuid, path, [1], NoReplica(f"{os.fsdecode(path)} of {uuid}: the mount has ended"))

    def complete(self, fd: int, uuid: str, path: bytes) -> int:
        """Bring all of an open file that is still missing; returns the bytes brought. Blocks until it is whole."""
        partial = self._core.partial(fd)
        if partial is None:
            return 0
        try:
            missing = partial.missing(0, partial.size)
            self.bring(partial, missing, uuid, path, self._core.settings.deadline_s)
            partial.save()
            return min(len(missing) * CHUNK, partial.size)
        finally:
            self._core.release(partial)


def check(data: bytes | memoryview, content: Content, offset: int, length: int, where: str) -> None:
    """Compare whole chunks of a content, all `length` bytes from `offset` on, with their digests.

    Raises WrongBytes naming the object.
    """
    view = memoryview(data)
    if len(view) != length:
        raise WrongBytes(f"{where} gave {len(view)} bytes from {offset} on, not {length}; it is to have {content.size}")
    for start in range(0, len(view), CHUNK):
        number = (offset + start) // CHUNK
        if blake3(view[start : start + CHUNK]).digest() != content.chunks[number * DIGEST : (number + 1) * DIGEST]:
            raise WrongBytes(f"{where} does not hold the right bytes at {offset + start}")


def _grouped(numbers: list[int]) -> Iterable[list[int]]:
    """Neighbouring chunks together, up to one flight, aligned so that later requests fit beside them."""
    group: list[int] = []
    for number in numbers:
        if group and (number != group[-1] + 1 or number % FLIGHT == 0):
            yield group
            group = []
        group.append(number)
    if group:
        yield group


def read_back(home: Home, replica: Replica, content: Content, deadline_s: float | None = None) -> None:
    """Prove a replica by reading all of it. Raises WrongBytes, StoreError."""
    uploads.read_back(home, replica.key, content, deadline_s)
