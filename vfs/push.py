"""Bring a unit's bytes to its homes: digest what changed, upload what a home lacks, publish the manifest.

Used by the daemon's pusher, by `runfs push` and before an eviction. Blocks on disks and stores (each call within its
deadline). What a crash leaves at each step:

    digested, not recorded         digested again
    uploaded, not recorded         the object is found, read back and adopted, or the content goes to another key
    recorded, not published        the next push publishes; readers elsewhere see the old record, whole
    published, not recorded        the publish conflicts with itself; what we meant to publish is known: it is our own,
                                   and what changed here since goes on top of it

Order that makes this so: contents, then the manifest (the one commit point), then the journal.
"""

import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from blake3 import blake3

from vfs import cache, faults
from vfs.core import Core, Home
from vfs.errors import NotFound, Refused, RunfsError
from vfs.events import Event
from vfs.hydrate import Hydrator
from vfs.journal import Home as HomeRow
from vfs.journal import Journal, Known, Replica
from vfs.living import live_record
from vfs.manifest import Content, File, Manifest, Merge, dump, merge, parse, parse_ours, same_tree
from vfs.scan import Changing, Scan, open_file, walk
from vfs.scan import scan as scan_unit
from vfs.taking import take
from vfs.trust import conflicts, owners
from vfs.trust.kept import with_quarantined
from vfs.units import Unit
from vfs.uploads import ADOPTED, Mover, Placed, Uploads
from vfs.versions import kept as versions
from vfs.versions import pruning
from vfs.versions.journal import Transaction
from vfs.versions.transactions import end_commit, why_held
from vfs.wire import Intents, data_key, keys_in, lacking_in, publish, their_manifest, with_keys

log = logging.getLogger(__name__)

_SMALL_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class Pushed:
    """What a push did at one store. `size` (bytes) and `files` count what was uploaded."""

    store: str
    files: int
    size: int
    clashes: tuple[tuple[bytes, bytes], ...] = ()


@dataclass(slots=True)
class Outcome:
    """A push of one unit: what each store took, what failed where, and whether everything is now in the homes."""

    uuid: str
    pushed: list[Pushed] = field(default_factory=list)
    failed: list[tuple[str, RunfsError]] = field(default_factory=list)
    unsettled: tuple[bytes, ...] = ()
    clean: bool = False


