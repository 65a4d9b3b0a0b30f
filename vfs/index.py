"""The machinable index: look up, list, search, watch for change, ingest, put back.

Used by the tree (names and views), by the daemon (polling for change), by push and evict (units, rows to keep)
and by `runfs reindex`. All of it is synchronous and thread safe. There are two connections, each with its lock:
one for look-ups, pages and polls, which take microseconds to a few milliseconds, and one for scans and writes, which
on a million rows take a second, so that no look-up waits behind a scan. Within a process nothing else blocks them;
other processes can make a write wait up to the busy timeout (5 s), then it fails with IndexLocked.

The index belongs to machinable, whose other processes write to it all the time. We only ever add rows (ingest, put
back) or refresh what `machinable reindex` would; no row is removed, and no schema is migrated.

A row we cannot use (its uuid cannot be a file name) is left out everywhere and named by `problems()`; it never
hides another.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from vfs import index_listing, index_rows, index_search
from vfs.errors import DamagedRecord, Refused, UsageError
from vfs.format import Location, Status, run_status
from vfs.index_database import BUSY_TIMEOUT_S, Database, Identity, Row, Value, identity
from vfs.index_listing import CONTAINERS
from vfs.index_record import Record, raw, select, text, to_records
from vfs.index_search import LISTED, Filter, Find, Sort, Where
from vfs.ingest import Entry, read_entry, walk

__all__ = ["Change", "Filter", "Find", "Found", "Index", "Record", "Reindexed", "Sort", "Status"]

_log = logging.getLogger(__name__)

# Rows a write transaction takes at most: about 20 ms, so that other processes' writers hardly notice.
_BATCH = 500
_DEEPEST = 1000  # ancestors; beyond it is a loop that somebody wrote by hand


@dataclass(frozen=True, slots=True)
class Change:
    """Something was committed to the index. `rebuilt`: its tables or its file are not those of before."""

    rebuilt: bool


@dataclass(frozen=True, slots=True)
class Found:
    """A page of a find, and how many match in all."""

    records: list[Record]
    total: int


@dataclass(frozen=True, slots=True)
class Reindexed:
    """The uuids that are in the index now, and for each directory with a fault its path and the reason.

    A directory can be in both: it is in the index, but some of its edges are not.
    """

    ingested: list[str]
    damaged: list[tuple[str, str]]


class _State(NamedTuple):
    """What `changed` compares: the files, SQLite's counters of commits by others and of its schema."""

    identity: Identity
    data: Value
    schema: Value


