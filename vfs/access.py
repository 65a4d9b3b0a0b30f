"""Reaching the files of a node: attributes, directories, the note that something changes. The base of the file system.

Used by `vfs/names.py`, `vfs/openfiles.py` and `vfs/filesystem.py`. Local disk only. Every path is resolved below the
unit's directory and follows no link, so nothing in a record leads out of it.
"""

import errno
import logging
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from vfs import linux
from vfs.core import Core
from vfs.errors import DamagedRecord, RunfsError
from vfs.format import Status, read_header, run_status
from vfs.fstypes import Attributes, Caller, Handle
from vfs.roots import Roots
from vfs.tree import FileNode, Inode, Link, Node, Tree, View
from vfs.units import Unit
from vfs.versions.past import VERSIONS, Past, PastDirectory, PastFile

log = logging.getLogger(__name__)

# How long the kernel may keep what it was told, in seconds. Evicted files change only through the mount, which tells
# the kernel. A working directory changes behind our back: a watch tells of it some 0.1 s later, too late for who was
# told by the writer, so of resident files nothing is kept.
EVICTED = 300.0
RESIDENT = 0.0
# But for names at the root and a resident record's own directory: `ls -l` of the root would ask three times for each of
# 100,000 records. What the index or another program changed there may be seen for this long.
AT_ROOT = 1.0
# And for a file that is open and not passed through: the kernel asks before each read, five times the cost of the read.
OPENED = 0.05

HEADERS = (b"id.json", b".machinable")  # what a record is: written at most as it is already


