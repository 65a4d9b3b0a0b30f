"""What every store must do. A new type of store is added to the fixture `make_store`, not here."""

import hashlib
import os
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.stores.conftest import MakeStore
from vfs.errors import Conflict, Denied, NotFound, StoreError, Unreachable, UsageError
from vfs.stores import Store, checksums, keys

MIB = 1024 * 1024


def contents(store: Store, prefix: str = "") -> dict[str, int]:
    return {stat.key: stat.size for stat in store.list(prefix)}


def from_bytes(data: bytes) -> Callable[[int, int], bytes]:
    return lambda offset, length: data[offset : offset + length]


class TestReading:
    def test_gives_back_what_was_written(self, store: Store) -> None:
        data = bytes(range(256)) * 5
        written = store.write("u/a.bin", data)
        assert written.key == "u/a.bin"
        assert written.size == len(data)
        assert written.version
        assert store.read("u/a.bin") == data
        assert store.stat("u/a.bin").version == written.version

    @pytest.mark.parametrize(
        ("start", "length", "expected"),
        [(0, 5, b"01234"), (3, 4, b"3456"), (7, 100, b"789"), (10, 5, b""), (99, 1, b""), (4, None, b"456789")],
    )
    def test_ranges_are_exact_and_short_only_at_the_end(
        self, store: Store, start: int, length: int | None, expected: bytes
    ) -> None:
        store.write("u/ten", b"0123456789")
        assert store.read("u/ten", start, length) == expected

    def test_nothing_asked_for_is_nothing(self, store: Store) -> None:
        store.write("u/ten", b"0123456789")
        assert store.read("u/ten", 3, 0) == b""

    def test_an_open_range_beyond_the_end_is_empty(self, store: Store) -> None:
        store.write("u/ten", b"0123456789")
        assert store.read("u/ten", 10) == b""
        assert store.read("u/ten", 11) == b""

    def test_empty_objects(self, store: Store) -> None:
        assert store.write("u/empty", b"").size == 0
        assert store.read("u/empty") == b""
        assert store.read("u/empty", 0, 10) == b""
        assert contents(store) == {"u/empty": 0}

    def test_what_is_not_there_is_not_found(self, store: Store) -> None:
        store.write("u/a/b", b"x")
        for key in ("nothing", "u/a", "u/a/b/c", "u"):
            with pytest.raises(NotFound):
                store.stat(key)
            with pytest.raises(NotFound):
                store.read(key, 0, 4)
        with pytest.raises(NotFound):
            store.copy("nothing", "u/target")

    def test_negative_ranges_are_refused(self, store: Store) -> None:
        store.write("u/ten", b"0123456789")
        with pytest.raises(UsageError):
            store.read("u/ten", -1)
        with pytest.raises(UsageError):
            store.read("u/ten", 0, -5)

    def test_times_are_near_now(self, store: Store) -> None:
        stat = store.write("u/a", b"x")
        assert stat.modified_ns is not None
        assert abs(stat.modified_ns / 1e9 - time.time()) < 5


