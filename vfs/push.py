"""Bring a unit's bytes to its homes: digest what changed, upload what a home lacks, publish the manifest.

Used by the daemon's pusher, by `runfs push` and before an eviction. Blocks on disks and stores (each call within its
deadline). What a crash leaves at each step:

    digested, not recorded         digested again
    uploaded, not recorded         the object is found, read back and adopted, or the content goes to another key
    recorded, not published        the next push publishes; readers elsewhere see the old record, whole
    published, not recorded        the publish conflicts with itself; the manifest read from there equals ours: adopted

Order that makes this so: contents, then the manifest (the one commit point), then the journal.
"""

import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from blake3 import blake3

from vfs import cache, faults
from vfs.core import Core, Home, data_key, manifest_key, plain_key
from vfs.errors import Conflict, NotFound, RunfsError, WrongBytes
from vfs.hydrate import Hydrator, read_back
from vfs.journal import Home as HomeRow
from vfs.journal import Known, Replica
from vfs.manifest import Content, File, Manifest, Merge, dump, merge, parse, same_tree
from vfs.scan import Changing, Scan, open_file, walk
from vfs.scan import scan as scan_unit
from vfs.stores.protocol import Stat
from vfs.taking import take
from vfs.units import Unit

log = logging.getLogger(__name__)

