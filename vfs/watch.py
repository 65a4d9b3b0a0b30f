"""Watches record directories for what other processes write into them, past the mount. The daemon uses one `Watcher`.

A thread of its own reads inotify(7) and calls back; calls are thread safe. `watch` blocks as listing the directory
does; nothing here touches a network or holds a file open. What inotify cannot see: writes through a memory map, and
changes made by another host on a network file system. So a watch shortens the wait for a change; it does not replace
the scan before a push. Each watched write costs the writer some of its time (a tenth of a write of 4 KiB): for a
directory in which the daemon itself has a large file written, that is put off with `hush`.

Concurrency: one lock guards the tables. The thread takes it to work on a batch of events, never while it calls back,
so a callback may call every method here but `close`.
"""

import contextlib
import enum
import errno
import logging
import os
import select
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from inotify_simple import Event, INotify, flags

from vfs import linux

log = logging.getLogger(__name__)

COALESCE_S = 0.05  # changes of one path within this time are told once: writers write in bursts
READ_PAUSE_S = 0.005  # a few reads a burst, not one an event; short enough to watch a new directory "at once"
MOST_PENDING = 10_000  # more paths than this within one burst are told as ANYTHING of their records
MAX_WATCHES = Path("/proc/sys/fs/inotify/max_user_watches")
FALLBACK_LIMIT = 8192  # the kernel's own default on small machines, for where the file above cannot be read

_CREATED = flags.CREATE | flags.MOVED_TO
_REMOVED = flags.DELETE | flags.MOVED_FROM
_GONE = flags.DELETE_SELF | flags.MOVE_SELF | flags.UNMOUNT
# EXCL_UNLINK: files that were removed and are still open are nobody's business.
_MASK = (
    _CREATED | _REMOVED | flags.MODIFY | flags.ATTRIB | flags.CLOSE_WRITE | flags.DELETE_SELF | flags.MOVE_SELF
) | (flags.ONLYDIR | flags.EXCL_UNLINK)


class Kind(enum.StrEnum):
    """What happened to a path."""

    CREATED = "created"
    CHANGED = "changed"  # content, times or mode; also: replaced by another file
    REMOVED = "removed"  # with everything below it
    ANYTHING = "anything"  # changes were or will be missed from here on down: look for yourself


# What to tell when a path had the first kind in a batch and the second comes. ANYTHING stays whatever follows.
_MERGED = {
    (Kind.CREATED, Kind.CHANGED): Kind.CREATED,
    (Kind.REMOVED, Kind.CREATED): Kind.CHANGED,
    (Kind.REMOVED, Kind.CHANGED): Kind.CHANGED,
}

Changed = Callable[[str, bytes, Kind], None]


@dataclass(slots=True)
class _Watched:
    """One record: its directory, and the watch descriptor of each directory in it by relative path (b"": itself)."""

    directory: bytes
    descriptors: dict[bytes, int] = field(default_factory=dict)


class TooManyWatches(OSError):
    """More directories than may be watched; nothing that is wrong with the record."""


