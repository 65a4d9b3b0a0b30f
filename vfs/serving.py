"""One process serves the records of a project directory, whatever state directory it uses.

Used by `vfs/session.py`. The journal's lock says who uses a state directory; two daemons with other state directories
would both evict and restore the same records. So each holds a flock on the directory that the index and the link to
the mount are in: it leaves no file behind and ends with its holder. Where a file system has no flock for directories
(NFS), there is only the journal's lock. Nothing here blocks.
"""

import errno
import fcntl
import os
from pathlib import Path

from vfs.errors import JournalLocked


class Claim:
    """Holds the directory of an index for this process. Raises JournalLocked naming the holder."""

    def __init__(self, directory: Path) -> None:
        self._fd: int | None = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            pid = _holder(self._fd) if error.errno == errno.EWOULDBLOCK else None
            self.release()
            if error.errno != errno.EWOULDBLOCK:
                return  # no such locks here
            raise JournalLocked(
                f"the records of {directory} are already served by {f'process {pid}' if pid else 'another process'}"
                f"{_mounted_at(directory)}, with another state directory; unmount that first, or use its mount"
            ) from None

    def release(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def _holder(fd: int) -> int | None:
    """The process that has a flock on this directory, as proc(5) tells in /proc/locks."""
    status = os.fstat(fd)
    name = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    try:
        lines = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        fields = line.split()
        if len(fields) > 5 and fields[1] == "FLOCK" and fields[5] == name:
            return int(fields[4])
    return None


def _mounted_at(directory: Path) -> str:
    try:
        return f" (mounted at {os.readlink(directory / '.runfs')})"
    except OSError:
        return ""
