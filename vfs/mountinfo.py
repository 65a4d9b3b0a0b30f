"""Mounts of runfs as the kernel lists them, and whether one answers. Used by status and doctor, from any process."""

import os
import threading
from pathlib import Path

_ANSWER_S = 5.0


def runfs_mounts() -> list[str]:
    """Mountpoints of every runfs mount this process sees; asks none of them."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        front, _dash, back = line.partition(" - ")
        if back.startswith("fuse.runfs "):
            found.append(front.split(" ")[4])
    return found


def answers(mountpoint: str) -> bool:
    """Whether a mount has a daemon. statfs on a dead one fails at once; on a hanging one it is asked in a thread that
    nobody waits for, not even at the end."""
    answered: list[bool] = []

    def ask() -> None:
        try:
            os.statvfs(mountpoint)
        except OSError:
            return
        answered.append(True)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_ANSWER_S)
    return bool(answered)
