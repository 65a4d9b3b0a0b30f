"""Extended attributes of files and directories (`--xattr`). A part of the file system; local disk only.

Served is the namespace `user.`, without what is ours: `user.runfs.state` and `user.runfs.pinned` are made up and
read-only, all others below `user.runfs.` neither shown nor set.
"""

import errno
import os
import stat
from collections.abc import Callable
from typing import TypeVar

from vfs.access import Access
from vfs.cache import ATTRIBUTES_MOST, read_header, user_attribute_sizes
from vfs.tree import FileNode
from vfs.versions.past import PastFile

T = TypeVar("T")
_OURS = (b"user.runfs.state", b"user.runfs.pinned")


class ExtendedAttributes(Access):
    """Reading and changing them."""

    def getxattr(self, ino: int, name: bytes) -> bytes:
        """One attribute; ENODATA when there is none."""
        node = self.tree.get(ino)
        if not isinstance(node, FileNode):
            raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))
        if isinstance(node, PastFile) and (value := self.past.attribute(node, name)) is not None:
            return value
        if name in _OURS:
            return self._our_attribute(node, name)
        return self._at(node, lambda target: os.getxattr(target, _user(name)))

    def listxattr(self, ino: int) -> list[bytes]:
        """The names of a file's attributes; only files and directories have any."""
        node = self.tree.get(ino)
        if not isinstance(node, FileNode):
            return []
        if isinstance(node, PastFile):
            return [os.fsencode(name) for name, _value in node.file.attributes] if node.file is not None else []
        try:
            return [*_OURS, *(os.fsencode(name) for name, _size in self._at(node, user_attribute_sizes))]
        except OSError as error:
            if error.errno == errno.ENODATA:
                return []
            raise

    def setxattr(self, ino: int, name: bytes, value: bytes) -> None:
        """Set one attribute. Raises ENOSPC where a file's attributes would be too large to be kept beside what an
        evicted one needs of its own."""

        def give(target: str) -> None:
            others = sum(len(each) + size for each, size in user_attribute_sizes(target) if each != wanted)
            if others + len(name) + len(value) > ATTRIBUTES_MOST:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.setxattr(target, wanted, value)

        wanted = _user(name, change=True)
        self._change_attribute(ino, give)

    def removexattr(self, ino: int, name: bytes) -> None:
        """Remove one attribute; ENODATA when there is none."""
        wanted = _user(name, change=True)
        self._change_attribute(ino, lambda target: os.removexattr(target, wanted))

    def _change_attribute(self, ino: int, call: Callable[[str], None]) -> None:
        node = self._files(ino)
        self._guard_header(node)
        self._change(node)
        self._at(node, call)
        node.touched = True
        self._core.changed_ctime(self._stat(node))

    def _at(self, node: FileNode, call: Callable[[str], T]) -> T:
        fd = self._reach(node, None)
        try:
            if stat.S_IFMT(os.fstat(fd).st_mode) not in (stat.S_IFREG, stat.S_IFDIR):
                raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))
            return call(f"/proc/self/fd/{fd}")
        finally:
            os.close(fd)

    def _our_attribute(self, node: FileNode, name: bytes) -> bytes:
        unit = node.unit
        if name == b"user.runfs.pinned":
            return b"1" if unit.uuid in self._core.journal.pins() else b"0"
        if unit.dirty or not unit.evicted:
            return b"dirty" if unit.dirty else b"resident"
        header = self._at(node, lambda target: read_header(os.fsencode(os.readlink(target))))
        if header is None or self._is_whole(node):
            return b"resident"
        return b"partial" if header.runs else b"evicted"

    def _is_whole(self, node: FileNode) -> bool:
        """Whether all of a file has come, be it not on the disk for good yet."""
        fd = self._reach(node, None)
        try:
            partial = self._core.in_use(fd)
        finally:
            os.close(fd)
        return partial is not None and partial.complete


def _user(name: bytes, *, change: bool = False) -> str:
    """An attribute's name, if it is one that a record can have."""
    if not name.startswith(b"user."):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
    if name.startswith(b"user.runfs."):
        number = errno.EPERM if change else errno.ENODATA
        raise OSError(number, os.strerror(number))
    return os.fsdecode(name)
