"""The store on a web server: addresses, listings, and servers that lie. The contract runs on it, too."""

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest

from tests.lying import Answer, Answering, lying, ranged
from tests.rclone import Rclone
from tests.stores.kinds import own_prefix
from vfs.errors import ConfigError, Denied, NotFound, RunfsError, StoreError, Unreachable
from vfs.stores import Store, open_store, validate
from vfs.stores.checking import try_store

CONTENT = bytes(range(256)) * 40


@pytest.fixture
def opened() -> Iterator[Any]:
    made: list[Store] = []

    def make(url: str, **options: object) -> Store:
        made.append(open_store({"url": url, "deadline_s": 3, "window_s": 1, **options}))
        return made[-1]

    yield make
    for store in made:
        store.disconnect()


class TestAddresses:
    def test_a_pattern_in_the_url(self, web: Rclone, opened: Any) -> None:
        place = own_prefix()
        file = web.directory / place / "abc" / "files" / "a %20#b?"
        file.parent.mkdir(parents=True)
        file.write_bytes(CONTENT)
        store = opened(f"http://127.0.0.1:{web.port}/{place}/{{uuid}}/files/{{path}}")
        assert store.read("abc/a %20#b?") == CONTENT
        assert store.stat("abc/a %20#b?").size == len(CONTENT)
        for key in ("abc", "abc/nothing", "nothing/a %20#b?"):
            with pytest.raises(NotFound):
                store.stat(key)

    def test_a_pattern_with_a_query(self, opened: Any) -> None:
        asked: list[str] = []

        def answer(request: BaseHTTPRequestHandler) -> Answer:
            asked.append(request.path)
            return ranged(request, CONTENT)

        with lying(answer) as place:
            opened(f"http://{place}/record", pattern="files/{key}?download=1").read("u/a", 0, 10)
        assert asked == ["/record/files/u/a?download=1"]

    def test_without_a_listing_it_says_so(self, web: Rclone, opened: Any) -> None:
        store = opened(f"http://127.0.0.1:{web.port}/")
        assert not store.info().lists
        with pytest.raises(StoreError, match="no listing"):
            list(store.list())
        found = store.check()
        assert found.reachable
        assert not found.writable
        tried = try_store("web", f"http://127.0.0.1:{web.port}/", {})
        assert tried["ok"], "a source that is read by name is as it is meant to be"
        assert not try_store("web", "http://127.0.0.1:1/", {})["ok"]

    def test_directories_are_no_objects(self, web: Rclone, opened: Any) -> None:
        place = own_prefix()
        (web.directory / place / "u").mkdir(parents=True)
        store = opened(f"http://127.0.0.1:{web.port}/{place}")
        for ask in (store.stat, store.read):
            with pytest.raises(NotFound):
                ask("u")

    @pytest.mark.parametrize(
        ("options", "named"),
        [
            ({"listing": "xml"}, "listing"),
            ({"pattern": "no field"}, "pattern"),
            ({"pattern": "{uuid}"}, "pattern"),
            ({"pattern": "{key}/{other}"}, "pattern"),
            ({"pattern": "{uuid}/{path}", "listing": "json"}, "listing"),
            ({"patern": "{key}"}, "pattern"),
        ],
    )
    def test_what_is_wrong_is_named(self, options: dict[str, str], named: str) -> None:
        with pytest.raises(ConfigError, match=named):
            validate({"url": "https://host/data", **options})

    def test_warnings(self) -> None:
        assert validate({"url": "https://host/data", "listing": "json"}) == []
        assert len(validate({"url": "http://host/data"})) == 2


