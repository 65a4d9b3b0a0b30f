"""Where the POSIX tests run: on the native file system as the control, in a resident and in an evicted record of a real
mount. Each test gets a directory of its own; the evicted record's were there when it was evicted, so their larger files
are placeholders.

Used through the fixture `place` of conftest.py.
"""

import ctypes
import os
import platform
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from tests.mounted.records import KEEP_SMALL, Record, Shared

T = TypeVar("T")
STATES = ("native", "resident", "evicted")
DIRECTORIES = 130  # more than the tests take
DATA = KEEP_SMALL + 40_000  # bytes of `data`: more than what is kept
SOMEBODY, SOMEBODY_ELSE = 65_533, 65_532  # nobody's uids
_CALLS = {"x86_64": (117, 119, 116), "aarch64": (147, 149, 159)}  # setresuid, setresgid, setgroups
_libc = ctypes.CDLL(None, use_errno=True)


def data_bytes() -> bytes:
    """The content of `data`."""
    return random.Random(5).randbytes(DATA)


def fill(directory: Path) -> None:
    """What each test finds: `data`, which an eviction takes away, `small`, which it keeps, names of each kind."""
    directory.mkdir()
    (directory / "data").write_bytes(data_bytes())
    (directory / "small").write_bytes(b"one\ntwo\n")
    (directory / "link").symlink_to("small")
    (directory / "twin a").write_bytes(data_bytes()[::-1])
    os.link(directory / "twin a", directory / "twin b")
    (directory / "sub").mkdir()
    (directory / "sub" / "leaf").write_bytes(data_bytes()[:KEEP_SMALL] + b"leaf")


def fill_record(record: Path) -> None:
    for number in range(DIRECTORIES):
        fill(record / f"{number:03}")


@dataclass(frozen=True)
class Place:
    """A test's directory. `other` is another one in the same record."""

    path: Path
    state: str
    free: list[Path]

    @cached_property
    def other(self) -> Path:
        return self.free.pop()

    @property
    def native(self) -> bool:
        return self.state == "native"


class Arena:
    """One mount and its records, from which tests take their places."""

    def __init__(self, directory: Path) -> None:
        options = ("-o", "push.auto=false", *(("--allow-other",) if os.geteuid() == 0 else ()))
        self.shared = Shared(directory, 16, options)
        self._free: dict[str, list[Path]] = {}

    def take(self, state: str) -> Place:
        free = self._free.get(state)
        if free is None:
            self._free[state] = free = self._fill(state)
        assert len(free) >= 2, "more tests than directories: raise DIRECTORIES"
        return Place(free.pop(), state, free)

    def _fill(self, state: str) -> list[Path]:
        if state == "native":
            root = self.shared.place / "native"
            root.mkdir()
            fill_record(root)
        else:
            root = self.record(state).path
        return [root / f"{number:03}" for number in range(DIRECTORIES)]

    def record(self, state: str, make: Callable[[Path], object] = fill_record) -> Record:
        """A record for one test alone."""
        return self.shared.take(state, make)


def as_user(uid: int, gid: int, act: Callable[[], T], groups: tuple[int, ...] = ()) -> T:
    """What `act` gives when another user does it, in a thread that becomes this user for good (root only)."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            _become(uid, gid, groups)
            results.append(act())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    assert not thread.is_alive(), "it hangs"
    if errors:
        raise errors[0]
    return results[0]


def _become(uid: int, gid: int, groups: tuple[int, ...]) -> None:
    """By system calls: the functions of the C library change all threads of a process."""
    set_uid, set_gid, set_groups = _CALLS[platform.machine()]
    numbers = (ctypes.c_uint32 * max(len(groups), 1))(*groups)
    for call in ((set_groups, len(groups), numbers), (set_gid, gid, gid, gid), (set_uid, uid, uid, uid)):
        if _libc.syscall(*call) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def can_be_somebody() -> bool:
    return os.geteuid() == 0 and platform.machine() in _CALLS
