"""The form of a record in a store: where its objects are, and how a manifest is published (how contents get there is in
`vfs/uploads.py`).

Used by the daemon's push, proofs and restores, and by `vfs.records`, which has no daemon: one form, written by one
module. Blocks on stores (each call within its deadline) and on the local disk. What a crash leaves at each step:

    uploaded, nothing recorded     the object is found, read back and adopted, or the content goes to another key
    contents there, not published  the next push publishes; readers elsewhere see the old record, whole
    published, not recorded        the publish conflicts with itself; what we meant to publish is known: it is our own,
                                   and what changed here since goes on top of it

Order that makes this so: contents, then the manifest, which is the one commit point.
"""

import logging
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Protocol

from vfs import faults
from vfs.errors import Conflict, ManifestError, NotFound, StoreError
from vfs.format import is_safe_uuid
from vfs.manifest import File, Manifest, Merge, dump, parse
from vfs.stores import keys
from vfs.stores.protocol import Stat, Store
from vfs.versions import kept as versions

log = logging.getLogger(__name__)

_TRIES = 5  # to publish against another host that publishes too


class Kept(Protocol):
    """A store with the name that people see, and somebody who notes how it fares."""

    @property
    def name(self) -> str: ...

    def store(self) -> Store:
        """The open store. Raises ConfigError, StoreError."""
        ...

    def watched(self) -> AbstractContextManager[None]:
        """What is done inside counts for the store's health."""
        ...


@dataclass(frozen=True, slots=True)
class Plain:
    """A store that nobody watches."""

    opened: Store

    @property
    def name(self) -> str:
        return self.opened.name

    def store(self) -> Store:
        return self.opened

    def watched(self) -> AbstractContextManager[None]:
        return nullcontext()


# --- where things are ----------------------------------------------------------------------------------------------


def manifest_key(uuid: str) -> str:
    """Where a record's manifest is in a store: the one commit point."""
    return f".runfs/{uuid}/manifest.json"


def data_key(uuid: str, digest: bytes) -> str:
    """Where a later content of a record is."""
    return f".runfs/{uuid}/data/{digest.hex()}"


def plain_key(uuid: str, path: bytes) -> str:
    """Where a path's first content is: an object any tool can read."""
    return f"{uuid}/{keys.encode(path)}"


# --- manifests -----------------------------------------------------------------------------------------------------


def read_manifest(kept: Kept, uuid: str) -> tuple[bytes | None, str | None]:
    """The manifest in a store and its version; None where it is absent or changed while we looked."""
    store, key = kept.store(), manifest_key(uuid)
    try:
        with kept.watched():
            before = store.stat(key).version
            body = store.read(key)
            settled = store.stat(key).version == before
    except NotFound:
        return None, None
    return (body if settled else None), before


def their_manifest(kept: Kept, uuid: str) -> Manifest | None:
    """The manifest a store has of a record now; None where it has none. Raises ManifestError, StoreError."""
    try:
        with kept.watched():
            return parse(kept.store().read(manifest_key(uuid)), uuid)
    except NotFound:
        return None


@dataclass(frozen=True, slots=True)
class Found:
    """A record's manifest as a store has it: parsed, with the object's version and its very bytes."""

    manifest: Manifest
    version: str
    body: bytes


def manifests(store: Store, damaged: Callable[[str, str], None]) -> Iterator[Found]:
    """Every record a store has a manifest of. What cannot be used is told to `damaged(key, reason)`. Raises StoreError
    when the listing itself fails."""
    for stat in store.list(".runfs/"):
        parts = stat.key.split("/")
        if len(parts) != 3 or parts[2] != "manifest.json":
            continue
        try:
            if not is_safe_uuid(parts[1]):
                raise ManifestError(f"{parts[1]!r:.100} is no uuid")
            body = store.read(stat.key)
            yield Found(parse(body, parts[1]), store.stat(stat.key).version or "", body)
        except (StoreError, ManifestError) as error:
            damaged(stat.key, str(error))


def plain_records(store: Store) -> dict[str, list[Stat]]:
    """Records that another tool put into a store as plain objects, `<uuid>/<path>`, without a manifest."""
    found: dict[str, list[Stat]] = {}
    published = set()
    for stat in store.list(""):
        first, _slash, rest = stat.key.partition("/")
        if first == keys.RESERVED:
            published.add(rest.partition("/")[0])  # without a manifest: a push that was interrupted, not a record yet
        elif rest and is_safe_uuid(first):
            found.setdefault(first, []).append(stat)
    return {
        uuid: stats
        for uuid, stats in found.items()
        if uuid not in published and any(stat.key == f"{uuid}/id.json" for stat in stats)
    }


