"""Eviction and restore: what is refused, what races with other processes lose (nothing), and what a crash leaves.

Other processes are real ones: a helper that keeps an open descriptor of the record's directory, from before.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

from tests.core.doing import Worker, held, trace
from tests.core.making import (
    FILES,
    NESTED,
    UUID,
    Place,
    contents,
    everything,
    holes_below,
    noise,
    unit_of,
    until,
    write_record,
)
from vfs.cache import read_header
from vfs.core import data_key
from vfs.errors import Full, Refused, UnknownRecord
from vfs.journal import UnitRow
from vfs.manifest import CHUNK
from vfs.residency import State
from vfs.scan import differs, walk
from vfs.session import Session
from vfs.units import set_aside_name

OUTSIDER = """
import mmap, os, sys, time
top = os.open(sys.argv[1], os.O_RDONLY)
def inside(name, flags, mode=0o644): return os.open(name, flags, mode, dir_fd=top)
def say(word): print(word, flush=True)
kept = []
say("ready")
for line in sys.stdin:
    try:
        exec(line)
        say("done")
    except Exception as error:
        say(f"{type(error).__name__} {error}")
"""


class Outsider:
    """A process that got at a record's directory before anything happened, and does as it is told."""

    def __init__(self, directory: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", OUTSIDER, str(directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.hear() == "ready"

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def hear(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def do(self, line: str) -> None:
        self.tell(line)
        assert self.hear() == "done"

    def end(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()


@contextmanager
def outsider(directory: Path) -> Iterator[Outsider]:
    process = Outsider(directory)
    try:
        yield process
    finally:
        process.end()


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "host")


@pytest.fixture
def session(place: Place) -> Iterator[Session]:
    place.record()
    with place.session() as session:
        yield session


def stats(directory: bytes) -> dict[bytes, tuple[Any, ...]]:
    """What `ls -l` shows of a tree."""
    return {
        seen.path: (
            seen.kind,
            seen.status.st_mode,
            seen.status.st_mtime_ns,
            seen.status.st_size if seen.kind == "file" else 0,
            seen.target,
        )
        for seen in walk(directory)
    }


def refused(session: Session, match: str) -> None:
    """It is refused with this reason, and nothing has happened."""
    unit = unit_of(session)
    before = contents(unit.directory)
    with pytest.raises(Refused, match=match):
        session.evictor.evict(unit)
    assert unit.state is State.RESIDENT
    assert not os.path.islink(unit.directory)
    assert contents(unit.directory) == before
    assert session.core.journal.unit(UUID) is None
    assert not os.path.lexists(unit.shadow)
    assert not os.path.lexists(set_aside_name(unit))
    assert not [each for each in session.core.journal.receipts(UUID) if each["what"] == "evict"]


# --- the way it goes -----------------------------------------------------------------------------------------------


def test_evict_and_restore(session: Session, place: Place) -> None:
    root = place.directory()
    os.symlink("weights.npy", root / "latest")
    os.link(root / "weights.npy", root / "notes" / "linked.npy")
    os.mkfifo(root / "pipe")
    os.mkdir(root / "nothing", 0o750)
    os.setxattr(root / "weights.npy", "user.note", b"mine")
    unit = unit_of(session)
    before, bytes_before = stats(unit.directory), contents(root)

    evicted = session.evictor.evict(unit)
    assert evicted.bytes > 2 * CHUNK
    assert os.readlink(root) == os.path.relpath(place.project / ".runfs" / UUID, root.parent)
    assert os.readlink(place.project / ".runfs") == str(place.root / "mnt")
    assert sorted(os.listdir(root.parent)) == [UUID]
    assert stats(unit.shadow) == before
    assert contents(unit.shadow)[b"metrics.json"] == FILES[b"metrics.json"], "small files are kept"
    for name in (b"weights.npy", b"notes/linked.npy", b"notes/model.bin"):
        assert read_header(unit.shadow + b"/" + name) is not None, name
    (receipt,) = [each for each in session.core.journal.receipts(UUID) if each["what"] == "evict"]
    assert receipt["bytes"] == evicted.bytes
    assert receipt["proof"]["lab"]["how"] == ["read back"]

    session.evictor.restore(unit)
    assert unit.state is State.RESIDENT
    assert stats(unit.directory) == before
    assert contents(root) == bytes_before
    assert os.path.samefile(root / "weights.npy", root / "notes" / "linked.npy")
    assert os.getxattr(root / "weights.npy", "user.note") == b"mine"
    assert holes_below(root) == []
    assert not os.path.lexists(unit.shadow)
    assert sorted(os.listdir(root.parent)) == [UUID]


def test_what_came_back_is_dropped_again_at_once(session: Session) -> None:
    unit = unit_of(session)
    session.evictor.evict(unit)
    for _ in range(5):
        assert everything(session, unit).items() >= FILES.items()
        assert session.evictor.evict(unit).bytes >= 2 * CHUNK
        assert read_header(unit.shadow + b"/weights.npy") is not None
    receipts = [each for each in session.core.journal.receipts(UUID) if each["what"] == "evict"]
    assert len(receipts) == 6
    assert session.evictor.evict(unit).bytes == 0
    assert len([e for e in session.core.journal.receipts(UUID) if e["what"] == "evict"]) == 6, "nothing was dropped"


def test_every_drop_leaves_a_receipt_also_of_holes(place: Place) -> None:
    root = place.record(files={})
    with open(root / "sparse", "wb") as file:
        file.truncate(5 * CHUNK)
    with place.session() as session:
        session.evictor.evict(unit_of(session))
        assert [each["what"] for each in session.core.journal.receipts(UUID)] == ["evict", "push"]


def test_another_file_system_for_the_cache(place: Place, session: Session) -> None:
    shm = Path("/dev/shm")
    if not shm.is_dir() or os.stat(shm).st_dev == os.stat(place.root).st_dev:
        pytest.skip("there is no second file system")
    session.close()
    cache = shm / f"runfs-test-{os.getpid()}"
    try:
        with place.session(cache_dir=cache) as other:
            unit = unit_of(other)
            before = stats(unit.directory)
            other.evictor.evict(unit)
            assert stats(unit.shadow) == before
            assert everything(other, unit).items() >= FILES.items()
            other.evictor.restore(unit)
            assert stats(unit.directory) == before
            assert contents(place.directory()).items() >= FILES.items()
            assert holes_below(place.directory()) == []
    finally:
        shutil.rmtree(cache)


# --- what is refused -----------------------------------------------------------------------------------------------


def test_no_store(place: Place) -> None:
    place.record()
    with place.session(stores=()) as session:
        refused(session, "no store is configured")


def test_never_mounted(place: Place) -> None:
    place.record()
    with place.session(mountpoint=None) as session:
        refused(session, "never mounted")


def test_mounted_once_is_enough(place: Place) -> None:
    place.record()
    with place.session():
        pass
    with place.session(mountpoint=None) as session:
        session.evictor.evict(unit_of(session))


def test_pinned(session: Session) -> None:
    session.core.journal.pin(UUID, True)
    refused(session, "pinned")


def test_live(session: Session, place: Place) -> None:
    (place.directory() / "finished_at").unlink()
    (place.directory() / "heartbeat_at").write_text(datetime.now(UTC).isoformat())
    refused(session, "live")


def test_a_nested_one_is_live(place: Place) -> None:
    root = place.record()
    inner = root / "executions" / NESTED
    write_record(inner, NESTED, {}, parent=UUID, finished=False)
    (inner / "heartbeat_at").write_text(datetime.now(UTC).isoformat())
    place.ingest(inner)
    with place.session() as session:
        refused(session, rf"live \({NESTED}\)")


def test_becomes_live_while_it_is_pushed(session: Session, place: Place, tmp_path: Path) -> None:
    session.close()
    with held(place.settings(), "evict", UUID, tmp_path, "push.published") as worker:
        (place.directory() / "finished_at").unlink()
        (place.directory() / "heartbeat_at").write_text(datetime.now(UTC).isoformat())
    assert "not evicted" in worker.said()[0]
    assert not place.directory().is_symlink()


def test_not_pushable(session: Session, place: Place) -> None:
    place.store.write_text("no directory")
    refused(session, "lab does not hold all of it")


def test_the_store_is_gone_after_the_push(session: Session, place: Place) -> None:
    session.pusher.push(unit_of(session))
    shutil.move(place.store, place.root / "unplugged")
    refused(session, "copies are proven|does not hold all of it")
    shutil.move(place.root / "unplugged", place.store)
    session.evictor.evict(unit_of(session))


def test_too_few_copies(tmp_path: Path) -> None:
    stores = {"lab": (tmp_path / "store").as_uri(), "disk": (tmp_path / "disk").as_uri()}
    place = Place(tmp_path / "host", stores)
    place.record()
    (tmp_path / "disk").write_text("no directory")
    with place.session(min_copies=2) as session:
        refused(session, "disk does not hold all of it")
    with place.session(min_copies=1) as session:
        assert session.evictor.evict(unit_of(session)).proof.keys() == {"lab"}


@pytest.mark.parametrize("how", ["O_RDONLY", "O_RDWR", "O_WRONLY"])
def test_open_in_another_process(session: Session, place: Place, how: str) -> None:
    with outsider(place.directory()) as other:
        other.do(f"kept.append(inside('weights.npy', os.{how}))")
        refused(session, rf"weights\.npy is open in python3?.*\[{other.process.pid}\]")
    session.evictor.evict(unit_of(session))


def test_a_small_file_open_in_another_process(session: Session, place: Place) -> None:
    with outsider(place.directory()) as other:
        other.do("kept.append(inside('metrics.json', os.O_WRONLY))")
        refused(session, r"metrics\.json is open in")


def test_mapped_writable(session: Session, place: Place) -> None:
    with outsider(place.directory()) as other:
        other.do("fd = inside('weights.npy', os.O_RDWR); kept.append(mmap.mmap(fd, 4096)); os.close(fd)")
        refused(session, r"weights\.npy is open in")
        other.do("kept[0][0:3] = b'NEW'")
        refused(session, r"weights\.npy is open in")
        other.do("kept.pop().close()")
    unit = unit_of(session)
    session.evictor.evict(unit)
    assert everything(session, unit)[b"weights.npy"] == b"NEW" + FILES[b"weights.npy"][3:]


def test_stores_into_a_mapping_after_the_push_are_not_lost(session: Session, place: Place) -> None:
    """A page that is dirty already changes no times: what was pushed before must not count as what is there."""
    with outsider(place.directory()) as other:
        other.do("fd = inside('weights.npy', os.O_RDWR); kept.append(mmap.mmap(fd, 4096)); os.close(fd)")
        other.do("kept[0][0] = 1")
        session.pusher.push(unit_of(session))
        other.do("kept[0][0] = 2")
        other.do("kept.pop().close()")
    unit = unit_of(session)
    session.evictor.evict(unit)
    assert everything(session, unit)[b"weights.npy"] == b"\x02" + FILES[b"weights.npy"][1:]


def test_a_write_in_the_tick_of_the_push_is_not_lost(session: Session, place: Place) -> None:
    path = place.directory() / "weights.npy"
    unit = unit_of(session)
    for number in range(5):
        path.write_bytes(noise(100_000, number))
        session.pusher.push(unit)
        path.write_bytes(noise(100_000, number + 1))
    session.evictor.evict(unit)
    assert everything(session, unit)[b"weights.npy"] == noise(100_000, 5)


def test_open_through_the_mount(session: Session) -> None:
    unit = unit_of(session)
    unit.handles = 1
    refused(session, "open through the mount")
    unit.writers = 1
    refused(session, "open for writing through the mount")


def test_an_unknown_record(session: Session) -> None:
    with pytest.raises(UnknownRecord, match="no record nothing"):
        session.core.units.get("nothing")


# --- what the store holds is not right -----------------------------------------------------------------------------


def old_proof(place: Place) -> Any:
    """A session to which no earlier proof counts."""
    return place.session(proof={"max_age": 0})


CORRUPTIONS: dict[str, Callable[[Path], object]] = {
    "other bytes": lambda path: path.write_bytes(bytes(len(path.read_bytes()))),
    "cut at a chunk": lambda path: os.truncate(path, CHUNK),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("corrupt", CORRUPTIONS.values(), ids=CORRUPTIONS.keys())
def test_wrong_bytes_in_the_store_are_refused_and_pushed_again(place: Place, corrupt: Callable[[Path], object]) -> None:
    place.record()
    with old_proof(place) as session:
        unit = unit_of(session)
        session.pusher.push(unit)
        corrupt(place.store / UUID / "weights.npy")
        refused(session, "0 of 1 copies are proven")
        assert [row.uuid for row in session.core.journal.dirty()] == [UUID]
        session.pusher.push(unit)
        evicted = session.evictor.evict(unit)
        assert evicted.bytes > 2 * CHUNK
        assert everything(session, unit).items() >= FILES.items()


def test_wrong_bytes_under_a_digest_too(place: Place) -> None:
    place.record()
    with old_proof(place) as session:
        unit = unit_of(session)
        session.pusher.push(unit)
        (place.directory() / "weights.npy").write_bytes(noise(2 * CHUNK, 7))
        session.pusher.push(unit)
        beside = place.store / data_key(UUID, blake3(noise(2 * CHUNK, 7)).digest())
        beside.write_bytes(b"torn")
        refused(session, "0 of 1 copies are proven")
        session.pusher.push(unit)
        session.evictor.evict(unit)
        assert everything(session, unit)[b"weights.npy"] == noise(2 * CHUNK, 7)


def test_a_store_that_was_emptied_is_filled_again(place: Place) -> None:
    place.record()
    with place.session() as session:
        unit = unit_of(session)
        session.pusher.push(unit)
        for name in (UUID, ".runfs"):
            shutil.rmtree(place.store / name)
        refused(session, "manifest is gone")
        session.evictor.evict(unit)
        assert everything(session, unit).items() >= FILES.items()


def test_another_host_changed_the_manifest(place: Place) -> None:
    place.record()
    with place.session() as session:
        unit = unit_of(session)
        session.pusher.push(unit)
        manifest = place.store / ".runfs" / UUID / "manifest.json"
        manifest.write_bytes(manifest.read_bytes() + b" ")
        refused(session, "another host changed the record")


def test_what_a_store_cannot_give_is_not_forgotten(place: Place) -> None:
    """The bytes of an evicted record are nowhere else: that a store says it has not got them may be its mistake."""
    place.record()
    with old_proof(place) as session:
        unit = unit_of(session)
        session.evictor.evict(unit)
        stored = place.store / UUID / "weights.npy"
        stored.rename(place.root / "mislaid")
        with pytest.raises(Exception, match=r"weights\.npy"):
            everything(session, unit)
        with pytest.raises(Refused):
            session.evictor.evict(unit)
        session.pusher.push(unit)
        (place.root / "mislaid").rename(stored)
        assert everything(session, unit).items() >= FILES.items()


# --- races ---------------------------------------------------------------------------------------------------------

POINTS = [
    "push.scanned",
    "evict.proven",
    "evict.leased",
    "evict.built",
    "evict.linked",
    "evict.intended",
    "evict.exchanged",
    "evict.entered",
    "evict.receipted",
    "evict.unnamed",
    "evict.discarded",
]
TELLING = ["evict.proven", "evict.linked", "evict.entered", "evict.unnamed"]
# What a process does through a directory it had open before, and the bytes that must be found afterwards.
ACTS: dict[str, tuple[str, bytes]] = {
    "write": ("fd = inside('weights.npy', os.O_WRONLY); os.pwrite(fd, b'WRITTEN', 5); os.close(fd)", b"WRITTEN"),
    "write small": (
        "fd = inside('metrics.json', os.O_WRONLY|os.O_APPEND); os.write(fd, b'WRITTEN'); os.close(fd)",
        b"WRITTEN",
    ),
    "open and write later": (
        "fd = inside('notes/model.bin', os.O_RDWR); time.sleep(0.15); os.write(fd, b'WRITTEN'); os.close(fd)",
        b"WRITTEN",
    ),
    "create": (
        "fd = inside('new', os.O_WRONLY|os.O_CREAT|os.O_EXCL); os.write(fd, b'WRITTEN'); os.close(fd)",
        b"WRITTEN",
    ),
    "create below": (
        "fd = inside('notes/new', os.O_WRONLY|os.O_CREAT); os.write(fd, b'WRITTEN'); os.close(fd)",
        b"WRITTEN",
    ),
    "replace": (
        "fd = inside('tmp', os.O_WRONLY|os.O_CREAT); os.write(fd, b'WRITTEN'); os.close(fd); "
        "os.rename('tmp', 'weights.npy', src_dir_fd=top, dst_dir_fd=top)",
        b"WRITTEN",
    ),
    "replace small": (
        "fd = inside('tmp', os.O_WRONLY|os.O_CREAT); os.write(fd, b'WRITTEN'); os.close(fd); "
        "os.rename('tmp', 'metrics.json', src_dir_fd=top, dst_dir_fd=top)",
        b"WRITTEN",
    ),
    "map": (
        "import mmap; fd = inside('weights.npy', os.O_RDWR); m = mmap.mmap(fd, 0); os.close(fd); time.sleep(0.1); "
        "m[5:12] = b'WRITTEN'; m.close()",
        b"WRITTEN",
    ),
    "map small": (
        "import mmap; fd = inside('metrics.json', os.O_RDWR); m = mmap.mmap(fd, 0); os.close(fd); time.sleep(0.1); "
        "m[5:12] = b'WRITTEN'; m.close()",
        b"WRITTEN",
    ),
    "rename": ("os.rename('weights.npy', 'moved.npy', src_dir_fd=top, dst_dir_fd=top)", FILES[b"weights.npy"][:50]),
}


def go_on(other: Outsider) -> str:
    """What came of it: it may have had to wait for a lease, or find that its directory is gone."""
    said = other.hear()
    assert said == "done" or "No such file" in said, said
    return said


@pytest.mark.parametrize("act", ACTS.values(), ids=ACTS.keys())
def test_a_process_that_had_the_directory_open_loses_nothing(tmp_path: Path, act: tuple[str, bytes]) -> None:
    """At each step of an eviction: either the act fails loudly, or its bytes are found."""
    line, bytes_expected = act
    outcomes = set()
    for point in POINTS if act in (ACTS["write"], ACTS["create"], ACTS["map"], ACTS["rename"]) else TELLING:
        place = Place(tmp_path / point)
        root = place.record()
        with outsider(root) as other:
            with held(place.settings(), "evict", UUID, tmp_path, point) as worker:
                other.tell(line)
                time.sleep(0.03)  # it is done by now, or waits for a lease
            heard = go_on(other)
            sentence = worker.said()[0]
        outcomes.add((heard == "done", not sentence))
        with place.session() as session:
            unit = unit_of(session)
            assert unit.evicted is place.directory().is_symlink()
            found = everything(session, unit)
            if heard == "done":
                assert any(bytes_expected in content for content in found.values()), (point, sentence)
            untouched = set(FILES) - {b"weights.npy", b"metrics.json", b"notes/model.bin"}
            assert {name: found[name] for name in untouched} == {name: FILES[name] for name in untouched}, point
            assert sorted(os.listdir(root.parent)) == [UUID]
            session.evictor.evict(unit)  # and again: what was changed goes to the store first
            again = everything(session, unit)
            assert again == found, point
            session.evictor.restore(unit)
            assert contents(root) == found, point
    assert (True, False) in outcomes, "it was never refused"
    assert (True, True) in outcomes, "it never came too late to be refused"


def test_a_late_change_is_marked_and_pushed(tmp_path: Path) -> None:
    for act, path in (("write", b"weights.npy"), ("write small", b"metrics.json"), ("create", b"new")):
        place = Place(tmp_path / act)
        with outsider(place.record()) as other:
            with held(place.settings(), "evict", UUID, tmp_path, "evict.entered") as worker:
                other.tell(ACTS[act][0])
                time.sleep(0.1)
            assert worker.said() == [""]
            assert other.hear() == "done"
        with place.session() as session:
            unit = unit_of(session)
            assert b"WRITTEN" in contents(unit.shadow)[path]
            assert session.run("safe", {}, quiet())["safe"] is False, act
            assert session.pusher.push(unit).clean or session.pusher.push(unit).clean
            assert session.run("safe", {}, quiet())["safe"] is True


def quiet() -> Any:
    class Quiet:
        cancelled = False

        def __call__(self, event: dict[str, Any], /) -> None:
            pass

    return Quiet()


def test_a_reader_that_comes_in_between_gets_the_right_bytes(tmp_path: Path) -> None:
    for point in TELLING:
        place = Place(tmp_path / point)
        with outsider(place.record()) as other:
            with held(place.settings(), "evict", UUID, tmp_path, point):
                other.tell(
                    "fd = inside('weights.npy', os.O_RDONLY); data = os.read(fd, 5000); os.close(fd); say(data.hex())"
                )
                time.sleep(0.03)
            heard = other.hear()
            assert heard == FILES[b"weights.npy"][:5000].hex() or "No such file" in heard


def test_a_changed_link_is_not_lost(tmp_path: Path) -> None:
    for point in TELLING:
        place = Place(tmp_path / point)
        root = place.record()
        os.symlink("weights.npy", root / "latest")
        with outsider(root) as other, held(place.settings(), "evict", UUID, tmp_path, point):
            other.do("os.unlink('latest', dir_fd=top); os.symlink('other.npy', 'latest', dir_fd=top)")
        with place.session() as session:
            assert os.readlink(unit_of(session).base + b"/latest") == b"other.npy", point


def test_a_writer_on_another_file_system_is_waited_for(tmp_path: Path) -> None:
    shm = Path("/dev/shm")
    if not shm.is_dir() or os.stat(shm).st_dev == os.stat(tmp_path).st_dev:
        pytest.skip("there is no second file system")
    cache = shm / f"runfs-test-{os.getpid()}"
    place = Place(tmp_path / "host", over={"cache_dir": cache})
    try:
        with outsider(place.record()) as other:
            with held(place.settings(), "evict", UUID, tmp_path, "evict.entered") as worker:
                other.tell("kept.append(inside('weights.npy', os.O_WRONLY))")
                time.sleep(0.1)
            assert worker.said() == [""]
            assert other.hear() == "done"
            with place.session() as session:
                with pytest.raises(Refused, match="still being written to"):
                    session.evictor.restore(unit_of(session))
                other.do("os.pwrite(kept[0], b'WRITTEN', 0); os.close(kept.pop())")
                unit = unit_of(session)
                session.evictor.restore(unit)
                assert contents(place.directory())[b"weights.npy"] == b"WRITTEN" + FILES[b"weights.npy"][7:]
    finally:
        shutil.rmtree(cache)


# --- crashes -------------------------------------------------------------------------------------------------------


def recovered(place: Place, point: str) -> None:
    """After a kill: the next session finds every byte, and both ways are open from there."""
    before = json.loads((place.root / "stats.json").read_text())
    with place.session() as session:
        unit = unit_of(session)
        row = session.core.journal.unit(UUID)
        assert (row is None) == (unit.state is State.RESIDENT), point
        assert row is None or (row.state, row.aside) == ("evicted", b""), point
        assert unit.evicted is place.directory().is_symlink(), point
        if not point.startswith("evict.linked"):  # nothing was noted yet: the next eviction takes its link's name
            assert sorted(os.listdir(place.directory().parent)) == [UUID], point
        if point.startswith(("cache.filled", "cache.drop.punched")):
            session.pusher.scan(unit)  # sets times right that bytes which came or went had changed
        if not unit.evicted:
            assert holes_below(place.directory()) == [], point
        assert shown(unit.base) == before, point
        if not unit.evicted and "built" not in point and "linked" not in point:  # the next eviction replaces these
            assert not os.path.lexists(unit.shadow), point
        drops = [each for each in session.core.journal.receipts(UUID) if each["what"] == "evict"]
        assert drops or not unit.evicted, f"{point}: a drop without a receipt"
        assert everything(session, unit).items() >= FILES.items(), point
        session.evictor.restore(unit)
        assert contents(place.directory()).items() >= FILES.items(), point
        session.evictor.evict(unit)
        assert everything(session, unit).items() >= FILES.items(), point
        assert shown(unit.base) == before, point


def shown(directory: bytes) -> dict[str, list[Any]]:
    return {repr(path): [*map(repr, each)] for path, each in stats(directory).items()}


def prepared(place: Place) -> None:
    root = place.record()
    os.link(root / "weights.npy", root / "linked.npy")
    os.symlink("weights.npy", root / "latest")
    (place.root / "stats.json").write_text(json.dumps(shown(os.fsencode(root))))


def crash_points(tmp_path: Path, command: str, before: list[tuple[str, str]]) -> list[str]:
    first = Place(tmp_path / f"trace-{command}")
    prepared(first)
    if before:
        assert set(Worker(first.settings(), before, tmp_path).said()) == {""}
    points = trace(first.settings(), command, UUID, tmp_path)
    counted = [(point, points[: n + 1].count(point)) for n, point in enumerate(points)]
    return [
        f"{point}#{n}" for point, n in counted if not point.startswith("push.") and n in (1, 2, points.count(point))
    ]


def test_killed_at_each_step_of_an_eviction(tmp_path: Path) -> None:
    points = crash_points(tmp_path, "evict", [])
    assert {"evict.exchanged#1", "evict.unnamed#2", "evict.discarded#1"} <= set(points)
    for point in points:
        place = Place(tmp_path / point)
        prepared(place)
        assert Worker(place.settings(), [("evict", UUID)], tmp_path, f"{point}=kill").killed(), point
        recovered(place, point)


def test_killed_at_each_step_of_a_restore(tmp_path: Path) -> None:
    points = crash_points(tmp_path, "restore", [("evict", UUID)])
    assert {"cache.filled#1", "restore.copied#1", "restore.exchanged#1", "restore.unlinked#1"} <= set(points)
    for point in points:
        place = Place(tmp_path / point)
        prepared(place)
        assert Worker(place.settings(), [("evict", UUID)], tmp_path).said() == [""]
        assert Worker(place.settings(), [("restore", UUID)], tmp_path, f"{point}=kill").killed(), point
        recovered(place, point)


def test_killed_at_each_step_of_a_second_drop(tmp_path: Path) -> None:
    points = crash_points(tmp_path, "evict", [("evict", UUID), ("hydrate", UUID)])
    assert {"cache.drop.marked#1", "cache.drop.punched#1"} <= set(points)
    for point in points:
        place = Place(tmp_path / point)
        prepared(place)
        assert set(Worker(place.settings(), [("evict", UUID), ("hydrate", UUID)], tmp_path).said()) == {""}
        assert Worker(place.settings(), [("evict", UUID)], tmp_path, f"{point}=kill").killed(), point
        recovered(place, point)


def test_killed_while_a_process_waits_to_write(tmp_path: Path) -> None:
    """Our end gives the lease back: it writes to a file that was already without its name."""
    place = Place(tmp_path / "host")
    with outsider(place.record()) as other:
        with held(place.settings(), "evict", UUID, tmp_path, "evict.receipted") as worker:
            other.tell("kept.append(inside('weights.npy', os.O_WRONLY))")
            time.sleep(0.05)
            assert worker.process.pid is not None
            os.kill(worker.process.pid, signal.SIGKILL)
            assert worker.killed()
        assert other.hear() == "done"
        with place.session() as session:
            other.do("os.pwrite(kept[0], b'WRITTEN', 0); os.close(kept.pop())")
            unit = unit_of(session)
            assert everything(session, unit)[b"weights.npy"] == b"WRITTEN" + FILES[b"weights.npy"][7:]
            assert [row.uuid for row in session.core.journal.dirty()] == [UUID]


def test_a_power_cut_that_takes_the_exchange_back(session: Session, place: Place) -> None:
    """The journal is on the disk, the exchange is not: the record is where it was, and resident."""
    unit = unit_of(session)
    aside = set_aside_name(unit)
    session.pusher.push(unit)
    os.symlink("../.runfs/x", aside)
    session.core.journal.set_unit(UnitRow(UUID, "evicted", unit.directory, aside, "[]", 1, time.time_ns()))
    session.close()
    with place.session() as again:
        assert unit_of(again).state is State.RESIDENT
        assert contents(place.directory()).items() >= FILES.items()
        assert not os.path.lexists(aside)
        again.evictor.evict(unit_of(again))


def test_a_link_that_was_removed_while_a_restore_was_interrupted(tmp_path: Path) -> None:
    """Changes that are nowhere else are in the shadow: it must not go for a copy that is not whole."""
    place = Place(tmp_path / "host")
    prepared(place)
    assert Worker(place.settings(), [("evict", UUID)], tmp_path).said() == [""]
    with place.session() as session:
        Path(os.fsdecode(unit_of(session).shadow + b"/only here")).write_bytes(b"dirty")
    assert Worker(place.settings(), [("restore", UUID)], tmp_path, "restore.intended=kill").killed()
    place.directory().unlink()
    with place.session() as session:
        unit = unit_of(session)
        assert everything(session, unit)[b"only here"] == b"dirty"
        session.evictor.restore(unit)
        assert contents(place.directory()).items() >= {**FILES, b"only here": b"dirty"}.items()


# --- restore refuses -----------------------------------------------------------------------------------------------


def test_a_journal_that_cannot_be_written_after_the_exchange(
    session: Session, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left is finished by the next eviction in the same session, with its receipt before anything goes."""
    unit, journal = unit_of(session), session.core.journal
    written = journal.set_unit

    def full(row: UnitRow) -> None:
        if row.state == "evicted":
            raise Full("no space for the journal")
        written(row)

    monkeypatch.setattr(journal, "set_unit", full)
    with pytest.raises(Full):
        session.evictor.evict(unit)
    monkeypatch.undo()
    assert unit.state is State.EVICTED
    assert os.path.isdir(set_aside_name(unit)), "nothing is removed before its receipt"
    assert everything(session, unit).items() >= FILES.items()
    session.evictor.evict(unit)
    assert not os.path.lexists(set_aside_name(unit))
    row = journal.unit(UUID)
    assert row is not None
    assert (row.state, row.aside) == ("evicted", b"")
    first = [each for each in journal.receipts(UUID) if each["what"] == "evict"][-1]
    assert first["bytes"] > 0
    session.evictor.restore(unit)
    assert contents(place.directory()).items() >= FILES.items()


def test_what_was_built_is_known(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an eviction the journal knows the shadow's files by inode and time: nobody has to look at them again."""
    unit = unit_of(session)
    os.link(unit.directory + b"/weights.npy", unit.directory + b"/linked.npy")
    session.evictor.evict(unit)
    assert not unit.dirty
    assert differs(unit.shadow, session.core.journal.known(UUID)) == []


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_what_stands_where_the_link_was_is_not_touched(session: Session, place: Place, kind: str) -> None:
    unit = unit_of(session)
    session.evictor.evict(unit)
    place.directory().unlink()
    theirs = place.directory() / "theirs" if kind == "directory" else place.directory()
    theirs.parent.mkdir(exist_ok=True)
    theirs.write_bytes(b"theirs")
    for _ in range(2):
        with pytest.raises(Refused, match="something else stands at"):
            session.evictor.restore(unit)
        assert theirs.read_bytes() == b"theirs"
    assert everything(session, unit).items() >= FILES.items()
    session.close()
    with place.session() as again:
        assert theirs.read_bytes() == b"theirs"
        assert everything(again, unit_of(again)).items() >= FILES.items()


def test_restore_with_a_file_open_for_writing(session: Session) -> None:
    unit = unit_of(session)
    session.evictor.evict(unit)
    unit.writers = 1
    with pytest.raises(Refused, match="being written to"):
        session.evictor.restore(unit)
    assert unit.state is State.EVICTED
    unit.writers = 0
    session.evictor.restore(unit)
    assert contents(unit.directory).items() >= FILES.items()


def test_restore_where_the_link_is_gone(session: Session, place: Place) -> None:
    unit = unit_of(session)
    session.evictor.evict(unit)
    place.directory().unlink()
    session.evictor.restore(unit)
    assert contents(place.directory()).items() >= FILES.items()


def test_a_record_of_which_only_the_store_has_the_bytes(place: Place) -> None:
    place.record()
    with place.session() as session:
        session.pusher.push(unit_of(session))
    shutil.rmtree(place.directory())
    with place.session() as session:
        unit = unit_of(session)
        assert session.evictor.reclaim(unit)
        assert everything(session, unit).items() >= FILES.items()
        session.evictor.restore(unit)
        assert contents(place.directory()).items() >= FILES.items()
        assert not session.evictor.reclaim(unit)


def test_until_waits() -> None:
    with pytest.raises(AssertionError, match="never"):
        until(lambda: False, 0.01)
