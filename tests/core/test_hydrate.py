"""Bringing bytes back: checked before anybody sees them, from the first replica that has them, one flight for all."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.core.making import FILES, UUID, Hooked, Place, everything, hooked, noise, unit_of, until
from vfs import cache
from vfs.cache import Partial, read_header
from vfs.core import plain_key
from vfs.errors import Full, NoReplica, RunfsError, StoreTimeout, Unreachable, WrongBytes
from vfs.hydrate import FLIGHT, check, read_back
from vfs.journal import Replica
from vfs.manifest import CHUNK, digest_of
from vfs.session import Session
from vfs.stores.protocol import Arrived

BIG = noise(12 * CHUNK + 777, 5)
KEY = plain_key(UUID, b"big")


@pytest.fixture
def session(tmp_path: Path) -> Iterator[Session]:
    """An evicted record in two stores."""
    place = Place(tmp_path / "host", {"lab": f"hooked://{tmp_path}/lab", "disk": f"hooked://{tmp_path}/disk"})
    place.record(files={**FILES, b"big": BIG})
    with place.session() as session:
        session.evictor.evict(unit_of(session))
        for name in ("lab", "disk"):
            hooked(session, name).done.clear()
        yield session


@contextmanager
def opened(session: Session, path: bytes = b"big") -> Iterator[Partial]:
    fd = os.open(unit_of(session).shadow + b"/" + path, os.O_RDONLY)
    try:
        partial = session.core.partial(fd)
        assert partial is not None
        try:
            yield partial
        finally:
            session.core.release(partial)
    finally:
        os.close(fd)


def bring(session: Session, partial: Partial, numbers: list[int], seconds: float = 5.0) -> None:
    session.hydrator.bring(partial, numbers, UUID, b"big", seconds)


def waits_for(gate: threading.Event) -> Callable[[str, str], None]:
    def wait(operation: str, key: str) -> None:
        assert gate.wait(10)

    return wait


def reads(store: Hooked) -> list[str]:
    return [key for operation, key in store.done if operation == "read"]


def away(operation: str, key: str) -> None:
    raise Unreachable("no route")


# --- the check -----------------------------------------------------------------------------------------------------


def test_check() -> None:
    data = noise(3 * CHUNK + 5)
    content = digest_of(lambda offset, length: data[offset : offset + length], len(data))
    check(data, content, 0, len(data), "x")
    check(data[CHUNK:], content, CHUNK, len(data) - CHUNK, "x")
    wrong = bytearray(data)
    wrong[2 * CHUNK] ^= 1
    with pytest.raises(WrongBytes, match=f"x does not hold the right bytes at {2 * CHUNK}"):
        check(bytes(wrong), content, 0, len(data), "x")
    for short in (0, 1, CHUNK, 3 * CHUNK, len(data) - 1):
        with pytest.raises(WrongBytes):
            check(data[:short], content, 0, len(data), "x")
    with pytest.raises(WrongBytes):
        check(data + b"more", content, 0, len(data), "x")


def test_read_back(session: Session) -> None:
    home = session.core.home("lab")
    content = next(c for c in session.core.journal.contents_of(UUID).values() if c.size == len(BIG))
    replica = Replica(content.digest, "lab", UUID, KEY, 0, "")
    read_back(home, replica, content)
    for wrong in (BIG[:-1] + b"x", BIG + b"x", BIG[:-1], BIG[:CHUNK], b""):
        hooked(session).put(KEY, wrong)
        with pytest.raises(WrongBytes, match="big"):
            read_back(home, replica, content)


# --- which bytes, from where ---------------------------------------------------------------------------------------


def test_only_what_is_asked_for_comes(session: Session) -> None:
    with opened(session) as partial:
        bring(session, partial, [3])
        assert partial.missing(0, len(BIG)) == [0, 1, 2, *range(4, 13)]
        assert os.pread(partial.fd, CHUNK, 3 * CHUNK) == BIG[3 * CHUNK : 4 * CHUNK]
    assert reads(hooked(session)) == [KEY]
    assert reads(hooked(session, "disk")) == []


def test_neighbours_travel_together(session: Session) -> None:
    with opened(session) as partial:
        bring(session, partial, list(range(13)))
        assert os.pread(partial.fd, len(BIG), 0) == BIG
    assert len(reads(hooked(session))) == -(-13 // FLIGHT)


def in_pieces(session: Session, pause: Callable[[int], None], spoilt: int | None = None) -> None:
    """Have the first store tell of each MiB as it comes; `pause(number)` is called before the chunk of that number.
    One chunk may be `spoilt`."""
    store = hooked(session, "lab")

    def read_into(
        key: str, buffer: memoryview, start: int = 0, *, arrived: Arrived | None = None, deadline: float | None = None
    ) -> int:
        data = store.read(key, start, len(buffer))
        for at in range(0, len(data), CHUNK):
            number = (start + at) // CHUNK
            pause(number)
            piece = data[at : at + CHUNK]
            buffer[at : at + len(piece)] = bytes(len(piece)) if number == spoilt else piece
            if arrived is not None:
                arrived(at + len(piece))
        return len(data)

    store.read_into = read_into  # type: ignore[method-assign]


def test_the_first_chunk_does_not_wait_for_the_last(session: Session) -> None:
    gate, first, last = threading.Event(), threading.Event(), threading.Event()

    def pause(number: int) -> None:
        assert number < 2 or gate.wait(10)

    in_pieces(session, pause)
    with opened(session) as partial:
        assert partial.when_here(0, lambda _error: first.set())
        assert partial.when_here(FLIGHT - 1, lambda _error: last.set())
        session.hydrator.request(partial, range(FLIGHT), UUID, b"big")
        assert first.wait(5), "while the rest is on its way"
        assert not last.is_set()
        assert os.pread(partial.fd, CHUNK, 0) == BIG[:CHUNK]
        gate.set()
        assert last.wait(5)
        assert partial.missing(0, FLIGHT * CHUNK) == []


def test_a_wrong_chunk_in_a_flight_comes_from_the_next_store(session: Session) -> None:
    """What came before it stays; what came after it in the same answer is not believed."""
    in_pieces(session, lambda _number: None, spoilt=3)
    with opened(session) as partial:
        bring(session, partial, list(range(FLIGHT)))
        assert os.pread(partial.fd, FLIGHT * CHUNK, 0) == BIG[: FLIGHT * CHUNK]
    assert reads(hooked(session, "disk")) == [KEY], "the rest in one range"


def test_a_chunk_that_is_wrong_everywhere_fails_alone(session: Session) -> None:
    hooked(session, "disk").hook = away
    in_pieces(session, lambda _number: None, spoilt=3)
    with opened(session) as partial:
        with pytest.raises(NoReplica, match="right bytes"):
            bring(session, partial, list(range(FLIGHT)))
        until(lambda: not partial.flying)
        assert partial.missing(0, FLIGHT * CHUNK) == list(range(3, FLIGHT))
        assert session.core.trouble(UUID, b"big") is not None
        assert partial.failed_just_now([2]) is None
        assert partial.failed_just_now([3]) is not None


def test_everything_comes_back(session: Session) -> None:
    unit = unit_of(session)
    assert everything(session, unit).items() >= {**FILES, b"big": BIG}.items()
    assert session.evictor.hydrate(unit) == 0
    session.core.settle()
    assert read_header(unit.shadow + b"/big") is None


def test_what_came_stays_over_a_restart(session: Session) -> None:
    with opened(session) as partial:
        bring(session, partial, [0, 12])
    session.core.settle()
    header = read_header(unit_of(session).shadow + b"/big")
    assert header is not None
    assert header.runs == ((0, 1), (12, 13))


WRONG = {
    "other bytes": bytes(len(BIG)),
    "one bit": BIG[:CHUNK] + bytes([BIG[CHUNK] ^ 1]) + BIG[CHUNK + 1 :],
    "cut within a chunk": BIG[: 2 * CHUNK + 100],
    "cut between chunks": BIG[: 2 * CHUNK],
    "empty": b"",
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_wrong_bytes_in_the_first_store(session: Session, wrong: bytes) -> None:
    hooked(session).put(KEY, wrong)
    assert everything(session, unit_of(session))[b"big"] == BIG
    assert reads(hooked(session, "disk"))


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_wrong_bytes_everywhere_are_shown_to_nobody(session: Session, wrong: bytes) -> None:
    for name in ("lab", "disk"):
        hooked(session, name).put(KEY, wrong)
    with opened(session) as partial:
        with pytest.raises(NoReplica, match=r"big of .* cannot be read: lab: .*; disk: "):
            bring(session, partial, list(range(13)))
        until(lambda: not partial.flying)
        for number in range(13):
            here = number not in partial.missing(0, len(BIG))
            part = os.pread(partial.fd, CHUNK, number * CHUNK)
            assert part == BIG[number * CHUNK : number * CHUNK + len(part)] if here else not any(part)
            if here:
                assert len(part) == len(BIG[number * CHUNK : (number + 1) * CHUNK])
    for name in ("lab", "disk"):
        hooked(session, name).put(KEY, BIG)
    assert everything(session, unit_of(session))[b"big"] == BIG, "the next try is a new one"


def test_a_store_that_fails_is_asked_last(session: Session) -> None:
    hooked(session).hook = away
    with opened(session) as partial:
        bring(session, partial, [0])
        assert session.core.home("lab").error == "no route"
        hooked(session).done.clear()
        bring(session, partial, [5])
        assert reads(hooked(session)) == []
        assert os.pread(partial.fd, CHUNK, 5 * CHUNK) == BIG[5 * CHUNK : 6 * CHUNK]


def test_no_store_at_all(session: Session) -> None:
    for name in ("lab", "disk"):
        hooked(session, name).hook = away
    with opened(session) as partial:
        with pytest.raises(NoReplica, match="lab: no route; disk: no route"):
            bring(session, partial, [0])
        assert partial.missing(0, 1) == [0]
        for name in ("lab", "disk"):
            hooked(session, name).hook = lambda _operation, _key: None
        bring(session, partial, [0])


def test_an_object_that_is_gone_is_not_forgotten(session: Session) -> None:
    for name in ("lab", "disk"):
        hooked(session, name).drop(KEY)
    with opened(session) as partial, pytest.raises(NoReplica):
        bring(session, partial, [0])
    hooked(session, "disk").put(KEY, BIG)
    assert everything(session, unit_of(session))[b"big"] == BIG


def test_a_bug_in_a_store_ends_the_flight_too(session: Session) -> None:
    def bug(operation: str, key: str) -> None:
        raise ZeroDivisionError("a bug")

    hooked(session).hook = bug
    with opened(session) as partial:
        with pytest.raises(NoReplica, match="a bug"):
            bring(session, partial, [0])
        assert not partial.flying


def test_a_store_that_is_not_configured_any_more(session: Session) -> None:
    """Which store had the bytes is known, so that is said."""
    names = " and ".join(sorted(home.name for home in session.core.homes))
    session.core.homes.clear()
    with opened(session) as partial, pytest.raises(NoReplica, match=f"no configured store holds it, but {names} had"):
        bring(session, partial, [0])


# --- who waits -----------------------------------------------------------------------------------------------------


def test_two_readers_one_flight(session: Session) -> None:
    gate = threading.Event()

    def slow(operation: str, key: str) -> None:
        if operation == "read":
            assert gate.wait(10)

    hooked(session).hook = slow
    errors: list[BaseException] = []

    def read(number: int) -> None:
        try:
            with opened(session) as partial:
                bring(session, partial, [number])
                assert os.pread(partial.fd, CHUNK, number * CHUNK) == BIG[number * CHUNK : (number + 1) * CHUNK]
        except BaseException as error:
            errors.append(error)

    readers = [threading.Thread(target=read, args=(2,)) for _ in range(5)]
    for reader in readers:
        reader.start()
    time.sleep(0.05)
    gate.set()
    for reader in readers:
        reader.join(10)
    assert errors == []
    assert reads(hooked(session)) == [KEY]


def test_one_error_reaches_everybody(session: Session) -> None:
    gate = threading.Event()

    def fail(operation: str, key: str) -> None:
        assert gate.wait(10)
        raise Unreachable("no route")

    for name in ("lab", "disk"):
        hooked(session, name).hook = fail
    told: list[RunfsError | None] = []
    with opened(session) as partial:
        for _ in range(3):
            assert partial.when_here(4, told.append)
            session.hydrator.request(partial, [4], UUID, b"big")
        gate.set()
        until(lambda: len(told) == 3)
    assert all(isinstance(error, NoReplica) for error in told)
    assert len(reads(hooked(session))) == 1


def test_asking_does_not_wait(session: Session) -> None:
    gate = threading.Event()
    hooked(session).hook = waits_for(gate)
    with opened(session) as partial:
        began = time.monotonic()
        session.hydrator.request(partial, range(13), UUID, b"big")
        assert time.monotonic() - began < 0.5
        assert set(partial.flying) == set(range(13))
        gate.set()
        until(lambda: partial.complete)


def test_a_deadline_ends_the_wait(session: Session) -> None:
    gate = threading.Event()
    for name in ("lab", "disk"):
        hooked(session, name).hook = waits_for(gate)
    with opened(session) as partial:
        began = time.monotonic()
        with pytest.raises(StoreTimeout, match="nothing arrived"):
            bring(session, partial, [0], 0.05)
        assert time.monotonic() - began < 2
        gate.set()
        until(lambda: not partial.flying)


def test_a_full_disk_is_said_before_anything_is_asked_for(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    room = os.statvfs(session.settings.cache_place)
    full = os.statvfs_result((*tuple(room)[:3], 0, 0, *tuple(room)[5:]))
    with opened(session) as partial, monkeypatch.context() as small:
        small.setattr(os, "statvfs", lambda _path: full)
        with pytest.raises(Full, match="evict --until-free"):
            session.hydrator.request(partial, [0], UUID, b"big")
        assert not partial.flying
    assert reads(hooked(session)) == []


def test_a_write_that_overtakes_a_flight_stays(session: Session) -> None:
    gate = threading.Event()
    hooked(session).hook = waits_for(gate)
    with opened(session) as partial:
        session.hydrator.request(partial, [0, 1], UUID, b"big")
        fd = cache.open_writable(partial.fd)
        partial.write(fd, b"n" * CHUNK, 0)
        os.close(fd)
        gate.set()
        until(lambda: not partial.flying)
        assert os.pread(partial.fd, 2 * CHUNK, 0) == b"n" * CHUNK + BIG[CHUNK : 2 * CHUNK]


# --- files in use --------------------------------------------------------------------------------------------------


def test_all_handles_share_one_object(session: Session) -> None:
    with opened(session) as one, opened(session) as other:
        assert one is other
    session.core.settle()
    with opened(session) as again:
        assert again is not one


def test_settling_between_two_users_touches_no_other_file(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody comes and goes while the file is being saved: its descriptor must not be closed with something unsaved,
    nor be used when it is closed and its number is another file's."""
    real = Partial.save
    visits: list[bool] = []

    def save(partial: Partial) -> None:
        real(partial)
        if not visits and threading.current_thread().name.startswith("settle"):
            visits.append(True)
            with opened(session) as inside:
                bring(session, inside, [7])

    monkeypatch.setattr(Partial, "save", save)
    with opened(session) as partial:
        bring(session, partial, [0])
    session.core.settle()
    session.core.settle()
    assert visits
    header = read_header(unit_of(session).shadow + b"/big")
    assert header is not None
    assert header.runs == ((0, 1), (7, 8))


def test_the_first_touch_brings_small_files_together(session: Session) -> None:
    unit = unit_of(session)
    session.hydrator.ahead.touched(unit)
    until(lambda: read_header(unit.shadow + b"/notes/model.bin") is None)
    until(lambda: read_header(unit.shadow + b"/caf\xe9 \xff.dat") is None)
    assert read_header(unit.shadow + b"/big") is not None
    session.core.settle()
    count = len(reads(hooked(session)))
    session.hydrator.ahead.touched(unit)
    time.sleep(0.05)
    assert len(reads(hooked(session))) == count
