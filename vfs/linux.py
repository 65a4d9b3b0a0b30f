"""Linux system calls that Python's os module lacks. Used throughout `vfs`; every call here may block as the
file system it touches does, none touches a network by itself.

Sources: renameat2(2), openat2(2), fcntl(2) "Leases", fallocate(2).
"""

import ctypes
import errno
import fcntl
import functools
import os
import signal
import stat
import struct
from contextlib import suppress

_libc = ctypes.CDLL(None, use_errno=True)
NOREPLACE = 1  # flags of renameat2
EXCHANGE = 2
_SYS_OPENAT2 = 437  # the same number on every architecture since Linux 5.6
_RESOLVE_NO_MAGICLINKS = 0x02
_RESOLVE_NO_SYMLINKS = 0x04
_RESOLVE_BENEATH = 0x08
_PATH_AT_ONCE = 4000  # bytes of a path in one call; the kernel takes 4095
_FALLOC_KEEP_SIZE = 1
_FALLOC_PUNCH_HOLE = 2
_SYNC_FILE_RANGE_WRITE = 2
_F_SETSIG = 10
_PR_SET_DUMPABLE = 4
AT_FDCWD = -100

_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_libc.sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
_libc.renameat2.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
_libc.syscall.restype = ctypes.c_long
_libc.fstatfs.argtypes = [ctypes.c_int, ctypes.c_char_p]


def _check(result: int, name: bytes = b"") -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), name or None)
    return result


def exchange(first: bytes, second: bytes) -> None:
    """Swap two names of one file system in one step. Both must exist; neither is ever missing."""
    _check(_libc.renameat2(AT_FDCWD, first, AT_FDCWD, second, EXCHANGE), first)


def rename_at(source_fd: int, source: bytes, target_fd: int, target: bytes, flags: int = 0) -> None:
    """renameat2(2) with the caller's flags (RENAME_NOREPLACE 1, RENAME_EXCHANGE 2)."""
    _check(_libc.renameat2(source_fd, source, target_fd, target, flags), source)


def open_beneath(root: int, path: bytes, flags: int, mode: int = 0) -> int:
    """Open `path` (relative) below the directory `root`, following no symlink and leaving it by no way.

    Raises OSError as open(2) does: ELOOP or EXDEV where the path would have led outside. The path may be longer than
    one system call takes.
    """
    if len(path) > _PATH_AT_ONCE:
        first, _slash, rest = path[:_PATH_AT_ONCE].rpartition(b"/")
        middle = open_beneath(root, first, os.O_PATH | os.O_DIRECTORY)
        try:
            return open_beneath(middle, rest + path[_PATH_AT_ONCE:], flags, mode)
        finally:
            os.close(middle)
    mode = mode if flags & (os.O_CREAT | os.O_TMPFILE) == os.O_CREAT or flags & os.O_CREAT else 0
    how = struct.pack(
        "QQQ",
        flags | os.O_CLOEXEC,
        mode,
        _RESOLVE_BENEATH | _RESOLVE_NO_SYMLINKS | _RESOLVE_NO_MAGICLINKS,
    )
    return _check(
        _libc.syscall(
            ctypes.c_long(_SYS_OPENAT2),
            ctypes.c_long(root),
            ctypes.c_char_p(path),
            ctypes.c_char_p(how),
            ctypes.c_long(len(how)),
        ),
        path,
    )


def punch(fd: int, offset: int, length: int) -> None:
    """Free the blocks of a range; it reads as zeros, the size stays."""
    _check(_libc.fallocate(fd, _FALLOC_PUNCH_HOLE | _FALLOC_KEEP_SIZE, offset, length))


def begin_writing(fd: int) -> None:
    """Have the kernel begin to write a file's data to the disk. It promises nothing: a sync must follow."""
    _libc.sync_file_range(fd, 0, 0, _SYNC_FILE_RANGE_WRITE)


def lease(fd: int) -> bool:
    """Take a write lease on an open file: True when nobody else has it open or mapped.

    While it is held, an opener waits (up to /proc/sys/fs/lease-break-time, 45 s) until it is given back.
    Closing the descriptor gives it back. False: somebody has it open. Other errors are raised (a file
    system without leases cannot tell, so nothing may be dropped there).
    """
    # A break is announced with a signal whose default must not end the process: SIGURG is ignored.
    fcntl.fcntl(fd, _F_SETSIG, signal.SIGURG)
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EBUSY):
            return False
        raise
    return True


def has_writers(fd: int) -> bool:
    """Whether somebody has a file open for writing, or mapped so; `fd` is open for reading only.

    False too where the file system cannot tell. Asked with a read lease that is given back at once.
    """
    fcntl.fcntl(fd, _F_SETSIG, signal.SIGURG)
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError as error:
        return error.errno in (errno.EAGAIN, errno.EBUSY)
    return False