class TestWriting:
    def test_replaces(self, store: Store) -> None:
        first = store.write("u/a", b"first content")
        second = store.write("u/a", b"second")
        assert store.read("u/a") == b"second"
        assert first.version != second.version
        assert contents(store) == {"u/a": 6}

    def test_if_absent(self, store: Store) -> None:
        store.write("u/a", b"first", if_absent=True)
        with pytest.raises(Conflict, match="u/a"):
            store.write("u/a", b"second", if_absent=True)
        assert store.read("u/a") == b"first"

    def test_if_version(self, store: Store) -> None:
        first = store.write("u/a", b"first")
        second = store.write("u/a", b"second", if_version=first.version)
        with pytest.raises(Conflict):
            store.write("u/a", b"third", if_version=first.version)
        assert store.read("u/a") == b"second"
        assert store.stat("u/a").version == second.version

    def test_if_version_of_what_is_gone(self, store: Store) -> None:
        first = store.write("u/a", b"first")
        store.delete("u/a")
        with pytest.raises(Conflict):
            store.write("u/a", b"second", if_version=first.version)
        with pytest.raises(NotFound):
            store.stat("u/a")

    def test_versions_differ_however_fast_the_writes(self, store: Store) -> None:
        versions = [store.write("u/a", b"%04d" % number).version for number in range(20)]
        assert len(set(versions)) == 20

    @pytest.mark.parametrize("how", ["if_absent", "if_version"])
    def test_one_of_many_racing_writers_wins(self, make_store: MakeStore, how: str) -> None:
        base = make_store()
        version = None if how == "if_absent" else base.write("u/a", b"base").version
        barrier = threading.Barrier(8)

        def race(number: int) -> bytes | None:
            store = make_store()
            content = b"writer %d" % number
            barrier.wait(10)
            try:
                store.write("u/a", content, if_absent=version is None, if_version=version)
            except Conflict:
                return None
            return content

        with ThreadPoolExecutor(8) as pool:
            won = [content for content in pool.map(race, range(8)) if content is not None]
        assert len(won) == 1
        assert base.read("u/a") == won[0]

    def test_an_object_may_be_a_prefix_of_others(self, store: Store) -> None:
        store.write("u/both", b"1")
        store.write("u/both/child", b"22", if_absent=True)
        store.write("u/both/child/deep", b"333")
        store.write("u/dir/x", b"4444")
        try:
            store.write("u/dir", b"55555", if_absent=True)
        except Conflict:  # SeaweedFS takes the directory for an object: a clear refusal, and nothing was written
            with pytest.raises(NotFound):
                store.stat("u/dir")
            store.write("u/dir", b"55555")
        expected = {"u/both": 1, "u/both/child": 2, "u/both/child/deep": 3, "u/dir/x": 4, "u/dir": 5}
        assert contents(store) == expected
        assert {key: len(store.read(key)) for key in expected} == expected
        with pytest.raises(Conflict):
            store.write("u/both/child", b"other", if_absent=True)
        store.delete("u/both")
        store.write("u/both/child", b"new", if_version=store.stat("u/both/child").version)
        assert contents(store, "u/both") == {"u/both/child": 3, "u/both/child/deep": 3}

    def test_names_that_engines_fold_stay_apart(self, store: Store) -> None:
        paths = [
            b"a",
            b"a ",
            b" a",
            b"a\\b",
            b"a/b",
            b"a//b",
            b"a/./b",
            b"a/../b",
            b"\xff",
            b"\xfe",
            b"A",
            b"a%20",
            b"a\n",
        ]
        paths += [
            "ü".encode(),
            "u\u0308".encode(),
            b"x" * 255,
            b"\xff" * 255,
            b"d/" * 200 + b"e",
            b"\xff" * 2000,
            b"\xff" * 2001,
        ]
        wanted = {"u/" + keys.encode(path): path for path in paths}
        assert len(wanted) == len(paths)
        for key, path in wanted.items():
            store.write(key, path, if_absent=True)
        assert contents(store) == {key: len(path) for key, path in wanted.items()}
        assert all(store.read(key) == path for key, path in wanted.items())

    @pytest.mark.parametrize(
        "key", ["", "/a", "a/", "a//b", "../a", "a/../b", "a/./b", "a b", "a\\b", "ü", "a\0", ".runfsx/a"]
    )
    def test_keys_that_are_not_safe_are_refused(self, store: Store, key: str) -> None:
        with pytest.raises(UsageError):
            store.write(key, b"x")
        with pytest.raises(UsageError):
            store.upload(key, from_bytes(b"x"), 1)
        assert contents(store) == {}


