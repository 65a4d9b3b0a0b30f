"""The file system work of a directory store: opening beneath the root, the marker, the lock, durable steps.

Used by `file.py`. Blocks on the disk. Raises OSError (which `explain` turns into our errors) and Unreachable
where the disk is not the one it was.
"""

import errno
import fcntl
import json
import os
import stat as modes
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vfs.errors import Denied, NotFound, StoreError, StoreFull, StoreTimeout, Unreachable
from vfs.stores.limits import Budget
from vfs.stores.places import MARKER, TEMPORARY, Place

DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
READING = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # NONBLOCK: a FIFO there must not stop us
NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
BLOCKED = frozenset({errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG})
STALE_S = 24 * 3600  # a temporary file this old was left by a crash: a living one is written to

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_DENIED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_GONE = frozenset(
    {errno.EIO, errno.ESTALE, errno.ENXIO, errno.ENODEV, errno.EHOSTDOWN, errno.ETIMEDOUT, errno.ENOTCONN}
)
_NO_RANGES = frozenset({errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS})  # of copy_file_range(2)
_NO_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})


class Directory:
    """One store's directory. `used`: it was written to before, so an empty place there is not it. `guard` may refuse
    before anything is opened."""

    def __init__(self, root: Path, name: str, used: bool, guard: Callable[[], None] | None = None) -> None:
        self.path = root
        self._guard = guard or (lambda: None)
        self._name = name
        self._used = used
        self._identity: str | None = None
        self._swept = False

    def make(self) -> None:
        """Make the directory itself, where its parent is there."""
        self._guard()
        if not self.path.exists() and self.path.parent.is_dir():
            self.path.mkdir(exist_ok=True)
            sync_directory(self.path.parent)

    @contextmanager
    def root(self, *, writing: bool = False) -> Iterator[int]:
        """A descriptor of the root, after a look at the marker; `writing` makes the marker where none was
        expected."""
        self._guard()
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise Unreachable(
                f"{self._name}: {self.path} cannot be opened ({error.strerror}); is the disk mounted?"
            ) from error
        try:
            self._look_at_marker(fd, writing)
            yield fd
        finally:
            os.close(fd)

    def _look_at_marker(self, root: int, writing: bool) -> None:
        found = _read_marker(root)
        if found is None and self._identity is not None:
            found = _read_marker(root)  # another thread may have made it since we looked
        if found is None and (self._used or self._identity is not None):
            raise Unreachable(
                f"{self._name}: {self.path} was a store, and has no {MARKER} now; is the disk mounted? "
                f"If the store was emptied on purpose, make it anew under another name"
            )
        if found is not None and self._identity is not None and found != self._identity:
            raise Unreachable(f"{self._name}: {self.path} is another store than before; is the right disk mounted?")
        if found is None and writing:
            found = self._write_marker(root)
        self._identity = found

    def _write_marker(self, root: int) -> str | None:
        content = json.dumps({"runfs-store": 1, "id": os.urandom(16).hex()}) + "\n"
        with self.temporary(root) as (directory, name, file):
            os.write(file, content.encode())
            os.fsync(file)
            with suppress(FileExistsError):  # another writer was faster: its marker counts
                put_new(directory, name, root, MARKER)
        os.fsync(root)
        return _read_marker(root)

    @contextmanager
    def temporary(self, root: int) -> Iterator[tuple[int, str, int]]:
        """A new file in the temporary area: (directory, name, file). Removed at the end unless it was
        renamed."""
        directory = make_directories(root, (TEMPORARY,))
        try:
            if not self._swept:  # once per store
                self._swept = True
                _sweep(directory, STALE_S)
            name = f"{os.getpid()}-{os.urandom(8).hex()}"
            file = os.open(name, NEW, 0o666, dir_fd=directory)
            try:
                yield directory, name, file
            finally:
                os.close(file)
                remove(directory, name)
        finally:
            os.close(directory)

    def sweep(self, root: int, older_than_s: float) -> int:
        """Remove what crashed writers left that was not written to for so long; how many."""
        directory = open_if_there(root, (TEMPORARY,))
        if directory is None:
            return 0
        try:
            return _sweep(directory, older_than_s)
        finally:
            os.close(directory)

    @contextmanager
    def lock(self, root: int, budget: Budget) -> Iterator[None]:
        """The store's lock, against other threads and processes; held for a rename, never while bytes are
        copied."""
        directory = make_directories(root, (TEMPORARY,))
        try:
            file = os.open("lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666, dir_fd=directory)
        finally:
            os.close(directory)
        try:
            while not _try_lock(file):
                if not budget.left():
                    raise StoreTimeout(f"{self._name}: another process holds {self.path}/{TEMPORARY}/lock")
                time.sleep(0.001)
            yield
        finally:
            os.close(file)


def open_directory(root: int, names: Place) -> int:
    """A descriptor of a directory beneath the root, through no symbolic link."""
    fd = os.dup(root)
    for name in names:
        try:
            below = os.open(name, DIRECTORY, dir_fd=fd)
        finally:
            os.close(fd)
        fd = below
    return fd


def make_directories(root: int, names: Place) -> int:
    """Like `open_directory`; makes what is missing, durably."""
    fd = os.dup(root)
    for name in names:
        try:
            below = _open_or_make(fd, name)
        finally:
            os.close(fd)
        fd = below
    return fd


def _open_or_make(parent: int, name: str) -> int:
    try:
        return os.open(name, DIRECTORY, dir_fd=parent)
    except FileNotFoundError:
        try:
            os.mkdir(name, dir_fd=parent)
        except FileExistsError:  # somebody was faster
            return os.open(name, DIRECTORY, dir_fd=parent)
        os.fsync(parent)
        return os.open(name, DIRECTORY, dir_fd=parent)


def open_if_there(root: int, names: Place) -> int | None:
    """Like `open_directory`, or None where there is no such directory."""
    try:
        return open_directory(root, names)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno in BLOCKED:
            return None
        raise


def open_file(root: int, place: Place) -> int | None:
    """A descriptor of the regular file there, or None where there is none (something else counts as none)."""
    directory = open_if_there(root, place[:-1])
    if directory is None:
        return None
    try:
        file = os.open(place[-1], READING, dir_fd=directory)
    except OSError as error:
        if error.errno in BLOCKED or error.errno in (errno.ENOENT, errno.ENXIO):  # ENXIO: a socket
            return None
        raise
    finally:
        os.close(directory)
    if modes.S_ISREG(os.fstat(file).st_mode):
        return file
    os.close(file)
    return None


def put_at_first(root: int, temporary: tuple[int, str], candidates: tuple[Place, ...]) -> int:
    """Give a temporary file the first place that can be had; a descriptor of its directory. Raises OSError
    when none can."""
    for number, place in enumerate(candidates, 1):
        try:
            directory = make_directories(root, place[:-1])
            try:
                put_new(*temporary, directory, place[-1])
            except BaseException:
                os.close(directory)
                raise
            return directory
        except OSError as error:
            blocked = error.errno in BLOCKED or error.errno == errno.EEXIST
            if not blocked or number == len(candidates):
                raise
    raise AssertionError("no candidates")


def replace(root: int, temporary: tuple[int, str], place: Place) -> int:
    """Put a temporary file in the place of another one; a descriptor of its directory."""
    directory = open_directory(root, place[:-1])
    try:
        os.rename(temporary[1], place[-1], src_dir_fd=temporary[0], dst_dir_fd=directory)
    except BaseException:
        os.close(directory)
        raise
    return directory


def remove_file(root: int, place: Place) -> None:
    """Remove a file, and the directories that are empty without it. To be called under the lock."""
    for depth in range(len(place) - 1, -1, -1):
        directory = open_if_there(root, place[:depth])
        if directory is None:
            return
        try:
            if depth == len(place) - 1:
                remove(directory, place[depth])
            else:
                os.rmdir(place[depth], dir_fd=directory)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
                return
            raise
        finally:
            os.close(directory)


def write_all(file: int, data: bytes | memoryview) -> None:
    """Write everything, however many calls it takes."""
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def copy_piece(source: int, target: int, offset: int, length: int) -> int:
    """Copy a part of an open file to the same place in another: by the file system where it can, else through here.
    The bytes copied: fewer only where the file ends."""
    done = 0
    while done < length and (count := _copy_some(source, target, offset + done, length - done)):
        done += count
    return done


def _copy_some(source: int, target: int, offset: int, length: int) -> int:
    try:
        if count := os.copy_file_range(source, target, length, offset, offset):
            return count
    except OSError as error:
        if error.errno not in _NO_RANGES:
            raise
    return os.pwrite(target, os.pread(source, length, offset), offset)


def put_new(source: int, name: str, target: int, as_name: str) -> None:
    """Give a temporary file its name, which must be free. Raises FileExistsError. Where the file system has
    no hard links this looks first and renames: safe among those who take the lock."""
    try:
        os.link(name, as_name, src_dir_fd=source, dst_dir_fd=target, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if exists(target, as_name):
            raise FileExistsError(errno.EEXIST, "exists", as_name) from error
        os.rename(name, as_name, src_dir_fd=source, dst_dir_fd=target)


def exists(directory: int, name: str) -> bool:
    """Whether anything has that name."""
    try:
        os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def remove(directory: int, name: str) -> None:
    """Remove a file; no error when it is not there."""
    try:
        os.unlink(name, dir_fd=directory)
    except FileNotFoundError:
        return


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def explain(error: OSError, store: str, operation: str, key: str) -> StoreError:
    """Our error for one of the kernel's."""
    what = f"{store}: {operation} {key}".rstrip()
    number = error.errno or 0
    if number == errno.ENOENT:
        return NotFound(f"{what}: there is no such object")
    if number in _FULL:
        return StoreFull(f"{what}: {error.strerror}; make room there or use another store")
    if number in _DENIED:
        return Denied(f"{what}: {error.strerror}; check who owns the store's directory and how it is mounted")
    if number in _GONE:
        return Unreachable(f"{what}: {error.strerror}; is the disk still there?")
    return StoreError(f"{what}: {error.strerror or error}")


def _read_marker(root: int) -> str | None:
    try:
        file = os.open(MARKER, READING, dir_fd=root)
    except FileNotFoundError:
        return None
    try:
        return os.read(file, 4096).decode("utf-8", "replace")
    finally:
        os.close(file)


def _try_lock(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _sweep(directory: int, older_than_s: float) -> int:
    stale = [name for name in os.listdir(directory) if name != "lock" and _age(directory, name) > older_than_s]
    for name in stale:
        try:
            remove(directory, name)
        except IsADirectoryError:  # an sftp store's claim
            _sweep_claim(directory, name)
    return len(stale)


def _sweep_claim(directory: int, name: str) -> None:
    claim = open_if_there(directory, (name,))
    if claim is None:
        return
    try:
        for each in os.listdir(claim):
            remove(claim, each)
        with suppress(OSError):  # used again, or gone
            os.rmdir(name, dir_fd=directory)
    finally:
        os.close(claim)


def _age(directory: int, name: str) -> float:
    try:
        return time.time() - os.stat(name, dir_fd=directory, follow_symlinks=False).st_mtime
    except FileNotFoundError:
        return 0.0
