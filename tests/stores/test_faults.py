"""S3 through a proxy that breaks in every way: calls end in time, nothing is wrong or half visible, it recovers."""

import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from tests.faults import FaultProxy
from tests.servers import Seaweed, seaweedfs
from tests.stores.conftest import MakeStore
from vfs.errors import Conflict, NotFound, StoreError, StoreTimeout, Unreachable
from vfs.stores import Store, open_store

MIB = 1024 * 1024
DEADLINE_S = 2.0
MARGIN_S = 1.0
BIG = 20 * MIB

SMALL = b"small content"
LARGE = random.Random(5).randbytes(3 * MIB)


@pytest.fixture
def proxy(seaweed: Seaweed) -> Iterator[FaultProxy]:
    with FaultProxy(seaweed.port) as made:
        yield made


@pytest.fixture
def direct(s3: MakeStore) -> Store:
    """The same content, past the proxy."""
    store = s3()
    store.write("u/small", SMALL)
    store.upload("u/large", lambda offset, length: LARGE[offset : offset + length], len(LARGE))
    return store


@pytest.fixture
def store(proxy: FaultProxy, direct: Store, s3: MakeStore) -> Store:
    """The store through the proxy, with limits short enough for a test."""
    return s3(endpoint=proxy.endpoint, deadline_s=DEADLINE_S, window_s=0.5, least_throughput=200_000)


def zeros(offset: int, length: int) -> bytes:
    return bytes(length)


def read(store: Store, deadline: float) -> bytes:
    return store.read("u/large", 0, len(LARGE), deadline=deadline)


def read_into(store: Store, deadline: float) -> bytes:
    """The way hydrate takes: in the caller's thread, into its own memory."""
    buffer = bytearray(len(LARGE))
    return bytes(buffer[: store.read_into("u/large", memoryview(buffer), deadline=deadline)])


READS = pytest.mark.parametrize("reading", [read, read_into])
CALLS: dict[str, Callable[[Store], object]] = {
    "stat": lambda store: store.stat("u/small", deadline=DEADLINE_S),
    "read": lambda store: store.read("u/small", deadline=DEADLINE_S),
    "read large": lambda store: read(store, DEADLINE_S),
    "read into": lambda store: read_into(store, DEADLINE_S),
    "write": lambda store: store.write("u/written", b"x" * 1000, if_absent=True, deadline=DEADLINE_S),
    "upload": lambda store: store.upload("u/new", zeros, BIG, if_absent=True, deadline=DEADLINE_S),
    "list": lambda store: list(store.list(deadline=DEADLINE_S)),
    "delete": lambda store: store.delete("u/nothing", deadline=DEADLINE_S),
    "copy": lambda store: store.copy("u/small", "u/copied", deadline=DEADLINE_S),
}


def timed(call: Callable[[], object]) -> tuple[float, object]:
    began = time.monotonic()
    try:
        result: object = call()
    except StoreError as error:
        result = error
    return time.monotonic() - began, result


class TestNothingHangs:
    @pytest.mark.parametrize("mode", ["refuse", "silent", "dribble", "busy"])
    def test_every_call_ends_in_time_and_says_why(
        self, proxy: FaultProxy, store: Store, direct: Store, mode: str
    ) -> None:
        proxy.set(mode)
        with ThreadPoolExecutor(len(CALLS)) as pool:
            running = {what: pool.submit(timed, partial(call, store)) for what, call in CALLS.items()}
            results = {what: each.result() for what, each in running.items()}
        expected = Unreachable if mode in ("refuse", "busy") else StoreTimeout
        assert {what: type(result) for what, (_, result) in results.items()} == dict.fromkeys(CALLS, expected)
        for took, result in results.values():
            assert took < DEADLINE_S + MARGIN_S
            assert isinstance(result, StoreError)
            assert result.temporary
            assert "test-bucket" in str(result)
        assert direct_keys(direct) - {"u/written", "u/copied"} == {"u/small", "u/large"}

    def test_many_callers_of_a_silent_store_all_end(self, proxy: FaultProxy, store: Store) -> None:
        proxy.set("silent")
        took: list[float] = []
        threads = [
            threading.Thread(target=lambda: took.append(timed(lambda: store.stat("u/small"))[0])) for _ in range(20)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE_S + MARGIN_S)
        assert len(took) == 20
        assert max(took) < DEADLINE_S + MARGIN_S

    def test_a_stalled_store_does_not_hold_up_another(self, proxy: FaultProxy, store: Store, direct: Store) -> None:
        proxy.set("silent")
        stuck = threading.Thread(target=lambda: timed(lambda: list(store.list())))
        stuck.start()
        time.sleep(0.1)
        took, result = timed(lambda: direct.read("u/small"))
        stuck.join()
        assert result == SMALL
        assert took < 0.5

    def test_an_expired_call_closes_its_socket(self, proxy: FaultProxy, store: Store) -> None:
        proxy.set("silent")
        timed(lambda: store.stat("u/small"))
        end = time.monotonic() + 2
        while proxy.open_connections() and time.monotonic() < end:
            time.sleep(0.02)
        assert proxy.open_connections() == 0

    def test_check_tells_what_is_wrong(self, proxy: FaultProxy, store: Store) -> None:
        proxy.set("refuse")
        found = store.check()
        assert not found.reachable
        assert len(found.problems) == 1
        assert proxy.endpoint in found.problems[0]


