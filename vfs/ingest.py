"""A record directory as the rows the index should have for it: machinable's `ingest_directory`, the reading half.

Used by `vfs/index.py`, which writes them. It blocks on the local disk only. Nothing here imports a record's module or
loads a pickle: identity comes from `id.json`, all else from `model.json`, `updated_at` and the edges, as
machinable 5.1 does it (its `schema.py`, `index.py`); the conformance corpus holds us to it row for row.
"""

import getpass
import hashlib
import json
import os
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vfs import format as record_format
from vfs.errors import DamagedRecord
from vfs.format import Header, Location
from vfs.index_database import Value

Edge = tuple[str, str, str]  # relation, uuid, related uuid

_UNSAFE = re.compile(r"[^a-zA-Z0-9._-]+")
_LONGEST_KEY = 128


class _Model(BaseModel):
    """`model.json` of any kind; what else is in it is not indexed."""

    model_config = ConfigDict(protected_namespaces=())

    uuid: str
    kind: str = "Interface"
    module: str | None = None
    version: list[str | dict[str, Any]] = []
    config: dict[str, Any] | None = None
    predicate: dict[str, Any] | None = None
    inherits: tuple[str, ...] = ()
    context: list[Any] = Field(default_factory=list)
    created_at_ns: int | None = None
    created_by: str | None = None
    label: str | None = None

    def extra(self) -> dict[str, Any]:
        return {}


class _Execution(_Model):
    seed: int | None = None
    nickname: str | None = None
    resources: dict[str, Any] | None = None

    def extra(self) -> dict[str, Any]:
        # Where a directory lacks them machinable invents them anew at each ingest; we always invent the same.
        seed = random.Random(self.uuid).randint(0, 2**31 - 1) if self.seed is None else self.seed
        return {"seed": seed, "nickname": self.nickname or self.uuid, "resources": self.resources}


class _Manifest(_Model):
    entries: list[Any] = Field(default_factory=list)

    def extra(self) -> dict[str, Any]:
        return {"entries": self.entries}


class _Layers(BaseModel):
    default: dict[str, Any]
    version: list[Any]
    update: dict[str, Any]
    resolved: dict[str, Any]


Checked = TypeVar("Checked", bound=BaseModel)

_KINDS: dict[str, type[_Model]] = {"Execution": _Execution, "Manifest": _Manifest}


@dataclass(frozen=True, slots=True)
class Entry:
    """What one directory gives to the index."""

    uuid: str
    row: dict[str, Value]  # column -> value; without hidden, bytes_missing, updated_at_ns and private_json
    updated_at_ns: int | None  # what its marker says
    edges: tuple[Edge, ...]
    problems: tuple[str, ...]  # what was left out, and why


def read_entry(directory: Location, *, storage_id: str | None = None, at: str | None = None) -> Entry | None:
    """The entry for a record directory; None when it is not there or has no marker.

    `at` is the path or URI to record as its place (default: the directory itself). Raises DamagedRecord when it
    is a link or unreadable, or when the marker is there but the rest is not format v1 or contradicts itself.
    """
    shown = os.fsdecode(directory)
    try:
        with record_format.opened(directory) as descriptor:
            if not record_format.has_marker(descriptor):
                return None
            header = record_format.header_in(descriptor, shown)
            model = _read_model(record_format.read_bytes(descriptor, record_format.MODEL, shown), shown)
            stamp = record_format.read_bytes(descriptor, record_format.UPDATED_AT, shown)
            edges, problems = _read_edges(descriptor, shown)
    except FileNotFoundError:
        return None
    if model.uuid != header.uuid:
        raise DamagedRecord(
            f"{shown}: {record_format.HEADER} is of {header.uuid}, but {record_format.MODEL} of {model.uuid}"
        )
    row = _row(header, model, shown, at if at is not None and "://" in at else to_uri(at or shown), storage_id)
    _check_values(row, shown)
    updated_at_ns = None if stamp is None else record_format.updated_at_ns(stamp)
    return Entry(header.uuid, row, updated_at_ns, tuple(edges), tuple(problems))


def to_uri(path: str) -> str:
    """A local path as machinable records it."""
    return "file://" + os.path.abspath(os.path.expanduser(path))


