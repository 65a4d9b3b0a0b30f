"""Objects in a store: the names of what is kept, and the item records. This module owns the format.

Used by the other `objects*` modules. Pure: nothing here touches a store. In a store, below `.runfs/objects/`:

    %buckets/<bucket>                 {"format": 1, "bucket": text, "created_ns": n}: the bucket exists
    %transactions/<id>                {"format": 1, "state": "committed" | "aborted", "notes": text, "decided_ns": n,
                                       "items": [[bucket, name]...]}: how a transaction ended
    <bucket>/<name>/%item             the item record, the only thing that is ever replaced
    <bucket>/<name>/%data-<id>        the bytes of one version
    <bucket>/<name>/%digests-<id>     the blake3 of each MiB of it, concatenated; for more than one MiB

    record:  {"format": 1, "bucket", "name", "next": number of the next version, "versions": [version...],
              "pending": [change...]}
    version: {"number", "id", "size": bytes, "created_ns", "digest": hex blake3, "chunks": hex blake3 of %digests-<id>
              or "", "metadata": {text: JSON}}
    change:  {"transaction": id, "kind": "put", "version": version}
             {"transaction": id, "kind": "metadata", "ids": [version id...], "metadata": {...}, "merge": bool}
             {"transaction": id, "kind": "remove", "ids": [version id...]}

Publishing the record, on condition that it is the one that was read (or absent), commits a change of one item. A
change with a transaction counts when that transaction's object says "committed", which is written if absent and
so commits all its changes at once. The record of an item that was removed stays, without versions: version
numbers are never used twice, and a store has no conditional delete. `%` followed by a lower case letter occurs in
no encoded name, so no name of a bucket or an item collides with the rest.
"""

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from blake3 import blake3

from vfs import manifest
from vfs.errors import ManifestError, UsageError
from vfs.stores import keys

FORMAT = 1
ROOT = f"{keys.RESERVED}/objects/"
BUCKETS = ROOT + "%buckets/"
TRANSACTIONS = ROOT + "%transactions/"
ITEM = "/%item"
DATA = "/%data-"
DIGESTS = "/%digests-"
ID = 32  # characters of an id
MAX_NAME = 1024  # characters
MAX_BUCKET_KEY = 80  # so that a key stays under what stores take
MAX_NAME_KEY = 600
MAX_METADATA = 256 * 1024  # bytes as JSON: it is rewritten with each change of the item


@dataclass(frozen=True, slots=True)
class Version:
    """One version of an item. `number` is 0 while it has none, `size` in bytes, `created_ns` since the epoch, `digest`
    the hex blake3 of all of it, `chunks` that of its list of digests ("" when it has one MiB or less)."""

    number: int
    id: str
    size: int
    created_ns: int
    digest: str
    chunks: str
    metadata: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Change:
    """A change of one item. `transaction` is "" for one that counts at once."""

    kind: str
    transaction: str = ""
    version: Version | None = None
    ids: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    merge: bool = False


@dataclass(frozen=True, slots=True)
class Record:
    """An item: its versions, oldest first, and the changes of transactions that are not in them yet."""

    bucket: str
    name: str
    next: int = 1
    versions: tuple[Version, ...] = ()
    pending: tuple[Change, ...] = ()

    def has(self, change: Change) -> bool:
        """Whether this put is in here already: it was sent twice."""
        ids = {version.id for version in self.versions} | {c.version.id for c in self.pending if c.version}
        return change.version is not None and change.version.id in ids


# Names
# --------------------------------------------------------------------------------------------------------------


def check_name(name: str, what: str) -> str:
    """The name of a bucket or an item, if it can be one. Raises UsageError."""
    if not name or len(name) > MAX_NAME:
        raise UsageError(f"{what} {name[:40]!r}: a name has 1 to {MAX_NAME} characters")
    try:
        encoded = name.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{what} {name[:40]!r}: a name is text that can be written as UTF-8") from None
    if b"\0" in encoded:
        raise UsageError(f"{what} {name[:40]!r}: a name has no NUL character in it")
    return name


def bucket_part(bucket: str) -> str:
    """A bucket's name as one part of a key."""
    encoded = keys.encode(bucket.encode()).replace("/", "%2F")
    return encoded if len(encoded) <= MAX_BUCKET_KEY else "%-" + blake3(bucket.encode()).hexdigest()


def bucket_key(bucket: str) -> str:
    return BUCKETS + bucket_part(bucket)


def bucket_prefix(bucket: str) -> str:
    return f"{ROOT}{bucket_part(bucket)}/"


def item_prefix(bucket: str, name: str) -> str:
    """Where everything of one item is, without a `/` at the end."""
    encoded = keys.encode(name.encode())
    return bucket_prefix(bucket) + (
        encoded if len(encoded) <= MAX_NAME_KEY else "%-" + blake3(name.encode()).hexdigest()
    )


