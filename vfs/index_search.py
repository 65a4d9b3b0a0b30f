"""Searches over the index as SQL: machinable's `find` reproduced, and what the `.by` views list.

Used by `vfs/index.py`; nothing here touches a database, so nothing blocks. The meaning of a filter, mixed types
included, is machinable 5.1's (`_build_find_sql` in its index.py) with two deliberate differences: a row whose
JSON is broken does not match instead of failing the whole search, and there is the operator `is`, which
compares the value as a view shows it (`true`, `0.1`, `adam`).
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from typing import Any

from vfs.errors import UsageError
from vfs.index_database import Value

Filter = tuple[str, str, Any]  # dotted path into the configuration, operator, value

COMPARISONS = {"eq": "=", "ne": "!=", "lt": "<", "lte": "<=", "gt": ">", "gte": ">="}
OPERATORS = (*COMPARISONS, "in", "contains", "is")

LAYERS = {layer: f"config_{layer}_json" for layer in ("default", "version", "update", "resolved")}
SORTABLE = frozenset({"created_at_ns", "updated_at_ns", "created_by", "label", "module", "kind"})

_PATH_PART = re.compile(r"[A-Za-z0-9_\-]+(?:\[\d+\])*\Z", re.ASCII)
_LARGEST_INTEGER = 2**63


@dataclass(frozen=True, slots=True)
class Sort:
    """One term of an order: an index column, or a path into a configuration layer."""

    by: str = "created_at_ns"
    layer: str | None = None
    descending: bool = True


@dataclass(frozen=True, slots=True)
class Find:
    """machinable's FindRequest, field by field; defaults are its defaults, apart from the limits on `limit`."""

    module: str | None = None
    kind: str | None = None
    created_by: str | None = None
    label: str | None = None
    parent_id: str | None = None
    identity_key: str | None = None
    predicate_key: str | None = None
    predicate: Mapping[str, Any] | None = None
    config: Sequence[Filter] = ()
    layer: str = "resolved"
    sort: Sequence[Sort] = ()
    include_hidden: bool = False
    include_bytes_missing: bool = False
    suffix: str | None = None  # of the uuid
    limit: int = 100
    offset: int = 0


class Where:
    """Conditions joined by AND, with their values. Columns carry a unary plus: see `equal`."""

    def __init__(self) -> None:
        self._clauses: list[str] = []
        self.values: list[Value] = []

    def add(self, clause: str, *values: Value) -> None:
        """One more condition, which is SQL of ours; what users give goes into `values`."""
        self._clauses.append(clause)
        self.values += values

    def equal(self, column: str, value: str | None) -> None:
        """`column = value`, unless the value is None.

        The plus keeps SQLite from walking the column's own index: pages are in uuid order, and with that index
        every page of a frequent value would sort all its rows again.
        """
        if value is not None:
            self.add(f"+{column} = ?", value)

    def config(self, filters: Sequence[Filter], layer: str = "resolved") -> None:
        """Raises UsageError for an unknown operator or layer, and for what cannot be a path."""
        if layer not in LAYERS:
            raise UsageError(f"no configuration layer {layer!r}; there are {', '.join(LAYERS)}")
        for path, operator, value in filters:
            self._config_filter(LAYERS[layer], path, operator, value)

    def _config_filter(self, column: str, path: str, operator: str, value: Any) -> None:
        extract, where = json_extract(column), json_path(path)
        if operator in COMPARISONS:
            self.add(f"{extract} {COMPARISONS[operator]} ?", where, bound(value))
        elif operator == "in":
            values = list(value) if isinstance(value, list | tuple | set | frozenset) else [value]
            marks = ",".join("?" * len(values))
            self.add(f"{extract} IN ({marks})", where, *map(bound, values))
        elif operator == "contains":
            self.add(f"{extract} LIKE ?", where, f"%{value}%")
        elif operator == "is":
            self.add(f"{json_shown(column)} = ?", where, where, where, str(value))
        else:
            raise UsageError(f"no operator {operator!r}; there are {', '.join(OPERATORS)}")

    def predicate(self, wanted: Mapping[str, Any] | None) -> None:
        for path, value in (wanted or {}).items():
            value = int(value) if isinstance(value, bool) else value
            self.add(f"{json_extract('predicate_json')} = ?", json_path(path), bound(value))

    def __str__(self) -> str:
        return " AND ".join(self._clauses) or "1"


def json_extract(column: str) -> str:
    """SQL for the value at a path (bound: once); NULL, not a failure, where the column is not JSON.

    The 2 admits JSON5 and so the NaN and Infinity that Python writes.
    """
    return f"(CASE WHEN json_valid({column}, 2) THEN json_extract({column}, ?) END)"


