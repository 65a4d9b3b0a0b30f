"""kill -9 at each step of push, evict, hydrate, rename and publish, and at any moment, while a writer writes: what was
acknowledged is there in the next mount, and from the store alone when this machine's state is gone.

The journal of what was acknowledged is kept outside (`writing.py`). A round in which nothing was waiting to be pushed
at the kill shows nothing, and fails.
"""

import contextlib
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.crash.writing import Acknowledged, acknowledged, fill
from tests.mounted.records import Record, Shared, ask, until
from tests.mounted.trouble import empty_project
from tests.mounting import ROOT, Mounted
from tests.mounts import fuse_mounts, unmount, unmount_under

pytestmark = pytest.mark.mounted
ROUND_LIMIT_S = 60.0
ENOUGH = 8  # changes acknowledged before anything is killed
SEED = 7
RANDOM_ROUNDS = int(os.environ.get("CRASH_ROUNDS", "3"))
# What is asked for while the writer writes, and the points that it passes.
POINTS = {
    "evict": ("proven", "leased", "built", "linked", "intended", "exchanged", "entered", "receipted", "unnamed#2",
              "discarded"),
    "push": ("scanned", "read", "uploaded", "recorded", "kept", "published"),
    "hydrate": ("hydrate.read", "cache.filled", "cache.save.synced", "cache.save.marked"),
    "drop": ("cache.drop.marked", "cache.drop.punched"),
    "restore": ("hydrated", "intended", "copied", "entered", "unlinked", "exchanged"),
    "write": ("file.synced#9", "cache.changed", "name.intended", "name.renamed"),
}  # fmt: skip


class Crashing:
    """A mount with two records that a writer writes to, one resident and one evicted at the start, and one of which
    things are asked."""

    def __init__(self, place: Path) -> None:
        options = ("-o", "push.auto=false", "-o", "cache.high=none")
        self.place = place
        self.arm("")
        self.shared = Shared(place, 3, options)
        self.mounted: Mounted = self.shared.mounted
        self.mounted.environment["RUNFS_FAULT"] = f"@{place}/fault"
        self.journal = place / "acknowledged"
        self.seen = 0
        self.known: dict[str, Acknowledged] = {}
        self.rounds = 0
        self.writers: list[subprocess.Popen[bytes]] = []
        with self.mounted:
            self.written = [self.shared.take("resident", fill), self.shared.take("evicted", fill)]
            self.asked = self.shared.take("resident")
            ask(self.mounted, "push")
        self.seed = SEED

    # --- one round -----------------------------------------------------------------------------------------------

    def start(self) -> None:
        self.arm("")
        self.mounted.start()

    def arm(self, fault: str) -> None:
        """Have the daemon die where this says (`vfs/faults.py`)."""
        (self.place / "fault.new").write_text(fault)
        (self.place / "fault.new").rename(self.place / "fault")

    def write(self) -> subprocess.Popen[bytes]:
        """Begin to write, and wait until something was acknowledged."""
        self.seed += 1
        self.journal.write_bytes(b"")
        directories = [str(each.path) for each in self.written]
        writer = subprocess.Popen(
            [sys.executable, "-m", "tests.crash.writing", str(self.journal), str(self.seed), *directories], cwd=ROOT
        )
        self.writers.append(writer)
        until(lambda: self.journal.read_bytes().count(b"done") >= ENOUGH or not self.running, "it writes", 30)
        return writer

    @property
    def running(self) -> bool:
        return self.mounted.process is not None and self.mounted.process.poll() is None

    def over(self, writer: subprocess.Popen[bytes]) -> None:
        """The daemon was killed: the writer ends, something was pending, and the next mount has all of it."""
        assert self.mounted.process is not None
        assert self.mounted.process.wait(ROUND_LIMIT_S) == -signal.SIGKILL
        # Our processes that wait for the dead one go on when it is gone; its mount is still there and answers nothing.
        assert writer.wait(30) == 3
        pending = self.pending()
        assert pending & {each.uuid for each in self.written}, "nothing was pending at the kill: this shows nothing"
        self.mounted.process = None
        for mount in fuse_mounts():
            if mount.path == self.mounted.path:
                unmount(mount)
        for each in [*self.written, self.asked]:  # no mount: whole in its own directory, or a link that leads nowhere
            assert each.working.is_symlink() or (each.working / "id.json").exists()
            assert each.working.is_symlink() or not list(each.working.glob(".runfs*"))
        acknowledged(self.journal.read_text().splitlines(), self.seed, self.known)
        self.rounds += 1

    def pending(self) -> set[str]:
        connection = sqlite3.connect(next(self.place.glob("s/**/journal.sqlite")))
        try:
            return {row[0] for row in connection.execute("SELECT uuid FROM dirty")}
        finally:
            connection.close()

    def compare(self, at: dict[str, Path] | None = None) -> None:
        """What was acknowledged is there; what was under way at the kill counts as it came out."""
        for directory, known in self.known.items():
            place = Path(directory) if at is None else at[directory]
            assert not (said := known.wrong(place)), said
            if at is None:
                known.settle(place)
        if at is None:
            self.asked.same()

    # --- from the store alone ------------------------------------------------------------------------------------

    def from_the_store(self) -> None:
        """Everything of this machine is gone: index, records, state and cache."""
        until(lambda: ask(self.mounted, "push")["exit"] == 0, "all is pushed", 40)
        assert self.mounted.umount().returncode == 0
        self.mounted.stop()
        for name in ("s", "c", "project"):
            shutil.rmtree(self.place / name)
        other = Mounted(
            empty_project(self.place / "other"),
            self.place / "mnt2",
            stores=[self.shared.store.as_uri()],
            environment={key: value for key, value in self.mounted.environment.items() if key != "RUNFS_MOUNT"},
        )
        with other:
            other.json("reindex", "--from", self.shared.store.as_uri())
            self.compare({str(each.path): other.path / each.uuid for each in self.written})
            Record(other, self.asked.uuid, other.path / self.asked.uuid, Path(), self.asked.plain, "").same()


