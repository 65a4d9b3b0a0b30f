"""Records in one store: commit, find, describe, delete. The parts that `vfs.records` puts together.

Blocks on the store, each request within its deadline, and on the local disk.
"""

import logging
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from vfs import wire
from vfs.errors import NotFound
from vfs.format import HEADER, Header, is_live, parse_header
from vfs.manifest import Manifest, Merge, merge, parse
from vfs.records import retrieve
from vfs.records.local import Local, Row, checked
from vfs.scan import Changing
from vfs.stores.batch import delete_files
from vfs.stores.protocol import Stat, Store
from vfs.uploads import ADOPTED, Placed, Uploads
from vfs.versions import kept as versions
from vfs.wire import Kept

log = logging.getLogger(__name__)

_SMALL_AT_ONCE = 16
_TRIES = 3  # to commit while another host sweeps
_OWN_TO_INDEX = ("hidden", "bytes_missing", "private_json")  # columns that no record directory tells


@dataclass(frozen=True, slots=True)
class Entry:
    """A record in a store. `rows` are its index rows and those of the records nested in it, as far as its manifest has
    them; `plain`: it has no manifest, another tool put it there. `size` in bytes."""

    uuid: str
    store: str
    files: int
    size: int
    plain: bool
    rows: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Located:
    """A record in a store: the manifest of its root record, and its path in there (b"" for the root itself)."""

    manifest: Manifest
    within: bytes


def is_for_reading(store: Store) -> bool:
    """Whether nothing can be put there."""
    info = store.info()
    return info.read_only or info.calculates


def commit_to(kept: Kept, local: Local) -> tuple[int, int, tuple[tuple[bytes, bytes], ...]]:
    """Commit to one store: the files and bytes that were uploaded, and clashes. Raises StoreError, ManifestError,
    Changing for a file that changed meanwhile."""
    swept: frozenset[str] = frozenset()
    for _try in range(_TRIES):
        files, size, clashes, gone = _commit_once(kept, local, swept)
        if not gone:
            return files, size, clashes
        swept |= gone
    raise Changing(f"{kept.name}: objects of {local.uuid} are swept while it is committed; commit it again")


def _commit_once(
    kept: Kept, local: Local, swept: frozenset[str]
) -> tuple[int, int, tuple[tuple[bytes, bytes], ...], frozenset[str]]:
    """As `commit_to`; and the objects that turned out to be swept by another host just before they were named, which
    count as not there at the next try (`swept`)."""
    body, version = wire.read_manifest(kept, local.uuid)
    before = parse(body, local.uuid) if body is not None else None
    named = wire.keys_in(before)
    known = before.files if before else ()
    have = {file.digest: file.key for file in known if file.kind == "file" and file.key not in swept}
    lacking = wire.lacking_in(local.files, have)
    doubtful: set[str] = set()

    def note(placed: Sequence[Placed]) -> None:
        doubtful.update(each.key for each in placed if each.how == ADOPTED and before)

    root = os.fsencode(local.directory)
    with ThreadPoolExecutor(_SMALL_AT_ONCE, "commit") as pool:
        have |= Uploads(kept, local.uuid, root, local.contents, named - swept, lacking).run(pool, note)
    interim = bool(local.unsettled) or is_live(local.directory)
    files, rows = wire.with_keys(local.files, have), _kept_rows(local.rows, before)
    ours = Manifest(local.uuid, 0, files, local.contents, rows, time.time_ns(), interim=interim)
    if before is not None:
        ours = _union(before, ours, before).manifest
    last = before.generation if before else max(versions.numbers(kept, local.uuid), default=0)
    ours = replace(ours, generation=last + 1)
    if before is not None and wire.says_no_more(ours, before) and not swept:
        return 0, 0, (), frozenset()
    done = wire.publish(kept, ours, before, version, _union)
    doubtful |= wire.keys_in(ours) if done.manifest != ours else set()
    todo = [same[0] for same in lacking.values()]
    gone = frozenset(key for key in doubtful if key and not _is_there(kept, key))
    return len(todo), sum(file.size for file in todo), done.clashes, gone


def _is_there(kept: Kept, key: str) -> bool:
    try:
        with kept.watched():
            kept.store().stat(key)
    except NotFound:
        return False
    return True


