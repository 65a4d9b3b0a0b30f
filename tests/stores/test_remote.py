"""What is particular to the engines behind opendal: servers that lie, long listings, conditions that are ignored, and
the configuration of clouds that no test can reach."""

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from tests.lying import Answer, lying, ranged
from tests.rclone import Rclone
from tests.stores.conftest import MakeStore
from tests.stores.kinds import LARGE, own_prefix
from vfs.errors import ConfigError, Conflict, Denied, RunfsError, StoreError
from vfs.stores import Store, open_store, validate
from vfs.stores.base import BaseStore
from vfs.stores.memory import MemoryStore, Objects

KEYS = {"access_key_id": "AKID-of-a-test", "secret_access_key": "secret-of-a-test"}
CONTENT = bytes(range(256)) * 40
MANY = 1_000_000 if LARGE else 50_000


@pytest.fixture
def opened() -> Iterator[Any]:
    made: list[Store] = []

    def make(place: str, **options: object) -> Store:
        url = f"s3://bucket/base?endpoint=http://{place}&region=us-east-1"
        made.append(open_store({"url": url, "deadline_s": 5, "window_s": 2, **KEYS, **options}))
        return made[-1]

    yield make
    for store in made:
        store.disconnect()


def listing(keys: list[str], after: str = "", size: str = "5") -> bytes:
    entries = "".join(
        f"<Contents><Key>{key}</Key><Size>{size}</Size><ETag>&quot;{number:032}&quot;</ETag>"
        "<LastModified>2026-01-01T00:00:00Z</LastModified></Contents>"
        for number, key in enumerate(keys)
    )
    more = f"<IsTruncated>true</IsTruncated><NextContinuationToken>{after}</NextContinuationToken>"
    more = more if after else "<IsTruncated>false</IsTruncated>"
    return f'<?xml version="1.0"?><ListBucketResult>{entries}{more}</ListBucketResult>'.encode()


