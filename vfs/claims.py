"""Where records are on this machine, told from what a manifest or an index says of another place.

Used by reindex and import. A manifest's rows are a store's word: with a place of its choice the mount would show, and
push, any directory of this machine, and a link would be made anywhere. Touches the local disk only.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from vfs import places
from vfs.core import Core
from vfs.errors import RunfsError
from vfs.format import read_header
from vfs.index_record import local_path
from vfs.ingest import to_uri
from vfs.manifest import Manifest
from vfs.moving import is_directory
from vfs.trust.owners import this_host
from vfs.units import linked_record

_PLACES = ("storage_uri", "local_uri")

Row = dict[str, Any]


def own_rows(rows: Iterable[Mapping[str, Any]], uuid: str, place: bytes) -> list[Row]:
    """Copies of the rows of record `uuid` and of those nested in it, with their local places below `place`; a row that
    is neither, or whose directory lies somewhere else, is left out."""
    by_uuid = {str(row.get("record_id")): row for row in rows}
    root = by_uuid.get(uuid)
    before = place_in(root) if root is not None else None
    found = []
    for row in by_uuid.values():
        if root is None or not _is_in(by_uuid, row, uuid):
            continue
        moved = moved_row(row, before, place)
        if row is root and place_in(moved) != place:  # it was on no machine, or nowhere that can be
            moved |= {"storage_uri": to_uri(os.fsdecode(place)), "local_uri": None}
        if (directory := place_in(moved)) is not None and (directory + b"/").startswith(place + b"/"):
            found.append(moved if moved["storage_uri"] else moved | {"storage_uri": moved["local_uri"]})
    return found


def moved_row(row: Mapping[str, Any], before: bytes | None, place: bytes) -> Row:
    """A copy of a row whose places below the directory `before` are below `place` instead."""
    changed = dict(row)
    for column in _PLACES:
        path = local_path(row[column]) if isinstance(row.get(column), str) else None
        if path is None:
            continue
        inside = before is not None and (path + b"/").startswith(before + b"/")
        rest = path[len(before) :] if inside and before is not None else b""
        if not inside or place != before:
            changed[column] = to_uri(os.fsdecode(place + rest)) if inside else None
    return changed


def place_in(row: Mapping[str, Any]) -> bytes | None:
    """The local directory that a row names, as `Record.directory`; None where there is none, or it is not plain."""
    for column in ("local_uri", "storage_uri"):
        path = local_path(row[column]) if isinstance(row.get(column), str) else None
        if path is not None:
            return path if os.path.normpath(path) == path else None
    return None


def _is_in(rows: Mapping[str, Mapping[str, Any]], row: Mapping[str, Any], uuid: str) -> bool:
    """Whether a row is that of `uuid` or has it among its ancestors."""
    seen: set[str] = set()
    at: str | None = str(row.get("record_id"))
    while at is not None and at not in seen:
        if at == uuid:
            return True
        seen.add(at)
        at = rows[at].get("parent_id") if at in rows else None
    return False


def is_place_of(directory: bytes, uuid: str) -> bool:
    """Whether a record is at a directory already: for real, or as the link that an eviction leaves."""
    if linked_record(directory) == uuid:
        return True
    try:
        return is_directory(directory) and read_header(directory).uuid == uuid
    except (RunfsError, OSError):
        return False


def links_below(directory: bytes) -> Iterator[tuple[bytes, str]]:
    """The links that evictions left below a directory, each with its record. No link is followed."""
    try:
        with os.scandir(directory) as entries:
            found = [(entry.path, entry.is_symlink(), entry.is_dir(follow_symlinks=False)) for entry in entries]
    except OSError:
        return  # the look for record directories names what cannot be read
    for path, is_link, is_below in found:
        if is_link and (uuid := linked_record(path)) is not None:
            yield path, uuid
        elif is_below:
            yield from links_below(path)


def lives_in(core: Core, manifest: Manifest) -> str | None:
    """Another project of this machine that uses a record; None where none does, or it is ours. A store's word: it only
    ever makes reindex leave something alone."""
    here, project = this_host(), os.fsencode(core.settings.project_dir)
    mine = [owner for owner in manifest.owners if owner.host == here]
    if any(owner.project == project for owner in mine):
        return None
    for owner in mine:
        if is_place_of(owner.directory, manifest.uuid):
            return os.fsdecode(owner.project)
    return None if manifest.owners else _told_by_row(core, manifest)


def _told_by_row(core: Core, manifest: Manifest) -> str | None:
    """For a manifest from before there were marks: the project around the place that its row names."""
    row = next((row for row in manifest.rows if row.get("record_id") == manifest.uuid), None)
    directory = place_in(row) if row is not None else None
    if directory is None or not is_place_of(directory, manifest.uuid):
        return None
    index = places.find_index(Path(os.fsdecode(directory)).parent)
    if index is None or os.path.realpath(index) == os.path.realpath(core.settings.index):
        return None
    return str(index.parent)
