"""Operations on the content of files: open, read, write, truncate, sync. A part of the file system."""

import errno
import os
import stat
import time
from collections.abc import Callable
from contextlib import suppress

from vfs import faults, linux
from vfs.cache import FLIGHT, Partial
from vfs.fstypes import Attributes, Caller, Change, Handle, Listing, Needs
from vfs.manifest import CHUNK, chunk_count
from vfs.passing import Passing, stamp_of
from vfs.tree import FileNode
from vfs.units import Unit
from vfs.versions.past import PastFile

_WINDOW_MOST = 64  # chunks
_GROWTH = 4  # the window's, each time a reader has gone on for a whole one: 1, 4, 16, 64 chunks
_NEAR = 4 * CHUNK  # bytes a sequential reader may seem to skip or go back: the kernel has several reads under way
_STABLE_FLAGS = os.O_ACCMODE | os.O_APPEND | os.O_SYNC | os.O_DSYNC | os.O_NOATIME


class OpenFiles(Passing):
    """Open files, and what changes a file's content or attributes."""

    def setattr(self, ino: int, change: Change, handle: Handle | None = None) -> Attributes:
        """chmod, chown, utimes, truncate. Raises Needs when a truncation cuts through bytes that are not here."""
        node = self._files(ino)
        if change.size is not None:
            self._guard_header(node)
            self._truncate(node, change.size, handle, change.by)
        self._change(node)
        fd = self._reach(node, handle)
        try:
            target = f"/proc/self/fd/{fd}"
            status = os.fstat(fd)
            if change.uid is not None or change.gid is not None:
                self._chown(node, fd, change)
            if change.mode is not None and not stat.S_ISLNK(status.st_mode):
                os.chmod(target, stat.S_IMODE(change.mode))
            if change.atime_ns is not None or change.mtime_ns is not None:
                atime = change.atime_ns if change.atime_ns is not None else status.st_atime_ns
                mtime = change.mtime_ns if change.mtime_ns is not None else status.st_mtime_ns
                self._utime(node, fd, (atime, mtime))
            if change.nothing:  # chown(2) with two times -1: it still is a change
                os.chown(target, -1, -1)
            after = os.fstat(fd)
        finally:
            os.close(fd)
        self._core.changed_ctime(after)
        node.touched = True
        return self._describe(node, after)

    def _chown(self, node: FileNode, fd: int, change: Change) -> None:
        uid = -1 if change.uid is None else change.uid
        gid = -1 if change.gid is None else change.gid
        if isinstance(node.parent, FileNode) and stat.S_ISLNK(os.fstat(fd).st_mode):
            with self._directory(node.parent) as at:
                os.chown(node.name, uid, gid, dir_fd=at, follow_symlinks=False)
        else:
            os.chown(f"/proc/self/fd/{fd}", uid, gid)

    def _utime(self, node: FileNode, fd: int, times: tuple[int, int]) -> None:
        if isinstance(node.parent, FileNode) and stat.S_ISLNK(os.fstat(fd).st_mode):
            with self._directory(node.parent) as at:
                os.utime(node.name, ns=times, dir_fd=at, follow_symlinks=False)
        elif (partial := self._core.in_use(fd)) is not None:
            with partial.lock:
                os.utime(f"/proc/self/fd/{fd}", ns=times)
                partial.mtime_ns = times[1]
        else:
            os.utime(f"/proc/self/fd/{fd}", ns=times)

    def _truncate(self, node: FileNode, size: int, handle: Handle | None, uid: int) -> None:
        self._change(node)
        fd = handle.fd if handle is not None and handle.writable else self._open_real(node, os.O_WRONLY)
        try:
            partial = self._core.partial(fd) if node.unit.evicted else None
            if partial is None:
                os.ftruncate(fd, size)
            else:
                self._truncate_partial(node, fd, partial, size)
            self._drop_set_id(node, fd, uid)
        finally:
            if handle is None or fd != handle.fd:
                os.close(fd)
        node.unsynced = True

    def _truncate_partial(self, node: FileNode, fd: int, partial: Partial, size: int) -> None:
        try:
            if needed := partial.needed_for_truncate(size):
                raise self._needs(partial, needed, [], node)
            partial.truncate(size, fd)
        finally:
            self._core.release(partial)

    def _drop_set_id(self, node: FileNode, fd: int, uid: int) -> None:
        """What changes by the hand of `uid` is not set-uid any more. The kernel leaves that to us, and does it for us
        in the file behind unless we are root."""
        if uid and self._owner[0] == 0 and linux.drop_set_id(fd):
            for tell in self._core.content_changed:
                tell(node.unit)

    def open(self, ino: int, flags: int, uid: int = 0) -> Handle:
        """Open a file for `uid`. Touches no store. Raises EWOULDBLOCK while the file is just being evicted: try
        again."""
        node = self._files(ino)
        writes = flags & os.O_ACCMODE != os.O_RDONLY or bool(flags & os.O_TRUNC)
        if isinstance(node, PastFile):
            if writes:
                self._change(node)  # refuses
            return self._opened(node, self.past.open(node), flags, uid)
        if writes and self._may_be_repeated(node):
            handle = self._opened(node, self._open_real(node, os.O_RDONLY), flags & ~os.O_TRUNC, uid)
            handle.repeats = True
            return handle
        if writes:
            self._guard_header(node)
            self._change(node)
        fd = self._open_real(node, flags & _STABLE_FLAGS)
        return self._opened(node, fd, flags, uid)

    def create(self, parent: int, name: bytes, mode: int, flags: int, caller: Caller) -> tuple[Handle, Attributes]:
        node = self._files(parent)
        self._guard_name(node, name)
        self._named(node)
        with self._directory(node) as at:
            fd, made = self._create(at, name, mode, flags)
            try:
                if made:
                    linux.give_mode(fd, None, mode)
                    self._own(at, name, caller, mode)
                status = os.fstat(fd)
            except BaseException:
                os.close(fd)
                raise
        child = self.tree.child(node, name, status)
        child.lookups += 1
        handle = self._opened(child, fd, flags & ~os.O_EXCL, caller.uid)
        child.unsynced = handle.wrote = True  # so that closing it makes its name durable
        return handle, self._describe(child, os.fstat(fd))

    @staticmethod
    def _create(at: int, name: bytes, mode: int, flags: int) -> tuple[int, bool]:
        wanted = flags & _STABLE_FLAGS | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            return linux.open_beneath(at, name, wanted | os.O_CREAT | os.O_EXCL, mode & 0o7777), True
        except FileExistsError:
            if flags & os.O_EXCL:
                raise
            return linux.open_beneath(at, name, wanted), False

    def _opened(self, node: FileNode, fd: int, flags: int, uid: int) -> Handle:
        try:
            partial = self._core.partial(fd) if node.unit.evicted else None
        except BaseException:
            os.close(fd)
            raise
        handle = Handle(node, fd, flags, partial, uid=uid)
        node.handles += (handle,)
        node.unit.handles += 1
        node.unit.writers += handle.writable
        node.unit.used_ns = time.time_ns()
        if flags & os.O_TRUNC:
            try:
                self._truncate_opened(node, handle)
            except BaseException:
                self.release(handle)
                raise
        status = os.fstat(fd)
        handle.stamp = stamp_of(status)
        stamp = (status.st_size, status.st_mtime_ns, self._core.ctime(status))
        handle.keep_cache = node.stamp == stamp
        node.stamp = stamp
        return handle

    def _truncate_opened(self, node: FileNode, handle: Handle) -> None:
        if handle.writable:
            self._truncate(node, 0, handle, handle.uid)
        else:  # O_RDONLY | O_TRUNC: unspecified by POSIX, truncates on Linux
            self._truncate(node, 0, None, handle.uid)
        handle.wrote = True

    def read(self, handle: Handle, offset: int, size: int) -> bytes:
        """Bytes of an open file. Raises Needs with the chunks to bring, and those worth bringing ahead."""
        self.have(handle, offset, size)
        return os.pread(handle.fd, size, offset)

    def have(self, handle: Handle, offset: int, size: int, *, again: bool = False) -> None:
        """Raise Needs unless these bytes of an open file are here. `again`: a read that has waited asks a second time;
        it is no news of where the reader is, who may be far ahead by now."""
        partial = handle.partial
        if partial is not None and not partial.complete:
            if not again:
                self._follow_reader(handle, offset, size)
            missing = partial.missing(offset, size)
            if missing:
                ahead = self._ahead(handle, partial, missing[-1] + 1)
                raise self._needs(partial, missing, ahead, handle.node)

    @staticmethod
    def _follow_reader(handle: Handle, offset: int, size: int) -> None:
        """Widen the window each time a reader has gone on for a whole one; a jump closes it.

        The kernel cuts one read into several requests and reorders them a little, so it is chunks that count.
        """
        chunk = offset // CHUNK
        if -_NEAR <= offset - handle.end <= _NEAR:
            handle.end = max(handle.end, offset + size)
            if chunk - handle.turned >= max(handle.window, 1):
                handle.window = min(max(handle.window, 1) * _GROWTH, _WINDOW_MOST)
                handle.turned = chunk
        else:
            handle.end, handle.turned, handle.window, handle.asked = offset + size, chunk, 0, 0

    @staticmethod
    def _ahead(handle: Handle, partial: Partial, first: int) -> list[int]:
        """What a sequential reader wants from chunk `first` on. A wide window ends where a flight ends, so that it
        grows by whole flights and not by a chunk with each read: a server has as much to do for a small range as for
        a large one."""
        end = first + handle.window
        if handle.window >= 2 * FLIGHT:
            end -= end % FLIGHT
        if handle.window < 2 or end <= handle.asked:
            return []
        handle.asked = end
        return partial.missing(first * CHUNK, (end - first) * CHUNK)

    def ahead(self, handle: Handle, offset: int, size: int) -> list[int]:
        """Chunks a sequential reader will want soon, when what it asked for was here already."""
        partial = handle.partial
        if partial is None or partial.complete:
            return []
        return self._ahead(handle, partial, chunk_count(offset + size))

    def write(self, handle: Handle, offset: int, data: bytes) -> int:
        """Write to an open file. Raises Needs for chunks that are covered only in part and are not here."""
        if handle.repeats:
            if self.read(handle, offset, len(data)) != data:
                raise PermissionError(errno.EPERM, "what a record is does not change")
            return len(data)
        node = handle.node
        node.unit.note_change()
        handle.wrote = node.unsynced = True
        if not node.unit.dirty:
            self._change(node)
        self._drop_set_id(node, handle.fd, handle.uid)
        partial = handle.partial
        if partial is None:
            return os.pwrite(handle.fd, data, offset)
        start = os.fstat(handle.fd).st_size if handle.flags & os.O_APPEND else offset
        if needed := partial.needed_for_write(start, len(data)):
            raise self._needs(partial, needed, [], node)
        return partial.write(handle.fd, data, start)

    def _needs(self, partial: Partial, numbers: list[int], ahead: list[int], node: FileNode) -> Needs:
        self._core.hold(partial)
        return Needs(partial, numbers, ahead, node)

    def sync_plan(self, handle: Handle, *, data_only: bool = False, asked: bool = False) -> Callable[[], None] | None:
        """What must reach the disk before close or fsync may be answered, as a call for a worker thread, or None. Who
        closes a file has not `asked` for its mode and times to be durable."""
        node = handle.node
        # What another close or fsync is syncing at this moment is not on the disk yet: it is synced by both.
        under_way = list(self._syncing.get(node.unit.uuid, ()))
        directories = self._take_unsynced(node.unit).union(*(names for _ino, names in under_way))
        others = any(ino == node.ino for ino, _names in under_way) or (asked and node.touched)
        if not (node.unsynced or handle.wrote or directories or others or self._written_past(node)):
            return None
        fd = os.dup(handle.fd)
        node.unsynced = handle.wrote = node.touched = False
        partial, unit = handle.partial, node.unit
        mine = (node.ino, frozenset(directories))
        self._syncing.setdefault(unit.uuid, []).append(mine)

        def sync() -> None:
            try:
                if partial is not None:
                    partial.save()
                os.fdatasync(fd) if data_only and partial is None else os.fsync(fd)
                sync_directories(unit, directories)
                faults.point("file.synced")
            except BaseException:
                node.unsynced = True
                self._unsynced.setdefault(unit.uuid, set()).update(directories)
                raise
            finally:
                self._syncing[unit.uuid].remove(mine)
                os.close(fd)

        return sync

    def sync_directory_plan(self, listing: Listing) -> Callable[[], None]:
        """The same for fsync of a directory."""
        node = listing.node
        if not isinstance(node, FileNode) or isinstance(node, PastFile):
            return lambda: None
        unit, directories = node.unit, self._take_unsynced(node.unit) | {node.path}
        mine = (0, frozenset(directories))
        self._syncing.setdefault(unit.uuid, []).append(mine)

        def sync() -> None:
            try:
                sync_directories(unit, directories)
            except BaseException:
                self._unsynced.setdefault(unit.uuid, set()).update(directories)
                raise
            finally:
                self._syncing[unit.uuid].remove(mine)

        return sync

    def _take_unsynced(self, unit: Unit) -> set[bytes]:
        return self._unsynced.pop(unit.uuid, set())

    def release(self, handle: Handle) -> bool:
        """The last use of a handle is over. False while the file can still be written through a map of it: then the
        handle counts as open, and this is to be called again."""
        try:
            if self._still_written(handle):
                return False
            self.catch_up(handle)
        except BaseException:
            self._close(handle)
            raise
        self._close(handle)
        return True

    def _close(self, handle: Handle) -> None:
        node = handle.node
        node.handles = tuple(other for other in node.handles if other is not handle)
        node.unit.handles -= 1
        node.unit.writers -= handle.writable
        node.unit.used_ns = time.time_ns()
        if handle.writable:
            node.unit.note_change()
        os.close(handle.fd)
        if handle.partial is not None:
            self._core.release(handle.partial)


def sync_directories(unit: Unit, directories: set[bytes]) -> None:
    """fsync directories of a unit; one that is gone needs none."""
    base = os.open(unit.base, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for path in directories:
            with suppress(FileNotFoundError, NotADirectoryError):
                fd = linux.open_beneath(base, path or b".", os.O_RDONLY | os.O_DIRECTORY)
                try:
                    os.fsync(fd)
                finally:
                    os.close(fd)
    finally:
        os.close(base)
