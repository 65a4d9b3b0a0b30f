"""A store that tells what is set and deleted in it: any store, with events.

Used by the daemon around each home, and by anybody who wants to follow a store. Blocks as the store in it does.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from vfs.events import Events, ObjectDeleted, ObjectSet
from vfs.stores.protocol import Arrived, Check, Info, Stat, Store
from vfs.stores.s3_small import SmallReads


class ObservedStore:
    """`store`, with ObjectSet and ObjectDeleted published to `events` after each change that succeeded.

    Changes that others make in the store are not seen, nor those whose outcome is unknown (StoreTimeout, Unreachable).
    """

    def __init__(self, store: Store, events: Events) -> None:
        self.store = store
        self.events = events
        self.name = store.name
        self.url = store.url
        self.problems = store.problems

    @property
    def connected(self) -> bool:
        return self.store.connected

    def connect(self, credentials: Mapping[str, str] | None = None) -> None:
        self.store.connect(credentials)

    def disconnect(self) -> None:
        self.store.disconnect()

    def info(self) -> Info:
        return self.store.info()

    def stat(self, key: str, *, deadline: float | None = None) -> Stat:
        return self.store.stat(key, deadline=deadline)

    def read(self, key: str, start: int = 0, length: int | None = None, *, deadline: float | None = None) -> bytes:
        return self.store.read(key, start, length, deadline=deadline)

    def read_into(
        self,
        key: str,
        buffer: memoryview,
        start: int = 0,
        *,
        arrived: Arrived | None = None,
        deadline: float | None = None,
    ) -> int:
        return self.store.read_into(key, buffer, start, arrived=arrived, deadline=deadline)

    def small_reads(self) -> SmallReads | None:
        """The store's own way to read many small objects, where it has one that works."""
        found: Callable[[], SmallReads | None] = getattr(self.store, "small_reads", lambda: None)
        return found() if self.connected else None

    def list(self, prefix: str = "", *, recursive: bool = True, deadline: float | None = None) -> Iterator[Stat]:
        return self.store.list(prefix, recursive=recursive, deadline=deadline)

    def local_path(self, key: str) -> Path | None:
        return self.store.local_path(key)

    def sweep(self, older_than_s: float = 86400.0, *, deadline: float | None = None) -> int:
        return self.store.sweep(older_than_s, deadline=deadline)

    def check(self) -> Check:
        return self.store.check()

    def write(
        self,
        key: str,
        data: bytes,
        *,
        if_absent: bool = False,
        if_version: str | None = None,
        deadline: float | None = None,
    ) -> Stat:
        return self._set(self.store.write(key, data, if_absent=if_absent, if_version=if_version, deadline=deadline))

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
        stat = self.store.upload(
            key,
            source,
            size,
            if_absent=if_absent,
            if_version=if_version,
            progress=progress,
            deadline=deadline,
        )
        return self._set(stat)

    def copy(self, source: str, target: str, *, if_absent: bool = False, deadline: float | None = None) -> Stat:
        return self._set(self.store.copy(source, target, if_absent=if_absent, deadline=deadline))

    def move(self, source: str, target: str, *, if_absent: bool = False, deadline: float | None = None) -> Stat:
        stat = self.store.move(source, target, if_absent=if_absent, deadline=deadline)
        if stat.key != source:
            self._set(stat)
            self.events.publish(ObjectDeleted(self.name, source))
        return stat

    def delete(self, key: str, *, deadline: float | None = None) -> None:
        self.store.delete(key, deadline=deadline)
        self.events.publish(ObjectDeleted(self.name, key))

    def _set(self, stat: Stat) -> Stat:
        self.events.publish(ObjectSet(self.name, stat.key))
        return stat
