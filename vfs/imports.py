"""The commands that bring records into an index: reindex and import, and the rows of evicted records put back.

Each command is `(session, args, progress) -> result`, run in a worker thread of the daemon or in the command line's
process. What a store says is checked: names, manifests and sizes are its word only.
"""

import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vfs import shadow
from vfs.claims import is_place_of, links_below, own_rows, place_in
from vfs.core import Core, Home
from vfs.errors import DamagedRecord, ManifestError, Refused, RunfsError, StoreError, UsageError
from vfs.format import is_safe_uuid, read_header
from vfs.manifest import Manifest, parse
from vfs.moving import is_directory
from vfs.residency import State
from vfs.settings import StoreSettings
from vfs.stores import Stat, keys
from vfs.units import linked_record

if TYPE_CHECKING:
    from vfs.session import Progress, Session

log = logging.getLogger(__name__)
_PIECE = 8 << 20  # bytes of an object brought at a time


def put_rows_back(core: Core) -> list[str]:
    """Insert the kept rows of evicted units the index has not: their directories are links, which no walk finds."""
    missing: list[dict[str, Any]] = []
    for uuid in core.journal.unit_uuids():
        row = core.journal.unit(uuid) if core.index.get(uuid) is None else None
        missing += json.loads(row.rows) if row is not None else ()
    back = core.index.put_back(missing) if missing else []
    if back:
        log.warning("put %d rows of evicted records back into the index, which was rebuilt without them", len(back))
    return back


def reindex(session: "Session", args: dict[str, Any], progress: "Progress") -> dict[str, Any]:
    """Index what directories and stores hold; rows of evicted records come back from the journal."""
    core = session.core
    sources = list(args.get("from") or [])
    directories = [source for source in sources if "://" not in source]
    damaged: list[dict[str, Any]] = []
    ingested = 0
    if not sources:
        directories = [str(session.settings.project_dir / "storage")]
    damaged += [_no_directory(path) for path in directories if not os.path.isdir(path)]
    directories = [path for path in directories if os.path.isdir(path)]
    if args.get("dry_run"):
        found = [path for directory in directories for path in _record_directories(directory)]
        return {"ingested": len(found), "restored_rows": 0, "damaged": damaged, "exit": int(bool(damaged))}
    done = core.index.reindex(directories)
    ingested += len(done.ingested) + _take_links_up(session, directories, damaged)
    damaged += [{"path": path, "reason": reason} for path, reason in done.damaged]
    restored = len(put_rows_back(core))
    for url in (source for source in sources if "://" in source):
        restored += _reindex_store(session, url, damaged, progress)
    return {"ingested": ingested, "restored_rows": restored, "damaged": damaged, "exit": int(bool(damaged))}


def _no_directory(path: str) -> dict[str, Any]:
    return {"path": path, "reason": "there is no such directory; name one with --from"}


def _record_directories(directory: str) -> Iterator[str]:
    for path, _names, files in os.walk(directory):
        if ".machinable" in files:
            yield path


def _home_for(session: "Session", url: str) -> Home:
    """The configured store with this URL, or one made for this command."""
    for home in session.core.homes:
        if home.url.rstrip("/") == url.rstrip("/"):
            return home
    return Home(StoreSettings(name="source", url=url), session.settings, session.core.journal)


def manifests_in(home: Home, damaged: list[dict[str, Any]]) -> Iterator[tuple[Manifest, str, bytes]]:
    """Every record a store has a manifest of, with the manifest's version and body."""
    for stat in home.store().list(".runfs/"):
        parts = stat.key.split("/")
        if len(parts) != 3 or parts[2] != "manifest.json":
            continue
        try:
            if not is_safe_uuid(parts[1]):
                raise ManifestError(f"{parts[1]!r:.100} is no uuid")
            body = home.store().read(stat.key)
            yield parse(body, parts[1]), home.store().stat(stat.key).version or "", body
        except (StoreError, ManifestError) as error:
            damaged.append({"path": f"{home.url.rstrip('/')}/{stat.key}", "reason": str(error)})