class Pusher:
    """Pushes units. One push of a unit at a time; several units in parallel are fine."""

    def __init__(self, core: Core, hydrator: Hydrator) -> None:
        self._core = core
        self._hydrator = hydrator
        self._pool = ThreadPoolExecutor(_SMALL_AT_ONCE, "push")
        self._untold: dict[str, list[Event]] = {}  # what commits have set and deleted, until they have ended

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def scan(self, unit: Unit) -> Scan:
        """Digest what changed in a unit and record it. Raises OSError, NoReplica, DamagedRecord."""
        before = self._core.journal.known(unit.uuid)
        if unit.evicted and not self._core.journal.is_dirty(unit.uuid):
            _settle_times(unit.base, before)

        def hydrate(path: bytes) -> None:
            fd = open_file(unit.base, path, os.O_RDONLY)
            try:
                self._hydrator.complete(fd, unit.uuid, path)
            finally:
                os.close(fd)

        contents = self._core.journal.contents_of(unit.uuid)

        def content(digest: bytes) -> Content | None:
            return contents.get(digest) or self._core.content(digest)

        found = scan_unit(unit.base, before, content=content, hydrate=hydrate if unit.evicted else None)
        if found.changed or len(found.known) != len(before):
            self._core.journal.replace_known(unit.uuid, found.known, found.contents.values())
        return found

    def push(self, unit: Unit, homes: Iterable[Home] | None = None, *, notes: str = "") -> Outcome:
        """Bring everything of a unit to its homes; what is published carries `notes`. Store failures are in the
        outcome; local ones are raised. Raises Refused while a transaction of it is open."""
        with unit.moving:
            held = self._core.transactions.get(unit.uuid)
            if held is not None and held.state != "committing":
                raise Refused(f"{unit.uuid}: {why_held(held)}")
            outcome = Outcome(unit.uuid)
            sequence = self._core.sequence(unit)
            os.close(unit.open_base())  # a record that is gone is told so
            found, lost = with_quarantined(self._core, unit, self.scan(unit))
            faults.point("push.scanned")
            outcome.unsettled = found.unsettled
            rows = self.rows(unit)
            interim = held is None and bool(found.unsettled or unit.writers or live_record(self._core, unit))
            with self._telling_after(held):
                for home in self._core.homes if homes is None else homes:
                    try:
                        said = held.notes if held and self._is_due(held, home) else notes
                        publishing = _Publishing(rows, said, interim, lost)
                        outcome.pushed.append(self._push_to(unit, home, found, publishing))
                    except Changing as error:
                        outcome.unsettled += (b"",)
                        log.info("%s: %s", unit.uuid, error)
                    except RunfsError as error:
                        outcome.failed.append((home.name, error))
                if held is not None and homes is None and len(outcome.pushed) == len(self._core.homes):
                    end_commit(self._core, held)
            done = homes is None and self._core.homes and not outcome.failed and not outcome.unsettled
            if done:
                self._core.commit(lambda: setattr(outcome, "clean", self._core.units.mark_clean(unit, sequence)))
            return outcome

    @contextmanager
    def _telling_after(self, held: Transaction | None) -> Iterator[None]:
        """What a commit sets and deletes is told after its end, however many pushes it takes."""
        if held is None:
            yield
            return
        own = (f"{held.uuid}/", f".runfs/{held.uuid}/")
        with self._core.events.holding(lambda event: event.key.startswith(own)) as told:
            try:
                yield
            finally:
                self._untold.setdefault(held.uuid, []).extend(told)
        if held.uuid not in self._core.transactions:
            for event in self._untold.pop(held.uuid):
                self._core.events.publish(event)

    def rows(self, unit: Unit) -> tuple[Mapping[str, Any], ...]:
        """The index rows of a unit: what goes into its manifest.

        Those of an evicted unit are kept in the journal too, and one that the index has lost is taken from there.
        """
        uuids = [unit.uuid, *(record.uuid for record in self._core.index.nested(unit.uuid))]
        rows = {str(row["record_id"]): row for row in self._core.index.rows(uuids)}
        kept = self._core.journal.unit(unit.uuid) if unit.evicted else None
        if kept is not None:
            before = json.loads(kept.rows)
            rows = {row["record_id"]: row for row in before} | rows
            after = [rows[uuid] for uuid in sorted(rows)]
            if after != before:
                self._core.journal.keep_rows(unit.uuid, json.dumps(after))
        return tuple(rows[uuid] for uuid in sorted(rows))

    def _is_due(self, held: Transaction, home: Home) -> bool:
        """Whether a home does not have what a transaction's commit publishes yet."""
        row = self._core.journal.home(held.uuid, home.name)
        return row is None or row.generation <= held.numbers.get(home.name, 0)

    def _push_to(self, unit: Unit, home: Home, found: Scan, publishing: "_Publishing") -> Pushed:
        began = time.monotonic()
        journal = self._core.journal
        row = journal.home(unit.uuid, home.name)
        previous = parse_ours(row.manifest, unit.uuid) if row else their_manifest(home, unit.uuid)
        contents = {**journal.contents_of(unit.uuid), **found.contents}
        contents |= {digest: lost for digest in publishing.lost if (lost := journal.content(digest)) is not None}
        have, unsure = self._have(unit, home, found, previous)
        have = {digest: data_key(unit.uuid, digest) for digest in publishing.lost} | have
        lacking = lacking_in(found.files, have)
        todo = [same[0] for same in lacking.values()]
        if unit.evicted:
            self._make_whole(unit, todo)
        moving = self._shown(unit, home)
        renew_s = self._core.settings.versions.grace / 2
        uploads = Uploads(home, unit.uuid, unit.base, contents, keys_in(previous), lacking, moving, renew_s)

        def note(placed: Sequence[Placed]) -> None:
            self._note(unit, home, placed)
            unsure.update({each.key: each.digest for each in placed if previous and each.how == ADOPTED})

        have |= uploads.run(self._pool, note)
        faults.point("push.recorded")
        ours = publishing.manifest(unit.uuid, with_keys(found.files, have), contents)
        ours = owners.marked(self._core, unit, ours, previous)
        if row is not None and row.proven_ns and previous is not None and _is_there(previous, ours):
            return Pushed(home.name, 0, 0)
        ours = replace(ours, generation=self._number(unit, home, previous, ours))
        clashes = self._publish(unit, home, row, previous if row else None, ours)
        self._look_after(unit, home, unsure)
        size = sum(file.size for file in todo)
        self._core.moves.measured(size, time.monotonic() - began)
        digest = blake3(dump(ours)).hexdigest()
        journal.add_receipt("push", unit.uuid, home.name, len(todo), size, digest, {"generation": ours.generation})
        pruning.tidy(self._core, home, unit.uuid)
        return Pushed(home.name, len(todo), size, clashes)

    def _have(
        self, unit: Unit, home: Home, found: Scan, previous: Manifest | None
    ) -> tuple[dict[bytes, str], dict[str, bytes]]:
        """Which contents a home has (digest -> key), and which of these objects its manifest does not name (key ->
        digest): another host may be sweeping them, unless they were written lately."""
        replicas = self._core.journal.replicas_of(unit.uuid, home.name)
        named = keys_in(previous)
        have = {digest: r.key for digest, r in replicas.items() if previous is None or r.key in named}
        unsure: dict[str, bytes] = {}
        for digest, same in lacking_in(found.files, have).items():
            if digest in replicas and _is_fresh(home, replicas[digest], same[0].size, self._core):
                have[digest] = replicas[digest].key
                unsure[replicas[digest].key] = digest
        return have, unsure

    def _number(self, unit: Unit, home: Home, previous: Manifest | None, ours: Manifest) -> int:
        """The number of the version to be published: larger than any that this home ever had, and the one another home
        has of the same state."""
        journal = self._core.journal
        rows = {row.store: row for row in journal.homes(unit.uuid)}
        before = [version.number for version in journal.versions(unit.uuid, home.name)]
        before += [previous.generation] if previous else versions.numbers(home, unit.uuid)
        least = max(before, default=0) + 1
        latest = max(rows.values(), key=lambda row: row.generation, default=None)
        if latest is None or latest.generation < least:
            return least
        if latest.store != home.name and versions.same_state(parse(latest.manifest, unit.uuid), ours):
            return latest.generation
        return latest.generation + 1

    def _look_after(self, unit: Unit, home: Home, unsure: Mapping[str, bytes]) -> None:
        """Objects that no manifest named until now: another host that swept at this very moment did not know that they
        are needed. Raises Changing: then the next push brings them again."""
        for key in sorted(versions.lost(home, unit.uuid, unsure)):
            self._core.journal.forget_replica(unsure[key], home.name, unit.uuid)
            self._core.journal.forget_home(unit.uuid, home.name)
            raise Changing(f"{key} is being swept from {home.name}; it is pushed again")

    def _note(self, unit: Unit, home: Home, placed: Sequence[Placed]) -> None:
        """Record what a home holds now."""
        self._core.journal.set_replicas(
            Replica(each.digest, home.name, unit.uuid, each.key, each.proven_ns, each.how) for each in placed
        )

    def _shown(self, unit: Unit, home: Home) -> Mover:
        """Shows large files on their way to a home as moves."""

        def moving(path: bytes, size: int) -> AbstractContextManager[Callable[[int], None]]:
            name = path.decode("utf-8", "replace")
            return self._core.events.progress("push", name, size, uuid=unit.uuid, store=home.name)

        return moving

    def _make_whole(self, unit: Unit, todo: Iterable[File]) -> None:
        """Bring what another home has, for a home that lacks it."""
        for file in todo:
            fd = open_file(unit.base, file.path, os.O_RDONLY)
            try:
                if cache.read_header(fd) is not None:
                    self._hydrator.complete(fd, unit.uuid, file.path)
            finally:
                os.close(fd)

    def _publish(
        self, unit: Unit, home: Home, row: HomeRow | None, base: Manifest | None, ours: Manifest
    ) -> tuple[tuple[bytes, bytes], ...]:
        """Commit, and record what the store has now."""

        def merged(base: Manifest | None, ours: Manifest, theirs: Manifest) -> Merge:
            return self._merge(unit, home, base, ours, theirs)

        def kept_one(earlier: Manifest) -> None:
            self._core.journal.add_version(home.name, earlier)

        intents = _Intents(self._core.journal, unit.uuid, home.name)
        done = publish(home, ours, base, row.version if row else None, merged, kept_one, intents)
        now = time.time_ns()
        home.was_used()
        faults.point("push.read")
        generation, marks = done.manifest.generation, rows_digest(done.manifest.rows)
        self._core.journal.set_home(HomeRow(unit.uuid, home.name, generation, done.version, done.body, marks, now, now))
        intents.clear()
        pruning.supersede(self._core.journal, home.name, done.dropped, done.manifest)
        return done.clashes

    def _merge(self, unit: Unit, home: Home, base: Manifest | None, ours: Manifest, theirs: Manifest) -> Merge:
        if base is not None and theirs.generation <= base.generation and not same_tree(theirs, base):
            base = None  # an older one was put back there: what it lacks was not removed by anybody
        merged = merge(base, ours, theirs)
        self._core.journal.add_contents(theirs.contents.values())
        have = self._core.journal.replicas_of(unit.uuid, home.name)  # where ours are is known better than by hearsay
        self._core.journal.set_replicas(
            Replica(file.digest, home.name, unit.uuid, file.key, 0, "")
            for file in theirs.files
            if file.kind == "file" and file.digest not in have
        )
        for path, second in merged.clashes:
            log.warning("%s: %r was changed by another host too; theirs is kept as %r", unit.uuid, path, second)
        stay: list[bytes] = []
        if merged.taken or merged.removed:

            def complete(fd: int, path: bytes) -> None:
                self._hydrator.complete(fd, unit.uuid, path)

            take(unit, merged.taken, self._core.journal.known(unit.uuid), complete)
            stay = conflicts.remove_theirs(self._core, unit, merged)
            unit.note_change()
            for tell in self._core.content_changed:
                tell(unit)
        conflicts.note(self._core, unit, home.name, base, theirs, merged, stay)
        return merged


