"""The command that rebuilds an index from directories and stores, and the rows that are put back by themselves.

`(session, args, progress) -> result`, run in a worker thread of the daemon or in the command line's process. What a
store says is checked: names, manifests and sizes are its word only.
"""

import json
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vfs import wire
from vfs.addresses import Pins
from vfs.claims import is_place_of, links_below, lives_in, own_rows, place_in
from vfs.core import Core, Home
from vfs.errors import RunfsError, UsageError
from vfs.manifest import Manifest
from vfs.moving import is_directory
from vfs.records import plain

if TYPE_CHECKING:
    from vfs.session import Progress, Session

log = logging.getLogger(__name__)


def put_rows_back(core: Core) -> list[str]:
    """Insert the kept rows of evicted units the index has not: their directories are links, which no walk finds."""
    missing: list[dict[str, Any]] = []
    for uuid in core.journal.unit_uuids():
        row = core.journal.unit(uuid) if core.index.get(uuid) is None else None
        missing += json.loads(row.rows) if row is not None else ()
    back = core.index.put_back(missing) if missing else []
    back += _linked_back(core)
    if back:
        log.warning(
            "put %d rows of evicted and linked records back into the index, which was rebuilt without them", len(back)
        )
    return back


def _linked_back(core: Core) -> list[str]:
    """Records that are used where they are lie outside the storage: a walk of it does not find them."""
    gone = [pin for pin in Pins(core.journal).linked() if any(core.index.get(uuid) is None for uuid in pin.uuids)]
    places = [pin.directory for pin in gone if os.path.isdir(pin.directory)]
    return core.index.reindex(places).ingested if places else []


def reindex(session: "Session", args: dict[str, Any], progress: "Progress") -> dict[str, Any]:
    """Index what directories and stores hold; rows of evicted records come back from the journal.

    Without `from`: the project's storage, and with `stores` the configured stores too, from which alone everything can
    be rebuilt.
    """
    core = session.core
    sources = list(args.get("from") or [])
    storage = str(session.settings.project_dir / "storage")
    if not sources:
        sources = [home.name for home in core.stores if not home.calculates] if args.get("stores") else []
        sources += [storage] if os.path.isdir(storage) or not sources else []
    stores = {source: home for source in sources if (home := _store_named(session, source)) is not None}
    directories = [source for source in sources if source not in stores]
    damaged = [_no_directory(path) for path in directories if not os.path.isdir(path)]
    directories = [path for path in directories if os.path.isdir(path)]
    if args.get("dry_run"):
        found = {path for directory in directories for path in record_directories(directory)}
        counts = {home.name: _count_records(core, home, damaged) for home in stores.values()}
        empty = [name for name, records in counts.items() if not records]
        count = len(found) + sum(counts.values())
        return {"ingested": count, "restored_rows": 0, "empty": empty, "damaged": damaged, "exit": int(bool(damaged))}
    done = core.index.reindex(directories)
    ingested = len(done.ingested) + _take_links_up(session, directories, damaged)
    damaged += [{"path": path, "reason": reason} for path, reason in done.damaged]
    restored = len(put_rows_back(core))
    lacking: list[str] = []
    elsewhere: list[dict[str, str]] = []
    for home in stores.values():
        records, rows = _reindex_store(session, home, damaged, elsewhere, progress)
        restored += rows
        lacking += [] if records else [home.name]
    said = {"ingested": ingested, "restored_rows": restored, "empty": lacking, "damaged": damaged}
    said["elsewhere"] = elsewhere
    return {**said, "exit": int(bool(damaged))}


def _store_named(session: "Session", source: str) -> Home | None:
    """The store that is meant by a URL or a name; None for a directory. Raises UsageError for one that is not ours."""
    for home in session.core.stores:
        if home.name == source or home.url.rstrip("/") == source.rstrip("/"):
            return home
    if "://" in source:
        raise UsageError(f"{source} is not one of this index's stores; add it with --store or in the configuration")
    return None


def _count_records(core: Core, home: Home, damaged: list[dict[str, Any]]) -> int:
    found = wire.manifests(home.store(), lambda key, reason: damaged.append(damaged_in(home, key, reason)))
    return sum(_elsewhere(core, each.manifest) is None for each in found) + len(wire.plain_records(home.store()))


