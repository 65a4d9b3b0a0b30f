"""Whole rows of the index: writing them (ingest), keeping and restoring them, and looking for bad ones.

Used by `vfs/index.py`, through its connection for scans and writes; each call may wait for that connection's lock
and, when it writes, for other processes up to the busy timeout.
"""

import base64
import json
import logging
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar

from vfs.errors import Refused
from vfs.format import is_safe_uuid
from vfs.index_database import Database, Row, Value
from vfs.index_record import local_path, raw, text
from vfs.index_schema import INTEGER_COLUMNS, JSON_COLUMNS, NAMES, REQUIRED
from vfs.ingest import Edge, Entry

_log = logging.getLogger(__name__)

# The columns a second ingest refreshes; what is known to the index only (hidden, notes, first time) stays.
_REFRESHED = (
    "kind", "module", "predicate_json", "config_default_json", "config_version_json", "config_update_json",
    "config_resolved_json", "inherits_json", "context_json", "label", "extra_json",
    "storage_uri", "local_uri", "storage_id", "updated_at_ns",
)  # fmt: skip
_EDGE_COLUMNS = ("relation", "record_id", "related_id", "priority", "created_at_ns")
# Rows read at once: bounds memory, and how long a scan keeps other processes' checkpoints waiting.
_SCAN = 2000

T = TypeVar("T")


# ------------------------------------------------------------------------------------------------------ ingest


def store(database: Database, entry: Entry, now_ns: int) -> None:
    """Write an ingested directory, inside the caller's transaction.

    Raises Refused when the index has this uuid for another record (other keys): they are never merged.
    """
    values = {**entry.row, "updated_at_ns": now_ns if entry.updated_at_ns is None else entry.updated_at_ns}
    known = database.query('SELECT identity_key, predicate_key FROM "index" WHERE record_id = ?', [entry.uuid])
    if not known:
        values["created_at_ns"] = values["created_at_ns"] or now_ns
        _insert(database, "index", values)
    else:
        mine = (values["identity_key"], values["predicate_key"])
        if known[0] != mine:
            theirs, ours = ("/".join(str(text(key)) for key in keys) for keys in (known[0], mine))
            raise Refused(
                f"{entry.uuid}: the index has another record of this uuid ({theirs}; this one is {ours}); "
                "move one of them out of the store"
            )
        columns = ", ".join(f"{name} = ?" for name in _REFRESHED)
        update = f'UPDATE "index" SET {columns} WHERE record_id = ?'
        database.query(update, [*(values[name] for name in _REFRESHED), entry.uuid])
    _add_edges(database, entry.edges, now_ns)


def _insert(database: Database, table: str, values: dict[str, Value]) -> bool:
    """Whether a row was inserted: not when one with its key is there, which stays as it is."""
    names, marks = ", ".join(values), ", ".join("?" * len(values))
    sql = f'INSERT INTO "{table}" ({names}) VALUES ({marks}) ON CONFLICT DO NOTHING RETURNING 1'
    return bool(database.query(sql, list(values.values())))


def _add_edges(database: Database, edges: Sequence[Edge], now_ns: int) -> None:
    for relation, uuid, related in edges:
        row: tuple[Value, ...] = (relation, uuid, related, 0, now_ns)
        _insert(database, "relations", dict(zip(_EDGE_COLUMNS, row, strict=True)))


# ----------------------------------------------------------------------------------------------- keep, put back


def rows(database: Database, uuids: Iterable[str]) -> list[dict[str, Any]]:
    """See `Index.rows`."""
    found: list[dict[str, Any]] = []
    for batch in batches(uuids, _SCAN):
        found += _rows(database, batch)
    return found


def _rows(database: Database, uuids: list[str]) -> list[dict[str, Any]]:
    wanted = [json.dumps(uuids)]
    chosen = "IN (SELECT value FROM json_each(?))"
    found = {
        str(row["record_id"]): row
        for row in _dicts(database, NAMES, f'"index" WHERE record_id {chosen} ORDER BY record_id', wanted)
    }
    edges: dict[str, list[dict[str, Any]]] = {uuid: [] for uuid in found}
    tail = f"relations WHERE record_id {chosen} OR related_id {chosen} ORDER BY id"
    for edge in _dicts(database, _EDGE_COLUMNS, tail, wanted * 2):
        for end in {str(edge["record_id"]), str(edge["related_id"])} & edges.keys():
            edges[end].append(edge)
    return [{**row, "relations": edges[uuid]} for uuid, row in found.items()]


def _dicts(database: Database, names: Sequence[str], tail: str, values: Sequence[Value]) -> list[dict[str, Any]]:
    """Rows as column -> value fit for JSON. Text that is not UTF-8 gets surrogate escapes, bytes become base64."""
    try:
        found = database.query(f"SELECT {', '.join(names)} FROM {tail}", values)
    except UnicodeDecodeError:
        as_bytes = (f"CASE typeof({name}) WHEN 'text' THEN CAST({name} AS BLOB) ELSE {name} END" for name in names)
        found = [
            tuple(map(_decoded, row)) for row in database.query(f"SELECT {', '.join(as_bytes)} FROM {tail}", values)
        ]
    return [dict(zip(names, map(_jsonable, row), strict=True)) for row in found]


def _decoded(value: Value) -> Value:
    return text(value) if isinstance(value, bytes) else value


def _jsonable(value: Value) -> Any:
    return {"base64": base64.b64encode(value).decode()} if isinstance(value, bytes) else value


def put_back(database: Database, kept: Iterable[dict[str, Any]], batch: int) -> list[str]:
    """See `Index.put_back`; `batch` rows a transaction at most."""
    inserted: list[str] = []
    for some in batches(kept, batch):
        with database.transaction():
            inserted += [str(row["record_id"]) for row in some if _usable(row) and _put_back(database, row)]
    return inserted


