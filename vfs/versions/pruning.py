"""Remove versions that nobody wants, then the objects that only they needed. Used by push, by rule, and by `runfs
versions prune`. Blocks on stores.

Order: manifests first, objects after, and the journal forgets an object before it goes, so that no proof counts on it.
A crash leaves objects that no manifest names: the next sweep finds them.

Another host may push at the same time. It trusts an object that its manifest names, and whatever else it finds there it
has written, or written again, lately (`uploads.Uploads.renew_s`); so an object stays that the present manifest or a
kept version names, or that was written less than `versions.grace` ago. That leaves the moment between our last look and
the removal. So what is to go is announced in the store first (`versions.announcing`), then the manifest is read, then
objects go; a push publishes first and looks for announcements then (`versions.lost`). Whichever of the two comes first,
one side sees the other: either we find the object named and leave it, or the push finds it going and brings it again.

What is in a store under a record's plain names and is not known to come from runfs stays always, and so does everything
in a store that cannot list.
"""

import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from vfs import faults
from vfs.core import Core, Home
from vfs.errors import ManifestError, NotFound, Refused, RunfsError
from vfs.journal import Journal
from vfs.manifest import Manifest
from vfs.stores.protocol import Stat
from vfs.versions.history import History, learn
from vfs.versions.kept import ANNOUNCED_S, announcing, version_key
from vfs.wire import data_key, keys_in, plain_key, their_manifest

log = logging.getLogger(__name__)

_BATCH = 200  # objects announced at a time


@dataclass(frozen=True, slots=True)
class Rule:
    """Which versions go: all but the newest `keep`, if they were published longer ago than `older_than_s`."""

    keep: int
    older_than_s: float = 0.0

    def going(self, history: History, now_ns: int) -> tuple[int, ...]:
        """Numbers of the versions to remove. The present one is none of them."""
        numbers = sorted(history.earlier, reverse=True)[self.keep :]
        before = now_ns - int(self.older_than_s * 1e9)
        return tuple(sorted(number for number in numbers if history.earlier[number] <= before))


@dataclass(frozen=True, slots=True)
class Plan:
    """What one store is to lose of one record. `objects`: key -> its size in bytes; `holds`: what is in them, where
    that is known; `damaged`: versions that cannot be read, for whose sake no object goes."""

    uuid: str
    store: str
    numbers: tuple[int, ...]
    objects: Mapping[str, int] = field(default_factory=dict)
    holds: Mapping[str, bytes] = field(default_factory=dict)
    damaged: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Pruned:
    """What a store lost: versions, objects, and the bytes of these."""

    uuid: str
    store: str
    numbers: tuple[int, ...]
    objects: int
    bytes: int


def supersede(journal: Journal, store: str, dropped: Manifest | None, present: Manifest) -> None:
    """Note which objects a manifest used that was replaced and not kept, and which are in use again."""
    uuid, used = present.uuid, keys_in(present)
    before = journal.superseded(uuid, store)
    if again := used & before.keys():
        journal.not_superseded(uuid, store, again)
    if dropped is not None:
        gone = {file.key: file.digest for file in dropped.files if file.kind == "file" and file.key not in used}
        journal.add_superseded(uuid, store, gone, time.time_ns())


def tidy(core: Core, home: Home, uuid: str) -> None:
    """After a push: prune by rule when there is something to prune. Never fails; the next push tries again."""
    rule, grace = core.settings.versions, core.settings.versions.grace
    since = [at_ns for _digest, at_ns in core.journal.superseded(uuid, home.name).values()]
    due = time.time_ns() - min(since, default=time.time_ns()) > 1.5 * grace * 1e9  # many at a time, not each by itself
    if not due and len(core.journal.versions(uuid, home.name)) <= rule.keep + rule.keep // 10:
        return
    try:
        prune(core, home, plan(core, home, uuid, Rule(rule.keep)))
    except RunfsError as error:
        log.warning("%s: old versions are not pruned in %s: %s", uuid, home.name, error)


def plan(core: Core, home: Home, uuid: str, rule: Rule) -> Plan:
    """Decide what a store is to lose. Raises Refused when it has no manifest of the record, StoreError."""
    history = learn(core, home, uuid)
    if history is None:
        raise Refused(f"{home.name} holds no manifest of it, so nothing there is known to be superseded")
    going = rule.going(history, time.time_ns())
    if history.damaged or not home.store().info().lists:
        return Plan(uuid, home.name, going, damaged=history.damaged)
    staying = (number for number in (*history.earlier, history.present.generation) if number not in going)
    try:
        objects, holds = _unneeded(core, home, uuid, map(history.load, staying), map(history.load, going))
    except (ManifestError, NotFound) as error:
        return Plan(uuid, home.name, going, damaged={0: str(error)})
    return Plan(uuid, home.name, going, objects, holds)


