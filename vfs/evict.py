"""Drop a unit's local bytes once its homes are proven to hold them, and only then.

Used by `runfs evict` and the free-space policy. Blocks on disks and stores; the moment at
which the unit changes place runs through `core.commit`, where no file operation runs at the same time.

What a crash leaves, and what the next start does with it, is at the top of `vfs/restore.py`.

Nothing set aside is removed unless it is the file that was proven, untouched; anything else is moved into the shadow,
where the mount shows it, and pushed.
"""

import logging
import os
import stat
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

from vfs import cache, faults, linux, shadow
from vfs.core import quietly_remove
from vfs.errors import Refused
from vfs.journal import Known, UnitRow
from vfs.leases import Leases
from vfs.manifest import File
from vfs.proof import Prover
from vfs.residency import State
from vfs.restore import Restorer
from vfs.scan import walk
from vfs.units import Unit, link_of, set_aside_name
from vfs.versions.transactions import why_held

log = logging.getLogger(__name__)
_SYNCS = 8  # under way at once for one unit
_PATH_MAX = 4096  # bytes of a path in a system call, with the NUL at its end


@dataclass(frozen=True, slots=True)
class Stays:
    """Why a unit would not be evicted, and what to do about it."""

    reason: str
    advice: str


@dataclass(frozen=True, slots=True)
class Evicted:
    """What an eviction freed. `proof` says for each store how and when its copy was proven."""

    uuid: str
    bytes: int
    files: int
    proof: Mapping[str, Any] = field(default_factory=dict)


