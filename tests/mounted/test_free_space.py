"""Making room: what goes by itself and on request, in which order, and what never goes.

On real mounts whose project and cache are on a disk of 256 MB in memory, so root is needed. The store is elsewhere.
"""

import os
import sqlite3
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests import projects
from tests.mounted.records import ask, clone, until
from tests.mounted.trouble import lines, sentence, small_disk
from tests.mounting import Mounted
from tests.projects import Project

pytestmark = pytest.mark.mounted
MIB = 1 << 20
BIG = 12 * MIB  # bytes of each record's file; ten records take 120 of 256 MB
DAY_S = 86_400


class Room:
    """A small disk with a project of ten records on it, oldest first in `uuids`: a day between each and the next."""

    def __init__(self, place: Path, disk: Path) -> None:
        self.disk = disk
        self.store = place / "store"
        self.project: Project = projects.create(disk / "project", [{"size": 1000}], report=False)
        self.uuids = [*self.project.runs, *clone(self.project, 9)]
        for uuid in self.uuids:
            (self.project.directory(uuid) / "big.bin").write_bytes(os.urandom(BIG))
        self.age(self.uuids)
        environment = {f"RUNFS_{name}_DIR": str(disk / name.lower()) for name in ("STATE", "CACHE")}
        environment |= {"RUNFS_RUNTIME_DIR": str(place / "r"), "XDG_CONFIG_HOME": str(place / "config")}
        self.mounted = Mounted(self.project, place / "mnt", stores=[self.store.as_uri()], environment=environment)

    def age(self, uuids: list[str]) -> None:
        """Let the first of these be changed longest ago: a day less for each that follows, the last one a day ago."""
        now = time.time_ns()
        connection = sqlite3.connect(self.project.index)
        with connection:
            for number, uuid in enumerate(reversed(uuids), 1):
                changed = now - number * DAY_S * 10**9
                connection.execute('UPDATE "index" SET updated_at_ns = ? WHERE record_id = ?', (changed, uuid))
        connection.close()

    def evicted(self) -> set[str]:
        return {uuid for uuid in self.uuids if self.project.directory(uuid).is_symlink()}

    def free(self) -> int:
        room = os.statvfs(self.disk)
        return room.f_bavail * room.f_frsize

    def restore(self) -> None:
        """Everything back in its own directory, nothing pinned, and all of it in the store."""
        ask(self.mounted, "unpin", uuids=self.uuids)
        assert ask(self.mounted, "hydrate", uuids=self.uuids, restore=True)["exit"] == 0
        assert ask(self.mounted, "push")["exit"] == 0
        assert self.evicted() == set()


@pytest.fixture(scope="module")
def _room(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Room]:
    place = tmp_path_factory.mktemp("room")
    with small_disk(place / "disk", "256m") as disk:
        made = Room(place, disk)
        with made.mounted:
            yield made


@pytest.fixture
def room(_room: Room) -> Room:
    _room.restore()
    return _room


def planned(room: Room, *arguments: str) -> list[str]:
    """What a dry run says would go, in its order; nothing goes."""
    before = room.evicted()
    plan = room.mounted.json("evict", *arguments, "--dry-run", exit_code=None)
    assert plan["dry_run"]
    assert room.evicted() == before
    return [each["uuid"] for each in plan["evicted"]]


def test_until_free_takes_the_oldest_and_no_more_than_needed(room: Room) -> None:
    wanted = room.free() + 2 * BIG + MIB  # two are not enough
    plan = planned(room, "--until-free", str(wanted))
    assert plan == room.uuids[:3]
    done = room.mounted.json("evict", "--until-free", str(wanted))
    assert [each["uuid"] for each in done["evicted"]] == plan
    assert room.evicted() == set(plan)
    assert room.free() >= wanted
    assert lines(room.mounted.runfs("evict", "--until-free", str(wanted)), 0) == ["nothing to evict"]


def test_use_through_the_mount_counts(room: Room) -> None:
    oldest, second, *_others = room.uuids
    (room.mounted.path / oldest / "big.bin").read_bytes()
    wanted = room.free() + MIB
    until(lambda: planned(room, "--until-free", str(wanted)) == [second], "the record just read is not the first")


