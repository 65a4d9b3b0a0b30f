"""The commands that only look: status, ls, safe, receipts. Each is `(session, args, progress) -> result`.

They ask the index, the journal and the local disk; no store is waited for.
"""

import os
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vfs import cache, mountinfo, policy, shadow
from vfs.core import Core
from vfs.errors import RunfsError, UnknownRecord, in_words
from vfs.index import Record
from vfs.push import rows_digest
from vfs.residency import FileState
from vfs.scan import differs, open_file, walk
from vfs.trust import conflicts, moved
from vfs.trust.journal import Quarantined
from vfs.units import Unit
from vfs.versions import transactions
from vfs.versions.transactions import why_held
from vfs.where import parse_where

if TYPE_CHECKING:
    from vfs.session import Progress, Session


_MOST_COUNTED = 200  # dirty units whose files are counted; looking at more would make status slow

# --- status ----------------------------------------------------------------------------------------------------


def status(session: "Session", args: dict[str, Any], progress: "Progress") -> dict[str, Any]:
    """What is here, what is away, what moves and who waits; or where one path's bytes are."""
    if args.get("paths"):
        paths = [_path_status(session, str(path)) for path in args["paths"]]
        return {"paths": paths, "exit": int(any(path.get("error") for path in paths))}
    found = overview(session)
    return {**found, "exit": int(found["dead_mount"] is not None)}


def overview(session: "Session") -> dict[str, Any]:
    """The state of the whole mount."""
    core = session.core
    sizes = core.journal.sizes()
    evicted, evicted_bytes = core.journal.evicted_size()
    away = set(core.journal.unit_uuids())
    mountpoint = session.settings.mountpoint
    dirty = core.units.dirty()
    total = core.index.count()
    here = {uuid: size for uuid, (_files, size) in sizes.items() if uuid not in away}
    roots = sum(1 for _ in policy.roots(core)) if total < 20_000 else total
    return {
        "mountpoint": str(mountpoint) if mountpoint else None,
        "index": str(session.settings.index),
        "dead_mount": None if mountpoint else dead_mount(core),
        "records": total,
        "states": {
            "resident": {"records": max(roots - evicted, 0), "bytes": sum(here.values())},
            "evicted": {
                "records": evicted,
                "bytes": evicted_bytes,
                "cached_bytes": shadow.used_bytes(os.fsencode(session.settings.cache_place)) if evicted else 0,
            },
            "dirty": {
                "records": len(dirty),
                **changed_size(core, dirty),
            },
        },
        "moving": core.moves.shown(),
        "waiting": session.waiting(),
        "passthrough": session.passthrough(),
        "kept": session.kept(),
        "queue": _queue(core),
        "transactions": transactions.shown(core),
        "stores": store_states(core),
        "conflicts": [conflicts.shown(core, clash) for clash in conflicts.unsettled(core, by_name=False)],
        "quarantine": [_in_quarantine(row) for row in core.journal.quarantined()],
        "warnings": [*session.warnings, *_unlooked(core, sizes, roots)],
    }


def dead_mount(core: Core) -> str | None:
    """Where this index was mounted, if that is a mount still and nobody serves it. Only for a process that has the
    journal to itself: then no daemon of this index runs."""
    mountpoint = core.journal.note("mountpoint")
    if mountpoint is None or mountpoint not in mountinfo.runfs_mounts() or mountinfo.is_served(mountpoint):
        return None
    return mountpoint


def _in_quarantine(row: Quarantined) -> dict[str, Any]:
    """A file of which no right copy is left, as JSON; `kept`: the path that has the damaged bytes, if any."""
    return {
        "uuid": row.uuid,
        "path": os.fsdecode(row.path),
        "kept": os.fsdecode(row.kept) or None,
        "reason": row.reason,
        "at": row.at_ns / 1e9,
    }


def changed_size(core: Core, units: Sequence[Unit]) -> dict[str, int]:
    """Files and bytes of dirty units that are not in the homes, as far as a quick look tells."""
    files = size = 0
    for unit in units[:_MOST_COUNTED]:
        try:
            unit_files, unit_size = unpushed(core, unit)
        except (OSError, RunfsError):
            continue
        files, size = files + unit_files, size + unit_size
    return {"files": files, "bytes": size}


def _unlooked(core: Core, sizes: Mapping[str, Any], roots: int) -> list[str]:
    left = roots - len(sizes)
    if left <= 0 or not core.homes:
        return []
    return [f"{left:,} records were not looked at yet: their sizes are not counted"]


