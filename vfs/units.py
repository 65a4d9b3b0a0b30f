"""Units: root records as things with a place on this disk. Used by everything that touches a record's files.

A `Unit` object exists while somebody holds it (the tree, a push, a command) and is the only one of its uuid, so its
counters (handles, change sequence) and its locks are shared. Calls here touch the journal and the local disk only.
"""

import errno
import os
import stat
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

from vfs import cache, linux
from vfs.errors import DamagedRecord, Refused, RunfsError, UnknownRecord
from vfs.format import STATUS_MARKERS, Status, run_status
from vfs.index import Index, Record
from vfs.journal import Journal, UnitRow
from vfs.residency import State, allowed


class Unit:
    """A root record and where its files are.

    `directory` is where machinable believes it is, `shadow` its place in the cache. `sequence` grows with each change;
    a push that saw the same number before and after has everything. `epoch` grows when the files move.
    """

    __slots__ = (
        "__weakref__",
        "_row",
        "changed_at",
        "directory",
        "dirty",
        "epoch",
        "first_change",
        "handles",
        "incoming",
        "moving",
        "sequence",
        "shadow",
        "state",
        "used_ns",
        "uuid",
        "writers",
    )

    def __init__(self, uuid: str, directory: bytes, shadow: bytes, row: UnitRow | None) -> None:
        self.uuid = uuid
        self.directory = directory
        self.shadow = shadow
        self.state = State(row.state) if row else State.RESIDENT
        self._row = row
        self.sequence = 0
        self.epoch = 0
        self.handles = 0
        self.writers = 0
        self.dirty = False
        self.incoming = False  # made at the root and no record of the index yet: nothing of it is pushed
        self.changed_at = 0.0
        self.first_change = 0.0
        self.used_ns = 0
        self.moving = threading.RLock()  # one push, eviction or restore of a unit at a time

    @property
    def evicted(self) -> bool:
        """Whether its files are in the shadow."""
        return self.state in (State.EVICTED, State.RESTORING)

    @property
    def base(self) -> bytes:
        """The real directory that holds the unit's files now. Never a path through the mount."""
        return self.shadow if self.evicted else self.directory

    def open_base(self) -> int:
        """An O_PATH descriptor of `base`. Raises DamagedRecord when it is gone."""
        try:
            return os.open(self.base, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise self._gone(error) from error

    def status(self) -> os.stat_result:
        """What `base` itself is. Raises DamagedRecord when it is gone."""
        try:
            status = os.stat(self.base, follow_symlinks=False)
        except OSError as error:
            raise self._gone(error) from error
        if not stat.S_ISDIR(status.st_mode):
            raise self._gone(NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)))
        return status

    def _gone(self, error: OSError) -> DamagedRecord:
        return DamagedRecord(
            f"{self.uuid}: its directory {os.fsdecode(self.base)} cannot be opened ({error.strerror}); "
            f"if a store holds the record, `runfs hydrate --restore {self.uuid}` brings it back"
        )

    def note_change(self) -> None:
        """Something in it changed: what was pushed before is no longer all of it."""
        self.sequence += 1
        self.changed_at = time.monotonic()
        if not self.first_change:
            self.first_change = self.changed_at