@pytest.fixture(scope="module")
def crashing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crashing]:
    place = tmp_path_factory.mktemp("crash")
    made = Crashing(place)
    made.start()
    yield made
    for writer in made.writers:  # one of a round that failed may still be at it
        writer.kill()
    made.mounted.stop()
    unmount_under(place)


def prepare(crashing: Crashing, command: str) -> None:
    """Let the record be in the state in which the command has something to do."""
    asked = [crashing.asked.uuid]
    wanted = "resident" if command in ("evict", "push", "write") else "evicted"
    if wanted == "resident" and crashing.asked.working.is_symlink():
        assert ask(crashing.mounted, "hydrate", uuids=asked, restore=True)["exit"] == 0
    if wanted == "evicted":
        crashing.asked.evict()
    if command == "drop":
        assert ask(crashing.mounted, "hydrate", uuids=asked)["exit"] == 0
    if command == "push":
        for directory in (crashing.asked.path, crashing.asked.plain):
            (directory / "pushed").write_bytes(b"%d" % crashing.rounds * 40_000)
    crashing.written[1].evict()  # so that the writer writes over what is away


def request(crashing: Crashing, command: str) -> threading.Thread:
    """Ask for it and do not wait: it does not come back. What was refused is asked again: the kernel tells of a close a
    moment later, and until then a file of the record counts as open."""
    words = {"drop": "evict", "restore": "hydrate", "write": "status"}
    arguments = {"paths" if command == "write" else "uuids": [crashing.asked.uuid]}
    more = {"restore": True} if command == "restore" else {}

    def run() -> None:
        with contextlib.suppress(Exception):
            while ask(crashing.mounted, words.get(command, command), **arguments, **more).get("exit"):
                time.sleep(0.05)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("command", POINTS)
def test_killed_at_each_step(crashing: Crashing, command: str) -> None:
    for point in POINTS[command]:
        name = point if "." in point else f"{command}.{point}"
        prepare(crashing, command)
        if command == "write":  # the writer itself passes these, some only with its first change
            crashing.arm(f"{name}=kill")
        writer = crashing.write()
        crashing.arm(f"{name}=kill")
        asking = request(crashing, command)
        crashing.over(writer)
        asking.join(30)
        crashing.start()
        crashing.compare()


def test_killed_at_any_moment(crashing: Crashing) -> None:
    """While the record is pushed, evicted, hydrated and restored again and again."""
    waits = random.Random(time.time_ns())
    for _round in range(RANDOM_ROUNDS):
        prepare(crashing, "evict")
        writer = crashing.write()
        end = time.monotonic() + waits.random() * 2
        asking = []
        for command in ("evict", "hydrate", "push", "restore", "evict"):
            asking.append(request(crashing, command))
            time.sleep(max(0.0, min(0.5, end - time.monotonic())))
        os.kill(crashing.mounted.pid, signal.SIGKILL)
        crashing.over(writer)
        for each in asking:
            each.join(30)
        crashing.start()
        crashing.compare()


def test_from_the_store_alone(crashing: Crashing) -> None:
    """The last of this module: what was acknowledged in all the rounds before, pushed, on another machine."""
    if not crashing.rounds:
        writer = crashing.write()
        os.kill(crashing.mounted.pid, signal.SIGKILL)
        crashing.over(writer)
        crashing.start()
        crashing.compare()
    assert sum(each.count for each in crashing.known.values()) >= ENOUGH * crashing.rounds
    crashing.from_the_store()