def store_states(core: Core) -> list[dict[str, Any]]:
    """Each store as the last use of it found it; nothing is asked now."""
    return [
        {
            "name": home.name,
            "url": home.url,
            "reachable": False if home.error else (True if home.latency_s is not None else None),
            "latency_ms": home.latency_s * 1000 if home.latency_s is not None else None,
            "error": home.error,
            "source": home.read_only,
        }
        for home in core.stores
    ]


def _queue(core: Core) -> list[dict[str, Any]]:
    now = time.time_ns()
    return [
        {
            "uuid": row.uuid,
            "why": row.why,
            "since": row.since_ns / 1e9,
            "attempts": row.attempts,
            "next_try_s": max(row.next_ns - now, 0) / 1e9,
            "error": row.error or None,
        }
        for row in core.journal.dirty()
    ]


def _path_status(session: "Session", path: str) -> dict[str, Any]:
    core = session.core
    try:
        unit, inside = locate(session, path)
    except (RunfsError, OSError) as error:
        return {"path": path, "uuid": None, "kind": None, "state": "unknown", "error": str(error)}
    stays = session.evictor.stays(unit)
    common: dict[str, Any] = {
        "path": path,
        "uuid": unit.uuid,
        "pinned": unit.uuid in core.journal.pins(),
        "live": session.evictor.live(unit) is not None,
        "dirty": unit.dirty,
        "stays": [f"{stays.reason}; {stays.advice}"] if stays else [],
        "error": core.trouble(unit.uuid, inside) or _quarantined(core, unit, inside) or _error_of(core, unit),
    }
    try:
        folder = not inside or _is_folder(unit, inside)
        return common | (_folder_status(core, unit, inside) if folder else _file_status(core, unit, inside))
    except OSError as error:
        return common | {"kind": None, "state": "unknown", "error": error.strerror}


def _quarantined(core: Core, unit: Unit, inside: bytes) -> str | None:
    for row in core.journal.quarantined(unit.uuid):
        if inside in (b"", row.path):
            kept = f"; the damaged bytes are {os.fsdecode(row.kept)}" if row.kept else ""
            return f"{os.fsdecode(row.path)} is damaged, and no right copy is left ({row.reason}){kept}"
    return None


def _error_of(core: Core, unit: Unit) -> str | None:
    return next((row.error for row in core.journal.dirty() if row.uuid == unit.uuid and row.error), None)


def locate(session: "Session", path: str) -> tuple[Unit, bytes]:
    """The unit and the path in it that a uuid, a path in the mount or a path in a working directory means."""
    core = session.core
    if "/" not in path:
        return core.units.place(path)
    absolute = os.path.abspath(path)
    mountpoint = str(session.settings.mountpoint or core.journal.note("mountpoint") or "")
    if mountpoint and (absolute + "/").startswith(mountpoint.rstrip("/") + "/"):
        name, _slash, rest = absolute[len(mountpoint.rstrip("/")) + 1 :].partition("/")
        unit, inside = core.units.place(name)
        return unit, b"/".join(filter(None, (inside, os.fsencode(rest))))
    return _in_working_directory(core, os.fsencode(absolute))


def _in_working_directory(core: Core, path: bytes) -> tuple[Unit, bytes]:
    for record in policy.roots(core):
        directory = record.directory
        if directory is not None and (path + b"/").startswith(directory + b"/"):
            return core.units.get(record.uuid), path[len(directory) + 1 :]
    raise UnknownRecord(f"{os.fsdecode(path)} lies in no record of this index and not in its mount")


def _is_folder(unit: Unit, path: bytes) -> bool:
    fd = open_file(unit.base, path, os.O_RDONLY)
    try:
        return stat.S_ISDIR(os.fstat(fd).st_mode)
    finally:
        os.close(fd)


def _file_status(core: Core, unit: Unit, path: bytes) -> dict[str, Any]:
    fd = open_file(unit.base, path, os.O_RDONLY)
    try:
        now = os.fstat(fd)
        partial = core.in_use(fd)
        header = cache.read_header(fd)
    finally:
        os.close(fd)
    seen = next((each for each in [core.journal.known(unit.uuid).get(path)] if each), None)
    held = partial or header  # what was cut off counts as here: it is nothing to bring
    local = max(now.st_size - (held.size - held.local_bytes), 0) if held else now.st_size
    digest = header.digest if header and not header.changed else seen.file.digest if seen else b""
    if unit.dirty:
        state = FileState.DIRTY
    elif header is None or local >= now.st_size:
        state = FileState.RESIDENT
    else:
        state = FileState.PARTIAL if local else FileState.EVICTED
    return {
        "kind": "file",
        "state": state.value,
        "size": now.st_size,
        "local_bytes": local,
        "digest": digest.hex() or None,
        "replicas": [
            {
                "store": replica.store,
                "key": replica.key,
                "verified_at": replica.proven_ns / 1e9 if replica.proven_ns else None,
                "how": replica.how or None,
            }
            for replica in core.journal.replicas(digest)
        ],
    }