def _reindex_store(session: "Session", url: str, damaged: list[dict[str, Any]], progress: "Progress") -> int:
    """Take up records whose manifests a store holds: their rows, and their bytes as evicted."""
    home = _home_for(session, url)
    if home not in session.core.homes:
        raise UsageError(f"{url} is not one of this index's stores; add it with --store or in the configuration")
    count = 0
    for manifest, version, body in manifests_in(home, damaged):
        place = _place_for(session, manifest)
        believed = replace(manifest, rows=tuple(own_rows(manifest.rows, manifest.uuid, place)))
        count += len(session.core.index.put_back({**row} for row in believed.rows))
        if not _is_here(session, manifest.uuid):
            session.core.index.move(believed.rows)
            session.evictor.adopt(believed, home, version, body, place)
        progress({"what": "reindex", "uuid": manifest.uuid, "done": count})
    return count


def _is_here(session: "Session", uuid: str) -> bool:
    try:
        unit = session.core.units.get(uuid)
    except RunfsError:
        return False
    return is_directory(unit.base)


def _place_for(session: "Session", manifest: Manifest) -> bytes:
    """Where a record of a store has its directory: where the index says, else where its row says, if that is in this
    project or the record is there already."""
    record = session.core.index.get(manifest.uuid)
    project = os.fsencode(session.settings.project_dir)
    told = (place_in(row) for row in manifest.rows if row.get("record_id") == manifest.uuid)
    directory = record.directory if record is not None else next(told, None)
    if directory is not None and is_directory(os.path.dirname(os.path.dirname(directory))):
        inside = directory.startswith(project + b"/") and b"/." not in directory[len(project) :]
        if record is not None or inside or is_place_of(directory, manifest.uuid):
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


# --- import ----------------------------------------------------------------------------------------------------


def import_(session: "Session", args: dict[str, Any], progress: "Progress") -> dict[str, Any]:
    """Copy records from a directory, or take them over from a store, into this index's storage."""
    source = str(args.get("source") or "")
    if not source:
        raise UsageError("what should be imported? Name a record's directory or a store URL")
    if "://" in source:
        return _import_store(session, source, bool(args.get("dry_run")), progress)
    imported: list[str] = []
    failed: list[dict[str, Any]] = []
    tops = [path for path in _record_directories(source) if not _inside_record(path, source)]
    if not tops:
        failed.append({"source": source, "reason": "no record (a directory with .machinable and id.json) is there"})
    for path in tops:
        try:
            imported += _import_one(session, path, bool(args.get("dry_run")))
        except (RunfsError, OSError) as error:
            failed.append({"source": path, "reason": str(error)})
        progress({"what": "import", "done": len(imported), "size": len(tops)})
    return {"imported": imported, "failed": failed, "exit": int(bool(failed))}


def _inside_record(path: str, source: str) -> bool:
    parent = os.path.dirname(path)
    while len(parent) >= len(source.rstrip("/")) and parent != path:
        if os.path.exists(os.path.join(parent, ".machinable")):
            return True
        path, parent = parent, os.path.dirname(parent)
    return False


def _import_one(session: "Session", path: str, dry_run: bool) -> list[str]:
    header = read_header(path)
    if session.core.index.get(header.uuid) is not None:
        raise Refused(f"the index has {header.uuid} already; nothing was copied")
    target = session.settings.project_dir / "storage" / header.identity_key / header.predicate_key
    if target.exists() or target.is_symlink():
        target = session.settings.project_dir / "storage" / header.uuid
    if dry_run:
        return [header.uuid]
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".runfs-import-{header.uuid}")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(path, partial, symlinks=True)
    os.rename(partial, target)
    done = session.core.index.reindex([str(target)])
    for uuid in done.ingested:
        unit, _path = session.core.units.place(uuid)
        session.core.units.mark_dirty(unit, "imported")
    if done.damaged:
        raise Refused(f"copied to {target}, but {done.damaged[0][1]}")
    return done.ingested


