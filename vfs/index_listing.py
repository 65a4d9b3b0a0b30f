"""The root's listing straight from the index: for each record where it lies, or in which record it is nested.

Used by `vfs/index.py` for `vfs/roots.py`, which keeps it. One query gives a page with all it depends on, so two equal
answers mean an equal listing. A record nested deeper than once (or in a loop) is left to the caller.
"""

from typing import NamedTuple

from vfs.format import is_safe_uuid
from vfs.index_database import Database, Row, Value
from vfs.index_record import local_path, raw, text

CONTAINERS = ("Project", "Storage")  # rows that hold records beside each other, not nested ones

_COLUMNS = (
    "i.record_id", "i.storage_uri", "i.local_uri", "i.parent_id",
    "p.record_id", "p.kind", "p.parent_id", "p.storage_uri", "p.local_uri", "g.kind",
)  # fmt: skip
_PLAIN = ", ".join(_COLUMNS)
_RAW = ", ".join(f"CAST({name} AS BLOB)" for name in _COLUMNS)  # for text that is not UTF-8
_FROM = (
    'FROM "index" AS i LEFT JOIN "index" AS p ON p.record_id = i.parent_id '
    'LEFT JOIN "index" AS g ON g.record_id = p.parent_id '
    "WHERE typeof(i.record_id) = 'text' AND i.hidden = 0 AND i.kind != 'Project' AND i.record_id > CAST(? AS TEXT) "
)


class Listed(NamedTuple):
    """A record of the listing. `updated_at_ns` is in ns since 1970; `root` the record it is nested in; `deep`: that
    is not told here, ask `Index.root_of`."""

    uuid: str
    updated_at_ns: int
    directory: bytes | None
    root: str | None
    root_directory: bytes | None
    deep: bool


def listed(database: Database, after: str, upto: str | None, limit: int) -> list[Row]:
    """Rows for `to_listed`, in uuid order, after a uuid and up to another one (None: to the end), `limit` at most."""
    bound: list[Value] = [raw(after)]
    tail = _FROM
    if upto is not None:
        tail += "AND i.record_id <= CAST(? AS TEXT) "
        bound.append(raw(upto))
    tail += "ORDER BY i.record_id LIMIT ?"
    try:
        return database.query(f"SELECT i.updated_at_ns, {_PLAIN} {tail}", [*bound, limit])
    except UnicodeDecodeError:
        return database.query(f"SELECT i.updated_at_ns, {_RAW} {tail}", [*bound, limit])


def to_listed(row: Row) -> Listed | None:
    """The record of a row; None when its uuid cannot be a file name."""
    updated = row[0] if isinstance(row[0], int) else 0
    uuid, home, local, _parent, root, root_kind, above, root_home, root_local, above_kind = map(text, row[1:])
    if uuid is None or not is_safe_uuid(uuid):
        return None
    directory = _directory(local, home)
    if root is None or root_kind in CONTAINERS:
        return Listed(uuid, updated, directory, None, None, False)
    deep = above is not None and above_kind is not None and above_kind not in CONTAINERS
    return Listed(uuid, updated, directory, root, _directory(root_local, root_home), deep)


def directory_of(database: Database, uuid: str) -> bytes | None:
    """The directory of a listed record, None when it is not listed or has none on this machine."""
    tail = "FROM \"index\" WHERE record_id = CAST(? AS TEXT) AND hidden = 0 AND kind != 'Project'"
    rows = database.query(f"SELECT CAST(local_uri AS BLOB), CAST(storage_uri AS BLOB) {tail}", [raw(uuid)])
    return _directory(text(rows[0][0]), text(rows[0][1])) if rows else None


def _directory(local: str | None, home: str | None) -> bytes | None:
    """As `Record.directory`."""
    for uri in (local, home):
        if uri and (path := local_path(uri)) is not None:
            return path
    return None
