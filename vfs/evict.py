"""Drop a unit's local bytes once its homes are proven to hold them, and bring them back for good (restore).

Used by `runfs evict`, the free-space policy and `runfs hydrate --restore`. Blocks on disks and stores; the moment at
which the unit changes place runs through `core.commit`, where no file operation runs at the same time.

What a crash leaves, and what `recover` does at the next start:

    before the journal says 'evicting'   a shadow nobody knows of: replaced or removed
    'evicting', still a real directory   the exchange did not happen: shadow and second name are removed
    'evicting', now a link               the exchange happened: what was set aside is compared and removed
    'restoring', still a link            the whole copy beside it is removed
    'restoring', a real directory        the exchange happened: link and shadow are removed

Nothing set aside is removed unless it is the file that was proven, untouched; anything else is moved into the shadow,
where the mount shows it, and pushed.
"""

import json
import logging
import os
import stat
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from blake3 import blake3

from vfs import cache, faults, linux, shadow
from vfs.core import Core, Home, manifest_key, quietly_remove
from vfs.discard import Discard
from vfs.errors import DamagedRecord, NotFound, Refused, RunfsError, WrongBytes
from vfs.format import is_live
from vfs.hydrate import Hydrator, read_back
from vfs.journal import Home as HomeRow
from vfs.journal import Known, Replica, UnitRow
from vfs.leases import Leases
from vfs.manifest import File, Manifest, parse
from vfs.push import Pusher, rows_digest
from vfs.residency import RECOVERY, State
from vfs.scan import open_file, walk
from vfs.units import Unit, link_of, set_aside_name

log = logging.getLogger(__name__)
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