class Intents:
    """What we meant to publish and have not recorded yet, by digest: a process that was killed in between finds its own
    manifest in the store, which must not look like another host's. This one forgets; a subclass remembers."""

    def add(self, body: bytes) -> None:
        """Before a manifest is written."""

    def has(self, body: bytes) -> bool:
        """Whether this one was ours before this publish began."""
        return False


@dataclass(frozen=True, slots=True)
class Published:
    """A manifest as it is in the store now, what of another host's went into it, and under which second names.
    `dropped` is the one it replaced, where that was not kept as a version."""

    manifest: Manifest
    version: str
    body: bytes
    clashes: tuple[tuple[bytes, bytes], ...] = ()
    dropped: Manifest | None = None


def publish(
    kept: Kept,
    ours: Manifest,
    base: Manifest | None,
    version: str | None,
    merged: Callable[[Manifest | None, Manifest, Manifest], Merge],
    kept_one: Callable[[Manifest], None] = lambda _earlier: None,
    intents: Intents | None = None,
) -> Published:
    """Commit: the manifest replaces the version we built on, or is merged with what another host made of it.

    `base` with `version` is what we built on (None: nothing); `merged(base, ours, theirs)` merges a lost race. What
    was written is read back at once: that proves it, and gives its version even where a write does not. What is
    replaced is kept as a version first, and `kept_one` is told of it. `intents` remember over a crash what we meant to
    publish. Raises Conflict when another host is faster again and again.
    """
    clashes: tuple[tuple[bytes, bytes], ...] = ()
    intents = intents or Intents()
    for _try in range(_TRIES):
        body = dump(ours)
        dropped = None
        try:
            if base is not None and not versions.keep(kept, base, kept_one):
                dropped = base
            intents.add(body)
            faults.point("push.kept")
            with kept.watched():
                _write_manifest(kept.store(), manifest_key(ours.uuid), body, version, base)
            faults.point("push.published")
        except Conflict:
            log.info("%s: %s has another version; merging", ours.uuid, kept.name)
        read, version = read_manifest(kept, ours.uuid)
        if read is None:
            continue
        if read == body:
            return Published(ours, version or "", body, clashes, dropped)
        theirs = parse(read, ours.uuid)
        if intents.has(read):
            ours, base = replace(ours, generation=max(ours.generation, theirs.generation + 1)), theirs
        else:
            merge = merged(base, ours, theirs)
            ours, base = merge.manifest, theirs
            clashes = (*clashes, *merge.clashes)
        if says_no_more(ours, theirs):
            return Published(theirs, version or "", read, clashes)
    raise Conflict(f"{kept.name}: another host publishes {ours.uuid} again and again; runfs goes on trying")


def says_no_more(ours: Manifest, theirs: Manifest) -> bool:
    """Whether what is there is what we want there: another host made the same of it, or we did and were killed before
    we could note it."""
    settles = theirs.interim and not ours.interim
    same = ours.files == theirs.files and ours.rows == theirs.rows  # in the same objects: some may have been lost
    return same and ours.notes in ("", theirs.notes) and not settles


def _write_manifest(store: Store, key: str, body: bytes, version: str | None, base: Manifest | None) -> None:
    if not store.info().conditional_write:
        _compare(store, key, body, base)
        versions.put(store, key, body)
    elif version:
        versions.put(store, key, body, if_version=version)
    else:
        versions.put(store, key, body, if_absent=True)


def _compare(store: Store, key: str, body: bytes, base: Manifest | None) -> None:
    """Where the store cannot decide, it is looked at before. Raises Conflict."""
    try:
        present: bytes | None = store.read(key)
    except NotFound:
        present = None
    if present is not None and present != body and (base is None or parse(present) != base):
        raise Conflict(f"{key} was changed meanwhile")


def with_keys(files: Iterable[File], keys_of: Mapping[bytes, str]) -> tuple[File, ...]:
    """The files in order, each with the object that holds its content (`keys_of`: digest -> key)."""
    keyed = (_with_key(file, keys_of[file.digest]) if file.kind == "file" else file for file in files)
    return tuple(sorted(keyed, key=lambda file: file.path))


def _with_key(f: File, key: str) -> File:
    """dataclasses.replace, which takes three times as long."""
    return File(f.path, f.kind, f.mode, f.mtime_ns, f.size, f.digest, key, f.target, f.uid, f.gid, f.same, f.attributes)


def keys_in(manifest: Manifest | None) -> frozenset[str]:
    """The objects that a manifest uses: they are never written again."""
    return frozenset(file.key for file in manifest.files) if manifest else frozenset()


def lacking_in(files: Iterable[File], have: Container[bytes]) -> dict[bytes, list[File]]:
    """For each content that is not among `have` (digests), all files with it."""
    lacking: dict[bytes, list[File]] = {}
    for file in files:
        if file.kind == "file" and file.digest not in have:
            lacking.setdefault(file.digest, []).append(file)
    return lacking
