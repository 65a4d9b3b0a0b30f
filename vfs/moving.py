"""What evicting, restoring and recovering a unit have in common. The base of `vfs/evict.py`'s Evictor.

Blocks on the local disk; `_finish_discard` and `_look_again` may bring bytes from a store.
"""

import json
import logging
import os
import stat
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from blake3 import blake3

from vfs.core import Core
from vfs.discard import Discard
from vfs.errors import Refused
from vfs.hydrate import Hydrator
from vfs.journal import Known, Replica, UnitRow
from vfs.living import live_record, records_in
from vfs.push import Pusher
from vfs.residency import State
from vfs.turns import Turns
from vfs.units import Unit

log = logging.getLogger(__name__)


class Moving:
    """One index's parts, and the small steps that several moves share."""

    def __init__(self, core: Core, pusher: Pusher, hydrator: Hydrator) -> None:
        self._core = core
        self._pusher = pusher
        self._hydrator = hydrator
        self._pool = ThreadPoolExecutor(8, "prove")
        self._syncs = ThreadPoolExecutor(32, "sync")
        self._turns = Turns()

    def close(self) -> None:
        for pool in (self._pool, self._syncs):
            pool.shutdown(wait=True, cancel_futures=True)

    def live(self, unit: Unit) -> str | None:
        """The uuid of the unit or a nested record whose run is live."""
        return live_record(self._core, unit)

    def _row(self, unit: Unit, state: State, aside: bytes, known: Mapping[bytes, Known]) -> UnitRow:
        uuids = [uuid for uuid, _path in records_in(self._core, unit)]
        rows = json.dumps(self._core.index.rows(uuids))
        size = sum(item.file.size for item in known.values())
        return UnitRow(unit.uuid, state.value, unit.directory, aside, rows, size, time.time_ns())

    def _look_again(self, unit: Unit, known: Mapping[bytes, Known]) -> None:
        """The files have other inodes now. What was kept is the very file that a process may have open by now."""
        found = self._pusher.scan(unit)
        if found.unsettled or {f.path: f.digest for f in found.files} != {p: k.file.digest for p, k in known.items()}:
            self._core.units.mark_dirty(unit, "changed while it was evicted")

    def _discard(
        self,
        unit: Unit,
        aside: bytes,
        known: Mapping[bytes, Known],
        leased: Mapping[bytes, int] | None = None,
        kept: Mapping[bytes, int] | None = None,
    ) -> bool:
        """Remove what was set aside; False when something in it is in use and left for later."""

        def rescued() -> None:
            self._core.units.mark_dirty(unit, "changed while it was evicted")

        done = Discard(aside, unit.shadow, known, leased or {}, rescued, kept).run()
        if not done:
            log.warning("%s: something in %s is in use; it is looked at again later", unit.uuid, os.fsdecode(aside))
        return done

    def _finish_discard(self, unit: Unit) -> None:
        """Remove what an earlier eviction had to leave. Raises Refused when it is still in use."""
        row = self._core.journal.unit(unit.uuid) if unit.evicted else None
        if row is None or not row.aside:
            return
        known = self._core.journal.known(unit.uuid)
        if row.state == State.EVICTING.value:  # the journal could not be written to after the exchange
            self._late_receipt(unit, row, known)
        if not self._discard(unit, row.aside, known):
            left = os.fsdecode(row.aside)
            raise Refused(f"{unit.uuid}: {left} is still being written to; try again when it is closed")
        self._core.journal.set_unit(replace(row, state=State.EVICTED.value, aside=b""))

    def _late_receipt(self, unit: Unit, row: UnitRow, known: Mapping[bytes, Known]) -> None:
        """The receipt of an eviction that was interrupted before it wrote one."""
        last = self._core.journal.receipts(unit.uuid, 1)
        if last and last[0]["what"] == "evict" and last[0]["at_ns"] >= row.at_ns:
            return
        proof: dict[str, Any] = {}
        digests = {item.file.digest for item in known.values() if item.file.kind == "file"}
        for home in self._core.homes:
            replicas = self._core.journal.replicas_of(unit.uuid, home.name)
            if digests <= replicas.keys() and all(replicas[digest].proven_ns for digest in digests):
                found = [replicas[digest] for digest in digests]
                proof[home.name] = said(found)
        self._receipt(unit, known, row.bytes, proof)

    def _receipt(self, unit: Unit, known: Mapping[bytes, Known], freed: int, proof: Mapping[str, Any]) -> None:
        digest = blake3(b"".join(item.file.digest for item in known.values())).hexdigest()
        files = sum(item.file.kind == "file" for item in known.values())
        self._core.journal.add_receipt("evict", unit.uuid, "", files, freed, digest, proof)


def is_directory(path: bytes) -> bool:
    """Whether a real directory is there. A link is not followed: it may lead into the mount, which waits for us."""
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except OSError:
        return False


def said(replicas: list[Replica]) -> dict[str, Any]:
    """How and when copies were proven, for a receipt."""
    hows = sorted({replica.how for replica in replicas})
    return {"how": hows, "verified_at_ns": min((replica.proven_ns for replica in replicas), default=time.time_ns())}
