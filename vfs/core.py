"""What every part of the logic works with: index, journal, stores, units, files in use. One object a process.

Used by push, evict, hydrate, the file system and the session. Making it blocks on local disks only: stores are opened
at their first use, so a mount needs no network. Thread-safe where its members are.
"""

import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from vfs import cache, linux
from vfs.errors import Full, RunfsError, UsageError
from vfs.events import Events
from vfs.index import Index
from vfs.journal import Journal
from vfs.manifest import CHUNK, Content
from vfs.moves import Moves
from vfs.settings import Settings, StoreSettings
from vfs.stores import Nature, Store, nature, open_store
from vfs.stores.health import Health
from vfs.stores.observed import ObservedStore
from vfs.units import Unit, Units
from vfs.wire import data_key as data_key
from vfs.wire import manifest_key as manifest_key
from vfs.wire import plain_key as plain_key

log = logging.getLogger(__name__)

_CONTENTS_KEPT = 256  # digests of recently read files; a 10 GiB file's are 320 kB
_CTIMES_HELD = 100_000  # of files; one that is forgotten shows the ctime of its last coming or going
_LATER_S = 2.0  # seconds until small files that came are made durable,
_LATER_MOST = 1024  # or so many of them: each holds a descriptor
_TROUBLES_KEPT = 1000  # files that could not be read, with the reason


class Home(Health):
    """A configured store: opened at first use, with its health as reads and pushes found it. What is set and deleted in
    it is published to `events`."""

    def __init__(self, settings: StoreSettings, defaults: Settings, journal: Journal, events: Events) -> None:
        super().__init__()
        self.events = events
        self.settings = settings
        self.name = settings.name
        self.url = settings.url
        self._defaults = defaults
        self._journal = journal
        self._store: Store | None = None
        self._lock = threading.Lock()
        self._nature = nature_of(settings)

    @property
    def on_close(self) -> str:
        return self.settings.on_close or self._defaults.on_close

    @property
    def deadline_s(self) -> float:
        return self.settings.deadline_s if self.settings.deadline_s is not None else self._defaults.deadline_s

    @property
    def least_throughput(self) -> int:
        own = self.settings.least_throughput
        return own if own is not None else self._defaults.least_throughput

    @property
    def read_only(self) -> bool:
        """Whether the store is a source only: nothing is pushed there, and it is no copy that counts."""
        return self._nature.read_only

    @property
    def calculates(self) -> bool:
        """Whether the store makes what it is asked for: asked last, for a reader that waits."""
        return self._nature.calculates

    def _given(self) -> dict[str, str]:
        """What a store that works with a directory of its own, or with the index, is told of ours."""
        place = self._defaults.cache_place / ".whole" / self.name
        given = {"place": str(place), "index": str(self._defaults.index)}
        return {key: value for key, value in given.items() if key in self._nature.wants}

    def store(self) -> Store:
        """The open store. Raises ConfigError, StoreError."""
        with self._lock:
            if self._store is None:
                opened = open_store(
                    self.url,
                    self.name,
                    {
                        "deadline_s": self.deadline_s,
                        "least_throughput": self.least_throughput,
                        "used": self._journal.note(f"store used {self.name}") == self.url,
                        **self._given(),
                        **self.settings.options,
                    },
                )
                if isinstance(opened, _Telling):
                    opened.events = self.events
                self._store = ObservedStore(opened, self.events)
            return self._store

    def was_used(self) -> None:
        """Remember that this store holds something of ours, so that an empty one in its place is noticed."""
        if self._journal.note(f"store used {self.name}") != self.url:
            self._journal.set_note(f"store used {self.name}", self.url)

    def close(self) -> None:
        with self._lock:
            if self._store is not None:
                self._store.disconnect()
                self._store = None


@runtime_checkable
class _Telling(Protocol):
    """A store that tells what it does by itself, such as running a command."""

    events: Events


def nature_of(settings: StoreSettings) -> Nature:
    """What can be told of a store before it is opened; one that is configured wrongly says so when it is used."""
    try:
        return nature(settings.url, settings.name, settings.options)
    except UsageError:
        return Nature(False, False, frozenset())


@dataclass(slots=True)
class Held:
    """What a reader is told of a file's ctime after its bytes came or went: that is no change of the file."""

    real: int
    shown: int