SMALL = 8 << 20  # bytes; up to here a content is one request, with its md5 to compare
_SMALL_AT_ONCE = 16
_TRIES = 5  # to publish against another host that publishes too


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

        found = scan_unit(unit.base, before, content=self._core.content, hydrate=hydrate)
        if found.changed or len(found.known) != len(before):
            self._core.journal.replace_known(unit.uuid, found.known, found.contents.values())
        return found

    def push(self, unit: Unit, homes: Iterable[Home] | None = None) -> Outcome:
        """Bring everything of a unit to its homes. Store failures are in the outcome; local ones are raised."""
        with unit.moving:
            outcome = Outcome(unit.uuid)
            sequence = self._core.sequence(unit)
            os.close(unit.open_base())  # a record that is gone is told so
            found = self.scan(unit)
            faults.point("push.scanned")
            outcome.unsettled = found.unsettled
            rows = self.rows(unit)
            for home in self._core.homes if homes is None else homes:
                try:
                    outcome.pushed.append(self._push_to(unit, home, found, rows))
                except Changing as error:
                    outcome.unsettled += (b"",)
                    log.info("%s: %s", unit.uuid, error)
                except RunfsError as error:
                    outcome.failed.append((home.name, error))
            done = homes is None and self._core.homes and not outcome.failed and not outcome.unsettled
            if done:
                self._core.commit(lambda: setattr(outcome, "clean", self._core.units.mark_clean(unit, sequence)))
            return outcome

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

    def _push_to(self, unit: Unit, home: Home, found: Scan, rows: tuple[Mapping[str, Any], ...]) -> Pushed:
        began = time.monotonic()
        journal = self._core.journal
        row = journal.home(unit.uuid, home.name)
        previous = parse(row.manifest, unit.uuid) if row else self._theirs(unit, home)
        contents = {**journal.contents_of(unit.uuid), **found.contents}
        have = journal.replicas_of(unit.uuid, home.name)
        lacking: dict[bytes, list[Known]] = {}
        for known in found.known:
            if known.file.kind == "file" and known.file.digest not in have:
                lacking.setdefault(known.file.digest, []).append(known)
        uploads = Uploads(self._core, unit, home, contents, _plain_taken(previous), lacking)
        todo = [same[0] for same in lacking.values()]
        if unit.evicted:
            self._make_whole(unit, todo)
        have |= self._upload(uploads, todo)
        faults.point("push.recorded")
        ours = Manifest(unit.uuid, (row.generation if row else 0) + 1, _with_keys(found.files, have), contents, rows)
        if row is not None and previous is not None and same_tree(previous, ours) and previous.rows == ours.rows:
            return Pushed(home.name, 0, 0)
        clashes = self._publish(unit, home, row, previous if row else None, ours)
        size = sum(known.file.size for known in todo)
        self._core.moves.measured(size, time.monotonic() - began)
        digest = blake3(dump(ours)).hexdigest()
        journal.add_receipt("push", unit.uuid, home.name, len(todo), size, digest, {"generation": ours.generation})
        return Pushed(home.name, len(todo), size, clashes)

    def _upload(self, uploads: "Uploads", todo: list[Known]) -> dict[bytes, Replica]:
        """Upload contents: small ones many at once, large ones one after the other (each is parallel in itself)."""
        small = [known for known in todo if known.file.size <= SMALL]
        large = [known for known in todo if known.file.size > SMALL]
        done: dict[bytes, Replica] = {}
        futures = [self._pool.submit(uploads.small, known) for known in small]
        errors: list[BaseException] = []
        for future in futures:
            try:
                replica = future.result()
                done[replica.digest] = replica
            except (RunfsError, OSError) as error:
                errors.append(error)
        self._core.journal.set_replicas(done.values())
        if errors:
            raise errors[0] if isinstance(errors[0], RunfsError) else Changing(str(errors[0]))
        for known in large:
            replica = uploads.large(known)
            self._core.journal.set_replicas([replica])
            done[replica.digest] = replica
        return done

    def _make_whole(self, unit: Unit, todo: Iterable[Known]) -> None:
        """Bring what another home has, for a home that lacks it."""
        for known in todo:
            fd = open_file(unit.base, known.file.path, os.O_RDONLY)
            try:
                if cache.read_header(fd) is not None:
                    self._hydrator.complete(fd, unit.uuid, known.file.path)
            finally:
                os.close(fd)

    def _theirs(self, unit: Unit, home: Home) -> Manifest | None:
        """The manifest a store already has of a record we never pushed there."""
        try:
            with home.watched():
                return parse(home.store().read(manifest_key(unit.uuid)), unit.uuid)
        except NotFound:
            return None

    def _publish(
        self, unit: Unit, home: Home, row: HomeRow | None, base: Manifest | None, ours: Manifest
    ) -> tuple[tuple[bytes, bytes], ...]:
        """Commit: the manifest replaces the version we built on, or is merged with what another host made of it.

        What was written is read back at once: that proves it, and gives its version even where a write does not.
        """
        version = row.version if row else None
        clashes: tuple[tuple[bytes, bytes], ...] = ()
        for _try in range(_TRIES):
            body = dump(ours)
            try:
                with home.watched():
                    self._write_manifest(home, manifest_key(unit.uuid), body, version)
                faults.point("push.published")
            except Conflict:
                log.info("%s: %s has another version; merging", unit.uuid, home.name)
            read, version = self._read_manifest(home, unit.uuid)
            if read is None:
                continue
            if read != body:
                merged = self._merge(unit, home, base, ours, parse(read, unit.uuid))
                ours, base = merged.manifest, parse(read, unit.uuid)
                clashes = (*clashes, *merged.clashes)
                continue
            now = time.time_ns()
            home.was_used()
            faults.point("push.read")
            self._core.journal.set_home(
                HomeRow(unit.uuid, home.name, ours.generation, version or "", body, rows_digest(ours.rows), now, now)
            )
            return clashes
        raise Conflict(f"{home.name}: another host publishes {unit.uuid} again and again; runfs goes on trying")

    def _write_manifest(self, home: Home, key: str, body: bytes, version: str | None) -> None:
        store = home.store()
        if not store.info().conditional_write:
            store.write(key, body)
        elif version:
            store.write(key, body, if_version=version)
        else:
            store.write(key, body, if_absent=True)

    def _read_manifest(self, home: Home, uuid: str) -> tuple[bytes | None, str | None]:
        """The manifest in a store and its version, None where it is absent or changed while we looked."""
        store, key = home.store(), manifest_key(uuid)
        try:
            with home.watched():
                before = store.stat(key).version
                body = store.read(key)
                settled = store.stat(key).version == before
        except NotFound:
            return None, None
        return (body if settled else None), before

    def _merge(self, unit: Unit, home: Home, base: Manifest | None, ours: Manifest, theirs: Manifest) -> Merge:
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
        if merged.taken:

            def complete(fd: int, path: bytes) -> None:
                self._hydrator.complete(fd, unit.uuid, path)

            take(unit, merged.taken, self._core.journal.known(unit.uuid), complete)
            unit.note_change()
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


def _proof_of(stat: Stat) -> tuple[int, str]:
    """When and how an upload was proven: the store's own checksum equals that of what was sent, or not yet."""
    return (time.time_ns(), f"{stat.checksum[0]} of the store") if stat.verified and stat.checksum else (0, "")


def rows_digest(rows: Iterable[Mapping[str, Any]]) -> str:
    """A short mark of index rows, to see whether they changed since they were published."""
    ordered = sorted(rows, key=lambda row: str(row["record_id"]))
    return blake3(json.dumps(ordered, sort_keys=True).encode()).hexdigest(16)


def _plain_taken(previous: Manifest | None) -> frozenset[str]:
    return frozenset(file.key for file in previous.files) if previous else frozenset()