class Evictor:
    """Evicts and restores units."""

    def __init__(self, core: Core, pusher: Pusher, hydrator: Hydrator) -> None:
        self._core = core
        self._pusher = pusher
        self._hydrator = hydrator
        self._pool = ThreadPoolExecutor(8, "prove")

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    # --- decide ------------------------------------------------------------------------------------------------

    def stays(self, unit: Unit, *, pinned: set[str] | None = None) -> Stays | None:
        """The first reason not to evict a unit that can be told without a store and without opening its files."""
        if not self._core.homes:
            return Stays("no store is configured", "runfs mount ... --store URL, or [stores.NAME] in the configuration")
        if self._core.settings.mountpoint is None and self._core.journal.note("mountpoint") is None:
            return Stays("it was never mounted", "runfs mount MOUNTPOINT first: its place is taken by a link into it")
        if unit.uuid in (self._core.journal.pins() if pinned is None else pinned):
            return Stays("pinned", f"runfs unpin {unit.uuid}")
        live = self.live(unit)
        if live:
            return Stays(f"live ({live})" if live != unit.uuid else "live", "wait until the run has finished")
        if unit.writers:
            return Stays("open for writing through the mount", "close it")
        if unit.handles:
            return Stays("open through the mount", "close it")
        return None

    def live(self, unit: Unit) -> str | None:
        """The uuid of the unit or a nested record whose run is live."""
        for uuid, path in self._records(unit):
            if is_live(os.path.join(unit.base, path) if path else unit.base, time.time()):
                return uuid
        return None

    def _records(self, unit: Unit) -> list[tuple[str, bytes]]:
        records = [(unit.uuid, b"")]
        root = self._core.index.get(unit.uuid)
        for nested in self._core.index.nested(unit.uuid) if root else ():
            with suppress(DamagedRecord):
                assert root is not None
                records.append((nested.uuid, self._core.units.relative(root, nested)))
        return records

    # --- prove -------------------------------------------------------------------------------------------------

    def prove(self, unit: Unit, known: Mapping[bytes, Known]) -> dict[str, Any]:
        """Show that at least `min_copies` homes hold exactly `known`. Proofs younger than the configured age count.

        Raises Refused saying which home lacks what.
        """
        proof: dict[str, Any] = {}
        said: list[str] = []
        for home in self._core.homes:
            try:
                proof[home.name] = self._prove_in(unit, home, known)
            except RunfsError as error:
                said.append(f"{home.name}: {error}")
        if len(proof) < self._core.settings.min_copies:
            raise Refused(
                f"{unit.uuid}: not evicted: {len(proof)} of {self._core.settings.min_copies} copies are proven"
                + (f" ({'; '.join(said)})" if said else "")
            )
        return proof

    def _prove_in(self, unit: Unit, home: Home, known: Mapping[bytes, Known]) -> dict[str, Any]:
        row = self._core.journal.home(unit.uuid, home.name)
        if row is None:
            raise Refused(f"it was not pushed there yet; runfs push {unit.uuid}")
        published = parse(row.manifest, unit.uuid)
        _covers(published, known)
        oldest = time.time_ns() - int(self._core.settings.proof.max_age * 1e9)
        try:
            with home.watched():
                body = home.store().read(manifest_key(unit.uuid))
        except NotFound:
            self._doubt(unit, home)
            raise Refused(f"its manifest is gone from there; runfs push {unit.uuid} brings it again") from None
        if body != row.manifest:
            raise Refused(f"another host changed the record there; runfs push {unit.uuid} merges it")
        replicas = self._core.journal.replicas_of(unit.uuid, home.name)
        wanted = {item.file.digest for item in known.values() if item.file.kind == "file"}
        if not wanted <= replicas.keys():
            raise Refused(f"it lacks some of its bytes; runfs push {unit.uuid}")
        stale = [replicas[digest] for digest in wanted if replicas[digest].proven_ns < oldest]
        fresh = list(self._pool.map(lambda replica: self._prove_replica(home, replica), stale))
        self._core.journal.set_replicas(fresh)
        replicas |= {replica.digest: replica for replica in fresh}
        return _said([replicas[digest] for digest in wanted])

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

    # --- evict -------------------------------------------------------------------------------------------------

    def evict(self, unit: Unit) -> Evicted:
        """Push and prove what is not yet, then drop the unit's local bytes. Raises Refused saying why not, and
        StoreError, Full; in each case nothing has been dropped."""
        with unit.moving:
            if (stays := self.stays(unit)) is not None:
                raise Refused(f"{unit.uuid}: not evicted: {stays.reason}; {stays.advice}")
            sequence = self._core.sequence(unit)
            self._finish_discard(unit)
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
                    freed = self._drop_cached(unit, known, leases, proof)
                else:
                    freed = self._exchange(unit, known, leases, sequence, proof)
            self._look_again(unit, known)  # not under the leases, which it would break
            return Evicted(unit.uuid, freed, len(known), proof)

    def _look_again(self, unit: Unit, known: Mapping[bytes, Known]) -> None:
        """The files have other inodes now. What was kept is the very file that a process may have open by now."""
        found = self._pusher.scan(unit)
        if found.unsettled or {f.path: f.digest for f in found.files} != {p: k.file.digest for p, k in known.items()}:
            self._core.units.mark_dirty(unit, "changed while it was evicted")

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
        return file.size <= self._core.settings.cache.keep_small

    def _exchange(
        self,
        unit: Unit,
        known: Mapping[bytes, Known],
        leases: Leases,
        sequence: int,
        proof: Mapping[str, Any],
    ) -> int:
        before = shadow.used_bytes(unit.directory)
        place = unit.shadow
        kept = shadow.build(place, known, self._keeps, unit.directory, leases.descriptors())
        aside = set_aside_name(unit)
        row = self._row(unit, State.EVICTING, aside, known)
        faults.point("evict.built")
        try:
            self._sync(place, leases, kept)
            quietly_remove(aside)
            os.symlink(link_of(unit.directory, self._core.link, unit.uuid), aside)
            linux.sync_directory(os.path.dirname(aside))
            faults.point("evict.linked")
            self._core.commit(lambda: self._switch(unit, known, kept, leases, row, sequence))
        except BaseException:
            self._roll_back(unit, aside, place)
            raise
        linux.sync_directory(os.path.dirname(aside))
        self._show_times(unit, known)
        freed = max(before - shadow.used_bytes(place), 0)
        faults.point("evict.entered")
        self._receipt(unit, known, freed, proof)
        faults.point("evict.receipted")
        if self._discard(unit, aside, known, leases.descriptors()):
            faults.point("evict.discarded")
            self._core.journal.set_unit(self._row(unit, State.EVICTED, b"", known))
        return freed

    def _sync(self, place: bytes, leases: Leases, kept: Mapping[bytes, int]) -> None:
        """Make the shadow durable. What is linked into it is under our lease: opening it again would break that."""
        device, linked = os.stat(place).st_dev, set()
        for path, fd in leases.descriptors().items():
            status = os.fstat(fd)
            if (status.st_dev, status.st_ino) == (device, kept.get(path)):
                os.fsync(fd)
                linked.add(status.st_ino)
        shadow.sync(place, linked)

    def _switch(
        self,
        unit: Unit,
        known: Mapping[bytes, Known],
        kept: Mapping[bytes, int],
        leases: Leases,
        row: UnitRow,
        sequence: int,
    ) -> None:
        """The moment itself: compare for the last time, record the intent, exchange."""
        if unit.handles or unit.sequence != sequence or not leases.held():
            raise Refused(f"{unit.uuid}: not evicted: it came into use just now; try again when it is quiet")
        _compare(unit, known, kept)
        self._core.units.enter(unit, State.EVICTING, row)
        faults.point("evict.intended")
        linux.exchange(unit.directory, row.aside)
        faults.point("evict.exchanged")
        self._core.units.enter(unit, State.EVICTED, replace(row, state=State.EVICTED.value))

    def _roll_back(self, unit: Unit, aside: bytes, place: bytes) -> None:
        if os.path.islink(unit.directory):
            return  # the exchange happened: only what follows it failed, and recovery finishes that
        quietly_remove(aside)
        shadow.remove(place)
        if unit.state is State.EVICTING:
            self._core.units.enter(unit, State.RESIDENT, None)

    def _row(self, unit: Unit, state: State, aside: bytes, known: Mapping[bytes, Known]) -> UnitRow:
        uuids = [uuid for uuid, _path in self._records(unit)]
        rows = json.dumps(self._core.index.rows(uuids))
        size = sum(item.file.size for item in known.values())
        return UnitRow(unit.uuid, state.value, unit.directory, aside, rows, size, time.time_ns())

    def _show_times(self, unit: Unit, known: Mapping[bytes, Known]) -> None:
        """A file's ctime changed by our own doing; readers go on seeing what it was."""
        for seen in walk(unit.shadow):
            if seen.path in known and known[seen.path].ctime_ns:
                self._core.show_ctime(seen.status, known[seen.path].ctime_ns)

    def _discard(
        self, unit: Unit, aside: bytes, known: Mapping[bytes, Known], leased: Mapping[bytes, int] | None = None
    ) -> bool:
        """Remove what was set aside; False when something in it is in use and left for later."""

        def rescued() -> None:
            self._core.units.mark_dirty(unit, "changed while it was evicted")

        done = Discard(aside, unit.shadow, known, leased or {}, rescued).run()
        if not done:
            log.warning("%s: something in %s is in use; it is looked at again later", unit.uuid, os.fsdecode(aside))
        return done

    def _finish_discard(self, unit: Unit) -> None:
        """Remove what an earlier eviction had to leave. Raises Refused when it is still in use."""
        row = self._core.journal.unit(unit.uuid) if unit.evicted else None
        if row is None or not row.aside:
            return
        if not self._discard(unit, row.aside, self._core.journal.known(unit.uuid)):
            left = os.fsdecode(row.aside)
            raise Refused(f"{unit.uuid}: {left} is still being written to; try again when it is closed")
        self._core.journal.set_unit(replace(row, aside=b""))

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

    def _receipt(self, unit: Unit, known: Mapping[bytes, Known], freed: int, proof: Mapping[str, Any]) -> None:
        digest = blake3(b"".join(item.file.digest for item in known.values())).hexdigest()
        files = sum(item.file.kind == "file" for item in known.values())
        self._core.journal.add_receipt("evict", unit.uuid, "", files, freed, digest, proof)

    # --- restore -----------------------------------------------------------------------------------------------

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
                proof[home.name] = _said(found)
        self._receipt(unit, known, row.bytes, proof)

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
        for home in self._core.homes:
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
        known = {file.path: Known(file, 0, 0) for file in manifest.files}
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


