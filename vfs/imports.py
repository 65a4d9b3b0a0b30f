"""The command that takes records over from elsewhere: directories, stores, archives and links.

`(session, args, progress) -> result`, run in a worker thread of the daemon or in the command line's process. What a
store or an archive says is checked: names, manifests and sizes are its word only. Nothing of a record is executed.
"""

import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from vfs import addresses, archives, linux, shadow, wire
from vfs.addresses import Address, Pin, Pins, digest_of_manifests, parse_address
from vfs.claims import own_rows
from vfs.copying import copy_tree
from vfs.core import Home
from vfs.errors import DamagedRecord, Refused, RunfsError, UsageError
from vfs.format import Header, read_header
from vfs.manifest import Manifest
from vfs.moving import is_directory
from vfs.records.retrieve import plain_manifest, retrieve
from vfs.reindexing import damaged_in, place_for, record_directories
from vfs.residency import State
from vfs.settings import StoreSettings
from vfs.stores import Stat
from vfs.units import linked_record

if TYPE_CHECKING:
    from vfs.session import Progress, Session

_KEY = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")  # of a record, as a directory's name


def _home_for(session: "Session", url: str) -> Home:
    """The configured store with this URL, or one made for this command."""
    for home in session.core.stores:
        if home.url.rstrip("/") == url.rstrip("/"):
            return home
    return Home(_source(url), session.settings, session.core.journal, session.core.events)


def _source(url: str) -> StoreSettings:
    """A store that is only read from: nothing is made there. Raises UsageError, without what may be a secret."""
    try:
        return StoreSettings(name="source", url=url, options={"read_only": True})
    except ValueError:
        shown = url.partition("://")[0]
        raise UsageError(
            f"{shown}://...: no store's URL, or one with credentials in it; those belong into the environment, or into "
            "the configuration with the store"
        ) from None


def import_(session: "Session", args: dict[str, Any], progress: "Progress") -> dict[str, Any]:
    """Take records over from a directory, a store, or an address (see `vfs.addresses`) into this index's storage."""
    source = str(args.get("source") or "")
    dry_run = bool(args.get("dry_run"))
    if not source:
        raise UsageError("what should be imported? Name a record's directory, a store URL, or url+, file+ or link+ ...")
    address = parse_address(source)
    if address is not None:
        return import_address(session, address, dry_run, progress)
    if "://" in source:
        _refuse_archive(source)
        return import_store(session, source, dry_run, progress)
    return import_directory(session, source, dry_run, progress)


def _refuse_archive(url: str) -> None:
    meant = Address("url", url)
    if meant.is_web and archives.is_archive(urlsplit(url).path):
        raise UsageError(f"{meant.shown.removeprefix('url+')} is an archive, no store; import it as {meant.shown}")


def import_directory(session: "Session", source: str, dry_run: bool, progress: "Progress") -> dict[str, Any]:
    """Copy the records at and below a directory."""
    imported: list[str] = []
    failed: list[dict[str, Any]] = []
    tops = [path for path in record_directories(source) if not _inside_record(path, source)]
    if not tops:
        failed.append({"source": source, "reason": _why_none(source)})
    for path in tops:
        try:
            imported += _import_one(session, path, dry_run)
        except (RunfsError, OSError) as error:
            failed.append({"source": path, "reason": str(error)})
        progress({"what": "import", "done": len(imported), "size": len(tops)})
    return {"imported": imported, "failed": failed, "exit": int(bool(failed))}


def _why_none(source: str) -> str:
    if os.path.isdir(source):
        return "no record (a directory with .machinable and id.json) is there"
    if os.path.isfile(source) and archives.is_archive(source):
        return f"it is an archive; import it as file+{os.path.abspath(source)}"
    return "it is no directory" if os.path.lexists(source) else "there is no such directory"


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
    target = _target(session.settings.project_dir / "storage", header)
    if dry_run:
        return [header.uuid]
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".runfs-import-{header.uuid}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        copy_tree(os.fsencode(path), os.fsencode(partial))
        shadow.sync(os.fsencode(partial))
        os.rename(partial, target)
        linux.sync_directory(os.fsencode(target.parent))
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    done = session.core.index.reindex([str(target)])
    for uuid in done.ingested:
        unit, _path = session.core.units.place(uuid)
        session.core.units.mark_dirty(unit, "imported")
    if done.damaged:
        raise Refused(f"copied to {target}, but {done.damaged[0][1]}")
    return done.ingested