def test_more_than_there_is_to_free(room: Room) -> None:
    done = room.mounted.runfs("evict", "--until-free", "100G")
    assert done.returncode == 1, done.stdout
    assert room.evicted() == set(room.uuids)
    assert "10 records: evicted" in done.stdout


def test_older_than(room: Room) -> None:
    plan = planned(room, "--older-than", "7.5d")
    assert sorted(plan) == sorted(room.uuids[:3])
    room.mounted.json("evict", "--older-than", "7.5d")
    assert room.evicted() == set(plan)


def test_where(room: Room) -> None:
    expression = "age>4.5d and size>1M and kind=Interface"
    plan = planned(room, "--where", expression)
    assert set(plan) == set(room.uuids[:6])
    room.mounted.json("evict", "--where", expression)
    assert room.evicted() == set(plan)
    said = sentence(room.mounted.runfs("evict", "--where", "szie>1M"), 2)
    assert "did you mean size" in said


def test_pinned_live_and_open_records_stay(room: Room) -> None:
    """They are the oldest; each is named with its reason, and the next ones go in their place."""
    pinned, live, opened, mapped, *others = room.uuids
    room.mounted.json("pin", pinned)
    working = room.project.directory(live)
    held = list(working.rglob("finished_at"))
    away = [path.rename(path.with_name("put-away")) for path in held]
    beat = away[0].with_name("heartbeat_at")
    before = beat.read_text()
    beat.write_text(datetime.now(tz=UTC).isoformat())
    in_use = (room.project.directory(opened), room.mounted.path / mapped)
    try:
        with (in_use[0] / "big.bin").open("rb"), (in_use[1] / "big.bin").open("rb"):
            done = room.mounted.json("evict", "--all", exit_code=None)
    finally:
        beat.write_text(before)
        for path in away:
            path.rename(path.with_name("finished_at"))
    assert {each["uuid"] for each in done["evicted"]} == set(others)
    stay = {each["uuid"]: each["reason"] for each in done["stay"]}
    assert stay[pinned] == "pinned"
    assert stay[live].startswith("live")
    assert "open in " in stay[opened]
    assert stay[mapped] == "open through the mount"
    assert room.evicted() == set(others)


def test_what_the_store_does_not_take_stays(room: Room) -> None:
    """Nothing unpushed goes, however full the disk is."""
    oldest, second, *_others = room.uuids
    (room.project.directory(oldest) / "more.bin").write_bytes(b"only here")
    room.store.rename(room.store.with_name("away"))
    try:
        done = room.mounted.json("evict", "--until-free", "100G", exit_code=1)
    finally:
        room.store.with_name("away").rename(room.store)
    assert done["evicted"] == []
    reasons = {each["uuid"]: each["reason"] for each in done["stay"]}
    assert "is the disk mounted?" in reasons[oldest]
    assert "is the disk mounted?" in reasons[second]
    assert room.evicted() == set()
    assert (room.mounted.path / oldest / "more.bin").read_bytes() == b"only here"


def test_watermarks(room: Room) -> None:
    """Above the high one the oldest go by themselves until the low one; what is pinned, open or newer stays."""
    pinned, opened, *_others = planned(room, "--until-free", "100G")
    room.mounted.json("pin", pinned)
    others = [uuid for uuid in planned(room, "--until-free", "100G") if uuid != opened]
    room.mounted.stop()
    before = list(room.mounted.command)
    room.mounted.command += ["-o", "cache.high=70%,cache.low=50%"]
    filler = room.disk / "filler"
    try:
        room.mounted.start()
        assert room.evicted() == set()
        with (room.mounted.path / opened / "big.bin").open("rb"):
            total = os.statvfs(room.disk).f_blocks * os.statvfs(room.disk).f_frsize
            filler.write_bytes(bytes(room.free() - int(total * 0.25)))
            until(lambda: room.free() >= total * 0.5, "room was made", 30)
            gone = room.evicted()
            assert gone == set(others[: len(gone)])
            assert 4 <= len(gone) <= 7
            until(lambda: "the disk was nearly full: evicted" in room.mounted.log(), "it is in the log", 10)
        receipts = room.mounted.json("receipts")["receipts"]
        assert {each["uuid"] for each in receipts if each["what"] == "evict"} >= gone
    finally:
        filler.unlink(missing_ok=True)
        room.mounted.stop()
        room.mounted.command = before
        room.mounted.start()