def prefix_of(bucket: str, folder: str = "") -> str:
    """The prefix of keys that holds the items of a bucket whose names begin with `folder/`, and the one called
    `folder`; with no folder all its items. It is what a `MountedStore` is given as its prefix.

    Names over about 600 characters (fewer if they are not plain ASCII) are kept elsewhere. Raises UsageError for names
    that cannot be.
    """
    check_name(bucket, "bucket")
    if not folder.strip("/"):
        return bucket_prefix(bucket)
    return item_prefix(bucket, check_name(folder.strip("/"), "folder")) + "/"


def calculated(content: manifest.Content) -> Version:
    """What was made for a reader and is kept nowhere, as version 0."""
    return Version(0, new_id(), content.size, time.time_ns(), content.digest.hex(), digest(content.chunks), {})


def digest(data: bytes) -> str:
    return blake3(data).hexdigest()


def new_id() -> str:
    return os.urandom(ID // 2).hex()


def check_metadata(metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    """A copy of metadata as it is stored: JSON values under text. Raises UsageError naming what cannot be."""
    result: dict[str, Any] = {}
    for name, value in (metadata or {}).items():
        if not isinstance(name, str):
            raise UsageError(f"metadata {name!r}: its name is not text")
        try:
            result[name] = json.loads(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError, RecursionError) as error:
            raise UsageError(f"metadata {name!r}: not a value that JSON has: {error}") from None
    if len(json.dumps(result)) > MAX_METADATA:
        raise UsageError(f"the metadata is over {MAX_METADATA // 1024} KiB: store it as an item")
    return result


# Changes
# --------------------------------------------------------------------------------------------------------------


def add(record: Record, change: Change) -> Record:
    """The record with a change in it: at once, or pending when it belongs to a transaction."""
    if change.version is not None and not record.has(change):
        change = replace(change, version=replace(change.version, number=record.next))
        record = replace(record, next=record.next + 1)
    elif change.version is not None:
        return record
    if change.transaction:
        return replace(record, pending=(*record.pending, change))
    return apply(record, change)


def apply(record: Record, change: Change) -> Record:
    """The record with what a change says done to its versions."""
    versions = record.versions
    if change.version is not None:
        versions = tuple(sorted((*versions, change.version), key=lambda version: version.number))
    elif change.kind == "remove":
        versions = tuple(version for version in versions if version.id not in change.ids)
    else:
        versions = tuple(_described(version, change) if version.id in change.ids else version for version in versions)
    return replace(record, versions=versions)


def _described(version: Version, change: Change) -> Version:
    kept = version.metadata if change.merge else {}
    return replace(version, metadata={**kept, **change.metadata})


def fold(record: Record, decided: Callable[[str], bool | None]) -> Record:
    """The record with the changes of decided transactions done or dropped. `decided(transaction)`: True committed,
    False aborted, None not decided yet."""
    kept: list[Change] = []
    for change in record.pending:
        state = decided(change.transaction)
        if state is None:
            kept.append(change)
        elif state:
            record = apply(record, change)
    return replace(record, pending=tuple(kept))


def ids(record: Record) -> set[str]:
    """The ids of all versions whose bytes this record may need."""
    return {version.id for version in record.versions} | {c.version.id for c in record.pending if c.version}


def union(ours: Record, theirs: Record) -> Record:
    """Both histories in one record, as a push makes it: ours wins where both have a version; versions only they
    have stay; a number that stands for two versions is given anew to ours."""
    mine = {version.id: version for version in ours.versions}
    versions = [replace(mine.pop(version.id, version), number=version.number) for version in theirs.versions]
    taken = {version.number for version in versions}
    following = max(ours.next, theirs.next)
    for version in mine.values():
        if version.number in taken:
            version, following = replace(version, number=following), following + 1
        versions.append(version)
    ordered = tuple(sorted(versions, key=lambda version: version.number))
    return Record(ours.bucket, ours.name, following, ordered, theirs.pending)


# Text
# --------------------------------------------------------------------------------------------------------------


def dump(record: Record) -> bytes:
    return to_json(
        {
            "bucket": record.bucket,
            "name": record.name,
            "next": record.next,
            "versions": [_dump_version(version) for version in record.versions],
            "pending": [dump_change(change) for change in record.pending],
        }
    )


def to_json(body: Mapping[str, Any]) -> bytes:
    return json.dumps({"format": FORMAT, **body}, sort_keys=True, separators=(",", ":")).encode()


def _dump_version(version: Version) -> dict[str, Any]:
    names = ("number", "id", "size", "created_ns", "digest", "chunks", "metadata")
    return {name: getattr(version, name) for name in names}


def dump_change(change: Change) -> dict[str, Any]:
    out: dict[str, Any] = {"kind": change.kind, "transaction": change.transaction}
    if change.version is not None:
        return {**out, "version": _dump_version(change.version)}
    out["ids"] = list(change.ids)
    return {**out, "metadata": change.metadata, "merge": change.merge} if change.kind == "metadata" else out


def parse(data: bytes, bucket: str | None = None, name: str | None = None) -> Record:
    """An item record. What it says is checked: it may come from a store that lies. Raises ManifestError."""
    body = parse_json(data, "the item record")
    try:
        record = Record(
            _typed(body, "bucket", str),
            _typed(body, "name", str),
            _whole(body, "next", 1),
            tuple(_parse_version(version) for version in _typed(body, "versions", list)),
            tuple(parse_change(change) for change in _typed(body, "pending", list)),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ManifestError(f"the item record contradicts itself: {error}") from error
    _check_read(record.bucket, record.name)
    if (bucket is not None and record.bucket != bucket) or (name is not None and record.name != name):
        raise ManifestError(f"the item record is of {record.bucket}/{record.name}, not of {bucket}/{name}")
    if len(ids(record)) != len(record.versions) + sum(change.version is not None for change in record.pending):
        raise ManifestError(f"{record.bucket}/{record.name}: its record has one version twice")
    return record


def _check_read(*names: str) -> None:
    """Names from a store. Raises ManifestError for those that cannot be."""
    try:
        for name in names:
            check_name(name, "the name")
    except UsageError as error:
        raise ManifestError(str(error)) from error


def parse_bucket(data: bytes, key: str) -> str:
    """The name in a bucket's object. Raises ManifestError."""
    name = parse_json(data, key).get("bucket")
    if not isinstance(name, str):
        raise ManifestError(f"{key} has no name")
    _check_read(name)
    if bucket_key(name) != key:
        raise ManifestError(f"{key} is of another bucket")
    return name


def parse_items(data: bytes) -> list[tuple[str, str]]:
    """The items (bucket, name) that a transaction changed. Raises ManifestError."""
    try:
        items = [(str(bucket), str(name)) for bucket, name in parse_json(data, "a transaction").get("items", ())]
    except (TypeError, ValueError) as error:
        raise ManifestError(f"a transaction contradicts itself: {error}") from error
    _check_read(*(name for item in items for name in item))
    return items


def parse_json(data: bytes, what: str) -> dict[str, Any]:
    """The JSON object of one of our formats. Raises ManifestError."""
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{what} is not JSON: {error}") from error
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise ManifestError(f"{what} has no format this version of runfs knows; upgrade runfs")
    return body


def parse_change(item: Mapping[str, Any]) -> Change:
    kind, transaction = _typed(item, "kind", str), _typed(item, "transaction", str)
    if kind == "put":
        return Change(kind, transaction, _parse_version(item["version"]))
    if kind not in ("metadata", "remove"):
        raise ValueError(f"unknown change {kind!r}")
    version_ids = tuple(_hex(each, ID) for each in _typed(item, "ids", list))
    if kind == "remove":
        return Change(kind, transaction, ids=version_ids)
    return Change(
        kind, transaction, ids=version_ids, metadata=_typed(item, "metadata", dict), merge=bool(item.get("merge"))
    )


def _parse_version(item: Mapping[str, Any]) -> Version:
    size, number, created_ns = _whole(item, "size", 0), _whole(item, "number", 0), _whole(item, "created_ns", 0)
    chunks = _typed(item, "chunks", str)
    if bool(chunks) != (size > manifest.CHUNK):
        raise ValueError("a version's digests do not fit its size")
    return Version(
        number,
        _hex(item["id"], ID),
        size,
        created_ns,
        _hex(item["digest"], 2 * manifest.DIGEST),
        chunks and _hex(chunks, 2 * manifest.DIGEST),
        _typed(item, "metadata", dict),
    )


def _typed(item: Mapping[str, Any], name: str, kind: type) -> Any:
    value = item[name]
    if type(value) is not kind:
        raise ValueError(f"{name} is {value!r:.40}")
    return value


def _whole(item: Mapping[str, Any], name: str, least: int) -> int:
    """A whole number of 63 bits: as bytes it is a size, as nanoseconds a time that there is."""
    value: int = _typed(item, name, int)
    if not least <= value < 2**63:
        raise ValueError(f"{name} is {value!r:.40}")
    return value


def _hex(value: Any, length: int) -> str:
    if not isinstance(value, str) or len(value) != length or not set(value) <= set("0123456789abcdef"):
        raise ValueError(f"{value!r:.40} is not {length} hexadecimal characters")
    return value