def _target(storage: Path, header: Header) -> Path:
    """Where machinable would have put a record, if nothing is there: its keys are somebody's word, and no path."""
    keys = (header.identity_key, header.predicate_key)
    target = storage.joinpath(*keys)
    if not all(_KEY.fullmatch(key) for key in keys) or os.path.lexists(target):
        return storage / header.uuid
    return target


def import_store(session: "Session", url: str, dry_run: bool, progress: "Progress") -> dict[str, Any]:
    """Take over the records of a store: with their bytes, where it is none of this index's stores."""
    home = _home_for(session, url)
    known = home in session.core.stores
    try:
        return _import_from(session, home, known, dry_run, progress)
    finally:
        if not known:
            home.close()


def _import_from(session: "Session", home: Home, known: bool, dry_run: bool, progress: "Progress") -> dict[str, Any]:
    damaged: list[dict[str, Any]] = []
    imported: list[str] = []
    failed: list[dict[str, Any]] = []
    bodies: list[bytes] = []
    manifests = wire.manifests(home.store(), lambda key, reason: damaged.append(damaged_in(home, key, reason)))
    for manifest, version, body in [(found.manifest, found.version, found.body) for found in manifests]:
        bodies.append(body)
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
    for uuid, found in wire.plain_records(home.store()).items():
        bodies += [f"{stat.key} {stat.size} {stat.version}".encode() for stat in found]
        if uuid not in have and session.core.index.get(uuid) is None:
            try:
                imported += [uuid] if dry_run else _import_plain(session, home, uuid, found)
            except (RunfsError, OSError) as error:
                failed.append({"source": uuid, "reason": str(error)})
    failed += [{"source": each["path"], "reason": each["reason"]} for each in damaged]
    if not imported and not failed:
        failed.append({"source": home.url.partition("?")[0], "reason": "no record is there"})
    said = {"digest": digest_of_manifests(bodies)} if bodies else {}
    return {"imported": imported, "failed": failed, **said, "exit": int(bool(failed))}


def _import_plain(session: "Session", home: Home, uuid: str, found: list[Stat]) -> list[str]:
    """Bring a record without a manifest whole into a directory of the cache and import that. Names and sizes are the
    store's word; its bytes get their digests here. Raises DamagedRecord for names that cannot be a tree."""
    partial = session.settings.cache_place / f".import-{uuid}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        retrieve(home, plain_manifest(home, uuid, found), partial)
        return _import_one(session, str(partial), False)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _take_over(session: "Session", home: Home, known: bool, manifest: Manifest, version: str, body: bytes) -> None:
    core = session.core
    place = place_for(session, manifest)
    inside = place.startswith(os.fsencode(session.settings.project_dir) + b"/")
    if is_directory(place) or not inside:  # another project of this machine has it there, or a link: we get our own
        place = os.fsencode(session.settings.project_dir / "storage" / manifest.uuid)
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


# --- addresses -----------------------------------------------------------------------------------------------------


def import_address(session: "Session", address: Address, dry_run: bool, progress: "Progress") -> dict[str, Any]:
    """Take over what an address names: brought once, and never again while the records are here."""
    pins = Pins(session.core.journal)
    pin = pins.get(address)
    _refuse_other_pin(address, pin)
    if pin is not None and pin.uuids and all(session.core.index.get(uuid) is not None for uuid in pin.uuids):
        return _said({"imported": [], "failed": [], "already": list(pin.uuids), "exit": 0}, pin)
    if address.kind == "link":
        return _import_link(session, address, dry_run)
    if address.is_archive:
        return _import_archive(session, address, pin, dry_run, progress)
    if address.kind == "url":
        result = import_store(session, address.place, dry_run, progress)
        digest, size = str(result.pop("digest", "")), 0
    else:
        digest, size = addresses.digest_of_directory(_directory(address)), 0
        result = import_directory(session, address.place, dry_run, progress)
    return _pinned(session, address, result, Pin(address.shown, digest, size=size), dry_run)