def wait_for_write(fd: int) -> None:
    """Wait until a write(2) into an open file that is under way has ended: it sets the file's times first, copies the
    bytes then, and holds the inode's lock all the while.

    lseek(2) takes that lock to look for data (ext4, btrfs, f2fs, tmpfs; xfs takes one for each read). Moves the offset.
    """
    with suppress(OSError):  # ENXIO: no data from here on
        os.lseek(fd, 0, os.SEEK_DATA)


def lease_wanted_for_writing(fd: int) -> bool:
    """Whether somebody waits to open, for writing, a file that we hold a write lease on."""
    return fcntl.fcntl(fd, fcntl.F_GETLEASE) == fcntl.F_UNLCK


def lease_held(fd: int) -> bool:
    """Whether the write lease on `fd` still stands: nobody has tried to open the file since."""
    return fcntl.fcntl(fd, fcntl.F_GETLEASE) == fcntl.F_WRLCK


def keep_out_of_core_dumps() -> None:
    """Let the kernel write no core dump of this process, which has credentials in its memory, and show its memory and
    environment to no other process but root's. Programs it starts are not affected. Source: prctl(2), proc(5)."""
    _check(_libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0))


def owners_of(device: int, inode: int) -> list[tuple[int, str]]:
    """Processes that have a file open, as (pid, name), as far as /proc lets us see. For messages only."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and _has_open(entry, device, inode):
            try:
                with open(f"/proc/{entry}/comm") as file:
                    found.append((int(entry), file.read().strip()))
            except OSError:
                continue
    return found


def _has_open(pid: str, device: int, inode: int) -> bool:
    if int(pid) == os.getpid():
        return False
    try:
        names = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return False
    for name in names:
        if _inode_of(pid, name) not in (None, inode):
            continue  # not looked at: in a mount that hangs, stat(2) would hang too
        try:
            held = os.stat(f"/proc/{pid}/fd/{name}")
        except OSError:
            continue
        if (held.st_dev, held.st_ino) == (device, inode):
            return True
    return False


def _inode_of(pid: str, descriptor: str) -> int | None:
    """The inode of a process's open file, told by the kernel alone; None before Linux 5.14."""
    try:
        with open(f"/proc/{pid}/fdinfo/{descriptor}") as lines:
            return next((int(line.split()[1]) for line in lines if line.startswith("ino:")), None)
    except OSError:
        return -1  # closed meanwhile


@functools.cache
def _umask() -> int:
    """This process's umask, which nobody changes while it runs: os.umask could only tell it by changing it."""
    with open("/proc/self/status") as lines:
        return next((int(line.split()[1], 8) for line in lines if line.startswith("Umask:")), 0o777)


def give_mode(fd: int, name: bytes | None, mode: int) -> None:
    """Give what was just made (`name` in the directory `fd`, or the open file `fd`) the bits of `mode` that our own
    umask took: the kernel has applied that of the process that asked. What we make for ourselves keeps to ours."""
    if not mode & _umask():
        return
    if name is None:
        os.fchmod(fd, stat.S_IMODE(os.fstat(fd).st_mode) | mode & 0o777)
    else:
        now = os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode
        change_mode(fd, name, stat.S_IMODE(now) | mode & 0o777)


def change_mode(directory: int, name: bytes, mode: int) -> None:
    """chmod(2) of a name in an open directory, whatever stands there but what a symlink leads to: chmod by name would
    follow one that somebody has just put in its place. Raises OSError (EOPNOTSUPP for a symlink)."""
    there = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    try:
        os.chmod(f"/proc/self/fd/{there}", mode)
    finally:
        os.close(there)


def drop_set_id(fd: int) -> bool:
    """Take the set-uid and set-gid bits from an open file, as a change by anybody but root does; whether it had any."""
    mode = os.fstat(fd).st_mode
    left = mode & ~stat.S_ISUID
    if mode & stat.S_IXGRP:  # without it the bit stood for mandatory locks and stays
        left &= ~stat.S_ISGID
    if left != mode:
        os.fchmod(fd, stat.S_IMODE(left))
    return left != mode


def file_system(fd: int) -> int:
    """The magic number of the file system an open file is on: `f_type` of statfs(2)."""
    buffer = ctypes.create_string_buffer(256)  # struct statfs is 120 bytes
    _check(_libc.fstatfs(fd, buffer))
    return ctypes.c_long.from_buffer(buffer).value


def data_bytes(fd: int) -> int:
    """Bytes of an open file that are on the disk, holes not counted (blocks would count long attributes too)."""
    total = position = 0
    size = os.fstat(fd).st_size
    while position < size:
        try:
            position = os.lseek(fd, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            break
        end = os.lseek(fd, position, os.SEEK_HOLE)
        total, position = total + end - position, end
    return total


def sync_directory(path: bytes) -> None:
    """fsync a directory, so that names made in it survive a power cut."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
