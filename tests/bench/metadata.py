"""Works on names and indexes: listings of a large root, starting with a very large index, and cost as work grows.

Used by `__main__`. The rows are copies of a real one, and the directories they name are there and hold little.
"""

import itertools
import os
import shutil
import statistics
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tests import projects
from tests.bench.samples import Work, clock
from tests.mounted.test_scale import grow, insert, name_of
from tests.mounting import Mounted

if TYPE_CHECKING:
    from tests.bench.__main__ import Bench

AGAIN = "the second time"
LONG = Work("ls -l of the root, {count:,} records", "s", "less", "native", 1 / 1.3)
FIND = Work("find -type f of the root, {count:,} records", "s", "less", "native", 1 / 1.3)
PLAIN = Work("ls -f of the root, {count:,} records", "s", "less", "native", 1 / 8)
ENTER = Work("index of {count:,}: mount to ls of a record", "s", "less", "runfs")
ENTRIES = Work("index of {count:,}: mount to the first entries of the root", "s", "less", "runfs")
MEMORY = Work("index of {count:,}: memory of the idle daemon", "MB", "less", "runfs")
LISTED = Work("index of {count:,}: memory after ls -l of the root", "MB", "less", "runfs")
_SETTLED_S = 0.5
_SIZES = (1000, 10**6, 10**9, 20 << 30)  # bytes of a sparse file