class TestTheLeastThroughput:
    @READS
    def test_a_read_that_trickles_is_broken_off_long_before_the_deadline(
        self, proxy: FaultProxy, store: Store, reading: Callable[[Store, float], bytes]
    ) -> None:
        proxy.rate = 20_000
        proxy.set("dribble")
        took, result = timed(lambda: reading(store, 60))
        assert isinstance(result, StoreTimeout)
        assert took < 6  # four windows of 0.5 s and the pauses between them

    @READS
    def test_a_slow_read_above_it_succeeds(
        self, proxy: FaultProxy, store: Store, reading: Callable[[Store, float], bytes]
    ) -> None:
        proxy.rate = 1_500_000
        proxy.set("dribble")
        took, result = timed(lambda: reading(store, 60))
        assert result == LARGE
        assert took > 1

    def test_an_upload_into_silence_is_broken_off_long_before_the_deadline(
        self, proxy: FaultProxy, store: Store, direct: Store
    ) -> None:
        def source(offset: int, length: int) -> bytes:
            if offset >= 16 * MIB:
                proxy.set("silent")
            return bytes(length)

        took, result = timed(lambda: store.upload("u/new", source, 60 * MIB, deadline=60))
        assert isinstance(result, StoreTimeout)
        assert took < 10
        assert direct_keys(direct) == {"u/small", "u/large"}


class TestNothingIsWrong:
    @pytest.mark.parametrize("after", [100, 500, 5_000, 100_000, 2 * MIB])
    @pytest.mark.parametrize("length", [None, len(LARGE), 10 * MIB])
    def test_a_cut_answer_is_never_taken_for_the_whole(
        self, proxy: FaultProxy, store: Store, after: int, length: int | None
    ) -> None:
        proxy.cut_after = after
        proxy.set("cut")
        _, result = timed(lambda: store.read("u/large", 0, length, deadline=DEADLINE_S))
        assert isinstance(result, StoreError) or result == LARGE

    @READS
    def test_a_read_cut_once_is_read_again(
        self, proxy: FaultProxy, store: Store, reading: Callable[[Store, float], bytes]
    ) -> None:
        proxy.cut_after = MIB
        proxy.set("cut")
        threading.Timer(0.15, lambda: proxy.set("pass")).start()
        assert reading(store, 10) == LARGE

    @pytest.mark.parametrize("mode", ["refuse", "silent", "busy", "cut"])
    def test_an_upload_broken_in_the_middle_leaves_nothing_visible(
        self, proxy: FaultProxy, store: Store, direct: Store, mode: str
    ) -> None:
        def source(offset: int, length: int) -> bytes:
            if offset >= 8 * MIB:
                proxy.cut_after = 10
                proxy.set(mode)
            return bytes(length)

        took, result = timed(lambda: store.upload("u/new", source, BIG, deadline=3))
        assert isinstance(result, StoreError)
        assert not isinstance(result, Conflict)
        assert took < 3 + MARGIN_S
        assert direct_keys(direct) == {"u/small", "u/large"}
        with pytest.raises(NotFound):
            direct.stat("u/new")

    def test_an_upload_survives_a_short_fault(self, proxy: FaultProxy, store: Store, direct: Store) -> None:
        data = random.Random(9).randbytes(BIG)

        def source(offset: int, length: int) -> bytes:
            if offset == 8 * MIB:
                proxy.set("busy")
                threading.Timer(0.3, lambda: proxy.set("pass")).start()
            return data[offset : offset + length]

        stat = store.upload("u/new", source, BIG, if_absent=True, deadline=20)
        assert stat.verified
        assert direct.read("u/new") == data

    def test_a_write_whose_answer_was_lost_is_not_taken_for_a_lost_race(
        self, proxy: FaultProxy, store: Store, direct: Store
    ) -> None:
        """The first try arrives and its answer is cut; the second finds the first: it is ours, so it is no Conflict."""
        proxy.cut_after = 0
        proxy.set("cut")
        threading.Timer(0.25, lambda: proxy.set("pass")).start()
        stat = store.write("u/new", b"mine", if_absent=True, deadline=10)
        assert stat.verified
        assert direct.read("u/new") == b"mine"

    def test_a_write_whose_answer_was_lost_still_loses_to_another(
        self, proxy: FaultProxy, store: Store, direct: Store
    ) -> None:
        direct.write("u/new", b"another's")
        proxy.cut_after = 0
        proxy.set("cut")
        threading.Timer(0.25, lambda: proxy.set("pass")).start()
        with pytest.raises(Conflict):
            store.write("u/new", b"mine", if_absent=True, deadline=10)
        assert direct.read("u/new") == b"another's"


class TestRecovery:
    @pytest.mark.parametrize("mode", ["refuse", "silent", "dribble", "busy", "cut"])
    def test_after_the_fault_all_is_well(self, proxy: FaultProxy, store: Store, mode: str) -> None:
        proxy.set(mode)
        timed(lambda: store.stat("u/small", deadline=0.5))
        proxy.set("pass")
        assert store.read("u/small") == SMALL
        assert store.write("u/new", b"x", if_absent=True).verified
        assert {stat.key for stat in store.list()} == {"u/small", "u/large", "u/new"}

    def test_a_slow_answer_is_not_a_fault(self, proxy: FaultProxy, store: Store) -> None:
        proxy.set("delay")
        assert store.read("u/small") == SMALL
        assert store.stat("u/small").size == len(SMALL)


def direct_keys(direct: Store) -> set[str]:
    return {stat.key for stat in direct.list()}


def test_a_restarted_server(tmp_path: Path) -> None:
    """The server is killed and comes back: calls fail at once meanwhile, and the same store object works after."""
    with seaweedfs(tmp_path) as server:
        store = open_store(server.url, options=server.options())
        store.write("u/a", b"before")
        server.stop()
        took, result = timed(lambda: store.read("u/a"))
        assert isinstance(result, Unreachable)
        assert took < 3
        server.start()
        assert store.read("u/a") == b"before"
        assert store.write("u/b", b"after", if_absent=True).verified
