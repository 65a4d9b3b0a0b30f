"""Small disks of their own for tests: ext4 on a loop device, which behaves as people's disks do (tmpfs does not: no
passthrough, no writeback). Needs root, mkfs.ext4 and a loop device; skips without, and fails with CI=1."""

import contextlib
import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import in_ci

STEPS = (1 << 28, 1 << 24, 1 << 20, 1 << 16, 4096)


def missing() -> str | None:
    """Why no disk can be made here, or None when it can."""
    if os.geteuid() != 0:
        return "mounting a small disk needs root"
    if not os.path.exists("/dev/loop-control"):
        return "this kernel has no loop devices"
    if shutil.which("mkfs.ext4") is None:
        return "mkfs.ext4 is not installed (Debian's package e2fsprogs)"
    return None


def need_disks() -> None:
    """Skip, or fail in CI, where no disk can be made."""
    reason = missing()
    if reason is not None and in_ci():
        pytest.fail(reason, pytrace=False)
    if reason is not None:
        pytest.skip(reason)


@contextlib.contextmanager
def ext4_disk(path: Path, mib: int) -> Iterator[Path]:
    """An ext4 of so many MiB mounted at `path`; its image is sparse and takes only what is used."""
    need_disks()
    path.mkdir(parents=True, exist_ok=True)
    image = path.with_name(f"{path.name}.ext4")
    with image.open("wb") as file:
        file.truncate(mib << 20)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", "-E", "lazy_itable_init=1", str(image)], check=True)
    subprocess.run(["mount", "-o", "loop,discard", str(image), str(path)], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)
        image.unlink()


class Filler:
    """Takes all the room of a disk, and gives it back."""

    def __init__(self, disk: Path) -> None:
        self._file = disk / ".filler"

    @property
    def filled(self) -> bool:
        return self._file.exists()

    def fill(self, leave: int = 0) -> None:
        """Nothing is free any more but `leave` bytes."""
        fd = os.open(self._file, os.O_WRONLY | os.O_CREAT)
        try:
            for step in STEPS:
                while self._free() - leave > 0 and self._more(fd, step, leave):
                    pass
        finally:
            os.close(fd)

    def _free(self) -> int:
        room = os.statvfs(self._file.parent)
        return room.f_bavail * room.f_frsize

    def _more(self, fd: int, step: int, leave: int) -> bool:
        if self._free() - leave < step:
            return False
        try:
            os.posix_fallocate(fd, os.fstat(fd).st_size, step)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            return False
        return True

    def free(self) -> None:
        self._file.unlink(missing_ok=True)