def is_directory(path: bytes) -> bool:
    """Whether a real directory is there. A link is not followed: it may lead into the mount, which waits for us."""
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except OSError:
        return False


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


def _check_lengths(unit: Unit, known: Mapping[bytes, Known]) -> None:
    """Every path can be named where it is and where it goes. Raises Refused."""
    longest = max(map(len, known), default=0)
    before = max(map(len, (unit.directory, unit.shadow, set_aside_name(unit))))
    if before + 1 + longest >= _PATH_MAX:
        raise Refused(
            f"{unit.uuid}: not evicted: a path in it is {longest:,} bytes long, too long for this system with the "
            "cache's directory before it; give its directories shorter names"
        )


def _refuse_occupied(unit: Unit) -> None:
    """What somebody put where our link was is his, and stays."""
    if os.path.lexists(unit.directory) and not os.path.islink(unit.directory):
        there = os.fsdecode(unit.directory)
        raise Refused(f"{unit.uuid}: not restored: something else stands at {there}; move it away and try again")


def _said(replicas: list[Replica]) -> dict[str, Any]:
    """How and when copies were proven, for a receipt."""
    hows = sorted({replica.how for replica in replicas})
    return {"how": hows, "verified_at_ns": min((replica.proven_ns for replica in replicas), default=time.time_ns())}


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