def _unneeded(
    core: Core, home: Home, uuid: str, staying: Iterable[Manifest], going: Iterable[Manifest]
) -> tuple[dict[str, int], dict[str, bytes]]:
    """Objects that no staying manifest needs and that are old enough: key -> bytes, and what they hold."""
    needed: set[str] = set()
    plain: dict[str, bytes] = {}  # a plain object that says what its name says stays, though no manifest names it
    for manifest in staying:
        needed |= keys_in(manifest)
        plain |= {plain_key(uuid, file.path): file.digest for file in manifest.files if file.kind == "file"}
    superseded = core.journal.superseded(uuid, home.name)
    known = {key: digest for key, (digest, _at) in superseded.items()}
    known |= {r.key: digest for digest, r in core.journal.replicas_of(uuid, home.name).items()}
    known |= {file.key: file.digest for manifest in going for file in manifest.files if file.kind == "file"}
    waiting = {key for key, (_digest, at_ns) in superseded.items() if not _is_old(core, at_ns)}
    candidates = [key for key in known.keys() - needed if key.startswith(f"{uuid}/") and plain.get(key) != known[key]]
    stats = [stat for stat in (_stat(home, key) for key in candidates) if stat is not None]
    with home.watched():
        stats += [stat for stat in home.store().list(data_key(uuid, b"")) if stat.key not in needed]
    there = {stat.key for stat in stats}
    core.journal.not_superseded(uuid, home.name, superseded.keys() - there)  # gone, or needed by what stays
    found = {stat.key: stat.size for stat in stats if stat.key not in waiting and _may_go(core, stat)}
    return found, known


def _stat(home: Home, key: str) -> Stat | None:
    try:
        with home.watched():
            return home.store().stat(key)
    except NotFound:
        return None


def _may_go(core: Core, stat: Stat | None) -> bool:
    """Whether an object is old enough. One whose age the store does not tell never is."""
    return stat is not None and stat.modified_ns is not None and _is_old(core, stat.modified_ns)


def _in_batches(objects: Mapping[str, int]) -> Iterator[list[str]]:
    keys = list(objects)
    for start in range(0, len(keys), _BATCH):
        yield keys[start : start + _BATCH]


def _is_old(core: Core, at_ns: int) -> bool:
    return time.time_ns() - at_ns >= core.settings.versions.grace * 1e9


def prune(core: Core, home: Home, planned: Plan) -> Pruned:
    """Do what was planned, as far as it is still right. Raises StoreError; what is left is found by the next one."""
    store, uuid = home.store(), planned.uuid
    for number in planned.numbers:
        with home.watched():
            store.delete(version_key(uuid, number))
        faults.point("prune.version")
        core.journal.forget_versions(uuid, home.name, [number])
    known = {key: planned.holds[key] for key in planned.objects if key in planned.holds}
    core.journal.add_superseded(uuid, home.name, known, 0)
    removed = freed = 0
    for keys in _in_batches(planned.objects):
        for key in _swept(core, home, planned, keys):
            removed, freed = removed + 1, freed + planned.objects[key]
    return Pruned(uuid, home.name, planned.numbers, removed, freed)


def _swept(core: Core, home: Home, planned: Plan, keys: list[str]) -> Iterator[str]:
    """Remove objects, as far as they may still go; each that went."""
    store, uuid = home.store(), planned.uuid
    announced = time.monotonic()
    with announcing(home, uuid, keys):
        present = their_manifest(home, uuid)  # after the announcement: see the top
        if present is None:
            raise Refused(f"{uuid}: its manifest is gone from {home.name}; nothing more is removed there")
        needed = keys_in(present)
        for key in keys:
            if key in needed or not _may_go(core, _stat(home, key)):
                continue
            if time.monotonic() - announced > ANNOUNCED_S / 4:
                return  # a slow store: the rest at the next prune
            core.journal.forget_object(uuid, home.name, key, planned.holds.get(key, b""))
            faults.point("prune.forgotten")
            with home.watched():
                store.delete(key)
            faults.point("prune.removed")
            core.journal.not_superseded(uuid, home.name, [key])
            yield key