def _union(base: Manifest | None, ours: Manifest, theirs: Manifest) -> Merge:
    """Ours over theirs. What only they have stays: a directory here may lack what another host added, and no journal
    tells whether it was removed on purpose."""
    mine = ours.by_path()
    known = replace(base, files=tuple(file for file in base.files if file.path in mine)) if base else None
    return merge(known, ours, theirs)


def _kept_rows(rows: Iterable[Row], before: Manifest | None) -> tuple[Mapping[str, Any], ...]:
    """Rows made from the directory, with what only an index knows as it was published before; and rows of nested
    records that are not here."""
    found = {str(row["record_id"]): dict(row) for row in rows}
    for row in before.rows if before else ():
        own = found.setdefault(str(row.get("record_id")), dict(row))
        own.update({column: row[column] for column in _OWN_TO_INDEX if column in row})
    return tuple(found[uuid] for uuid in sorted(found))


def locate(kept: Kept, uuid: str, root: str | None) -> Located | None:
    """Where a store has a record; None when it has not. `root`: the record that it is nested in, or itself; where that
    is not known every manifest is looked into. A store that cannot list is asked for root records only."""
    for candidate in dict.fromkeys([root or uuid, uuid]):
        manifest = wire.their_manifest(kept, checked(candidate))
        if manifest is not None:
            within = b"" if candidate == uuid else _path_of(kept, manifest, uuid)
            if within is not None:
                return Located(manifest, within)
    if not kept.store().info().lists:
        return None
    plain = _plain(kept, uuid)
    if plain is not None:
        return Located(plain, b"")
    if root is not None:
        return None
    for found in wire.manifests(kept.store(), lambda key, reason: log.warning("%s: %s: %s", kept.name, key, reason)):
        if any(row.get("record_id") == uuid for row in found.manifest.rows):
            within = _path_of(kept, found.manifest, uuid)
            if within is not None:
                return Located(found.manifest, within)
    return None


def _plain(kept: Kept, uuid: str) -> Manifest | None:
    """A record that another tool put there, as its listing describes it."""
    store = kept.store()
    with kept.watched():
        if any(True for _stat in store.list(f".runfs/{uuid}/")):
            return None  # a push that was interrupted: not a record yet
        stats: list[Stat] = list(store.list(f"{uuid}/"))
    if not any(stat.key == f"{uuid}/{HEADER}" for stat in stats):
        return None
    return retrieve.plain_manifest(kept, uuid, stats)


def _path_of(kept: Kept, manifest: Manifest, uuid: str) -> bytes | None:
    """The path of a nested record: where its header is. Read, since a row's place is only some machine's word."""
    for file in manifest.files:
        directory, _slash, name = file.path.rpartition(b"/")
        if name != os.fsencode(HEADER) or not directory or file.size > 1 << 20:
            continue
        with kept.watched():
            data = kept.store().read(file.key)
        if parse_header(data).uuid == uuid:
            return directory
    return None


def header(kept: Kept, uuid: str) -> Header:
    """The header of a root record in a store. Raises StoreError, DamagedRecord."""
    manifest = wire.their_manifest(kept, uuid)
    own = next((file for file in manifest.files if file.path == os.fsencode(HEADER)), None) if manifest else None
    with kept.watched():
        return parse_header(kept.store().read(own.key if own else f"{uuid}/{HEADER}", 0, 1 << 20))


def entry(kept: Kept, manifest: Manifest) -> Entry:
    """A record with a manifest, as `walk` gives it."""
    files = sum(file.kind == "file" for file in manifest.files)
    return Entry(manifest.uuid, kept.name, files, manifest.size, False, manifest.rows)


def delete_from(kept: Kept, uuid: str) -> bool:
    """Remove everything of a root record from one store; False when there was nothing. Raises StoreError."""
    store = kept.store()
    first = [wire.manifest_key(uuid), f"{uuid}/{HEADER}"]
    with kept.watched():
        plain = [stat.key for stat in store.list(f"{uuid}/")]
        ours = [stat.key for stat in store.list(f".runfs/{uuid}/")]
        found = {key for key in (*plain, *ours) if key.startswith((f"{uuid}/", f".runfs/{uuid}/"))}  # whatever it says
        for key in first:
            if key in found:
                store.delete(key)
        for outcome in delete_files(store, sorted(found.difference(first))):
            if outcome.error is not None and not isinstance(outcome.error, NotFound):
                raise outcome.error
    return bool(plain or ours)
