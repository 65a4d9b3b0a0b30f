"""A row of the index as a value: `Record`, and how one is read however damaged the row is.

Used by `vfs/index.py` and by everyone who is given records. Nothing here blocks.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vfs.format import is_safe_uuid
from vfs.index_database import Database, Row, Value

_LOCAL_SCHEMES = ("file://", "scratch://")


@dataclass(frozen=True, slots=True)
class Record:
    """One row. Times are in nanoseconds since 1970. Text that is not UTF-8 has surrogate escapes."""

    uuid: str
    kind: str
    module: str | None
    label: str | None
    created_by: str | None
    created_at_ns: int
    updated_at_ns: int
    hidden: bool
    bytes_missing: bool
    parent_id: str | None
    storage_uri: str
    local_uri: str | None
    storage_id: str | None

    @property
    def directory(self) -> bytes | None:
        """The record's directory on this machine: the working copy's, else the home's; None when neither is local.

        Absolute, no slash at the end. It need not exist.
        """
        for uri in (self.local_uri, self.storage_uri):
            if uri and (path := local_path(uri)) is not None:
                return path
        return None


def local_path(uri: str) -> bytes | None:
    """The path of a `file://` or `scratch://` URI, or of a bare absolute path; None for anything else.

    A relative path means nothing to a process with another working directory, so it is None too.
    """
    path = next((uri[len(scheme) :] for scheme in _LOCAL_SCHEMES if uri.startswith(scheme)), uri)
    if not path.startswith("/") or "\0" in path:
        return None
    try:
        return os.fsencode(path.rstrip("/") or "/")
    except UnicodeEncodeError:
        return None


# Column, and how its value is made fit: text that is missing or of another type becomes "", numbers 0.
_COLUMNS = (
    "record_id", "kind", "module", "label", "created_by", "created_at_ns", "updated_at_ns",
    "hidden", "bytes_missing", "parent_id", "storage_uri", "local_uri", "storage_id",
)  # fmt: skip
_NUMBERS = frozenset({"created_at_ns", "updated_at_ns", "hidden", "bytes_missing"})

_TYPES: tuple[type, ...] = tuple(int if name in _NUMBERS else str for name in _COLUMNS)

# SQLite lets a key be a blob, which is no uuid even if it spells one.
_UUID = "CASE typeof(i.record_id) WHEN 'text' THEN {} END"
_PLAIN = ", ".join([_UUID.format("i.record_id"), *(f"i.{name}" for name in _COLUMNS[1:])])
# Bytes, for the day a row has text that is not UTF-8 and reading it as text fails.
_RAW = ", ".join(
    [
        _UUID.format("CAST(i.record_id AS BLOB)"),
        *(f"i.{name}" if name in _NUMBERS else f"CAST(i.{name} AS BLOB)" for name in _COLUMNS[1:]),
    ]
)


def select(database: Database, tail: str, values: Sequence[Value] = (), *, before: str = "") -> list[Row]:
    """Rows for `to_record`: `before` SELECT ... FROM "index" AS i `tail`."""
    try:
        return database.query(f'{before} SELECT {_PLAIN} FROM "index" AS i {tail}', values)
    except UnicodeDecodeError:
        return database.query(f'{before} SELECT {_RAW} FROM "index" AS i {tail}', values)


def to_record(row: Row) -> Record | None:
    """The record of a row from `select`; None when its uuid cannot be a file name."""
    uuid = text(row[0])
    if uuid is None or not is_safe_uuid(uuid):
        return None
    # A sound row needs no conversion; a listing of a million asks this a million times.
    fit: list[Any] = [
        value if value is None or type(value) is wanted else _fitted(value, wanted)
        for value, wanted in zip(row, _TYPES, strict=True)
    ]
    (_, kind, module, label, creator, created, updated, hidden, missing, parent, home, local, store) = fit
    return Record(
        uuid, kind or "", module, label, creator, created or 0, updated or 0, bool(hidden), bool(missing),
        parent, home or "", local or None, store,
    )  # fmt: skip


def to_records(rows: Sequence[Row]) -> list[Record]:
    """The records of those rows whose uuid can be a file name."""
    return [record for record in map(to_record, rows) if record is not None]


def text(value: Value) -> str | None:
    """Text however it is stored."""
    if value is None or isinstance(value, str):
        return value
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)


def raw(value: str) -> bytes:
    """The inverse of `text`, to be bound as CAST(? AS TEXT)."""
    return value.encode("utf-8", "surrogateescape")


def _fitted(value: Value, wanted: type) -> Any:
    if wanted is str:
        return text(value)
    return int(value) if isinstance(value, int | float) and abs(value) < 2**63 else 0
