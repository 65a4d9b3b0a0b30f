"""Remove what an eviction set aside: file by file, only what was proven, and nothing that somebody opens meanwhile.

Used by evict and by its recovery. Local disk only. A process may still reach the files set aside: through a directory
it has open. Each file goes under a write lease: it first loses its name, so that nobody can open it any more; if
somebody came to open it for writing just before, it moves into the shadow, under its path, and he writes there.
Whatever is not exactly what was proven moves there too.

A crash leaves the rest of the directory, and at most one file under the name `<aside>.gone`.
"""

import errno
import logging
import os
import stat
from collections.abc import Callable, Mapping
from contextlib import suppress

from vfs import cache, faults, linux, shadow
from vfs.errors import DamagedRecord
from vfs.journal import Known
from vfs.scan import Seen, open_file, walk

log = logging.getLogger(__name__)

_PASSES = 10  # over a directory in which somebody goes on making files


class Discard:
    """What stands at `aside`, being removed. `place` is the shadow; `leased` are descriptors of its files, by path, on
    which we hold write leases already; `rescued()` is called before something moves into the shadow."""

    def __init__(
        self,
        aside: bytes,
        place: bytes,
        known: Mapping[bytes, Known],
        leased: Mapping[bytes, int],
        rescued: Callable[[], None],
    ) -> None:
        self._aside = aside
        self._place = place
        self._known = known
        self._rescued = rescued
        self._gone = aside + b".gone"
        self._leased = {os.fstat(fd).st_ino: fd for fd in leased.values()}
        self._relinked: set[int] = set()  # inodes of which we removed a name: their ctime says nothing any more

    def run(self) -> bool:
        """Remove all of it; False when something in it is in use and must be left for later. Raises OSError."""
        self._left_over()
        if os.path.islink(self._aside):
            os.unlink(self._aside)
        if not os.path.lexists(self._aside):
            return True
        return any(self._pass() for _ in range(_PASSES))

    def _left_over(self) -> None:
        """A file that lost its name before a crash."""
        with suppress(FileNotFoundError):
            status = os.lstat(self._gone)
            paths = [path for path, item in self._known.items() if item.inode == status.st_ino]
            path = min(paths, default=b"recovered")
            item = self._known.get(path)
            fd = os.open(self._gone, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                untouched = item is not None and _free(fd) and Seen(path, os.fstat(fd)).matches(item, ctime=False)
                if untouched:
                    os.unlink(self._gone)
                elif not self._rescue(self._gone, path):
                    raise DamagedRecord(f"{os.fsdecode(self._gone)} is still being written to")
            finally:
                os.close(fd)

    def _pass(self) -> bool:
        found = list(walk(self._aside))
        # The markers first, so that machinable does not take it for a record.
        for seen in sorted(found, key=lambda seen: os.path.basename(seen.path) != b".machinable"):
            if seen.kind != "directory":
                with suppress(FileNotFoundError):
                    self._one(seen)
            elif seen.path not in self._known:
                self._rescued()
                self._keep_directory(seen.path)
        for path in [*(seen.path for seen in reversed(found) if seen.kind == "directory"), b""]:
            try:
                os.rmdir(os.path.join(self._aside, path) if path else self._aside)
            except FileNotFoundError:
                continue
            except OSError as error:
                if error.errno != errno.ENOTEMPTY:
                    raise
                self._keep_directory(path)
                return False
        return True

    def _keep_directory(self, path: bytes) -> None:
        """Somebody made something in it just now; the shadow needs the directory too."""
        os.makedirs(os.path.join(self._place, path), exist_ok=True)

    def _one(self, seen: Seen) -> None:
        path, item = os.path.join(self._aside, seen.path), self._known.get(seen.path)
        if _same_inode(self._place, seen.path, seen.status):
            os.unlink(path)
            self._relinked.add(seen.status.st_ino)
        elif item is None or (seen.kind, seen.target) != (item.file.kind, item.file.target):
            self._rescue(path, seen.path)
        elif seen.kind != "file":
            os.unlink(path)
        elif self._untouched(seen, item):
            self._drop(seen, item)
        else:
            self._rescue(path, seen.path)

    def _untouched(self, seen: Seen, item: Known) -> bool:
        return seen.matches(item, ctime=seen.status.st_ino not in self._relinked)

    def _drop(self, seen: Seen, item: Known) -> None:
        held = self._leased.get(seen.status.st_ino)
        fd = held
        path = os.path.join(self._aside, seen.path)
        try:
            if fd is None:
                try:
                    fd = open_file(self._aside, seen.path, os.O_RDONLY)
                except BlockingIOError:
                    fd = None
            if fd is None or (held is None and not _free(fd)) or not self._untouched(_again(seen, fd), item):
                self._rescue(path, seen.path)
                return
            os.rename(path, self._gone)
            self._relinked.add(seen.status.st_ino)
            faults.point("evict.unnamed")
            if not linux.lease_wanted_for_writing(fd):
                os.unlink(self._gone)
            elif not self._rescue(self._gone, seen.path):
                os.rename(self._gone, path)
        finally:
            if fd is not None and held is None:
                os.close(fd)

    def _rescue(self, source: bytes, path: bytes) -> bool:
        """Move something into the shadow; False when it must stay, since it is on another disk and in use."""
        self._rescued()
        log.warning("%r was changed while its record was evicted; the change is kept", path)
        target = os.path.join(self._place, path)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        number = 0
        while not _replaceable(target, self._known.get(path)):  # changed through the mount too: both are kept
            number += 1
            target = os.path.join(self._place, path) + b".conflict-%d" % number
        try:
            os.rename(source, target)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            return self._copy(source, target)
        linux.sync_directory(os.path.dirname(target))
        return True

    def _copy(self, source: bytes, target: bytes) -> bool:
        status = os.lstat(source)
        if stat.S_ISREG(status.st_mode):
            held = self._leased.get(status.st_ino)
            fd = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC) if held is None else held
            try:
                if linux.lease_wanted_for_writing(fd) if held is not None else not _free(fd):
                    return False
                with suppress(FileNotFoundError):
                    os.unlink(target)
                shadow.copy_to(fd, target)
            finally:
                if held is None:
                    os.close(fd)
        elif stat.S_ISLNK(status.st_mode):
            with suppress(FileNotFoundError):
                os.unlink(target)
            os.symlink(os.readlink(source), target)
        else:
            os.mkfifo(target, stat.S_IMODE(status.st_mode))
        linux.sync_directory(os.path.dirname(target))
        os.unlink(source)
        return True


def _free(fd: int) -> bool:
    """Whether we could take a lease: nobody has the file open. Where there are no leases, nobody knows: no."""
    try:
        return linux.lease(fd)
    except OSError:
        return False


def _again(seen: Seen, fd: int) -> Seen:
    return Seen(seen.path, os.fstat(fd))


def _replaceable(target: bytes, item: Known | None) -> bool:
    """Whether nothing is lost with what has this name in the shadow: nothing, or what was made of a proven file."""
    try:
        status = os.lstat(target)
    except FileNotFoundError:
        return True
    if stat.S_ISLNK(status.st_mode):
        return True
    if not stat.S_ISREG(status.st_mode):
        return False
    header = cache.read_header(target)
    if header is not None:
        return not header.changed
    return item is not None and (status.st_size, status.st_mtime_ns) == (item.file.size, item.file.mtime_ns)


def _same_inode(root: bytes, path: bytes, status: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.lstat(os.path.join(root, path)), status)
    except (FileNotFoundError, NotADirectoryError):
        return False
