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
from vfs.scan import Seen, walk

log = logging.getLogger(__name__)

_PASSES = 10  # over a directory in which somebody goes on making files


class Discard:
    """What stands at `aside`, being removed. `place` is the shadow; `leased` are descriptors of its files, by path, on
    which we hold write leases already; `rescued()` is called before something moves into the shadow; `kept` are the
    inodes of files that the shadow has too, if that is known."""

    def __init__(
        self,
        aside: bytes,
        place: bytes,
        known: Mapping[bytes, Known],
        leased: Mapping[bytes, int],
        rescued: Callable[[], None],
        kept: Mapping[bytes, int] | None = None,
    ) -> None:
        self._aside = aside
        self._place = place
        self._known = known
        self._rescued = rescued
        self._gone = aside + b".gone"
        self._leased = {known[path].inode: fd for path, fd in leased.items()}  # as they were compared
        self._borrowed = frozenset(leased.values())
        self._kept = kept
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
        if not os.path.lexists(self._gone):
            return
        status = os.lstat(self._gone)
        target = os.readlink(self._gone) if stat.S_ISLNK(status.st_mode) else b""
        paths = [p for p, k in self._known.items() if (target == k.file.target if target else k.inode == status.st_ino)]
        path = min(paths, default=b"recovered")
        self._relinked.add(status.st_ino)
        fd = self._hold(Seen(path, status), self._gone)
        try:
            if not self._unnamed(Seen(path, status, target), fd, self._gone):
                raise DamagedRecord(f"{os.fsdecode(self._gone)} is still being written to")
        finally:
            self._let_go(fd)

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

    def _one(self, listed: Seen) -> None:
        path = os.path.join(self._aside, listed.path)
        fd = self._hold(listed, path)
        try:
            os.rename(path, self._gone)  # another one may have taken the name since we looked: see what it is now
            status = os.lstat(self._gone)
            target = os.readlink(self._gone) if stat.S_ISLNK(status.st_mode) else b""
            faults.point("evict.unnamed")
            if not self._unnamed(Seen(listed.path, status, target), fd, path):
                self._put_back(path)
        finally:
            self._let_go(fd)

    def _hold(self, seen: Seen, path: bytes) -> int | None:
        """A descriptor, under a write lease, of a file that is exactly what was proven; None of anything else."""
        item = self._known.get(seen.path)
        if item is None or seen.kind != "file" or item.file.kind != "file":
            return None
        fd = self._leased.get(seen.status.st_ino)
        try:
            held = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC) if fd is None else fd
        except OSError:
            return None
        now = Seen(seen.path, os.fstat(held))
        free = fd is not None or _free(held)
        if free and now.matches(item, ctime=now.status.st_ino not in self._relinked):
            return held
        self._let_go(held)
        return None

    def _let_go(self, fd: int | None) -> None:
        if fd is not None and fd not in self._borrowed:
            os.close(fd)

    def _unnamed(self, seen: Seen, fd: int | None, path: bytes) -> bool:
        """What is at `gone` goes, or moves into the shadow; False when it must stay."""
        item, inode = self._known.get(seen.path), seen.status.st_ino
        self._relinked.add(inode)
        if self._is_kept(seen):
            proven = True  # the shadow has it
        elif item is None or (seen.kind, seen.target) != (item.file.kind, item.file.target):
            proven = False
        elif seen.kind == "file":
            proven = fd is not None and os.fstat(fd).st_ino == inode and not linux.lease_wanted_for_writing(fd)
        else:
            proven = True
        if proven:
            os.unlink(self._gone)
        return proven or self._rescue(self._gone, seen.path)

    def _is_kept(self, seen: Seen) -> bool:
        if self._kept is not None and seen.kind == "file":
            return self._kept.get(seen.path) == seen.status.st_ino
        return _same_inode(self._place, seen.path, seen.status)

    def _put_back(self, path: bytes) -> None:
        number = 0
        while True:
            name = path + b".conflict-%d" % number if number else path
            try:
                linux.rename_at(linux.AT_FDCWD, self._gone, linux.AT_FDCWD, name, linux.NOREPLACE)
                return
            except FileExistsError:
                number += 1

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