class Evictor(Prover, Restorer):
    """Evicts units, and with its parts proves, restores and recovers them."""

    # --- decide ------------------------------------------------------------------------------------------------

    def stays(self, unit: Unit, *, pinned: set[str] | None = None) -> Stays | None:
        """The first reason not to evict a unit that can be told without a store and without opening its files."""
        if not self._core.homes:
            return Stays("no store is configured", "runfs mount ... --store URL, or [stores.NAME] in the configuration")
        if self._core.settings.mountpoint is None and self._core.journal.note("mountpoint") is None:
            return Stays("it was never mounted", "runfs mount MOUNTPOINT first: its place is taken by a link into it")
        if unit.uuid in (self._core.journal.pins() if pinned is None else pinned):
            return Stays("pinned", f"runfs unpin {unit.uuid}")
        if self._core.journal.quarantined(unit.uuid):
            return Stays("a file of it is damaged", f"runfs verify --repair {unit.uuid}, or make the file again")
        if (held := self._core.transactions.get(unit.uuid)) is not None:
            return Stays("in a transaction", why_held(held))
        live = self.live(unit)
        if live:
            return Stays(f"live ({live})" if live != unit.uuid else "live", "wait until the run has finished")
        if unit.writers:
            return Stays("open for writing through the mount", "close it")
        if unit.handles:
            return Stays("open through the mount", "close it")
        return None

    # --- evict -------------------------------------------------------------------------------------------------

    def evict(self, unit: Unit) -> Evicted:
        """Push and prove what is not yet, then drop the unit's local bytes. Raises Refused saying why not, and
        StoreError, Full; in each case nothing has been dropped."""
        with unit.moving:
            if (stays := self.stays(unit)) is not None:
                raise Refused(f"{unit.uuid}: not evicted: {stays.reason}; {stays.advice}")
            if unit.dirty:
                self._settled(unit)  # others go on while it is uploaded
            with self._turns.mine():
                return self._evict(unit)

    def _evict(self, unit: Unit) -> Evicted:
        sequence = self._sequence(unit)
        self._finish_discard(unit)
        self._core.settle()  # what has just come back is noted first: noting it later would look like a change
        known = self._settled(unit)
        _check_lengths(unit, known)
        proof = self.prove(unit, known)
        faults.point("evict.proven")
        if self.live(unit):  # told by markers that are in `known`: what changes them from here on is noticed
            raise Refused(f"{unit.uuid}: not evicted: it has just become live; wait until the run has finished")
        self._core.settle()  # our own descriptors would look like somebody's
        with Leases(unit.uuid, unit.base, writable=unit.evicted) as leases:
            leases.take(known)
            faults.point("evict.leased")
            if unit.evicted:
                freed, sure = self._drop_cached(unit, known, leases, proof), False
            else:
                freed, sure = self._exchange(unit, known, leases, sequence, proof)
        if not sure:
            self._look_again(unit, known)  # not under the leases, which it would break
        return Evicted(unit.uuid, freed, len(known), proof)

    def _sequence(self, unit: Unit) -> int:
        with self._turns.away():
            return self._core.sequence(unit)

    def _settled(self, unit: Unit) -> dict[bytes, Known]:
        """What the unit holds, all of it in every home."""
        outcome = self._pusher.push(unit)
        reached = len(self._core.homes) - len(outcome.failed)
        if reached < self._core.settings.min_copies:
            name, error = outcome.failed[0]
            raise Refused(f"{unit.uuid}: not evicted: {name} does not hold all of it: {error}")
        if outcome.unsettled:
            path = os.fsdecode(outcome.unsettled[0]) or "a file"
            raise Refused(f"{unit.uuid}: not evicted: {path} is being written to; try again when it is finished")
        return self._core.journal.known(unit.uuid)

    def _keeps(self, file: File) -> bool:
        """Small files, and those with no room for what a placeholder says of itself."""
        taken = sum(len(name) + len(value) for name, value in file.attributes)
        return file.size <= self._core.settings.cache.keep_small or taken > cache.ATTRIBUTES_MOST

    def _exchange(
        self,
        unit: Unit,
        known: Mapping[bytes, Known],
        leases: Leases,
        sequence: int,
        proof: Mapping[str, Any],
    ) -> tuple[int, bool]:
        """Let the link take the directory's place, and remove what was there. The bytes freed, and whether what stands
        in the shadow is surely what was built."""
        place, aside = unit.shadow, set_aside_name(unit)
        built = shadow.build(place, known, self._keeps, unit.directory, leases.descriptors(), self._finish_new)
        row = self._row(unit, State.EVICTING, aside, known)
        faults.point("evict.built")
        try:
            self._sync(place, known, leases, built)
            quietly_remove(aside)
            os.symlink(link_of(unit.directory, self._core.link, unit.uuid), aside)
            self._sync_directory(os.path.dirname(aside))
            faults.point("evict.linked")
            self._core.units.enter(unit, State.EVICTING, row)
            faults.point("evict.intended")
            with self._turns.away():
                self._core.commit(lambda: self._switch(unit, known, built.kept, leases, row, sequence))
        except BaseException:
            self._roll_back(unit, aside, place)
            raise
        self._sync_directory(os.path.dirname(aside))
        self._show_times(known, built)
        freed = max(leases.used_bytes - built.used_bytes, 0)
        faults.point("evict.entered")
        with self._core.journal.transaction():
            self._core.journal.set_unit(replace(row, state=State.EVICTED.value))
            self._receipt(unit, known, freed, proof)
        faults.point("evict.receipted")
        done = self._discard(unit, aside, known, leases.descriptors(), built.kept)
        sure = done and _settle_kept(known, leases, built)
        if done:
            faults.point("evict.discarded")
            self._show_times(known, built)
            with self._core.journal.transaction():
                self._core.journal.set_unit(self._row(unit, State.EVICTED, b"", known))
                if sure:
                    self._core.journal.place_known(unit.uuid, built.made)
        return freed, sure

    def _finish_new(self, fresh: Sequence[int]) -> None:
        """Make files durable that were just made, and close them: several at once, which a disk takes as one."""
        with self._turns.away():
            for _done in self._syncs.map(_sync_and_close, [fresh[first::_SYNCS] for first in range(_SYNCS)]):
                pass

    def _sync(self, place: bytes, known: Mapping[bytes, Known], leases: Leases, built: shadow.Built) -> None:
        """Make durable what was linked into the shadow (by our descriptors: opening it again would break our leases),
        and all names in it."""
        with self._turns.away():
            for path, inode in built.kept.items():
                if inode == known[path].inode:  # else it was copied
                    os.fsync(leases.descriptors()[path])
            shadow.sync_directories(place, (path for path, item in known.items() if item.file.kind == "directory"))

    def _sync_directory(self, path: bytes) -> None:
        with self._turns.away():
            linux.sync_directory(path)

    def _switch(
        self,
        unit: Unit,
        known: Mapping[bytes, Known],
        kept: Mapping[bytes, int],
        leases: Leases,
        row: UnitRow,
        sequence: int,
    ) -> None:
        """The moment itself: compare for the last time, and exchange. The journal knows the intent."""
        if unit.handles or unit.sequence != sequence or not leases.held():
            raise Refused(f"{unit.uuid}: not evicted: it came into use just now; try again when it is quiet")
        _compare(unit, known, kept)
        linux.exchange(unit.directory, row.aside)
        faults.point("evict.exchanged")
        self._core.units.exchanged(unit)

    def _roll_back(self, unit: Unit, aside: bytes, place: bytes) -> None:
        if os.path.islink(unit.directory):
            return  # the exchange happened: only what follows it failed, and recovery finishes that
        quietly_remove(aside)
        shadow.remove(place)
        if unit.state is State.EVICTING:
            self._core.units.enter(unit, State.RESIDENT, None)

    def _show_times(self, known: Mapping[bytes, Known], built: shadow.Built) -> None:
        """A file's ctime changed by our own doing; readers go on seeing what it was."""
        shown = (
            (inode, ctime_ns, known[path].ctime_ns)
            for path, (inode, ctime_ns) in built.made.items()
            if known[path].ctime_ns
        )
        self._core.show_ctimes(built.device, shown)

    def _drop_cached(self, unit: Unit, known: Mapping[bytes, Known], leases: Leases, proof: Mapping[str, Any]) -> int:
        """The record is evicted already: drop what came back for reading."""
        local = {path: linux.data_bytes(fd) for path, fd in leases.descriptors().items()}
        drops = {path: size for path, size in local.items() if size and not self._keeps(known[path].file)}
        freed = sum(drops.values())
        if drops:
            self._receipt(unit, known, freed, proof)
        for path in drops:
            fd, file = leases.descriptors()[path], known[path].file
            shown = self._core.ctime(os.fstat(fd))
            cache.drop(fd, file.digest, file.size)
            self._core.show_ctime(os.fstat(fd), shown)
        for tell in self._core.content_changed:
            tell(unit)
        return freed