def _usable(row: dict[str, Any]) -> bool:
    """A kept row that this schema can take. One that it cannot must not keep the others from being restored."""
    lacking = sorted(name for name in REQUIRED if row.get(name) is None)
    if lacking or not is_safe_uuid(row["record_id"]):
        _log.warning("a kept row of the index was not put back: uuid %r, lacks %s", row.get("record_id"), lacking)
        return False
    return True


def _put_back(database: Database, row: dict[str, Any]) -> bool:
    values = {name: _value(row[name]) for name in NAMES if row.get(name) is not None}
    if not _insert(database, "index", values):
        return False
    for edge in row.get("relations", ()):
        if all(edge.get(name) is not None for name in _EDGE_COLUMNS):
            _insert(database, "relations", {name: _value(edge[name]) for name in _EDGE_COLUMNS})
    return True


def _value(value: Any) -> Value:
    if isinstance(value, dict):
        return base64.b64decode(value["base64"])
    if isinstance(value, str):
        # What was not UTF-8 cannot be bound as text; it was damaged before and is marked as such now.
        return raw(value).decode("utf-8", "replace")
    return value if isinstance(value, int | float) else None


# --------------------------------------------------------------------------------------------------------- scans


def marks(database: Database, after: str, limit: int) -> list[tuple[str, int]]:
    """See `Index.marks`."""
    found: list[tuple[str, int]] = []
    cursor = raw(after)
    sql = (
        "SELECT CAST(record_id AS BLOB), updated_at_ns, "
        "CASE WHEN hidden = 0 AND private_json = '{}' THEN NULL ELSE hidden || CAST(private_json AS BLOB) END "
        "FROM \"index\" WHERE typeof(record_id) = 'text' "
        "AND record_id > CAST(? AS TEXT) AND kind != 'Project' ORDER BY record_id LIMIT ?"
    )
    while len(found) < limit:
        some = database.query(sql, [cursor, limit])
        for uuid, when, overlay in some:
            name = text(uuid)
            if name is not None and is_safe_uuid(name):
                mark = when if isinstance(when, int) else 0
                found.append((name, mark if overlay is None else mark ^ zlib.crc32(_bytes(overlay))))
        if len(some) < limit:
            break
        last = some[-1][0]
        cursor = last if isinstance(last, bytes) else b""
    return found[:limit]


def problems(database: Database) -> Iterator[str]:
    """See `Index.problems`."""
    for (finding,) in database.query("PRAGMA quick_check(20)"):
        if finding != "ok":
            yield f"{database.path}: SQLite finds: {text(finding)}"
    sql = (
        "SELECT rowid, CAST(record_id AS BLOB), typeof(record_id), CAST(storage_uri AS BLOB), CAST(local_uri AS BLOB), "
        + ", ".join([f"json_valid({name}, 2)" for name in JSON_COLUMNS])
        + ", "
        + ", ".join([f"typeof({name})" for name in INTEGER_COLUMNS])
        + ' FROM "index" WHERE rowid > ? ORDER BY rowid LIMIT ?'
    )
    rowid: Value = -(2**63)
    while some := database.query(sql, [rowid, _SCAN]):
        rowid = some[-1][0]
        for row in some:
            yield from _row_problems(row)
    yield from _loops(database)


def _row_problems(row: Row) -> Iterator[str]:
    rowid, uuid, kind, *uris = row[:5]
    rowid, name = text(rowid), text(uuid)
    shown = name if name is not None and is_safe_uuid(name) else f"row {rowid}"
    if shown != name or kind != "text":
        yield f"row {rowid}: its uuid {name!r} cannot be a file name, so it is left out"
    for column, uri in zip(("storage_uri", "local_uri"), map(text, uris), strict=True):
        if (column == "storage_uri" or uri) and not _is_place(uri or ""):
            yield f"{shown}: its {column} {uri!r} is neither an absolute path nor a URI"
    checks = row[5:]
    for column, valid in zip(JSON_COLUMNS, checks, strict=False):
        if valid != 1:
            yield f"{shown}: its {column} is not JSON; searches pass over it"
    for column, kind in zip(INTEGER_COLUMNS, checks[len(JSON_COLUMNS) :], strict=True):
        if kind != "integer":
            yield f"{shown}: its {column} is not a whole number"


def _is_place(uri: str) -> bool:
    if local_path(uri) is not None:
        return True
    scheme, separator, rest = uri.partition("://")
    return bool(separator and scheme and rest and "\0" not in uri) and scheme not in ("file", "scratch")


def _loops(database: Database) -> Iterator[str]:
    # Only records with a grandparent that is no Project can be in a loop; there are few or none.
    chains = database.query(
        'SELECT CAST(i.record_id AS BLOB), CAST(i.parent_id AS BLOB) FROM "index" AS i '
        'JOIN "index" AS p ON p.record_id = i.parent_id JOIN "index" AS g ON g.record_id = p.parent_id '
        "WHERE p.kind != 'Project' AND g.kind != 'Project'"
    )
    parents = {text(uuid) or "": text(parent) for uuid, parent in chains}
    done: set[str] = set()
    for uuid in parents:
        trail: list[str] = []
        at: str | None = uuid
        while at is not None and at in parents and at not in done and at not in trail:
            trail.append(at)
            at = parents[at]
        if at in trail:
            yield f"{', '.join(sorted(trail[trail.index(at) :]))}: their parents form a loop"
        done.update(trail)


def batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """The items in lists of up to `size`."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def _bytes(value: Value) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogatepass")
