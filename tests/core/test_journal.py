"""The journal: every method survives closing and opening; locks, versions and damage are told in one clear sentence."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import apsw
import pytest

from vfs.errors import JournalError, JournalLocked
from vfs.journal import _MIGRATIONS, Home, Journal, Known, Replica, UnitRow
from vfs.manifest import Content, File

DIGEST, OTHER = bytes(range(32)), bytes(32)
KNOWN = (
    Known(File(b"a", "directory", 0o755, -5, uid=1, gid=2), 11, 12),
    Known(File(b"a/\xff", "file", 0o644, 7, 3, DIGEST, "", b"", 1, 2, b"", (("user.x", b"\x00\xff"),)), 13, 14),
    Known(File(b"a/g", "file", 0o644, 7, 3, DIGEST, "", b"", 1, 2, b"a/\xff"), 13, 14),
    Known(File(b"l", "symlink", 0o777, 8, target=b"\xfe"), 15, 16),
)
CONTENT = Content(DIGEST, 3, DIGEST)
ROW = UnitRow("u", "evicted", b"/d/\xff", b"/d/.runfs-u", "[]", 5, 6)
HOME = Home("u", "lab", 3, "v", b"{}", "mark", 7, 8)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def journal(place: Path) -> Iterator[Journal]:
    journal = Journal(place)
    yield journal
    journal.close()


Again = Callable[[Journal], Journal]


@pytest.fixture
def again() -> Iterator[Again]:
    """`again(journal)`: the same journal as the next process sees it."""
    opened: list[Journal] = []

    def close_and_open(journal: Journal) -> Journal:
        journal.close()
        opened.append(Journal(journal.directory))
        return opened[-1]

    yield close_and_open
    for journal in opened:
        journal.close()


def test_its_file_is_nobody_elses(journal: Journal, place: Path) -> None:
    assert (place / "journal.sqlite").stat().st_mode & 0o077 == 0
    assert place.stat().st_mode & 0o077 == 0


def test_every_write_is_synced(journal: Journal) -> None:
    with journal.transaction() as db:
        assert db.pragma("synchronous") == 2
        assert db.pragma("journal_mode") == "wal"


def test_units(journal: Journal, again: Again) -> None:
    journal.set_unit(ROW)
    journal.set_unit(UnitRow("w", "evicting", b"/w", b"", "[1]", 100, 1))
    journal.keep_rows("w", "[2]")
    journal = again(journal)
    assert journal.unit("u") == ROW
    assert {row.uuid: row.rows for row in journal.units()} == {"u": "", "w": ""}  # without the rows: they are large
    assert sorted(journal.unit_uuids()) == ["u", "w"]
    other = journal.unit("w")
    assert other is not None
    assert other.rows == "[2]"
    assert journal.evicted_size() == (1, 5)
    journal.drop_unit("u")
    assert journal.unit("u") is None


def test_what_was_digested(journal: Journal, again: Again) -> None:
    journal.replace_known("u", KNOWN, [CONTENT])
    journal = again(journal)
    assert journal.known("u") == {known.file.path: known for known in KNOWN}
    assert journal.content(DIGEST) == CONTENT
    assert journal.content(OTHER) is None
    assert journal.contents_of("u") == {DIGEST: CONTENT}
    assert journal.sizes() == {"u": (1, 3)}, "a hard link is no second file"
    journal.replace_known("u", KNOWN[:1], [])
    assert list(journal.known("u")) == [b"a"]
    assert journal.content(DIGEST) == CONTENT, "a home may hold it still"
    journal.add_contents([Content(OTHER, 0, b"")])
    assert journal.content(OTHER) == Content(OTHER, 0, b"")


def test_replacing_is_all_or_nothing(journal: Journal) -> None:
    journal.replace_known("u", KNOWN, [CONTENT])
    with pytest.raises(JournalError):
        journal.replace_known("u", [KNOWN[0], KNOWN[0]], [])
    assert len(journal.known("u")) == len(KNOWN)


def test_replicas(journal: Journal, again: Again) -> None:
    ours, theirs = Replica(DIGEST, "lab", "u", "u/a", 5, "read back"), Replica(DIGEST, "disk", "u", "u/a", 0, "")
    other = Replica(DIGEST, "lab", "w", "w/a", 5, "read back")
    journal.set_replicas([ours, theirs, other])
    journal = again(journal)
    assert set(journal.replicas(DIGEST)) == {ours, theirs, other}
    assert journal.replicas_of("u", "lab") == {DIGEST: ours}
    journal.doubt_replicas("u", "lab")
    assert journal.replicas_of("u", "lab")[DIGEST].proven_ns == 0
    assert journal.replicas_of("w", "lab")[DIGEST] == other
    journal.forget_replica(DIGEST, "lab", "u")
    assert set(journal.replicas(DIGEST)) == {theirs, other}


def test_homes(journal: Journal, again: Again) -> None:
    journal.set_home(HOME)
    journal = again(journal)
    assert journal.home("u", "lab") == HOME
    assert journal.homes("u") == [HOME]
    assert journal.home("u", "disk") is None
    assert journal.home_marks() == [("u", "lab", "mark")]
    assert journal.homed("lab") == {"u"}
    journal.forget_home("u", "lab")
    assert journal.homes("u") == []


def test_dirty(journal: Journal, again: Again) -> None:
    journal.mark_dirty("u", "written to")
    journal.mark_dirty("u", "again")
    journal.mark_all_dirty([("u", "again"), ("w", "new")])
    journal = again(journal)
    first, second = journal.dirty()
    assert (first.uuid, first.why, second.uuid) == ("u", "written to", "w"), "the first reason and time stay"
    journal.postpone("u", "no route", 30.0)
    after = next(row for row in journal.dirty() if row.uuid == "u")
    assert (after.attempts, after.error) == (1, "no route")
    assert after.next_ns > first.since_ns + 29 * 10**9
    journal.clean("u")
    assert [row.uuid for row in journal.dirty()] == ["w"]


def test_pins_use_incoming_notes(journal: Journal, again: Again) -> None:
    journal.pin("u", True)
    journal.pin("u", True)
    journal.pin("w", True)
    journal.pin("w", False)
    journal.set_used({"u": 1, "w": 2})
    journal.set_used({"u": 3})
    journal.add_incoming("n", b"/in/\xff")
    journal.add_incoming("m", b"/in/m")
    journal.drop_incoming("m")
    journal.set_note("mountpoint", "/mnt")
    journal.set_note("mountpoint", "/other")
    journal = again(journal)
    assert journal.pins() == {"u"}
    assert journal.used() == {"u": 3, "w": 2}
    assert journal.incoming() == {"n": b"/in/\xff"}
    assert journal.note("mountpoint") == "/other"
    assert journal.note("nothing") is None


def test_receipts(journal: Journal, again: Again) -> None:
    first = journal.add_receipt("push", "u", "lab", 2, 30, "d", {"generation": 1})
    second = journal.add_receipt("evict", "w", "", 1, 5, "e", {"lab": {"how": ["read back"]}})
    journal = again(journal)
    assert second > first
    assert [each["uuid"] for each in journal.receipts()] == ["w", "u"]
    (only,) = journal.receipts("u")
    assert (only["what"], only["store"], only["files"], only["bytes"]) == ("push", "lab", 2, 30)
    assert only["proof"] == {"generation": 1}
    assert len(journal.receipts(limit=1)) == 1


def test_threads_share_one_journal(journal: Journal) -> None:
    def mark(number: int) -> None:
        for count in range(20):
            journal.mark_dirty(f"{number}-{count}", "x")

    threads = [threading.Thread(target=mark, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(journal.dirty()) == 100


# --- who may open it -----------------------------------------------------------------------------------------------


def test_the_lock_names_its_holder(journal: Journal, place: Path) -> None:
    with pytest.raises(JournalLocked, match=f"process {os.getpid()}"):
        Journal(place)
    journal.holder("process 77 (daemon of /mnt/runs)")
    with pytest.raises(JournalLocked, match=r"process 77 \(daemon of /mnt/runs\)"):
        Journal(place)
    Journal(place, exclusive=False).close()
    journal.close()
    Journal(place).close()


def test_a_killed_holder_leaves_no_lock(place: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from vfs.journal import Journal; j = Journal(Path(sys.argv[1]));"
        "j.mark_dirty('u', 'x'); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(place)], timeout=60)
    journal = Journal(place)
    assert [row.uuid for row in journal.dirty()] == ["u"]
    journal.close()


def first_schema(place: Path) -> None:
    """A journal as the first release left it, with something in it."""
    place.mkdir()
    connection = apsw.Connection(str(place / "journal.sqlite"))
    connection.execute(_MIGRATIONS[0])
    connection.execute("INSERT INTO dirty(uuid, why, since_ns) VALUES ('u', 'kept', 1)")
    connection.pragma("user_version", 1)
    connection.close()


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("name", ["changed", "numbered", "migrated"])
def test_killed_in_the_middle_of_an_upgrade_of_the_schema(place: Path, name: str, number: int) -> None:
    """From nothing, and from the first schema: the next process finds one schema or the other, and finishes."""
    code = "import sys; from pathlib import Path; from vfs.journal import Journal; Journal(Path(sys.argv[1]))"
    fresh, old = place / "fresh", place / "old"
    place.mkdir()
    first_schema(old)
    steps = {fresh: len(_MIGRATIONS), old: len(_MIGRATIONS) - 1}
    for directory, count in steps.items():
        environment = {**os.environ, "RUNFS_FAULT": f"journal.{name}#{number}=kill"}
        done = subprocess.run([sys.executable, "-c", code, str(directory)], env=environment, timeout=60)
        assert done.returncode == (-signal.SIGKILL if number <= count else 0)
        journal = Journal(directory)
        try:
            assert [row.why for row in journal.dirty()] == (["kept"] if directory == old else [])
            journal.set_home(HOME)
            assert journal.homes("u") == [HOME]
            journal.versions("u", "lab")  # of the second schema
        finally:
            journal.close()


def test_a_newer_schema_is_refused_and_left_alone(place: Path) -> None:
    Journal(place).close()
    connection = apsw.Connection(str(place / "journal.sqlite"))
    connection.pragma("user_version", 99)
    connection.close()
    for _ in range(2):  # the refusal gives the lock back
        with pytest.raises(JournalError, match=r"newer runfs \(schema 99.*upgrade runfs") as refused:
            Journal(place)
        assert not isinstance(refused.value, JournalLocked)
    connection = apsw.Connection(str(place / "journal.sqlite"))
    assert connection.pragma("user_version") == 99
    connection.close()


@pytest.mark.parametrize(
    "junk", [b"not a database, " * 400, b"SQLite format 3\0" + b"\xff" * 5000], ids=["text", "torn"]
)
def test_a_corrupt_file_is_one_clear_sentence(place: Path, junk: bytes) -> None:
    place.mkdir()
    (place / "journal.sqlite").write_bytes(junk)
    for _ in range(2):
        with pytest.raises(JournalError, match=r"the journal .*journal\.sqlite cannot be used: ") as refused:
            Journal(place)
        assert not isinstance(refused.value, JournalLocked)
        assert "\n" not in str(refused.value)
    assert (place / "journal.sqlite").read_bytes() == junk


def test_damage_found_later_is_told_too(place: Path) -> None:
    journal = Journal(place)
    journal.mark_all_dirty((f"u{n}", "x" * 500) for n in range(200))
    journal.close()
    path = place / "journal.sqlite"
    data = bytearray(path.read_bytes())
    data[4096 * 3 :] = b"\xff" * (len(data) - 4096 * 3)
    path.write_bytes(data)
    with pytest.raises(JournalError, match=r"cannot be used|the journal in .* failed"):
        read_all(place)


def read_all(place: Path) -> None:
    journal = Journal(place)
    try:
        journal.dirty()
    finally:
        journal.close()


def test_json_kept_as_it_is(journal: Journal) -> None:
    rows = json.dumps([{"label": "b\u00e9"}])
    journal.set_unit(UnitRow("u", "evicted", b"/d", b"", rows, 5, 6))
    unit = journal.unit("u")
    assert unit is not None
    assert unit.rows == rows
    connection = sqlite3.connect(journal.directory / "journal.sqlite")
    assert connection.execute("SELECT rows FROM units").fetchone() == (rows,)
    connection.close()