class Access:
    """The tree with the local files behind it."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self.tree = Tree(core.index, core.units)
        self._owner = (os.getuid(), os.getgid())
        self.roots = Roots(core, self.tree.deep_target, by=self._owner)
        self.tree.names = self.roots
        core.units.moved.append(lambda unit: self.roots.touch(unit.uuid))
        self.past = Past(core, self.tree)
        self.tree.incoming = {os.fsencode(name): path for name, path in core.journal.incoming().items()}
        self._unsynced: dict[str, set[bytes]] = {}  # directories of a unit with names that are not synced yet
        self._syncing: dict[str, list[tuple[int, frozenset[bytes]]]] = {}  # of a unit: what is being synced just now
        self._started_ns = time.time_ns()

    # --- attributes --------------------------------------------------------------------------------------------

    def lookup(self, parent: int, name: bytes) -> Attributes:
        """Find a name in a directory; the kernel knows the node from here on."""
        if parent == self.tree.root.ino and (told := self._told_again(name)) is not None:
            return told
        attributes = self._find(self.tree.get(parent), name)
        self.tree.nodes[attributes.ino].lookups += 1
        return attributes

    def _told_again(self, name: bytes) -> Attributes | None:
        """A name at the root that a listing told of and nobody used yet: it need not become a node for being asked
        about again. A walk of a million records that asks about each would fill the memory."""
        if name in self.tree.root.children:
            return None
        row = self.roots.row(name)
        if row is None or row.ino not in self.tree.told or row.ino in self.tree.nodes:
            return None
        before, row = row, self.roots.now(row)
        if row is None:
            return None
        self.tree.told[row.ino] += 1
        if row.mtime_ns != before.mtime_ns:
            self.roots.touch(os.fsdecode(name))  # a listing must not say something older
        return Attributes(Inode(row.ino), *row[3:8], row.blocks, 0, *row[9:], AT_ROOT, AT_ROOT)

    def _find(self, parent: Node, name: bytes) -> Attributes:
        if parent is self.tree.root:
            node = self.past.top() if name == VERSIONS else self.tree.at_root(name)
            return self.attributes_of(node)
        if isinstance(parent, PastDirectory | PastFile):
            return self.past.attributes(self.past.find(parent, name))
        if isinstance(parent, View):
            return self.attributes_of(self.tree.in_view(parent, name))
        if not isinstance(parent, FileNode):
            raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        with self._directory(parent) as fd:
            status = os.stat(name, dir_fd=fd, follow_symlinks=False)
        return self._describe(self.tree.child(parent, name, status), status)

    def getattr(self, ino: int) -> Attributes:
        node = self.tree.get(ino)
        found = self.attributes_of(node)
        if found.attr_timeout < OPENED and isinstance(node, FileNode) and any(not each.passed for each in node.handles):
            return replace(found, attr_timeout=OPENED)
        return found

    def attributes_of(self, node: Node) -> Attributes:
        if isinstance(node, PastDirectory | PastFile):
            return self.past.attributes(node)
        if isinstance(node, FileNode):
            return self._describe(node, self._stat(node)) if node.gone is None else self._gone(node, node.gone)
        if isinstance(node, Link):
            return self._made_up(node, stat.S_IFLNK | 0o777, len(node.target), node.mtime_ns)
        return self._made_up(node, stat.S_IFDIR | 0o755, 0, self._started_ns)

    def _made_up(self, node: Node, mode: int, size: int, mtime_ns: int) -> Attributes:
        uid, gid = self._owner
        links = 2 if stat.S_ISDIR(mode) else 1
        entry = AT_ROOT if node.parent is self.tree.root else 0.0
        return Attributes(node.ino, mode, links, uid, gid, size, 0, 0, mtime_ns, mtime_ns, mtime_ns, entry, AT_ROOT)

    def _stat(self, node: FileNode) -> os.stat_result:
        for handle in node.handles:
            if isinstance(handle, Handle) and not node.named:
                return os.fstat(handle.fd)
        if node.parent is None:  # another program has put another file in its place
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        if isinstance(node.parent, FileNode):
            with self._directory(node.parent) as fd:
                return os.stat(node.name, dir_fd=fd, follow_symlinks=False)
        with self._told():
            status = node.unit.status()
        self.roots.saw(node.unit.uuid, status.st_mtime_ns)
        return status

    def _gone(self, node: FileNode, before: os.stat_result) -> Attributes:
        """Of a file without a name, which a process may still hold: by an open handle, as its working directory, by
        an O_PATH descriptor."""
        if any(isinstance(handle, Handle) for handle in node.handles):
            return self._describe(node, self._stat(node))
        links = 0 if stat.S_ISDIR(before.st_mode) else before.st_nlink - 1
        return replace(self._describe(node, before), nlink=links)

    def _open_base(self, unit: Unit) -> int:
        with self._told():
            return unit.open_base()

    @contextmanager
    def _told(self) -> Iterator[None]:
        """The log says which record is damaged; who asked gets only an errno."""
        try:
            yield
        except DamagedRecord as error:
            log.warning("%s", error)
            raise

    def _describe(self, node: FileNode, status: os.stat_result) -> Attributes:
        timeout = EVICTED if node.unit.evicted else AT_ROOT if node.parent is self.tree.root else RESIDENT
        return Attributes(
            node.ino,
            status.st_mode,
            status.st_nlink,
            status.st_uid,
            status.st_gid,
            status.st_size,
            status.st_blocks,
            status.st_rdev,
            status.st_atime_ns,
            self._core.mtime(status) if node.unit.evicted else status.st_mtime_ns,
            self._core.ctime(status) if node.unit.evicted else status.st_ctime_ns,
            timeout,
            timeout,
        )

    @contextmanager
    def _directory(self, node: FileNode) -> Iterator[int]:
        """An O_PATH descriptor of a directory node, reached without following any link."""
        base = self._open_base(node.unit)
        try:
            path = node.path
            fd = linux.open_beneath(base, path, os.O_PATH | os.O_DIRECTORY) if path else base
            try:
                yield fd
            finally:
                if fd != base:
                    os.close(fd)
        finally:
            os.close(base)

    def _files(self, ino: int) -> FileNode:
        """The directory node in which names can be made. Raises EPERM, EROFS outside records."""
        node = self.tree.get(ino)
        if isinstance(node, PastDirectory):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        if isinstance(node, FileNode):
            return node
        raise PermissionError(errno.EPERM, "only records and their files can be changed here")

    def _reach(self, node: FileNode, handle: Handle | None) -> int:
        """An O_PATH descriptor of a node itself, also when it has no name any more."""
        if isinstance(node, PastFile):
            raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))  # it has no file of its own here
        if not node.named:
            for other in [handle, *node.handles]:
                if isinstance(other, Handle):
                    return os.open(f"/proc/self/fd/{other.fd}", os.O_PATH | os.O_CLOEXEC)
        base = self._open_base(node.unit)
        path = node.path
        if not path:
            return base
        try:
            return linux.open_beneath(base, path, os.O_PATH | os.O_NOFOLLOW)
        finally:
            os.close(base)

    def _open_real(self, node: FileNode, flags: int) -> int:
        base = self._open_base(node.unit)
        try:
            # O_NONBLOCK: a file that is being evicted answers EWOULDBLOCK at once, and stays.
            return linux.open_beneath(base, node.path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
        finally:
            os.close(base)

    def readlink(self, ino: int) -> bytes:
        if ino not in self.tree.nodes and (target := self._told_target(ino)) is not None:
            return target
        node = self.tree.get(ino)
        if isinstance(node, Link):
            return node.target
        if isinstance(node, PastFile) and node.file is not None:
            return node.file.target
        if not isinstance(node, FileNode) or not isinstance(node.parent, FileNode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        with self._directory(node.parent) as fd:
            return os.fsencode(os.readlink(node.name, dir_fd=fd))

    def _told_target(self, ino: int) -> bytes | None:
        name = self.roots.name_of(ino) if ino in self.tree.told else None
        return self.tree.deep_target(os.fsdecode(name)) if name is not None else None

    def statfs(self) -> os.statvfs_result:
        return os.statvfs(self._core.settings.cache_place)

    def forget(self, ino: int, count: int) -> None:
        self.tree.forget(ino, count)

    # --- change ---------------------------------------------------------------------------------------------------

    def _change(self, node: FileNode) -> None:
        """Note durably that a unit changes, before it does."""
        if self._core.settings.read_only or isinstance(node, PastFile):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        self._core.units.mark_dirty(node.unit, "changed through the mount")
        if node.parent is self.tree.root:
            self.roots.touch(node.unit.uuid)

    def _named(self, parent: FileNode) -> None:
        """A name is about to be made or removed in a directory."""
        self._change(parent)
        self._unsynced.setdefault(parent.unit.uuid, set()).add(parent.path)

    def _own(self, fd: int, name: bytes, caller: Caller, mode: int = 0) -> None:
        """Give a new name its maker's owner (the daemon may be root); the group as the directory's set-gid bit says.
        A change of owner takes set-id bits away: those of the file's `mode` are given back."""
        if os.geteuid() != 0 or (caller.uid, caller.gid) == (0, 0):
            return
        inherits = os.fstat(fd).st_mode & stat.S_ISGID
        os.chown(name, caller.uid, -1 if inherits else caller.gid, dir_fd=fd, follow_symlinks=False)
        if set_id := mode & (stat.S_ISUID | stat.S_ISGID):
            now = os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode
            os.chmod(name, stat.S_IMODE(now) | set_id, dir_fd=fd)

    def _new(self, parent: FileNode, name: bytes) -> Attributes:
        with self._directory(parent) as fd:
            status = os.stat(name, dir_fd=fd, follow_symlinks=False)
        node = self.tree.child(parent, name, status)
        node.lookups += 1
        return self._describe(node, status)

    # --- the identity of an indexed record stays ---------------------------------------------------------------

    def _guard_name(self, parent: FileNode, name: bytes) -> None:
        if name == b"id.json" and self._is_indexed(parent):
            raise PermissionError(errno.EPERM, "id.json of an indexed record is read-only")

    def _guard_header(self, node: FileNode) -> None:
        if isinstance(node.parent, FileNode):
            self._guard_name(node.parent, node.name)

    def _is_indexed(self, directory: FileNode) -> bool:
        try:
            header = read_header(self._place(directory))
        except (RunfsError, OSError):
            return False
        # An evicted record's row may be gone for a moment, while machinable rebuilds its index: just then it would
        # give the record's directory to a new one.
        return directory.unit.evicted or self._core.index.get(header.uuid) is not None

    def _may_be_repeated(self, node: FileNode) -> bool:
        """Whether a file may be written only as it is: the header of a run that was not finished, since machinable
        goes on with such a run by writing its header once more; and the marker of an evicted record, which machinable
        writes first when it takes the place for a new record."""
        directory = node.parent
        if node.name not in HEADERS or not isinstance(directory, FileNode):
            return False
        if not self._is_indexed(directory):
            return False
        if node.name == b".machinable":
            return node.unit.evicted
        try:
            return run_status(self._place(directory)) in (Status.PENDING, Status.LIVE, Status.DIED)
        except DamagedRecord:
            return False

    @staticmethod
    def _place(directory: FileNode) -> bytes:
        path = directory.path
        return os.path.join(directory.unit.base, path) if path else directory.unit.base