def _with_keys(files: Iterable[File], replicas: Mapping[bytes, Replica]) -> tuple[File, ...]:
    keyed = (replace(file, key=replicas[file.digest].key) if file.kind == "file" else file for file in files)
    return tuple(sorted(keyed, key=lambda file: file.path))


@dataclass(frozen=True, slots=True)
class Uploads:
    """Uploading contents of one unit to one home."""

    core: Core
    unit: Unit
    home: Home
    contents: Mapping[bytes, Content]
    taken: frozenset[str]
    lacking: Mapping[bytes, Sequence[Known]]  # by digest: every path with this content

    def small(self, known: Known) -> Replica:
        """Upload up to `SMALL` bytes in one request. Proven at once where the store keeps an md5."""
        file = known.file
        data = self._read_all(file)
        if len(data) != file.size or blake3(data).digest() != file.digest:
            raise Changing(f"{os.fsdecode(file.path)} changed while it was pushed")

        def write(key: str, if_absent: bool) -> tuple[int, str]:
            with self.home.watched():
                stat = self.home.store().write(key, data, if_absent=if_absent)
            return _proof_of(stat)

        return self._place(file, write)

    def large(self, known: Known) -> Replica:
        """Stream a file up, digesting what is sent: what arrived there is what the manifest says, or it is removed."""
        file = known.file
        fd = open_file(self.unit.base, file.path, os.O_RDONLY)
        try:
            return self._place(file, lambda key, if_absent: self._stream(fd, file, key, if_absent))
        finally:
            os.close(fd)

    def _stream(self, fd: int, file: File, key: str, if_absent: bool) -> tuple[int, str]:
        sent = blake3()
        position = 0

        def source(offset: int, length: int) -> bytes:
            nonlocal position
            data = os.pread(fd, length, offset)
            if offset == position and len(data) == length:
                sent.update(data)
                position += length
            return data

        name = self.home.name
        with self.core.moves.move("push", self.unit.uuid, file.path, name, file.size) as move, self.home.watched():
            stat = self.home.store().upload(key, source, file.size, if_absent=if_absent, progress=move.step)
        if position != file.size or sent.digest() != file.digest:
            self.home.store().delete(key)
            raise Changing(f"{os.fsdecode(file.path)} changed while it was pushed")
        return _proof_of(stat)

    def _read_all(self, file: File) -> bytes:
        fd = open_file(self.unit.base, file.path, os.O_RDONLY)
        try:
            return b"".join(iter(lambda: os.read(fd, SMALL), b""))
        finally:
            os.close(fd)

    def _place(self, file: File, write: Callable[[str, bool], tuple[int, str]]) -> Replica:
        """Write under the plain name if nothing is there, else adopt what is there, else under the digest."""
        uuid, store = self.unit.uuid, self.home.store()
        content = self.contents[file.digest]
        for key in (plain_key(uuid, file.path), data_key(uuid, file.digest)):
            if key in self.taken and key != data_key(uuid, file.digest):
                continue
            try:
                if store.info().conditional_write:
                    proven, how = write(key, True)
                elif self._exists(key):
                    raise Conflict(f"{key} exists")
                else:
                    proven, how = write(key, False)
            except Conflict:
                replica = Replica(file.digest, self.home.name, uuid, key, time.time_ns(), "read back")
                try:
                    read_back(self.home, replica, content)
                except (WrongBytes, NotFound):
                    continue
                self._place_others(file, key)
                return replica
            faults.point("push.uploaded")
            self._place_others(file, key)
            return Replica(file.digest, self.home.name, uuid, key, proven, how)
        # Its name is the digest of other bytes, so it is of no use to anybody: the one object that is replaced.
        log.warning("%s holds wrong bytes under %s; they are replaced", self.home.name, key)
        proven, how = write(key, False)
        return Replica(file.digest, self.home.name, uuid, key, proven, how)

    def _place_others(self, file: File, source: str) -> None:
        """The plain objects of other paths with the same content: any tool finds all of a record by its names."""
        store = self.home.store()
        for known in self.lacking[file.digest][1:]:
            key = plain_key(self.unit.uuid, known.file.path)
            if key in self.taken or self._exists(key):
                continue
            with suppress(Conflict), self.home.watched():
                if store.info().server_copy:
                    store.copy(source, key, if_absent=store.info().conditional_write)
                elif file.size <= SMALL and blake3(data := self._read_all(file)).digest() == file.digest:
                    store.write(key, data, if_absent=store.info().conditional_write)

    def _exists(self, key: str) -> bool:
        try:
            with self.home.watched():
                self.home.store().stat(key)
        except NotFound:
            return False
        return True
