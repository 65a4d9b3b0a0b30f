"""The shadow directory of an evicted unit: a real tree of small files and placeholders. Used by evict, restore, merge.

Local disk only. What is built is not synced: the caller calls `sync`.
"""

import errno
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field

from vfs import cache, linux
from vfs.errors import Full
from vfs.journal import Known
from vfs.manifest import File
from vfs.parents import Parents
from vfs.scan import kind_of

_AT_ONCE = 64  # new files that are open at a time


def parent_of(root: bytes, path: bytes) -> tuple[int, bytes]:
    """An open descriptor of the directory that holds `path` below `root`, and the last name."""
    directory, _slash, name = path.rpartition(b"/")
    top = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    if not directory:
        return top, name
    try:
        return linux.open_beneath(top, directory, os.O_PATH | os.O_DIRECTORY), name
    finally:
        os.close(top)


def add_file(root: bytes, file: File) -> int | None:
    """Make one path of a manifest below `root`: a directory, a link, or a placeholder whose open descriptor is
    returned. Raises FileExistsError, not for a directory."""
    directory, name = parent_of(root, file.path)
    try:
        return _make(directory, name, file)
    finally:
        os.close(directory)


def _make(directory: int, name: bytes, file: File) -> int | None:
    if file.kind == "directory":
        with suppress(FileExistsError):
            os.mkdir(name, 0o700, dir_fd=directory)
        if file.attributes:
            _give_directory(directory, name, file)
        linux.change_mode(directory, name, file.mode)
        _own(directory, name, file)
        return None
    if file.kind == "symlink":
        os.symlink(file.target, name, dir_fd=directory)
        _own(directory, name, file)
        os.utime(name, ns=(file.mtime_ns, file.mtime_ns), dir_fd=directory, follow_symlinks=False)
        return None
    if file.kind == "other":
        os.mknod(name, file.mode | stat.S_IFIFO, dir_fd=directory)
        linux.give_mode(directory, name, file.mode)
        return None
    fd = cache.make_placeholder(directory, name, file.digest, file.size, file.mode)
    try:
        cache.give_attributes(fd, file.attributes)
        if os.geteuid() == 0:
            status = os.fstat(fd)
            if (status.st_uid, status.st_gid) != (file.uid, file.gid):
                os.fchown(fd, file.uid, file.gid)
                os.fchmod(fd, file.mode)  # again: a change of owner clears set-id bits
        os.utime(fd, ns=(file.mtime_ns, file.mtime_ns))
    except BaseException:
        os.close(fd)
        raise
    return fd


def _give_directory(directory: int, name: bytes, file: File) -> None:
    fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    try:
        cache.give_attributes(fd, file.attributes)
    finally:
        os.close(fd)


def _own(directory: int, name: bytes, file: File) -> None:
    if os.geteuid() == 0:
        os.chown(name, file.uid, file.gid, dir_fd=directory, follow_symlinks=False)


@dataclass(slots=True)
class Built:
    """What was made: the inode of each kept file, by path; (inode, ctime in ns) of everything; bytes on the disk."""

    device: int = 0
    kept: dict[bytes, int] = field(default_factory=dict)
    made: dict[bytes, tuple[int, int]] = field(default_factory=dict)
    used_bytes: int = 0

    def add(self, path: bytes, status: os.stat_result) -> None:
        self.made[path] = (status.st_ino, status.st_ctime_ns)
        self.used_bytes += status.st_blocks * 512


def _close_all(descriptors: Sequence[int]) -> None:
    for fd in descriptors:
        os.close(fd)


def build(
    shadow: bytes,
    known: Mapping[bytes, Known],
    keep: Callable[[File], bool],
    source: bytes | None,
    opened: Mapping[bytes, int] | None = None,
    finish: Callable[[Sequence[int]], None] = _close_all,
) -> Built:
    """Make the shadow of a unit: files that `keep` says are taken from `source` (linked, or copied where it is another
    file system), all others become placeholders.

    `opened` are descriptors of files under a lease of ours: opening one of those again would wait for the lease.
    `finish` is given what was made anew, so many open files at a time, to close, and to sync if that is wanted.
    A shadow left by an earlier attempt is replaced. Raises Full, OSError.
    """
    remove(shadow)
    os.makedirs(os.path.dirname(shadow), mode=0o700, exist_ok=True)
    os.mkdir(shadow, 0o700)
    built = Built(os.stat(shadow).st_dev)
    try:
        with ExitStack() as stack:
            here = stack.enter_context(Parents(shadow))
            there = stack.enter_context(Parents(source)) if source is not None else None
            fresh: list[int] = []
            stack.callback(lambda: finish(fresh))
            for path, item in sorted(known.items(), key=lambda pair: (bool(pair[1].file.same), pair[0])):
                file = item.file  # second names of a file after all first ones
                if file.same and file.same in known:
                    _link(shadow, file.same, shadow, path)
                elif there is not None and file.kind == "file" and keep(file):
                    status = _keep(there, here, path, fresh, (opened or {}).get(path))
                    built.kept[path] = status.st_ino
                    built.add(path, status)
                elif there is not None and file.kind == "other":
                    _link_at(there, here, path)
                else:
                    fd = _make(*here.of(path), file)
                    if fd is not None:
                        fresh.append(fd)
                        built.add(path, os.fstat(fd))
                if len(fresh) >= _AT_ONCE:
                    finish(fresh)
                    fresh.clear()
        settle_directories(shadow, (item.file for item in known.values()))
        if source is not None:
            shutil.copystat(source, shadow, follow_symlinks=False)
        linked = {item.file.same for item in known.values() if item.file.same in known}
        for path in (known.keys() - built.made.keys()) | linked:
            status = os.lstat(os.path.join(shadow, path))
            built.made[path] = (status.st_ino, status.st_ctime_ns)
    except OSError as error:
        remove(shadow)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise Full(f"no space for the names of an evicted record in {os.fsdecode(shadow)}") from error
        raise
    return built


