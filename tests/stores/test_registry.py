"""The registry of brokers, store URLs and options, and that no secret is ever shown."""

import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from tests.servers import Seaweed
from tests.stores.conftest import MakeStore
from vfs import stores
from vfs.errors import ConfigError, Denied, NotFound, StoreError, Unreachable
from vfs.stores import memory, open_store, validate
from vfs.stores.remote_config import Target, target

SECRET = "verySecretValue"


class TestBrokers:
    def test_the_built_in_ones_are_there(self) -> None:
        assert {"file", "memory", "remote"} <= set(stores.brokers())
        assert stores.broker("memory").open({"url": "memory://x"}).info().broker == "memory"

    def test_an_unknown_one(self) -> None:
        with pytest.raises(ConfigError, match="memory"):
            stores.broker("nothing")

    def test_a_name_is_taken_once(self) -> None:
        class Other(memory.Broker):
            """Another one that wants the same name."""

        stores.broker("memory")
        with pytest.raises(ConfigError, match="twice"):
            stores.register("memory", Other)
        with pytest.raises(ConfigError, match="no schemes"):
            stores.register("nothing", cast(Any, int))

    @pytest.fixture
    def distributions(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """Two installed packages as pip leaves them: one with a broker, one whose broker does not import."""
        for name, body in (("thirdparty", GOOD), ("brokenparty", "import no_such_module_at_all\n")):
            (tmp_path / f"{name}_stores.py").write_text(textwrap.dedent(body))
            info = tmp_path / f"{name}-1.0.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
            (info / "entry_points.txt").write_text(f"[runfs.brokers]\n{name} = {name}_stores:Broker\n")
        monkeypatch.syspath_prepend(tmp_path)
        yield
        for name in ("thirdparty", "brokenparty"):
            sys.modules.pop(f"{name}_stores", None)
            stores.unregister(name)

    @pytest.mark.usefixtures("distributions")
    def test_an_installed_package_brings_one(self) -> None:
        assert "thirdparty" in stores.brokers()
        store = open_store("thirdparty://place", name="mine")
        assert store.write("u/a", b"x").size == 1
        assert store.name == "mine"
        assert open_store("third+x://place").url == "memory://place"

    @pytest.mark.usefixtures("distributions")
    def test_one_that_does_not_import_is_named_and_harms_nobody(self) -> None:
        with pytest.raises(ConfigError, match=r"brokenparty.*no_such_module_at_all"):
            open_store("brokenparty://place")
        assert open_store("memory://fine").write("u/a", b"x").size == 1


GOOD = """
    from vfs.stores.base import BaseBroker
    from vfs.stores.memory import MemoryStore

    class Broker(BaseBroker):
        schemes = ("third+x",)

        def validate(self, config):
            return ["third"]

        def open(self, config):
            store = MemoryStore(config.get("name") or "third")
            store.url = "memory://place"
            return store
"""


class TestUrls:
    @pytest.mark.parametrize(
        ("url", "service", "options", "name"),
        [
            ("s3://lab/study/a?endpoint=http://127.0.0.1:8333", "s3", {"bucket": "lab", "root": "/study/a"}, "lab"),
            ("s3://lab", "s3", {"bucket": "lab", "region": "us-east-1"}, "lab"),
            ("gs://lab/x", "gcs", {"bucket": "lab", "root": "/x"}, "lab"),
            ("azblob://box/x", "azblob", {"container": "box", "root": "/x"}, "box"),
            ("webdav+https://h:8/d", "webdav", {"endpoint": "https://h:8", "root": "/d"}, "h:8"),
        ],
    )
    def test_what_they_mean(self, url: str, service: str, options: dict[str, str], name: str) -> None:
        found = target({"url": url})
        assert found.scheme == service
        assert found.options.items() >= options.items()
        assert found.name == name
        assert not found.read_only

    @pytest.mark.parametrize(
        ("url", "says"),
        [
            ("lab", "url"),
            ("s3:///prefix", "bucket"),
            ("s3://lab?endpont=http://x", "endpoint"),
            ("s3://lab/../other", "prefix"),
            ("s3://lab/a//b", "prefix"),
            ("s3://lab/a%20", "prefix"),
            ("s3://lab#fragment", "%23"),
            ("s3://lab:notaport/x", "ort"),
            ("nosuch://lab", "no such type"),
            ("fs:///tmp", "file:///"),
            ("memory://", "memory://NAME"),
        ],
    )
    def test_wrong_ones_name_the_mistake(self, url: str, says: str) -> None:
        with pytest.raises(ConfigError, match=says):
            open_store(url)

    @pytest.mark.parametrize(
        "url",
        [
            f"s3://user:{SECRET}@lab/x",
            f"s3://lab?secret_access_key={SECRET}",
            f"s3://lab?access_key_id={SECRET}",
            f"s3://lab?session_token={SECRET}",
            f"azblob://box?account_key={SECRET}",
            f"azblob://box?sas_token={SECRET}",
            f"webdav+https://h/d?password={SECRET}",
            f"gcs://lab?credential={SECRET}",
            f"s3://lab?key={SECRET}",
        ],
    )
    def test_secrets_in_them_are_refused_and_not_repeated(self, url: str) -> None:
        with pytest.raises(ConfigError) as refused:
            open_store(url)
        assert SECRET not in str(refused.value)
        assert "environment" in str(refused.value)

    @pytest.mark.parametrize(
        "options",
        [
            {"deadline_s": 0},
            {"deadline_s": "soon"},
            {"least_throughput": -1},
            {"window_s": float("nan")},
            {"no_such": 1},
        ],
    )
    def test_wrong_options_are_named(self, options: dict[str, object]) -> None:
        for url in ("memory://x", "s3://lab", "file:///tmp/x"):
            with pytest.raises(ConfigError, match=next(iter(options))):
                validate(url, options=options)

    def test_warnings(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
        assert validate("s3://lab?endpoint=https://s3.example") == []
        assert "http" in validate("s3://lab?endpoint=http://s3.example")[0]
        assert "one machine" in validate("webdav+https://h/d")[0]
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        assert "AWS_ACCESS_KEY_ID" in validate("s3://lab?endpoint=https://s3.example")[0]


class TestCredentials:
    def test_the_environment_is_used(self, seaweed: Seaweed, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, value in seaweed.environment().items():
            monkeypatch.setenv(name, value)
        assert open_store(f"{seaweed.url}", name="lab").write("environment", b"x").verified

    @pytest.mark.parametrize(
        "wrong",
        [{"secret_access_key": SECRET}, {"access_key_id": SECRET}, {"access_key_id": "A", "secret_access_key": "B"}],
    )
    def test_wrong_ones_are_refused_by_the_server_and_never_shown(self, s3: MakeStore, wrong: dict[str, str]) -> None:
        store = s3(**wrong)
        for call in (
            lambda: store.write("u/a", b"x"),
            lambda: store.read("u/a"),
            lambda: store.stat("u/a"),
            lambda: list(store.list()),
        ):
            with pytest.raises(Denied) as refused:
                call()
            assert SECRET not in str(refused.value)
            assert "test-bucket" in str(refused.value)
        assert "credentials" in store.check().problems[0]

    def test_none_at_all(self, s3: MakeStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        store = s3(access_key_id=None, secret_access_key=None)
        with pytest.raises(Denied, match="set AWS_ACCESS_KEY_ID"):
            store.read("u/a")

    def test_a_reader_may_read_and_not_write(self, seaweed: Seaweed, s3: MakeStore) -> None:
        s3().write("u/a", b"x")
        store = s3(access_key_id=seaweed.reader_key, secret_access_key=seaweed.reader_secret)
        assert store.read("u/a") == b"x"
        for change in (lambda: store.write("u/b", b"x"), lambda: store.delete("u/a"), lambda: store.copy("u/a", "u/c")):
            with pytest.raises(Denied, match="may not"):
                change()
        found = store.check()
        assert found.reachable
        assert found.readable
        assert not found.writable
        assert "may not" in found.problems[0]

    def test_nothing_shows_them(self, s3: MakeStore, seaweed: Seaweed) -> None:
        store = s3()
        config = target({"url": seaweed.url, **seaweed.options()})
        assert isinstance(config, Target)
        for shown in (repr(store), str(config), repr(config), store.url, str(store.info()), str(vars(store))):
            assert seaweed.secret_key not in shown
            assert seaweed.access_key not in shown


class TestWhatIsNotThere:
    def test_a_missing_bucket_is_no_empty_store(self, seaweed: Seaweed) -> None:
        store = open_store(f"s3://no-such-bucket?endpoint={seaweed.endpoint}", options=seaweed.options())
        for call in (lambda: store.stat("u/a"), lambda: store.read("u/a"), lambda: list(store.list())):
            with pytest.raises(Unreachable, match="bucket"):
                call()

    def test_nobody_listens(self) -> None:
        store = open_store(
            "s3://lab?endpoint=http://127.0.0.1:1", options={"access_key_id": "a", "secret_access_key": "b"}
        )
        with pytest.raises(Unreachable, match=r"127\.0\.0\.1:1") as refused:
            store.read("u/a")
        assert "is it running" in str(refused.value)

    def test_no_such_host(self) -> None:
        store = open_store(
            "s3://lab?endpoint=http://nosuch.invalid", options={"access_key_id": "a", "secret_access_key": "b"}
        )
        with pytest.raises(Unreachable, match=r"nosuch\.invalid"):
            store.stat("u/a")

    def test_errors_have_no_urls_with_queries(self, s3: MakeStore) -> None:
        with pytest.raises(StoreError) as missing:
            s3().read("u/a")
        assert isinstance(missing.value, NotFound)
        assert "X-Amz" not in str(missing.value)
        assert "\n" not in str(missing.value)
