"""Give a record that another tool put into a store its manifest, without keeping a byte of it here. Used by reindex.

Blocks on the store: every byte is read once. What a crash leaves: a record without a manifest, as before.
"""

import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from vfs import wire
from vfs.errors import Conflict, DamagedRecord
from vfs.format import EDGES, HEADER, MARKER, MODEL, UPDATED_AT, is_record_directory
from vfs.manifest import File, Manifest, dump, merge
from vfs.records.local import rows_of
from vfs.records.retrieve import digested, plain_manifest, retrieve
from vfs.stores.protocol import Stat
from vfs.wire import Found, Kept

_DESCRIBING = (MARKER, HEADER, MODEL, UPDATED_AT, EDGES)  # what an index needs of a record


def with_manifest(
    kept: Kept, uuid: str, found: Iterable[Stat], place: str, told: Callable[[dict[str, Any]], None]
) -> Found:
    """Digest a record where it is, and publish its manifest. `place`: the directory its rows are to name. A store that
    takes no writes keeps none: the manifest is then only ours.

    Raises DamagedRecord for what is no record, WrongBytes when it changes meanwhile, StoreError.
    """
    read = 0

    def count(size: int) -> None:
        nonlocal read
        read += size
        told({"what": "reindex", "uuid": uuid, "message": f"{read:,} bytes read"})

    plain = plain_manifest(kept, uuid, found)
    rows = _rows(kept, plain, place)
    whole = replace(
        digested(kept, _with_marker(kept, plain), count), generation=1, rows=rows, published_ns=time.time_ns()
    )
    if kept.store().info().read_only:
        return Found(whole, "", dump(whole))
    done = wire.publish(kept, whole, None, None, merge)
    return Found(done.manifest, done.version, done.body)


def _rows(kept: Kept, plain: Manifest, place: str) -> tuple[dict[str, Any], ...]:
    """The index rows of a record and those nested in it, from the few files that tell them."""
    paths = {file.path for file in plain.files if _describes(file)}
    above = {b"/".join(path.split(b"/")[:count]) for path in paths for count in range(1, path.count(b"/") + 1)}
    part = replace(plain, files=tuple(file for file in plain.files if file.path in paths | above))
    with tempfile.TemporaryDirectory(prefix="runfs-plain-") as temporary:
        directory = Path(temporary) / "record"
        retrieve(kept, part, directory)
        if not is_record_directory(directory):
            raise DamagedRecord(f"{plain.uuid} in {kept.name} has no {HEADER}")
        rows = rows_of(directory, place)
    if plain.uuid not in {row["record_id"] for row in rows}:
        raise DamagedRecord(f"{plain.uuid} in {kept.name} holds another record: {rows[0]['record_id']}; rename it")
    return rows


def _describes(file: File) -> bool:
    return file.kind == "file" and any(
        file.path == name.encode() or file.path.endswith(b"/" + name.encode()) for name in _DESCRIBING
    )


def _with_marker(kept: Kept, plain: Manifest) -> Manifest:
    """The marker has to be an object too; tools that copy no empty files leave it out."""
    files = []
    for file in plain.files:
        if file.kind == "file" and not file.key:
            file = replace(file, key=wire.plain_key(plain.uuid, file.path))
            if not kept.store().info().read_only:
                try:
                    kept.store().write(file.key, b"", if_absent=kept.store().info().conditional_write)
                except Conflict:
                    raise DamagedRecord(f"{file.key} in {kept.name} is in the way; remove that object") from None
        files.append(file)
    return replace(plain, files=tuple(files))
