"""The index: opening, listing, searching, watching for change, damaged rows, putting back, other processes."""

import json
import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import apsw
import pytest

from tests.projects import Project
from vfs.errors import (
    DamagedRecord,
    IndexCorrupt,
    IndexLocked,
    IndexMissing,
    IndexUnavailable,
    IndexVersion,
    Refused,
    UsageError,
)
from vfs.index import Change, Find, Index, Sort
from vfs.index_record import local_path
from vfs.index_search import LISTED, date_bounds, dotted

FAST = 0.2  # a busy timeout tests can wait for

DEFAULTS: dict[str, Any] = {
    "kind": "Interface",
    "identity_key": "i",
    "predicate_json": "{}",
    "predicate_key": "p",
    "storage_uri": "file:///data/x",
    "created_at_ns": 1,
    "updated_at_ns": 1,
}


@contextmanager
def sql(path: Path) -> Iterator[apsw.Connection]:
    """A connection as another program has it; what was done is committed.

    Through apsw, as the index itself: SQLite's locks are the process's, so a second SQLite library in this process
    (the standard library's) takes itself for the last user when it closes, and removes the log from under the first.
    """
    connection = apsw.Connection(str(path))
    try:
        with connection:
            yield connection
    finally:
        connection.close()


def add(path: Path, *rows: dict[str, Any]) -> None:
    with sql(path) as connection:
        for row in rows:
            values = {**DEFAULTS, **row}
            marks = ", ".join("?" * len(values))
            connection.execute(f'INSERT INTO "index" ({", ".join(values)}) VALUES ({marks})', list(values.values()))