def walk(directory: Location, on_error: Callable[[OSError], None]) -> Iterator[str]:
    """Every directory with a marker, at or below one; links are not followed. Unreadable ones go to `on_error`."""
    for path, _, files in os.walk(os.fsdecode(directory), onerror=on_error, followlinks=False):
        if record_format.MARKER in files:
            yield path


def _read_model(data: bytes | None, shown: str) -> _Model:
    name = f"{shown}/{record_format.MODEL}"
    if data is None:
        raise DamagedRecord(f"{name}: there is none")
    value = record_format.parse_json(data, name)
    if not isinstance(value, dict) or not isinstance(value.get("kind"), str):
        raise DamagedRecord(f"{name}: does not say its kind")
    return _validated(_KINDS.get(value["kind"], _Model), value, name)


def _validated(model: type[Checked], value: dict[str, Any], shown: str) -> Checked:
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise DamagedRecord(f"{shown}: {place}: {first['msg']}") from error


def _row(header: Header, model: _Model, shown: str, uri: str, storage_id: str | None) -> dict[str, Value]:
    layers = _layers(model, f"{shown}/{record_format.MODEL}")
    predicate = model.predicate or {}
    predicate_key = header.predicate_key or hashlib.sha256(canonical(predicate).encode()).hexdigest()[:32]
    if len(predicate_key) > _LONGEST_KEY:
        raise DamagedRecord(f"{shown}/{record_format.HEADER}: its predicate_key is over {_LONGEST_KEY} characters")
    return {
        "record_id": header.uuid,
        "kind": model.kind,
        "module": model.module,
        "identity_key": (_UNSAFE.sub("_", header.identity_key.strip()) or "x")[:_LONGEST_KEY],
        "predicate_json": canonical(predicate),
        "predicate_key": predicate_key,
        "parent_id": header.parent,
        "config_default_json": canonical(layers.default),
        "config_version_json": canonical(layers.version),
        "config_update_json": canonical(layers.update),
        "config_resolved_json": canonical(layers.resolved),
        "inherits_json": canonical(model.inherits),
        "context_json": canonical(model.context),
        "storage_uri": uri,
        "local_uri": uri,
        "storage_id": storage_id,
        "created_at_ns": model.created_at_ns,
        "created_by": getpass.getuser() if model.created_by is None else model.created_by,
        "label": model.label,
        "extra_json": canonical(model.extra()),
    }


def _layers(model: _Model, shown: str) -> _Layers:
    config = dict(model.config or {})
    layers: dict[str, Any] = {"default": {}, "version": model.version, "update": {}}
    if config:
        layers = {name: config.pop(f"_{name}_", value) for name, value in layers.items()}
    return _validated(_Layers, {**layers, "version": layers["version"] or [], "resolved": config}, f"{shown}: config")


def canonical(value: Any) -> str:
    """JSON as the index stores it: sorted keys, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _check_values(row: dict[str, Value], shown: str) -> None:
    """SQLite holds UTF-8 and 64 bits; a path or a label that is neither cannot be indexed."""
    for column, value in row.items():
        if isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise DamagedRecord(f"{shown!r}: its {column} is not UTF-8, which the index cannot hold") from error
        elif isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise DamagedRecord(f"{shown}: its {column} {value} is over 64 bits")


def _read_edges(descriptor: int, shown: str) -> tuple[list[Edge], list[str]]:
    """The edge log. As in machinable, one line that does not parse means no edges; we say so."""
    name = f"{shown}/{record_format.EDGES}"
    try:
        data = record_format.read_bytes(descriptor, record_format.EDGES, shown)
        lines = [] if data is None else data.decode("utf-8").split("\n")
        values = [json.loads(line) for line in lines if line.strip()]
    except (DamagedRecord, ValueError, RecursionError) as error:
        return [], [f"{name}: its edges were left out: {error}"]
    edges: list[Edge] = []
    for value in values:
        edge = _edge(value)
        if edge is None:
            return edges, [f"{name}: is not an edge, so it and what follows was left out: {value!r:.80}"]
        edges.append(edge)
    return edges, []


def _edge(value: Any) -> Edge | None:
    parts = [value.get(key) for key in ("name", "uuid", "related_uuid")] if isinstance(value, dict) else [None]
    if not all(isinstance(part, str) and part.isprintable() for part in parts):
        return None
    return str(parts[0]), str(parts[1]), str(parts[2])