def default_limit() -> int:
    """Half of what the kernel allows this user: editors and file managers want watches, too."""
    try:
        return max(1, int(MAX_WATCHES.read_text()) // 2)
    except (OSError, ValueError):
        return FALLBACK_LIMIT


class Watcher:
    """Calls `changed(uuid, relative path, kind)` for each change in a watched directory, on a thread of its own.

    At most `limit` directories are watched at a time (one watch each, about 1 KiB of kernel memory): for more, the
    records that were not asked for the longest are let go, which is told as `(uuid, b"", Kind.ANYTHING)`.

    Raises OSError (EMFILE) when this user has no inotify instance left (fs.inotify.max_user_instances).
    """

    def __init__(self, changed: Changed, *, limit: int | None = None, coalesce_s: float = COALESCE_S) -> None:
        self._changed = changed
        self._limit = default_limit() if limit is None else limit
        self._coalesce_s = coalesce_s
        self._lock = threading.RLock()
        self._records: OrderedDict[str, _Watched] = OrderedDict()  # least recently asked for first
        self._owners: dict[int, set[tuple[str, bytes]]] = {}  # descriptor -> whose directory it is
        self._hushed: dict[tuple[str, bytes], int] = {}  # directories, and how often that was asked for
        self._pending: dict[tuple[str, bytes], Kind] = {}
        self._telling: dict[tuple[str, bytes], Kind] = {}
        self._closed = False
        self._inotify = INotify(nonblocking=True)
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._run, name="runfs-watch", daemon=True)
        self._thread.start()

    def watch(self, uuid: str, directory: bytes) -> bool:
        """Watch a record's directory (absolute path) and all below it; what changes after this returns is told.

        Asking again is cheap and keeps it from being let go. False when it cannot be watched: it is no directory (a
        symlink is none), or it alone has more directories than may be watched.
        """
        with self._lock:
            if self._closed:
                return False
            known = self._records.get(uuid)
            if known is not None and known.directory == directory:
                self._records.move_to_end(uuid)
                return self.watching(uuid)
            self._forget(uuid)
            self._records[uuid] = _Watched(directory)
            return self._watch_tree(uuid)

    def unwatch(self, uuid: str) -> None:
        """Stop watching; what was not told yet will not be (a callback that runs at this moment ends later)."""
        with self._lock:
            self._forget(uuid)
            for waiting in (self._pending, self._telling):
                for key in [each for each in waiting if each[0] == uuid]:
                    del waiting[key]

    def hush(self, uuid: str, path: bytes) -> None:
        """Tell no writes to files in this directory of a record (its relative path) until `unhush` was called as often;
        that a writer closed its file is told as before."""
        with self._lock:
            self._hushed[uuid, path] = self._hushed.get((uuid, path), 0) + 1
            if self._hushed[uuid, path] == 1:
                self._add_again(uuid, path)

    def unhush(self, uuid: str, path: bytes) -> None:
        """Tell writes again. What may have been missed is told as ANYTHING of the directory."""
        with self._lock:
            self._hushed[uuid, path] -= 1
            if not self._hushed[uuid, path]:
                del self._hushed[uuid, path]
                self._add_again(uuid, path)

    def watching(self, uuid: str) -> bool:
        """Whether changes of this record are told at this moment. Never waits."""
        watched = self._records.get(uuid)
        return watched is not None and b"" in watched.descriptors

    def count(self) -> int:
        """How many directories are watched."""
        return len(self._owners)

    def close(self) -> None:
        """Stop; what is pending is not told any more. Waits for a callback that is running, so not for callbacks."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        with self._lock:
            self._records.clear()
            self._owners.clear()
            self._pending.clear()
            self._inotify.close()
            os.close(self._wake)

    # -- the thread

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._inotify.fileno(), select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        while not self._closed:
            poll.poll()
            with contextlib.suppress(BlockingIOError):  # it was not the wake that ended the wait
                os.eventfd_read(self._wake)
            end = time.monotonic() + self._coalesce_s
            self._take_all()
            while not self._closed and time.monotonic() < end:
                time.sleep(READ_PAUSE_S)
                self._take_all()
            self._tell()

    def _take_all(self) -> None:
        with self._lock:
            if not self._closed:
                self._take(self._inotify.read(timeout=0))

    def _tell(self) -> None:
        with self._lock:
            self._telling, self._pending = self._pending, {}
        while not self._closed:
            with self._lock:
                if not self._telling:
                    return
                uuid, path = next(iter(self._telling))
                kind = self._telling.pop((uuid, path))
            try:
                self._changed(uuid, path, kind)
            except Exception:
                # The next change must still be told; what went wrong in the listener is in the log.
                log.exception("a listener failed on %s of %r in %s", kind, path, uuid)

    def _take(self, events: list[Event]) -> None:
        for event in events:
            if event.mask & flags.Q_OVERFLOW:
                self._recover()
            elif event.mask & flags.IGNORED:
                self._drop_descriptor(event.wd)
            else:
                for uuid, parent in list(self._owners.get(event.wd, ())):
                    self._take_one(uuid, parent, event)

    def _take_one(self, uuid: str, parent: bytes, event: Event) -> None:
        if uuid not in self._records:
            return
        if event.mask & _GONE:
            if parent == b"":  # of another directory, its parent tells
                self._forget(uuid)
                self._note(uuid, b"", Kind.REMOVED)
            return
        name = os.fsencode(event.name)
        if not name:
            # Times or mode of the directory itself; its parent tells this too, except for the topmost.
            if parent == b"":
                self._note(uuid, b"", Kind.CHANGED)
            return
        path = parent + b"/" + name if parent else name
        if event.mask & _REMOVED:
            self._note(uuid, path, Kind.REMOVED)
            if event.mask & flags.ISDIR:
                self._drop_below(uuid, path)
        elif event.mask & _CREATED:
            self._note(uuid, path, Kind.CREATED)
            if event.mask & flags.ISDIR:
                self._appeared(uuid, path)
        else:
            self._note(uuid, path, Kind.CHANGED)

    def _note(self, uuid: str, path: bytes, kind: Kind) -> None:
        before = self._pending.get((uuid, path))
        if before is not Kind.ANYTHING:
            self._pending[uuid, path] = kind if before is None else _MERGED.get((before, kind), kind)
        if len(self._pending) > MOST_PENDING:
            self._pending = {(each, b""): Kind.ANYTHING for each, _ in self._pending}

    def _appeared(self, uuid: str, path: bytes) -> None:
        """A directory came into being, perhaps with content that was there before its watch: tell that, too."""
        try:
            for found in self._add_tree(uuid, path):
                self._note(uuid, found, Kind.CREATED)
        except OSError as error:
            log.info("%s is not watched any more: %s", uuid, error)
            self._forget(uuid)
            self._note(uuid, b"", Kind.ANYTHING)

    def _recover(self) -> None:
        """Events were lost: directories among them, perhaps. Watch everything anew, and say so for each record."""
        uuids = list(self._records)
        for uuid in uuids:
            self._note(uuid, b"", Kind.ANYTHING)
            self._drop_below(uuid, b"")
        for uuid in uuids:
            if uuid in self._records:  # else: let go for one before it
                self._watch_tree(uuid)

    # -- the tables; all with the lock held

    def _watch_tree(self, uuid: str) -> bool:
        """Watch all of a record; forget it when that does not work."""
        try:
            for _ in self._add_tree(uuid, b""):
                pass
        except OSError as error:
            self._forget(uuid)
            log.info("%s is not watched: %s", uuid, error)
        return self.watching(uuid)

    def _add_tree(self, uuid: str, path: bytes) -> Iterator[bytes]:
        """Watch a directory and all below it; gives the paths in it, each after its directory's watch was set."""
        todo = [path]
        while todo:
            parent = todo.pop()
            watched = self._records[uuid]
            with _opened(watched.directory, parent) as directory:
                if directory is None:
                    continue
                self._add(uuid, parent, directory)
                with os.scandir(directory) as entries:
                    for entry in entries:
                        name = os.fsencode(entry.name)
                        found = parent + b"/" + name if parent else name
                        if entry.is_dir(follow_symlinks=False):
                            todo.append(found)
                        yield found

    def _add(self, uuid: str, path: bytes, directory: int) -> None:
        """Watch one open directory, letting go of other records where that makes room. Raises TooManyWatches."""
        while True:
            if len(self._owners) >= self._limit:
                self._let_go(uuid)
                continue
            try:
                # By its descriptor: the name may have become something else since it was opened.
                mask = _MASK & ~flags.MODIFY if (uuid, path) in self._hushed else _MASK
                descriptor = self._inotify.add_watch(f"/proc/self/fd/{directory}", mask)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                self._let_go(uuid)
                continue
            self._records[uuid].descriptors[path] = descriptor
            self._owners.setdefault(descriptor, set()).add((uuid, path))
            return

    def _add_again(self, uuid: str, path: bytes) -> None:
        """Set the watch of a directory anew, if it has one: what is told of it changed."""
        watched = self._records.get(uuid)
        if self._closed or watched is None or path not in watched.descriptors:
            return
        try:
            with _opened(watched.directory, path) as directory:
                if directory is not None:
                    self._add(uuid, path, directory)
        except OSError as error:
            log.info("%s is not watched any more: %s", uuid, error)
            self._forget(uuid)
        if (uuid, path) not in self._hushed:
            self._note(uuid, path, Kind.ANYTHING)
            os.eventfd_write(self._wake, 1)

    def _let_go(self, asking: str) -> None:
        oldest = next((uuid for uuid in self._records if uuid != asking), None)
        if oldest is None:
            raise TooManyWatches(
                errno.ENOSPC,
                f"it has more directories than may be watched ({self._limit}; fs.inotify.max_user_watches)",
            )
        self._forget(oldest)
        self._note(oldest, b"", Kind.ANYTHING)
        os.eventfd_write(self._wake, 1)

    def _forget(self, uuid: str) -> None:
        if uuid in self._records:
            self._drop_below(uuid, b"")
            del self._records[uuid]

    def _drop_below(self, uuid: str, path: bytes) -> None:
        """Remove the watches of a directory of a record and of all below it."""
        watched = self._records[uuid]
        for each in [each for each in watched.descriptors if not path or each == path or each.startswith(path + b"/")]:
            descriptor = watched.descriptors.pop(each)
            owners = self._owners.get(descriptor, set())
            owners.discard((uuid, each))
            if not owners and self._owners.pop(descriptor, None) is not None:
                with contextlib.suppress(OSError):  # EINVAL: the kernel has removed it, its directory is gone
                    self._inotify.rm_watch(descriptor)

    def _drop_descriptor(self, descriptor: int) -> None:
        """The kernel has removed this watch."""
        for uuid, path in self._owners.pop(descriptor, set()):
            self._records[uuid].descriptors.pop(path, None)


@contextlib.contextmanager
def _opened(directory: bytes, path: bytes) -> Iterator[int | None]:
    """A directory below a record's, reached through no symlink; None where there is none (any more)."""
    root = below = None
    try:
        root = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        below = linux.open_beneath(root, path, os.O_RDONLY | os.O_DIRECTORY) if path else root
    except OSError as error:
        if not path or error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            raise
    try:
        yield below
    finally:
        for each in {root, below} - {None}:
            assert each is not None
            os.close(each)