class Index:
    """An open index. See the module's description for what may wait and for how long."""

    @classmethod
    def open(cls, path: Location, *, create: bool = False, busy_timeout_s: float = BUSY_TIMEOUT_S) -> "Index":
        """Open the index in a file; with `create`, make it (and its directory) where there is none.

        Raises IndexMissing, IndexVersion, IndexLocked, IndexCorrupt, or IndexUnavailable (a directory, no permission).
        """
        return cls(os.path.abspath(os.fsdecode(path)), create, busy_timeout_s)

    def __init__(self, path: str, create: bool, busy_timeout_s: float) -> None:
        self.path = path
        self._polling = threading.Lock()
        self._quick = Database(path, create=create, busy_timeout_s=busy_timeout_s)
        try:
            self._slow = Database(path, busy_timeout_s=busy_timeout_s)
            self._seen = self._state()
        except BaseException:
            self._quick.close()
            raise

    def close(self) -> None:
        """Close it. Calling it twice is fine."""
        self._quick.close()
        self._slow.close()

    def __enter__(self) -> "Index":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------------------------- look up and list

    def get(self, uuid: str) -> Record | None:
        """The record with this uuid, hidden or not."""
        records = to_records(select(self._quick, "WHERE i.record_id = CAST(? AS TEXT)", [raw(uuid)]))
        return records[0] if records else None

    def page(self, after: str = "", limit: int = 1000) -> list[Record]:
        """The root listing after a uuid: not hidden, no Project, in uuid order. Fewer than `limit` is the end."""
        return self._fill(self._quick, Where(), after, limit)

    def listed(self, after: str, upto: str | None, limit: int) -> list[Row]:
        """The same for `index_listing.to_listed`, up to a uuid (None: to the end): equal rows, equal listing."""
        return index_listing.listed(self._quick, after, upto, limit)

    def listed_one(self, uuid: str) -> bytes | None:
        """Where one of them lies; see `Record.directory`."""
        return index_listing.directory_of(self._quick, uuid)

    def count(self) -> int:
        """How many records the root listing has (rows whose uuid is no file name included). Scans."""
        return _count(self._slow.one(f'SELECT count(*) FROM "index" WHERE {LISTED}'))

    def nested(self, uuid: str) -> list[Record]:
        """All records below this one, by parent; hidden ones too, not itself. In uuid order. Loops are no trouble."""
        below = (
            "WITH RECURSIVE below(id) AS (SELECT CAST(? AS TEXT) UNION "
            'SELECT child.record_id FROM below JOIN "index" AS child ON child.parent_id = below.id)'
        )
        # The plus makes SQLite start from the few below, not from the whole index for the sake of its order.
        tail = "JOIN below ON i.record_id = below.id WHERE i.record_id != CAST(? AS TEXT) ORDER BY +i.record_id"
        return to_records(select(self._quick, tail, [raw(uuid), raw(uuid)], before=below))

    def root_of(self, uuid: str) -> Record | None:
        """The topmost ancestor that is in the index and no Project: the record itself, if it has none.

        None when the uuid is not in the index. Where parents form a loop, its smallest uuid, the same for all in it.
        """
        chain: list[Record] = []
        seen: set[str] = set()
        record = self.get(uuid)
        while record is not None and record.uuid not in seen and len(chain) < _DEEPEST:
            chain.append(record)
            seen.add(record.uuid)
            parent = self.get(record.parent_id) if record.parent_id else None
            if parent is None or parent.kind in CONTAINERS:
                return record
            record = parent
        if record is None:
            return None
        loop = chain[next((i for i, link in enumerate(chain) if link.uuid == record.uuid), 0) :]
        return min(loop, key=lambda link: link.uuid)

    def _fill(
        self, database: Database, where: Where, after: str, limit: int, keep: Callable[[Record], bool] | None = None
    ) -> list[Record]:
        """Up to `limit` listed records in uuid order; goes on past rows that are left out, so short means the end."""
        conditions = f"typeof(i.record_id) = 'text' AND i.record_id > CAST(? AS TEXT) AND {LISTED} AND {where}"
        cursor = raw(after)
        if where.values:
            # A rare value: one pass in the table's own order is ten times faster than one in uuid order.
            rows = select(database, f"NOT INDEXED WHERE {conditions} LIMIT ?", [cursor, *where.values, limit + 1])
            if len(rows) <= limit:
                rare = sorted(to_records(rows), key=lambda record: record.uuid)
                return list(filter(keep, rare))
        found: list[Record] = []
        while len(found) < limit:
            rows = select(database, f"WHERE {conditions} ORDER BY i.record_id LIMIT ?", [cursor, *where.values, limit])
            found += filter(keep, to_records(rows))
            if len(rows) < limit:
                break
            cursor = raw(text(rows[-1][0]) or "")
        return found[:limit]

    # ------------------------------------------------------------------------------------------------- search

    def search(
        self,
        *,
        module: str | None = None,
        kind: str | None = None,
        label: str | None = None,
        created_by: str | None = None,
        status: str | None = None,
        config: Sequence[Filter] = (),
        created_after_ns: int | None = None,
        created_before_ns: int | None = None,
        after: str = "",
        limit: int = 1000,
        uuid: str | None = None,
        status_of: Callable[[Record], str | None] | None = None,
    ) -> list[Record]:
        """Records of the root listing that match everything given, in uuid order, after a uuid. Scans.

        With `uuid` only that record is asked about: no scan.
        `config` has (dotted path, operator, value); operators are `index_search.OPERATORS`. Times are nanoseconds
        since 1970, from `created_after_ns` (included) to `created_before_ns` (not included). `status` is one of
        `Status`; as the index does not know it, each candidate is asked through `status_of` (default: its markers
        on this disk; a link or a damaged directory has no status). Raises UsageError for an unusable filter.
        """
        where = Where()
        for column, value in (("module", module), ("kind", kind), ("label", label), ("created_by", created_by)):
            where.equal(column, value)
        where.config(config)
        if created_after_ns is not None:
            where.add("created_at_ns >= ?", created_after_ns)
        if created_before_ns is not None:
            where.add("created_at_ns < ?", created_before_ns)
        keep: Callable[[Record], bool] | None = None
        if status is not None:
            wanted, ask = _status(status), status_of or self.status_here
            keep = lambda record: ask(record) == wanted  # noqa: E731
        if uuid is None:
            return self._fill(self._slow, where, after, limit, keep)
        tail = f"WHERE i.record_id = CAST(? AS TEXT) AND {LISTED} AND {where}"
        return list(filter(keep, to_records(select(self._quick, tail, [raw(uuid), *where.values]))))

    def status_here(self, record: Record) -> Status | None:
        """A record's status by the markers in its directory on this disk; None where they are not to be had here.

        An evicted record, or one nested in it, is behind a link, which is never followed from here.
        """
        root = self.root_of(record.uuid) if record.parent_id else record
        if record.directory is None or (root and root.directory and os.path.islink(root.directory)):
            return None
        try:
            return run_status(record.directory)
        except DamagedRecord:
            return None

    def find(self, find: Find) -> Found:
        """machinable's `Index.find`: its filters, order and paging. Scans. Raises UsageError."""
        where = index_search.find_where(find)
        terms, values = index_search.order(find.sort)
        total = _count(self._slow.one(f'SELECT count(*) FROM "index" WHERE {where}', where.values))
        tail = f"WHERE {where} ORDER BY {terms} LIMIT ? OFFSET ?"
        return Found(to_records(select(self._slow, tail, [*where.values, *values, find.limit, find.offset])), total)

    def values(self, view: str, after: str = "", limit: int = 1000) -> list[str]:
        """Distinct values a view lists, in order, after one: label, module, kind, created_by, status, date. Scans.

        Dates are YYYY-MM-DD in local time; `index_search.date_bounds` turns one back into a search. Raises UsageError.
        """
        if view == "status":
            return [word.value for word in sorted(Status) if word > after][:limit]
        if view not in index_search.VIEWS:
            raise UsageError(f"no view {view!r}; there are {', '.join(sorted([*index_search.VIEWS, 'status']))}")
        return self._values(index_search.VIEWS[view], [], after, limit)

    def config_paths(self) -> list[str]:
        """Dotted paths of all single values in resolved configurations, in order. Scans, 10 us a row."""
        keys = (text(row[0]) or "" for row in self._slow.query(index_search.CONFIG_PATHS))
        return sorted({path for key in keys if (path := index_search.dotted(key)) is not None})

    def config_values(self, path: str, after: str = "", limit: int = 1000) -> list[str]:
        """Distinct values at a path as text, in order, after one; search for one with the operator `is`. Scans."""
        where = index_search.json_path(path)
        shown = index_search.json_shown("config_resolved_json")
        return self._values(shown, [where] * 3, after, limit)

    def _values(self, expression: str, values: list[Value], after: str, limit: int) -> list[str]:
        sql = index_search.values_sql(expression)
        return [text(row[0]) or "" for row in self._slow.query(sql, [*values, after, limit])]

    # ------------------------------------------------------------------------------------------------- change

    def changed(self) -> Change | None:
        """What happened since the last call (or since open); None for nothing. About 20 us when nothing did.

        Our own writes count too. A replaced file is opened anew. Raises as `open` while the index is missing or
        in the middle of being rebuilt; what was open goes on answering where it can, and the next call tries again.
        """
        with self._polling:
            if identity(self.path) != self._seen.identity:
                for database in (self._quick, self._slow):
                    if database.identity != identity(self.path):
                        database.reopen()
                self._seen = self._state()
                return Change(rebuilt=True)
            if self._quick.one("PRAGMA data_version") == self._seen.data:
                return None
            now = self._state()
            if now.schema != self._seen.schema:
                self._quick.check()
            change = Change(rebuilt=now.schema != self._seen.schema)
            self._seen = now
            return change

    def _state(self) -> _State:
        # In this order: a commit between the two is then seen again at the next poll instead of never.
        data = self._quick.one("PRAGMA data_version")
        return _State(self._quick.identity, data, self._quick.one("PRAGMA schema_version"))

    def changed_since(self, updated_at_ns: int, limit: int = 1000) -> list[Record]:
        """Records updated after a time, oldest first; hidden ones too, no Projects. Scans (0.1 s a million rows).

        More than `limit` when several were updated in its last nanosecond, so going on from the last one's time
        misses none. A record ingested with an old time is not here: `marks` finds it.
        """
        newer = "FROM \"index\" AS i WHERE i.updated_at_ns > ? AND i.kind != 'Project'"
        edge = self._slow.one(
            f"SELECT max(t) FROM (SELECT i.updated_at_ns AS t {newer} ORDER BY t LIMIT ?)", [updated_at_ns, limit]
        )
        tail = (
            "WHERE i.updated_at_ns > ? AND i.updated_at_ns <= ? AND i.kind != 'Project' "
            "ORDER BY i.updated_at_ns, i.record_id"
        )
        return [] if edge is None else to_records(select(self._slow, tail, [updated_at_ns, edge]))

    def marks(self, after: str = "", limit: int = 10000) -> list[tuple[str, int]]:
        """(uuid, mark) of all records after a uuid, in uuid order; hidden ones too, no Projects.

        A mark is another number when `updated_at_ns`, `hidden` or `private_json` is another: the last two are what a
        person notes of a record, and change without the first. Without them it is `updated_at_ns` itself.
        """
        return index_rows.marks(self._slow, after, limit)

    # ------------------------------------------------------------------------------------------ keep and restore

    def rows(self, uuids: Iterable[str]) -> list[dict[str, Any]]:
        """The complete rows of these records, each with its edges under "relations"; all of it fit for JSON.

        For keeping beside the bytes, and for `put_back`. Unknown uuids are left out.
        """
        return index_rows.rows(self._slow, uuids)

    def put_back(self, rows: Iterable[dict[str, Any]]) -> list[str]:
        """Insert those of `rows` (from `rows()`) that the index has not, with their edges; the uuids inserted.

        Nothing is overwritten. In short transactions; each is whole or not there. A row that lacks what the
        schema needs is logged and left out. Raises IndexLocked and its kin.
        """
        return index_rows.put_back(self._slow, rows, _BATCH)

    def move(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write where these records are (`storage_uri` and `local_uri` of each row); nothing else of a row changes."""
        with self._slow.transaction():
            for row in rows:
                values = [row["storage_uri"], row.get("local_uri"), row["record_id"]]
                self._slow.query('UPDATE "index" SET storage_uri = ?, local_uri = ? WHERE record_id = ?', values)

    def problems(self) -> Iterator[str]:
        """Sentences about rows that are not as they should be, and about the file if SQLite finds it damaged. Scans."""
        return index_rows.problems(self._slow)

    # ------------------------------------------------------------------------------------------------- ingest

    def ingest(self, directory: Location, *, storage_id: str | None = None, at: str | None = None) -> str | None:
        """Index a record directory, or refresh its row; its uuid, or None when it is not there or has no marker.

        As machinable's `ingest_directory`; edges that had to be left out are logged. `at` is the path or URI to record
        as its place, when that is not the directory itself. Raises DamagedRecord; Refused when the index has this
        uuid for another record.
        """
        entry = read_entry(directory, storage_id=storage_id, at=at)
        if entry is None:
            return None
        with self._slow.transaction():
            index_rows.store(self._slow, entry, time.time_ns())
        for problem in entry.problems:
            _log.warning("%s", problem)
        return entry.uuid

    def reindex(self, directories: Iterable[Location]) -> Reindexed:
        """Ingest every record directory at or below these. Links are not followed; what is damaged is named.

        In short transactions, so that other processes go on writing. Raises IndexLocked and its kin.
        """
        done = Reindexed([], [])
        waiting: list[tuple[str, Entry]] = []
        for path in self._record_directories(directories, done.damaged):
            try:
                entry = read_entry(path)
            except DamagedRecord as error:
                done.damaged.append((path, str(error)))
                continue
            if entry is not None:
                waiting.append((path, entry))
            if len(waiting) >= _BATCH:
                self._store(waiting, done)
        self._store(waiting, done)
        return done

    def _record_directories(self, directories: Iterable[Location], damaged: list[tuple[str, str]]) -> Iterator[str]:
        def unreadable(error: OSError) -> None:
            damaged.append((os.fsdecode(error.filename or ""), f"cannot be read: {error.strerror}"))

        for directory in directories:
            yield from walk(directory, unreadable)

    def _store(self, waiting: list[tuple[str, Entry]], done: Reindexed) -> None:
        with self._slow.transaction():
            for path, entry in waiting:
                try:
                    index_rows.store(self._slow, entry, time.time_ns())
                except Refused as error:
                    done.damaged.append((path, str(error)))
                    continue
                done.ingested.append(entry.uuid)
                done.damaged.extend((path, problem) for problem in entry.problems)
        waiting.clear()


def _status(word: str) -> Status:
    try:
        return Status(word)
    except ValueError as error:
        raise UsageError(f"no status {word!r}; there are {', '.join(sorted(Status))}") from error


def _count(value: Value) -> int:
    return value if isinstance(value, int) else 0
