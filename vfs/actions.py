"""The commands that change or move something: evict, hydrate, pin, push.

Each is `(session, args, progress) -> result`, run in a worker thread of the daemon or in the command line's process.
"""

import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from vfs import policy
from vfs.core import Core
from vfs.errors import Refused, RunfsError, UsageError, in_words
from vfs.units import Unit

if TYPE_CHECKING:
    from vfs.session import Progress, Session

log = logging.getLogger(__name__)
_T = TypeVar("_T")
_AT_ONCE = 4  # units moved in parallel; each moves its files in parallel itself


def each_of(items: Iterable[_T], call: Callable[[_T], None], progress: "Progress") -> None:
    """Do something for each item, a few at once, until nobody listens any more."""
    with ThreadPoolExecutor(_AT_ONCE, "command") as pool:

        def guarded(item: _T) -> None:
            if not progress.cancelled:
                call(item)

        for _done in pool.map(guarded, items):
            pass


def named_units(session: "Session", args: Mapping[str, Any]) -> list[Unit]:
    """The units a command names, each once; every unit when it names none. Raises UnknownRecord."""
    core = session.core
    if args.get("uuids"):
        return list(dict.fromkeys(core.units.place(uuid)[0] for uuid in args["uuids"]))
    found = []
    for record in policy.roots(core):
        try:
            found.append(core.units.get(record.uuid))
        except RunfsError as error:
            log.warning("%s", error)
    return found


# --- evict -----------------------------------------------------------------------------------------------------


def evict(session: "Session", args: dict[str, Any], progress: "Progress") -> dict[str, Any]:
    """Push and prove what is not yet, then drop local bytes; or say what would happen."""
    rules = policy.Rules.of(args)
    candidates = policy.plan(session.core, session.evictor, rules)
    if args.get("dry_run"):
        return _would_evict(session, candidates, rules)
    return evict_candidates(session, candidates, rules, progress)


def evict_candidates(
    session: "Session", candidates: list[policy.Candidate], rules: policy.Rules, progress: "Progress"
) -> dict[str, Any]:
    """Evict in order, until enough is free where that is asked for."""
    place = session.settings.cache_place
    done: list[dict[str, Any]] = []
    stay = [_stay(candidate) for candidate in candidates if candidate.stays is not None]
    proofs: list[Mapping[str, Any]] = []

    def one(candidate: policy.Candidate) -> None:
        if rules.until_free is not None and policy.free_bytes(place) >= rules.until_free:
            return
        try:
            with session.reserve.released():
                evicted = session.evictor.evict(candidate.unit)
        except (RunfsError, OSError) as error:
            stay.append({"uuid": candidate.unit.uuid, "reason": _reason(candidate.unit, error), "advice": ""})
            return
        done.append({"uuid": evicted.uuid, "bytes": evicted.bytes, "files": evicted.files})
        proofs.append(evicted.proof)
        progress({"what": "evict", "uuid": evicted.uuid, "done": len(done), "size": len(candidates)})

    ready = [candidate for candidate in candidates if candidate.stays is None]
    if rules.until_free is not None:  # one at a time: no more than needed
        for candidate in ready:
            one(candidate)
    else:
        each_of(ready, one, progress)
    enough = rules.until_free is None or policy.free_bytes(place) >= rules.until_free
    failed = bool(stay) if rules.uuids else not enough
    return {
        "evicted": done,
        "stay": stay,
        "bytes": sum(each["bytes"] for each in done),
        "proof": _proof(proofs),
        "dry_run": False,
        "exit": int(failed),
    }


def _reason(unit: Unit, error: BaseException) -> str:
    text = in_words(error)
    for prefix in (f"{unit.uuid}: not evicted: ", f"{unit.uuid}: "):
        text = text.removeprefix(prefix)
    return text


def _stay(candidate: policy.Candidate) -> dict[str, Any]:
    assert candidate.stays is not None
    return {"uuid": candidate.unit.uuid, "reason": candidate.stays.reason, "advice": candidate.stays.advice}


