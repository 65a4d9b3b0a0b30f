"""Opens that the kernel serves by itself: which may be, and what was written past us. A part of the file system.

Used by `vfs/openfiles.py`, and through the file system by `daemon/passthrough.py`. Local disk only.
"""

import os
import stat

from vfs import linux
from vfs.access import HEADERS, Access
from vfs.fstypes import Handle
from vfs.tree import FileNode
from vfs.versions.past import PastFile

KEPT = 64 << 10  # bytes; what is this small is copied into the kernel sooner than passed through
# Pages mapped from these are written without a trace in the file's times, so changes could not be found: tmpfs, ramfs.
_TIMELESS = frozenset({0x01021994, 0x858458F6})


class Passing(Access):
    """Files whose content is read and written past us."""

    def may_pass(self, handle: Handle) -> bool:
        """Whether the kernel may read and write the file behind an open file past us: all of its bytes are here and
        every change shows. A write is noted before the open is answered, as `open` marks the unit dirty, which it stays
        while it has a writer."""
        if handle.partial is not None or handle.repeats or handle.node.name in HEADERS:
            return False
        status = os.fstat(handle.fd)
        if handle.writable and status.st_mode & (stat.S_ISUID | stat.S_ISGID):
            return False  # a write takes these bits away, which is ours to do
        return stat.S_ISREG(status.st_mode) and linux.file_system(handle.fd) not in _TIMELESS

    @staticmethod
    def has_to_sync(handle: Handle) -> bool:
        """Whether closing a file that is just being opened may have something to make durable."""
        if handle.writable or handle.flags & os.O_TRUNC:
            return True
        return handle.node.unsynced or any(each.writable for each in handle.node.handles)

    def is_kept(self, handle: Handle) -> bool:
        """Whether the kernel had better keep the content of an open file itself: it is small, only read here, and
        changes only through the mount."""
        return (
            handle.stamp[0] <= KEPT
            and handle.node.unit.evicted
            and not (handle.writable or handle.flags & os.O_TRUNC)
            and not isinstance(handle.node, PastFile)
        )

    def content_to_keep(self, handle: Handle) -> memoryview | None:
        """All of a small file that was just opened, for the kernel to keep. None when it has it already, when somebody
        else has the file open, and unless the bytes are here and in memory."""
        partial, size = handle.partial, handle.stamp[0]
        if handle.keep_cache or not size or not self.is_kept(handle) or handle.node.handles != (handle,):
            return None
        if partial is not None and not partial.complete:
            return None
        buffer = bytearray(size)
        try:
            count = os.preadv(handle.fd, [buffer], 0, os.RWF_NOWAIT)
        except OSError:  # not in memory: a read will wait for the disk
            return None
        return memoryview(buffer) if count == size else None

    def catch_up(self, handle: Handle) -> bool:
        """Note what was written past us through an open file; whether anything was (or by another to the same file)."""
        if not (handle.passed and handle.writable):
            return False
        now = stamp_of(os.fstat(handle.fd))
        if now == handle.stamp:
            return False
        handle.stamp = now
        self._change(handle.node)
        handle.node.unsynced = True
        return True

    @staticmethod
    def _still_written(handle: Handle) -> bool:
        """Whether somebody can still write to a file whose passed writer was closed. A map of it holds the file behind
        and not ours, so it outlives the last close; and the kernel lets go of its own a moment after it told us."""
        if not (handle.passed and handle.writable):
            return False
        if not handle.left:
            reading = os.open(f"/proc/self/fd/{handle.fd}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            os.close(handle.fd)  # or we were that somebody
            handle.fd, handle.left = reading, True
        return linux.has_writers(handle.fd)

    @staticmethod
    def _written_past(node: FileNode) -> bool:
        """Whether writes may have come past us that no sync has covered. Always while there is a passed writer: the
        times of a file need not tell two writes within one tick of the clock apart."""
        return any(isinstance(each, Handle) and each.passed and each.writable for each in node.handles)


def stamp_of(status: os.stat_result) -> tuple[int, int, int]:
    """What a change of a file changes: its size and times in ns."""
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns
