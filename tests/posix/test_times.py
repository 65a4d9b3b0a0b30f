"""Times are as on the native file system: nanoseconds, and which operation changes which time of what."""

import ctypes
import mmap
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mounted.test_semantics import opened, write_at
from tests.posix.places import Place

pytestmark = pytest.mark.mounted
_libc = ctypes.CDLL(None, use_errno=True)
UTIME_NOW, UTIME_OMIT = (1 << 30) - 1, (1 << 30) - 2
TICK_S = 0.012  # two changes within a tick of the clock leave the same times


class Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


def utimens(path: Path, atime: tuple[int, int], mtime: tuple[int, int]) -> None:
    times = (Timespec * 2)(Timespec(*atime), Timespec(*mtime))
    assert _libc.utimensat(-100, os.fsencode(path), times, 0) == 0, os.strerror(ctypes.get_errno())


def times(path: Path) -> dict[str, int]:
    status = os.lstat(path)
    return {"atime": status.st_atime_ns, "mtime": status.st_mtime_ns, "ctime": status.st_ctime_ns}


@pytest.mark.parametrize("name", ["data", "small", "sub", "link"])
def test_every_nanosecond(place: Place, name: str) -> None:
    path = place.path / name
    for atime, mtime in (
        (1_700_000_000_123_456_789, 1_600_000_000_987_654_321),
        (1, 999_999_999),
        (-1_000_000_001, -5_000_000_000_000_000_000 // 10),  # before 1970
        (2**31 * 10**9 + 7, 5_000_000_000_000_000_003),  # after 2038
    ):
        os.utime(path, ns=(atime, mtime), follow_symlinks=False)
        found = times(path)
        assert (found["atime"], found["mtime"]) == (atime, mtime)
        assert found["ctime"] > 1_700_000_000_000_000_000


def test_now_and_omit(place: Place) -> None:
    for name in ("data", "small", "sub"):
        path = place.path / name
        utimens(path, (10, 11), (20, 21))
        utimens(path, (0, UTIME_OMIT), (30, 31))
        assert (times(path)["atime"], times(path)["mtime"]) == (10_000_000_011, 30_000_000_031)
        before = times(path)["ctime"]
        utimens(path, (0, UTIME_OMIT), (0, UTIME_OMIT))
        assert times(path) == {"atime": 10_000_000_011, "mtime": 30_000_000_031, "ctime": before}
        utimens(path, (40, 41), (0, UTIME_NOW))
        assert times(path)["atime"] == 40_000_000_041
        assert abs(times(path)["mtime"] - time.time_ns()) < 10 * 10**9
        utimens(path, (0, UTIME_NOW), (50, 51))
        assert times(path)["mtime"] == 50_000_000_051
        assert abs(times(path)["atime"] - time.time_ns()) < 10 * 10**9


def _map_and_change(at: Path) -> None:
    with opened(at / "data", os.O_RDWR) as fd, mmap.mmap(fd, 0) as mapped:
        mapped[70_000] ^= 1
        mapped.flush()


# What is done, and whose mtime (m) and ctime (c) it changes. The directory is ".", a file's name is what it was before.
CHANGES: list[tuple[str, Callable[[Path], object], dict[str, str]]] = [
    ("write", lambda at: write_at(at / "data", 70_000, b"x"), {"data": "mc"}),
    ("write nothing", lambda at: write_at(at / "data", 70_000, b""), {}),
    ("append", lambda at: write_at(at / "small", 0, b"x", os.O_WRONLY | os.O_APPEND), {"small": "mc"}),
    ("write through a map", _map_and_change, {"data": "mc"}),
    ("truncate", lambda at: os.truncate(at / "data", 70_000), {"data": "mc"}),
    ("truncate to the same size", lambda at: os.truncate(at / "small", 8), {"small": "mc"}),
    ("open with truncation", lambda at: os.close(os.open(at / "data", os.O_WRONLY | os.O_TRUNC)), {"data": "mc"}),
    ("read", lambda at: (at / "data").read_bytes(), {}),
    ("chmod", lambda at: (at / "data").chmod(0o600), {"data": "c"}),
    ("chmod of a directory", lambda at: (at / "sub").chmod(0o700), {"sub": "c"}),
    ("chown", lambda at: os.chown(at / "data", os.getuid(), os.getgid()), {"data": "c"}),
    ("chown to nobody", lambda at: os.chown(at / "data", -1, -1), {"data": "c"}),
    ("utimes", lambda at: os.utime(at / "data", ns=(5, times(at / "data")["mtime"])), {"data": "c"}),
    ("create", lambda at: (at / "new").touch(), {".": "mc"}),
    ("open what is there", lambda at: os.close(os.open(at / "data", os.O_CREAT | os.O_RDWR)), {}),
    ("mkdir", lambda at: (at / "new").mkdir(), {".": "mc"}),
    ("mkfifo", lambda at: os.mkfifo(at / "new"), {".": "mc"}),
    ("symlink", lambda at: (at / "new").symlink_to("x"), {".": "mc"}),
    ("link", lambda at: os.link(at / "data", at / "new"), {".": "mc", "data": "c"}),
    ("unlink", lambda at: os.unlink(at / "small"), {".": "mc"}),
    ("unlink one of two names", lambda at: os.unlink(at / "twin b"), {".": "mc", "twin a": "c"}),
    ("rmdir", lambda at: [(at / "sub" / "leaf").unlink(), (at / "sub").rmdir()], {".": "mc"}),
    ("rename", lambda at: os.rename(at / "data", at / "new"), {".": "mc", "data": "c"}),
    ("rename over", lambda at: os.rename(at / "twin a", at / "data"), {".": "mc", "twin a": "c", "twin b": "c"}),
    ("rename of a directory", lambda at: os.rename(at / "sub", at / "new"), {".": "mc", "sub": "c"}),
    ("rename to another directory", lambda at: os.rename(at / "data", at / "sub" / "new"),
     {".": "mc", "sub": "mc", "data": "c"}),
]  # fmt: skip


@pytest.mark.parametrize(("act", "expected"), [each[1:] for each in CHANGES], ids=[each[0] for each in CHANGES])
def test_what_changes_what(place: Place, act: Callable[[Path], object], expected: dict[str, str]) -> None:
    names = (".", "data", "small", "sub", "link", "twin a", "twin b")
    before = {os.lstat(place.path / name).st_ino: times(place.path / name) for name in names}
    numbers = {name: os.lstat(place.path / name).st_ino for name in names}
    time.sleep(TICK_S)
    act(place.path)
    after = {os.lstat(path).st_ino: times(path) for path in (place.path, *place.path.rglob("*"))}
    for name in names:
        if numbers[name] not in after:
            continue  # removed
        one, other = before[numbers[name]], after[numbers[name]]
        changed = "".join(each[0] for each in ("mtime", "ctime") if one[each] != other[each])
        assert changed == expected.get(name, "c" if name == "twin b" and "twin a" in expected else ""), name
        assert all(other[each] > one[each] for each in ("mtime", "ctime") if each[0] in changed), name


def test_a_new_file_has_one_time(place: Place) -> None:
    began = time.time_ns() - 10**8
    (place.path / "new").mkdir()
    (place.path / "new" / "file").touch()
    for path in (place.path / "new" / "file",):
        found = times(path)
        assert found["ctime"] >= found["mtime"] >= began
        assert found["ctime"] - found["atime"] < 10**9
