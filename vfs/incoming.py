"""Directories made at the root of the mount for records from elsewhere: is one a record now, and may it be indexed?

Used by `daemon/arrivals.py`, in a worker thread: blocks on the local disk and the index. Decides and indexes; who calls
makes sure that nobody is writing there.
"""

import os
from dataclasses import dataclass

from vfs.core import Core
from vfs.errors import DamagedRecord
from vfs.format import MARKER, read_header


@dataclass(frozen=True, slots=True)
class Arrival:
    """What a directory at the root holds. `uuid` is that of its record, when it is indexed now; else `clash` says why
    a whole record stays under its own name. Neither: it holds no record (yet)."""

    uuid: str | None = None
    clash: str | None = None


def take(core: Core, name: str, directory: bytes) -> Arrival:
    """Index the record in a directory, with those nested in it, if it is whole and its uuid is new here.

    Raises what the index raises when it cannot be used now.
    """
    try:
        uuid = _record_in(directory)
    except DamagedRecord:
        return Arrival()
    if uuid is None:
        return Arrival()
    known = core.index.get(uuid)
    if known is not None:
        # Indexed already by a daemon that was stopped before it could note so: it arrived.
        return Arrival(uuid) if known.directory == directory else Arrival(clash=_clash(name, uuid, known.directory))
    if core.journal.unit(uuid) is not None:
        return Arrival(clash=_clash(name, uuid, None))
    done = core.index.reindex([directory])
    if uuid in done.ingested:
        return Arrival(uuid)
    reasons = [reason for _path, reason in done.damaged]
    return Arrival(clash=f"{name}: its record {uuid} cannot be indexed: {'; '.join(reasons) or 'it has vanished'}")


def _record_in(directory: bytes) -> str | None:
    """The uuid of the record; None where there is none, or one that no listing would show."""
    if not os.path.lexists(os.path.join(directory, os.fsencode(MARKER))):
        return None
    header = read_header(directory)
    return None if header.kind == "Project" else header.uuid


def _clash(name: str, uuid: str, place: bytes | None) -> str:
    where = f" (at {os.fsdecode(place)})" if place else ""
    return f"{name}: it holds record {uuid}, which the index has already{where}; it stays under this name"