class TestCredentials:
    def test_basic_and_token(self, opened: Any) -> None:
        def answer(request: BaseHTTPRequestHandler) -> Answer:
            lawful = ("Basic dTpwYXNzd29yZA==", "Bearer secret-token")
            return ranged(request, CONTENT) if request.headers.get("Authorization") in lawful else (401, {}, b"")

        with lying(answer) as place:
            store = opened(f"http://{place}/")
            with pytest.raises(Denied, match="credentials"):
                store.read("u/a")
            store.connect({"username": "u", "password": "password"})
            assert store.read("u/a") == CONTENT
            store.connect({"token": "secret-token"})
            assert store.read("u/a") == CONTENT
            store.disconnect()
            store.connect()
            with pytest.raises(Denied):
                store.read("u/a")

    def test_they_are_not_told_to_another_host(self, opened: Any) -> None:
        told: list[str | None] = []

        def elsewhere(request: BaseHTTPRequestHandler) -> Answer:
            told.append(request.headers.get("Authorization"))
            return ranged(request, CONTENT)

        with lying(elsewhere) as other, lying(lambda _: (302, {"Location": f"http://{other}/x"}, b"")) as place:
            assert opened(f"http://{place}/", token="secret-token").read("u/a", 0, 5) == CONTENT[:5]
        assert told == [None]

    @pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/x", "", "/u/a"])
    def test_redirects_that_lead_nowhere(self, opened: Any, target: str) -> None:
        with lying(lambda _: (302, {"Location": target}, b"")) as place, pytest.raises(StoreError):
            opened(f"http://{place}/").read("u/a")


def changing(first: bytes, second: bytes, headers: tuple[dict[str, str], dict[str, str]]) -> Answering:
    """Answers with another version from the second request on."""
    asked: list[int] = []

    def answer(request: BaseHTTPRequestHandler) -> Answer:
        asked.append(1)
        at = 0 if len(asked) == 1 else 1
        return ranged(request, (first, second)[at], headers[at])

    return answer


