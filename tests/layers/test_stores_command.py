"""`runfs stores check` and `runfs stores sweep` as people and scripts use them."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from daemon import cli
from daemon.render_stores import in_words
from vfs.index import Index
from vfs.stores import open_store
from vfs.stores.places import TEMPORARY


class Ran(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        parsed: dict[str, Any] = json.loads(self.out)
        return parsed


Shell = Callable[..., Ran]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith(("RUNFS_", "MACHINABLE_", "XDG_", "AWS_"))]:
        monkeypatch.delenv(name)
    for name in ("STATE", "CACHE", "RUNTIME"):
        monkeypatch.setenv(f"RUNFS_{name}_DIR", str(tmp_path / name.lower()))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


@pytest.fixture
def runfs(place: Path, capsys: pytest.CaptureFixture[str]) -> Shell:
    def run(*arguments: str) -> Ran:
        code = cli.main(arguments)
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return run


@pytest.fixture
def configured(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two stores: a directory, and a server that nobody runs."""
    file = place / "config.toml"
    monkeypatch.setenv("RUNFS_CONFIG", str(file))
    file.write_text(
        f'[stores.disk]\nurl = "file://{place}/disk"\n'
        '[stores.away]\nurl = "s3://lab?endpoint=http://127.0.0.1:1"\n'
        '[stores.away.options]\naccess_key_id = "AKIDsecret"\nsecret_access_key = "verySecret"\n'
    )
    return file


class TestCheck:
    def test_a_url_needs_no_configuration_and_no_index(self, runfs: Shell, place: Path) -> None:
        ran = runfs("stores", "check", f"file://{place}/disk")
        assert (ran.code, ran.err) == (0, "")
        assert ran.out.startswith(f"disk: ok  file://{place}/disk\n  tried    reachable, readable, writable, ")
        assert "conditional writes: several hosts may write" in ran.out
        assert "keeps no checksums: proofs are read back" in ran.out
        assert {path.name for path in (place / "disk").iterdir()} <= {".runfs-store", ".runfs.tmp", ".runfs"}

    def test_all_that_are_configured(self, runfs: Shell, configured: Path) -> None:
        ran = runfs("stores", "check", "--json")
        assert ran.code == ran.json["exit"] == 1
        disk, away = ran.json["stores"]
        assert (disk["name"], disk["ok"], disk["valid"], disk["broker"]) == ("disk", True, True, "file")
        assert disk["info"]["atomic_replace"]
        assert disk["check"]["writable"]
        assert (away["name"], away["ok"], away["valid"]) == ("away", False, True)
        assert "127.0.0.1:1" in away["check"]["problems"][0]
        text = runfs("stores", "check").out
        assert "away: does not work" in text
        assert "  error    away: " in text
        for secret in ("AKIDsecret", "verySecret"):
            assert secret not in ran.out + text

    def test_by_name(self, runfs: Shell, configured: Path) -> None:
        ran = runfs("stores", "check", "disk")
        assert ran.code == 0
        assert ran.out.startswith("disk: ok")
        ran = runfs("stores", "check", "dsik")
        assert (ran.code, ran.out) == (2, "")
        assert "did you mean 'disk'" in ran.err

    def test_a_wrong_configuration_is_2_and_the_others_are_tried(self, runfs: Shell, place: Path) -> None:
        ran = runfs("stores", "check", "s3://lab?endpont=https://x", "good=memory://x")
        assert ran.code == 2
        assert "lab: wrong configuration" in ran.out
        assert "  error    endpont: no such option for a s3 store; did you mean endpoint?" in ran.out
        assert "good: ok" in ran.out
        assert "  warning  memory://x: what is in memory is gone" in ran.out

    def test_a_disk_that_is_not_there(self, runfs: Shell, place: Path) -> None:
        ran = runfs("stores", "check", f"file://{place}/no/such/disk")
        assert ran.code == 1
        assert "is the disk mounted?" in ran.out

    def test_what_was_not_reached_is_not_said_to_do_anything(self, runfs: Shell, configured: Path) -> None:
        ran = runfs("stores", "check", "away")
        assert ran.code == 1
        assert "Connection refused); is it running" in ran.out
        assert "  does " not in ran.out
        assert "  does " in runfs("stores", "check", "disk").out

    def test_the_volume_it_needs(self, runfs: Shell, place: Path) -> None:
        ran = runfs("stores", "check", f"nfs://{place}/mnt?remote=host:/export")
        assert ran.code == 1
        assert f"  mount    host:/export must be mounted at {place}/mnt (nfs)" in ran.out
        shown = runfs("stores", "check", f"nfs://{place}/mnt?remote=host:/export", "--json").json["stores"][0]
        assert shown["volume"] == {"driver": "nfs", "remote_path": "host:/export", "local_path": f"{place}/mnt"}

    def test_read_only_is_well_and_said(self, runfs: Shell, place: Path) -> None:
        (place / "disk").mkdir()
        ran = runfs("stores", "check", f"file://{place}/disk?read_only=true")
        assert ran.code == 0
        assert "  note     disk is read-only: nothing can be pushed to it" in ran.out
        assert "read only: nothing is pushed there" in ran.out
        assert "several hosts" not in ran.out

    def test_none_is_configured(self, runfs: Shell) -> None:
        ran = runfs("stores", "check")
        assert ran.code == 2
        assert "name one by its URL" in ran.err
        assert runfs("stores", "check", "--json").json["error"]["exit"] == 2

    def test_stores_itself_still_lists(self, runfs: Shell, configured: Path, place: Path) -> None:
        Index.open(place / "index.sqlite", create=True).close()
        ran = runfs("stores", "--index", str(place / "index.sqlite"), "--json")
        assert ran.code == 1
        assert [store["name"] for store in ran.json["stores"]] == ["disk", "away"]

    def test_options_before_the_command_are_not_swallowed(self, runfs: Shell) -> None:
        ran = runfs("stores", "--json", "check", "memory://x")
        assert ran.code == 2
        assert "behind it" in ran.err + ran.out

    def test_what_a_store_cannot_do_is_said_in_words(self) -> None:
        info = {"ranges": False, "lists": False, "atomic_replace": False, "conditional_write": False, "max_object": 5e9}
        text = "\n".join(in_words(info))
        for words in ("whole objects only", "no listing", "half replaced", "one host only", "no checksums", "5.0 GB"):
            assert words in text


