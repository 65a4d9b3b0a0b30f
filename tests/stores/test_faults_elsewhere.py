"""WebDAV, FTP and web servers through a proxy that breaks: calls end in time, nothing is wrong, it recovers."""

import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from tests.faults import FaultProxy, FtpFaultProxy
from tests.stores.kinds import Maker, WebMaker
from vfs.errors import Conflict, NotFound, StoreError, StoreTimeout, Unreachable
from vfs.stores import Store

MIB = 1024 * 1024
DEADLINE_S = 2.0
MARGIN_S = 1.0
SMALL = b"small content"
LARGE = random.Random(5).randbytes(3 * MIB)

READS: dict[str, Callable[[Store], object]] = {
    "stat": lambda store: store.stat("u/small", deadline=DEADLINE_S),
    "read": lambda store: store.read("u/small", deadline=DEADLINE_S),
    "read large": lambda store: store.read("u/large", 0, len(LARGE), deadline=DEADLINE_S),
    "read into": lambda store: store.read_into("u/large", memoryview(bytearray(len(LARGE))), deadline=DEADLINE_S),
    "list": lambda store: list(store.list(deadline=DEADLINE_S)),
}
CHANGES: dict[str, Callable[[Store], object]] = {
    "write": lambda store: store.write("u/new", b"x" * 1000, if_absent=True, deadline=DEADLINE_S),
    "upload": lambda store: store.upload("u/new", lambda offset, length: bytes(length), 4 * MIB, deadline=DEADLINE_S),
    "delete": lambda store: store.delete("u/nothing", deadline=DEADLINE_S),
    "copy": lambda store: store.copy("u/small", "u/copied", deadline=DEADLINE_S),
    "move": lambda store: store.move("u/nothing", "u/moved", deadline=DEADLINE_S),
}


@pytest.fixture(params=["webdav", "ftp", "http"])
def maker(request: pytest.FixtureRequest) -> Maker:
    fixtures = {"webdav": "webdav_stores", "ftp": "ftp_stores", "http": "web_stores"}
    made: Maker = request.getfixturevalue(fixtures[request.param])
    return made


@pytest.fixture
def direct(maker: Maker) -> Store:
    """The same content, past the proxy."""
    writer = maker.writer() if isinstance(maker, WebMaker) else maker()
    writer.write("u/small", SMALL)
    writer.write("u/large", LARGE)
    return writer


@pytest.fixture
def proxy(maker: Maker) -> Iterator[FaultProxy]:
    kind = FtpFaultProxy if maker.url.startswith("ftp") else FaultProxy
    with kind(maker.port) as made:
        yield made


@pytest.fixture
def store(maker: Maker, direct: Store, proxy: FaultProxy) -> Store:
    """The store through the proxy, with limits short enough for a test."""
    return maker.through(proxy.port, deadline_s=DEADLINE_S, window_s=0.5, least_throughput=200_000)


@pytest.fixture
def calls(maker: Maker) -> dict[str, Callable[[Store], object]]:
    return READS if isinstance(maker, WebMaker) else {**READS, **CHANGES}


def timed(call: Callable[[], object]) -> tuple[float, object]:
    began = time.monotonic()
    try:
        result: object = call()
    except StoreError as error:
        result = error
    return time.monotonic() - began, result


def present(store: Store) -> set[str]:
    return {stat.key for stat in store.list()}


@pytest.mark.parametrize("mode", ["refuse", "silent", "dribble"])
def test_every_call_ends_in_time_and_says_why(
    proxy: FaultProxy, store: Store, direct: Store, calls: dict[str, Callable[[Store], object]], mode: str
) -> None:
    proxy.set(mode)
    with ThreadPoolExecutor(len(calls)) as pool:
        running = {what: pool.submit(timed, partial(call, store)) for what, call in calls.items()}
        results = {what: each.result() for what, each in running.items()}
    expected = Unreachable if mode == "refuse" else StoreTimeout
    assert {what: type(result) for what, (_, result) in results.items()} == dict.fromkeys(calls, expected)
    for took, result in results.values():
        assert took < DEADLINE_S + MARGIN_S
        assert isinstance(result, StoreError)
        assert result.temporary
        assert "127.0.0.1" in str(result)
    assert present(direct) - {"u/new", "u/copied"} == {"u/small", "u/large"}


@pytest.mark.parametrize("after", [0, 500, 2 * MIB])
def test_a_cut_answer_is_never_taken_for_the_whole(proxy: FaultProxy, store: Store, direct: Store, after: int) -> None:
    proxy.cut_after = after
    proxy.set("cut")
    for length in (None, len(LARGE), 10 * MIB):
        _, result = timed(partial(store.read, "u/large", 0, length, deadline=DEADLINE_S))
        assert isinstance(result, StoreError) or result == LARGE
    _, listed = timed(lambda: present(store))
    assert isinstance(listed, StoreError) or listed == {"u/small", "u/large"}


def test_a_read_that_trickles_is_broken_off_long_before_the_deadline(proxy: FaultProxy, store: Store) -> None:
    proxy.rate = 20_000
    proxy.set("dribble")
    took, result = timed(lambda: store.read("u/large", 0, len(LARGE), deadline=60))
    assert isinstance(result, StoreTimeout)
    assert took < 8


def test_a_slow_read_above_it_succeeds(proxy: FaultProxy, store: Store) -> None:
    proxy.rate = 1_500_000
    proxy.set("dribble")
    assert store.read("u/large", 0, len(LARGE), deadline=60) == LARGE


@pytest.mark.parametrize("mode", ["refuse", "silent", "dribble", "cut"])
def test_after_the_fault_all_is_well(proxy: FaultProxy, store: Store, direct: Store, mode: str) -> None:
    assert store.stat("u/small").size == len(SMALL)  # a connection that is kept, and breaks
    proxy.cut_after = 20
    proxy.set(mode)
    timed(lambda: store.stat("u/small", deadline=0.5))
    proxy.set("pass")
    assert store.read("u/small") == SMALL
    assert present(store) == {"u/small", "u/large"}
    if not store.info().read_only:
        assert store.write("u/new", b"x", if_absent=True).size == 1


@pytest.mark.parametrize("mode", ["refuse", "silent", "cut"])
def test_an_upload_broken_in_the_middle_is_never_seen_and_is_swept(
    proxy: FaultProxy, store: Store, direct: Store, mode: str
) -> None:
    if store.info().read_only:
        return

    def source(offset: int, length: int) -> bytes:
        proxy.cut_after = 10
        proxy.set(mode)
        return bytes(length)

    took, result = timed(lambda: store.upload("u/small", source, 6 * MIB, deadline=3))
    assert isinstance(result, StoreError)
    assert not isinstance(result, Conflict | NotFound)
    assert took < 8  # a moment more than the deadline, to clear up
    assert present(direct) == {"u/small", "u/large"}
    assert direct.read("u/small") == SMALL
    proxy.set("pass")
    direct.sweep(0)
    assert direct.sweep(0) == 0
    assert direct.read("u/small") == SMALL
