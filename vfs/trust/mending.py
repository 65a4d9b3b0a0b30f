"""Make right what a scrub found wrong, from a place that has it right; quarantine what no place has. Used by the scrub.

Each change is one step at a time under the unit's lock, and what a crash leaves is found by the next scrub or push:

    a file in its directory     the right one is made beside it and exchanged with it in one step
    a file in the cache         its chunks are called away before they are dropped; a reader has them brought
    an object                   its replica is forgotten and the unit dirty: the next push brings it under another key
    a manifest                  what is there is kept beside it, then the published one is put back on condition

Damaged bytes are dropped only where nothing but the disk can have changed them (the ctime is that of the digest).
Otherwise, and where nothing right is left, they stay in the record as `<path>.damaged-<digest>`.
"""

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

from blake3 import blake3

from vfs import cache, faults, linux, shadow
from vfs.core import Core, Home
from vfs.errors import Refused
from vfs.hydrate import Hydrator
from vfs.journal import Known
from vfs.manifest import CHUNK, Content, File, digest_of
from vfs.scan import open_file
from vfs.taking import replaced_by, take
from vfs.trust.checking import Found, Pace, Verdict, Word, bad_chunks
from vfs.trust.journal import Quarantined
from vfs.units import Unit
from vfs.versions import kept as versions
from vfs.wire import manifest_key

log = logging.getLogger(__name__)