def python(code: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=cwd, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / ".machinable.sqlite"
    Index.open(path, create=True).close()
    return path


@pytest.fixture
def index(path: Path) -> Iterator[Index]:
    with Index.open(path, busy_timeout_s=FAST) as index:
        yield index


def uuids(records: Any) -> list[str]:
    return [record.uuid for record in records]


# ------------------------------------------------------------------------------------------------------- opening


def schema(path: Path) -> list[Any]:
    with sql(path) as connection:
        made = connection.execute("SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY name").fetchall()
        pragmas = [connection.execute(f"PRAGMA {name}").fetchall() for name in ("user_version", "journal_mode")]
    return [[(*row[:3], " ".join(str(row[3] or "").split())) for row in made], pragmas]


def test_made_as_machinable_makes_it(path: Path, tmp_path: Path) -> None:
    code = "import sys; from machinable.index import load; load(sys.argv[1], create=True).close()"
    python(code, str(tmp_path / "theirs.sqlite"), cwd=tmp_path)
    assert schema(path) == schema(tmp_path / "theirs.sqlite")
    assert len(schema(path)[0]) == 9


def test_create_makes_directories_and_leaves_an_index_alone(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "index.sqlite"
    with Index.open(path, create=True) as index:
        assert index.path == str(path)
        assert index.count() == 0
    add(path, {"record_id": "kept"})
    with Index.open(os.fsencode(path), create=True) as index:
        assert uuids(index.page()) == ["kept"]


def test_an_empty_file_is_no_index_until_created(tmp_path: Path) -> None:
    path = tmp_path / "empty"
    path.touch()
    with pytest.raises(IndexVersion, match=r"empty: is empty.*runfs reindex"):
        Index.open(path)
    with Index.open(path, create=True) as index:
        assert index.page() == []


def test_missing(tmp_path: Path) -> None:
    for place in (tmp_path / "none", tmp_path / "none" / "below"):
        with pytest.raises(IndexMissing, match=r"there is no index; name another"):
            Index.open(place)
    assert list(tmp_path.iterdir()) == []


def test_directory_in_its_place(tmp_path: Path) -> None:
    for create in (False, True):
        with pytest.raises(IndexUnavailable, match="is a directory"):
            Index.open(tmp_path, create=create)


def test_places_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(IndexUnavailable, match="file: cannot be used: "):
        Index.open(tmp_path / "file" / "index.sqlite", create=True)
    with pytest.raises(IndexUnavailable, match="is not UTF-8"):
        Index.open(os.fsencode(tmp_path) + b"/\xff", create=True)


def test_through_a_link(path: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(path)
    with Index.open(tmp_path / "link") as index:
        add(path, {"record_id": "a"})
        assert index.changed() == Change(rebuilt=False)
        assert index.changed() is None
        assert index.put_back([{**index.rows(["a"])[0], "record_id": "b"}]) == ["b"]


def test_fifo_in_its_place(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(IndexUnavailable, match="is not a plain file"):
        Index.open(tmp_path / "fifo")


@pytest.mark.parametrize(("version", "words"), [(10, "old schema version 10"), (12, "version 12, newer than 11")])
@pytest.mark.parametrize("create", [False, True])
def test_other_versions(path: Path, version: int, words: str, create: bool) -> None:
    with sql(path) as connection:
        connection.execute(f"PRAGMA user_version = {version}")
    with pytest.raises(IndexVersion, match=words):
        Index.open(path, create=create)
    with sql(path) as connection:
        assert connection.execute("PRAGMA user_version").fetchall() == [(version,)]


def test_right_version_without_the_tables(path: Path) -> None:
    with sql(path) as connection:
        connection.execute('DROP TABLE "index"')
    with pytest.raises(IndexCorrupt, match="has not the table 'index'"):
        Index.open(path)
    with sql(path) as connection:
        connection.execute('CREATE TABLE "index" (record_id TEXT PRIMARY KEY)')
    with pytest.raises(IndexCorrupt, match="has not the column kind"):
        Index.open(path)


@pytest.mark.parametrize("create", [False, True])
def test_short_garbage_is_not_taken_for_an_empty_index(tmp_path: Path, create: bool) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(IndexCorrupt, match="too short to be an index"):
        Index.open(tmp_path / "notes.txt", create=create)
    assert (tmp_path / "notes.txt").read_text() == "x"


@pytest.mark.parametrize("create", [False, True])
def test_a_database_of_something_else(tmp_path: Path, create: bool) -> None:
    with sql(tmp_path / "other") as connection:
        connection.execute("CREATE TABLE t (a)")
    with pytest.raises(IndexCorrupt, match="a database of something else"):
        Index.open(tmp_path / "other", create=create)


@pytest.mark.parametrize("content", [b"not a database at all" * 100, b"x" * 512])
def test_garbage(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "garbage"
    path.write_bytes(content)
    for create in (False, True):
        with pytest.raises(IndexCorrupt, match=r"SQLite says: .*not a database; move it away.*runfs reindex"):
            Index.open(path, create=create)
    assert path.read_bytes() == content


def test_truncated(path: Path) -> None:
    add(path, *({"record_id": f"r{number:04}", "label": "x" * 500} for number in range(500)))
    os.truncate(path, path.stat().st_size // 2 // 4096 * 4096)

    def use() -> None:
        with Index.open(path) as index:
            index.page(limit=1000)
            index.count()

    with pytest.raises(IndexCorrupt, match=r"SQLite says: .*malformed"):
        use()


@pytest.fixture
def _unprivileged() -> Iterator[None]:
    """Root may read everything, so become nobody for a moment."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def forbidden(path: Path) -> Path:
    path.chmod(0)
    for directory in list(path.parents)[:-2]:
        directory.chmod(directory.stat().st_mode | 0o011)
    return path


@pytest.mark.usefixtures("forbidden", "_unprivileged")
def test_unreadable(path: Path) -> None:
    with pytest.raises(IndexUnavailable, match=r"cannot be opened: .*; check the permissions") as caught:
        Index.open(path)
    assert str(path) in str(caught.value)


HOLD = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
for statement in sys.argv[2].split(";"):
    connection.execute(statement)
print("held", flush=True)
sys.stdin.read()
"""
EXCLUSIVE = "PRAGMA locking_mode = EXCLUSIVE; BEGIN EXCLUSIVE; UPDATE \"index\" SET label = 'x'"


@contextmanager
def held(path: Path, statements: str) -> Iterator[None]:
    """Another process that holds a lock until the block ends."""
    command = [sys.executable, "-c", HOLD, str(path), statements]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        try:
            yield
        finally:
            process.stdin.close()


def test_locked_while_opening(path: Path) -> None:
    with held(path, EXCLUSIVE):
        start = time.monotonic()
        with pytest.raises(IndexLocked, match=r"kept it locked for 0\.2 s"):
            Index.open(path, busy_timeout_s=FAST)
        assert FAST * 0.9 < time.monotonic() - start < 5
    Index.open(path).close()


def test_locked_for_writing_only(index: Index, path: Path) -> None:
    add(path, {"record_id": "a"})
    rows = [{**index.rows(["a"])[0], "record_id": "b"}]
    with held(path, "BEGIN IMMEDIATE"):
        assert uuids(index.page()) == ["a"]
        with pytest.raises(IndexLocked, match="another program"):
            index.put_back(rows)
    assert index.put_back(rows) == ["b"]


# ------------------------------------------------------------------------------------------------ look up and list


def test_get_and_record(index: Index, path: Path) -> None:
    full = {
        "record_id": "full", "kind": "Execution", "module": "m", "label": "l", "created_by": "me", "created_at_ns": 5,
        "updated_at_ns": 7, "hidden": 1, "bytes_missing": 1, "parent_id": "p", "storage_uri": "s3://b/x",
        "local_uri": "file:///a/b/", "storage_id": "lab",
    }  # fmt: skip
    add(path, full, {"record_id": "plain", "local_uri": ""})
    record = index.get("full")
    assert record is not None
    names = {"record_id": "uuid"}
    assert {name: getattr(record, names.get(name, name)) for name in full} == full
    assert record.directory == b"/a/b"
    plain = index.get("plain")
    assert plain is not None
    assert (plain.local_uri, plain.hidden, plain.directory) == (None, False, b"/data/x")
    assert index.get("nobody") is None
    assert index.get("") is None


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("file:///a/b", b"/a/b"),
        ("scratch:///a/b/", b"/a/b"),
        ("/a b/%20é", "/a b/%20é".encode()),
        ("file:///", b"/"),
        ("file:///a\udcff", b"/a\xff"),
        ("file://relative", None),
        ("relative", None),
        ("s3://bucket/x", None),
        ("file:///a\0b", None),
        ("file:///a\ud800", None),
        ("", None),
    ],
)
def test_local_path(uri: str, path: bytes | None) -> None:
    assert local_path(uri) == path


def test_pages(index: Index, path: Path) -> None:
    names = sorted(f"r{number:03}" for number in range(25))
    add(path, *({"record_id": name} for name in names))
    add(path, {"record_id": "r0005", "hidden": 1}, {"record_id": "P1", "kind": "Project"})
    found: list[str] = []
    while page := index.page(found[-1] if found else "", 10):
        assert len(page) == min(10, 25 - len(found))
        found += uuids(page)
    assert found == names
    assert index.count() == 25


def test_short_page_is_the_end_though_rows_are_left_out(index: Index, path: Path) -> None:
    add(path, *({"record_id": f"a/{number}"} for number in range(30)), {"record_id": "b"}, {"record_id": "c"})
    assert uuids(index.page(limit=1)) == ["b"]
    assert uuids(index.page(limit=5)) == ["b", "c"]
    assert uuids(index.search(kind="Interface", limit=1)) == ["b"]
    assert [uuid for uuid, _ in index.marks(limit=1)] == ["b"]


def family(path: Path) -> None:
    add(
        path,
        {"record_id": "P", "kind": "Project"},
        {"record_id": "root", "parent_id": "P"},
        {"record_id": "run1", "parent_id": "root", "kind": "Execution"},
        {"record_id": "run2", "parent_id": "root", "kind": "Execution", "hidden": 1},
        {"record_id": "deep", "parent_id": "run1"},
        {"record_id": "lost", "parent_id": "gone"},
        {"record_id": "loopA", "parent_id": "loopB"},
        {"record_id": "loopB", "parent_id": "loopA"},
        {"record_id": "below", "parent_id": "loopA"},
        {"record_id": "self", "parent_id": "self"},
    )


def test_nested(index: Index, path: Path) -> None:
    family(path)
    assert uuids(index.nested("root")) == ["deep", "run1", "run2"]
    assert uuids(index.nested("deep")) == []
    assert uuids(index.nested("loopA")) == ["below", "loopB"]
    assert uuids(index.nested("self")) == []
    assert uuids(index.nested("gone")) == ["lost"]


@pytest.mark.parametrize(
    ("uuid", "root"),
    [
        ("deep", "root"), ("run2", "root"), ("root", "root"), ("lost", "lost"), ("P", "P"), ("nobody", None),
        ("loopA", "loopA"), ("loopB", "loopA"), ("below", "loopA"), ("self", "self"),
    ],
)  # fmt: skip
def test_root_of(index: Index, path: Path, uuid: str, root: str | None) -> None:
    family(path)
    found = index.root_of(uuid)
    assert (found and found.uuid) == root


# --------------------------------------------------------------------------------------------------------- search


@pytest.fixture
def searchable(index: Index, path: Path) -> Index:
    configs = {
        "a": {"lr": 0.1, "name": "adam", "flag": True, "opt": {"beta": 2}},
        "b": {"lr": 0.2, "name": "sgd", "flag": False, "layers": [64, 32]},
        "c": {"lr": "0.2", "name": "café/é", "none": None, "odd key": 1, "with.dot": 2, "b-c": 3},
    }
    for number, (name, config) in enumerate(configs.items()):
        add(
            path,
            {
                "record_id": name,
                "config_resolved_json": json.dumps(config),
                "label": "x" if name != "c" else None,
                "predicate_json": '{"flag":true,"n":2,"s":"x"}' if name == "a" else '{"flag":false}',
                "module": f"m{number % 2}",
                "created_by": "me",
                "created_at_ns": (number + 1) * 10**9,
            },
        )
    add(path, {"record_id": "broken", "config_resolved_json": "{lr", "label": "x"})
    add(path, {"record_id": "nan", "config_resolved_json": '{"lr":NaN,"big":Infinity}'})
    add(path, {"record_id": "hid", "label": "x", "hidden": 1}, {"record_id": "P", "kind": "Project", "label": "x"})
    return index


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({}, ["a", "b", "broken", "c", "nan"]),
        ({"label": "x"}, ["a", "b", "broken"]),
        ({"module": "m0"}, ["a", "c"]),
        ({"module": "m0", "label": "x"}, ["a"]),
        ({"created_by": "me", "kind": "Interface"}, ["a", "b", "c"]),
        ({"kind": "Project"}, []),
        ({"config": [("lr", "eq", 0.2)]}, ["b"]),
        ({"config": [("lr", "ne", 0.2)]}, ["a", "c"]),
        ({"config": [("lr", "gt", 0.1)]}, ["b", "c"]),  # any text is over any number
        ({"config": [("lr", "gte", 0.1), ("lr", "lt", 0.2)]}, ["a"]),
        ({"config": [("lr", "lte", 0.1)]}, ["a"]),
        ({"config": [("name", "in", ["adam", "sgd"])]}, ["a", "b"]),
        ({"config": [("name", "in", "adam")]}, ["a"]),
        ({"config": [("name", "in", [])]}, []),
        ({"config": [("name", "contains", "AFÉ")]}, []),
        ({"config": [("name", "contains", "d")]}, ["a", "b"]),
        ({"config": [("opt.beta", "eq", 2)]}, ["a"]),
        ({"config": [("layers[1]", "eq", 32)]}, ["b"]),
        ({"config": [("b-c", "eq", 3)]}, ["c"]),
        ({"config": [("flag", "eq", True)]}, []),  # as machinable, which compares 1 with 'true'
        ({"config": [("flag", "is", "true")]}, ["a"]),
        ({"config": [("lr", "is", "0.2")]}, ["b", "c"]),
        ({"config": [("none", "is", "null")]}, ["c"]),
        ({"created_after_ns": 2 * 10**9}, ["b", "c"]),
        ({"created_after_ns": 10**9, "created_before_ns": 2 * 10**9}, ["a"]),
        ({"label": "x", "after": "a"}, ["b", "broken"]),
        ({"label": "x", "limit": 2}, ["a", "b"]),
        ({"label": "x", "after": "a", "limit": 1}, ["b"]),
        ({"label": "x' OR 1 --"}, []),
    ],
)
def test_search(searchable: Index, filters: dict[str, Any], expected: list[str]) -> None:
    assert uuids(searchable.search(**filters)) == expected


@pytest.mark.parametrize(
    ("filters", "words"),
    [
        ({"config": [("a b", "eq", 1)]}, "not a configuration path"),
        ({"config": [("a') OR 1 --", "eq", 1)]}, "not a configuration path"),
        ({"config": [("layers[x]", "eq", 1)]}, "not a configuration path"),
        ({"config": [("[0]", "eq", 1)]}, "not a configuration path"),
        ({"config": [("a", "like", 1)]}, "no operator 'like'; there are eq, ne"),
        ({"config": [("a", "eq", 2**70)]}, "over 64 bits"),
        ({"config": [("a", "eq", object())]}, "not a value to search for"),
        ({"status": "gone"}, "no status 'gone'; there are died, finished"),
    ],
)
def test_unusable_searches(searchable: Index, filters: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        searchable.search(**filters)


def test_search_by_status(index: Index, path: Path, tmp_path: Path) -> None:
    for name, marker in (("fin", "finished_at"), ("dead", "started_at"), ("none", "other")):
        (tmp_path / name).mkdir()
        (tmp_path / name / marker).write_text("2026-01-01T12:00:00+00:00")
        add(path, {"record_id": name, "storage_uri": f"file://{tmp_path / name}"})
    (tmp_path / "link").symlink_to(tmp_path / "fin")
    add(
        path,
        {"record_id": "link", "storage_uri": f"file://{tmp_path}/link"},
        {"record_id": "s3", "storage_uri": "s3://b"},
    )
    assert uuids(index.search(status="finished")) == ["fin"]
    assert uuids(index.search(status="died")) == ["dead"]
    assert uuids(index.search(status="none")) == ["none"]
    asked = {"link": "finished", "s3": "live"}
    assert uuids(index.search(status="finished", status_of=lambda record: asked.get(record.uuid))) == ["link"]
    assert uuids(index.search(status="live", kind="Interface", limit=1, status_of=lambda r: asked.get(r.uuid))) == [
        "s3"
    ]


def test_status_is_not_looked_for_behind_an_evicted_root(index: Index, path: Path, tmp_path: Path) -> None:
    """There the directory is a link into the mount, and the mount may be waiting for us."""
    (tmp_path / "real" / "run").mkdir(parents=True)
    (tmp_path / "real" / "run" / "finished_at").write_text("2026-01-01T12:00:00+00:00")
    add(path, {"record_id": "root", "storage_uri": f"file://{tmp_path}/root"})
    add(path, {"record_id": "run", "storage_uri": f"file://{tmp_path}/root/run", "parent_id": "root"})
    (tmp_path / "real").rename(tmp_path / "root")
    assert uuids(index.search(status="finished")) == ["run"]
    (tmp_path / "root").rename(tmp_path / "real")
    (tmp_path / "root").symlink_to("real")
    assert uuids(index.search(status="finished")) == []


def test_many_of_a_value_come_in_pages(index: Index, path: Path) -> None:
    """Over the page's limit the search takes another way than below it; both give the same."""
    add(path, *({"record_id": f"r{number:02}", "label": f"l{number % 2}"} for number in range(20, 0, -1)))
    expected = [f"r{number:02}" for number in range(2, 21, 2)]
    for limit in (1, 3, 9, 10, 11):
        found: list[str] = []
        while page := uuids(index.search(label="l0", after=found[-1] if found else "", limit=limit)):
            found += page
        assert found == expected


def test_values(searchable: Index) -> None:
    assert searchable.values("label") == ["x"]
    assert searchable.values("module") == ["m0", "m1"]
    assert searchable.values("module", after="m0") == ["m1"]
    assert searchable.values("module", limit=1) == ["m0"]
    assert searchable.values("kind") == ["Interface"]
    assert searchable.values("created_by") == ["me"]
    assert searchable.values("status") == ["died", "finished", "live", "none", "pending"]
    with pytest.raises(UsageError, match=r"no view 'nothing'; there are created_by, date"):
        searchable.values("nothing")


def test_config_views(searchable: Index) -> None:
    paths = ["b-c", "big", "flag", "layers[0]", "layers[1]", "lr", "name", "none", "opt.beta"]
    assert searchable.config_paths() == paths
    assert searchable.config_values("name") == ["adam", "café/é", "sgd"]
    assert searchable.config_values("flag") == ["false", "true"]
    assert searchable.config_values("none") == ["null"]
    assert searchable.config_values("name", after="adam", limit=1) == ["café/é"]
    for path in paths:  # each value a view lists leads to a record
        for value in searchable.config_values(path):
            assert searchable.search(config=[(path, "is", value)]), (path, value)


def test_dotted() -> None:
    assert dotted('$.a."b-c"[0].d') == "a.b-c[0].d"
    assert dotted('$."a.b"') is None
    assert dotted('$."a[0]"') is None
    assert dotted("$") is None


def test_dates_are_local(index: Index, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    late = 1_767_225_600 * 10**9 - 1  # a nanosecond before 2026 in UTC
    add(path, {"record_id": "late", "created_at_ns": late}, {"record_id": "new", "created_at_ns": late + 1})
    try:
        for zone, days in (("UTC", ["2025-12-31", "2026-01-01"]), ("Asia/Tokyo", ["2026-01-01"])):
            monkeypatch.setenv("TZ", zone)
            time.tzset()
            assert index.values("date") == days
            found = [
                uuids(index.search(created_after_ns=start, created_before_ns=end))
                for start, end in map(date_bounds, days)
            ]
            assert found == ([["late"], ["new"]] if zone == "UTC" else [["late", "new"]])
    finally:
        monkeypatch.delenv("TZ")
        time.tzset()
    with pytest.raises(UsageError, match="not a day: 'today'"):
        date_bounds("today")


def test_find_sorts_and_counts(searchable: Index) -> None:
    found = searchable.find(Find(kind="Interface", sort=[Sort("lr", "resolved", descending=False)], limit=2, offset=1))
    assert found.total == 5
    newest = searchable.find(Find(created_by="me"))
    assert uuids(newest.records) == ["c", "b", "a"]
    assert uuids(searchable.find(Find(include_hidden=True, label="x", sort=[Sort("kind")])).records)[0] == "P"
    predicates = [Find(predicate={"flag": True}), Find(predicate={"n": 2, "s": "x"}), Find(predicate={"n": 3})]
    assert [uuids(searchable.find(each).records) for each in predicates] == [["a"], ["a"], []]
    for sort in (Sort("record_id; DROP TABLE relations"), Sort("lr", "nowhere")):
        with pytest.raises(UsageError, match=r"cannot sort by|no configuration layer"):
            searchable.find(Find(sort=[sort]))


def test_searches_compare_as_machinable(searchable: Index, path: Path) -> None:
    """Every operator on values of every type, asked of the real machinable too (without the row it fails on)."""
    values: list[Any] = [0, 1, 0.2, "0.2", "adam", "", True, False, None, [64, 32], {"beta": 2}]
    paths = ["lr", "name", "flag", "opt", "opt.beta", "layers", "layers[0]", "none", "nowhere"]
    operators = ["eq", "ne", "lt", "lte", "gt", "gte", "in", "contains"]
    asked = [(p, o, v) for p in paths for o in operators for v in values]
    with sql(path) as connection:
        connection.execute("DELETE FROM \"index\" WHERE record_id IN ('broken', 'nan')")
    code = """
import json, sys
from machinable.api.models import ConfigMatch, FindRequest
from machinable.index import Index
with Index({"database": sys.argv[1]}) as index:
    for path, op, value in json.loads(sys.argv[2]):
        match = ConfigMatch(filters=[{"path": path, "op": op, "value": value}])
        found = index.find(FindRequest(config=match))
        print(json.dumps([found.total, [item.record_id for item in found.items]]))
"""
    lines = python(code, str(path), json.dumps(asked), cwd=path.parent).stdout.splitlines()
    assert len(lines) == len(asked)
    some = 0
    for each, line in zip(asked, lines, strict=True):
        found = searchable.find(Find(config=[each]))
        assert [found.total, uuids(found.records)] == json.loads(line), each
        some += bool(found.total)
    assert some > 100


# --------------------------------------------------------------------------------------------------- damaged rows


def test_damaged_rows_hide_no_others_and_are_named(index: Index, path: Path) -> None:
    bad: list[Any] = ["a/b", "..", ".", "", "a\0b", "x" * 65, ".by", b"blob", "a\nb", "é"]
    add(path, *({"record_id": uuid} for uuid in bad))
    add(
        path,
        {"record_id": None},
        {"record_id": "good1"},
        {"record_id": "json", "extra_json": "{", "config_resolved_json": "nope"},
        {"record_id": "uri", "storage_uri": ""},
        {"record_id": "uri2", "storage_uri": "file://relative", "local_uri": "\0"},
        {"record_id": "time", "created_at_ns": "yesterday", "updated_at_ns": "x", "hidden": 0},
        {"record_id": "self", "parent_id": "self"},
        {"record_id": "zgood"},
    )
    with sql(path) as connection:
        connection.execute("INSERT INTO \"index\" SELECT CAST(x'ff41' AS TEXT)," + _others("kind"))
        connection.execute("UPDATE \"index\" SET label = CAST(x'ff41' AS TEXT) WHERE record_id = 'zgood'")
    expected = ["good1", "json", "self", "time", "uri", "uri2", "zgood"]
    assert uuids(index.page()) == expected
    assert uuids(index.page(limit=1)) == ["good1"]
    assert uuids(index.search(kind="Interface")) == expected
    assert uuids(index.search(config=[("a", "ne", 1)])) == []
    assert [uuid for uuid, _ in index.marks()] == expected
    assert uuids(index.changed_since(0)) == [*(u for u in expected if u != "time"), "time"]
    assert all(index.get(uuid) for uuid in expected)
    assert not any(index.get(uuid) for uuid in bad if isinstance(uuid, str))
    damaged = index.get("time")
    assert damaged is not None
    assert (damaged.created_at_ns, damaged.updated_at_ns) == (0, 0)
    label = index.get("zgood")
    assert label is not None
    assert label.label == "\udcffA"
    found = list(index.problems())
    for uuid in [*(repr(u) for u in bad if isinstance(u, str)), "None", "'blob'", repr("\udcffA")]:
        assert sum(f"its uuid {uuid} cannot be a file name" in line for line in found) == 1, uuid
    assert {line for line in found if "cannot be a file name" not in line} == {
        "json: its config_resolved_json is not JSON; searches pass over it",
        "json: its extra_json is not JSON; searches pass over it",
        "uri: its storage_uri '' is neither an absolute path nor a URI",
        "uri2: its storage_uri 'file://relative' is neither an absolute path nor a URI",
        "uri2: its local_uri '\\x00' is neither an absolute path nor a URI",
        "time: its created_at_ns is not a whole number",
        "time: its updated_at_ns is not a whole number",
        "self: their parents form a loop",
    }


def _others(after: str) -> str:
    rest = (
        "kind, module, identity_key, predicate_json, predicate_key, parent_id, config_default_json, "
        "config_version_json, config_update_json, config_resolved_json, inherits_json, context_json, storage_uri, "
        "local_uri, storage_id, hidden, bytes_missing, created_at_ns, updated_at_ns, created_by, label, extra_json, "
        "private_json"
    )
    assert rest.startswith(after)
    return f" {rest} FROM \"index\" WHERE record_id = 'good1'"


def test_no_problems_in_a_sound_index(index: Index, path: Path) -> None:
    add(path, {"record_id": "a"}, {"record_id": "b", "storage_uri": "s3://bucket/b", "parent_id": "a"})
    add(
        path,
        {"record_id": "c", "config_resolved_json": '{"x":NaN}', "parent_id": "b"},
        {"record_id": "d", "parent_id": "c"},
    )
    assert list(index.problems()) == []


# --------------------------------------------------------------------------------------------------------- change


def test_nothing_changed(index: Index) -> None:
    assert [index.changed() for _ in range(3)] == [None, None, None]


def test_commits_of_others_are_seen_once(index: Index, path: Path) -> None:
    add(path, {"record_id": "a"})
    assert index.changed() == Change(rebuilt=False)
    assert index.changed() is None
    assert uuids(index.page()) == ["a"]


def test_polling_is_cheap(index: Index) -> None:
    start = time.perf_counter()
    for _ in range(1000):
        index.changed()
    assert time.perf_counter() - start < 1  # 0.01 s here


def test_replaced_file_is_opened_anew(index: Index, path: Path, tmp_path: Path) -> None:
    add(path, {"record_id": "old"})
    other = tmp_path / "other.sqlite"
    Index.open(other, create=True).close()
    add(other, {"record_id": "new"})
    for suffix in ("-wal", "-shm"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)
    other.rename(path)
    assert index.changed() == Change(rebuilt=True)
    assert index.changed() is None
    assert uuids(index.page()) == ["new"]
    assert [uuid for uuid, _ in index.marks()] == ["new"]


KEEP_OPEN = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("UPDATE 'index' SET label = 'only in the log'")
print("held", flush=True)
sys.stdin.read()
"""
RELABEL = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("UPDATE 'index' SET label = 'b'")
"""


def test_leaving_a_replaced_index_does_not_touch_the_new_ones_log(index: Index, path: Path, tmp_path: Path) -> None:
    """SQLite removes the log by name when its last user closes; by then the name is another index's."""
    add(path, {"record_id": "old"})
    other = tmp_path / "other.sqlite"
    Index.open(other, create=True).close()
    add(other, {"record_id": "new"})
    unpolled = Index.open(path)
    for suffix in ("-wal", "-shm"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)
    other.rename(path)
    with subprocess.Popen(
        [sys.executable, "-c", KEEP_OPEN, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        assert process.stdin
        assert process.stdout.readline() == "held\n"
        log = Path(f"{path}-wal").stat()
        assert log.st_size > 0
        unpolled.close()
        assert index.changed() == Change(rebuilt=True)
        assert Path(f"{path}-wal").stat().st_ino == log.st_ino
        assert [record.label for record in index.page()] == ["only in the log"]
        process.stdin.close()


@pytest.mark.parametrize("linked", [False, True])
def test_a_removed_log_is_noticed(path: Path, tmp_path: Path, linked: bool) -> None:
    """Another SQLite library in this process removes it on closing; from then on we would see nothing new."""
    place = path
    if linked:
        place = tmp_path / "elsewhere" / "link"
        place.parent.mkdir()
        place.symlink_to(path)
    with Index.open(place) as index:
        lose_the_log(index, path)


def lose_the_log(index: Index, path: Path) -> None:
    add(path, {"record_id": "a"})
    assert index.changed() == Change(rebuilt=False)
    stranger = sqlite3.connect(path)
    assert stranger.execute('SELECT count(*) FROM "index"').fetchone() == (1,)
    stranger.close()
    python(RELABEL, str(path), cwd=path.parent)
    with pytest.raises(IndexUnavailable, match="was replaced"):
        index.put_back([{}])
    assert index.changed() == Change(rebuilt=True)
    assert [record.label for record in index.page()] == ["b"]
    assert index.changed() is None
    assert list(index.problems()) == []


RELABEL_AND_DIE = RELABEL + "import os; os._exit(0)"


def test_closing_after_the_log_was_removed_leaves_the_new_one(index: Index, path: Path) -> None:
    """The new log may be all there is of what others committed since."""
    add(path, {"record_id": "a"})
    stranger = sqlite3.connect(path)
    assert stranger.execute('SELECT count(*) FROM "index"').fetchone() == (1,)
    stranger.close()
    python(RELABEL_AND_DIE, str(path), cwd=path.parent)
    index.close()
    with Index.open(path) as again:
        assert [record.label for record in again.page()] == ["b"]


def test_removed_file_is_missing_until_it_is_there_again(index: Index, path: Path) -> None:
    add(path, {"record_id": "old"})
    kept = index.rows(["old"])
    for suffix in ("", "-wal", "-shm"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)
    for _ in range(2):
        with pytest.raises(IndexMissing):
            index.changed()
    with pytest.raises(IndexMissing):
        index.put_back(kept)  # into the removed file it would be lost
    assert uuids(index.page()) == ["old"]
    Index.open(path, create=True).close()
    assert index.changed() == Change(rebuilt=True)
    assert index.put_back(kept) == ["old"]
    assert uuids(index.page()) == ["old"]


def test_rebuild_seen_halfway(index: Index, path: Path) -> None:
    """machinable drops and makes its tables in separate commits; a poll in between must not count as having seen it."""
    add(path, {"record_id": "a"})
    kept = index.rows(["a"])
    index.changed()
    with sql(path) as connection:
        statements = [
            row[0] for row in connection.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY rowid")
        ]
        connection.execute("PRAGMA user_version = 10")
        connection.execute('DROP TABLE "index"')
        connection.execute("DROP TABLE relations")
    for _ in range(2):
        with pytest.raises(IndexVersion, match="old schema version 10"):
            index.changed()
    with pytest.raises(IndexVersion, match="are just being rebuilt"):
        index.page()
    with sql(path) as connection:
        for statement in statements:
            if "sqlite_sequence" not in statement:
                connection.execute(statement)
        connection.execute("PRAGMA user_version = 11")
    assert index.changed() == Change(rebuilt=True)
    assert index.put_back(kept) == ["a"]


def test_newer_machinable_under_an_open_index(index: Index, path: Path) -> None:
    with sql(path) as connection:
        connection.execute('ALTER TABLE "index" ADD COLUMN more TEXT')
        connection.execute("PRAGMA user_version = 12")
    with pytest.raises(IndexVersion, match="version 12"):
        index.changed()


def test_changed_since(index: Index, path: Path) -> None:
    add(
        path,
        *({"record_id": name, "updated_at_ns": when} for name, when in zip("abcdef", (1, 2, 3, 3, 3, 4), strict=True)),
    )
    add(
        path,
        {"record_id": "P", "kind": "Project", "updated_at_ns": 9},
        {"record_id": "h", "hidden": 1, "updated_at_ns": 5},
    )
    assert uuids(index.changed_since(1)) == ["b", "c", "d", "e", "f", "h"]
    assert uuids(index.changed_since(1, 2)) == ["b", "c", "d", "e"]  # the whole of time 3
    assert uuids(index.changed_since(3, 2)) == ["f", "h"]
    assert uuids(index.changed_since(5)) == []
    assert index.marks("d", 2) == [("e", 3), ("f", 4)]
    assert dict(index.marks())["h"] != 5  # hidden: a note of a person, which no updated_at tells of


# ------------------------------------------------------------------------------------------------ keep and put back

REBUILD = """
import sqlite3
from machinable import Index, Project, get
connection = sqlite3.connect(".machinable.sqlite")
connection.execute("PRAGMA user_version = 10")
connection.commit()
connection.close()
with Project("."):
    print(len(get.all()))
"""
LOOK = """
import sys
from machinable import Project, get
with Project("."):
    print(len(get.by_id(sys.argv[1]).executions))
"""


def test_put_back_after_a_real_rebuild(project: Project) -> None:
    """machinable meets an old version, drops its tables and walks the directories; the evicted ones are not there."""
    run = project.runs[0]
    with sql(project.index) as connection:
        connection.execute('UPDATE "index" SET hidden = 1, private_json = \'{"note":"x"}\' WHERE record_id = ?', [run])
    with Index.open(project.index) as index:
        unit = [run, *uuids(index.nested(run))]
        assert len(unit) >= 2
        kept = json.loads(json.dumps(index.rows(unit)))
        assert {row["record_id"] for row in kept} == set(unit)
        assert sum(len(row["relations"]) for row in kept) >= 1
        everything = index.rows([uuid for uuid, _ in index.marks()])
        record = index.get(run)
        assert record is not None
        directory = Path(os.fsdecode(record.directory or b""))
        away = project.path / "away"
        directory.rename(away)
        directory.symlink_to(away)  # as eviction leaves it: machinable's walk does not follow links
        index.changed()
        project.run(REBUILD)
        assert index.changed() == Change(rebuilt=True)
        assert not any(map(index.get, unit))
        assert index.get(project.runs[1]) is not None
        assert sorted(index.put_back(kept)) == sorted(unit)
        assert index.put_back(kept) == []
        back = {row["record_id"]: row for row in index.rows(unit)}
        edges = {(edge["relation"], edge["record_id"], edge["related_id"]) for row in kept for edge in row["relations"]}
        again = {(e["relation"], e["record_id"], e["related_id"]) for row in back.values() for e in row["relations"]}
        assert edges <= again
        for row in kept:
            assert {**back[row["record_id"]], "relations": 0} == {**row, "relations": 0}
        before = {row["record_id"] for row in everything}
        assert {uuid for uuid, _ in index.marks()} == before
    assert project.run(LOOK, run).stdout.split() == ["1"]


def test_put_back_overwrites_nothing(index: Index, path: Path) -> None:
    add(path, {"record_id": "a", "label": "now"}, {"record_id": "b"})
    with sql(path) as connection:
        connection.execute(
            "INSERT INTO relations (relation, record_id, related_id, created_at_ns) VALUES ('uses', 'a', 'b', 5)"
        )
    kept = index.rows(["a", "b", "nobody"])
    assert uuids_of(kept) == ["a", "b"]
    edge = {"relation": "uses", "record_id": "a", "related_id": "b", "priority": 0, "created_at_ns": 5}
    assert [row["relations"] for row in kept] == [[edge], [edge]]
    with sql(path) as connection:
        connection.execute("DELETE FROM \"index\" WHERE record_id = 'b'")
        connection.execute("DELETE FROM relations")
        connection.execute("UPDATE \"index\" SET label = 'newer'")
    assert index.put_back([{**row, "unknown_column": 1} for row in kept]) == ["b"]
    record = index.get("a")
    assert record is not None
    assert record.label == "newer"
    assert index.rows(["b"])[0]["relations"] == [edge]


def uuids_of(rows: list[dict[str, Any]]) -> list[str]:
    return [row["record_id"] for row in rows]


def test_one_bad_kept_row_keeps_none_back(index: Index, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    add(path, {"record_id": "a"})
    (row,) = index.rows(["a"])
    bad = [{**row, "record_id": "x/y"}, {**row, "record_id": "lacks", "storage_uri": None}, {}]
    assert index.put_back([*bad, {**row, "record_id": "b"}]) == ["b"]
    assert len(caplog.records) == 3
    assert "lacks ['storage_uri']" in caplog.text


def test_odd_values_survive_keeping(index: Index, path: Path) -> None:
    add(path, {"record_id": "a", "label": b"\x00\xff", "created_by": 'é"\0'})
    kept = json.loads(json.dumps(index.rows(["a"])))
    with sql(path) as connection:
        connection.execute('DELETE FROM "index"')
    assert index.put_back(kept) == ["a"]
    with sql(path) as connection:
        assert connection.execute('SELECT label, created_by FROM "index"').fetchall() == [(b"\x00\xff", 'é"\0')]
        connection.execute("UPDATE \"index\" SET label = CAST(x'ff41' AS TEXT)")
    kept = json.loads(json.dumps(index.rows(["a"])))
    assert kept[0]["label"] == "\udcffA"
    with sql(path) as connection:
        connection.execute('DELETE FROM "index"')
    assert index.put_back(kept) == ["a"]
    record = index.get("a")
    assert record is not None
    assert record.label == "\ufffdA"


# --------------------------------------------------------------------------------------------------------- ingest


def make_record(directory: Path, uuid: str, **model: Any) -> Path:
    directory.mkdir(parents=True)
    (directory / ".machinable").touch()
    header = {
        "format": 1,
        "uuid": uuid,
        "kind": "Interface",
        "identity_key": f"i{uuid}",
        "predicate_key": "p",
        "parent": None,
    }
    (directory / "id.json").write_text(json.dumps(header))
    (directory / "model.json").write_text(json.dumps({"uuid": uuid, "kind": "Interface", **model}))
    return directory


def test_ingest(index: Index, tmp_path: Path) -> None:
    record = make_record(tmp_path / "store" / "r", "abc", label="l", created_at_ns=5, created_by="me")
    before = time.time_ns()
    assert index.ingest(record, storage_id="lab") == "abc"
    found = index.get("abc")
    assert found is not None
    assert (found.label, found.created_at_ns, found.created_by, found.storage_id) == ("l", 5, "me", "lab")
    assert found.directory == os.fsencode(record)
    assert before <= found.updated_at_ns <= time.time_ns()
    (tmp_path / "link").symlink_to(record)
    with pytest.raises(DamagedRecord, match="link: is a link"):
        index.ingest(tmp_path / "link")
    assert index.ingest(tmp_path) is None
    assert index.ingest(tmp_path / "nowhere") is None


@pytest.mark.parametrize(("at", "uri"), [("/else/where/", "file:///else/where"), ("s3://b/x", "s3://b/x")])
def test_ingest_at_another_place(index: Index, tmp_path: Path, at: str, uri: str) -> None:
    assert index.ingest(make_record(tmp_path / "r", "abc"), at=at) == "abc"
    found = index.get("abc")
    assert found is not None
    assert (found.storage_uri, found.local_uri) == (uri, uri)


def test_another_record_of_the_same_uuid_is_refused(index: Index, tmp_path: Path) -> None:
    first, second = make_record(tmp_path / "1", "abc"), make_record(tmp_path / "2", "abc")
    header = json.loads((second / "id.json").read_text())
    (second / "id.json").write_text(json.dumps({**header, "identity_key": "other"}))
    index.ingest(first)
    with pytest.raises(
        Refused, match=r"abc: the index has another record of this uuid \(iabc/p; this one is other/p\)"
    ):
        index.ingest(second)
    found = index.get("abc")
    assert found is not None
    assert found.directory == os.fsencode(first)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("id.json", None, r"has no id\.json"),
        ("id.json", "{}", "has no uuid"),
        ("model.json", None, r"model\.json: there is none"),
        ("model.json", "[]", "does not say its kind"),
        ("model.json", '{"uuid": "other", "kind": "Interface"}', r"id\.json is of abc, but model\.json of other"),
        ("model.json", '{"uuid": "abc", "kind": "Interface", "label": 3}', "label: Input should be a valid string"),
        ("model.json", '{"uuid": "abc", "kind": "Interface", "config": {"_default_": 1, "a": 2}}', "config: default"),
        ("model.json", '{"uuid": "abc", "kind": "Interface", "created_at_ns": 1e300}', "created_at_ns"),
        ("model.json", '{"uuid": "abc", "kind": "Interface", "label": "\\ud800"}', "its label is not UTF-8"),
    ],
)
def test_damaged_directories_do_not_stop_a_reindex(
    index: Index, tmp_path: Path, name: str, content: str | None, reason: str
) -> None:
    store = tmp_path / "store"
    bad = make_record(store / "a", "abc")
    make_record(store / "b", "fine")
    (bad / name).unlink()
    if content is not None:
        (bad / name).write_text(content)
    with pytest.raises(DamagedRecord, match=reason):
        index.ingest(bad)
    done = index.reindex([store])
    assert done.ingested == ["fine"]
    assert [path for path, _ in done.damaged] == [str(bad)]
    assert uuids(index.page()) == ["fine"]


def test_reindex_names_clashes_links_and_bad_edges(
    index: Index, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = tmp_path / "store"
    make_record(store / "a", "abc")
    clash = make_record(store / "b", "abc")
    header = json.loads((clash / "id.json").read_text())
    (clash / "id.json").write_text(json.dumps({**header, "identity_key": "other"}))
    edges = make_record(store / "c", "edges")
    (edges / "related").mkdir()
    good = json.dumps({"name": "uses", "uuid": "edges", "related_uuid": "abc"})
    (edges / "related" / "metadata.jsonl").write_text(f'{good}\n{{"name": 1}}\n')
    torn = make_record(store / "d", "torn")
    (torn / "related").mkdir()
    (torn / "related" / "metadata.jsonl").write_text(f"{good}\n{{")
    make_record(tmp_path / "outside", "linked")
    (store / "link").symlink_to(tmp_path / "outside")
    done = index.reindex([store])
    assert sorted(done.ingested) == ["abc", "edges", "torn"]
    reasons = {Path(path).name: reason for path, reason in done.damaged}
    assert set(reasons) == {"c", "d"} | ({"a", "b"} & set(reasons))
    assert len(reasons) == 3
    assert "is not an edge" in reasons["c"]
    assert "its edges were left out" in reasons["d"]
    assert len(index.rows(["edges"])[0]["relations"]) == 1
    assert index.ingest(torn) == "torn"
    assert "its edges were left out" in caplog.text
    missing = index.reindex([tmp_path / "nowhere"])
    assert missing.ingested == []
    assert missing.damaged == [(str(tmp_path / "nowhere"), "cannot be read: No such file or directory")]


def test_path_that_is_not_utf8(index: Index, tmp_path: Path) -> None:
    odd = os.fsencode(tmp_path) + b"/\xff"
    os.rename(make_record(tmp_path / "r", "abc"), odd)
    make_record(tmp_path / "s", "fine")
    with pytest.raises(DamagedRecord, match="its storage_uri is not UTF-8"):
        index.ingest(odd)
    done = index.reindex([os.fsencode(tmp_path)])
    assert done.ingested == ["fine"]
    assert done.damaged[0][0] == os.fsdecode(odd)
    assert index.ingest(odd, at="/fine/place") == "abc"


# ------------------------------------------------------------------------------------------------ many at a time

WRITER = """
import sqlite3, sys, time
INSERT = '''INSERT INTO "index" (record_id, kind, identity_key, predicate_json, predicate_key, storage_uri,
    created_at_ns, updated_at_ns) VALUES (?, 'Interface', 'i', '{}', 'p', 'file:///x', 1, ?)'''
connection = sqlite3.connect(sys.argv[1], timeout=0, isolation_level=None)
connection.execute("PRAGMA busy_timeout = 5000")
slowest, number, end = 0.0, 0, time.monotonic() + float(sys.argv[2])
print("ready", flush=True)
while time.monotonic() < end:
    start = time.monotonic()
    connection.execute(INSERT, (f"w{number:07}", number))
    slowest = max(slowest, time.monotonic() - start)
    number += 1
    time.sleep(0.0005)
print(number, slowest)
"""


def test_other_writers_are_not_disturbed(path: Path, tmp_path: Path) -> None:
    """A process writes all the time while we page, search, poll and ingest: neither fails, no row is lost."""
    with Index.open(path) as index:
        work_beside_a_writer(index, path, tmp_path)


def work_beside_a_writer(index: Index, path: Path, tmp_path: Path) -> None:
    for number in range(200):
        make_record(tmp_path / "store" / str(number), f"ingested{number:03}", created_at_ns=1)
    command = [sys.executable, "-c", WRITER, str(path), "1.5"]
    changes = rounds = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        process.stdout.readline()
        while process.poll() is None:
            rounds += 1
            if rounds <= 3:
                assert len(index.reindex([tmp_path / "store"]).ingested) == 200
            seen = uuids(index.page(limit=5000))
            assert seen == sorted(seen)
            index.search(kind="Interface", limit=10)
            changes += index.changed() is not None
        written, slowest = process.stdout.read().split()
    assert process.returncode == 0
    assert rounds > 3
    assert changes > 3
    assert int(written) > 100
    assert index.count() == int(written) + 200
    assert float(slowest) < 2.0


def test_threads_share_one_index(index: Index, path: Path) -> None:
    add(path, *({"record_id": f"r{number:03}", "label": str(number % 7)} for number in range(300)))
    kept = index.rows(["r000"])
    failed: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(20):
                assert len(index.page(limit=1000)) >= 300
                assert index.get(f"r{number:03}") is not None
                assert index.search(label="3")
                index.changed()
                index.put_back([{**kept[0], "record_id": f"t{number}-{turn}"}])
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert failed == []
    assert index.count() == 300 + 6 * 20


def test_a_scan_delays_no_look_up(index: Index, path: Path) -> None:
    """Look-ups have a connection of their own: one goes through while a scan holds the other."""
    add(path, {"record_id": "a"})
    inside, leave = threading.Event(), threading.Event()

    def slow_status(_: object) -> str:
        inside.set()
        assert leave.wait(20)
        return "finished"

    def scan() -> None:
        index.search(status="finished", status_of=slow_status)

    scanner = threading.Thread(target=scan)
    scanner.start()
    assert inside.wait(20)
    start = time.monotonic()
    assert index.get("a") is not None
    assert uuids(index.page()) == ["a"]
    assert time.monotonic() - start < 5
    leave.set()
    scanner.join(20)
    assert not scanner.is_alive()


def plan(path: Path, statement: str) -> str:
    with sql(path) as connection:
        return " | ".join(str(row[3]) for row in connection.execute(f"EXPLAIN QUERY PLAN {statement}"))


def test_pages_walk_the_primary_key(index: Index, path: Path) -> None:
    """A page of a large index costs a page: it neither scans nor sorts."""
    for where in ("1", "+module = 'm'", "+label = 'l'"):
        steps = plan(
            path,
            "SELECT i.record_id, i.kind FROM \"index\" AS i WHERE typeof(i.record_id) = 'text' "
            f"AND i.record_id > CAST(x'61' AS TEXT) AND {LISTED} AND {where} ORDER BY i.record_id LIMIT 10",
        )
        assert "USING INDEX sqlite_autoindex_index_1 (record_id>?)" in steps
        assert "TEMP B-TREE" not in steps


def test_a_large_index_pages_quickly(index: Index, path: Path) -> None:
    """60,000 rows, so that a page that scanned them all would be seen; 1,000,000 take the same time a page."""
    with sql(path) as connection:
        connection.execute(
            """INSERT INTO "index" (record_id, kind, identity_key, predicate_json, predicate_key, storage_uri,
            created_at_ns, updated_at_ns, module)
            WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < 59999)
            SELECT printf('%07d', i * 7919 % 60000), 'Interface', 'i', '{}', 'p', 'file:///x', i, i, 'common' FROM n"""
        )
    start = time.perf_counter()
    for _ in range(50):
        assert len(index.page("0030000", 10)) == 10
        assert len(index.search(module="common", after="0030000", limit=10)) == 10
    assert time.perf_counter() - start < 1  # 0.01 s here; a scan or a sort takes 0.02 s each time
    start = time.perf_counter()
    for _ in range(500):
        assert index.nested("0030000") == []
    assert time.perf_counter() - start < 1  # 0.01 s here; a scan takes 0.005 s each time
