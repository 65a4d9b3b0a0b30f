"""Objects on stores: names, versions, metadata, what is found by them, and what a store may do to them."""

import dataclasses
import enum
import io
import json
import os
import random
import re
import threading
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from tests.servers import Seaweed
from vfs.errors import (
    Conflict,
    ManifestError,
    NotFound,
    Refused,
    StoreError,
    StoreTimeout,
    Unreachable,
    UsageError,
    WrongBytes,
)
from vfs.events import Ended, Events, ObjectDeleted, ObjectSet, Started, Stepped
from vfs.manifest import CHUNK, digest_of
from vfs.objects import Bucket, Objects
from vfs.objects import format as form
from vfs.objects.source import Digesting, Source
from vfs.stores import Store, open_store
from vfs.stores.base import BaseStore
from vfs.stores.memory import MemoryStore
from vfs.stores.memory import Objects as Content
from vfs.stores.protocol import Info, Stat

BIG = random.Random(5).randbytes(3 * CHUNK + 12_345)


def open_kind(request: pytest.FixtureRequest, kind: str, tmp_path: Path) -> Store:
    if kind == "s3":
        seaweed: Seaweed = request.getfixturevalue("seaweed")
        prefix = "t-" + os.urandom(6).hex()
        url = f"s3://{seaweed.bucket}/{prefix}?endpoint={seaweed.endpoint}&region={seaweed.region}"
        return open_store({"url": url, **seaweed.options()}, "lab")
    return open_store(f"file://{tmp_path}/store" if kind == "file" else f"memory://{os.urandom(6).hex()}", "lab")


