"""The commands about versions and transactions. Each is `(session, args, progress) -> result`, run in a worker thread
of the daemon or in the command line's process; they wait for stores."""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vfs.actions import each_of, named_units
from vfs.core import Core, Home
from vfs.errors import Refused, RunfsError, UsageError, in_words
from vfs.living import live_record
from vfs.units import Unit
from vfs.versions import history, pruning, transactions
from vfs.versions.pruning import Rule
from vfs.versions.reverting import Changes

if TYPE_CHECKING:
    from vfs.push import Outcome
    from vfs.session import Progress, Session

_NAMED = 20  # paths named in a result


# --- list ------------------------------------------------------------------------------------------------------


def versions(session: "Session", args: dict[str, Any], progress: "Progress") -> dict[str, Any]:
    """The versions of records, as the stores have them; from the journal, where a store does not answer."""
    if not args.get("uuids"):
        raise UsageError("which records? Name them")
    records = [_listed(session.core, unit) for unit in named_units(session, args)]
    return {"records": records, "exit": int(any(record["failed"] for record in records))}


def _listed(core: Core, unit: Unit) -> dict[str, Any]:
    found: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []
    for home in core.homes:
        try:
            learned = history.learn(core, home, unit.uuid)
            found += history.shown(learned) if learned else []
        except RunfsError as error:
            failed.append({"store": home.name, "reason": str(error)})
            found += history.remembered(core, home.name, unit.uuid)
    found.sort(key=lambda each: -int(each["number"]))
    return {"uuid": unit.uuid, "versions": found, "failed": failed}


# --- restore ---------------------------------------------------------------------------------------------------


def restore(session: "Session", args: dict[str, Any], progress: "Progress") -> dict[str, Any]:
    """Make a record, or paths of it, what they were in a version: an ordinary change, pushed as a new version. What is
    there now is pushed first, so it is a version too."""
    core, number = session.core, int(args["number"])
    unit = core.units.place(str(args["uuid"]))[0]
    paths = [os.fsencode(str(path)).strip(b"/") for path in args.get("paths") or ()]
    wanted, _home = history.manifest_of(core, unit.uuid, number, args.get("store"))
    result = {"uuid": unit.uuid, "number": number, "dry_run": bool(args.get("dry_run")), "failed": [], "version": None}
    with unit.moving:
        _refuse_restore(core, unit)
        if args.get("dry_run"):
            return {**result, **_said(session.reverter.plan(unit, wanted, paths)), "exit": 0}
        _keep_present(session, unit)
        planned = session.reverter.plan(unit, wanted, paths)
        if not planned.count:
            return {**result, **_said(planned), "exit": 0}
        session.reverter.refuse_open(unit, planned)
        core.units.mark_dirty(unit, f"version {number} was restored")
        session.reverter.apply(unit, planned)
        done = _pushed(session.pusher.push(unit, notes=f"version {number} again"))
    rows = core.journal.homes(unit.uuid)
    version = max((row.generation for row in rows), default=None) if not done["failed"] else None
    return {**result, **_said(planned), **done, "version": version}


def _refuse_restore(core: Core, unit: Unit) -> None:
    if (held := core.transactions.get(unit.uuid)) is not None:
        raise Refused(f"{unit.uuid}: not restored: {transactions.why_held(held)}")
    if (live := live_record(core, unit)) is not None:
        raise Refused(f"{unit.uuid}: not restored: {live} is live; wait until the run has finished")
    if unit.writers:
        raise Refused(f"{unit.uuid}: not restored: a file of it is open for writing through the mount; close it")


def _keep_present(session: "Session", unit: Unit) -> None:
    """What is there now must be in the homes before it is changed."""
    outcome = session.pusher.push(unit)
    if outcome.unsettled:
        raise Refused(f"{unit.uuid}: not restored: a file of it is being written to; try again")
    if len(outcome.pushed) < session.settings.min_copies:
        name, error = outcome.failed[0] if outcome.failed else ("no store", "none is configured")
        raise Refused(f"{unit.uuid}: not restored: what it is now would be lost, as {name} does not hold it: {error}")


def _said(planned: Changes) -> dict[str, Any]:
    def names(files: Any) -> list[str]:
        return [os.fsdecode(file.path) for file in files][:_NAMED]

    return {
        "paths": planned.count,
        "bytes": planned.bytes,
        "removed": names(planned.remove),
        "made": names(planned.make),
        "touched": names(planned.touch),
        "more": max(0, planned.count - _NAMED),
    }


def _pushed(outcome: "Outcome") -> dict[str, Any]:
    failed = [{"store": name, "reason": str(error)} for name, error in outcome.failed]
    if outcome.unsettled:
        failed.append({"store": "", "reason": "a file of it is being written to; it is pushed when that is over"})
    return {"failed": failed, "exit": int(bool(failed))}