class TestLies:
    """Wrong bytes or wrong lengths are never handed out; it is an error instead."""

    def test_an_etag_that_changes_between_ranges(self, opened: Any) -> None:
        answer = changing(CONTENT, CONTENT[::-1], ({"ETag": '"1"'}, {"ETag": '"2"'}))
        with lying(answer) as place:
            store = opened(f"http://{place}/")
            assert store.read("u/a", 0, 1000) == CONTENT[:1000]
            with pytest.raises(StoreError, match="replaced"):
                store.read("u/a", 1000, 1000)
            assert store.read("u/a", 0, 1000) == CONTENT[::-1][:1000]  # from the start again: the new one

    def test_a_size_that_changes_between_ranges(self, opened: Any) -> None:
        with lying(changing(CONTENT, CONTENT + b"more", ({}, {}))) as place:
            store = opened(f"http://{place}/")
            assert store.stat("u/a").size == len(CONTENT)
            with pytest.raises(StoreError, match="replaced"):
                store.read("u/a", 1000, 1000)

    @pytest.mark.parametrize(
        ("status", "headers", "body"),
        [
            (206, {"Content-Range": "bytes 0-99/10240"}, CONTENT[:100]),  # another start
            (206, {"Content-Range": "bytes 100-149/10240"}, CONTENT[100:150]),  # fewer
            (206, {"Content-Range": "bytes 100-299/10240"}, CONTENT[100:300]),  # more
            (206, {"Content-Range": "bytes 100-199/10240"}, CONTENT[100:150]),  # says more than it sends
            (206, {"Content-Range": "bytes 100-199/10240", "Content-Length": "100"}, CONTENT[100:150]),  # cut
            (206, {"Content-Range": "nonsense"}, CONTENT[100:200]),
            (206, {}, CONTENT[100:200]),
            (200, {"Content-Length": "10240"}, CONTENT[:150]),  # cut
            (200, {"Content-Length": ""}, CONTENT[:150]),  # no end
            (200, {"Content-Encoding": "gzip"}, CONTENT),
            (416, {"Content-Range": "bytes */10240"}, b""),
            (204, {}, b""),
        ],
    )
    def test_answers_to_a_range(self, opened: Any, status: int, headers: dict[str, str], body: bytes) -> None:
        with lying(lambda _: (status, headers, body)) as place, pytest.raises(StoreError):
            opened(f"http://{place}/").read("u/a", 100, 100)

    def test_a_server_without_ranges_is_read_through(self, opened: Any) -> None:
        with lying(lambda _: (200, {}, CONTENT)) as place:
            store = opened(f"http://{place}/")
            assert store.read("u/a", 100, 100) == CONTENT[100:200]
            assert store.read("u/a", len(CONTENT) - 5, 100) == CONTENT[-5:]
            assert store.read("u/a", len(CONTENT) + 5, 100) == b""
            assert store.read("u/a") == CONTENT

    def test_a_cut_body(self, opened: Any) -> None:
        with lying(lambda _: (200, {"Content-Length": "20000"}, CONTENT)) as place, pytest.raises(StoreError):
            opened(f"http://{place}/").read("u/a")

    def test_a_size_that_is_not_told(self, opened: Any) -> None:
        with lying(lambda _: (200, {"Content-Length": ""}, b"")) as place, pytest.raises(StoreError, match="size"):
            opened(f"http://{place}/").stat("u/a")

    def test_a_listing_with_names_that_lead_elsewhere(self, opened: Any) -> None:
        asked: list[str] = []
        entries = [
            {"name": name, "type": kind, "size": 5}
            for name in ("..", ".", "", "../../etc/passwd", "/etc/passwd", "a/b", "a\0", " ", ".runfsx")
            for kind in ("file", "directory")
        ]
        entries += [
            {"name": 5, "type": "file", "size": 5},
            {"type": "file"},
            {"name": "good", "type": "file", "size": 5},
        ]
        entries += [{"name": f"size{size!r}", "type": "file", "size": size} for size in (-1, None, "5", True, 1.5)]
        entries += [{"name": "odd", "type": "symlink", "size": 5, "url": "http://elsewhere/"}]

        def answer(request: BaseHTTPRequestHandler) -> Answer:
            asked.append(request.path)
            return 200, {}, json.dumps(entries).encode()

        with lying(answer) as place:
            store = opened(f"http://{place}/base", listing="json")
            assert {stat.key: stat.size for stat in store.list()} == {"good": 5, "odd": 5}
        assert asked == ["/base/"]
        assert store.problems

    @pytest.mark.parametrize(
        "body",
        [b"", b"<html>", b"{}", b"[1]", b'["a"]', b"null", b"[" * 100_000, b'[{"name":"a","type":"file","size":1}'],
    )
    def test_a_listing_that_is_none(self, opened: Any, body: bytes) -> None:
        with lying(lambda _: (200, {}, body)) as place, pytest.raises(StoreError, match="listing"):
            list(opened(f"http://{place}/", listing="json").list())

    def test_a_listing_of_the_wrong_size_does_not_change_what_is_read(self, opened: Any) -> None:
        def answer(request: BaseHTTPRequestHandler) -> Answer:
            if request.path.endswith("/"):
                return 200, {}, b'[{"name":"a","type":"file","size":5}]'
            return ranged(request, CONTENT)

        with lying(answer) as place:
            store = opened(f"http://{place}", listing="json")
            assert [stat.size for stat in store.list()] == [5]
            assert store.stat("a").size == len(CONTENT)
            assert store.read("a") == CONTENT

    def test_directories_without_end(self, opened: Any) -> None:
        with lying(lambda _: (200, {}, b'[{"name":"' + b"d" * 200 + b'","type":"directory"}]')) as place:
            assert list(opened(f"http://{place}", listing="json").list()) == []

    def test_nothing_at_the_url_is_no_empty_store(self, opened: Any) -> None:
        with lying(lambda _: (404, {}, b"")) as place, pytest.raises(Unreachable, match="check the store's URL"):
            list(opened(f"http://{place}", listing="json").list())

    @pytest.mark.parametrize("status", [400, 403, 503])
    def test_statuses_are_errors(self, opened: Any, status: int) -> None:
        with lying(lambda _: (status, {}, b"no")) as place:
            store = opened(f"http://{place}", listing="json")
            for call in (lambda: store.stat("a"), lambda: store.read("a"), lambda: list(store.list())):
                with pytest.raises(RunfsError):
                    call()


def test_caddys_listing(opened: Any) -> None:
    entries = {
        "/": [{"name": "u/", "size": 4096, "url": "./u/", "mod_time": "2026-01-02T03:04:05.678Z", "is_dir": True}],
        "/u/": [{"name": "a", "size": 3, "url": "./a", "mod_time": "2026-01-02T03:04:05.678Z", "is_dir": False}],
    }
    with lying(lambda request: (200, {}, json.dumps(entries[request.path]).encode())) as place:
        (found,) = opened(f"http://{place}", listing="json").list()
    assert (found.key, found.size, found.modified_ns) == ("u/a", 3, 1767323045678000000)
