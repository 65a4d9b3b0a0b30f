"""A process that makes system calls below a directory when it is told to, one at a time: the model's hands.

`Actor(directory)` starts it; `call(name, ...)` gives what the system call gave, or its errno as `Error`. A call that
does not come back in time is a failure and not a hang: the caller takes the mount away. Calls are made elsewhere
because a page fault that waits would hold this interpreter's lock, and the store's proxy with it.

Open files stay open between calls under a number (`slot`) that the caller chooses.
"""

import contextlib
import hashlib
import mmap
import os
import pickle
import select
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True, slots=True)
class Error:
    """A system call that failed."""

    errno: int

    def __str__(self) -> str:
        import errno

        return errno.errorcode.get(self.errno, str(self.errno))


class Hung(AssertionError):
    """A call that did not come back in its time."""


class Actor:
    """The process. `longest` is how long the slowest call took, in seconds, and which it was."""

    def __init__(self, directory: Path, limit_s: float) -> None:
        self.directory = directory
        self.limit_s = limit_s
        self.longest = (0.0, "")
        self._start()

    def _start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.model.actor"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.call("enter", str(self.directory))

    def call(self, name: str, *arguments: Any) -> Any:
        """Make a call. Raises Hung when it is not over after `limit_s`."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        began = time.monotonic()
        pickle.dump((name, arguments), self.process.stdin)
        self.process.stdin.flush()
        ready, _, _ = select.select([self.process.stdout], [], [], self.limit_s)
        if not ready:
            raise Hung(f"{name}{arguments} did not come back within {self.limit_s:.0f} s")
        answer = pickle.load(self.process.stdout)
        self.longest = max(self.longest, (time.monotonic() - began, f"{name}{arguments!r:.120}"))
        return answer

    def restart(self) -> None:
        """End it, with all it has open, and begin anew."""
        self.stop()
        self._start()

    def stop(self) -> None:
        self.process.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        self.process.wait(30)


# --- in the process ---------------------------------------------------------------------------------------------------

_slots: dict[int, int] = {}


def _enter(directory: str) -> None:
    os.chdir(directory)


def _leave() -> None:
    """Let go of everything, so that a mount can go."""
    for slot in list(_slots):
        with contextlib.suppress(OSError):  # the mount may be dead
            os.close(_slots.pop(slot))
    os.chdir("/")


def _open(slot: int, path: bytes, flags: int, mode: int) -> None:
    _slots[slot] = os.open(path, flags | os.O_CLOEXEC, mode)


def _close(slot: int) -> None:
    os.close(_slots.pop(slot))


def _pread(slot: int, size: int, offset: int) -> bytes:
    return hashlib.blake2b(os.pread(_slots[slot], size, offset), digest_size=8).digest()


def _read(path: bytes, size: int, offset: int) -> tuple[int, bytes]:
    """The size and digest of what a read gives."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        found = os.pread(fd, size, offset)
        return len(found), hashlib.blake2b(found, digest_size=8).digest()
    finally:
        os.close(fd)


def _mmap_write(path: bytes, offset: int, data: bytes) -> None:
    """Store through a shared map, and wait until it is on the disk."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        with mmap.mmap(fd, 0) as mapped:
            mapped[offset : offset + len(data)] = data
            mapped.flush()
    finally:
        os.close(fd)


def _mmap_read(path: bytes, offset: int, size: int) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as mapped:
            return hashlib.blake2b(mapped[offset : offset + size], digest_size=8).digest()
    finally:
        os.close(fd)


def _sync_directory(path: bytes) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _tree(path: bytes) -> dict[bytes, tuple[Any, ...]]:
    """All that can be told of a directory without reading a file, by path: type and mode, links, size, target, mtime
    in ns."""
    found: dict[bytes, tuple[Any, ...]] = {}
    for base, names, files in os.walk(path, onerror=_raise):
        for name in names + files:
            full = os.path.join(base, name)
            status = os.lstat(full)
            directory = os.path.isdir(full) and not os.path.islink(full)
            target = os.readlink(full) if os.path.islink(full) else b""
            size = (0, 0) if directory else (status.st_nlink, status.st_size)
            found[os.path.relpath(full, path)] = (status.st_mode, *size, target, status.st_mtime_ns)
    return found


def _raise(error: OSError) -> None:
    raise error


def _digests(path: bytes) -> dict[bytes, bytes]:
    """The digest of every file below a directory."""
    found = {}
    for base, _names, files in os.walk(path, onerror=_raise):
        for name in files:
            full = os.path.join(base, name)
            if not os.path.islink(full):
                with open(full, "rb") as file:
                    found[os.path.relpath(full, path)] = hashlib.file_digest(file, "sha256").digest()
    return found


CALLS: dict[str, Callable[..., Any]] = {
    "enter": _enter,
    "leave": _leave,
    "open": _open,
    "close": _close,
    "pread": _pread,
    "pwrite": lambda slot, data, offset: os.pwrite(_slots[slot], data, offset),
    "append": lambda slot, data: os.write(_slots[slot], data),
    "ftruncate": lambda slot, size: os.ftruncate(_slots[slot], size),
    "fsync": lambda slot: os.fsync(_slots[slot]),
    "fdatasync": lambda slot: os.fdatasync(_slots[slot]),
    "fstat": lambda slot: (os.fstat(_slots[slot]).st_size, os.fstat(_slots[slot]).st_nlink),
    "read": _read,
    "mmap_read": _mmap_read,
    "mmap_write": _mmap_write,
    "truncate": os.truncate,
    "rename": os.rename,
    "unlink": os.unlink,
    "rmdir": os.rmdir,
    "mkdir": os.mkdir,
    "link": os.link,
    "symlink": os.symlink,
    "chmod": os.chmod,
    "utime": lambda path, times: os.utime(path, ns=times),
    "sync_directory": _sync_directory,
    "tree": _tree,
    "digests": _digests,
}


def main(told: BinaryIO, answers: BinaryIO) -> None:
    os.umask(0o022)
    while True:
        try:
            name, arguments = pickle.load(told)
        except EOFError:
            return
        try:
            answer = CALLS[name](*arguments)
        except OSError as error:
            answer = Error(error.errno or 0)
        except (ValueError, IndexError):  # Python's own check of a map's size
            answer = Error(-1)
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    # pickle names this module's classes by where they are imported from
    from tests.model import actor

    actor.main(sys.stdin.buffer, sys.stdout.buffer)
