"""What the tests of bad input share: small disks that fill up, and what people are told.

Used by test_bad_input.py, test_bad_store.py, test_free_space.py, test_from_bucket.py. Small disks need root.
"""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import in_ci
from tests.mounting import Mounted
from tests.projects import Project
from vfs.index import Index


@contextlib.contextmanager
def small_disk(path: Path, size: str) -> Iterator[Path]:
    """A file system of its own with so much room (as mount(8) takes it), in memory."""
    if os.geteuid() != 0:
        if in_ci():
            pytest.fail("mounting a small disk needs root", pytrace=False)
        pytest.skip("mounting a small disk needs root")
    path.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def resize(disk: Path, size: str) -> None:
    """Give a small disk another size."""
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)


def empty_project(path: Path) -> Project:
    """A project on which nothing ran yet."""
    (path / "storage").mkdir(parents=True)
    Index.open(path / ".machinable.sqlite", create=True).close()
    return Project(path, [])


def fill_up(disk: Path, name: str = "filler") -> Path:
    """Take all the room of a disk; the file that does."""
    filler = disk / name
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        for piece in (1 << 20, 4096, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(piece))
    return filler


def sentence(done: "subprocess.CompletedProcess[str]", code: int) -> str:
    """The one line a failed command wrote to stderr; it ended with this code and wrote nothing else there."""
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("runfs: "), done.stderr
    assert "unexpected" not in lines[0], done.stderr
    assert "Errno" not in lines[0], done.stderr
    return lines[0].removeprefix("runfs: ")


def lines(done: "subprocess.CompletedProcess[str]", code: int) -> list[str]:
    """What a command said on stdout; it ended with this code and complained of nothing unexpected."""
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    said = done.stdout + done.stderr
    assert "unexpected" not in said, said
    assert "Traceback" not in said, said
    assert "Errno" not in said, said
    return done.stdout.splitlines()


def start_fails(mounted: Mounted) -> str:
    """What `runfs mount` says when it cannot start; nothing is mounted."""
    mounted.path.mkdir(parents=True, exist_ok=True)
    return sentence(mounted.runfs(*mounted.command), 2)
