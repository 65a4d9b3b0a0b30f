"""What tests need to know and do about FUSE mounts, without asking the mounts themselves (they may hang).

Used by conftest.py and mounting.py. Reads /proc/self/mountinfo only; nothing here touches a path under a mount.
"""

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

CONNECTIONS = Path("/sys/fs/fuse/connections")


@dataclass(frozen=True, slots=True)
class FuseMount:
    """One line of mountinfo. `minor` is the device's minor number, which names the connection in /sys/fs/fuse."""

    path: Path
    minor: int
    source: str


def fuse_mounts() -> list[FuseMount]:
    """Every FUSE file system that this process sees mounted."""
    mounts = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        kind, source = after.split(" ")[:2]
        if kind == "fuse" or kind.startswith("fuse."):
            fields = before.split(" ")
            path = fields[4].encode("ascii", "surrogateescape").decode("unicode_escape")
            mounts.append(FuseMount(Path(path), int(fields[2].partition(":")[2]), source))
    return mounts


def is_fuse_mount(path: Path) -> bool:
    return any(mount.path == path for mount in fuse_mounts())


def fuse_missing() -> str | None:
    """Why nothing can be mounted here, or None when it can."""
    if not os.path.exists("/dev/fuse"):
        return "no /dev/fuse on this machine"
    if shutil.which("fusermount3") is None:
        return "fusermount3 is not installed (Debian's package fuse3)"
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"/dev/fuse cannot be opened: {error.strerror}"
    return None


def unmount(mount: FuseMount) -> None:
    """Abort the connection, so that whoever waits for it goes on with an error, and take the mount away.

    Without root and where /sys/fs/fuse/connections is not mounted, nobody can abort: the daemon has to be ended first.
    """
    abort = CONNECTIONS / str(mount.minor) / "abort"
    if abort.exists():
        abort.write_text("1")
    # For root, forcing (MNT_FORCE) aborts a FUSE connection, too.
    by_root = ["umount", "--force", "--lazy", str(mount.path)]
    by_user = ["fusermount3", "-u", "-z", str(mount.path)]
    subprocess.run(by_root if os.geteuid() == 0 else by_user, check=False, capture_output=True)


def unmount_under(directory: Path) -> list[FuseMount]:
    """Take away every FUSE mount at or below this directory; the ones found."""
    found = [mount for mount in fuse_mounts() if mount.path.is_relative_to(directory)]
    for mount in found:
        unmount(mount)
    return found