def _settle_times(base: bytes, known: Mapping[bytes, Known]) -> None:
    """Bytes that come or go change a placeholder's times, until they are set right: a process that was killed in
    between has not. Of a unit that nobody changed, the times are those that were digested."""
    for seen in walk(base):
        item = known.get(seen.path)
        if item is None or seen.kind != "file" or seen.status.st_mtime_ns == item.file.mtime_ns:
            continue
        fd = open_file(base, seen.path, os.O_RDONLY)
        try:
            header = cache.read_header(fd)
            if header is not None and not header.changed and header.digest == item.file.digest:
                os.utime(fd, ns=(seen.status.st_atime_ns, item.file.mtime_ns))
        finally:
            os.close(fd)


class _Intents(Intents):
    """Kept in the journal until the publish is recorded."""

    def __init__(self, journal: Journal, uuid: str, store: str) -> None:
        self._journal = journal
        self._name = f"publishing {uuid} {store}"
        self._before = (journal.note(self._name) or "").split()
        self._all = list(self._before)

    def add(self, body: bytes) -> None:
        self._all.append(blake3(body).hexdigest())
        self._journal.set_note(self._name, " ".join(self._all))

    def has(self, body: bytes) -> bool:
        return blake3(body).hexdigest() in self._before

    def clear(self) -> None:
        self._journal.drop_note(self._name)


