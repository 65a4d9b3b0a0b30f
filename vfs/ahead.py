"""Which records' small files are brought before they are asked for: those of a record that was just touched, and, for a
reader that walks from record to record, those of the next ones.

Used by `vfs.hydrate`. `touched` and `opened` are called for every read that waits and every open of an evicted file:
they only look into memory. What is brought is decided and done in the threads of `submit`.
"""

import logging
import threading
import time
from collections.abc import Callable

from vfs.core import Core
from vfs.errors import RunfsError
from vfs.units import Unit

log = logging.getLogger(__name__)

AHEAD = 2  # records; while one is read the next two come
_AGAIN_S = 600.0  # what was brought is not looked at again for so long
_KEPT = 10_000


class Ahead:
    """The touches of records. `bring(unit)` has a record's small files brought and returns; `submit` runs a call in
    another thread."""

    def __init__(
        self, core: Core, bring: Callable[[Unit], None], submit: Callable[[Callable[[], None]], object]
    ) -> None:
        self._core = core
        self._bring = bring
        self._submit = submit
        self._brought: dict[str, float] = {}  # when a record's small files were last sent for
        self._waiting: set[str] = set()  # sent for ahead of a walk that has not come there yet
        self._last: str | None = None  # the record that was touched last
        self._lock = threading.Lock()

    def touched(self, unit: Unit) -> None:
        """A reader waits for something in this record."""
        with self._lock:
            previous, self._last = self._last, unit.uuid
            walking = unit.uuid in self._waiting
            self._waiting.discard(unit.uuid)
            first = self._note(unit.uuid)
        if first or walking:
            self._submit(lambda: self._go(unit, previous, first=first, walking=walking))

    def opened(self, unit: Unit) -> None:
        """A file of this record was opened. If its record was brought for a walk, the walk has come here."""
        if unit.uuid in self._waiting:
            self.touched(unit)

    def forget(self, unit: Unit) -> None:
        """Its files went, or changed: what was brought before does not count any more."""
        with self._lock:
            self._brought.pop(unit.uuid, None)
            self._waiting.discard(unit.uuid)

    def _note(self, uuid: str) -> bool:
        """Whether a record is to be brought now; it counts as brought from here on. Under the lock."""
        now = time.monotonic()
        if now - self._brought.get(uuid, -_AGAIN_S) < _AGAIN_S:
            return False
        self._brought[uuid] = now
        while len(self._brought) > _KEPT:
            del self._brought[next(iter(self._brought))]
        return True

    def _go(self, unit: Unit, previous: str | None, *, first: bool, walking: bool) -> None:
        try:
            if first:
                self._bring(unit)
            if walking or (previous is not None and self._follows(previous, unit.uuid)):
                for each in self._next(unit.uuid):
                    self._bring(each)
        except (OSError, RunfsError) as error:  # it was only ahead of time; a reader gets the error itself
            log.debug("%s: nothing is brought ahead: %s", unit.uuid, error)

    def _follows(self, one: str, other: str) -> bool:
        """Whether a record comes right after another one in the listing of the root."""
        found = self._core.index.page(one, 1)
        return bool(found) and found[0].uuid == other

    def _next(self, uuid: str) -> list[Unit]:
        """The records after this one that are evicted and were not brought yet."""
        found = []
        for record in self._core.index.page(uuid, AHEAD):
            if record.parent_id is None and self._core.units.is_evicted(record.uuid):
                with self._lock:
                    if not self._note(record.uuid):
                        continue
                    self._waiting.add(record.uuid)
                    if len(self._waiting) > _KEPT:  # walks that never went on
                        self._waiting.pop()
                found.append(self._core.units.get(record.uuid))
        return found
