"""The file operations, one method each, in core types. Used by `daemon/operations.py`, and directly in tests.

Every method is called on one thread and is short: it asks the index, the journal and the local disk, never a store.
What needs bytes from a store raises `Needs`; the caller brings them and calls again. What must wait for the disk
(`sync_plan`) is returned as a value for a worker thread. Errors are OSError and RunfsError; both carry an errno.
"""

import errno
import logging
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from vfs import linux
from vfs.cache import Partial
from vfs.core import Core
from vfs.errors import DamagedRecord, RunfsError
from vfs.format import read_header
from vfs.manifest import CHUNK, chunk_count
from vfs.tree import BY, FileNode, Inode, Link, Node, Tree, View
from vfs.units import Unit

log = logging.getLogger(__name__)

# How long the kernel may keep what it was told, in seconds. Evicted files change only through the mount, which tells
# the kernel; a working directory changes behind our back.
LONG = 300.0
_WINDOW_FIRST = 1  # chunks brought beyond a read that goes on where the last one ended; doubles
_WINDOW_MOST = 32
_PAGE = 1000
_STABLE_FLAGS = os.O_ACCMODE | os.O_APPEND | os.O_SYNC | os.O_DSYNC | os.O_NOATIME


class Needs(Exception):
    """These chunks of a file must be brought before the call can be answered. `partial` is held for the caller, who
    gives it back with `Core.release`."""

    def __init__(self, partial: Partial, numbers: list[int], ahead: list[int], node: FileNode) -> None:
        super().__init__(f"{len(numbers)} chunks")
        self.partial = partial
        self.numbers = numbers
        self.ahead = ahead
        self.uuid = node.unit.uuid
        self.path = node.path if node.named else b"(removed)"