def _elsewhere(core: Core, manifest: Manifest) -> str | None:
    """Another project of this machine that has a record which is none of ours: two must not evict one directory."""
    return lives_in(core, manifest) if core.index.get(manifest.uuid) is None else None


def damaged_in(home: Home, key: str, reason: str) -> dict[str, Any]:
    return {"path": f"{home.url.partition('?')[0].rstrip('/')}/{key}", "reason": reason}


def _no_directory(path: str) -> dict[str, Any]:
    return {"path": path, "reason": "there is no such directory; name one with --from"}


def record_directories(directory: str) -> Iterator[str]:
    for path, _names, files in os.walk(directory):
        if ".machinable" in files:
            yield path


def _reindex_store(
    session: "Session",
    home: Home,
    damaged: list[dict[str, Any]],
    elsewhere: list[dict[str, str]],
    progress: "Progress",
) -> tuple[int, int]:
    """Take up the records that a store holds: their rows, and their bytes as evicted. One without a manifest gets its
    own: its bytes are read once, to be digested. One that another project of this machine has is only named. The number
    of root records there, and of rows put back."""
    records = count = 0

    def take(found: wire.Found) -> None:
        nonlocal count
        manifest = found.manifest
        place = place_for(session, manifest)
        believed = replace(manifest, rows=tuple(own_rows(manifest.rows, manifest.uuid, place)))
        count += len(session.core.index.put_back({**row} for row in believed.rows))
        if not _is_here(session, manifest.uuid):
            session.core.index.move(believed.rows)
            session.evictor.adopt(believed, home, found.version, found.body, place)
        progress({"what": "reindex", "uuid": manifest.uuid, "done": count})

    def note(key: str, reason: str) -> None:
        damaged.append(damaged_in(home, key, reason))

    for found in wire.manifests(home.store(), note):
        records += 1
        project = _elsewhere(session.core, found.manifest)
        if project is None:
            take(found)
        else:
            elsewhere.append({"uuid": found.manifest.uuid, "project": project, "store": home.name})
    for uuid, stats in wire.plain_records(home.store()).items():
        records += 1
        if _is_here(session, uuid) and session.core.index.get(uuid) is not None:
            continue  # its next push gives it a manifest
        try:
            place = os.fsdecode(place_for(session, Manifest(uuid, 0, ())))
            take(plain.with_manifest(home, uuid, stats, place, progress))
        except (RunfsError, OSError) as error:
            note(f"{uuid}/", str(error))
    return records, count


def _is_here(session: "Session", uuid: str) -> bool:
    try:
        unit = session.core.units.get(uuid)
    except RunfsError:
        return False
    return is_directory(unit.base)


def place_for(session: "Session", manifest: Manifest) -> bytes:
    """Where a record of a store has its directory: where the index says, else where its row says, if that is in this
    project or the record is there already."""
    record = session.core.index.get(manifest.uuid)
    project = os.fsencode(session.settings.project_dir)
    told = (place_in(row) for row in manifest.rows if row.get("record_id") == manifest.uuid)
    directory = record.directory if record is not None else next(told, None)
    if directory is not None and directory.startswith(project + b"/") and b"/." not in directory[len(project) :]:
        return directory
    storage = os.path.dirname(os.path.dirname(directory)) if directory is not None else b""
    if directory is not None and is_directory(storage) and (record or is_place_of(directory, manifest.uuid)):
        return directory
    return os.path.join(project, b"storage", manifest.uuid.encode())


def _take_links_up(session: "Session", directories: Iterable[str], damaged: list[dict[str, Any]]) -> int:
    """Records that were evicted, and whose project was moved since: their links tell where they belong now, and a home
    has their bytes."""
    core = session.core
    moved = {}
    for directory in directories:
        for path, uuid in links_below(os.path.abspath(os.fsencode(directory))):
            record = core.index.get(uuid)
            if record is None or record.directory in (None, path) or core.journal.unit(uuid) is not None:
                continue
            if not os.path.lexists(record.directory or b""):
                uuids = [uuid, *(nested.uuid for nested in core.index.nested(uuid))]
                core.index.move(own_rows(core.index.rows(uuids), uuid, path))
                moved[uuid] = path
    core.units.look_again()
    for uuid, path in moved.items():
        try:
            session.evictor.reclaim(core.units.get(uuid))
        except RunfsError as error:
            damaged.append({"path": os.fsdecode(path), "reason": str(error)})
    return len(moved)