class TestUploading:
    @pytest.mark.parametrize("size", [0, 1, 8 * MIB - 1, 8 * MIB, 8 * MIB + 1, 20 * MIB + 77])
    def test_any_size(self, store: Store, size: int) -> None:
        data = random.Random(size).randbytes(size)
        progress: list[int] = []
        stat = store.upload("u/big", from_bytes(data), size, if_absent=True, progress=progress.append)
        assert stat.size == size
        assert hashlib.sha256(store.read("u/big")).digest() == hashlib.sha256(data).digest()
        assert progress == sorted(progress)
        assert size == 0 or progress[-1] == size
        assert store.read("u/big", size - 5 if size > 5 else 0, 100) == data[-5:]

    @pytest.mark.parametrize("size", [1000, 20 * MIB])
    def test_conditions(self, store: Store, size: int) -> None:
        data = random.Random(size).randbytes(size)
        first = store.upload("u/big", from_bytes(data), size, if_absent=True)
        other = data[::-1]
        with pytest.raises(Conflict):
            store.upload("u/big", from_bytes(other), size, if_absent=True)
        with pytest.raises(Conflict):
            store.upload("u/big", from_bytes(other), size, if_version='"0123456789abcdef0123456789abcdef"')
        assert store.stat("u/big").version == first.version
        assert store.upload("u/big", from_bytes(other), size, if_version=first.version).version != first.version
        assert store.read("u/big", 0, 10) == other[:10]

    @pytest.mark.parametrize("size", [1000, 20 * MIB])
    def test_a_failing_source_leaves_nothing(self, store: Store, size: int) -> None:
        class Broken(Exception):
            pass

        def source(offset: int, length: int) -> bytes:
            if offset + length == size:
                raise Broken
            return bytes(length)

        with pytest.raises(Broken):
            store.upload("u/big", source, size)
        assert contents(store) == {}

    @pytest.mark.parametrize("size", [1000, 20 * MIB])
    def test_the_sources_own_errors_come_back_as_they_are(self, store: Store, size: int) -> None:
        def source(offset: int, length: int) -> bytes:
            raise FileNotFoundError(2, "the local file vanished")

        with pytest.raises(FileNotFoundError, match="vanished"):
            store.upload("u/big", source, size)

    @pytest.mark.parametrize("size", [1000, 20 * MIB])
    def test_a_source_that_shrinks_is_an_error_and_leaves_what_was_there(self, store: Store, size: int) -> None:
        store.write("u/big", b"before")
        with pytest.raises(StoreError, match="changed meanwhile"):
            store.upload("u/big", lambda offset, length: bytes(length - 1), size)
        assert store.read("u/big") == b"before"


class TestChecksums:
    @pytest.mark.parametrize("size", [0, 1, 5 * MIB + 1, 8 * MIB, 8 * MIB + 1, 17 * MIB])
    def test_what_a_store_reports_is_what_we_compute(self, store: Store, size: int) -> None:
        data = random.Random(size).randbytes(size)
        stat = store.upload("u/a", from_bytes(data), size)
        if store.info().checksum is None:
            assert stat.checksum is None
            return
        if stat.checksum is not None and stat.checksum[0] == checksums.MD5:
            assert stat.checksum[1] == hashlib.md5(data).hexdigest()
        else:
            assert stat.checksum == checksums.Checksum.of(data).value()
        assert stat.verified
        assert store.stat("u/a").checksum == stat.checksum
        assert next(iter(store.list("u/a"))).checksum == stat.checksum

    def test_a_changed_byte_changes_it(self, store: Store) -> None:
        if store.info().checksum is None:
            pytest.skip("this store keeps no checksum")
        data = bytearray(os.urandom(1000))
        before = store.write("u/a", bytes(data)).checksum
        data[500] ^= 1
        assert store.write("u/a", bytes(data)).checksum != before

    def test_a_copy_keeps_it(self, store: Store) -> None:
        size = 9 * MIB
        data = random.Random(1).randbytes(size)
        stat = store.upload("u/a", from_bytes(data), size)
        assert store.copy("u/a", "u/b").checksum == stat.checksum


class TestListing:
    def test_prefixes(self, store: Store) -> None:
        for key in ("u1/a", "u1/b/c", "u10/a", "u2/a", ".runfs/u1/manifest.json"):
            store.write(key, key.encode())
        assert set(contents(store)) == {"u1/a", "u1/b/c", "u10/a", "u2/a", ".runfs/u1/manifest.json"}
        assert set(contents(store, "u1/")) == {"u1/a", "u1/b/c"}
        assert set(contents(store, "u1")) == {"u1/a", "u1/b/c", "u10/a"}
        assert set(contents(store, "u1/b")) == {"u1/b/c"}
        assert set(contents(store, "u1/b/c")) == {"u1/b/c"}
        assert set(contents(store, ".runfs/u1/")) == {".runfs/u1/manifest.json"}
        assert set(contents(store, "nothing/")) == set()

    def test_says_the_same_as_stat(self, store: Store) -> None:
        store.write("u/a", b"content")
        listed = next(iter(store.list("u/")))
        asked = store.stat("u/a")
        assert (listed.key, listed.size, listed.version) == (asked.key, asked.size, asked.version)

    def test_more_than_a_page_and_lazily(self, store: Store) -> None:
        wanted = {f"u/{number:04d}" for number in range(1100)}
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda key: store.write(key, b"x"), wanted))
        listing = store.list("u/")
        first = next(listing)
        assert {first.key, *(stat.key for stat in listing)} == wanted

    def test_an_abandoned_listing_does_no_harm(self, store: Store) -> None:
        store.write("u/a", b"x")
        store.write("u/b", b"x")
        listing = store.list("u/")
        next(listing)
        del listing
        assert len(contents(store)) == 2

    def test_bad_prefixes_are_refused(self, store: Store) -> None:
        for prefix in ("/", "../", "a//"):
            with pytest.raises(UsageError):
                list(store.list(prefix))


