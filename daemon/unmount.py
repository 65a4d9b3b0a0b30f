"""Ending a mount: let its daemon drain and go, or take away what a dead daemon left.

Used by the `umount` command and, for dead mounts, by `daemon.launch`. Blocks until the mount is gone, at most the
time given for draining and half a minute more.
"""

import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from daemon import client, mounts
from daemon.protocol import Progress
from vfs import mountinfo, places
from vfs.errors import MountpointError

DRAIN_S = 60.0  # what `umount` gives the pushes if nobody says otherwise
GONE_S = 30.0  # after the daemon has answered, the kernel and the process need moments, not more
_POLL_S = 0.02


def unmount(runtime_dir: Path, given: Path, timeout_s: float, progress: Progress) -> dict[str, Any]:
    """End the mount at a path. The result has `mountpoint`, `how` ("drained" or "stale"), `pending`, `failed`, `exit`.

    Raises MountpointError when nothing of ours is there, or it does not go; the daemon's own error when it refuses.
    """
    path = mounts.real_mountpoint(given)
    entry = mounts.announced_at(runtime_dir, path)
    socket = places.socket_of(runtime_dir, path)
    result = client.ask(socket, "umount", {"timeout": timeout_s}, progress, silence_s=timeout_s + GONE_S)
    if result is None:
        _check_stale(path, entry)
        detach(path)
        _forget(runtime_dir, path)
        return {"mountpoint": str(path), "how": "stale", "index": entry.index if entry else None, "exit": 0}
    _wait_until_gone(path, socket, entry)
    return {"exit": 0, **result, "mountpoint": str(path), "how": "drained"}


def _check_stale(path: Path, entry: mounts.Running | None) -> None:
    mounted = mounts.mounted_at(path)
    if mounted is None:
        around = mounts.mount_around(path)
        inside = f"; it lies in the mount {around.mountpoint}" if around is not None and around.is_runfs else ""
        raise MountpointError(f"runfs has nothing mounted at {path}{inside}")
    if not mounted.is_runfs:
        raise MountpointError(f"{path}: a {mounted.kind} file system is mounted there, not runfs; use umount {path}")
    if mounted.uid not in (None, os.geteuid()) and os.geteuid() != 0:
        raise MountpointError(f"{path} was mounted by uid {mounted.uid}; run the command as that user")
    if mountinfo.is_served(path):
        raise MountpointError(
            f"{path} is served, but no control socket of it is known here; set RUNFS_RUNTIME_DIR and RUNFS_STATE_DIR "
            f"as its daemon has them, or end the daemon with SIGTERM: it drains and unmounts"
        )


def detach(path: Path) -> None:
    """Take a dead mount away; lazily when programs still hold files in it. Raises MountpointError when it stays."""
    if os.geteuid() == 0:
        attempts = [["umount", str(path)], ["umount", "-l", str(path)]]
    else:
        tool = shutil.which("fusermount3") or shutil.which("fusermount")
        if tool is None:
            raise MountpointError(f"{path}: fusermount3 is missing; install fuse3, then run the command again")
        attempts = [[tool, "-u", str(path)], [tool, "-u", "-z", str(path)]]
    said = ""
    for attempt in attempts:
        done = subprocess.run(attempt, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
        if mounts.mounted_at(path) is None:
            return
        said = done.stderr.strip()
    raise MountpointError(f"{path} cannot be unmounted: {said}")


def _forget(runtime_dir: Path, path: Path) -> None:
    places.info_of(runtime_dir, path).unlink(missing_ok=True)
    places.socket_of(runtime_dir, path).unlink(missing_ok=True)


def _wait_until_gone(path: Path, socket: Path, entry: mounts.Running | None) -> None:
    """Until neither the mount nor its daemon is there, so that the next mount can start at once."""
    deadline = time.monotonic() + GONE_S
    while mounts.mounted_at(path) is not None or client.answers(socket) or (entry is not None and socket.exists()):
        if time.monotonic() > deadline:
            raise MountpointError(f"{path} is drained but still mounted after {GONE_S:.0f} s: files in it are open")
        time.sleep(_POLL_S)