class Large:
    """A mounted index of so many records."""

    def __init__(self, place: Path, count: int, *, directories: bool) -> None:
        self.count = count
        self.project = projects.create(place / "project", [{"size": 1000}], report=False)
        if directories:
            grow(self.project, count)
        else:
            self._rows_only(count)
        environment = {f"RUNFS_{name}_DIR": str(place / name[0].lower()) for name in ("STATE", "CACHE", "RUNTIME")}
        environment["XDG_CONFIG_HOME"] = str(place / "config")
        self.mounted = Mounted(self.project, place / "mnt", environment=environment)

    def _rows_only(self, count: int) -> None:
        """A thousand rows share a directory: making a million would take longer than everything else. A listing looks
        at the directory of each row all the same. The record that is entered has its own."""
        source, storage = self.project.directory(self.project.runs[0]), self.project.path / "many"
        entered = count // 2
        for first, stop in ((0, entered), (entered + 1, count)):
            insert(self.project, range(first, stop), storage, shared=True)
        insert(self.project, range(entered, entered + 1), storage)
        for number in range(0, count, 1000):
            os.makedirs(storage / f"{number // 1000:03}", exist_ok=True)
        target = storage / f"{entered // 1000:03}" / name_of(entered)
        shutil.copytree(source, target)
        text = (target / "id.json").read_text()
        (target / "id.json").write_text(text.replace(self.project.runs[0], name_of(entered)))

    def directory(self) -> Path:
        """The record that is entered, through the mount."""
        return self.mounted.path / name_of(self.count // 2)

    def settle(self) -> None:
        """Wait until the daemon does nothing any more, for a minute at most."""
        end, before = time.monotonic() + 60, -1
        while (now := self._ticks()) != before and time.monotonic() < end:
            before = now
            time.sleep(_SETTLED_S)

    def _ticks(self) -> int:
        fields = Path(f"/proc/{self.mounted.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) // 5  # user and system time, in 50 ms

    def memory(self) -> float:
        lines = Path(f"/proc/{self.mounted.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1000 for line in lines if line.startswith("VmRSS:"))


def _named(work: Work, count: int) -> Work:
    return Work(work.name.format(count=count), work.unit, work.better, work.against, work.reach)


def listings(bench: "Bench", number: int) -> None:
    """A root with many records, listed in three ways, and an equal directory of the local file system.

    Like with like: directories here and there, their attributes in memory (what reading them from a cold disk costs is
    the disk's), no colours. For the first time after a mount, when the kernel knows nothing of it, and once more.
    """
    count = bench.records
    large = bench.kept("listings", lambda place: Large(place, count, directories=True))
    native = bench.place / "equal"
    if not native.exists():
        native.mkdir()
        for each in range(count):
            (native / name_of(each)).mkdir()
    works = ((PLAIN, "ls -f --color=never {}"), (LONG, "ls -l --color=never {}"), (FIND, FIND_COMMAND))
    for work, command in works:
        large.mounted.stop()
        large.mounted.start()
        large.settle()
        _timed(command, native)
        for when in ("", f", {AGAIN}"):
            named = replace(_named(work, count), name=_named(work, count).name + when)
            bench.add(named, "native", _timed(command, native))
            bench.add(named, "runfs", _timed(command, large.mounted.path))
    large.mounted.stop()


FIND_COMMAND = "find {} -maxdepth 1 -type f"


def _timed(command: str, path: Path) -> float:
    with clock() as took:
        subprocess.run(command.format(path).split(), stdout=subprocess.DEVNULL, check=True)
    return took[0]


def _rows(bench: "Bench", count: int) -> Large:
    return bench.kept(f"rows-{count}", lambda place: Large(place, count, directories=False))


def million(bench: "Bench", number: int) -> None:
    """A very large index: from `runfs mount` to a record, and to the first entries of the root; memory."""
    count = bench.index
    large = _rows(bench, count)
    for work, look in ((ENTER, _enter), (ENTRIES, _first)):
        with clock() as took:
            large.mounted.start()
            look(large)
        bench.add(_named(work, count), "runfs", took[0])
        large.settle()
        bench.add(_named(MEMORY, count), "runfs", large.memory())
        if look is _first:
            _timed("ls -l --color=never {}", large.mounted.path)
            bench.add(_named(LISTED, count), "runfs", large.memory())
        large.mounted.stop()


def _enter(large: Large) -> None:
    if not os.listdir(large.directory()):
        raise SystemExit("the record is empty")


def _first(large: Large) -> None:
    if _first_of(large, 1000) != 1000:
        raise SystemExit("the listing is short")


def growth(bench: "Bench", number: int) -> None:
    """Look-up, open and first read as records, files in a directory and bytes in a file grow, for the plot."""
    if number:
        return
    for count in bench.growth:
        large = _rows(bench, count)
        with large.mounted:
            large.settle()
            bench.grown("records", TOUCH, count, _touch(large.directory() / "metrics.json"))
            with clock() as took:
                _first_of(large, 1000)
            bench.grown("records", "first entries of the root", count, took[0] * 1e3)
            bench.grown("records", "list the root", count, _timed("ls -f {}", large.mounted.path) * 1e3)
    large = _rows(bench, bench.growth[0])  # no store: what is made here is pushed nowhere
    with large.mounted:
        for files in bench.files:
            directory = large.directory() / f"of {files}"
            directory.mkdir(exist_ok=True)
            for each in range(files):
                (directory / f"{each:06}").write_bytes(b"x")
            bench.grown("files in a directory", TOUCH, files, _touch(directory / f"{files // 2:06}"))
            with clock() as took:
                os.listdir(directory)
            bench.grown("files in a directory", "list it", files, took[0] * 1e3)
        for size in _SIZES:
            with (large.directory() / f"{size} bytes").open("wb") as file:
                file.truncate(size)
            bench.grown("bytes in a file", TOUCH, size, _touch(large.directory() / f"{size} bytes"))


TOUCH = "look up, open and read the first bytes"


def _first_of(large: Large, count: int) -> int:
    with os.scandir(large.mounted.path) as entries:
        return len(list(itertools.islice(entries, count)))


def _touch(path: Path) -> float:
    """Milliseconds to open a file and read its first bytes, the median of five."""
    found = []
    for _ in range(5):
        with clock() as took, path.open("rb", buffering=0) as file:
            file.read(1000)
        found.append(took[0] * 1e3)
    return statistics.median(found)