def _sync_and_close(descriptors: Sequence[int]) -> None:
    with ExitStack() as stack:
        for fd in descriptors:
            stack.callback(os.close, fd)
        for fd in descriptors:
            os.fsync(fd)


def _settle_kept(known: Mapping[bytes, Known], leases: Leases, built: shadow.Built) -> bool:
    """Note what kept files are now that their other names are gone; whether they are still what was proven, and nobody
    came to open one. Who comes later comes through the mount."""
    for path, inode in built.kept.items():
        if inode != known[path].inode:
            continue  # a copy of ours
        fd, file = leases.descriptors()[path], known[path].file
        status = os.fstat(fd)
        now = (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid, status.st_size, status.st_mtime_ns)
        if now != (file.mode, file.uid, file.gid, file.size, file.mtime_ns) or not linux.lease_held(fd):
            return False
        built.made[path] = (inode, status.st_ctime_ns)
    return True


def _check_lengths(unit: Unit, known: Mapping[bytes, Known]) -> None:
    """Every path can be named where it is and where it goes. Raises Refused."""
    longest = max(map(len, known), default=0)
    before = max(map(len, (unit.directory, unit.shadow, set_aside_name(unit))))
    if before + 1 + longest >= _PATH_MAX:
        raise Refused(
            f"{unit.uuid}: not evicted: a path in it is {longest:,} bytes long, too long for this system with the "
            "cache's directory before it; give its directories shorter names"
        )


def _compare(unit: Unit, known: Mapping[bytes, Known], kept: Mapping[bytes, int]) -> None:
    """Nothing appeared, vanished or changed since it was proven. Raises Refused naming the first difference."""
    left = set(known)
    for seen in walk(unit.directory):
        item = known.get(seen.path)
        left.discard(seen.path)
        if item is None:
            raise _changed(unit, seen.path, "appeared")
        if (seen.kind, seen.target) != (item.file.kind, item.file.target):
            raise _changed(unit, seen.path, "changed")
        if seen.kind != "file":
            continue
        linked = kept.get(seen.path) == seen.status.st_ino or seen.status.st_nlink > 1
        now = (seen.status.st_ino, seen.status.st_size, seen.status.st_mtime_ns)
        if now != (item.inode, item.file.size, item.file.mtime_ns) or not (linked or seen.matches(item)):
            raise _changed(unit, seen.path, "changed")
    if left:
        raise _changed(unit, min(left), "vanished")


def _changed(unit: Unit, path: bytes, what: str) -> Refused:
    return Refused(f"{unit.uuid}: not evicted: {os.fsdecode(path)} {what} just now; try again when it is quiet")