# --- prune -----------------------------------------------------------------------------------------------------


def prune(session: "Session", args: dict[str, Any], progress: "Progress") -> dict[str, Any]:
    """Remove earlier versions, and the objects that only they needed."""
    core, rule = session.core, _rule(session, args)
    if not args.get("uuids") and not args.get("all"):
        raise UsageError("which records? Name them, or use --all")
    pruned: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []

    def one(unit: Unit) -> None:
        for home in core.homes:
            try:
                pruned.append(_pruned(session, unit, home, rule, dry=bool(args.get("dry_run"))))
            except RunfsError as error:
                failed.append({"uuid": unit.uuid, "store": home.name, "reason": in_words(error)})
        progress({"what": "prune", "uuid": unit.uuid, "done": len(pruned)})

    each_of(named_units(session, args), one, progress)
    swept = sum(_sweep(home, failed) for home in core.homes) if args.get("all") and not args.get("dry_run") else 0
    pruned = [each for each in pruned if each["versions"] or each["objects"] or each["damaged"]]
    return {
        "pruned": pruned,
        "failed": failed,
        "versions": sum(len(each["versions"]) for each in pruned),
        "objects": sum(each["objects"] for each in pruned),
        "bytes": sum(each["bytes"] for each in pruned),
        "uploads": swept,
        "dry_run": bool(args.get("dry_run")),
        "exit": int(bool(failed)),
    }


def _rule(session: "Session", args: Mapping[str, Any]) -> Rule:
    keep, older_than = args.get("keep"), args.get("older_than")
    if keep is None:
        keep = 0 if older_than is not None else session.settings.versions.keep
    if keep < 0:
        raise UsageError("--keep cannot be less than 0")
    return Rule(int(keep), float(older_than or 0.0))


def _pruned(session: "Session", unit: Unit, home: Home, rule: Rule, *, dry: bool) -> dict[str, Any]:
    core = session.core
    with unit.moving:
        if (held := core.transactions.get(unit.uuid)) is not None:
            raise Refused(f"{unit.uuid}: not pruned: {transactions.why_held(held)}")
        if core.journal.is_dirty(unit.uuid):
            raise Refused(f"{unit.uuid}: not pruned: it has changes that are not pushed yet; runfs push {unit.uuid}")
        planned = pruning.plan(core, home, unit.uuid, rule)
        objects, size = len(planned.objects), sum(planned.objects.values())
        if not dry:
            done = pruning.prune(core, home, planned)
            objects, size = done.objects, done.bytes
            if done.numbers or objects:
                proof = {"versions": list(done.numbers)}
                core.journal.add_receipt("prune", unit.uuid, home.name, objects, size, "", proof)
    damaged = [{"number": number, "reason": reason} for number, reason in planned.damaged.items()]
    said = {"versions": list(planned.numbers), "objects": objects, "bytes": size, "damaged": damaged}
    return {"uuid": unit.uuid, "store": home.name, **said}


def _sweep(home: Home, failed: list[dict[str, Any]]) -> int:
    """Unfinished uploads that nobody went on with for a day."""
    try:
        with home.watched():
            return home.store().sweep() if home.store().info().sweeps else 0
    except RunfsError as error:
        failed.append({"uuid": "", "store": home.name, "reason": in_words(error)})
        return 0


# --- transactions ----------------------------------------------------------------------------------------------


def transaction(session: "Session", args: dict[str, Any], progress: "Progress") -> dict[str, Any]:
    """Begin, commit or roll back a transaction on a record (`args["what"]`)."""
    unit, what = session.core.units.place(str(args["uuid"]))[0], args.get("what")
    result: dict[str, Any] = {"uuid": unit.uuid, "what": what, "failed": [], "exit": 0}
    if what == "begin":
        begun = session.transactions.begin(unit, str(args.get("notes") or ""))
        return {**result, "since": begun.began_ns / 1e9, "notes": begun.notes}
    if what == "commit":
        before = {row.store: row.generation for row in session.core.journal.homes(unit.uuid)}
        ended = session.transactions.commit(unit, args.get("notes"))
        assert ended.outcome is not None
        after = {row.store: row.generation for row in session.core.journal.homes(unit.uuid)}
        new = [number for store, number in after.items() if number > before.get(store, 0)]
        return {**result, **_pushed(ended.outcome), "version": max(new, default=None)}
    if what == "rollback":
        ended = session.transactions.rollback(unit)
        return {**result, "paths": ended.paths, "bytes": ended.bytes}
    raise UsageError("begin, commit or rollback?")