@pytest.fixture(params=["memory", "file", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    opened = open_kind(request, request.param, tmp_path)
    yield opened
    opened.disconnect()


@pytest.fixture
def objects(store: Store) -> Objects:
    return Objects(store)


@pytest.fixture
def bucket(objects: Objects) -> Bucket:
    return objects.bucket("models")


@pytest.fixture
def memory() -> MemoryStore:
    return MemoryStore("lab")


@pytest.fixture
def quick(memory: MemoryStore) -> Bucket:
    return Objects(memory).bucket("models")


def read(bucket: Bucket, name: object, version: int | None = None) -> bytes:
    with bucket.get(name, version) as item:
        return item.read()


class Colour(enum.Enum):
    RED = "red"


class TestOnEveryStore:
    def test_an_item_comes_back_with_its_metadata(self, bucket: Bucket) -> None:
        metadata = {"epochs": 90, "Name": "ünï\udc80", "nested": {"a": [1, None, True, 0.5]}}
        put = bucket.put("resnet/weights.npz", BIG, metadata)
        with bucket.get("resnet/weights.npz") as item:
            assert item.read() == BIG
            assert (item.metadata, item.version, item.size) == (metadata, 1, len(BIG))
            assert item.stats == put == bucket.stats("resnet/weights.npz")
            assert abs(item.created - datetime.now(UTC)) < timedelta(minutes=5)

    def test_a_put_of_the_same_name_makes_the_next_version(self, bucket: Bucket) -> None:
        for number in (1, 2, 3):
            assert bucket.put("a", f"content {number}".encode(), {"n": number}).version == number
        assert read(bucket, "a") == b"content 3"
        assert [read(bucket, "a", number) for number in (1, 2, 3)] == [b"content 1", b"content 2", b"content 3"]
        assert [(stats.version, stats.metadata) for stats in bucket.versions("a")] == [
            (1, {"n": 1}),
            (2, {"n": 2}),
            (3, {"n": 3}),
        ]

    def test_metadata_is_merged_and_replaced_and_makes_no_version(self, bucket: Bucket) -> None:
        bucket.put("a", b"x", {"kept": 1, "changed": 1})
        assert bucket.update_metadata("a", {"changed": 2, "new": 3}).metadata == {"kept": 1, "changed": 2, "new": 3}
        assert bucket.stats("a").metadata == {"kept": 1, "changed": 2, "new": 3}
        bucket.put("a", b"y", {"of": 2})
        bucket.set_metadata("a", {"only": True}, version=1)
        assert [stats.metadata for stats in bucket.versions("a")] == [{"only": True}, {"of": 2}]

    def test_what_is_found(self, bucket: Bucket) -> None:
        for number in range(40):
            bucket.put(f"run/{number}", b"x" * number, {"even": number % 2 == 0, "seed": number})
        found = bucket.find("run/?", even=True)
        assert {stats.name for stats in found} == {f"run/{number}" for number in (0, 2, 4, 6, 8)}
        assert not found.stale
        assert set(bucket.keys(re.compile("^run/3."), even=False)) == {f"run/3{each}" for each in (1, 3, 5, 7, 9)}
        assert [stats.size for stats in bucket.find(seed=7)] == [7]
        assert len(list(bucket.keys())) == 40

    def test_removing(self, bucket: Bucket, store: Store) -> None:
        for number in (1, 2, 3):
            bucket.put("a", BIG[: CHUNK + number])
        bucket.remove("a", 2)
        assert [stats.version for stats in bucket.versions("a")] == [1, 3]
        with pytest.raises(NotFound, match="has no version 2; it has 1, 3"):
            bucket.get("a", 2)
        bucket.remove("a")
        with pytest.raises(NotFound, match="no item 'a' in bucket 'models'"):
            bucket.get("a")
        assert list(bucket.keys()) == []
        assert [stat.key for stat in store.list(form.bucket_prefix("models"))] == [".runfs/objects/models/a/%item"]
        assert bucket.put("a", b"again").version == 4

    def test_copy(self, bucket: Bucket, objects: Objects) -> None:
        bucket.put("a", BIG, {"n": 1})
        bucket.put("a", b"second", {"n": 2})
        other = objects.bucket("other")
        assert bucket.copy("a", "b").metadata == {"n": 2}
        assert bucket.copy("a", "deep/c", 1, other).bucket == "other"
        bucket.remove("a")
        assert (read(bucket, "b"), read(other, "deep/c")) == (b"second", BIG)
        assert other.stats("deep/c").metadata == {"n": 1}

    def test_buckets(self, objects: Objects) -> None:
        for name in ("b/with/slashes", "Ünï cödé ", ".", "x" * 1000, "plain"):
            objects.bucket(name).put("a", name.encode())
        assert sorted(objects.buckets()) == sorted(["b/with/slashes", "Ünï cödé ", ".", "x" * 1000, "plain"])
        assert list(objects.buckets("plai")) == ["plain"]
        assert read(objects.bucket("x" * 1000, create=False), "a") == b"x" * 1000
        with pytest.raises(Refused, match="not empty"):
            objects.remove("plain")
        objects.remove("plain", force=True)
        assert list(objects.buckets(re.compile("^pl"))) == []
        objects.bucket("plain")
        assert list(objects.bucket("plain").keys()) == []
        objects.remove("plain")
        assert "plain" not in list(objects.buckets())

    @pytest.mark.parametrize(
        "name",
        ["a b ", " ", "a//b", "..", "../x", "a\\b", "#%?*", "ü/日本", "\n", "x" * 1000, "/", "%item", ".runfs-x"],
    )
    def test_odd_names(self, bucket: Bucket, name: str) -> None:
        bucket.put("other", b"other")
        bucket.put(name, name.encode())
        assert read(bucket, name) == name.encode()
        assert set(bucket.keys()) == {name, "other"}
        bucket.remove(name)
        assert list(bucket.keys()) == ["other"]

    def test_a_name_may_go_on_from_another(self, bucket: Bucket) -> None:
        for name in ("a/b/c", "a", "a/b"):
            bucket.put(name, name.encode())
        bucket.remove("a/b")
        assert {name: read(bucket, name) for name in bucket.keys()} == {"a": b"a", "a/b/c": b"a/b/c"}  # noqa: SIM118

    def test_racing_puts_are_all_versions(self, store: Store) -> None:
        first, second = Objects(store).bucket("b"), Objects(store).bucket("b")
        errors: list[BaseException] = []

        def work(bucket: Bucket, who: int) -> None:
            try:
                for number in range(6):
                    bucket.put("a", f"{who} {number}".encode(), {"who": who})
                    bucket.update_metadata("shared", {f"{who}-{number}": 1})
            except BaseException as error:
                errors.append(error)

        first.put("shared", b"")
        threads = [threading.Thread(target=work, args=(bucket, who)) for who, bucket in enumerate([first, second] * 2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        contents = [read(first, "a", stats.version) for stats in first.versions("a")]
        assert sorted(contents) == sorted(f"{who} {number}".encode() for who in range(4) for number in range(6))
        assert [stats.version for stats in first.versions("a")] == list(range(1, 25))
        assert len(first.stats("shared").metadata) == 24


class TestWhatIsPut:
    def test_bytes_of_any_kind(self, quick: Bucket) -> None:
        for given in (b"abc", bytearray(b"abc"), memoryview(b"xabcx")[1:4]):
            quick.put("a", given)
            assert read(quick, "a") == b"abc"

    def test_a_file(self, quick: Bucket, tmp_path: Path) -> None:
        (tmp_path / "f").write_bytes(BIG)
        quick.put("a", tmp_path / "f")
        assert read(quick, "a") == BIG
        with pytest.raises(FileNotFoundError):
            quick.put("b", tmp_path / "none")
        assert list(quick.keys()) == ["a"]

    @pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK])
    def test_a_stream_from_where_it_stands(self, quick: Bucket, size: int) -> None:
        stream = io.BytesIO(b"skip" + BIG[:size])
        stream.seek(4)
        quick.put("a", stream, buffer_size=100_000)
        assert read(quick, "a") == BIG[:size]
        assert not stream.closed

    def test_a_stream_that_cannot_say_how_long_it_is(self, quick: Bucket) -> None:
        asked: list[int] = []

        class Pipe:
            def __init__(self) -> None:
                self.left = io.BytesIO(BIG)

            def read(self, size: int) -> bytes:
                asked.append(size)
                return self.left.read(min(size, 7_001))

        quick.put("a", Pipe(), buffer_size=50_000)  # type: ignore[arg-type]
        assert set(asked) == {50_000}
        assert read(quick, "a") == BIG

    def test_another_item(self, quick: Bucket) -> None:
        quick.put("a", BIG)
        with quick.get("a") as item:
            item.seek(10)
            quick.put("b", item)
        assert read(quick, "b") == BIG[10:]

    def test_what_cannot_be(self, quick: Bucket, memory: MemoryStore) -> None:
        before = len(list(memory.list()))
        wrong: list[Any] = ["text", 5, io.StringIO("text"), None]
        for given in wrong:
            with pytest.raises(UsageError, match="cannot be put"):
                quick.put("a", given)
        with pytest.raises(UsageError, match="buffer_size"):
            quick.put("a", b"x", buffer_size=0)
        with pytest.raises(UsageError, match="metadata 'path': not a value that JSON has"):
            quick.put("a", b"x", {"path": Path("/")})
        with pytest.raises(UsageError, match="metadata 'n'"):
            quick.put("a", b"x", {"n": float("nan")})
        with pytest.raises(UsageError, match="256 KiB"):
            quick.put("a", b"x", {"n": "x" * 300_000})
        assert len(list(memory.list())) == before

    def test_a_store_that_asks_in_any_order(self) -> None:
        """It may ask again for a piece that was lost, and go on where an earlier upload was."""
        whole = digest_of(lambda offset, length: BIG[offset : offset + length], len(BIG))
        for orders in ([(CHUNK, 100), (0, 5)], [(0, 700), (0, 900), (500, CHUNK)], [(2 * CHUNK + 1, 7)], []):
            digesting = Digesting(Source(io.BytesIO(BIG), 0, len(BIG), 1000))
            for offset, length in orders:
                assert digesting.read(offset, length) == BIG[offset : offset + length]
            assert digesting.content() == whole

    def test_a_file_that_becomes_shorter_meanwhile(self, quick: Bucket, memory: MemoryStore, tmp_path: Path) -> None:
        (tmp_path / "f").write_bytes(BIG)

        class Cut(io.FileIO):
            def read(self, size: int | None = -1, /) -> bytes:
                os.truncate(tmp_path / "f", 1000)
                return super().read(size)

        with Cut(tmp_path / "f") as file, pytest.raises(StoreError, match="changed"):
            quick.put("a", file)
        assert list(quick.keys()) == []
        assert not [stat for stat in memory.list() if "%data" in stat.key]

    def test_memory_stays_bounded(self, tmp_path: Path) -> None:
        """The largest piece that is asked of a stream, and of a store, does not grow with the item."""
        size = 64 << 20
        (tmp_path / "f").touch()
        os.truncate(tmp_path / "f", size)
        store = open_store(f"file://{tmp_path}/store")
        bucket = Objects(store).bucket("b")
        asked: list[int] = []

        class Counted(io.FileIO):
            def read(self, size: int | None = -1, /) -> bytes:
                asked.append(size or 0)
                return super().read(size)

        with Counted(tmp_path / "f") as file:
            bucket.put("a", file, buffer_size=123_456)
        assert max(asked) <= 123_456
        with bucket.get("a") as item:
            total = 0
            while piece := item.read(1 << 20):
                total += len(piece)
                assert len(item._flight) <= 8
        assert total == size


class TestTheStream:
    @pytest.fixture
    def reads(self, quick: Bucket, memory: MemoryStore) -> list[str]:
        quick.put("a", BIG)
        made: list[str] = []
        memory.before = lambda operation, key: made.append(operation) if operation == "read" else None
        return made

    def test_is_a_binary_file(self, quick: Bucket) -> None:
        quick.put("a", b"one\ntwo\nthree")
        with quick.get("a") as item:
            assert (item.readable(), item.seekable(), item.writable()) == (True, True, False)
            assert list(item) == [b"one\n", b"two\n", b"three"]
            assert item.seek(-5, os.SEEK_END) == 8
            assert item.read(2) == b"th"
            assert item.tell() == 10
            assert item.read() == b"ree"
            assert item.read() == b""
            assert item.seek(100) == 100
            assert item.read(1) == b""
            with pytest.raises(ValueError, match="cannot seek"):
                item.seek(-1)
            item.seek(0)
            buffer = bytearray(4)
            assert item.readinto(buffer) == 4
            assert bytes(buffer) == b"one\n"
            assert io.TextIOWrapper(item).read() == "two\nthree"
        with pytest.raises(ValueError, match="closed"):
            item.read()

    def test_ranges_ask_for_little(self, quick: Bucket, memory: MemoryStore, reads: list[str]) -> None:
        with quick.get("a") as item:
            reads.clear()
            item.seek(2 * CHUNK + 5)
            assert item.read(10) == BIG[2 * CHUNK + 5 : 2 * CHUNK + 15]
            assert reads == ["read", "read"]  # the digests, one chunk
            item.seek(CHUNK - 5)
            assert item.read(10) == BIG[CHUNK - 5 : CHUNK + 5]

    def test_random_reads_are_right(self, quick: Bucket) -> None:
        quick.put("a", BIG)
        dice = random.Random(1)
        with quick.get("a") as item:
            for _ in range(200):
                start, length = dice.randrange(len(BIG) + 10), dice.randrange(2 * CHUNK)
                item.seek(start)
                assert item.read(length) == BIG[start : start + length]


class TestNames:
    def test_what_has_a_text_form(self, quick: Bucket) -> None:
        number = uuid.UUID(int=7)
        quick.put(PurePosixPath("a/b"), b"path")
        quick.put(number, b"uuid")
        quick.put(Colour.RED, b"enum")
        assert set(quick.keys()) == {"a/b", str(number), "red"}
        assert [read(quick, name) for name in ("a/b", str(number), "red")] == [b"path", b"uuid", b"enum"]
        assert list(quick.keys(number)) == [str(number)]
        assert list(quick.keys(Colour.RED)) == ["red"]
        assert set(quick.keys(PurePosixPath("a/b"))) == {"a/b"}

    @pytest.mark.parametrize("name", ["", "x" * 1025, "a\0b", "\ud800", b"bytes", None])
    def test_bad_ones(self, quick: Bucket, memory: MemoryStore, name: object) -> None:
        for call in (quick.get, quick.stats, quick.remove, quick.versions):
            with pytest.raises(UsageError):
                call(name)
        with pytest.raises(UsageError):
            quick.put(name, b"x")
        with pytest.raises(UsageError):
            Objects(memory).bucket(name)

    def test_filters(self, quick: Bucket) -> None:
        for name in ("a[1]", "A*b", "ab", "x/ab/y"):
            quick.put(name, b"")
        assert set(quick.keys("ab")) == {"ab", "x/ab/y"}
        assert set(quick.keys("a*")) == {"a[1]", "ab"}
        assert set(quick.keys("x*y")) == {"x/ab/y"}
        assert set(quick.keys(re.compile("ab$", re.IGNORECASE))) == {"ab"}
        assert set(quick.keys(PurePosixPath("A*b"))) == {"A*b"}
        with pytest.raises(UsageError, match="bytes"):
            quick.keys(re.compile(b"ab"))
        with pytest.raises(UsageError, match="the filter"):
            quick.keys(b"ab")

    def test_metadata_is_searched_by_value(self, quick: Bucket) -> None:
        quick.put("one", b"", {"n": 1, "t": "alpha", "self": "x"})
        quick.put("true", b"", {"n": True, "t": "beta", "l": [1, 2]})
        quick.put("text", b"", {"n": "1", "where": "a/b"})
        assert set(quick.keys(n=1)) == {"one"}
        assert set(quick.keys(n=1.0)) == {"one"}
        assert set(quick.keys(n=True)) == {"true"}
        assert set(quick.keys(n="1")) == {"text"}
        assert set(quick.keys(t=re.compile("^al|ta$"))) == {"one", "true"}
        assert set(quick.keys(l=(1, 2))) == {"true"}
        assert set(quick.keys(where=PurePosixPath("a/b"))) == {"text"}
        assert set(quick.keys(missing=None)) == set()
        assert set(quick.keys(self="x", filter=None)) == set()
        assert set(quick.keys(self="x")) == {"one"}

    def test_public_values_are_text(self, quick: Bucket) -> None:
        assert all(type(each) is str for each in (quick.put(Path("/tmp/x"), b"").name, *quick.keys(), quick.name))


class TestWhatIsMissing:
    def test_a_bucket(self, memory: MemoryStore) -> None:
        objects = Objects(memory)
        objects.bucket("there")
        with pytest.raises(NotFound, match="no bucket 'none'; there are the buckets 'there'"):
            objects.remove("none")
        with pytest.raises(NotFound, match="no bucket 'none'"):
            objects.bucket("none", create=False)
        gone = objects.bucket("gone")
        objects.remove("gone")
        for call in (lambda: gone.put("a", b"x"), lambda: gone.get("a"), lambda: gone.remove("a")):
            with pytest.raises(NotFound, match="no bucket 'gone'"):
                call()
        assert not [stat.key for stat in memory.list(form.bucket_prefix("gone"))]

    def test_an_item_or_version(self, quick: Bucket) -> None:
        quick.put("a", b"x")
        calls: list[Callable[[], object]] = [
            lambda: quick.get("b"),
            lambda: quick.stats("b"),
            lambda: quick.versions("b"),
            lambda: quick.remove("b"),
            lambda: quick.copy("b", "c"),
            lambda: quick.update_metadata("b", {}),
            lambda: quick.get("a", 2),
            lambda: quick.remove("a", 2),
            lambda: quick.set_metadata("a", {}, 2),
        ]
        for call in calls:
            with pytest.raises(NotFound, match=r"no item 'b' in bucket 'models'|has no version 2; it has 1"):
                call()
        for version in (0, -1, True, "1"):
            with pytest.raises(UsageError, match="numbered from 1"):
                quick.get("a", version)  # type: ignore[arg-type]

    def test_a_version_removed_while_it_is_read(self, quick: Bucket) -> None:
        quick.put("a", BIG)
        with quick.get("a") as item:
            assert item.read(5) == BIG[:5]
            quick.remove("a")
            item.seek(2 * CHUNK)
            with pytest.raises(NotFound, match="removed meanwhile"):
                item.read()

    def test_a_store_that_cannot_hold_items(self) -> None:
        class Choosing(MemoryStore):
            def info(self) -> Info:
                return dataclasses.replace(super().info(), chooses_keys=True)

        with pytest.raises(UsageError, match="chooses the names"):
            Objects(Choosing())
        with pytest.raises(UsageError, match="give a store"):
            Objects([])

    def test_a_read_only_store(self) -> None:
        content = Content()
        Objects(MemoryStore("lab", objects=content)).bucket("models").put("a", b"x")
        bucket = Objects(MemoryStore("lab", objects=content, read_only=True)).bucket("models")
        assert read(bucket, "a") == b"x"
        for call in (lambda: bucket.put("a", b"y"), lambda: bucket.remove("a"), lambda: bucket.set_metadata("a", {})):
            with pytest.raises(StoreError, match="read-only"):
                call()


class Lying(BaseStore):
    """A store over another that gives other bytes than it has."""

    def __init__(self, inner: MemoryStore, lie: Callable[[str, int, bytes], bytes]) -> None:
        super().__init__("liar", "memory://liar")
        self.inner, self.lie = inner, lie

    def info(self) -> Info:
        return self.inner.info()

    def stat(self, key: str, *, deadline: float | None = None) -> Stat:
        return self.inner.stat(key)

    def read(self, key: str, start: int = 0, length: int | None = None, *, deadline: float | None = None) -> bytes:
        return self.lie(key, start, self.inner.read(key, start, length))

    def upload(self, *args: Any, **more: Any) -> Stat:
        return self.inner.upload(*args, **more)

    def list(self, prefix: str = "", *, recursive: bool = True, deadline: float | None = None) -> Iterator[Stat]:
        return self.inner.list(prefix, recursive=recursive)

    def delete(self, key: str, *, deadline: float | None = None) -> None:
        self.inner.delete(key)


class TestAStoreThatLies:
    def liar(self, memory: MemoryStore, kind: str, lie: Callable[[int, bytes], bytes]) -> Bucket:
        Objects(memory).bucket("b").put("a", BIG)
        return Objects(Lying(memory, lambda key, at, data: lie(at, data) if kind in key else data)).bucket("b")

    @pytest.mark.parametrize("kind", ["%data", "%digests"])
    @pytest.mark.parametrize(
        "lie",
        [
            lambda at, data: data[:-1],
            lambda at, data: b"",
            lambda at, data: data + b"more",
            lambda at, data: bytes(len(data)),
            lambda at, data: data[:-1] + bytes([data[-1] ^ 1]),
        ],
        ids=["truncated", "empty", "longer", "zeroes", "one bit"],
    )
    def test_wrong_bytes_are_never_given(
        self, memory: MemoryStore, kind: str, lie: Callable[[int, bytes], bytes]
    ) -> None:
        bucket = self.liar(memory, kind, lie)
        with bucket.get("a") as item, pytest.raises(WrongBytes, match="liar gives other"):
            item.read(100)

    def test_an_object_that_changes_midway(self, memory: MemoryStore) -> None:
        bucket = self.liar(memory, "%data", lambda at, data: data if at < CHUNK else bytes(len(data)))
        with bucket.get("a") as item:
            assert item.read(CHUNK) == BIG[:CHUNK]
            with pytest.raises(WrongBytes):
                item.read(1)

    def test_the_next_store_has_the_right_ones(self, memory: MemoryStore) -> None:
        Objects(memory).bucket("b").put("a", BIG)
        liar = Lying(memory, lambda key, at, data: bytes(len(data)) if "%data" in key else data)
        for stores in ([liar, memory], [memory, liar]):
            assert read(Objects(stores).bucket("b"), "a") == BIG

    @pytest.mark.parametrize(
        "record",
        [
            b"",
            b"{",
            b"[]",
            b'{"format": 2}',
            b'{"format": 1, "bucket": "b", "name": "../../x", "next": 1, "versions": [], "pending": []}',
            b'{"format": 1, "bucket": "b", "name": "a", "next": "1", "versions": [], "pending": []}',
            b'{"format": 1, "bucket": "b", "name": "a", "next": 2, "versions": [{"number": 1}], "pending": []}',
            b'{"format": 1, "bucket": "b", "name": "\\ud800", "next": 2, "versions": [], "pending": []}',
            b'{"format": 1, "bucket": "b", "name": "", "next": 2, "versions": [], "pending": []}',
            form.dump(form.Record("b", "a", 2, (form.Version(1, "0" * 32, 1, 2**63, "0" * 64, "", {}),))),
            form.dump(form.Record("b", "a", 2, (form.Version(1, "0" * 32, -1, 0, "0" * 64, "", {}),))),
        ],
    )
    def test_a_record_that_cannot_be(self, memory: MemoryStore, record: bytes) -> None:
        bucket = Objects(memory).bucket("b")
        bucket.put("good", b"x")
        memory.write(form.item_prefix("b", "a") + form.ITEM, record)
        for call in (lambda: bucket.get("a"), lambda: bucket.put("a", b"y")):
            with pytest.raises(ManifestError):
                call()
        found = bucket.keys()
        assert list(found) == ["good"]
        assert len(found.problems) == 1

    @pytest.mark.parametrize("body", [b"{", b'{"format": 1, "bucket": "\\ud800"}', b'{"format": 1, "bucket": "c"}'])
    def test_a_bucket_that_cannot_be(self, memory: MemoryStore, body: bytes) -> None:
        memory.write(form.bucket_key("b"), body)
        with pytest.raises(ManifestError):
            list(Objects(memory).buckets())

    def test_an_id_that_is_a_path(self, memory: MemoryStore) -> None:
        bucket = Objects(memory).bucket("b")
        bucket.put("a", b"x")
        key = form.item_prefix("b", "a") + form.ITEM
        body = json.loads(memory.read(key))
        body["versions"][0]["id"] = "../../../" + "a" * 23
        memory.write(key, json.dumps(body).encode())
        with pytest.raises(ManifestError, match="hexadecimal"):
            bucket.get("a")


class TestAStoreInTrouble:
    @pytest.mark.parametrize("error", [StoreTimeout("lost the answer"), Conflict("sent twice")])
    def test_a_write_whose_answer_is_lost_counts_once(self, error: StoreError) -> None:
        class Forgetful(MemoryStore):
            lose = True

            def write(self, key: str, data: bytes, **more: Any) -> Stat:
                stat = super().write(key, data, **more)
                if self.lose and key.endswith(form.ITEM):
                    self.lose = False
                    raise error
                return stat

        store = Forgetful()
        bucket = Objects(store).bucket("b")
        assert bucket.put("a", b"x").version == 1
        store.lose = True
        bucket.update_metadata("a", {"n": 1})
        assert [stats.metadata for stats in bucket.versions("a")] == [{"n": 1}]
        store.lose = True
        bucket.remove("a")
        assert list(bucket.keys()) == []

    def test_an_error_at_any_operation_leaves_the_old_state_or_the_new(self) -> None:
        for failing in range(1, 12):
            content = Content()
            bucket = Objects(MemoryStore("lab", objects=content)).bucket("b")
            bucket.put("a", b"old")
            left = [failing]

            def fail(operation: str, key: str, left: list[int] = left) -> None:
                left[0] -= 1
                if left[0] == 0:
                    raise Unreachable("gone")

            broken = Objects(MemoryStore("lab", objects=content, before=fail))
            try:
                put = Bucket(broken, "b").put("a", BIG)
            except Unreachable:
                put = None
            contents = [read(bucket, "a", stats.version) for stats in bucket.versions("a")]
            assert contents in ([b"old"], [b"old", BIG])
            assert put is None or contents == [b"old", BIG]

    def test_sweep_removes_what_no_record_names(self, tmp_path: Path) -> None:
        store = open_store(f"file://{tmp_path}/store")
        bucket = Objects(store).bucket("b")
        bucket.put("a", BIG)
        bucket.put("a", b"x")
        store.write(form.item_prefix("b", "a") + form.DATA + "0" * 32, b"left by a crash")
        store.write(form.item_prefix("b", "new") + form.DATA + "0" * 32, b"left by a crash")
        store.write(form.item_prefix("b", "new") + form.DIGESTS + "0" * 32, b"left by a crash")
        objects = Objects(store)
        assert objects.sweep() == 0
        assert objects.sweep(older_than_s=0) == 3
        assert (read(bucket, "a", 1), read(bucket, "a")) == (BIG, b"x")

    def test_somebody_else_always_first(self) -> None:
        class Busy(MemoryStore):
            def write(self, key: str, data: bytes, **more: Any) -> Stat:
                if key.endswith(form.ITEM):
                    raise Conflict("changed meanwhile")
                return super().write(key, data, **more)

        bucket = Objects(Busy()).bucket("b")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("vfs.objects.shelf.LONGEST_PAUSE_S", 0)
            with pytest.raises(Conflict, match="try again later"):
                bucket.put("a", b"x")


class TestEvents:
    def test_of_one_change(self, memory: MemoryStore) -> None:
        seen: list[Any] = []
        events = Events()
        events.subscribe(seen.append)
        bucket = Objects(memory, events=events).bucket("b")
        bucket.put("a", BIG)
        started, *steps, ended, changed = seen
        assert (started.what, started.name, started.size) == ("put", "b/a", len(BIG))
        assert steps[-1] == Stepped(started.id, len(BIG))
        assert ended == Ended(started.id, None)
        assert changed == ObjectSet("lab", "b/a")
        seen.clear()
        bucket.set_metadata("a", {})
        bucket.copy("a", "c")
        bucket.remove("a", 1)
        assert seen == [ObjectSet("lab", "b/a"), ObjectSet("lab", "b/c"), ObjectDeleted("lab", "b/a")]

    def test_of_a_put_that_fails(self, memory: MemoryStore) -> None:
        seen: list[Any] = []
        events = Events()
        events.subscribe(seen.append)
        bucket = Objects(memory, events=events).bucket("b")

        def fail(operation: str, key: str) -> None:
            if operation == "upload":
                raise Unreachable("gone")

        memory.before = fail
        with pytest.raises(Unreachable):
            bucket.put("a", b"x")
        assert [type(event) for event in seen] == [Started, Ended]
        assert seen[-1].error == "gone"
