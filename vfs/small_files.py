"""Bring the small files of whole records, as one stream of reads: what a reader of a record's small files waits for.

Used by `vfs.hydrate`. `bring` returns at once. Where a store can read many small objects cheaply
(`vfs/stores/s3_small.py`) one thread asks for them, checks them and writes them to the cache, record after record, with
one question to the journal a record; elsewhere each file is an ordinary flight.

A file is claimed (`Partial.flying`) when it is asked for, never before: a reader who comes first brings it himself.
What is claimed always ends, here or as an ordinary flight, which knows other replicas and says what is wrong. Nothing
is called local on the disk here: that comes with `Partial.save`, after the bytes are synced (`Core.release`). So a
crash at any moment leaves files that are evicted, as before, or whole.
"""

import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

from blake3 import blake3

from vfs import faults
from vfs.cache import Partial
from vfs.core import Core, Home
from vfs.errors import RunfsError
from vfs.journal import SmallFile
from vfs.scan import open_file
from vfs.stores.observed import ObservedStore
from vfs.stores.s3_small import SmallReads
from vfs.units import Unit

log = logging.getLogger(__name__)

SMALL = 1 << 20  # bytes; one chunk: its digest is that of the whole file
_SMALL_TOTAL = 64 << 20  # bytes of one record


@dataclass(slots=True, eq=False)
class _Claim:
    """A file that is on its way. `partial` is held."""

    partial: Partial
    uuid: str
    path: bytes


class SmallFiles:
    """The stream. `whole(unit, path)` has one file brought as ordinary flights, and says whether there was anything to
    bring; `hand_over(partial, uuid, path)` goes on with a claimed file as an ordinary flight, which gives it back."""

    def __init__(
        self,
        core: Core,
        whole: Callable[[Unit, bytes], bool],
        hand_over: Callable[[Partial, str, bytes], None],
    ) -> None:
        self._core = core
        self._whole = whole
        self._hand_over = hand_over
        self._pool = ThreadPoolExecutor(1, "small-files")
        self._units: deque[Unit] = deque()
        self._running = False
        self._closed = False
        self._lock = threading.Lock()
        self._claimed: set[_Claim] = set()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._units.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def bring(self, unit: Unit) -> None:
        """Have an evicted unit's small files brought, after those that were asked for before."""
        with self._lock:
            if self._closed:
                return
            self._units.append(unit)
            if not self._running:
                self._running = True
                self._pool.submit(self._run)

    def _run(self) -> None:
        while (unit := self._pop(last=True)) is not None:
            try:
                self._bring(unit)
            except (OSError, RunfsError) as error:  # it was only ahead of time; a reader gets the error itself
                log.debug("%s: small files are not brought ahead: %s", unit.uuid, error)
            except Exception:
                log.exception("bringing small files ended unexpectedly; please report this")
            finally:
                for claim in list(self._claimed):
                    self._elsewhere(claim)

    def _pop(self, *, last: bool) -> Unit | None:
        """The next unit; without one, and `last`, the stream is over."""
        with self._lock:
            if self._units:
                return self._units.popleft()
            if last:
                self._running = False
            return None

    def _bring(self, unit: Unit) -> None:
        files = self._files(unit)
        home = next((home for _file, home in files if self._reads(home) is not None), None)
        reads = self._reads(home) if home is not None else None
        if home is None or reads is None:
            for file, _home in files:
                self._ordinary(unit, file)
            return
        for claim, data in reads.each(self._stream(home, unit, files)):
            self._came(home, claim, data)

    @staticmethod
    def _reads(home: Home) -> SmallReads | None:
        with suppress(RunfsError):  # it cannot be opened: who reads is told why
            store = home.store()
            return store.small_reads() if isinstance(store, ObservedStore) else None
        return None

    def _files(self, unit: Unit) -> list[tuple[SmallFile, Home]]:
        """What to bring of a unit, each with the store to ask, in path order."""
        homes = sorted((home for home in self._core.stores if not home.calculates), key=lambda home: home.rank)
        order = {home.name: number for number, home in enumerate(homes)}
        best: dict[bytes, SmallFile] = {}
        for file in self._core.journal.small_files(unit.uuid, SMALL):
            rank = order.get(file.store, len(order))
            if rank < len(order) and (file.path not in best or rank < order[best[file.path].store]):
                best[file.path] = file
        budget, found = _SMALL_TOTAL, []
        for file in best.values():
            if file.size <= budget:
                budget -= file.size
                found.append((file, homes[order[file.store]]))
        return found

    def _ordinary(self, unit: Unit, file: SmallFile) -> None:
        try:
            self._whole(unit, file.path)
        except (OSError, RunfsError) as error:  # it was only ahead of time; a reader gets the error itself
            log.debug("%s: %r is not brought ahead: %s", unit.uuid, file.path, error)

    def _stream(self, home: Home, unit: Unit, files: list[tuple[SmallFile, Home]]) -> Iterator[tuple[_Claim, str, int]]:
        """The files of this unit and of those that wait behind it, as they are asked for."""
        following: Unit | None = unit
        while following is not None:
            try:
                self._core.need_space(sum(file.size for file, _home in files))
                for file, other in files:
                    if other is not home:
                        self._ordinary(following, file)
                    elif (claim := self._claim(following, file)) is not None:
                        yield claim, file.key, file.size
            except (OSError, RunfsError) as error:
                log.debug("%s: small files are not brought ahead: %s", following.uuid, error)
            following = self._pop(last=False)
            files = self._files(following) if following is not None else []

    def _claim(self, unit: Unit, file: SmallFile) -> _Claim | None:
        """A file that is to be asked for now; None when it is here, or on its way, or gone."""
        try:
            partial = self._open(unit, file.path)
        except OSError:  # removed, renamed, or just being evicted again
            return None
        if partial is None:
            return None
        with partial.lock:
            wanted = not partial.flying and not partial.changed and partial.digest == file.digest
            wanted = wanted and bool(partial.missing(0, partial.size))
            if wanted:
                partial.flying[0] = True
        if not wanted:
            self._core.release(partial)
            return None
        claim = _Claim(partial, unit.uuid, file.path)
        self._claimed.add(claim)
        return claim

    def _open(self, unit: Unit, path: bytes) -> Partial | None:
        try:
            return self._core.take(open_file(unit.shadow, path, os.O_RDWR))
        except PermissionError:  # a file that its owner may not write
            fd = open_file(unit.shadow, path, os.O_RDONLY)
            try:
                return self._core.partial(fd)
            finally:
                os.close(fd)

    def _came(self, home: Home, claim: _Claim, data: bytes | None) -> None:
        partial = claim.partial
        if data is None or blake3(data).digest() != partial.digest:
            self._elsewhere(claim)
            return
        name = claim.path.decode("utf-8", "replace")
        try:
            with self._core.events.progress("hydrate", name, len(data), uuid=claim.uuid, store=home.name) as step:
                faults.point("hydrate.read")
                partial.fill(0, data)
                step(len(data))
        except OSError:
            self._elsewhere(claim)
            return
        self._claimed.discard(claim)
        self._core.note_trouble(claim.uuid, claim.path, [0], None)
        partial.arrived([0], None)
        faults.point("hydrate.small")
        self._core.release(partial)

    def _elsewhere(self, claim: _Claim) -> None:
        self._claimed.discard(claim)
        self._hand_over(claim.partial, claim.uuid, claim.path)