# --- deciding ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be done about one content. `push`: stores that get it again; `bring`: paths that are mended here,
    before that, from `source` (a store) or else `path` (of the same record); `lost`: nothing is right anywhere; `wait`:
    a place that may have it could not be asked."""

    push: tuple[str, ...] = ()
    bring: tuple[bytes, ...] = ()
    source: str = ""
    path: bytes = b""
    lost: bool = False
    wait: bool = False


def plan(here: Mapping[bytes, Verdict], there: Mapping[str, Verdict]) -> Plan:
    """Decide, from what each path here and each store have of one content. Pure."""
    wrong = (Word.BAD, Word.GONE)
    push = tuple(name for name, verdict in there.items() if verdict.word in wrong)
    bring = tuple(path for path, verdict in here.items() if verdict.word in wrong)
    if not push and not bring:
        return Plan()
    good_there = [name for name, verdict in there.items() if verdict.word is Word.GOOD]
    good_here = [path for path, verdict in here.items() if verdict.word is Word.GOOD]
    if good_there or good_here:
        return Plan(push, bring, good_there[0] if good_there else "", good_here[0] if good_here else b"")
    unasked = any(verdict.word in (Word.UNKNOWN, Word.OTHER) for verdict in (*there.values(), *here.values()))
    return Plan(push, bring, lost=not unasked, wait=unasked)


# --- this disk -----------------------------------------------------------------------------------------------------


def damaged_name(unit: Unit, path: bytes) -> bytes:
    """A name nobody has, for the damaged bytes of a path."""
    with open(open_file(unit.base, path, os.O_RDONLY), "rb", 0) as file:
        whole = blake3()
        while data := file.read(CHUNK):
            whole.update(data)
    directory, slash, name = path.rpartition(b"/")
    number = 0
    while True:
        ending = b".damaged-" + whole.hexdigest()[:8].encode() + (b"-%d" % number if number else b"")
        found = directory + slash + name[: 255 - len(ending)] + ending
        if not os.path.lexists(os.path.join(unit.base, found)):
            return found
        number += 1


def mend_here(core: Core, hydrator: Hydrator, unit: Unit, item: Known, content: Content, planned: Plan) -> str:
    """Put the right bytes in the place of a damaged file; says in words what became of it. Raises Refused when it is in
    use, NoReplica, Full."""
    if not unit.evicted:
        return _mend_resident(hydrator, unit, item, content, b"" if planned.source else planned.path)
    if not planned.source:
        raise Refused(
            f"only {os.fsdecode(planned.path)} has the right bytes; copy it over {os.fsdecode(item.file.path)}"
        )
    fd = _alone(core, unit, item.file.path)
    try:
        shown = core.ctime(os.fstat(fd))
        cache.drop(fd, content.digest, content.size)
        os.ftruncate(fd, content.size)
        os.utime(fd, ns=(item.file.mtime_ns, item.file.mtime_ns))
        core.show_ctime(os.fstat(fd), shown)
    finally:
        os.close(fd)
    if content.size <= core.settings.cache.keep_small:
        with open(open_file(unit.base, item.file.path, os.O_RDONLY), "rb", 0) as kept:
            hydrator.complete(kept.fileno(), unit.uuid, item.file.path)
    _tell(core, unit)
    return "dropped from the cache: it is brought again"


def _mend_resident(hydrator: Hydrator, unit: Unit, item: Known, content: Content, source: bytes) -> str:
    path = item.file.path
    status = os.lstat(os.path.join(unit.base, path))
    touched = status.st_ctime_ns != item.ctime_ns
    kept = damaged_name(unit, path) if touched else b""

    def complete(fd: int, name: bytes) -> None:
        if not source:
            hydrator.complete(fd, unit.uuid, name)
            return
        with open(open_file(unit.base, source, os.O_RDONLY), "rb", 0) as file:
            if digest_of(lambda at, length: _copied(file.fileno(), fd, at, length), content.size) != content:
                raise Refused(f"{os.fsdecode(source)} changed just now; try again")
        os.utime(fd, ns=(item.file.mtime_ns, item.file.mtime_ns))
        cache.clear_header(fd)

    # What is there now, not what was digested, must be what is replaced: its size may be part of the damage.
    seen = replace(item, ctime_ns=status.st_ctime_ns, file=replace(item.file, size=status.st_size))
    if not replaced_by(unit, replace(item.file, same=b""), seen, complete, kept):
        raise Refused(f"{os.fsdecode(path)} is in use; it is not mended: close it and try again")
    return f"what was there is {os.fsdecode(kept)}" if kept else ""


def _copied(source: int, target: int, offset: int, length: int) -> bytes:
    data = os.pread(source, length, offset)
    os.pwrite(target, data, offset)
    return data


def _alone(core: Core, unit: Unit, path: bytes) -> int:
    """A file of the cache, open for writing, that nobody else has open. Raises Refused."""
    core.settle()
    reading = open_file(unit.base, path, os.O_RDONLY)
    try:
        fd = cache.open_writable(reading)
    finally:
        os.close(reading)
    if core.in_use(fd) is None and linux.lease(fd):
        return fd
    os.close(fd)
    raise Refused(f"{os.fsdecode(path)} is in use; it is not mended: close it and try again")


def _tell(core: Core, unit: Unit) -> None:
    for tell in core.content_changed:
        tell(unit)


# --- stores --------------------------------------------------------------------------------------------------------


def forget_there(core: Core, unit: Unit, store: str, digest: bytes) -> None:
    """Have the next push bring a content to a store again. Another place has been shown to have it."""
    core.units.mark_dirty(unit, f"{store} lost bytes of it")
    core.journal.forget_replica(digest, store, unit.uuid)
    core.journal.doubt_home(unit.uuid, store)
    faults.point("scrub.forgotten")


def put_back(core: Core, home: Home, uuid: str, found: Found) -> str:
    """Put the published manifest back where a wrong one is; that stays beside it. Raises Conflict, StoreError."""
    row = core.journal.home(uuid, home.name)
    if row is None:
        raise Refused(f"{uuid}: it was not pushed to {home.name} yet")
    aside = f".runfs/{uuid}/damaged/{blake3(found.body).hexdigest()[:16]}.json"
    store = home.store()
    with home.watched():
        versions.put(store, aside, found.body)
        faults.point("scrub.aside")
        conditional = store.info().conditional_write
        versions.put(store, manifest_key(uuid), row.manifest, if_version=found.version if conditional else None)
        version = store.stat(manifest_key(uuid)).version or ""
    now = time.time_ns()
    core.journal.set_home(replace(row, version=version, proven_ns=now))
    return f"what was there is {aside}"


# --- quarantine ----------------------------------------------------------------------------------------------------


def quarantine(core: Core, unit: Unit, item: Known, content: Content, reason: str, pace: Pace, *, damaged: bool) -> str:
    """No place has the right bytes of a path. What is `damaged` here gets a second name and is not shown under its own
    any more; in the words that are given back. Raises Refused when it is in use."""
    path, kept = item.file.path, b""
    if damaged:
        kept = damaged_name(unit, path)
        row = Quarantined(unit.uuid, path, content.digest, kept, reason, time.time_ns())
        core.journal.quarantine(row)  # first: a push that comes between must not take the path for removed
        try:
            if unit.evicted:
                _copy_damaged(core, unit, item, content, kept, pace)
            else:
                _rename_damaged(unit, path, kept)
        except BaseException:
            core.journal.release(unit.uuid, path)
            raise
        core.units.mark_dirty(unit, "a damaged file got another name")
        _tell(core, unit)
    else:
        core.journal.quarantine(Quarantined(unit.uuid, path, content.digest, b"", reason, time.time_ns()))
    faults.point("scrub.quarantined")
    return f"the damaged bytes are {os.fsdecode(kept)}" if kept else "no right copy is left"


def _rename_damaged(unit: Unit, path: bytes, kept: bytes) -> None:
    directory, name = shadow.parent_of(unit.base, path)
    try:
        linux.rename_at(directory, name, directory, kept.rpartition(b"/")[2], linux.NOREPLACE)
    finally:
        os.close(directory)
    linux.sync_directory(os.path.dirname(os.path.join(unit.base, path)))


def _copy_damaged(core: Core, unit: Unit, item: Known, content: Content, kept: bytes, pace: Pace) -> None:
    """The chunks that are wrong are called away, what was there is copied first."""
    fd = _alone(core, unit, item.file.path)
    try:
        shadow.copy_to(fd, os.path.join(unit.base, kept))
        header = cache.read_header(fd)
        if header is None:
            header = cache.Header(content.digest, content.size, runs=((0, content.count),))
        wrong = set(bad_chunks(fd, header, content, pace))
        numbers = [n for first, end in header.runs for n in range(first, end) if n not in wrong]
        shown = core.ctime(os.fstat(fd))
        cache.write_header(fd, replace(header, runs=tuple((n, n + 1) for n in numbers)[:_MOST_RUNS]))
        os.ftruncate(fd, content.size)
        os.utime(fd, ns=(item.file.mtime_ns, item.file.mtime_ns))
        os.fsync(fd)
        core.show_ctime(os.fstat(fd), shown)
    finally:
        os.close(fd)


_MOST_RUNS = 400  # of the attribute; what is left out is brought again


def bring_back(core: Core, hydrator: Hydrator, unit: Unit, row: Quarantined, file: File | None) -> None:
    """A store has the right bytes of what was in quarantine after all. Raises NoReplica, Full."""
    missing = row.kept and not unit.evicted and not os.path.lexists(os.path.join(unit.base, row.path))
    if missing and file is not None:

        def complete(fd: int, name: bytes) -> None:
            hydrator.complete(fd, unit.uuid, name)

        take(unit, [replace(file, same=b"")], {}, complete)
        core.units.mark_dirty(unit, "a file came back from quarantine")
        _tell(core, unit)
    core.journal.release(unit.uuid, row.path)
