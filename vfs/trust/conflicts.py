"""What two hosts did to one path: noted when a push merges, listed and settled by `runfs conflicts`.

Nothing of either host is lost by a merge (`vfs/manifest.py`): a path changed on both keeps one version under its name
and the other as `<path>.conflict-<digest>`; one that was removed on one side and changed on the other stays. This
module remembers which of them is whose, and makes one of them the only one when somebody says so. What is given up then
is in the stores as an earlier version.

Blocks on the local disk; settling pushes before and after, each call within its deadline.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from vfs import faults, linux, shadow
from vfs.core import Core
from vfs.errors import Refused, RunfsError, UsageError, in_words
from vfs.journal import Known
from vfs.living import live_record
from vfs.manifest import File, Manifest, Merge
from vfs.taking import drop
from vfs.trust.journal import Clash
from vfs.units import Unit

if TYPE_CHECKING:
    from vfs.session import Progress, Session

_SECOND = re.compile(rb"(.+)\.conflict-[0-9a-z]+(-\d+)?\Z", re.DOTALL)
_ALWAYS = (b".machinable", b"id.json")  # every record has these
KEEPS = ("ours", "theirs", "both")


# --- noticing ------------------------------------------------------------------------------------------------------


def clashes_of(uuid: str, store: str, base: Manifest | None, theirs: Manifest, merged: Merge) -> Iterator[Clash]:
    """The conflicts that a merge made, or that another host's merge made and that come with its manifest."""
    for path, second in merged.clashes:
        yield Clash(uuid, path, path, second, store)
    for path, removed_there in merged.kept:
        yield Clash(uuid, path, b"" if not removed_there else path, b"" if removed_there else path, store)
    before, there = base.by_path() if base else {}, theirs.by_path()
    for path, file in there.items():
        found = _SECOND.match(path)
        ours = before.get(found[1]) if found else None
        other = there.get(found[1]) if found else None
        if not found or ours is None or other is None or path in before:
            continue
        if (ours.kind, ours.digest) == (file.kind, file.digest) != (other.kind, other.digest):
            yield Clash(uuid, found[1], path, found[1], store)  # what we had published has the second name


def remove_theirs(core: Core, unit: Unit, merged: Merge) -> list[bytes]:
    """Remove here what the other host removed and nobody changed here. Paths that stay, as they are in use."""
    emptied = any(file.path in _ALWAYS for file in merged.removed)  # no host of ours does that to a record
    if emptied or live_record(core, unit) is not None:  # nothing is taken from under a run
        return [file.path for file in merged.removed if file.kind != "directory"]
    return drop(unit, merged.removed, core.journal.known(unit.uuid))


def note(
    core: Core, unit: Unit, store: str, base: Manifest | None, theirs: Manifest, merged: Merge, stay: Iterable[bytes]
) -> None:
    """Remember the conflicts of a merge; `stay`: removed by the other host, but in use here."""
    found = [*clashes_of(unit.uuid, store, base, theirs, merged)]
    found += [Clash(unit.uuid, path, path, b"", store) for path in stay]
    if found:
        core.journal.add_clashes(found)


# --- listing -------------------------------------------------------------------------------------------------------


def unsettled(core: Core, uuid: str | None = None, *, by_name: bool = True) -> list[Clash]:
    """Conflicts that nobody has settled, by hand or otherwise. `by_name`: also those that only a file's name tells of
    (another host noted them, or this one's journal was lost); that looks through all names."""
    noted = core.journal.clashes(uuid)
    told = {(clash.uuid, name) for clash in noted for name in (clash.ours, clash.theirs)}
    found = [clash for clash in noted if not clash.settled and _stands(core, clash)]
    for owner, second in core.journal.second_names(uuid) if by_name else ():
        match = _SECOND.match(second)
        if match and (owner, second) not in told and core.journal.digested(owner, match[1]) is not None:
            found.append(Clash(owner, match[1], match[1], second))
    return found


def _stands(core: Core, clash: Clash) -> bool:
    """Whether the versions of a conflict are still there."""
    return all(core.journal.digested(clash.uuid, name) for name in (clash.ours, clash.theirs) if name)


def kind_of(clash: Clash) -> str:
    """What happened, in words."""
    if not clash.ours:
        return "removed here, changed there"
    return "changed on both" if clash.theirs else "changed or used here, removed there"


def shown(core: Core, clash: Clash) -> dict[str, Any]:
    """A conflict as JSON."""

    def side(name: bytes) -> dict[str, Any] | None:
        known = core.journal.digested(clash.uuid, name) if name else None
        return {"path": os.fsdecode(name), "size": known[1], "mtime": known[2] / 1e9} if known else None

    return {
        "uuid": clash.uuid,
        "path": os.fsdecode(clash.path),
        "kind": kind_of(clash),
        "ours": side(clash.ours),
        "theirs": side(clash.theirs),
        "store": clash.store or None,
        "at": clash.at_ns / 1e9 or None,
    }


# --- settling ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Plan:
    """What settling does to names: `remove` goes; then `source`, if any, gets the name `target`."""

    remove: bytes = b""
    source: bytes = b""
    target: bytes = b""


def plan(clash: Clash, keep: str) -> Plan:
    """How a conflict is settled. Pure."""
    if keep == "both":
        return Plan()
    wanted, other = (clash.ours, clash.theirs) if keep == "ours" else (clash.theirs, clash.ours)
    if not wanted:
        return Plan(remove=clash.path)
    return Plan(other if other != wanted else b"", wanted, clash.path) if wanted != clash.path else Plan(other)