def _resident() -> int:
    """Bytes of memory this process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class TestManyKeys:
    def test_very_many_in_pages_lazily_and_in_bounded_memory(self, opened: Any) -> None:
        """As S3 lists them (a million in `make test-large`): the first comes after one page, and no more than pages are
        ever held."""
        asked: list[str] = []

        def answer(request: BaseHTTPRequestHandler) -> Answer:
            query = parse_qs(urlsplit(request.path).query)
            start = int(query.get("continuation-token", ["0"])[0])
            asked.append(request.path)
            keys = [f"base/u/{number:07d}" for number in range(start, start + 1000)]
            return 200, {}, listing(keys, str(start + 1000) if start + 1000 < MANY else "")

        with lying(answer) as place:
            entries = opened(place).list()
            assert next(entries).key == "u/0000000"
            assert len(asked) <= 2
            before = _resident()
            count, last = 1, ""
            for stat in entries:
                count += 1
                assert stat.key > last
                last = stat.key
            grown = _resident() - before
        assert count == MANY
        assert len(asked) == MANY // 1000
        assert grown < 40 * 1024 * 1024

    def test_many_on_this_machine(self, memory_stores: MakeStore, file_stores: MakeStore) -> None:
        for store, many in ((memory_stores(), 20_000), (file_stores(), 300)):
            for number in range(many):
                store.write(f"u/{number % 10}/{number}", b"")
            entries = store.list()
            next(entries)
            assert sum(1 for _ in entries) == many - 1


class TestLies:
    def test_names_that_lead_elsewhere_are_left_out(self, opened: Any) -> None:
        bad = ["base/../x", "base/a/../../x", "base//x", "/etc/passwd", "base/./x", "base/.runfsx", "other/x", "base/ "]
        with lying(lambda _: (200, {}, listing(["base/good", *bad]))) as place:
            store = opened(place)
            listed = [stat.key for stat in store.list()]
        # opendal cuts the length of the prefix off without comparing it: such a name leads to nothing, below it.
        assert set(listed) - {"asswd", "x"} == {"good"}
        assert store.problems

    @pytest.mark.parametrize("body", [b"", b"<html>", b"<ListBucketResult><Contents><Key>base/a</Key>"])
    def test_a_listing_that_is_none(self, opened: Any, body: bytes) -> None:
        with lying(lambda _: (200, {}, body)) as place, pytest.raises(RunfsError):
            list(opened(place).list())

    @pytest.mark.parametrize("count", [1, 7, 1000])
    def test_a_page_that_repeats_for_ever(self, opened: Any, count: int) -> None:
        keys = [f"base/{number}" for number in range(count)]
        with lying(lambda _: (200, {}, listing(keys, "again"))) as place, pytest.raises(StoreError, match="for ever"):
            list(opened(place).list())

    @pytest.mark.parametrize("length", [None, 100])
    def test_a_cut_body(self, opened: Any, length: int | None) -> None:
        def answer(request: BaseHTTPRequestHandler) -> Answer:
            if request.command == "HEAD":
                return 200, {"Content-Length": str(len(CONTENT))}, b""
            status, headers, body = ranged(request, CONTENT)
            return status, {**headers, "Content-Length": str(len(body))}, body[:50]

        with lying(answer) as place, pytest.raises(StoreError):
            opened(place).read("u/a", 0, length)

    @pytest.mark.parametrize("sent", [50, 150])
    def test_a_range_of_another_length(self, opened: Any, sent: int) -> None:
        def answer(request: BaseHTTPRequestHandler) -> Answer:
            if request.command == "HEAD":
                return 200, {"Content-Length": str(len(CONTENT))}, b""
            return 206, {"Content-Range": f"bytes 100-{99 + sent}/{len(CONTENT)}"}, CONTENT[100 : 100 + sent]

        with lying(answer) as place:
            store = opened(place)
            with contextlib.suppress(StoreError):
                assert store.read("u/a", 100, 100) == CONTENT[100:200]

    def test_a_completion_that_begins_well_and_fails(self, opened: Any) -> None:
        """S3 may answer 200 and say in the body that it failed."""

        def answer(request: BaseHTTPRequestHandler) -> Answer:
            query = parse_qs(urlsplit(request.path).query, keep_blank_values=True)
            request.rfile.read(int(request.headers.get("Content-Length") or 0))
            if request.command == "HEAD":
                return 404, {}, b""
            if request.command == "PUT":
                return 200, {"ETag": '"0123"'}, b""
            if request.command == "POST" and "uploads" in query:
                return 200, {}, b"<InitiateMultipartUploadResult><UploadId>1</UploadId></InitiateMultipartUploadResult>"
            if request.command == "POST":
                return 200, {}, b"<Error><Code>InvalidPart</Code><Message>no</Message></Error>"
            return 200, {}, b"<ListPartsResult></ListPartsResult>"

        with lying(answer) as place, pytest.raises(StoreError, match="InvalidPart"):
            opened(place).upload("u/big", lambda offset, length: bytes(length), 9 * 1024 * 1024)


def test_an_object_replaced_while_it_is_copied_is_no_mixture() -> None:
    """Where the bytes travel through this machine: the copy fails rather than hold bytes of two versions."""
    objects = Objects()
    inner = MemoryStore(objects=objects)
    size = 20 * 1024 * 1024
    inner.write("u/a", bytes(size))
    reads: list[str] = []

    def before(operation: str, key: str) -> None:
        if operation == "read":
            reads.append(key)
            if len(reads) == 2:
                inner.write("u/a", b"x" * size)

    store = MemoryStore(objects=objects, before=before)
    with pytest.raises(Conflict, match="replaced"):
        BaseStore.copy(store, "u/a", "u/b")
    assert [stat.key for stat in inner.list()] == ["u/a"]


class TestServersThatIgnoreConditions:
    """`rclone serve s3` does: without knowing it, a store would take a lost race for a won one."""

    @pytest.fixture
    def unaware(self, rclone_s3: Rclone) -> Iterator[Store]:
        url = f"s3://{rclone_s3.bucket}/{own_prefix()}?endpoint=http://127.0.0.1:{rclone_s3.port}&region=us-east-1"
        store = open_store({"url": url, **rclone_s3.credentials()})
        yield store
        store.disconnect()

    def test_check_finds_it_and_info_learns_it(self, unaware: Store) -> None:
        assert unaware.info().conditional_write
        found = unaware.check()
        assert found.conditional is False
        assert any("ignores conditions" in each for each in found.problems)
        assert not unaware.info().conditional_write
        assert not unaware.info().atomic_replace
        unaware.write("u/a", b"first", if_absent=True)
        with pytest.raises(Conflict):  # looked at before, from now on
            unaware.write("u/a", b"second", if_absent=True)
        assert unaware.read("u/a") == b"first"

    def test_it_stays_known_after_other_credentials(self, unaware: Store, rclone_s3: Rclone) -> None:
        unaware.check()
        unaware.connect(rclone_s3.credentials())
        assert not unaware.info().conditional_write
        unaware.disconnect()
        unaware.connect()
        assert not unaware.info().conditional_write

    def test_the_configuration_can_say_so(self) -> None:
        url = "s3://bucket/prefix?endpoint=https://host&conditional_writes=false"
        store = open_store({"url": url, **KEYS})
        assert not store.info().conditional_write
        assert any("one machine" in each for each in validate({"url": url, **KEYS}))
        store.disconnect()


@pytest.mark.parametrize("url", ["ftp://host/directory", "ftps://host/directory", "https://host/directory"])
def test_engines_that_have_a_store_of_their_own_are_not_opendals(url: str) -> None:
    assert open_store(url).info().broker in ("ftp", "http")
    with pytest.raises(ConfigError, match="of its own"):
        open_store({"url": url, "broker": "remote"})


class TestConfigurationOnlyOfCloudsThatNoTestReaches:
    @pytest.mark.parametrize(
        ("url", "options", "broker"),
        [
            ("gcs://bucket/prefix", {"credential": "eyJ0eXBlIjoiIn0="}, "gcs"),
            ("gs://bucket/prefix", {"token": "a-token-of-a-test"}, "gcs"),
            (
                "azblob://container/prefix",
                {"endpoint": "https://x.blob.core.windows.net", "account_name": "x"},
                "azblob",
            ),
            ("az://container", {"endpoint": "https://x.blob.core.windows.net", "sas_token": "sv=x"}, "azblob"),
        ],
    )
    def test_gcs_and_azblob_open_without_a_connection(self, url: str, options: dict[str, str], broker: str) -> None:
        assert validate({"url": url, **options}) == []
        store = open_store({"url": url, **options})
        info = store.info()
        assert (info.broker, info.ranges, info.lists, info.resumes) == (broker, True, True, False)
        store.disconnect()

    @pytest.mark.parametrize(
        ("url", "options", "named"),
        [
            ("gcs:///prefix", {}, "bucket"),
            ("azblob:///prefix", {}, "container"),
            ("gcs://bucket", {"acess_token": "x"}, "acess_token"),
            ("azblob://container?account_key=abcdef", {}, "account_key"),
        ],
    )
    def test_gcs_and_azblob_mistakes_are_named(self, url: str, options: dict[str, str], named: str) -> None:
        with pytest.raises(ConfigError, match=named) as refused:
            open_store({"url": url, **options})
        assert "abcdef" not in str(refused.value)


def test_webdav_credentials_are_named_as_its_options(webdav: Rclone) -> None:
    store = open_store({"url": f"webdav+http://127.0.0.1:{webdav.port}/", "username": "nobody", "password": "wrong"})
    with pytest.raises(Denied, match="username and password") as refused:
        store.read("u/a")
    assert "AWS" not in str(refused.value)
    store.disconnect()


def test_webdav_temporary_objects_are_not_listed_and_are_swept(webdav_stores: MakeStore) -> None:
    store = webdav_stores()
    store.write("u/a", b"x")
    store.write(".runfs/tmp-0123456789abcdef", b"left by a crash")
    store.write(".runfs/other", b"stays")
    assert {stat.key for stat in store.list()} == {"u/a", ".runfs/other"}
    assert store.sweep() == 0
    assert store.sweep(0) == 1
    assert store.sweep(0) == 0
    assert {stat.key for stat in store.list()} == {"u/a", ".runfs/other"}


def test_a_webdav_listing_that_is_slow_is_never_taken_for_empty() -> None:
    """opendal's own walk of directories gives nothing for one that did not answer in time."""
    slow = threading.Event()

    def answer(request: BaseHTTPRequestHandler) -> Answer:
        slow.wait(3)
        return 207, {}, b""

    with lying(answer) as place:
        store = open_store({"url": f"webdav+http://{place}/base", "deadline_s": 1, "window_s": 0.3})
        began = time.monotonic()
        with pytest.raises(StoreError):
            list(store.list())
        assert time.monotonic() - began < 4
        slow.set()
        store.disconnect()