@dataclass(frozen=True, slots=True)
class Attributes:
    """What the kernel is told of a node. Sizes in bytes, times in ns, timeouts in seconds."""

    ino: Inode
    mode: int
    nlink: int
    uid: int
    gid: int
    size: int
    blocks: int
    rdev: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    entry_timeout: float = 0.0
    attr_timeout: float = 0.0


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, as the kernel says."""

    uid: int
    gid: int
    pid: int = 0


@dataclass(frozen=True, slots=True)
class Change:
    """What a setattr asks for; None leaves as is."""

    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    size: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None


@dataclass(slots=True, eq=False)
class Handle:
    """An open file. `partial` is set where bytes may be missing; `end` and `window` follow a sequential reader."""

    node: FileNode
    fd: int
    flags: int
    partial: Partial | None
    keep_cache: bool = False
    wrote: bool = False
    end: int = 0
    window: int = _WINDOW_FIRST
    pid: int = 0

    @property
    def writable(self) -> bool:
        return self.flags & os.O_ACCMODE != os.O_RDONLY


@dataclass(slots=True, eq=False)
class Listing:
    """An open directory: names as they were when it was read, or pages of the root."""

    node: Node
    names: list[bytes] | None = None
    pages: list[str] = field(default_factory=lambda: [""])
    page_number: int = -1
    page: list[bytes] = field(default_factory=list)


class FileSystem:
    """The mounted tree."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self.tree = Tree(core.index, core.units)
        self.tree.incoming = {os.fsencode(name): path for name, path in core.journal.incoming().items()}
        self.watched: Callable[[Unit], bool] = lambda unit: False  # set by the daemon: changes are told as they happen
        self._unsynced: dict[str, set[bytes]] = {}  # directories of a unit with names that are not synced yet
        self._started_ns = time.time_ns()
        self._owner = (os.getuid(), os.getgid())

    # --- attributes --------------------------------------------------------------------------------------------

    def lookup(self, parent: int, name: bytes) -> Attributes:
        """Find a name in a directory; the kernel knows the node from here on."""
        attributes = self._find(self.tree.get(parent), name)
        self.tree.nodes[attributes.ino].lookups += 1
        return attributes

    def _find(self, parent: Node, name: bytes) -> Attributes:
        if parent is self.tree.root:
            node = self.tree.at_root(name)
            return self.attributes_of(node)
        if isinstance(parent, View):
            return self.attributes_of(self.tree.in_view(parent, name))
        if not isinstance(parent, FileNode):
            raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        with self._directory(parent) as fd:
            status = os.stat(name, dir_fd=fd, follow_symlinks=False)
        return self._describe(self.tree.child(parent, name, status), status)

    def getattr(self, ino: int) -> Attributes:
        return self.attributes_of(self.tree.get(ino))

    def attributes_of(self, node: Node) -> Attributes:
        if isinstance(node, FileNode):
            return self._describe(node, self._stat(node))
        if isinstance(node, Link):
            return self._made_up(node, stat.S_IFLNK | 0o777, len(node.target), node.mtime_ns)
        return self._made_up(node, stat.S_IFDIR | 0o755, 0, self._started_ns)

    def _made_up(self, node: Node, mode: int, size: int, mtime_ns: int) -> Attributes:
        uid, gid = self._owner
        return Attributes(
            node.ino, mode, 2 if stat.S_ISDIR(mode) else 1, uid, gid, size, 0, 0, mtime_ns, mtime_ns, mtime_ns, 0.0, 1.0
        )

    def _stat(self, node: FileNode) -> os.stat_result:
        for handle in node.handles:
            if isinstance(handle, Handle) and not node.named:
                return os.fstat(handle.fd)
        if isinstance(node.parent, FileNode):
            with self._directory(node.parent) as fd:
                return os.stat(node.name, dir_fd=fd, follow_symlinks=False)
        fd = self._open_base(node.unit)
        try:
            return os.fstat(fd)
        finally:
            os.close(fd)

    def _open_base(self, unit: Unit) -> int:
        try:
            return unit.open_base()
        except DamagedRecord as error:
            log.warning("%s", error)
            raise

    def _describe(self, node: FileNode, status: os.stat_result) -> Attributes:
        timeout = LONG if node.unit.evicted or self.watched(node.unit) else 0.0
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
            status.st_mtime_ns,
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
        if isinstance(node, FileNode):
            return node
        raise PermissionError(errno.EPERM, "only records and their files can be changed here")

    def setattr(self, ino: int, change: Change, handle: Handle | None = None) -> Attributes:
        """chmod, chown, utimes, truncate. Raises Needs when a truncation cuts through bytes that are not here."""
        node = self._files(ino)
        if change.size is not None:
            self._guard_header(node)
            self._truncate(node, change.size, handle)
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
            after = os.fstat(fd)
        finally:
            os.close(fd)
        self._core.forget_ctime(after)
        return self._describe(node, after)

    def _reach(self, node: FileNode, handle: Handle | None) -> int:
        """An O_PATH descriptor of a node itself, also when it has no name any more."""
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
        else:
            os.utime(f"/proc/self/fd/{fd}", ns=times)

    def _truncate(self, node: FileNode, size: int, handle: Handle | None) -> None:
        self._change(node)
        fd = handle.fd if handle is not None and handle.writable else self._open_real(node, os.O_WRONLY)
        try:
            partial = self._core.partial(fd) if node.unit.evicted else None
            if partial is None:
                os.ftruncate(fd, size)
            else:
                self._truncate_partial(node, fd, partial, size)
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

    def _open_real(self, node: FileNode, flags: int) -> int:
        base = self._open_base(node.unit)
        try:
            # O_NONBLOCK: a file that is being evicted answers EWOULDBLOCK at once, and stays.
            return linux.open_beneath(base, node.path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
        finally:
            os.close(base)

    def readlink(self, ino: int) -> bytes:
        node = self.tree.get(ino)
        if isinstance(node, Link):
            return node.target
        if not isinstance(node, FileNode) or not isinstance(node.parent, FileNode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        with self._directory(node.parent) as fd:
            return os.fsencode(os.readlink(node.name, dir_fd=fd))

    def statfs(self) -> os.statvfs_result:
        return os.statvfs(self._core.settings.cache_place)

    def forget(self, ino: int, count: int) -> None:
        self.tree.forget(ino, count)

    # --- directories -------------------------------------------------------------------------------------------

    def opendir(self, ino: int) -> Listing:
        return Listing(self.tree.get(ino))

    def readdir(self, listing: Listing, start: int) -> Iterator[tuple[bytes, Attributes, int]]:
        """Entries from position `start` on, each with the position after it. Counts no lookup: see `seen`."""
        for name, position in self._names(listing, start):
            try:
                attributes = self._find(listing.node, name)
            except (OSError, RunfsError):
                continue  # vanished, or damaged: doctor tells; it must not hide the others
            yield name, attributes, position

    def seen(self, ino: int) -> None:
        """The kernel took an entry of a listing: it knows the node."""
        self.tree.nodes[Inode(ino)].lookups += 1

    def unseen(self, ino: int) -> None:
        """An entry did not fit into the answer: the node goes, unless the kernel knows it already."""
        node = self.tree.nodes.get(Inode(ino))
        if node is not None and node.lookups == 0:
            self.tree.forget(ino, 0)

    def _names(self, listing: Listing, start: int) -> Iterator[tuple[bytes, int]]:
        if listing.node is self.tree.root:
            yield from self._root_names(listing, start)
            return
        if listing.names is None or start == 0:
            listing.names = self._list(listing.node)
        for position in range(start, len(listing.names)):
            yield listing.names[position], position + 1

    def _list(self, node: Node) -> list[bytes]:
        if isinstance(node, View):
            return list(self.tree.list_view(node))
        if not isinstance(node, FileNode):
            raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        with self._directory(node) as fd:
            return [os.fsencode(name) for name in os.listdir(f"/proc/self/fd/{fd}")]

    def _root_names(self, listing: Listing, start: int) -> Iterator[tuple[bytes, int]]:
        """Incoming names, then pages of the index; only where each page began is kept, so that listing a million
        records costs no memory."""
        if listing.names is None or start == 0:
            known = self._core.index
            listing.names = [name for name in self.tree.incoming if known.get(os.fsdecode(name)) is None]
        for position in range(start, len(listing.names)):
            yield listing.names[position], position + 1
        incoming = len(listing.names)
        position = max(start - incoming, 0)
        while self._turn(listing, position // _PAGE):
            rest = listing.page[position % _PAGE :]
            for name in rest:
                position += 1
                yield name, position + incoming
            if len(listing.page) < _PAGE:
                return

    def _turn(self, listing: Listing, number: int) -> bool:
        """Have page `number` of the root in the listing; False when there is none."""
        if number >= len(listing.pages):
            return False
        if number != listing.page_number:
            records = self.tree.list_root(listing.pages[number], _PAGE)
            listing.page_number = number
            listing.page = [record.uuid.encode() for record in records]
            if len(records) == _PAGE and number + 1 == len(listing.pages):
                listing.pages.append(records[-1].uuid)
        return True

    # --- names -------------------------------------------------------------------------------------------------

    def _change(self, node: FileNode) -> None:
        """Note durably that a unit changes, before it does."""
        if self._core.settings.read_only:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        self._core.units.mark_dirty(node.unit, "changed through the mount")

    def _named(self, parent: FileNode) -> None:
        """A name is about to be made or removed in a directory."""
        self._change(parent)
        self._unsynced.setdefault(parent.unit.uuid, set()).add(parent.path)

    def mkdir(self, parent: int, name: bytes, mode: int, caller: Caller) -> Attributes:
        if self.tree.get(parent) is self.tree.root:
            return self._incoming(name, mode, caller)
        node = self._files(parent)
        self._named(node)
        with self._directory(node) as fd:
            os.mkdir(name, mode & 0o7777, dir_fd=fd)
            self._own(fd, name, caller)
            if mode & stat.S_ISVTX:
                os.chmod(name, stat.S_IMODE(os.stat(name, dir_fd=fd).st_mode) | stat.S_ISVTX, dir_fd=fd)
        return self._new(node, name)

    def _own(self, fd: int, name: bytes, caller: Caller) -> None:
        """Give a new name its maker's owner (the daemon may be root); the group as the directory's set-gid bit says."""
        if os.geteuid() != 0 or (caller.uid, caller.gid) == (0, 0):
            return
        inherits = os.fstat(fd).st_mode & stat.S_ISGID
        os.chown(name, caller.uid, -1 if inherits else caller.gid, dir_fd=fd, follow_symlinks=False)

    def _new(self, parent: FileNode, name: bytes) -> Attributes:
        with self._directory(parent) as fd:
            status = os.stat(name, dir_fd=fd, follow_symlinks=False)
        node = self.tree.child(parent, name, status)
        node.lookups += 1
        return self._describe(node, status)

    def symlink(self, parent: int, name: bytes, target: bytes, caller: Caller) -> Attributes:
        node = self._files(parent)
        self._named(node)
        with self._directory(node) as fd:
            os.symlink(target, name, dir_fd=fd)
            self._own(fd, name, caller)
        return self._new(node, name)

    def mknod(self, parent: int, name: bytes, mode: int, rdev: int, caller: Caller) -> Attributes:
        node = self._files(parent)
        self._named(node)
        with self._directory(node) as fd:
            os.mknod(name, mode, rdev, dir_fd=fd)
            self._own(fd, name, caller)
        return self._new(node, name)

    def link(self, ino: int, parent: int, name: bytes) -> Attributes:
        """A hard link: inside one unit only, as content is kept by unit."""
        node, target = self._files(ino), self._files(parent)
        if node.unit is not target.unit:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        self._named(target)
        source = node.parent
        if not isinstance(source, FileNode):
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        with self._directory(source) as source_fd, self._directory(target) as fd:
            os.link(node.name, name, src_dir_fd=source_fd, dst_dir_fd=fd, follow_symlinks=False)
            status = os.stat(name, dir_fd=fd, follow_symlinks=False)
        self.tree.attach(node, target, name)
        node.lookups += 1
        return self._describe(node, status)

    def unlink(self, parent: int, name: bytes) -> None:
        node = self._files(parent)
        self._guard_name(node, name)
        self._named(node)
        with self._directory(node) as fd:
            os.unlink(name, dir_fd=fd)
        self.tree.detach(node, name)

    def rmdir(self, parent: int, name: bytes) -> None:
        if self.tree.get(parent) is self.tree.root:
            self._rmdir_root(name)
            return
        node = self._files(parent)
        self._named(node)
        with self._directory(node) as fd:
            os.rmdir(name, dir_fd=fd)
        self.tree.detach(node, name)

    def _rmdir_root(self, name: bytes) -> None:
        if name not in self.tree.incoming:
            raise PermissionError(errno.EPERM, "a record is not removed through the mount")
        os.rmdir(self.tree.incoming[name])
        del self.tree.incoming[name]
        self._core.journal.drop_incoming(os.fsdecode(name))
        self.tree.detach(self.tree.root, name)

    def rename(self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int = 0) -> None:
        """Rename within a unit or between units whose files are kept alike (EXDEV otherwise: tools then copy)."""
        source, target = self._files(parent), self._files(new_parent)
        if source.unit is not target.unit and (source.unit.evicted or target.unit.evicted):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        self._guard_name(source, name)
        self._guard_name(target, new_name)
        self._named(source)
        self._named(target)
        with self._directory(source) as source_fd, self._directory(target) as fd:
            linux.rename_at(source_fd, name, fd, new_name, flags)
            same = self._same_file(source_fd, name, fd, new_name)
        if same and not flags:
            return  # two names of one file: rename(2) does nothing
        if flags & 2:
            self.tree.swap(source, name, target, new_name)
        else:
            self.tree.move(source, name, target, new_name)

    @staticmethod
    def _same_file(source_fd: int, name: bytes, fd: int, new_name: bytes) -> bool:
        with suppress(FileNotFoundError):
            one = os.stat(name, dir_fd=source_fd, follow_symlinks=False)
            return os.path.samestat(one, os.stat(new_name, dir_fd=fd, follow_symlinks=False))
        return False

    # --- the identity of an indexed record stays ---------------------------------------------------------------

    def _guard_name(self, parent: FileNode, name: bytes) -> None:
        if name == b"id.json" and self._is_indexed(parent):
            raise PermissionError(errno.EPERM, "id.json of an indexed record is read-only")

    def _guard_header(self, node: FileNode) -> None:
        if isinstance(node.parent, FileNode):
            self._guard_name(node.parent, node.name)

    def _is_indexed(self, directory: FileNode) -> bool:
        path = directory.path
        try:
            header = read_header(os.path.join(directory.unit.base, path) if path else directory.unit.base)
        except (RunfsError, OSError):
            return False
        return self._core.index.get(header.uuid) is not None

    # --- files -------------------------------------------------------------------------------------------------

    def open(self, ino: int, flags: int) -> Handle:
        """Open a file. Touches no store. Raises EWOULDBLOCK while the file is just being evicted: try again."""
        node = self._files(ino)
        writes = flags & os.O_ACCMODE != os.O_RDONLY or bool(flags & os.O_TRUNC)
        if writes:
            self._guard_header(node)
            self._change(node)
        fd = self._open_real(node, flags & _STABLE_FLAGS)
        return self._opened(node, fd, flags)

    def create(self, parent: int, name: bytes, mode: int, flags: int, caller: Caller) -> tuple[Handle, Attributes]:
        node = self._files(parent)
        self._guard_name(node, name)
        self._named(node)
        with self._directory(node) as at:
            fd, made = self._create(at, name, mode, flags)
            try:
                if made:
                    self._own(at, name, caller)
                status = os.fstat(fd)
            except BaseException:
                os.close(fd)
                raise
        child = self.tree.child(node, name, status)
        child.lookups += 1
        handle = self._opened(child, fd, flags & ~os.O_EXCL)
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

    def _opened(self, node: FileNode, fd: int, flags: int) -> Handle:
        try:
            partial = self._core.partial(fd) if node.unit.evicted else None
        except BaseException:
            os.close(fd)
            raise
        handle = Handle(node, fd, flags, partial)
        node.handles.append(handle)
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
        stamp = (status.st_size, status.st_mtime_ns, self._core.ctime(status))
        handle.keep_cache = node.stamp == stamp
        node.stamp = stamp
        return handle

    def _truncate_opened(self, node: FileNode, handle: Handle) -> None:
        if handle.writable:
            self._truncate(node, 0, handle)
        else:  # O_RDONLY | O_TRUNC: unspecified by POSIX, truncates on Linux
            self._truncate(node, 0, None)
        handle.wrote = True

    def read(self, handle: Handle, offset: int, size: int) -> bytes:
        """Bytes of an open file. Raises Needs with the chunks to bring, and those worth bringing ahead."""
        self.have(handle, offset, size)
        return os.pread(handle.fd, size, offset)

    def have(self, handle: Handle, offset: int, size: int) -> None:
        """Raise Needs unless these bytes of an open file are here."""
        partial = handle.partial
        if partial is not None and not partial.complete:
            self._follow_reader(handle, offset, size)
            missing = partial.missing(offset, size)
            if missing:
                ahead = self._ahead(handle, partial, missing[-1] + 1)
                raise self._needs(partial, missing, ahead, handle.node)

    @staticmethod
    def _follow_reader(handle: Handle, offset: int, size: int) -> None:
        # Read-ahead of the kernel overlaps and reorders a little; a jump is more than a few chunks away.
        if -CHUNK <= offset - handle.end <= 4 * CHUNK and offset > 0:
            if offset >= handle.end:
                handle.window = min(handle.window * 2, _WINDOW_MOST)
        elif offset != handle.end:
            handle.window = 0 if offset else _WINDOW_FIRST
        handle.end = max(offset + size, handle.end) if offset - handle.end <= 4 * CHUNK else offset + size

    @staticmethod
    def _ahead(handle: Handle, partial: Partial, first: int) -> list[int]:
        return partial.missing(first * CHUNK, handle.window * CHUNK)

    def ahead(self, handle: Handle, offset: int, size: int) -> list[int]:
        """Chunks a sequential reader will want soon, when what it asked for was here already."""
        partial = handle.partial
        if partial is None or partial.complete or handle.window < 2:
            return []
        first = chunk_count(offset + size)
        half = first + handle.window // 2
        # Ask again only when half of the window is used up, so that flights stay long.
        if not partial.missing(first * CHUNK, (half - first) * CHUNK):
            return []
        return partial.missing(first * CHUNK, handle.window * CHUNK)

    def write(self, handle: Handle, offset: int, data: bytes) -> int:
        """Write to an open file. Raises Needs for chunks that are covered only in part and are not here."""
        node = handle.node
        node.unit.note_change()
        handle.wrote = node.unsynced = True
        if not node.unit.dirty:
            self._change(node)
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

    def sync_plan(self, handle: Handle, *, data_only: bool = False) -> Callable[[], None] | None:
        """What must reach the disk before close or fsync may be answered, as a call for a worker thread, or None."""
        node = handle.node
        directories = self._take_unsynced(node.unit)
        if not node.unsynced and not handle.wrote and not directories:
            return None
        fd = os.dup(handle.fd)
        node.unsynced = handle.wrote = False
        partial, unit = handle.partial, node.unit

        def sync() -> None:
            try:
                if partial is not None:
                    partial.save()
                os.fdatasync(fd) if data_only and partial is None else os.fsync(fd)
                sync_directories(unit, directories)
            except BaseException:
                node.unsynced = True
                self._unsynced.setdefault(unit.uuid, set()).update(directories)
                raise
            finally:
                os.close(fd)

        return sync

    def sync_directory_plan(self, listing: Listing) -> Callable[[], None]:
        """The same for fsync of a directory."""
        node = listing.node
        if not isinstance(node, FileNode):
            return lambda: None
        unit, directories = node.unit, self._take_unsynced(node.unit) | {node.path}
        return lambda: sync_directories(unit, directories)

    def _take_unsynced(self, unit: Unit) -> set[bytes]:
        return self._unsynced.pop(unit.uuid, set())

    def release(self, handle: Handle) -> None:
        """The last use of a handle is over."""
        node = handle.node
        node.handles.remove(handle)
        node.unit.handles -= 1
        node.unit.writers -= handle.writable
        node.unit.used_ns = time.time_ns()
        if handle.writable:
            node.unit.note_change()
        os.close(handle.fd)
        if handle.partial is not None:
            self._core.release(handle.partial)

    # --- incoming ----------------------------------------------------------------------------------------------

    def _incoming(self, name: bytes, mode: int, caller: Caller) -> Attributes:
        """A directory at the root for a record that comes from elsewhere. It is a place in the storage."""
        if self._core.settings.read_only:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        if name == BY or name in self.tree.incoming or self._core.index.get(os.fsdecode(name)) is not None:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        storage = os.fsencode(self._core.settings.project_dir / "storage")
        os.makedirs(storage, exist_ok=True)
        directory = storage + b"/" + name
        os.mkdir(directory, mode & 0o7777)
        self._core.journal.add_incoming(os.fsdecode(name), directory)
        self.tree.incoming[name] = directory
        at = os.open(storage, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._own(at, name, caller)
        finally:
            os.close(at)
        return self.lookup(self.tree.root.ino, name)


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