class TestSweep:
    def test_what_a_crash_left(self, runfs: Shell, place: Path) -> None:
        url = f"file://{place}/disk"
        open_store(url).write("u/a", b"1")
        left = place / "disk" / TEMPORARY / "123-left"
        left.write_bytes(b"half")
        os.utime(left, (time.time() - 7200,) * 2)
        ran = runfs("stores", "sweep", url)
        assert (ran.code, ran.out) == (0, "disk: 0 interrupted uploads of more than 24 h ago removed\n")
        ran = runfs("stores", "sweep", url, "--older-than", "1h", "--dry-run")
        assert ran.out == "disk: what interrupted uploads left more than 60 min ago would be removed\n"
        assert left.exists()
        ran = runfs("stores", "sweep", url, "--older-than", "1h", "--json")
        assert ran.json["swept"] == [{"name": "disk", "removed": 1, "leaves": True, "error": None}]
        assert not left.exists()
        assert open_store(url).read("u/a") == b"1"

    def test_errors(self, runfs: Shell, place: Path) -> None:
        (place / "read-only").mkdir()
        missing, given = f"file://{place}/no/such/disk", f"file://{place}/read-only?read_only=true"
        ran = runfs("stores", "sweep", missing, given, "memory://x")
        assert ran.code == 1
        assert ran.out.startswith("disk: not swept: ")
        assert "is the disk mounted?" in ran.out
        assert "read-only: interrupted uploads leave nothing there" in ran.out
        assert "x: interrupted uploads leave nothing there" in ran.out
        assert "is not an age" in runfs("stores", "sweep", "--older-than", "5").err
