"""Bring an evicted unit back for good, finish what a crash interrupted, take up what only a store has. A part of the
Evictor. Blocks on disks and stores.

What a crash leaves, and what `recover` does at the next start:

    before the journal says 'evicting'   a shadow nobody knows of: replaced or removed
    'evicting', still a real directory   the exchange did not happen: shadow and second name are removed
    'evicting', now a link               the exchange happened: what was set aside is compared and removed
    'restoring', still a link            the whole copy beside it is removed
    'restoring', a real directory        the exchange happened: link and shadow are removed
"""

import json
import logging
import os
import time
from collections.abc import Iterable
from dataclasses import replace

from vfs import cache, faults, linux, shadow
from vfs.core import Home, manifest_key, quietly_remove
from vfs.errors import NotFound, Refused, RunfsError
from vfs.journal import Home as HomeRow
from vfs.journal import Known, Replica, UnitRow
from vfs.manifest import Manifest, foreign, parse
from vfs.moving import Moving, is_directory
from vfs.push import rows_digest
from vfs.residency import RECOVERY, State
from vfs.scan import open_file, walk
from vfs.units import Unit, link_of, set_aside_name

log = logging.getLogger(__name__)


class Restorer(Moving):
    """Units on their way back, also after a crash."""

    def hydrate(self, unit: Unit) -> int:
        """Bring every file of an evicted unit into the cache; returns the bytes brought. Raises NoReplica, Full."""
        if not unit.evicted:
            return 0
        brought = 0
        for seen in walk(unit.shadow):
            if seen.kind == "file":
                fd = open_file(unit.shadow, seen.path, os.O_RDONLY)
                try:
                    brought += self._hydrator.complete(fd, unit.uuid, seen.path)
                finally:
                    os.close(fd)
        return brought

    def restore(self, unit: Unit) -> int:
        """Make an evicted unit resident again: whole in the cache, then back in its directory's place."""
        with unit.moving:
            if not unit.evicted:
                return 0
            self._finish_discard(unit)
            _refuse_occupied(unit)
            brought = self.hydrate(unit)
            faults.point("restore.hydrated")
            sequence = self._core.sequence(unit)
            found = self._pusher.scan(unit)
            aside = set_aside_name(unit)
            row = self._core.journal.unit(unit.uuid)
            assert row is not None
            started = replace(row, state=State.RESTORING.value, aside=aside, at_ns=time.time_ns())
            shadow.remove(aside)
            self._core.units.enter(unit, State.RESTORING, started)
            faults.point("restore.intended")
            try:
                os.makedirs(os.path.dirname(aside), exist_ok=True)
                shadow.copy_whole(unit.shadow, aside, found.files)
                shadow.sync(aside)
                faults.point("restore.copied")
                self._core.commit(lambda: self._switch_back(unit, aside, sequence, started))
            except BaseException:
                if unit.state is State.RESTORING and not is_directory(unit.directory):
                    shadow.remove(aside)
                    self._core.units.enter(unit, State.EVICTED, replace(started, state="evicted", aside=b""))
                raise
            faults.point("restore.entered")
            quietly_remove(aside)
            faults.point("restore.unlinked")
            shadow.remove(unit.shadow)
            self._core.journal.drop_unit(unit.uuid)
            self._pusher.scan(unit)
            return brought

    def _switch_back(self, unit: Unit, aside: bytes, sequence: int, row: UnitRow) -> None:
        if unit.writers or unit.sequence != sequence:
            raise Refused(f"{unit.uuid}: not restored: it is being written to; try again when it is closed")
        _refuse_occupied(unit)
        if not os.path.lexists(unit.directory):
            os.rename(aside, unit.directory)
        else:
            linux.exchange(unit.directory, aside)
        faults.point("restore.exchanged")
        linux.sync_directory(os.path.dirname(aside))
        self._core.units.enter(unit, State.RESIDENT, row)  # the journal forgets it when the shadow is gone

    # --- recovery ----------------------------------------------------------------------------------------------

    def recover(self) -> Iterable[str]:
        """Finish what a crash interrupted. Gives a sentence for each thing done or found."""
        for row in self._core.journal.units():
            linked = not is_directory(row.directory)  # a link, or removed by somebody: not the real directory
            if row.state == State.EVICTED.value and not row.aside:
                if not linked:
                    yield (
                        f"{row.uuid}: a real directory stands at {os.fsdecode(row.directory)} where runfs left its "
                        "link; the mount shows the evicted record. Move that directory away, or import it"
                    )
                continue
            unit = self._core.units.get(row.uuid)
            row = self._core.journal.unit(row.uuid) or row
            try:
                yield self._finish(unit, row, self._target(row, linked))
            except (OSError, RunfsError) as error:
                yield f"{row.uuid}: an interrupted move could not be finished: {error}"
        self._sweep()

    def _sweep(self) -> None:
        """Remove shadows that a crash left before the journal knew of them: their records are resident. One that holds
        anything the record's directory does not hold is left alone (a journal may have been lost)."""
        place = os.fsencode(self._core.settings.cache_place)
        for name in os.listdir(place):
            uuid = os.fsdecode(name)
            if self._core.journal.unit(uuid) is not None or self._core.index.get(uuid) is None:
                continue
            try:
                unit = self._core.units.get(uuid)
                if is_directory(unit.directory) and _adds_nothing(unit):
                    shadow.remove(unit.shadow)
            except (OSError, RunfsError) as error:
                log.warning("%s: what an interrupted eviction left in the cache stays there: %s", uuid, error)

    @staticmethod
    def _target(row: UnitRow, linked: bool) -> State:
        if row.state == State.EVICTED.value and not linked and os.path.islink(row.aside):
            return State.RESIDENT  # a power cut took the exchange back
        return RECOVERY[State(row.state), linked]

    def _finish(self, unit: Unit, row: UnitRow, target: State) -> str:
        if target is State.RESIDENT:
            if os.path.islink(row.aside):
                quietly_remove(row.aside)
            shadow.remove(unit.shadow)
            unit.state = State.EVICTING if unit.state is State.EVICTED else unit.state
            self._core.units.enter(unit, State.RESIDENT, None)
            self._core.units.mark_dirty(unit, "looked at again after an interrupted move")
            return f"{unit.uuid}: an interrupted move was undone; the record is resident"
        unit.state = State.EVICTED
        known = self._core.journal.known(unit.uuid)
        done = True
        if row.state == State.RESTORING.value:
            shadow.remove(row.aside)
        else:
            self._late_receipt(unit, row, known)
            done = self._discard(unit, row.aside, known)
        self._core.journal.set_unit(replace(row, state="evicted", aside=b"" if done else row.aside))
        self._look_again(unit, known)
        if not done:
            return f"{unit.uuid}: the record is evicted; {os.fsdecode(row.aside)} is in use and looked at again later"
        return f"{unit.uuid}: an interrupted move was finished; the record is evicted"

    def reclaim(self, unit: Unit) -> bool:
        """Take a record up again whose directory is gone, or is a link of ours nobody remembers (the journal was lost):
        from the first home that has its manifest. False when it is here, or no home has it. Raises StoreError; Refused
        when the storage around it is gone too: a disk that is not mounted, or a project that moved."""
        if unit.state is not State.RESIDENT or is_directory(unit.directory):
            return False
        storage = os.path.dirname(os.path.dirname(unit.directory))
        if not is_directory(storage):
            raise Refused(
                f"{unit.uuid}: all of {os.fsdecode(storage)} is gone: mount its disk, or if the project was moved: "
                "runfs reindex"
            )
        for home in self._core.stores:
            try:
                with home.watched():
                    body = home.store().read(manifest_key(unit.uuid))
                    version = home.store().stat(manifest_key(unit.uuid)).version or ""
            except NotFound:
                continue
            found = replace(parse(body, unit.uuid), rows=self._pusher.rows(unit))  # ours, not the store's word
            self.adopt(found, home, version, body, unit.directory)
            log.warning("%s: its directory was gone; it is evicted now, its bytes are in %s", unit.uuid, home.name)
            return True
        return False

    # --- records that are only in a store ----------------------------------------------------------------------

    def adopt(self, manifest: Manifest, home: Home, version: str, body: bytes, directory: bytes) -> Unit:
        """Take up a record of which only a store has the bytes: evicted from the start."""
        journal, now = self._core.journal, time.time_ns()
        known = {file.path: Known(foreign(file), 0, 0) for file in manifest.files}
        journal.replace_known(manifest.uuid, known.values(), manifest.contents.values())
        journal.set_replicas(
            Replica(f.digest, home.name, manifest.uuid, f.key, 0, "") for f in manifest.files if f.kind == "file"
        )
        marks = rows_digest(manifest.rows)
        journal.set_home(HomeRow(manifest.uuid, home.name, manifest.generation, version, body, marks, now, now))
        row = UnitRow(manifest.uuid, "evicted", directory, b"", json.dumps(list(manifest.rows)), manifest.size, now)
        shadow.build(self._core.units.shadow_of(manifest.uuid), known, lambda _file: False, None)
        unit = self._core.units.adopt(manifest.uuid, directory)
        if unit.state is not State.EVICTED:
            self._core.units.enter(unit, State.EVICTED, row)
        else:
            journal.set_unit(row)
        if not os.path.lexists(directory):
            os.makedirs(os.path.dirname(directory), exist_ok=True)
            os.symlink(link_of(directory, self._core.link, unit.uuid), directory)
        return unit


def _adds_nothing(unit: Unit) -> bool:
    """Whether every file in a resident unit's shadow is an untouched placeholder, or the directory has it too."""
    for seen in walk(unit.shadow):
        if seen.kind != "file":
            continue
        header = cache.read_header(os.path.join(unit.shadow, seen.path))
        if header is not None and not header.changed:
            continue
        try:
            real = os.lstat(os.path.join(unit.directory, seen.path))
        except FileNotFoundError:
            return False
        if (real.st_size, real.st_mtime_ns) != (seen.status.st_size, seen.status.st_mtime_ns):
            return False
    return True


def _refuse_occupied(unit: Unit) -> None:
    """What somebody put where our link was is his, and stays."""
    if os.path.lexists(unit.directory) and not os.path.islink(unit.directory):
        there = os.fsdecode(unit.directory)
        raise Refused(f"{unit.uuid}: not restored: something else stands at {there}; move it away and try again")
