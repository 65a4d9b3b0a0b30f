"""Locks hold between processes."""

import fcntl
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.mounted.test_semantics import opened
from tests.posix.places import Place

pytestmark = pytest.mark.mounted
FLOCK = struct.Struct("hhqqi4x")  # struct flock on 64-bit Linux: type, whence, start, length, pid
HOLD = """
import fcntl, os, sys
fd = os.open("data", os.O_RDWR)
exec(sys.argv[1])
print("held", flush=True)
sys.stdin.readline()
"""


@contextmanager
def holder(place: Place, code: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that runs code with `fd` open, and holds what it took until the block ends."""
    with subprocess.Popen(
        [sys.executable, "-S", "-c", HOLD, code],
        cwd=place.path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.communicate("go\n", timeout=30)


def free(place: Place, command: int, *where: int) -> bool:
    """Whether this process gets a lock of `data` at once."""
    with opened(place.path / "data", os.O_RDWR) as fd:
        try:
            if where:
                fcntl.lockf(fd, command | fcntl.LOCK_NB, where[1], where[0])
            else:
                fcntl.flock(fd, command | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def test_of_whole_files(place: Place) -> None:
    with holder(place, "fcntl.flock(fd, fcntl.LOCK_EX)"):
        assert not free(place, fcntl.LOCK_EX)
        assert not free(place, fcntl.LOCK_SH)
    assert free(place, fcntl.LOCK_EX)
    with holder(place, "fcntl.flock(fd, fcntl.LOCK_SH)"):
        assert free(place, fcntl.LOCK_SH)
        assert not free(place, fcntl.LOCK_EX)


def test_of_ranges(place: Place) -> None:
    with holder(place, "fcntl.lockf(fd, fcntl.LOCK_EX, 100, 1000); fcntl.lockf(fd, fcntl.LOCK_SH, 50, 5000)") as other:
        assert not free(place, fcntl.LOCK_SH, 1099, 1)
        assert free(place, fcntl.LOCK_EX, 1100, 100)
        assert free(place, fcntl.LOCK_EX, 0, 1000)
        assert free(place, fcntl.LOCK_SH, 5000, 10)
        assert not free(place, fcntl.LOCK_EX, 5049, 100)
        with opened(place.path / "data", os.O_RDWR) as fd:
            asked = FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            kind, _whence, start, length, pid = FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_GETLK, asked))
        assert (kind, start, length, pid) == (fcntl.F_WRLCK, 1000, 100, other.pid)
    assert free(place, fcntl.LOCK_EX, 1000, 100)


def test_they_go_with_the_process(place: Place) -> None:
    with holder(place, "fcntl.lockf(fd, fcntl.LOCK_EX); fcntl.flock(fd, fcntl.LOCK_EX)") as other:
        assert not free(place, fcntl.LOCK_EX)
        other.kill()
        other.wait()
        assert free(place, fcntl.LOCK_EX)
        assert free(place, fcntl.LOCK_EX, 0, 0)


def test_one_waits_for_the_other(place: Place, tmp_path: Path) -> None:
    wait = "fcntl.flock(fd, fcntl.LOCK_EX); os.pwrite(fd, b'2', 0)"
    with opened(place.path / "data", os.O_RDWR) as fd:
        fcntl.flock(fd, fcntl.LOCK_EX)
        with subprocess.Popen(
            [sys.executable, "-S", "-c", HOLD, wait], cwd=place.path, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
        ) as other:
            os.pwrite(fd, b"1", 0)
            assert other.poll() is None
            fcntl.flock(fd, fcntl.LOCK_UN)
            assert other.communicate(timeout=30)[0] == b"held\n"
        assert os.pread(fd, 1, 0) == b"2"


def test_a_lock_outlives_the_name(place: Place) -> None:
    with opened(place.path / "data", os.O_RDWR) as fd, opened(place.path / "data", os.O_RDWR) as other:
        fcntl.flock(fd, fcntl.LOCK_EX)
        os.unlink(place.path / "data")
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