def _import_store(session: "Session", url: str, dry_run: bool, progress: "Progress") -> dict[str, Any]:
    home = _home_for(session, url)
    known = home in session.core.homes
    damaged: list[dict[str, Any]] = []
    imported: list[str] = []
    failed: list[dict[str, Any]] = []
    for manifest, version, body in list(manifests_in(home, damaged)):
        if session.core.index.get(manifest.uuid) is not None:
            failed.append({"source": manifest.uuid, "reason": "the index has it already"})
            continue
        if not dry_run:
            try:
                _take_over(session, home, known, manifest, version, body)
            except (RunfsError, OSError) as error:
                failed.append({"source": manifest.uuid, "reason": str(error)})
                continue
        imported.append(manifest.uuid)
        progress({"what": "import", "uuid": manifest.uuid, "done": len(imported)})
    have = {each["source"] for each in failed} | set(imported)
    for uuid, found in plain_records(home).items():
        if uuid not in have and session.core.index.get(uuid) is None:
            try:
                imported += [uuid] if dry_run else _import_plain(session, home, uuid, found)
            except (RunfsError, OSError) as error:
                failed.append({"source": uuid, "reason": str(error)})
    failed += [{"source": each["path"], "reason": each["reason"]} for each in damaged]
    return {"imported": imported, "failed": failed, "exit": int(bool(failed))}


def plain_records(home: Home) -> dict[str, list[Stat]]:
    """Records that another tool put into a store as plain objects, `<uuid>/<path>`, without a manifest."""
    found: dict[str, list[Stat]] = {}
    published = set()
    for stat in home.store().list(""):
        first, _slash, rest = stat.key.partition("/")
        if first == ".runfs":
            published.add(rest.partition("/")[0])
        elif rest and is_safe_uuid(first):
            found.setdefault(first, []).append(stat)
    return {
        uuid: stats
        for uuid, stats in found.items()
        if uuid not in published and any(stat.key == f"{uuid}/id.json" for stat in stats)
    }


def _import_plain(session: "Session", home: Home, uuid: str, found: list[Stat]) -> list[str]:
    """Bring such a record whole into a directory beside the storage and import that: names and sizes are the store's
    word, its bytes get their digests here. Raises DamagedRecord for names that cannot be a tree."""
    partial = session.settings.project_dir / "storage" / f".runfs-import-{uuid}.plain"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for stat in found:
            _bring_plain(home, stat, os.fsencode(partial), stat.key[len(uuid) + 1 :])
        (partial / ".machinable").touch()
        return _import_one(session, str(partial), False)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _bring_plain(home: Home, stat: Stat, root: bytes, key: str) -> None:
    path = keys.name_of(key)
    parts = path.split(b"/")
    if any(part in (b"", b".", b"..") or b"\0" in part for part in parts):
        raise DamagedRecord(f"{stat.key} in {home.name} is no name for a file; remove or rename that object")
    target = os.path.join(root, path)
    try:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(target, "xb") as out:
            for offset in range(0, stat.size, _PIECE):
                out.write(home.store().read(stat.key, offset, min(_PIECE, stat.size - offset)))
            out.flush()
            os.fsync(out.fileno())
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise DamagedRecord(
            f"{stat.key} in {home.name} is a file and a directory at once; remove or rename one of the two"
        ) from error


def _take_over(session: "Session", home: Home, known: bool, manifest: Manifest, version: str, body: bytes) -> None:
    core = session.core
    place = _place_for(session, manifest)
    manifest = replace(manifest, rows=tuple(own_rows(manifest.rows, manifest.uuid, place)))
    if known:
        core.index.put_back({**row} for row in manifest.rows)
        session.evictor.adopt(manifest, home, version, body, place)
    else:
        _copy_over(session, home, manifest, version, body, place)


def _copy_over(session: "Session", home: Home, manifest: Manifest, version: str, body: bytes, place: bytes) -> None:
    """Take a record from a store that is not one of ours: its bytes come along, since it will not be asked again. The
    index learns of it when it is whole; if that fails nothing of it stays."""
    core = session.core
    core.sources.append(home)
    try:
        unit = session.evictor.adopt(manifest, home, version, body, place)
        try:
            session.evictor.restore(unit)
        except BaseException:
            core.journal.drop_unit(unit.uuid)
            if linked_record(place) == unit.uuid:
                os.unlink(place)
            shadow.remove(unit.shadow)
            unit.state = State.RESIDENT
            raise
        finally:
            core.journal.forget_home(unit.uuid, home.name)
            core.journal.forget_replicas(unit.uuid, home.name)
    finally:
        core.sources.remove(home)
    core.index.put_back({**row} for row in manifest.rows)
    core.units.mark_dirty(unit, "imported")
