"""The small files of a record as one stream of reads from a real S3 server: what comes, what is handed over to ordinary
flights, and what a crash in the middle leaves."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.core.making import Place, noise, unit_of, until
from tests.faults import FaultProxy
from tests.servers import Seaweed
from vfs import cache
from vfs.errors import RunfsError
from vfs.session import Session
from vfs.settings import CacheSettings
from vfs.stores import Store, open_store
from vfs.stores.observed import ObservedStore
from vfs.stores.s3_small import CONNECTIONS, SmallReads

UUID = "record000000"
COUNT = 60
FILES = {b"%03d.bin" % number: noise(number * 37 + 1, number) for number in range(COUNT)}
FILES |= {b"odd %\xff\xc3\xa9 name": b"odd", b"below/deep/er": noise(70_000), b"large": noise(cache.FLIGHT << 20)}
SMALL = {path: content for path, content in FILES.items() if path != b"large"}


@pytest.fixture
def proxy(seaweed: Seaweed) -> Iterator[FaultProxy]:
    with FaultProxy(seaweed.port) as made:
        yield made


@pytest.fixture
def place(tmp_path: Path, seaweed: Seaweed, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A project with one record and an S3 server behind a proxy."""
    for name, value in seaweed.environment().items():
        monkeypatch.setenv(name, value)
    url = f"s3://{seaweed.bucket}/{tmp_path.name}?endpoint={proxy.endpoint}&region={seaweed.region}"
    made = Place(tmp_path / "host", {"lab": url}, {"cache": CacheSettings(high=None, low=None, keep_small=0)})
    made.record(UUID, files=FILES)
    return made


@contextmanager
def evicted(place: Place) -> Iterator[Session]:
    with place.session() as session:
        session.evictor.evict(unit_of(session, UUID))
        yield session


def header(session: Session, path: bytes) -> cache.Header | None:
    return cache.read_header(unit_of(session, UUID).shadow + b"/" + path)


def bytes_of(session: Session, path: bytes) -> bytes:
    with open(unit_of(session, UUID).shadow + b"/" + path, "rb") as file:
        return file.read()


def here(session: Session) -> set[bytes]:
    """Small files whose right bytes are here, whether the disk has them for good or not."""
    return {path for path, content in SMALL.items() if bytes_of(session, path) == content}


def all_settled(session: Session) -> bool:
    session.core.settle()
    return all(header(session, path) is None for path in SMALL)


def test_all_of_a_record_and_on_few_connections(place: Place, proxy: FaultProxy) -> None:
    with evicted(place) as session:
        before = proxy.accepted
        session.hydrator.ahead.touched(unit_of(session, UUID))
        until(lambda: here(session) == set(SMALL))
        assert proxy.accepted - before <= CONNECTIONS
        session.core.settle()
        assert [path for path in SMALL if header(session, path) is not None] == []
        large = header(session, b"large")
        assert large is not None
        assert large.runs == ()
        for path in SMALL:
            status = os.stat(unit_of(session, UUID).shadow + b"/" + path)
            assert status.st_mtime_ns == session.core.journal.known(UUID)[path].file.mtime_ns