def _folder_status(core: Core, unit: Unit, path: bytes) -> dict[str, Any]:
    """A record, or a directory in it: the homes hold a unit as a whole."""
    size, local = sizes_of(unit, path)
    homes = core.journal.homes(unit.uuid)
    return {
        "kind": "directory" if path else "record",
        "state": unit_state(unit, size, local),
        "size": size,
        "local_bytes": local,
        "digest": None,
        "replicas": [
            {"store": home.store, "key": "", "verified_at": home.proven_ns / 1e9 or None, "how": "manifest read back"}
            for home in homes
        ],
    }


def unit_state(unit: Unit, size: int, local: int) -> str:
    """One word for where a unit's bytes are."""
    if unit.dirty:
        return "dirty"
    if not unit.evicted:
        return "resident"
    return "evicted" if local < size else "hydrated"


def sizes_of(unit: Unit, path: bytes = b"") -> tuple[int, int]:
    """Bytes of the files of a unit, or of a directory in it, and how many of them are here."""
    size = local = 0
    base = os.path.join(unit.base, path) if path else unit.base
    for seen in walk(base):
        if seen.kind != "file":
            continue
        size += seen.status.st_size
        header = cache.read_header(os.path.join(base, seen.path)) if unit.evicted else None
        missing = header.size - header.local_bytes if header else 0
        local += max(seen.status.st_size - missing, 0)
    return size, local


# --- ls --------------------------------------------------------------------------------------------------------


def ls(session: "Session", args: dict[str, Any], progress: "Progress") -> dict[str, Any]:
    """The records that were asked for, with what the index and the disk say of them."""
    core = session.core
    where = parse_where(args["where"]) if args.get("where") else ()
    rules = policy.Rules(where=where)
    pins = core.journal.pins()
    sizes = core.journal.sizes()
    records = []
    for record in _listed(core, args.get("uuids") or ()):
        known = sizes.get(record.uuid, (0, 0))[1]
        last = record.updated_at_ns
        if where and not policy.fulfils(core, record, rules, known, last):
            continue
        records.append(_shown(core, record, pins))
    return {"records": records, "exit": 0}


def _listed(core: Core, uuids: Sequence[str]) -> Iterator[Record]:
    if not uuids:
        yield from policy.roots(core)
        return
    for uuid in uuids:
        record = core.index.get(uuid)
        if record is None:
            raise UnknownRecord(f"the index has no record {uuid}; `runfs ls` shows those it has")
        yield record


def _shown(core: Core, record: Record, pins: set[str]) -> dict[str, Any]:
    out: dict[str, Any] = {
        "uuid": record.uuid,
        "kind": record.kind,
        "module": record.module,
        "label": record.label,
        "created_at": record.created_at_ns / 1e9,
        "pinned": record.uuid in pins,
        "nested": len(core.index.nested(record.uuid)),
    }
    try:
        unit, inside = core.units.place(record.uuid)
        size, local = sizes_of(unit, inside)
        state, status = unit_state(unit, size, local), policy.status_of(core, record)
        return out | {"status": status, "state": state, "size": size, "local_bytes": local}
    except (RunfsError, OSError):
        return out | {"status": None, "state": "damaged", "size": None, "local_bytes": None}


# --- safe ------------------------------------------------------------------------------------------------------


def unpushed(core: Core, unit: Unit) -> tuple[int, int]:
    """Files and bytes of a unit that fewer than `min_copies` homes hold; (0, 0) when it is safe.

    Looks at every file's stat, so it sees also what was written past the mount and not noticed yet.
    """
    known = core.journal.known(unit.uuid)
    homes = [home for home in core.homes if core.journal.home(unit.uuid, home.name) is not None]
    if len(homes) < core.settings.min_copies:
        files = [seen for seen in walk(unit.base) if seen.kind == "file"]
        return max(len(files), 1), sum(seen.status.st_size for seen in files)
    changed = differs(unit.base, known, shadow=unit.evicted)
    if not changed and unit.uuid in core.transactions:
        return 1, 0  # what only the transaction knows: its notes, and that others see the record without its changes
    if changed:
        return len(changed), sum(seen.status.st_size for seen in changed if seen.kind == "file")
    if unit.dirty or not _rows_pushed(core, unit):
        return 1, 0
    return 0, 0