class TestDeletingAndCopying:
    def test_delete(self, store: Store) -> None:
        store.write("u/a", b"x")
        store.delete("u/a")
        store.delete("u/a")
        store.delete("never/was")
        assert contents(store) == {}
        store.write("u/a", b"again", if_absent=True)
        assert store.read("u/a") == b"again"

    @pytest.mark.parametrize("size", [0, 100, 9 * MIB])
    def test_copy(self, store: Store, size: int) -> None:
        data = random.Random(size).randbytes(size)
        store.upload("u/a", from_bytes(data), size)
        assert store.copy("u/a", "v/b").size == size
        assert store.read("v/b") == data
        assert store.read("u/a") == data
        store.write("v/other", b"something else")
        with pytest.raises(Conflict):
            store.copy("u/a", "v/other", if_absent=True)
        assert store.copy("u/a", "v/c", if_absent=True).size == size
        assert store.read("v/c") == data


class TestAsAWhole:
    def test_check_finds_everything_well_and_leaves_nothing(self, store: Store) -> None:
        found = store.check()
        assert found.problems == []
        assert (found.reachable, found.readable, found.writable, found.conditional) == (True, True, True, True)
        assert found.latency_s is not None
        assert 0 <= found.latency_s < 5
        assert found.clock_skew_s is not None
        assert abs(found.clock_skew_s) < 2
        assert contents(store) == {}

    def test_info_agrees_with_what_it_does(self, store: Store) -> None:
        info = store.info()
        assert (info.ranges, info.conditional_write, info.atomic_replace, info.read_only) == (True, True, True, False)

    def test_read_only(self, make_store: MakeStore) -> None:
        make_store().write("u/a", b"x")
        store = make_store(read_only=True)
        assert store.info().read_only
        assert store.read("u/a") == b"x"
        for change in (
            lambda: store.write("u/b", b"x"),
            lambda: store.upload("u/b", from_bytes(b"x"), 1),
            lambda: store.delete("u/a"),
            lambda: store.copy("u/a", "u/b"),
        ):
            with pytest.raises(Denied, match="read-only"):
                change()
        assert contents(store) == {"u/a": 1}
        found = store.check()
        assert found.reachable
        assert not found.writable
        assert len(found.problems) == 1

    def test_closed(self, make_store: MakeStore) -> None:
        store = make_store()
        store.disconnect()
        with pytest.raises(Unreachable, match="disconnected"):
            store.write("u/a", b"x")
        with pytest.raises(Unreachable, match="disconnected"):
            store.read("u/a")

    def test_readers_never_see_a_mixture(self, make_store: MakeStore) -> None:
        store, other = make_store(), make_store()
        size = 300_000
        store.write("u/a", bytes(size))
        stop = threading.Event()

        def write() -> None:
            number = 0
            while not stop.is_set():
                number = (number + 1) % 256
                other.write("u/a", bytes([number]) * size)

        writer = threading.Thread(target=write)
        writer.start()
        try:
            end = time.monotonic() + 1.0
            seen: set[int] = set()
            whole = True
            while time.monotonic() < end and whole:
                data = store.read("u/a")
                seen.add(data[0])
                whole = data == data[:1] * size
        finally:
            stop.set()
            writer.join()
        assert whole
        assert len(seen) > 1

    def test_many_threads_at_once(self, store: Store) -> None:
        def work(number: int) -> bool:
            content = os.urandom(2000)
            store.write(f"u/{number}", content, if_absent=True)
            return store.read(f"u/{number}") == content

        with ThreadPoolExecutor(16) as pool:
            assert all(pool.map(work, range(200)))