def json_shown(column: str) -> str:
    """SQL for the value at a path (bound: three times) as text for people: strings bare, all else as in JSON."""
    return (
        f"(CASE WHEN json_valid({column}, 2) THEN "
        f"CASE WHEN json_type({column}, ?) = 'text' THEN {column} ->> ? ELSE {column} -> ? END END)"
    )


def json_path(path: str) -> str:
    """`a.b` as SQLite's `$.a.b`. Raises UsageError for a segment that is not `[A-Za-z0-9_-]` with indices."""
    parts = [part for part in path.split(".") if part]
    for part in parts:
        if not _PATH_PART.match(part):
            raise UsageError(f"not a configuration path: {path!r} (its part {part!r})")
    return "$" + "".join(f".{part}" for part in parts)


def dotted(fullkey: str) -> str | None:
    """SQLite's `$.a."b-c"[0]` as `a.b-c[0]`; None where no dotted path leads (a key with a dot, a space, ...)."""
    parts = re.findall(r'\.(?:"((?:[^"\\]|\\.)*)"|([^.\[]+))|(\[\d+\])', fullkey[1:])
    path = ""
    for quoted, plain, position in parts:
        if quoted and not re.fullmatch(r"[A-Za-z0-9_\-]+", quoted):
            return None
        path += position or f".{quoted or plain}"
    return path[1:] if path.startswith(".") else None


def bound(value: Any) -> Value:
    """A filter's value as machinable binds it: numbers and text as they are, all else (also true) as JSON text."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        try:
            return json.dumps(value, sort_keys=True, separators=(",", ":"))
        except (TypeError, ValueError) as error:
            raise UsageError(f"not a value to search for: {value!r}") from error
    if isinstance(value, int) and not -_LARGEST_INTEGER <= value < _LARGEST_INTEGER:
        raise UsageError(f"not a value to search for: {value} is over 64 bits")
    return value


def find_where(find: Find) -> Where:
    """The conditions of a find. Raises UsageError."""
    where = Where()
    for column in ("module", "kind", "created_by", "label", "parent_id", "identity_key", "predicate_key"):
        where.equal(column, getattr(find, column))
    where.predicate(find.predicate)
    where.config(find.config, find.layer)
    if not find.include_hidden:
        where.add("hidden = 0")
    if not find.include_bytes_missing:
        where.add("bytes_missing = 0")
    if find.suffix is not None:
        where.add("record_id LIKE ?", f"%{find.suffix}")
    return where


def order(terms: Sequence[Sort]) -> tuple[str, list[Value]]:
    """ORDER BY's terms and their values; newest first without terms. Raises UsageError for an unknown column."""
    parts: list[str] = []
    values: list[Value] = []
    for term in terms or (Sort(),):
        if term.layer is None:
            if term.by not in SORTABLE:
                raise UsageError(f"cannot sort by {term.by!r}; there are {', '.join(sorted(SORTABLE))}")
            expression = term.by
        elif term.layer in LAYERS:
            expression = json_extract(LAYERS[term.layer])
            values.append(json_path(term.by))
        else:
            raise UsageError(f"no configuration layer {term.layer!r}; there are {', '.join(LAYERS)}")
        parts.append(f"{expression} {'DESC' if term.descending else 'ASC'}")
    return ", ".join(parts), values


# ------------------------------------------------------------------------------------------------------ views

# The listing's own condition: what `ls` of the root shows, and so what views show.
LISTED = "hidden = 0 AND kind != 'Project'"

_DATE = "strftime('%Y-%m-%d', created_at_ns / 1000000000, 'unixepoch', 'localtime')"

VIEWS: dict[str, str] = {
    "label": "label",
    "module": "module",
    "kind": "kind",
    "created_by": "created_by",
    "date": _DATE,  # local time
}


def values_sql(expression: str) -> str:
    """Distinct values of an expression, in order, after one and up to a number of them."""
    return (
        f'SELECT DISTINCT value FROM (SELECT {expression} AS value FROM "index" WHERE {LISTED}) '
        "WHERE value > ? AND value != '' ORDER BY value LIMIT ?"
    )


# Leaves only: a view's directory stands for one value, not for a whole branch.
CONFIG_PATHS = (
    'SELECT DISTINCT leaf.fullkey FROM "index", '
    "json_tree(CASE WHEN json_valid(config_resolved_json, 2) THEN config_resolved_json ELSE '{}' END) AS leaf "
    f"WHERE {LISTED} AND leaf.type NOT IN ('object', 'array') AND leaf.fullkey LIKE '$.%'"
)


def date_bounds(day: str) -> tuple[int, int]:
    """The (created_after_ns, created_before_ns) of a local day YYYY-MM-DD. Raises UsageError."""
    try:
        start = datetime.combine(date.fromisoformat(day), datetime.min.time())
        end = start + timedelta(days=1)
        return int(start.timestamp()) * 10**9, int(end.timestamp()) * 10**9
    except ValueError as error:
        raise UsageError(f"not a day: {day!r}; write it as 2026-01-31") from error