def _proof(proofs: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    merged: dict[str, dict[str, Any]] = {}
    for proof in proofs:
        for store, said in proof.items():
            entry = merged.setdefault(store, {"store": store, "how": set(), "verified_at": time.time()})
            entry["how"] |= set(said["how"])
            entry["verified_at"] = min(entry["verified_at"], said["verified_at_ns"] / 1e9)
    return [{**entry, "how": " and ".join(sorted(filter(None, entry["how"])))} for entry in merged.values()]


def _would_evict(session: "Session", candidates: list[policy.Candidate], rules: policy.Rules) -> dict[str, Any]:
    need = None
    if rules.until_free is not None:
        need = rules.until_free - policy.free_bytes(session.settings.cache_place)
    go: list[dict[str, Any]] = []
    unproven = 0
    for candidate in candidates:
        if candidate.stays is not None or (need is not None and sum(each["bytes"] for each in go) >= need):
            continue
        go.append({"uuid": candidate.unit.uuid, "bytes": _droppable(session, candidate.unit), "files": 0})
        unproven += not session.core.journal.homes(candidate.unit.uuid)
    proof = []
    if go and not unproven:
        proof = [{"store": home.name, "how": "", "verified_at": None} for home in session.core.homes]
    stay = [_stay(candidate) for candidate in candidates if candidate.stays is not None]
    return {
        "evicted": go,
        "stay": stay,
        "bytes": sum(each["bytes"] for each in go),
        "proof": proof,
        "to_push": unproven,
        "dry_run": True,
        "exit": int(bool(rules.uuids and stay)),
    }


def _droppable(session: "Session", unit: Unit) -> int:
    """Bytes on the disk that an eviction would free: what is larger than the files that are kept."""
    keep, total = session.settings.cache.keep_small, 0
    for directory, _names, files in os.walk(unit.base):
        for name in files:
            status = os.lstat(os.path.join(directory, name))
            total += status.st_blocks * 512 if status.st_size > keep else 0
    return total


# --- hydrate, pin ----------------------------------------------------------------------------------------------


def hydrate(session: "Session", args: dict[str, Any], progress: "Progress") -> dict[str, Any]:
    """Bring evicted records' bytes back; with `restore`, put them back into their own directory."""
    done: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []
    restore = bool(args.get("restore"))

    def one(unit: Unit) -> None:
        try:
            if not unit.evicted and not session.evictor.reclaim(unit):
                os.close(unit.open_base())  # it is here, or it is gone and no store has it
                return
            if args.get("dry_run"):
                size = missing_bytes(session.core, unit)
            else:
                size = session.evictor.restore(unit) if restore else session.evictor.hydrate(unit)
        except (RunfsError, OSError) as error:
            failed.append({"uuid": unit.uuid, "reason": _reason(unit, error)})
            return
        if size or restore:
            done.append({"uuid": unit.uuid, "bytes": size, "restored": restore})
        progress({"what": "hydrate", "uuid": unit.uuid, "done": len(done)})

    each_of(named_units(session, args), one, progress)
    size = sum(each["bytes"] for each in done)
    return {"hydrated": done, "failed": failed, "bytes": size, "exit": int(bool(failed))}


def missing_bytes(core: Core, unit: Unit) -> int:
    """Bytes of an evicted unit that are not here."""
    from vfs import cache
    from vfs.scan import walk

    total = 0
    for seen in walk(unit.shadow):
        if seen.kind == "file":
            header = cache.read_header(os.path.join(unit.shadow, seen.path))
            total += header.size - header.local_bytes if header else 0
    return total


def pin(session: "Session", args: dict[str, Any], progress: "Progress") -> dict[str, Any]:
    """Keep records here. An evicted one is pinned too: what is brought back of it then stays."""
    return _pin(session, args, True)


def unpin(session: "Session", args: dict[str, Any], progress: "Progress") -> dict[str, Any]:
    return _pin(session, args, False)


def _pin(session: "Session", args: Mapping[str, Any], on: bool) -> dict[str, Any]:
    if not args.get("uuids"):
        raise UsageError("which records? Name them")
    pinned = session.core.journal.pins()
    changed = [unit.uuid for unit in named_units(session, args) if (unit.uuid in pinned) is not on]
    if not args.get("dry_run"):
        for uuid in changed:
            session.core.journal.pin(uuid, on)
    return {"changed": changed, "exit": 0}


# --- push -----------------------------------------------------------------------------------------------------


def push(session: "Session", args: dict[str, Any], progress: "Progress") -> dict[str, Any]:
    """Bring everything to the homes and wait until it is there."""
    if not session.core.homes:
        raise Refused("no store is configured: name one with --store URL or in the configuration")
    pushed: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []

    def one(unit: Unit) -> None:
        if args.get("dry_run"):
            files, size = _to_push(session, unit)
            if files:
                names = " and ".join(home.name for home in session.core.homes)
                pushed.append({"uuid": unit.uuid, "files": files, "bytes": size, "store": names})
            return
        try:
            outcome = session.pusher.push(unit)
        except (RunfsError, OSError) as error:
            failed.append({"uuid": unit.uuid, "store": "", "reason": _reason(unit, error)})
            return
        for each in outcome.pushed:
            if each.files:
                pushed.append({"uuid": unit.uuid, "files": each.files, "bytes": each.size, "store": each.store})
        failed.extend({"uuid": unit.uuid, "store": name, "reason": str(error)} for name, error in outcome.failed)
        if outcome.unsettled:
            failed.append({"uuid": unit.uuid, "store": "", "reason": "a file of it is being written to; push again"})
        progress({"what": "push", "uuid": unit.uuid, "done": len(pushed)})

    each_of(named_units(session, args), one, progress)
    return {"pushed": pushed, "failed": failed, "exit": int(bool(failed))}


def _to_push(session: "Session", unit: Unit) -> tuple[int, int]:
    from vfs.report import unpushed

    return unpushed(session.core, unit)
