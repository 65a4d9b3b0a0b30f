"""Interrupted multipart uploads on S3: they are gone on with, never mixed, and swept."""

import contextlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.faults import FaultProxy
from tests.servers import Seaweed
from tests.stores.conftest import MakeStore
from vfs.errors import Conflict, StoreError
from vfs.stores import Store, checksums, open_store
from vfs.stores.limits import Limits
from vfs.stores.remote_config import target
from vfs.stores.s3_parts import uploads

MIB = 1024 * 1024
PARTS = 6
DATA = random.Random(3).randbytes(PARTS * 8 * MIB)
OTHER = random.Random(4).randbytes(PARTS * 8 * MIB)


@pytest.fixture
def proxy(seaweed: Seaweed) -> Iterator[FaultProxy]:
    with FaultProxy(seaweed.port) as made:
        yield made


def giving(data: bytes) -> Callable[[int, int], bytes]:
    return lambda offset, length: data[offset : offset + length]


def interrupted(
    store: Store, proxy: FaultProxy, data: bytes = DATA, parts: int = PARTS - 1, key: str = "u/big"
) -> None:
    """Upload until so many parts have been handed over, then lose the network."""

    def source(offset: int, length: int) -> bytes:
        if offset >= parts * 8 * MIB:
            time.sleep(0.5)  # what is under way arrives
            proxy.set("refuse")
        return data[offset : offset + length]

    with pytest.raises(StoreError):
        store.upload(key, source, len(data), deadline=10)
    proxy.set("pass")


@pytest.fixture
def through(proxy: FaultProxy, s3: MakeStore) -> Store:
    return s3(endpoint=proxy.endpoint, window_s=2)


class TestGoingOn:
    def test_info_says_so(self, s3: MakeStore) -> None:
        assert s3().info().resumes
        assert s3().info().sweeps

    def test_parts_that_are_there_are_not_sent_again(self, s3: MakeStore, through: Store, proxy: FaultProxy) -> None:
        interrupted(through, proxy)
        proxy.taken = 0
        stat = through.upload("u/big", giving(DATA), len(DATA), if_absent=True)
        assert stat.verified
        assert proxy.taken < 3 * 8 * MIB  # of 6 parts: the last, and at most one that was cut
        assert s3().read("u/big") == DATA
        assert s3().sweep(0) == 0

    def test_parts_of_other_bytes_do_not_count(self, s3: MakeStore, through: Store, proxy: FaultProxy) -> None:
        interrupted(through, proxy, OTHER)
        assert through.upload("u/big", giving(DATA), len(DATA)).verified
        assert s3().read("u/big") == DATA

    def test_another_size_does_not_take_parts_over(self, s3: MakeStore, through: Store, proxy: FaultProxy) -> None:
        interrupted(through, proxy)
        shorter = DATA[: 2 * 8 * MIB + 5]
        assert through.upload("u/big", giving(shorter), len(shorter)).verified
        assert s3().read("u/big") == shorter

    def test_conditions_hold_at_the_end(self, s3: MakeStore, through: Store, proxy: FaultProxy) -> None:
        interrupted(through, proxy)
        s3().write("u/big", b"somebody else's")
        with pytest.raises(Conflict):
            through.upload("u/big", giving(DATA), len(DATA), if_absent=True)
        assert s3().read("u/big") == b"somebody else's"
        version = s3().stat("u/big").version
        assert through.upload("u/big", giving(DATA), len(DATA), if_version=version).verified
        assert s3().sweep(0) == 0

    def test_a_key_that_begins_like_another_is_left_alone(
        self, s3: MakeStore, through: Store, proxy: FaultProxy
    ) -> None:
        interrupted(through, proxy, key="u/big.more")
        assert through.upload("u/big", giving(DATA), len(DATA)).verified
        assert s3().sweep(0) == 1

    def test_two_at_once_never_mix_their_bytes(self, s3: MakeStore) -> None:
        """Two stores of one process have an upload each; what counts is that the object is one of the two."""

        def put(data: bytes) -> bool:
            try:
                s3().upload("u/big", giving(data), len(data))
            except StoreError:
                return False
            return True

        with ThreadPoolExecutor(2) as pool:
            assert any(pool.map(put, (DATA, OTHER)))
        assert s3().read("u/big") in (DATA, OTHER)

    def test_after_kill_9(self, s3: MakeStore, seaweed: Seaweed, proxy: FaultProxy) -> None:
        store = s3(endpoint=proxy.endpoint)
        program = (
            "import random, sys, time\n"
            "from vfs.stores import open_store\n"
            f"data = random.Random(3).randbytes({len(DATA)})\n"
            "def source(offset, length):\n"
            f"    if offset >= {(PARTS - 1) * 8 * MIB}:\n"
            "        print('most of it', flush=True)\n"
            "        time.sleep(60)\n"
            "    return data[offset:offset + length]\n"
            f"options = dict(access_key_id={seaweed.access_key!r}, secret_access_key={seaweed.secret_key!r})\n"
            "open_store(dict(url=sys.argv[1], **options)).upload('u/big', source, len(data))\n"
        )
        child = subprocess.Popen([sys.executable, "-c", program, store.url], stdout=subprocess.PIPE)
        assert child.stdout is not None
        with child.stdout:
            assert child.stdout.readline() == b"most of it\n"
            time.sleep(1)
            child.send_signal(signal.SIGKILL)
        child.wait(10)
        proxy.taken = 0
        assert store.upload("u/big", giving(DATA), len(DATA), if_absent=True).verified
        assert proxy.taken < 3 * 8 * MIB
        assert s3().read("u/big") == DATA