class Units:
    """Finds and makes units; the one place where a unit's state changes. Thread-safe."""

    def __init__(self, index: Index, journal: Journal, cache: Path) -> None:
        self._index = index
        self._journal = journal
        self._cache = os.fsencode(cache)
        self._known: weakref.WeakValueDictionary[str, Unit] = weakref.WeakValueDictionary()
        self._dirty: dict[str, Unit] = {}  # held as long as they are dirty
        self._lock = threading.RLock()
        self.moved: list[Callable[[Unit], None]] = []  # told after the files of a unit moved

    def shadow_of(self, uuid: str) -> bytes:
        return self._cache + b"/" + uuid.encode()

    def get(self, uuid: str, record: Record | None = None) -> Unit:
        """The unit of a root record; `record`: its row, if the caller has just read it. Raises UnknownRecord;
        DamagedRecord when it has no local place."""
        with self._lock:
            unit = self._known.get(uuid)
            return unit if unit is not None and not unit.incoming else self._make(uuid, record)

    def _make(self, uuid: str, record: Record | None) -> Unit:
        row = self._journal.unit(uuid)
        directory = row.directory if row is not None else self._directory_of(uuid, record or self._index.get(uuid))
        unit = Unit(uuid, directory, self.shadow_of(uuid), row)
        self._known[uuid] = unit
        return unit

    def _directory_of(self, uuid: str, record: Record | None) -> bytes:
        if record is None:
            raise UnknownRecord(f"the index has no record {uuid}; `runfs ls` shows those it has")
        if record.directory is None:
            raise DamagedRecord(f"{uuid}: the index says it is at {record.storage_uri}, which is not on this machine")
        other = linked_record(record.directory)
        if other not in (None, uuid):
            raise DamagedRecord(
                f"{uuid}: its row gives it the place of the evicted record {other}: a run made it while the index had "
                f"lost that one's row. It holds nothing; hide it: Index.get().hide({uuid!r})"
            )
        return record.directory

    def adopt(self, uuid: str, directory: bytes, *, incoming: bool = False) -> Unit:
        """The unit of a directory that the index does not know yet; `uuid` is only its name while it is `incoming`."""
        with self._lock:
            unit = self._known.get(uuid)
            if unit is None:
                unit = self._known[uuid] = Unit(uuid, directory, self.shadow_of(uuid), None)
                unit.incoming = incoming
            return unit

    def rename(self, unit: Unit, uuid: str) -> None:
        """An incoming directory turned out to be record `uuid`."""
        with self._lock:
            self._known.pop(unit.uuid, None)
            unit.uuid, unit.shadow, unit.incoming = uuid, self.shadow_of(uuid), False
            self._known[uuid] = unit

    def is_evicted(self, uuid: str) -> bool:
        """Whether a record's files are in a shadow, whatever the index says."""
        with self._lock:
            unit = self._known.get(uuid)
            return unit.evicted if unit is not None else self._journal.unit(uuid) is not None

    def held(self, uuid: str) -> Unit | None:
        """A unit, if somebody holds it now."""
        with self._lock:
            return self._known.get(uuid)

    def live(self) -> list[Unit]:
        """Units somebody holds now."""
        with self._lock:
            return list(self._known.values())

    def look_again(self) -> None:
        """The index may say of resident records that they are somewhere else now: those in use go there."""
        for unit in self.live():
            if unit.state is not State.RESIDENT or unit.incoming or self._journal.unit(unit.uuid) is not None:
                continue
            record = self._index.get(unit.uuid)
            if record is None or record.directory in (None, unit.directory):
                continue
            with self._lock:
                unit.directory = record.directory or unit.directory
                unit.epoch += 1
            for tell in self.moved:
                tell(unit)

    def place(self, uuid: str) -> tuple[Unit, bytes]:
        """The unit that holds a record and the record's path in it (b"" for the root record itself)."""
        root = self._index.root_of(uuid)
        if root is None or root.uuid == uuid:
            return self.get(uuid), b""
        return self.get(root.uuid), self.relative(root, self._index.get(uuid))

    def relative(self, root: Record, nested: Record | None) -> bytes:
        """Path of a nested record below its root record; DamagedRecord if it does not lie there."""
        if nested is None or nested.directory is None or root.directory is None:
            raise DamagedRecord(f"{root.uuid}: a nested record has no local directory")
        return relative_to(root.directory, nested.directory, root.uuid, nested.uuid)

    def status_of(self, record: Record) -> str | None:
        """What a record's markers say of its run; None when they cannot be read, or are away, as after a reindex."""
        try:
            unit, path = self.place(record.uuid)
            base = os.path.join(unit.base, path) if path else unit.base
            return None if unit.evicted and _markers_away(base) else run_status(base).value
        except (RunfsError, OSError):
            return None

    def run_status_of(self, record: Record) -> str | None:
        """How a record's run stands: by its own markers or, where it has none, by those of its latest execution."""
        own = self.status_of(record)
        if own != Status.NONE:
            return own
        runs = [each for each in self._index.nested(record.uuid) if each.kind == "Execution"]
        latest = max(runs, key=lambda each: each.created_at_ns, default=None)
        return self.status_of(latest) if latest is not None else own

    # --- change ------------------------------------------------------------------------------------------------

    def mark_dirty(self, unit: Unit, why: str) -> None:
        """Note a change; durable in the journal before this returns if the unit was clean."""
        with self._lock:
            unit.note_change()
            if not unit.dirty and not unit.incoming:
                self._journal.mark_dirty(unit.uuid, why)
                unit.dirty = True
                self._dirty[unit.uuid] = unit

    def mark_clean(self, unit: Unit, sequence: int) -> bool:
        """The homes hold what the unit was at `sequence`; False if it has changed since and stays dirty.

        Called, and `sequence` read, where no file operation is half done (`core.commit`): one that has been noted
        but not carried out yet would otherwise be taken for pushed.
        """
        with self._lock:
            if unit.sequence != sequence or unit.writers:
                return False
            self._journal.clean(unit.uuid)
            unit.dirty = False
            unit.first_change = 0.0
            self._dirty.pop(unit.uuid, None)
            return True

    def dirty(self) -> list[Unit]:
        with self._lock:
            return list(self._dirty.values())

    def load_dirty(self) -> Iterator[str]:
        """Take up what an earlier process left in the journal; gives the reasons for those that cannot be."""
        for row in self._journal.dirty():
            try:
                unit = self.get(row.uuid)
            except (UnknownRecord, DamagedRecord) as error:
                yield f"{row.uuid} was to be pushed ({row.why}), but: {error}"
                continue
            unit.dirty = True
            unit.note_change()
            with self._lock:
                self._dirty[row.uuid] = unit

    # --- moving between places ---------------------------------------------------------------------------------

    def enter(self, unit: Unit, state: State, row: UnitRow | None) -> None:
        """Change a unit's state: in the journal first, durable, then here. `row` None makes it simply resident."""
        if not allowed(unit.state, state):
            raise Refused(f"{unit.uuid} is {unit.state.value}; it cannot become {state.value} now. Try again")
        if row is None:
            self._journal.drop_unit(unit.uuid)
        else:
            self._journal.set_unit(row)
        self._take_state(unit, state)

    def _take_state(self, unit: Unit, state: State) -> None:
        with self._lock:
            unit.state = state
            unit.epoch += 1
        for tell in self.moved:
            tell(unit)

    def exchanged(self, unit: Unit) -> None:
        """The files of a unit that was being evicted have moved. The journal need not be told at once: with the link
        in place, its intent is finished after a crash."""
        assert unit.state is State.EVICTING
        self._take_state(unit, State.EVICTED)


