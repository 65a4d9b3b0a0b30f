"""Mounts of runfs as the kernel lists them, and whether one is served.

Used by status, doctor, mount and umount, from any process."""

import errno
import os
import re
import threading
from pathlib import Path


def runfs_mounts(uid: int | None = None) -> list[str]:
    """Mountpoints of the runfs mounts that this process sees, or of those that `uid` made (root: all); asks none of
    them."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        front, _dash, back = line.partition(" - ")
        if not back.startswith("fuse.runfs "):
            continue
        if not uid or f"user_id={uid}" in back.rpartition(" ")[2].split(","):
            found.append(_unescaped(front.split(" ")[4]))
    return found


def _unescaped(path: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), path)


def is_served(mountpoint: str | os.PathLike[str], wait_s: float = 2.0) -> bool:
    """Whether a FUSE mount has a process behind it: False only where the kernel says that it has gone. One that does
    not answer in time, or not to us, has one."""
    gone = []

    def ask() -> None:
        try:
            os.statvfs(mountpoint)
        except OSError as error:
            if error.errno in (errno.ENOTCONN, errno.ECONNABORTED):
                gone.append(error)

    thread = threading.Thread(target=ask, name="statfs", daemon=True)  # it may wait for as long as the mount lives
    thread.start()
    thread.join(wait_s)
    return not gone
