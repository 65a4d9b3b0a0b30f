"""Works on names and indexes: listings of a large root, starting with a very large index, and cost as work grows.

Used by `__main__`. The rows are copies of a real one, their directories are there and hold little.
"""

import itertools
import os
import shutil
import statistics
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from tests import projects
from tests.bench.samples import Work, clock
from tests.bench.systems import drop_caches
from tests.mounted.test_scale import grow, insert, name_of
from tests.mounting import Mounted

if TYPE_CHECKING:
    from tests.bench.__main__ import Bench

LONG = Work("ls -l of the root, {count:,} records", "s", "less", "native", 1 / 1.3)
FIND = Work("find -type f of the root, {count:,} records", "s", "less", "native", 1 / 1.3)
PLAIN = Work("ls -f of the root, {count:,} records", "s", "less", "native", 1 / 8)
ENTER = Work("index of {count:,}: mount to ls of a record", "s", "less", "runfs")
ENTRIES = Work("index of {count:,}: mount to the first entries of the root", "s", "less", "runfs")
MEMORY = Work("index of {count:,}: memory of the idle daemon", "MB", "less", "runfs")
GROWTH = Work("growth", "ms", "less", "runfs")


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
        """Only directories that are entered are there: making a million would take longer than everything else."""
        source, storage = self.project.directory(self.project.runs[0]), self.project.path / "many"
        insert(self.project, range(count), storage)
        for number in (0, count // 2):
            target = storage / f"{number // 1000:03}" / name_of(number)
            shutil.copytree(source, target)
            text = (target / "id.json").read_text()
            (target / "id.json").write_text(text.replace(self.project.runs[0], name_of(number)))

    def memory(self) -> float:
        lines = Path(f"/proc/{self.mounted.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1000 for line in lines if line.startswith("VmRSS:"))


def _named(work: Work, count: int) -> Work:
    return Work(work.name.format(count=count), work.unit, work.better, work.against, work.reach)


def listings(bench: "Bench", number: int) -> None:
    """A root with many records, listed in three ways; the same of an equal directory of the local file system."""
    count = bench.records
    large = bench.kept("listings", lambda place: Large(place, count, directories=True))
    if large.mounted.process is None:
        large.mounted.start()
    native = bench.place / "equal"
    if not native.exists():
        native.mkdir()
        for each in range(count):
            (native / name_of(each)).mkdir()
    works = ((PLAIN, "ls -f {}"), (LONG, "ls -l {}"), (FIND, "find {} -maxdepth 1 -type f"))
    for work, command in works:
        for system, path in (("native", native), ("runfs", large.mounted.path)):
            drop_caches()
            with clock() as took:
                subprocess.run(command.format(path).split(), stdout=subprocess.DEVNULL, check=True)
            bench.add(_named(work, count), system, took[0])


def million(bench: "Bench", number: int) -> None:
    """A very large index: from `runfs mount` to a record, and to the first entries of the root."""
    count = bench.index
    large = bench.kept("million", lambda place: Large(place, count, directories=False))
    for work, look in ((ENTER, _enter), (ENTRIES, _first)):
        drop_caches()
        with clock() as took:
            large.mounted.start()
            look(large)
        bench.add(_named(work, count), "runfs", took[0])
        bench.add(_named(MEMORY, count), "runfs", large.memory())
        large.mounted.stop()


def _enter(large: Large) -> None:
    if not os.listdir(large.mounted.path / name_of(large.count // 2)):
        raise SystemExit("the record is empty")


def _first(large: Large) -> None:
    with os.scandir(large.mounted.path) as entries:
        if len(list(itertools.islice(entries, 1000))) != 1000:
            raise SystemExit("the listing is short")


def growth(bench: "Bench", number: int) -> None:
    """Look-up, open and first read as the number of records and of files in a record grow, for the plot."""
    if number:
        return
    for count in bench.growth:
        large = Large(bench.place / f"growth-{count}", count, directories=False)
        with large.mounted:
            record = large.mounted.path / name_of(count // 2)
            bench.grown("records", "look up, open and read a file", count, _touch(record / "metrics.json"))
            with clock() as took:
                _first_of(large, min(count, 1000))
            bench.grown("records", "first entries of the root", count, took[0] * 1e3)
    for files in bench.files:
        directory = bench.runfs.directory("growth") / f"{files}"
        directory.mkdir()
        for each in range(files):
            (directory / f"{each:06}").write_bytes(b"x")
        bench.grown(
            "files in a directory", "look up, open and read a file", files, _touch(directory / f"{files // 2:06}")
        )
        with clock() as took:
            os.listdir(directory)
        bench.grown("files in a directory", "list it", files, took[0] * 1e3)


def _first_of(large: Large, count: int) -> None:
    with os.scandir(large.mounted.path) as entries:
        list(itertools.islice(entries, count))


def _touch(path: Path) -> float:
    """Milliseconds to open a file and read its first bytes, the median of five."""
    found = []
    for _ in range(5):
        with clock() as took:
            path.read_bytes()[:1]
        found.append(took[0] * 1e3)
    return statistics.median(found)