class TestMixing:
    def test_a_part_that_somebody_else_replaced_is_never_in_our_object(self, s3: MakeStore) -> None:
        """Another process goes on with the same upload, with other bytes, between our last part and the completion."""
        config = {"url": s3().url, **s3.options}  # type: ignore[attr-defined]
        mine, theirs = (uploads(target(config), Limits()) for _ in range(2))
        assert mine is not None
        assert theirs is not None
        budget = Limits().budget(60)
        step = checksums.PART

        def source(offset: int, length: int) -> bytes:
            if offset == step:  # my first part is there: they find the upload and replace it
                time.sleep(0.5)
                upload = next(iter(theirs.pending(budget, "u/big")))
                theirs._put("u/big", upload.id, 1, OTHER[:step], budget)
            return DATA[offset : offset + length]

        try:
            with contextlib.suppress(StoreError):  # it may refuse; SeaweedFS keeps both parts, and takes the one named
                mine.send("u/big", source, 2 * step, {}, None, budget)
            assert [s3().read(stat.key) for stat in s3().list()] in ([], [DATA[: 2 * step]])
        finally:
            mine.close()
            theirs.close()


class TestSweeping:
    def test_what_is_old_enough_goes_and_objects_stay(self, s3: MakeStore, through: Store, proxy: FaultProxy) -> None:
        interrupted(through, proxy, parts=2)
        s3().write("u/object", b"stays")
        assert s3().sweep() == 0  # a day has not passed
        assert s3().sweep(0) == 1
        assert s3().sweep(0) == 0
        assert s3().read("u/object") == b"stays"

    def test_what_this_process_works_on_is_not_swept(self, s3: MakeStore) -> None:
        store = s3()
        swept: list[int] = []

        def source(offset: int, length: int) -> bytes:
            if offset:
                swept.append(store.sweep(0))
            return DATA[offset : offset + length]

        assert store.upload("u/big", source, 3 * 8 * MIB).verified
        assert set(swept) == {0}

    def test_only_what_is_under_the_prefix(
        self, s3: MakeStore, through: Store, proxy: FaultProxy, seaweed: Seaweed
    ) -> None:
        interrupted(through, proxy, parts=2)
        elsewhere = open_store({"url": seaweed.url.replace("?", "/elsewhere?"), **seaweed.options()})
        assert elsewhere.sweep(0) == 0
        elsewhere.disconnect()
        assert s3().sweep(0) == 1

    def test_a_source_that_fails_leaves_nothing_to_sweep(self, s3: MakeStore) -> None:
        def source(offset: int, length: int) -> bytes:
            if offset:
                raise FileNotFoundError(2, "gone")
            return DATA[:length]

        with pytest.raises(FileNotFoundError):
            s3().upload("u/big", source, len(DATA))
        assert s3().sweep(0) == 0
