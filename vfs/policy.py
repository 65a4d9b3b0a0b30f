"""What to evict: rules in, a plan out. Used by `runfs evict`, its dry run, and the free-space watch. Decides only."""

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vfs.core import Core
from vfs.errors import RunfsError
from vfs.evict import Evictor, Stays
from vfs.index import Record
from vfs.settings import limit_of
from vfs.units import Unit
from vfs.where import Condition, parse_where


@dataclass(frozen=True, slots=True)
class Candidate:
    """A unit that rules chose. `size` in bytes as last digested; `used_ns` its last use or change."""

    unit: Unit
    size: int
    used_ns: int
    stays: Stays | None


@dataclass(frozen=True, slots=True)
class Rules:
    """Which records: named ones, or all that fulfil every other rule. Ages in seconds, sizes in bytes."""

    uuids: tuple[str, ...] = ()
    where: tuple[Condition, ...] = ()
    older_than: float | None = None
    until_free: int | None = None

    @classmethod
    def of(cls, args: Mapping[str, Any]) -> "Rules":
        """From a command's arguments. Raises UsageError."""
        where = parse_where(args["where"]) if args.get("where") else ()
        return cls(tuple(args.get("uuids") or ()), where, args.get("older_than"), args.get("until_free"))


def roots(core: Core) -> Iterator[Record]:
    """Every record at the root of the tree that is not nested, in uuid order, page by page."""
    after = ""
    while page := core.index.page(after):
        for record in page:
            if record.parent_id is None or _is_root(core, record):
                yield record
        after = page[-1].uuid


def _is_root(core: Core, record: Record) -> bool:
    root = core.index.root_of(record.uuid)
    return root is None or root.uuid == record.uuid


def plan(core: Core, evictor: Evictor, rules: Rules) -> list[Candidate]:
    """The units that rules choose, oldest use first, each with the reason it would stay, if any."""
    sizes, used, pins = core.journal.sizes(), core.journal.used(), core.journal.pins()
    found: list[Candidate] = []
    for record in _chosen(core, rules):
        size = sizes.get(record.uuid, (0, 0))[1]
        last = max(used.get(record.uuid, 0), record.updated_at_ns)
        if not rules.uuids and not fulfils(core, record, rules, size, last):
            continue
        try:
            unit = core.units.get(record.uuid)
            stays = evictor.stays(unit, pinned=pins)
        except RunfsError as error:
            if rules.uuids:
                raise
            stays = Stays(str(error), "runfs doctor")
            continue
        if not rules.uuids and unit.evicted and not holds_more(core, unit):
            continue  # nothing of it is left to drop
        found.append(Candidate(unit, size, max(last, unit.used_ns), stays))
    return sorted(found, key=lambda candidate: candidate.used_ns)


def _chosen(core: Core, rules: Rules) -> Iterable[Record]:
    if not rules.uuids:
        yield from roots(core)
        return
    seen: set[str] = set()
    for uuid in rules.uuids:
        unit, _path = core.units.place(uuid)
        record = core.index.get(unit.uuid)
        if record is not None and unit.uuid not in seen:
            seen.add(unit.uuid)
            yield record


def fulfils(core: Core, record: Record, rules: Rules, size: int, last_ns: int) -> bool:
    """Whether a record fulfils the rules that are not names."""
    age = time.time() - last_ns / 1e9
    if rules.older_than is not None and age < rules.older_than:
        return False
    return all(condition.matches(value_of(core, record, condition, size, age)) for condition in rules.where)


def value_of(core: Core, record: Record, condition: Condition, size: int, age: float) -> object:
    """A record's value for one condition's field."""
    if condition.config_path is not None:
        return _config(core, record.uuid, condition.config_path)
    if condition.field == "status":
        return status_of(core, record)
    if condition.field in ("size", "age"):
        return size if condition.field == "size" else age
    return getattr(record, condition.field)


def status_of(core: Core, record: Record) -> str | None:
    """How a record's run stands."""
    return core.units.run_status_of(record)


def _config(core: Core, uuid: str, path: str) -> object:
    rows = core.index.rows([uuid])
    try:
        value: Any = json.loads(rows[0]["config_resolved_json"])
        for part in path.split("."):
            value = value[part]
    except (IndexError, KeyError, TypeError, ValueError):
        return None
    return value if isinstance(value, str | int | float | bool) else json.dumps(value)


def holds_more(core: Core, unit: Unit) -> bool:
    """Whether an evicted unit has bytes in the cache that could be dropped."""
    keep = core.settings.cache.keep_small
    for directory, _names, files in os.walk(unit.shadow):
        for name in files:
            try:
                status = os.lstat(os.path.join(directory, name))
            except FileNotFoundError:
                continue
            if status.st_size > keep and status.st_blocks:
                return True
    return False


def free_bytes(path: str | os.PathLike[str]) -> int:
    """Bytes an ordinary user can still write on the file system of `path`."""
    room = os.statvfs(path)
    return room.f_bavail * room.f_frsize


def wanted_free(core: Core) -> int | None:
    """Bytes that should be free, when the high watermark is passed; None while there is room."""
    place = core.settings.cache_place
    room = os.statvfs(place)
    total, free = room.f_blocks * room.f_frsize, room.f_bavail * room.f_frsize
    high = limit_of(core.settings.cache.high, total)
    if high is None or total - free < high:
        return None
    low = limit_of(core.settings.cache.low, total)
    return total - (high if low is None else low)