@dataclass(frozen=True, slots=True)
class _Publishing:
    """What a manifest says beside the files."""

    rows: tuple[Mapping[str, Any], ...]
    notes: str
    interim: bool
    lost: frozenset[bytes] = frozenset()  # contents in quarantine: named, as no place has them to be uploaded from

    def manifest(self, uuid: str, files: tuple[File, ...], contents: Mapping[bytes, Content]) -> Manifest:
        return Manifest(uuid, 0, files, contents, self.rows, time.time_ns(), self.notes, self.interim)


def _is_there(previous: Manifest, ours: Manifest) -> bool:
    """Whether a home's manifest says all of ours already, also that it is no longer being written."""
    return versions.same_state(previous, ours) and (ours.interim or not previous.interim)


def _is_fresh(home: Home, replica: Replica, size: int, core: Core) -> bool:
    """Whether an object is there and too new to be swept."""
    try:
        with home.watched():
            stat = home.store().stat(replica.key)
    except NotFound:
        return False
    age_ns = time.time_ns() - stat.modified_ns if stat.modified_ns is not None else 0
    return stat.size == size and age_ns < core.settings.versions.grace / 2 * 1e9


def rows_digest(rows: Iterable[Mapping[str, Any]]) -> str:
    """A short mark of index rows, to see whether they changed since they were published."""
    ordered = sorted(rows, key=lambda row: str(row["record_id"]))
    return blake3(json.dumps(ordered, sort_keys=True).encode()).hexdigest(16)