class Core:
    """The parts together. `watch` and `commit` are set by the daemon: `commit(call)` runs a short call where no file
    operation runs at the same time (its event loop); without a daemon there are none, and it runs here."""

    def __init__(self, settings: Settings, index: Index, journal: Journal) -> None:
        self.settings = settings
        self.index = index
        self.journal = journal
        settings.cache_place.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._cache_place = settings.cache_place
        self.units = Units(index, journal, self._cache_place)
        self.events = Events()
        stores = [Home(store, settings, journal, self.events) for store in settings.stores]
        self.homes = [store for store in stores if not store.read_only]
        self.sources = [store for store in stores if store.read_only]  # and, for a while, what is imported from
        self.moves = Moves(self.events)
        self.transactions = journal.transactions()  # as the journal has them; `vfs.versions.transactions` changes it
        self.commit: Callable[[Callable[[], None]], None] = lambda call: call()
        self.content_changed: list[Callable[[Unit], None]] = []
        self._troubles: OrderedDict[tuple[str, bytes], tuple[str, set[int]]] = OrderedDict()
        self._partials: dict[tuple[int, int], cache.Partial] = {}
        self._contents: OrderedDict[bytes, Content] = OrderedDict()
        self._held: OrderedDict[tuple[int, int], Held] = OrderedDict()
        self._lock = threading.RLock()
        self._behind = ThreadPoolExecutor(1, "settle")
        self._later: list[cache.Partial] = []  # small files that nobody uses any more, to be settled together
        self._timer: threading.Timer | None = None
        self._closed = False

    def close(self) -> None:
        with self._lock:
            self._closed = True
            if self._timer is not None:
                self._timer.cancel()
        self._behind.shutdown(wait=True)
        for partial in self._partials.values():
            partial.close()
        self._partials.clear()
        for home in self.stores:
            home.close()
        self.journal.close()
        self.index.close()

    @property
    def stores(self) -> list[Home]:
        """Homes and sources: what is read from, tried and shown."""
        return [*self.homes, *self.sources]

    def home(self, name: str) -> Home:
        for home in self.stores:
            if home.name == name:
                return home
        raise RunfsError(f"no store is called {name}; `runfs stores` shows those that are")

    @property
    def link(self) -> bytes:
        """The one link that evicted records' links go through; it points at the mountpoint."""
        return os.fsencode(self.settings.index.parent / ".runfs")

    def sequence(self, unit: Unit) -> int:
        """A unit's change sequence at a moment when no file operation is half done."""
        found: list[int] = []
        self.commit(lambda: found.append(unit.sequence))
        return found[0]

    # --- contents ----------------------------------------------------------------------------------------------

    def content(self, digest: bytes) -> Content | None:
        """What a digest consists of, if the journal knows it."""
        with self._lock:
            found = self._contents.get(digest)
            if found is None:
                found = self.journal.content(digest)
                if found is None:
                    return None
                self._contents[digest] = found
                while len(self._contents) > _CONTENTS_KEPT:
                    self._contents.popitem(last=False)
            else:
                self._contents.move_to_end(digest)
            return found

    def note_trouble(self, uuid: str, path: bytes, numbers: list[int], text: str | None) -> None:
        """Remember why chunks of a file could last not be read, for `status PATH`; None: these could."""
        with self._lock:
            before, chunks = self._troubles.pop((uuid, path), ("", set()))
            chunks = chunks | set(numbers) if text is not None else chunks - set(numbers)
            if chunks:
                self._troubles[uuid, path] = (text or before, chunks)
                while len(self._troubles) > _TROUBLES_KEPT:
                    self._troubles.popitem(last=False)

    def trouble(self, uuid: str, path: bytes) -> str | None:
        with self._lock:
            found = self._troubles.get((uuid, path))
            return found[0] if found else None

    # --- files in use ------------------------------------------------------------------------------------------

    def partial(self, fd: int) -> cache.Partial | None:
        """The shared object of an open evicted file (`fd` is only looked at), None when all of it is here.

        Whoever gets one gives it back with `release`.
        """
        status = os.fstat(fd)
        key = (status.st_dev, status.st_ino)
        with self._lock:
            found = self._partials.get(key)
            if found is None:
                header = cache.read_header(fd)
                if header is None:
                    return None
                self.hold_ctime(status)
                own = cache.open_writable(fd)
                found = self._partials[key] = cache.Partial(own, header)
            found.users += 1
            return found

    def take(self, fd: int) -> cache.Partial | None:
        """The same for a descriptor that is open for reading and writing: it becomes the object's own, or is closed."""
        status = os.fstat(fd)
        key = (status.st_dev, status.st_ino)
        try:
            with self._lock:
                found = self._partials.get(key)
                if found is None:
                    header = cache.read_header(fd)
                    if header is None:
                        return None
                    self.hold_ctime(status)
                    found, fd = cache.Partial(fd, header), -1
                    self._partials[key] = found
                found.users += 1
                return found
        finally:
            if fd >= 0:
                os.close(fd)

    def hold(self, partial: cache.Partial) -> None:
        """Take part in a partial that is held already."""
        with self._lock:
            partial.users += 1

    def release(self, partial: cache.Partial) -> None:
        """Give a `partial` back; after the last one what came is made durable, by a thread of our own: small files a
        little later and many together, so that they share the disk's work. Until then only this process calls them
        local; after a crash they are brought again."""
        with self._lock:
            partial.users -= 1
            if partial.users or self._closed:
                return
            if partial.size > CHUNK or partial.changed or not partial.unsaved:  # what failed is forgotten at once
                self._behind.submit(self._settle, partial)
                return
            self._later.append(partial)
            if len(self._later) == 1:
                self._timer = threading.Timer(_LATER_S, self._settle_later)
                self._timer.daemon = True
                self._timer.start()
            elif len(self._later) >= _LATER_MOST:
                self._settle_later()

    def _settle_later(self) -> None:
        """Have the small files settled that wait for it."""
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
            waiting, self._later, self._timer = self._later, [], None
            if waiting and not self._closed:
                self._behind.submit(self._settle_together, waiting)

    def _settle_together(self, partials: list[cache.Partial]) -> None:
        for partial in partials:
            with self._lock:
                if partial.users == 0 and self._partials.get(partial.key) is partial and partial.unsaved:
                    linux.begin_writing(partial.fd)  # all at once: then one commit has the blocks of all of them
        for partial in partials:
            self._settle(partial)

    def behind(self, call: Callable[[], None]) -> None:
        """Have something done by a thread of our own, after what waits there; not any more once this is closed."""
        with self._lock:
            if not self._closed:
                self._behind.submit(call)

    def settle(self) -> None:
        """Wait until what was released before is saved and closed."""
        self._settle_later()
        self._behind.submit(lambda: None).result()

    def _settle(self, partial: cache.Partial) -> None:
        with self._lock:
            if partial.users or self._partials.get(partial.key) is not partial:
                return  # somebody opened it again meanwhile, or an earlier settling of the same object closed it
        try:
            partial.save()
        except (OSError, RunfsError) as error:  # what is not called local is brought again; nothing was acknowledged
            log.warning("the cache could not keep what was brought: %s", error)
        with self._lock:
            if partial.users or partial.unsaved:
                return  # it was in use meanwhile; when that ends, or ended, it is settled again
            del self._partials[partial.key]
            if not partial.changed:
                self.held_again(os.fstat(partial.fd))
            os.close(partial.fd)

    def in_use(self, fd: int) -> cache.Partial | None:
        """The object of a file that is in use now, without taking part in it."""
        status = os.fstat(fd)
        with self._lock:
            return self._partials.get((status.st_dev, status.st_ino))

    # --- ctime -------------------------------------------------------------------------------------------------

    def hold_ctime(self, status: os.stat_result) -> None:
        """From here on this inode's ctime changes by our own doing; go on showing what it was."""
        key = (status.st_dev, status.st_ino)
        with self._lock:
            held = self._held.get(key)
            shown = held.shown if held and status.st_ctime_ns <= held.real else status.st_ctime_ns
            self._hold(key, Held(status.st_ctime_ns, shown))

    def _hold(self, key: tuple[int, int], held: Held) -> None:
        self._held[key] = held
        self._held.move_to_end(key)
        while len(self._held) > _CTIMES_HELD:
            self._held.popitem(last=False)

    def show_ctime(self, status: os.stat_result, shown: int) -> None:
        """Show this ctime for an inode as long as its real one stays what it is now."""
        with self._lock:
            self._hold((status.st_dev, status.st_ino), Held(status.st_ctime_ns, shown))

    def show_ctimes(self, device: int, shown: Iterable[tuple[int, int, int]]) -> None:
        """The same for many: (inode, real ctime, ctime to show), all on one device."""
        with self._lock:
            for inode, real, ctime_ns in shown:
                self._held[device, inode] = Held(real, ctime_ns)

    def changed_ctime(self, status: os.stat_result, at_ns: int = 0) -> None:
        """The file was changed for real: its real ctime, or `at_ns`, is the one to show, also while bytes of it go on
        coming in."""
        key, now = (status.st_dev, status.st_ino), max(status.st_ctime_ns, at_ns)
        with self._lock:
            if key in self._partials:
                self._held[key] = Held(now, now)
            else:
                self._held.pop(key, None)

    def held_again(self, status: os.stat_result) -> None:
        """Our own doing ended with this ctime."""
        with self._lock:
            held = self._held.get((status.st_dev, status.st_ino))
            if held is not None:
                held.real = status.st_ctime_ns

    def ctime(self, status: os.stat_result) -> int:
        """The ctime to show for an inode, in ns."""
        key = (status.st_dev, status.st_ino)
        held = self._held.get(key)
        if held is None:
            return status.st_ctime_ns
        partial = self._partials.get(key)
        # Not after what was last our own doing: the file may have been looked at before that.
        if status.st_ctime_ns <= held.real or (partial is not None and not partial.changed):
            return held.shown
        return status.st_ctime_ns

    def mtime(self, status: os.stat_result) -> int:
        """The mtime to show for an inode, in ns: bytes that are just being copied in do not count."""
        partial = self._partials.get((status.st_dev, status.st_ino))
        return status.st_mtime_ns if partial is None or partial.changed else partial.mtime_ns

    # --- space -------------------------------------------------------------------------------------------------

    def need_space(self, size: int) -> None:
        """Raise Full when `size` more bytes would not fit into the cache's file system."""
        room = os.statvfs(self._cache_place)
        if room.f_bavail * room.f_frsize < size + (16 << 20):  # the journal and small files need some too
            raise Full(
                f"no space in {self.settings.cache_place} for {size:,} bytes more; "
                "free some with: runfs evict --until-free SIZE"
            )


def quietly_remove(path: bytes) -> None:
    """Remove a name that may be gone already."""
    with suppress(FileNotFoundError):
        os.unlink(path)
