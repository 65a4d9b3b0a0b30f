"""Showing that homes hold exactly what is here, so that it may be dropped. A part of the Evictor.

Waits for stores: each manifest is read again, each content whose proof is too old is read back whole.
"""

import os
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from vfs import cache
from vfs.core import Home, manifest_key
from vfs.errors import DamagedRecord, NotFound, Refused, RunfsError, WrongBytes
from vfs.hydrate import read_back
from vfs.journal import Known, Replica
from vfs.manifest import Manifest, parse_ours
from vfs.moving import Moving, said
from vfs.units import Unit


class Prover(Moving):
    """Proofs of units."""

    def prove(self, unit: Unit, known: Mapping[bytes, Known]) -> dict[str, Any]:
        """Show that at least `min_copies` homes hold exactly `known`. Proofs younger than the configured age count.

        Raises Refused saying which home lacks what.
        """
        proof: dict[str, Any] = {}
        why: list[str] = []
        for home in self._core.homes:
            try:
                proof[home.name] = self._prove_in(unit, home, known)
            except RunfsError as error:
                why.append(f"{home.name}: {error}")
        if len(proof) < self._core.settings.min_copies:
            raise Refused(
                f"{unit.uuid}: not evicted: {len(proof)} of {self._core.settings.min_copies} copies are proven"
                + (f" ({'; '.join(why)})" if why else "")
            )
        return proof

    def _prove_in(self, unit: Unit, home: Home, known: Mapping[bytes, Known]) -> dict[str, Any]:
        row = self._core.journal.home(unit.uuid, home.name)
        if row is None:
            raise Refused(f"it was not pushed there yet; runfs push {unit.uuid}")
        published = parse_ours(row.manifest, unit.uuid)
        _covers(published, known)
        oldest = time.time_ns() - int(self._core.settings.proof.max_age * 1e9)
        try:
            with self._turns.away(), home.watched():
                body = home.store().read(manifest_key(unit.uuid))
        except NotFound:
            self._doubt(unit, home)
            raise Refused(f"its manifest is gone from there; runfs push {unit.uuid} brings it again") from None
        if body != row.manifest:
            self._core.journal.doubt_home(unit.uuid, home.name)
            self._core.units.mark_dirty(unit, f"another host changed it in {home.name}")
            raise Refused(f"another host changed the record there; runfs push {unit.uuid} merges it")
        replicas = self._core.journal.replicas_of(unit.uuid, home.name)
        wanted = {item.file.digest for item in known.values() if item.file.kind == "file"}
        if not wanted <= replicas.keys():
            raise Refused(f"it lacks some of its bytes; runfs push {unit.uuid}")
        stale = [replicas[digest] for digest in wanted if replicas[digest].proven_ns < oldest]
        with self._turns.away():
            fresh = list(self._pool.map(lambda replica: self._prove_replica(home, replica), stale))
        self._core.journal.set_replicas(fresh)
        replicas |= {replica.digest: replica for replica in fresh}
        return said([replicas[digest] for digest in wanted])

    def _prove_replica(self, home: Home, replica: Replica) -> Replica:
        content = self._core.content(replica.digest)
        if content is None:
            raise DamagedRecord("its digests are not in the journal")
        try:
            read_back(home, replica, content)
        except (WrongBytes, NotFound):
            unit = self._core.units.get(replica.uuid)
            if self._is_here(unit, replica.digest):
                self._core.journal.forget_replica(replica.digest, replica.store, replica.uuid)  # pushed again next time
                self._core.journal.forget_home(replica.uuid, replica.store)
            self._core.units.mark_dirty(unit, f"{home.name} lost bytes of it")
            raise
        return Replica(replica.digest, replica.store, replica.uuid, replica.key, time.time_ns(), "read back")

    def _doubt(self, unit: Unit, home: Home) -> None:
        """A home has lost the manifest: what else it has lost must be looked at, and brought again if it is here."""
        journal = self._core.journal
        journal.forget_home(unit.uuid, home.name)
        journal.doubt_replicas(unit.uuid, home.name)
        for digest in journal.replicas_of(unit.uuid, home.name):
            if self._is_here(unit, digest):
                journal.forget_replica(digest, home.name, unit.uuid)  # found there at the next push, or pushed
        self._core.units.mark_dirty(unit, f"{home.name} lost its manifest")

    def _is_here(self, unit: Unit, digest: bytes) -> bool:
        """Whether a content is whole on this disk. If not, where a store had it must never be forgotten."""
        if not unit.evicted:
            return True
        paths = [path for path, item in self._core.journal.known(unit.uuid).items() if item.file.digest == digest]
        with suppress(FileNotFoundError):
            return bool(paths) and cache.read_header(os.path.join(unit.shadow, paths[0])) is None
        return False


def _covers(published: Manifest, known: Mapping[bytes, Known]) -> None:
    """The published manifest describes exactly what is here."""
    theirs = published.by_path()
    for path, item in known.items():
        file = theirs.get(path)
        here = item.file
        if file is None or (file.kind, file.digest, file.target) != (here.kind, here.digest, here.target):
            raise Refused(f"it does not hold {os.fsdecode(path)} as it is here; runfs push {published.uuid}")
    if len(theirs) != len(known):
        raise Refused(f"it holds files that are not here; runfs push {published.uuid}")