def settle_directories(root: bytes, files: Iterable[File]) -> None:
    """Give directories their times: last, since each name made in them changes these."""
    for file in sorted((f for f in files if f.kind == "directory"), key=lambda f: f.path, reverse=True):
        directory, name = parent_of(root, file.path)
        try:
            os.utime(name, ns=(file.mtime_ns, file.mtime_ns), dir_fd=directory, follow_symlinks=False)
        finally:
            os.close(directory)


def _keep(source: Parents, target: Parents, path: bytes, fresh: list[int], opened: int | None = None) -> os.stat_result:
    """Link a file into a shadow, or copy it and add the open copy to `fresh`."""
    try:
        _link_at(source, target, path)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EMLINK, errno.EPERM):
            raise
        fresh.append(_copy_at(source, target, path, opened))
    directory, name = target.of(path)
    return os.stat(name, dir_fd=directory, follow_symlinks=False)


def _link_at(source: Parents, target: Parents, path: bytes) -> None:
    source_fd, name = source.of(path)
    target_fd, _name = target.of(path)
    os.link(name, name, src_dir_fd=source_fd, dst_dir_fd=target_fd, follow_symlinks=False)


def _link(source_root: bytes, source: bytes, target_root: bytes, target: bytes) -> None:
    source_fd, source_name = parent_of(source_root, source)
    try:
        target_fd, target_name = parent_of(target_root, target)
        try:
            os.link(source_name, target_name, src_dir_fd=source_fd, dst_dir_fd=target_fd, follow_symlinks=False)
        finally:
            os.close(target_fd)
    finally:
        os.close(source_fd)


def _copy_at(source: Parents, target: Parents, path: bytes, opened: int | None) -> int:
    """Copy one file with mode, owner, times and attributes, following no link; the open copy."""
    directory, name = source.of(path)
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory) if opened is None else opened
    try:
        directory, name = target.of(path)
        return _copy(fd, name, directory)
    finally:
        if opened is None:
            os.close(fd)


def copy_to(fd: int, target: bytes) -> None:
    """Copy an open file, all of it and synced, to a new name. Raises FileExistsError."""
    out = _copy(fd, target, None)
    try:
        os.fsync(out)
    finally:
        os.close(out)


def _copy(fd: int, name: bytes, directory: int | None) -> int:
    out = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=directory)
    try:
        status = os.fstat(fd)
        copy_bytes(fd, out, status.st_size)
        if os.geteuid() == 0:
            os.fchown(out, status.st_uid, status.st_gid)
        os.fchmod(out, stat.S_IMODE(status.st_mode))
        cache.give_attributes(out, cache.user_attributes(fd))
        os.utime(out, ns=(status.st_atime_ns, status.st_mtime_ns))
    except BaseException:
        os.close(out)
        raise
    return out


def copy_bytes(fd: int, out: int, size: int) -> None:
    """Copy between file systems of any two kinds (copy_file_range(2) takes only two of one kind); holes stay holes."""
    os.ftruncate(out, size)
    position = 0
    while position < size:
        try:
            position = os.lseek(fd, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return  # nothing but a hole is left
        end = os.lseek(fd, position, os.SEEK_HOLE)
        while position < end and (data := os.pread(fd, min(8 << 20, end - position), position)):
            position += os.pwrite(out, data, position)
        if position < end:
            return  # it was cut meanwhile; whoever compares it finds out


def copy_whole(source: bytes, target: bytes, known: Iterable[File]) -> None:
    """Make at `target` the tree that `source` holds, by linking where the file system allows, else by copying.

    Every file of `source` must be whole. The `.machinable` markers come last, so that nobody finds half a record.
    """
    files = sorted(
        known, key=lambda file: (bool(file.same), file.path.rpartition(b"/")[2] == b".machinable", file.path)
    )
    os.mkdir(target, 0o700)
    for file in files:
        if file.kind == "directory":
            add_file(target, file)
    with Parents(source) as there, Parents(target) as here:
        for file in files:
            if file.kind == "directory":
                continue
            if file.same:
                _link(target, file.same, target, file.path)
            elif file.kind == "symlink":
                add_file(target, file)
            else:
                copied: list[int] = []
                _keep(there, here, file.path, copied)
                _close_all(copied)
    settle_directories(target, files)
    shutil.copystat(source, target, follow_symlinks=False)


def remove(tree: bytes) -> None:
    """Remove a tree that may be gone. Follows no link."""
    if os.path.lexists(tree):
        shutil.rmtree(tree)


def sync(tree: bytes) -> None:
    """Make a tree durable, file by file: syncing the file system would wait for all that anybody has written to it."""
    for directory, subdirectories, files in os.walk(tree):
        for name in [*files, *subdirectories]:
            path = os.path.join(directory, name)
            status = os.lstat(path)
            if kind_of(status.st_mode) in ("file", "directory"):
                fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
                try:
                    os.fsync(fd)
                finally:
                    os.close(fd)
    sync_directories(tree, ())


def sync_directories(tree: bytes, below: Iterable[bytes]) -> None:
    """Make the names in a tree durable: those in its directories `below`, in itself, and its own."""
    for path in (*(os.path.join(tree, each) for each in below), tree, os.path.dirname(tree)):
        linux.sync_directory(path)


def used_bytes(tree: bytes) -> int:
    """Bytes a tree occupies on the disk."""
    total = 0
    for directory, _names, files in os.walk(tree):
        for name in files:
            with suppress(FileNotFoundError):
                total += os.lstat(os.path.join(directory, name)).st_blocks * 512
    return total