def conflicts(session: "Session", args: dict[str, Any], progress: "Progress") -> dict[str, Any]:
    """List conflicts; with `keep`, settle those of one record, or of the paths in it that are named."""
    core = session.core
    uuids: list[str] = list(args.get("uuids") or ())
    if args.get("keep") is None:
        units: list[str | None] = [core.units.place(uuid)[0].uuid for uuid in uuids]
        found = [clash for uuid in units or [None] for clash in unsettled(core, uuid)]
        return {"conflicts": [shown(core, clash) for clash in found], "exit": int(bool(found))}
    if len(uuids) != 1 or args["keep"] not in KEEPS:
        raise UsageError("settling takes one record, and --keep ours, theirs or both")
    unit, _path = core.units.place(uuids[0])
    names = {os.fsencode(path) for path in args.get("paths") or ()}
    chosen = [c for c in unsettled(core, unit.uuid) if not names or names & {c.path, c.ours, c.theirs}]
    if unknown := names - {name for c in chosen for name in (c.path, c.ours, c.theirs)}:
        raise Refused(f"{unit.uuid}: {os.fsdecode(min(unknown))} is in no conflict; runfs conflicts lists them")
    said = [shown(core, clash) for clash in chosen]
    if args.get("dry_run"):
        return {"settled": said, "failed": [], "keep": args["keep"], "dry_run": True, "exit": 0}
    failed = settle(session, unit, chosen, args["keep"])
    settled = [each for each, clash in zip(said, chosen, strict=True) if clash.path not in failed]
    reasons = [{"uuid": unit.uuid, "path": os.fsdecode(path), "reason": why} for path, why in failed.items()]
    return {"settled": settled, "failed": reasons, "keep": args["keep"], "dry_run": False, "exit": int(bool(failed))}


def settle(session: "Session", unit: Unit, clashes: Sequence[Clash], keep: str) -> dict[bytes, str]:
    """Settle conflicts of one unit; path -> reason for those that are not settled. Raises Refused when the stores do
    not hold everything first: then nothing was changed."""
    core, failed = session.core, dict[bytes, str]()
    with unit.moving:
        if keep != "both" and clashes:
            _in_the_stores(session, unit)
        core.settle()  # our own descriptors would look like somebody's
        for clash in clashes:
            known = core.journal.known(unit.uuid)
            try:
                core.units.mark_dirty(unit, "a conflict was settled")
                carry_out(unit, plan(clash, keep), known)
                core.journal.settle(clash, both=keep == "both")
            except (RunfsError, OSError) as error:
                failed[clash.path] = in_words(error)
            session.pusher.scan(unit)
        for tell in core.content_changed:
            tell(unit)
        session.pusher.push(unit)
    return failed


def _in_the_stores(session: "Session", unit: Unit) -> None:
    outcome = session.pusher.push(unit)
    if outcome.failed:
        name, error = outcome.failed[0]
        raise Refused(f"{unit.uuid}: not settled: what is given up must be in the stores first, but {name}: {error}")
    if outcome.unsettled:
        path = os.fsdecode(outcome.unsettled[0]) or "a file"
        raise Refused(f"{unit.uuid}: not settled: {path} is being written to; try again when it is finished")


def carry_out(unit: Unit, planned: Plan, known: Mapping[bytes, Known]) -> None:
    """Do what was planned. Names are exchanged first, so that a crash leaves both versions. Raises Refused when what is
    to go is in use or has changed."""
    going = planned.remove
    if planned.source:
        if planned.remove == planned.target:
            _rename(unit, planned.source, planned.target, linux.EXCHANGE)
            known, going = _swapped(known, planned.source, planned.target), planned.source
        else:
            _rename(unit, planned.source, planned.target, linux.NOREPLACE)
        faults.point("conflict.renamed")
    if not going:
        return
    stay = drop(unit, [item.file for item in _at_and_below(known, going)], known)
    if stay:
        if going == planned.source:
            _rename(unit, planned.source, planned.target, linux.EXCHANGE)
        raise Refused(f"{os.fsdecode(stay[0])} is in use or changed just now; try again when it is closed")


def _at_and_below(known: Mapping[bytes, Known], path: bytes) -> Iterator[Known]:
    return (item for name, item in known.items() if name == path or name.startswith(path + b"/"))


def _swapped(known: Mapping[bytes, Known], one: bytes, other: bytes) -> dict[bytes, Known]:
    """What was digested, after two names were exchanged: that has changed ctimes, so they say nothing any more."""

    def moved(name: bytes) -> bytes:
        for here, there in ((one, other), (other, one)):
            if name == here or name.startswith(here + b"/"):
                return there + name[len(here) :]
        return name

    def renamed(item: Known) -> Known:
        file: File = replace(item.file, path=moved(item.file.path))
        return replace(item, file=file, ctime_ns=0) if file != item.file else item

    return {item.file.path: item for item in map(renamed, known.values())}


def _rename(unit: Unit, source: bytes, target: bytes, flags: int) -> None:
    first, name = shadow.parent_of(unit.base, source)
    try:
        second, other = shadow.parent_of(unit.base, target)
        try:
            linux.rename_at(first, name, second, other, flags)
            for directory in (first, second):
                _sync(directory)
        finally:
            os.close(second)
    finally:
        os.close(first)


def _sync(directory: int) -> None:
    fd = os.open(f"/proc/self/fd/{directory}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