def test_nothing_is_called_local_before_it_is_synced(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes are in the file, and readers of this process have them; the disk says "evicted" until they are synced,
    each file's own bytes."""
    synced: set[int] = set()
    real_sync, real_clear = os.fdatasync, cache.clear_header
    too_early: list[int] = []

    def sync(fd: int) -> None:
        real_sync(fd)
        synced.add(os.fstat(fd).st_ino)

    def clear(fd: int) -> None:
        if os.fstat(fd).st_ino not in synced:
            too_early.append(fd)
        real_clear(fd)

    with evicted(place) as session:
        monkeypatch.setattr(os, "fdatasync", sync)
        monkeypatch.setattr(cache, "clear_header", clear)
        session.hydrator.ahead.touched(unit_of(session, UUID))
        until(lambda: here(session) == set(SMALL))
        session.core.settle()
        assert not too_early
        assert {os.stat(unit_of(session, UUID).shadow + b"/" + path).st_ino for path in SMALL} <= synced
        assert all(header(session, path) is None for path in SMALL)


def test_what_was_evicted_again_is_brought_again(place: Place) -> None:
    with evicted(place) as session:
        unit = unit_of(session, UUID)
        for _time in range(2):
            session.hydrator.ahead.touched(unit)
            until(lambda: all_settled(session))
            assert here(session) == set(SMALL)
            session.evictor.evict(unit)
            assert not here(session)


def test_wrong_and_missing_objects_are_for_nobody(place: Place) -> None:
    with evicted(place) as session:
        store = session.core.home("lab").store()
        for path, content in ((b"003.bin", b"x" * len(FILES[b"003.bin"])), (b"004.bin", b"short")):
            store.write(f"{UUID}/{path.decode()}", content)
        store.delete(f"{UUID}/005.bin")
        session.hydrator.ahead.touched(unit_of(session, UUID))
        bad = {b"003.bin", b"004.bin", b"005.bin"}
        until(lambda: here(session) == set(SMALL) - bad)
        until(lambda: all(session.core.trouble(UUID, path) for path in bad))
        session.core.settle()
        for path in bad:
            kept = header(session, path)
            assert kept is not None
            assert kept.runs == ()
            assert set(bytes_of(session, path)) == {0}


def test_a_second_home_has_what_the_first_one_lost(place: Place, tmp_path: Path) -> None:
    place.stores["other"] = (tmp_path / "other").as_uri()
    with evicted(place) as session:
        for path in (b"003.bin", b"004.bin"):
            session.core.home("lab").store().delete(f"{UUID}/{path.decode()}")
        session.hydrator.ahead.touched(unit_of(session, UUID))
        until(lambda: here(session) == set(SMALL))


@pytest.mark.parametrize("mode", ["refuse", "silent", "cut", "busy"])
def test_a_store_that_fails_in_the_middle(place: Place, proxy: FaultProxy, mode: str) -> None:
    """What was claimed ends, in an error; later it can be brought."""
    with evicted(place) as session:
        unit = unit_of(session, UUID)
        proxy.set(mode)
        session.hydrator.ahead.touched(unit)
        with open(unit.shadow + b"/030.bin", "rb") as file:
            partial = session.core.partial(file.fileno())
        assert partial is not None
        try:
            with pytest.raises(RunfsError):
                session.hydrator.bring(partial, [0], UUID, b"030.bin", 5.0)
            until(lambda: not partial.flying, 30)
            proxy.set("pass")
            session.hydrator.bring(partial, [0], UUID, b"030.bin", 5.0)
        finally:
            session.core.release(partial)
        assert bytes_of(session, b"030.bin") == FILES[b"030.bin"]


def test_a_reader_who_comes_meanwhile(place: Place) -> None:
    """One flight a file: who waits for a claimed file is woken by the stream."""
    with evicted(place) as session:
        unit = unit_of(session, UUID)
        session.hydrator.ahead.touched(unit)
        for path in sorted(SMALL, reverse=True):
            with open(unit.shadow + b"/" + path, "rb") as file:
                session.hydrator.complete(file.fileno(), UUID, path)
            assert bytes_of(session, path) == SMALL[path]


# --- the reads by themselves --------------------------------------------------------------------------------------


@pytest.fixture
def store(place: Place) -> Iterator[Store]:
    opened = open_store(place.stores["lab"], "lab", {"deadline_s": 4.0})
    yield opened
    opened.disconnect()


def reads_of(store: Store) -> SmallReads:
    found = ObservedStore(store, events=None).small_reads()  # type: ignore[arg-type]
    assert found is not None
    return found


def refuse(proxy: FaultProxy) -> None:
    proxy.set("refuse")
    time.sleep(0.3)  # what waits in accept(2) still takes one


def test_answers_other_than_hoped_for_are_none(store: Store) -> None:
    for number in range(40):
        store.write(f"few/{number}", b"%d" % number * 10)
    wanted = [(number, f"few/{number}", len(b"%d" % number * 10)) for number in range(40)]
    wanted += [(100, "few/none", 10), (101, "few/3", 9), (102, "few/4", 11)]
    found = dict(reads_of(store).each(iter(wanted)))
    assert found == {**{number: b"%d" % number * 10 for number in range(40)}, 100: None, 101: None, 102: None}


def test_a_kept_connection_that_was_closed_is_no_answer(store: Store, proxy: FaultProxy) -> None:
    store.write("few/1", b"one")
    reads = reads_of(store)
    assert list(reads.each(iter([(1, "few/1", 3)]))) == [(1, b"one")]
    refuse(proxy)  # resets what is open
    proxy.set("pass")
    assert list(reads.each(iter([(1, "few/1", 3)]))) == [(1, b"one")]


def test_nothing_waits_for_a_server_that_is_not_there(store: Store, proxy: FaultProxy) -> None:
    reads = reads_of(store)
    refuse(proxy)
    wanted = iter([(1, "few/1", 3)])
    assert list(reads.each(wanted)) == []
    assert next(wanted)[0] == 1, "it was not asked for"
    assert not reads.usable, "ordinary reads are next, for a while"


def test_a_silent_server_is_given_up_in_time(store: Store, proxy: FaultProxy) -> None:
    store.write("few/1", b"one")
    proxy.set("silent")
    began = time.monotonic()
    assert list(reads_of(store).each(iter([(1, "few/1", 3)]))) == [(1, None)]
    assert time.monotonic() - began < 4.0


def test_reads_from_several_threads(store: Store) -> None:
    for number in range(20):
        store.write(f"few/{number}", b"%d" % number)
    reads, found = reads_of(store), []

    def read() -> None:
        found.append(dict(reads.each((number, f"few/{number}", len(str(number))) for number in range(20))))

    threads = [threading.Thread(target=read) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert found == [{number: b"%d" % number for number in range(20)}] * 4


# --- crashes ------------------------------------------------------------------------------------------------------

_BRING = """
import sys, time
from pathlib import Path
from tests.core.making import Place, unit_of
from tests.core.test_small_files import UUID
from vfs.settings import CacheSettings
place = Place(Path(sys.argv[1]), {"lab": sys.argv[2]}, {"cache": CacheSettings(high=None, low=None, keep_small=0)})
with place.session() as session:
    session.hydrator.ahead.touched(unit_of(session, UUID))
    time.sleep(3)
    session.core.settle()
print("it was to be killed")
"""


@pytest.mark.parametrize(
    ("point", "settled"),
    [
        ("hydrate.read#20", False),
        ("hydrate.small#30", False),
        ("cache.save.synced#1", False),
        ("cache.save.synced#10", True),
        ("cache.save.marked#10", True),
    ],
)
def test_killed_in_the_middle(place: Place, point: str, settled: bool) -> None:
    """Whatever the step: a file that says nothing is whole, all others say that nothing of them is here; and the next
    process brings them."""
    with evicted(place):
        pass
    run = subprocess.run(
        [sys.executable, "-c", _BRING, str(place.root), place.stores["lab"]],
        env={**os.environ, "RUNFS_FAULT": f"{point}=kill"},
        cwd=Path(__file__).parent.parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == -signal.SIGKILL, run.stdout + run.stderr
    with place.session() as session:
        whole = {path for path in SMALL if header(session, path) is None}
        assert bool(whole) == settled
        assert len(whole) < len(SMALL)
        for path in whole:
            assert bytes_of(session, path) == SMALL[path]
        for path in set(SMALL) - whole:
            kept = header(session, path)
            assert kept is not None
            assert kept.runs == ()
            assert not kept.changed
        for path in SMALL:
            status = os.stat(unit_of(session, UUID).shadow + b"/" + path)
            assert status.st_mtime_ns == session.core.journal.known(UUID)[path].file.mtime_ns
        session.hydrator.ahead.touched(unit_of(session, UUID))
        until(lambda: all_settled(session))
        assert here(session) == set(SMALL)
        session.evictor.evict(unit_of(session, UUID))
        assert not here(session)
