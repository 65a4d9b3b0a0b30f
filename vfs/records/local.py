"""A record's directory on this machine, for whoever has no index: which record it is, what it holds, what it is
related to. Used by `vfs.records`. Reads local disks only, and follows no link.
"""

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vfs import format as record_format
from vfs.errors import DamagedRecord, Refused, RunfsError, UsageError
from vfs.format import EDGES, is_record_directory, is_safe_uuid, read_header
from vfs.index import Index
from vfs.ingest import to_uri
from vfs.manifest import Content, File
from vfs.scan import scan
from vfs.units import linked_record

_DEEPEST = 12  # directories up to the record that this one is nested in: two for each level

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Local:
    """A root record as it is on the disk. `unsettled`: paths that went on changing while they were read."""

    uuid: str
    directory: Path
    files: tuple[File, ...]
    contents: Mapping[bytes, Content]
    rows: tuple[Row, ...]
    unsettled: tuple[bytes, ...]


def root_of(directory: str | os.PathLike[str]) -> tuple[str, Path]:
    """The root record that a directory is, or is nested in: its uuid and its directory.

    Raises DamagedRecord where no record is; Refused for the link of an evicted record (its mount pushes it).
    """
    path = Path(os.path.abspath(directory))
    uuid = linked_record(os.fsencode(path))
    if uuid is not None:
        raise Refused(f"{path} is the link of the evicted record {uuid}: what changes in it is pushed by its mount")
    header = read_header(path)
    while header.parent is not None:
        above = next(iter(_above(path, header.parent)), None)
        if above is None:
            break
        path, header = above, read_header(above)
    return header.uuid, path


def uuids_in(directory: Path) -> list[str]:
    """The uuid of the record in a directory and of those it is nested in; none where no record is."""
    if not is_record_directory(directory):
        return []
    try:
        own = read_header(directory).uuid
        root, _place = root_of(directory)
    except RunfsError:
        return []
    return list(dict.fromkeys([own, root]))


def _above(path: Path, uuid: str) -> Iterator[Path]:
    for parent in list(path.parents)[:_DEEPEST]:
        if linked_record(os.fsencode(parent)) == uuid:
            raise Refused(f"{path} lies in the evicted record {uuid}: what changes in it is pushed by its mount")
        if is_record_directory(parent) and read_header(parent).uuid == uuid:
            yield parent


def read(directory: str | os.PathLike[str]) -> Local:
    """The root record around a directory, digested (every byte is read). Raises DamagedRecord, Refused, OSError."""
    uuid, root = root_of(directory)
    if not is_record_directory(root):
        raise DamagedRecord(f"{root}: has no .machinable, so it is no record yet")
    rows = rows_of(root)
    found = scan(os.fsencode(root), {}, content=lambda _digest: None)
    return Local(uuid, root, found.files, found.contents, rows, found.unsettled)


def rows_of(directory: Path, at: str | None = None) -> tuple[Row, ...]:
    """The rows an index would have for the records at and below a directory. `at`: the path to write into them instead
    of `directory`. Raises DamagedRecord."""
    with tempfile.TemporaryDirectory(prefix="runfs-rows-") as place:
        index = Index.open(Path(place) / "index.sqlite", create=True)
        try:
            done = index.reindex([str(directory)])
            if done.damaged and not done.ingested:
                raise DamagedRecord(f"{done.damaged[0][0]}: {done.damaged[0][1]}")
            rows = index.rows(done.ingested)
        finally:
            index.close()
    if at is not None:
        before, now = to_uri(str(directory)), to_uri(at)
        for row in rows:
            for column in ("storage_uri", "local_uri"):
                if str(row.get(column) or "").startswith(before):
                    row[column] = now + str(row[column])[len(before) :]
    return tuple(sorted(rows, key=lambda row: str(row["record_id"])))


def related(directory: str | os.PathLike[str]) -> list[str]:
    """The uuids that a record's edges name, without its own. Raises DamagedRecord for a file that is not JSON lines."""
    shown = os.fspath(directory)
    own = read_header(directory).uuid
    with record_format.opened(directory) as descriptor:
        data = record_format.read_bytes(descriptor, EDGES, shown)
    found: dict[str, None] = {}
    for line in (data or b"").splitlines():
        if not line.strip():
            continue
        edge = record_format.parse_json(line, f"{shown}/{EDGES}")
        for key in ("uuid", "related_uuid"):
            uuid = edge.get(key) if isinstance(edge, dict) else None
            if is_safe_uuid(uuid) and uuid != own:
                found[str(uuid)] = None
    return list(found)


Finder = Callable[[str], Path | None]


def finder(places: Iterable[str | os.PathLike[str]]) -> Finder:
    """Tells where below some directories a record is; they are walked once, when it is first asked."""
    known: dict[str, Path] = {}
    waiting = [os.fspath(place) for place in places]

    def find(uuid: str) -> Path | None:
        while waiting:
            for top, _names, files in os.walk(waiting.pop()):
                if record_format.MARKER in files and is_record_directory(top):
                    known.setdefault(read_header(top).uuid, Path(top))
        return known.get(uuid)

    return find


def checked(uuid: str) -> str:
    """The uuid, if it can be one: it becomes part of keys and paths. Raises UsageError."""
    if not is_safe_uuid(uuid):
        raise UsageError(f"{uuid!r:.80} is no uuid of a record")
    return uuid
