"""Operations on names: mkdir, link, rename and the like. A part of the file system."""

import errno
import os
import stat
import time
from contextlib import suppress

from vfs import faults, linux
from vfs.access import Access
from vfs.fstypes import Attributes, Caller, Handle
from vfs.tree import BY, FileNode, Node
from vfs.versions.past import VERSIONS, PastFile


class Names(Access):
    """Making and removing names."""

    def mkdir(self, parent: int, name: bytes, mode: int, caller: Caller) -> Attributes:
        if self.tree.get(parent) is self.tree.root:
            return self._incoming(name, mode, caller)
        node = self._files(parent)
        self._named(node)
        with self._directory(node) as fd:
            os.mkdir(name, mode & 0o7777, dir_fd=fd)
            linux.give_mode(fd, name, mode)
            self._own(fd, name, caller)
            if mode & stat.S_ISVTX:
                os.chmod(name, stat.S_IMODE(os.stat(name, dir_fd=fd).st_mode) | stat.S_ISVTX, dir_fd=fd)
        return self._new(node, name)

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
            linux.give_mode(fd, name, mode)
            self._own(fd, name, caller, mode)
        return self._new(node, name)

    def link(self, ino: int, parent: int, name: bytes) -> Attributes:
        """A hard link: inside one unit only, as content is kept by unit."""
        node, target = self._files(ino), self._files(parent)
        if isinstance(target, PastFile):
            self._change(target)  # refuses
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
        node.renumber = False
        node.lookups += 1
        self._core.changed_ctime(status)
        return self._describe(node, status)

    def unlink(self, parent: int, name: bytes) -> None:
        node = self._files(parent)
        self._guard_name(node, name)
        self._named(node)
        with self._directory(node) as fd:
            status = os.stat(name, dir_fd=fd, follow_symlinks=False)
            os.unlink(name, dir_fd=fd)
        self._lost(self.tree.detach(node, name), status)

    def rmdir(self, parent: int, name: bytes) -> None:
        if self.tree.get(parent) is self.tree.root:
            self._rmdir_root(name)
            return
        node = self._files(parent)
        self._named(node)
        with self._directory(node) as fd:
            status = os.stat(name, dir_fd=fd, follow_symlinks=False)
            os.rmdir(name, dir_fd=fd)
        self._lost(self.tree.detach(node, name), status)

    def _lost(self, node: Node | None, status: os.stat_result) -> None:
        """A name of a file is gone; `status` is what it was."""
        if not isinstance(node, FileNode):
            return
        if not stat.S_ISDIR(status.st_mode) and status.st_nlink > 1:
            node.renumber = False
            self._core.changed_ctime(status, time.time_ns())
        for handle in node.handles:
            if isinstance(handle, Handle):
                self._core.changed_ctime(os.fstat(handle.fd))
        if not node.named:
            node.gone = status

    def _rmdir_root(self, name: bytes) -> None:
        if name == VERSIONS:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        if name not in self.tree.incoming:
            raise PermissionError(errno.EPERM, "a record is not removed through the mount")
        os.rmdir(self.tree.incoming[name])
        del self.tree.incoming[name]
        self._core.journal.drop_incoming(os.fsdecode(name))
        self.tree.detach(self.tree.root, name)

    def rename(self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int = 0) -> None:
        """Rename within a unit or between units whose files are kept alike (EXDEV otherwise: tools then copy)."""
        source, target = self._files(parent), self._files(new_parent)
        for node in (source, target):
            if isinstance(node, PastFile):
                self._change(node)  # refuses
        if source.unit is not target.unit and (source.unit.evicted or target.unit.evicted):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        self._guard_name(source, name)
        self._guard_name(target, new_name)
        self._named(source)
        self._named(target)
        with self._directory(source) as source_fd, self._directory(target) as fd:
            covered = self._seen_at(fd, new_name)
            faults.point("name.intended")
            linux.rename_at(source_fd, name, fd, new_name, flags)
            faults.point("name.renamed")
            moved, left = self._seen_at(fd, new_name), self._seen_at(source_fd, name)
        if moved is not None and left is not None and os.path.samestat(moved, left) and not flags:
            return  # two names of one file: rename(2) does nothing
        for status in (moved, left if flags & linux.EXCHANGE else None):
            if status is not None:
                self._core.changed_ctime(status)
        if flags & linux.EXCHANGE:
            self.tree.swap(source, name, target, new_name)
        else:
            lost = target.children.get(new_name)
            self.tree.move(source, name, target, new_name)
            if covered is not None:
                self._lost(lost, covered)

    @staticmethod
    def _seen_at(fd: int, name: bytes) -> os.stat_result | None:
        with suppress(FileNotFoundError):
            return os.stat(name, dir_fd=fd, follow_symlinks=False)
        return None

    # --- incoming ----------------------------------------------------------------------------------------------

    def _incoming(self, name: bytes, mode: int, caller: Caller) -> Attributes:
        """A directory at the root for a record that comes from elsewhere. It is a place in the storage."""
        if self._core.settings.read_only:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        if name in (BY, VERSIONS) or name in self.tree.incoming or self._core.index.get(os.fsdecode(name)) is not None:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        try:
            name.decode()
        except UnicodeDecodeError:
            raise OSError(errno.EILSEQ, os.strerror(errno.EILSEQ)) from None  # what no index can hold
        storage = os.fsencode(self._core.settings.project_dir / "storage")
        os.makedirs(storage, exist_ok=True)
        directory = storage + b"/" + name
        os.mkdir(directory, mode & 0o7777)
        self._core.journal.add_incoming(os.fsdecode(name), directory)
        self.tree.incoming[name] = directory
        at = os.open(storage, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            linux.give_mode(at, name, mode)
            self._own(at, name, caller)
        finally:
            os.close(at)
        return self.lookup(self.tree.root.ino, name)