def _refuse_other_pin(address: Address, pin: Pin | None) -> None:
    if address.sha256 and pin is not None and pin.digest != f"sha256={address.sha256}":
        raise UsageError(
            f"{address.shown} was pinned to {pin.digest} when it was first brought, not to sha256={address.sha256}; "
            "leave the pin out, or give the archive another name"
        )


def _directory(address: Address) -> Path:
    if not os.path.isdir(address.place):
        archive = ", and it is named like no archive" if address.kind == "file" else ""
        raise UsageError(f"{address.shown}: there is no such directory{archive}")
    return Path(address.place)


def _said(result: dict[str, Any], pin: Pin) -> dict[str, Any]:
    return {**result, "pin": {"address": pin.address, "digest": pin.digest, "etag": pin.etag, "at_ns": pin.at_ns}}


def _pinned(session: "Session", address: Address, result: dict[str, Any], pin: Pin, dry_run: bool) -> dict[str, Any]:
    """The result with its pin, which is kept, with a receipt for each record, unless this was only a try."""
    pin = addresses.with_uuids(pin, result["imported"])
    if dry_run or not pin.uuids:
        return _said(result, pin) if pin.digest and pin.uuids else result
    journal = session.core.journal
    Pins(journal).set(address, pin)
    for uuid in pin.uuids:
        journal.add_receipt("import", uuid, "", 0, pin.size, pin.digest, {"from": pin.address, "etag": pin.etag})
    return _said(result, pin)


def _import_archive(
    session: "Session", address: Address, pin: Pin | None, dry_run: bool, progress: "Progress"
) -> dict[str, Any]:
    """Unpack an archive beside the cache, and copy the records in it."""
    if address.kind == "file" and not os.path.isfile(address.place):
        raise UsageError(f"{address.shown}: there is no such file")
    if dry_run and not addresses.is_cached(address, session.settings):
        return {"imported": [], "failed": [], "would_bring": address.shown, "exit": 0}

    def told(done: int, size: int | None) -> None:
        progress({"what": "import", "path": address.shown, "done": done, "size": size})

    with addresses.unpacked(address, pin, session.settings, told) as (directory, brought):
        result = import_directory(session, str(directory), dry_run, progress)
        for each in result["failed"]:
            each["source"] = each["source"].replace(str(directory), address.shown)
    return _pinned(session, address, result, brought, dry_run)


def _import_link(session: "Session", address: Address, dry_run: bool) -> dict[str, Any]:
    """Index a record where it is. It is pinned, so that nothing but the user's own wish ever moves its directory."""
    core, place = session.core, os.path.realpath(_directory(address))
    header = read_header(place)
    known = core.index.get(header.uuid)
    if known is not None and known.directory != os.fsencode(place):
        raise Refused(f"the index has {header.uuid} already, at {known.storage_uri}; nothing was linked")
    result: dict[str, Any] = {"imported": [header.uuid], "failed": [], "linked": place, "exit": 0}
    if not dry_run:
        done = core.index.reindex([place])
        if header.uuid not in done.ingested:
            raise DamagedRecord(f"{place} cannot be indexed: {'; '.join(why for _path, why in done.damaged)}")
        core.journal.pin(header.uuid, True)
        unit, _path = core.units.place(header.uuid)
        core.units.mark_dirty(unit, "imported")
    pin = Pin(address.shown, addresses.digest_of_directory(Path(place)), directory=place)
    return _pinned(session, address, result, pin, dry_run)
