"""Reading directories is as on the native file system: each entry that stays is seen once, whatever comes and goes."""

import ctypes
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.posix.places import Arena, Place, fill

pytestmark = pytest.mark.mounted
MANY = 100_000
NAMES = frozenset({".", "..", "data", "link", "small", "sub", "twin a", "twin b"})


class Dirent(ctypes.Structure):
    """struct dirent of readdir(3) on 64-bit Linux."""

    _fields_ = (
        ("ino", ctypes.c_uint64),
        ("off", ctypes.c_int64),
        ("reclen", ctypes.c_uint16),
        ("type", ctypes.c_uint8),
        ("name", ctypes.c_char * 256),
    )


_libc = ctypes.CDLL(None, use_errno=True)
_libc.opendir.restype = ctypes.c_void_p
_libc.readdir.restype = ctypes.POINTER(Dirent)
_libc.telldir.restype = ctypes.c_long
_libc.seekdir.argtypes = [ctypes.c_void_p, ctypes.c_long]
for _function in (_libc.readdir, _libc.telldir, _libc.rewinddir, _libc.closedir):
    _function.argtypes = [ctypes.c_void_p]


class Stream:
    """An open directory, as the C library has it."""

    def __init__(self, path: Path) -> None:
        self.pointer = _libc.opendir(os.fsencode(path))
        assert self.pointer, os.strerror(ctypes.get_errno())

    def next(self) -> tuple[str, int, int] | None:
        """Name, inode number and type of the next entry."""
        found = _libc.readdir(self.pointer)
        return (os.fsdecode(found[0].name), found[0].ino, found[0].type) if found else None

    def rest(self) -> list[str]:
        return [entry[0] for entry in iter(self.next, None)]

    def tell(self) -> int:
        return int(_libc.telldir(self.pointer))

    def seek(self, position: int) -> None:
        _libc.seekdir(self.pointer, position)

    def rewind(self) -> None:
        _libc.rewinddir(self.pointer)


@contextmanager
def stream(path: Path) -> Iterator[Stream]:
    opened = Stream(path)
    try:
        yield opened
    finally:
        _libc.closedir(opened.pointer)


def test_what_an_entry_says(place: Place) -> None:
    with stream(place.path) as entries:
        found = {entry[0]: entry[1:] for entry in iter(entries.next, None)}
    assert set(found) == NAMES
    for name, (number, kind) in found.items():
        status = os.lstat(place.path / name)
        assert (number, kind) == (status.st_ino, stat.S_IFMT(status.st_mode) >> 12), name


def test_the_mountpoint_has_dots(arena: Arena) -> None:
    root = arena.shared.mounted.path
    with stream(root) as entries:
        assert [entry[0] for entry in (entries.next(), entries.next()) if entry] == [".", ".."]
        rest = entries.rest()
    assert len(rest) == len(set(rest)) == len(os.listdir(root))


def test_positions(place: Place) -> None:
    """telldir and seekdir, also back and forth, and after the end."""
    with stream(place.path) as entries:
        positions, names = [entries.tell()], []
        while (entry := entries.next()) is not None:
            names.append(entry[0])
            positions.append(entries.tell())
        assert set(names) == NAMES
        for number in (3, 0, len(names), 5, 1):
            entries.seek(positions[number])
            assert entries.rest() == names[number:]
        (place.path / "new").touch()
        entries.rewind()
        assert set(entries.rest()) == NAMES | {"new"}


def test_while_entries_come_and_go(place: Place) -> None:
    many = place.path / "many"
    many.mkdir()
    stays, goes = [{f"{what} {number} {'x' * 200}" for number in range(120)} for what in ("stays", "goes")]
    for name in stays | goes:
        (many / name).touch()
    with stream(many) as entries:
        listed = [entry[0] for entry in (entries.next() for _ in range(30)) if entry]
        for name in goes:
            os.unlink(many / name)
            (many / name.replace("goes", "comes")).touch()
        listed += entries.rest()
    assert len(listed) == len(set(listed))
    assert stays <= set(listed)
    assert set(os.listdir(many)) == stays | {name.replace("goes", "comes") for name in goes}


def test_removing_what_is_listed(place: Place) -> None:
    """As rm -r does it."""
    many = place.path / "many"
    many.mkdir()
    for number in range(300):
        (many / f"{number} {'x' * 150}").touch()
    with os.scandir(many) as entries:
        for entry in entries:
            os.unlink(entry)
    many.rmdir()


def test_a_hundred_thousand_entries(arena: Arena) -> None:
    record = arena.record("resident", lambda directory: fill(directory / "one"))
    (record.working / "many").mkdir()
    for number in range(MANY):
        os.mknod(record.working / "many" / f"{number}")
    many = record.path / "many"
    (many / "5").unlink()
    (many / "new").touch()
    assert os.stat(many / "99999").st_size == 0
    assert set(os.listdir(many)) == {f"{number}" for number in range(MANY)} - {"5"} | {"new"}
