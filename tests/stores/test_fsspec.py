"""What is particular to stores over fsspec: whose options are whose, what is claimed, and what cannot be ended."""

import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vfs.errors import ConfigError, Conflict, StoreError, StoreTimeout
from vfs.stores import open_store, places, validate
from vfs.stores.fsspec_store import FsspecStore

fsspec = pytest.importorskip("fsspec")


@pytest.fixture
def local(tmp_path: Path) -> FsspecStore:
    made = open_store(f"fsspec+file://{tmp_path}/store")
    assert isinstance(made, FsspecStore)
    return made


class TestConfiguration:
    @pytest.mark.parametrize(
        ("url", "match"),
        [
            ("fsspec://name", r"fsspec\+PROTOCOL"),
            ("fsspec+://name", r"fsspec\+PROTOCOL"),
            ("fsspec+nosuch://name", "no implementation called nosuch"),
            ("fsspec+memory://", "name a directory"),
            ("fsspec+file:///", "name a directory"),
            ("fsspec+memory://name?token=x", "no token in a URL"),
        ],
    )
    def test_bad_ones(self, url: str, match: str) -> None:
        with pytest.raises(ConfigError, match=match):
            open_store(url)

    def test_an_implementation_whose_package_is_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "paramiko", None)
        monkeypatch.delitem(sys.modules, "fsspec.implementations.sftp", raising=False)
        with pytest.raises(ConfigError, match="needs another package"):
            validate("fsspec+sftp://host/dir")

    def test_without_fsspec_it_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "fsspec", None)
        with pytest.raises(ConfigError, match=r"pip install 'runfs\[fsspec\]'"):
            validate("fsspec+memory://name")

    def test_options_of_the_implementation_reach_it_and_its_complaints_come_back(self, tmp_path: Path) -> None:
        store = open_store(f"fsspec+file://{tmp_path}/store", options={"auto_mkdir": True})
        store.write("u/a", b"x")
        assert (tmp_path / "store" / "u" / "a").read_bytes() == b"x"
        with pytest.raises(ConfigError, match="does not take these options") as refused:
            open_store("fsspec+github://org/dir", options={"password": "a-secret-of-mine"})
        assert "a-secret-of-mine" not in str(refused.value)

    def test_a_single_writer_is_warned_for(self) -> None:
        assert "one machine only" in validate("fsspec+memory://name")[0]


class TestWhatIsClaimed:
    def test_of_a_directory(self, local: FsspecStore) -> None:
        info = local.info()
        assert (info.broker, info.ranges, info.atomic_replace, info.conditional_write) == ("fsspec", True, True, False)
        assert (info.server_copy, info.checksum, info.exact_versions) == (True, None, False)

    def test_of_what_nobody_knows(self) -> None:
        class Unknown(fsspec.AbstractFileSystem):  # type: ignore[misc]
            protocol = "unknown"

        info = FsspecStore(Unknown(), "/dir", name="unknown", url="fsspec+unknown://dir").info()
        assert (info.atomic_replace, info.server_copy, info.conditional_write) == (False, False, False)

    def test_what_an_implementation_cannot_do_is_said(self) -> None:
        class ReadOnly(fsspec.AbstractFileSystem):  # type: ignore[misc]
            protocol = "unknown"

        store = FsspecStore(ReadOnly(), "/dir", name="unknown", url="fsspec+unknown://dir")
        with pytest.raises(StoreError, match="cannot do that; use another store"):
            list(store.list())


class TestTheDirectory:
    def test_a_file_in_the_way_is_a_conflict(self, local: FsspecStore) -> None:
        local.write("u/a", b"x")
        with pytest.raises(Conflict, match="another key"):
            local.write("u/a/b", b"y")
        assert [stat.key for stat in local.list()] == ["u/a"]

    def test_leftovers_are_hidden_and_swept(self, local: FsspecStore, tmp_path: Path) -> None:
        local.write("u/a", b"x")
        area = tmp_path / "store" / places.TEMPORARY
        for name in ("old", "young"):
            (area / name).write_bytes(b"x")
        os.utime(area / "old", (1, 1))
        assert [stat.key for stat in local.list()] == ["u/a"]
        assert local.sweep() == 1
        assert [each.name for each in area.iterdir()] == ["young"]

    def test_a_failed_upload_leaves_nothing(self, local: FsspecStore, tmp_path: Path) -> None:
        local.write("u/a", b"x")
        with pytest.raises(StoreError, match="changed meanwhile"):
            local.upload("u/a", lambda offset, length: b"", 5)
        assert list((tmp_path / "store" / places.TEMPORARY).iterdir()) == []
        assert local.read("u/a") == b"x"


class TestDeadlines:
    @pytest.fixture
    def slow(self) -> Iterator[FsspecStore]:
        wake = threading.Event()

        class Slow(fsspec.AbstractFileSystem):  # type: ignore[misc]
            protocol = "slow"
            cachable = False

            def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
                wake.wait(30)
                return {"name": path, "type": "file", "size": 1}

            ls = info
            makedirs = info

        yield FsspecStore(Slow(), "/dir", name="slow", url="fsspec+slow://dir")
        wake.set()

    def test_a_call_that_hangs_is_left_behind(self, slow: FsspecStore) -> None:
        for call in (
            lambda: slow.stat("u/a", deadline=0.2),
            lambda: slow.read("u/a", deadline=0.2),
            lambda: slow.write("u/a", b"x", deadline=0.2),
            lambda: list(slow.list(deadline=0.2)),
        ):
            began = time.monotonic()
            with pytest.raises(StoreTimeout, match="no end within"):
                call()
            assert time.monotonic() - began < 3