def relative_to(root: bytes, nested: bytes, root_uuid: str, uuid: str) -> bytes:
    """Path of a nested record's directory below its root record's; DamagedRecord if it does not lie there."""
    prefix = root.rstrip(b"/") + b"/"
    if not nested.startswith(prefix):
        raise DamagedRecord(f"{uuid} does not lie in the directory of its parent {root_uuid}")
    return nested[len(prefix) :].rstrip(b"/")


def set_aside_name(unit: Unit) -> bytes:
    """The second name used in an exchange: beside the record, so on its file system."""
    parent, _slash, _name = unit.directory.rstrip(b"/").rpartition(b"/")
    return parent + b"/.runfs-" + unit.uuid.encode()


def link_of(directory: bytes, link: bytes, uuid: str) -> bytes:
    """Target of the symlink that takes a record's place: relative, so that a moved project keeps working."""
    parent = os.path.realpath(os.path.dirname(directory))
    return os.path.relpath(link + b"/" + uuid.encode(), parent)


def linked_record(directory: bytes) -> str | None:
    """The evicted record whose link (see `link_of`) is at a place; None where there is none of ours."""
    try:
        above, _slash, uuid = os.readlink(directory).rpartition(b"/")
    except OSError:
        return None
    return os.fsdecode(uuid) if os.path.basename(above) == b".runfs" else None


def point(link: bytes, mountpoint: bytes) -> None:
    """Make the one link of a project that all evicted records go through point at the mountpoint."""
    if os.path.lexists(link) and not os.path.islink(link):
        raise Refused(f"{os.fsdecode(link)} is in the way: runfs keeps its link to the mountpoint there. Move it")
    if os.path.islink(link) and os.fsencode(os.readlink(link)) == mountpoint:
        return
    temporary = link + b".new"
    if os.path.lexists(temporary):
        os.unlink(temporary)
    os.symlink(mountpoint, temporary)
    os.rename(temporary, link)
    linux.sync_directory(os.path.dirname(link))


def _markers_away(directory: bytes) -> bool:
    """Whether a marker of the run is a placeholder that holds no bytes: read straight, it would say nothing."""
    for name in STATUS_MARKERS:
        try:
            if cache.read_header(os.path.join(directory, os.fsencode(name))) is not None:
                return True
        except FileNotFoundError:
            continue
    return False