def _rows_pushed(core: Core, unit: Unit) -> bool:
    uuids = [unit.uuid, *(record.uuid for record in core.index.nested(unit.uuid))]
    mark = rows_digest(core.index.rows(uuids))
    homes = {home.name for home in core.homes}
    marks = [home.rows for home in core.journal.homes(unit.uuid) if home.store in homes]
    return sum(each == mark for each in marks) >= core.settings.min_copies


def safe(session: "Session", args: dict[str, Any], progress: "Progress") -> dict[str, Any]:
    """Could this machine be lost now?"""
    from vfs.actions import named_units

    core = session.core
    unsafe: list[dict[str, Any]] = []
    files = size = records = 0
    for unit in named_units(session, args):
        records += 1
        if progress.cancelled:
            break
        try:
            unit_files, unit_size = unpushed(core, unit)
        except (OSError, RunfsError) as error:
            unsafe.append({"uuid": unit.uuid, "reason": _why(error), "bytes": 0, "held": True})
            continue
        if unit_files:
            if not unit.dirty:  # nobody had noticed: it is pushed from here on
                core.units.mark_dirty(unit, "found changed")
            reason, held = _unsafe_reason(core, unit, unit_files), unit.uuid in core.transactions
            unsafe.append({"uuid": unit.uuid, "reason": reason, "bytes": unit_size, "held": held})
            files, size = files + unit_files, size + unit_size
    for each in moved.left_behind(session.settings):
        if each.unpushed:
            reason = f"unpushed changes from {each.index} are in {each.state}"
            unsafe.append({"uuid": "-", "reason": reason, "bytes": 0, "held": True})
    rate = core.moves.push_rate or None
    return {
        "safe": not unsafe,
        "records": records,
        "files": files,
        "bytes": size,
        "unsafe": unsafe,
        "stores": [home.name for home in core.homes],
        "rate": rate,
        "left_s": size / rate if rate else None,
        "exit": int(bool(unsafe)),
    }


def _why(error: BaseException) -> str:
    return str(error) if isinstance(error, RunfsError) else f"its directory cannot be read: {in_words(error)}"


def _unsafe_reason(core: Core, unit: Unit, files: int) -> str:
    if (held := core.transactions.get(unit.uuid)) is not None:
        return why_held(held)
    error = _error_of(core, unit)
    count = "1 file" if files == 1 else f"{files:,} files"
    return f"{count} to push" + (f"; the last try failed: {error}" if error else "")


def receipts(session: "Session", args: dict[str, Any], progress: "Progress") -> dict[str, Any]:
    """The kept proofs, newest first."""
    found: list[dict[str, Any]] = []
    for uuid in args.get("uuids") or [None]:
        found += session.core.journal.receipts(uuid)
    age_ns, now = int(session.settings.proof.max_age * 1e9), time.time_ns()
    shown = [
        {
            "id": each["id"],
            "at": each["at_ns"] / 1e9,
            "what": each["what"],
            "uuid": each["uuid"],
            "store": each["store"] or None,
            "files": each["files"],
            "bytes": each["bytes"],
            "digest": each["digest"],
            "proof": _proof_text(each["proof"]),
            **_until(each, age_ns, now),
        }
        for each in found
    ]
    return {"receipts": [each for each in shown if each["expired"] or not args.get("expired")], "exit": 0}


def _until(receipt: Mapping[str, Any], age_ns: int, now_ns: int) -> dict[str, Any]:
    """Until when the proof in a receipt counts, as `proof.max_age` is now; nothing where there is none to be had."""
    proofs = [said["verified_at_ns"] for said in receipt["proof"].values() if isinstance(said, Mapping)]
    if not proofs:
        return {"expires_at": None, "expired": False}
    ends_ns = min(proofs) + age_ns
    return {"expires_at": ends_ns / 1e9, "expired": ends_ns <= now_ns}


def _proof_text(proof: Mapping[str, Any]) -> str:
    parts = []
    for store, said in proof.items():
        if isinstance(said, Mapping):
            when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(said["verified_at_ns"] / 1e9))
            parts.append(f"{store}: {' and '.join(filter(None, said['how'])) or 'nothing to prove'} at {when}")
        else:
            parts.append(f"{store} {said}")
    return "; ".join(parts)
