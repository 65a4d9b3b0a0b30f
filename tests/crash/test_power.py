"""A power cut: a disk with all of runfs on it loses what was not flushed, and every acknowledged byte is there.

Project, state, cache and store are on an ext4 whose writes and flushes are recorded (`recorder.py`) while a writer
writes and a record is pushed, evicted, hydrated and restored. Then the disk is made as it may be after a cut at many
moments: what no flush covers is dropped, kept, or kept in part. ext4 and runfs recover from that, SQLite's files
included. POWER_CUTS=100 tries more of them.
"""

import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests import projects
from tests.crash.recorder import FLUSH, Log
from tests.crash.writing import acknowledged, fill
from tests.model.disks import need_disks
from tests.mounted.records import ask, clone, differences, tree, until
from tests.mounted.records import fill as fill_asked
from tests.mounting import ROOT, Mounted
from tests.mounts import is_fuse_mount, unmount_under
from tests.projects import Project

pytestmark = pytest.mark.mounted
MIB = 1 << 20
DISK_MIB = 96
CUTS = int(os.environ.get("POWER_CUTS", "6"))
SEED = 5
CHANGES = 60  # acknowledged while the writes are recorded


class Powered:
    """A small project with runfs's state, cache and store on one recorded disk."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.disk = place / "disk"
        self.image, self.base, self.log = place / "image", place / "base", place / "log"
        self.lines = place / "acknowledged"
        self._stack = ExitStack()
        self.disk.mkdir()

    # --- recording -----------------------------------------------------------------------------------------------

    def record(self) -> None:
        """Make the disk, and record what is written to it while a writer and runfs work."""
        with self.image.open("wb") as file:
            file.truncate(DISK_MIB * MIB)
        subprocess.run(["mkfs.ext4", "-q", "-m", "0", "-E", "lazy_itable_init=0", str(self.image)], check=True)
        self._mount(self.image)
        self._make()
        self._unmount()
        shutil.copyfile(self.image, self.base)
        with ExitStack() as stack:
            stack.enter_context(self._recording())
            self._mount(self.place / "recorded" / "disk")
            stack.callback(self._unmount)
            with self.mounted:
                self._work()
                self.mounted.kill()

    def _make(self) -> None:
        self.project: Project = projects.create(self.disk / "project", [{"size": 1000}], report=False)
        self.one, self.other, self.asked = clone(self.project, 3)
        environment = {f"RUNFS_{name}_DIR": str(self.disk / name) for name in ("STATE", "CACHE")}
        environment |= {"RUNFS_RUNTIME_DIR": str(self.place / "r"), "XDG_CONFIG_HOME": str(self.place / "config")}
        store = (self.disk / "store").as_uri()
        options = ("-o", "push.quiet_s=0.1", "-o", "push.every_s=1", "-o", "cache.high=none")
        self.mounted = Mounted(
            self.project, self.place / "mnt", stores=[store], options=options, environment=environment
        )
        for uuid in (self.one, self.other):
            fill(self.project.directory(uuid))
        fill_asked(self.project.directory(self.asked))
        self.plain = tree(self.project.directory(self.asked))
        with self.mounted:
            until(lambda: ask(self.mounted, "evict", uuids=[self.other])["exit"] == 0, "evicted", 30)

    def _recording(self) -> ExitStack:
        stack = ExitStack()
        at = self.place / "recorded"
        at.mkdir()
        command = [sys.executable, "-m", "tests.crash.recorder", str(at), str(self.image), str(self.log)]
        recorder = subprocess.Popen(command, cwd=ROOT)

        def stop() -> None:
            unmount_under(at)
            recorder.wait(20)

        stack.callback(stop)
        until(lambda: is_fuse_mount(at) and (at / "disk").exists(), "the recorder answers", 30)
        return stack

    def _work(self) -> None:
        directories = [str(self.mounted.path / uuid) for uuid in (self.one, self.other)]
        command = [sys.executable, "-m", "tests.crash.writing", str(self.lines), str(SEED), *directories]
        environment = {**os.environ, "POSITION_IN": str(self.log)}
        with subprocess.Popen(command, cwd=ROOT, env=environment) as writer:
            over = threading.Event()
            thread = threading.Thread(target=self._ask, args=(over,))
            thread.start()
            try:
                until(lambda: self.lines.exists() and self.lines.read_bytes().count(b"done") >= CHANGES, "written", 60)
            finally:
                writer.kill()
                over.set()
                thread.join(60)

    def _ask(self, over: threading.Event) -> None:
        while not over.is_set():
            for command, more in (("evict", {}), ("hydrate", {}), ("evict", {}), ("hydrate", {"restore": True})):
                ask(self.mounted, command, uuids=[self.asked], **more)

    def _mount(self, source: Path) -> None:
        subprocess.run(["mount", "-o", "loop", str(source), str(self.disk)], check=True)

    def _unmount(self) -> None:
        subprocess.run(["umount", str(self.disk)], check=True)

    # --- after the cut -------------------------------------------------------------------------------------------

    def acknowledged_by(self, position: int) -> list[str]:
        """What had been told by the time at which the log was so long."""
        with_positions = (line.rsplit(" ", 1) for line in self.lines.read_text().splitlines())
        return [line for line, told in with_positions if int(told) <= position]

    def after(self, log: Log, number: int, chance: float) -> tuple[int, str]:
        """Cut the power after so many events; how much that lost, and what is wrong then: '' when nothing is."""
        lost = log.cut(number, self.image, chance, number)
        known = acknowledged(self.acknowledged_by(log.events[number - 1].end), SEED)
        self._mount(self.image)
        try:
            with self.mounted:
                for directory, each in known.items():
                    if said := each.wrong(Path(directory)):
                        return lost, said
                different = differences(tree(self.mounted.path / self.asked), self.plain)
                if different:
                    return lost, str(different)
        finally:
            self.mounted.stop()
            self._unmount()
        return lost, ""


@pytest.fixture(scope="module")
def powered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Powered, Log]]:
    need_disks()
    place = tmp_path_factory.mktemp("power")
    made = Powered(place)
    try:
        made.record()
        yield made, Log(made.base, made.log)
    finally:
        unmount_under(place)
        subprocess.run(["umount", "-l", str(made.disk)], check=False, capture_output=True)


def test_acknowledged_bytes_survive_a_power_cut(powered: tuple[Powered, Log]) -> None:
    made, log = powered
    assert len(log.flushes()) > CHANGES, "almost nothing was flushed: this shows nothing"
    luck = random.Random(SEED)
    lost = 0
    ends = {event.end: number + 1 for number, event in enumerate(log.events)}
    told = [int(line.rsplit(" ", 1)[1]) for line in made.lines.read_text().splitlines() if '"done"' in line]
    for number in range(CUTS):
        # Right after an answer, where the least has been written since; or anywhere.
        moment = ends[luck.choice(told)] if number % 3 != 2 else luck.randrange(len(log.events) // 4, len(log.events))
        gone, said = made.after(log, moment, (0.0, 0.5, 0.0, 1.0)[number % 4])
        lost += gone
        assert not said, f"after event {moment} of {len(log.events)}: {said}"
    assert lost, "nothing was lost in any of these cuts: this shows nothing"


def test_a_disk_that_lies_is_noticed(powered: tuple[Powered, Log]) -> None:
    """The test can fail: with a disk that forgets its last flushes, what was acknowledged is missing."""
    made, log = powered
    half = next(n for n, event in enumerate(log.events) if event.kind == FLUSH and n > len(log.events) // 2)
    log.events[half:-1] = []
    _lost, said = made.after(log, len(log.events), 0.0)
    assert said
