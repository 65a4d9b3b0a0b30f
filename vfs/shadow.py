"""The shadow directory of an evicted unit: a real tree of small files and placeholders. Used by evict, restore, merge.

Local disk only. What is built is not synced: the caller calls `sync`.
"""

import errno
import os
import shutil
import stat
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress

from vfs import cache, linux
from vfs.errors import Full
from vfs.journal import Known
from vfs.manifest import File
from vfs.scan import kind_of


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
        os.chmod(name, file.mode, dir_fd=directory)
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
    for attribute, value in file.attributes:
        os.setxattr(fd, attribute, value)
    _own(directory, name, file)
    os.fchmod(fd, file.mode)  # again: a change of owner clears set-id bits
    os.utime(fd, ns=(file.mtime_ns, file.mtime_ns))
    return fd


def _own(directory: int, name: bytes, file: File) -> None:
    if os.geteuid() == 0:
        os.chown(name, file.uid, file.gid, dir_fd=directory, follow_symlinks=False)


def build(
    shadow: bytes,
    known: Mapping[bytes, Known],
    keep: Callable[[File], bool],
    source: bytes | None,
    opened: Mapping[bytes, int] | None = None,
) -> dict[bytes, int]:
    """Make the shadow of a unit: files that `keep` says are taken from `source` (linked, or copied where it is another
    file system), all others become placeholders. Returns the inode of each kept file, by path.

    `opened` are descriptors of files under a lease of ours: opening one of those again would wait for the lease.
    A shadow left by an earlier attempt is replaced. Raises Full, OSError.
    """
    remove(shadow)
    os.makedirs(os.path.dirname(shadow), mode=0o700, exist_ok=True)
    os.mkdir(shadow, 0o700)
    kept: dict[bytes, int] = {}
    try:
        for path, item in sorted(known.items(), key=lambda pair: (bool(pair[1].file.same), pair[0])):
            file = item.file  # second names of a file after all first ones
            if file.same and file.same in known:
                _link(shadow, file.same, shadow, path)
            elif source is not None and file.kind == "file" and keep(file):
                kept[path] = _keep(source, shadow, path, (opened or {}).get(path))
            elif source is not None and file.kind == "other":
                _link(source, path, shadow, path)
            else:
                fd = add_file(shadow, file)
                if fd is not None:
                    os.close(fd)
        settle_directories(shadow, (item.file for item in known.values()))
        if source is not None:
            shutil.copystat(source, shadow, follow_symlinks=False)
    except OSError as error:
        remove(shadow)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise Full(f"no space for the names of an evicted record in {os.fsdecode(shadow)}") from error
        raise
    return kept


def settle_directories(root: bytes, files: Iterable[File]) -> None:
    """Give directories their times: last, since each name made in them changes these."""
    for file in sorted((f for f in files if f.kind == "directory"), key=lambda f: f.path, reverse=True):
        directory, name = parent_of(root, file.path)
        try:
            os.utime(name, ns=(file.mtime_ns, file.mtime_ns), dir_fd=directory, follow_symlinks=False)
        finally:
            os.close(directory)


def _keep(source: bytes, shadow: bytes, path: bytes, opened: int | None = None) -> int:
    try:
        _link(source, path, shadow, path)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EMLINK, errno.EPERM):
            raise
        if opened is None:
            copy_file(source, shadow, path)
        else:
            _copy_opened(opened, shadow, path)
    directory, name = parent_of(shadow, path)
    try:
        return os.stat(name, dir_fd=directory, follow_symlinks=False).st_ino
    finally:
        os.close(directory)


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


def copy_file(source_root: bytes, target_root: bytes, path: bytes) -> None:
    """Copy one file with mode, owner, times and attributes, following no link."""
    source_fd, name = parent_of(source_root, path)
    target_fd, _name = parent_of(target_root, path)
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=source_fd)
        try:
            _copy_to(fd, name, target_fd)
        finally:
            os.close(fd)
    finally:
        os.close(source_fd)
        os.close(target_fd)


def _copy_opened(fd: int, root: bytes, path: bytes) -> None:
    directory, name = parent_of(root, path)
    try:
        _copy_to(fd, name, directory)
    finally:
        os.close(directory)


def copy_to(fd: int, target: bytes) -> None:
    """Copy an open file, all of it and synced, to a new name. Raises FileExistsError."""
    _copy_to(fd, target, None, sync=True)


def _copy_to(fd: int, name: bytes, directory: int | None, *, sync: bool = False) -> None:
    out = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=directory)
    try:
        status = os.fstat(fd)
        _copy_bytes(fd, out, status.st_size)
        if os.geteuid() == 0:
            os.fchown(out, status.st_uid, status.st_gid)
        os.fchmod(out, stat.S_IMODE(status.st_mode))
        for attribute, value in cache.user_attributes(fd):
            os.setxattr(out, attribute, value)
        os.utime(out, ns=(status.st_atime_ns, status.st_mtime_ns))
        if sync:
            os.fsync(out)
    finally:
        os.close(out)


def _copy_bytes(fd: int, out: int, size: int) -> None:
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
    for file in files:
        if file.kind == "directory":
            continue
        if file.same:
            _link(target, file.same, target, file.path)
        elif file.kind == "symlink":
            add_file(target, file)
        else:
            _keep(source, target, file.path)
    settle_directories(target, files)
    shutil.copystat(source, target, follow_symlinks=False)


def remove(tree: bytes) -> None:
    """Remove a tree that may be gone. Follows no link."""
    if os.path.lexists(tree):
        shutil.rmtree(tree)


def sync(tree: bytes, without: Collection[int] = ()) -> None:
    """Make a tree durable, file by file: syncing the file system would wait for everything anybody has written to it.

    `without`: inodes the caller has synced, whatever names they have. The first sync commits the names and attributes
    of all of them.
    """
    for directory, subdirectories, files in os.walk(tree):
        for name in [*files, *subdirectories]:
            path = os.path.join(directory, name)
            status = os.lstat(path)
            if status.st_ino not in without and kind_of(status.st_mode) in ("file", "directory"):
                fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
                try:
                    os.fsync(fd)
                finally:
                    os.close(fd)
    for path in (tree, os.path.dirname(tree)):
        linux.sync_directory(path)


def used_bytes(tree: bytes) -> int:
    """Bytes a tree occupies on the disk."""
    total = 0
    for directory, _names, files in os.walk(tree):
        for name in files:
            with suppress(FileNotFoundError):
                total += os.lstat(os.path.join(directory, name)).st_blocks * 512
    return total
