"""Copy a directory that somebody else made, as its bytes and nothing more. Used by import.

Blocks on the local disk. Whoever owns the source may change it while it is copied, and the daemon may be root: no link
is followed on the way, nothing but plain files is opened for its bytes, and the copy belongs to whoever runs this,
without the bits that would let a program of theirs run with his rights.
"""

import os
import stat
from contextlib import suppress

from vfs import cache, linux
from vfs.errors import DamagedRecord
from vfs.scan import Seen, open_file, refuse_mark, walk
from vfs.shadow import copy_bytes, parent_of

_PLAIN = 0o777  # what is kept of a mode: no set-id bits, no sticky bit


def copy_tree(source: bytes, target: bytes) -> None:
    """Make the new directory `target` hold what `source` does: files with permissions, times and attributes,
    directories, symlinks as they are, FIFOs empty. Not synced.

    Raises DamagedRecord for a device or a socket, for a copy of a placeholder, and for a file that another kind of
    thing has taken the place of; OSError.
    """
    os.mkdir(target, 0o700)
    directories = []
    for seen in walk(source):
        directory, name = parent_of(target, seen.path)
        try:
            _copy_one(source, seen, directory, name)
        finally:
            os.close(directory)
        if seen.kind == "directory":
            directories.append(seen)
    for seen in reversed(directories):  # last, as each name made in one changes its times
        directory, name = parent_of(target, seen.path)
        try:
            linux.change_mode(directory, name, seen.status.st_mode & _PLAIN | stat.S_IRWXU)
            os.utime(name, ns=_times(seen.status), dir_fd=directory, follow_symlinks=False)
        finally:
            os.close(directory)
    status = os.stat(source)
    os.chmod(target, status.st_mode & _PLAIN | stat.S_IRWXU)
    os.utime(target, ns=_times(status))


def _times(status: os.stat_result) -> tuple[int, int]:
    return status.st_atime_ns, status.st_mtime_ns


def _copy_one(source: bytes, seen: Seen, directory: int, name: bytes) -> None:
    mode = seen.status.st_mode
    if seen.kind == "directory":
        os.mkdir(name, 0o700, dir_fd=directory)
    elif seen.kind == "symlink":
        os.symlink(seen.target, name, dir_fd=directory)
        os.utime(name, ns=_times(seen.status), dir_fd=directory, follow_symlinks=False)
    elif seen.kind == "file":
        _copy_file(source, seen, directory, name)
    elif stat.S_ISFIFO(mode):
        os.mkfifo(name, mode & _PLAIN, dir_fd=directory)
    else:
        raise DamagedRecord(f"{os.fsdecode(seen.path)} is a device or a socket, which no record holds; remove it")


def _copy_file(source: bytes, seen: Seen, directory: int, name: bytes) -> None:
    fd = open_file(source, seen.path, os.O_RDONLY)
    try:
        status = os.fstat(fd)  # of what was opened: it need not be what was listed
        if not stat.S_ISREG(status.st_mode):
            raise DamagedRecord(f"{os.fsdecode(seen.path)} became something that is no file while it was copied")
        refuse_mark(fd, seen.path)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        out = os.open(name, flags, 0o600, dir_fd=directory)
        try:
            copy_bytes(fd, out, status.st_size)
            for attribute, value in cache.user_attributes(fd):
                with suppress(OSError):  # this disk keeps none
                    os.setxattr(out, attribute, value)
            os.fchmod(out, status.st_mode & _PLAIN)
            os.utime(out, ns=_times(status))
        finally:
            os.close(out)
    finally:
        os.close(fd)
