"""What people read: each command's result as lines of text. Pure functions, no terminal, no daemon.

Used by the command line; the state of a mount is in `daemon.render_status`. Results are the JSON-able dicts of
`Session.run`; a key that is missing is left out of the text, so that daemon and command line may differ in version.
`lines(command, result, args)` is the entrance.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from daemon import render_stores, render_trust, render_versions
from daemon.quantities import count, date, duration, plain, rate, size
from daemon.render_status import SHOWN, Lines, Result, first, ls, mounted, replica, share, status, table

__all__ = ["lines", "mounted", "share", "table"]


def lines(command: str, result: Result, args: Mapping[str, Any]) -> Lines:
    """The text of a result; nothing for a command that has nothing to say."""
    return _RENDERERS[command](result, args)


# -- evict, hydrate, push, pin -------------------------------------------------------------------------------------


def evict(result: Result, args: Mapping[str, Any]) -> Lines:
    done, stay = result.get("evicted", []), result.get("stay", [])
    out = []
    if done or not stay:
        out.append(_evicted(result, done))
    if args.get("uuids"):
        return out + [_stays(each) for each in stay]
    return out + ([f"{count(len(stay), 'record stays', 'records stay')}: {grouped(stay)}"] if stay else [])


def _evicted(result: Result, done: Sequence[Mapping[str, Any]]) -> str:
    if not done:
        return "nothing to evict"
    dry = bool(result.get("dry_run"))
    freed = f"{size(result.get('bytes', 0))} {'would be freed' if dry else 'freed'}"
    what = count(len(done), "record") if dry or len(done) > 1 else plain(done[0]["uuid"])
    proof = proven(result.get("proof", []))
    first_pushed = f"{count(result['to_push'], 'record')} to be pushed first" if result.get("to_push") else ""
    return "; ".join(filter(None, [f"{what}{',' if dry else ': evicted,'} {freed}", proof, first_pushed]))


def proven(proofs: Sequence[Mapping[str, Any]]) -> str:
    """every byte is in lab (checksums read 2 h ago)"""
    if not proofs:
        return ""
    # A dry run names the stores and proves nothing: the proof is made, or looked at again, when it counts.
    said = [replica(proof) if proof.get("verified_at") else plain(proof.get("store")) for proof in proofs]
    return "every byte is in " + " and in ".join(said)


def _stays(entry: Mapping[str, Any]) -> str:
    advice = f". {plain(entry['advice'])}" if entry.get("advice") else ""
    return f"{entry['uuid']}: not evicted: {plain(entry.get('reason', '')).rstrip('.')}{advice}"


def grouped(entries: Sequence[Mapping[str, Any]]) -> str:
    """2 live (qcmIdGsGCpwS, Om2ibuekBk4f), 1 pinned (aV377i4WyOhs)"""
    groups: dict[str, list[str]] = {}
    for entry in entries:
        groups.setdefault(plain(entry.get("reason", "")), []).append(str(entry["uuid"]))
    ordered = sorted(groups.items(), key=lambda item: -len(item[1]))
    shown = [f"{count(len(uuids))} {reason} ({_some(uuids)})" for reason, uuids in ordered]
    return ", ".join(shown[:SHOWN]) + (f", and {len(shown) - SHOWN} more reasons" if len(shown) > SHOWN else "")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def hydrate(result: Result, args: Mapping[str, Any]) -> Lines:
    done = result.get("hydrated", [])
    would = "would be " if args.get("dry_run") else ""
    out = []
    if done:
        restored = sum(1 for each in done if each.get("restored"))
        note = f"; {count(restored)} back in {'its' if restored == 1 else 'their'} own directory" if restored else ""
        out.append(f"{count(len(done), 'record')} {would}hydrated, {size(result.get('bytes', 0))}{note}")
    elif not result.get("failed"):
        out.append("nothing to hydrate: every byte is here")
    return out + [f"{each['uuid']}: not hydrated: {plain(each.get('reason'))}" for each in result.get("failed", [])]


def push(result: Result, args: Mapping[str, Any]) -> Lines:
    done = result.get("pushed", [])
    would = "would be " if args.get("dry_run") else ""
    out = []
    for store in dict.fromkeys(str(each.get("store")) for each in done):
        mine = [each for each in done if str(each.get("store")) == store]
        files, total = sum(each.get("files", 0) for each in mine), sum(each.get("bytes", 0) for each in mine)
        records = count(len({each["uuid"] for each in mine}), "record")
        out.append(f"{records} {would}pushed to {plain(store)}: {count(files, 'file')}, {size(total)}")
    if not done and not result.get("failed"):
        out.append("nothing to push: every byte is in its homes")
    for each in result.get("failed", []):
        where = f" to {plain(each['store'])}" if each.get("store") else ""
        out.append(f"{each['uuid']}: not pushed{where}: {plain(each.get('reason'))}")
    return out


def pin(result: Result, args: Mapping[str, Any]) -> Lines:
    changed = result.get("changed", [])
    return [f"pinned: {_names(changed)}" if changed else "pinned already"]


def unpin(result: Result, args: Mapping[str, Any]) -> Lines:
    changed = result.get("changed", [])
    return [f"no longer pinned: {_names(changed)}" if changed else "was not pinned"]


def _names(changed: Sequence[Any]) -> str:
    uuids = [str(each["uuid"]) if isinstance(each, Mapping) else str(each) for each in changed]
    return ", ".join(uuids[:SHOWN]) + (f" and {count(len(uuids) - SHOWN)} more" if len(uuids) > SHOWN else "")


# -- safe, stores, doctor ------------------------------------------------------------------------


def safe(result: Result, args: Mapping[str, Any]) -> Lines:
    stores = " and ".join(_store_names(result.get("stores", [])))
    if result.get("safe"):
        return [f"safe: every byte of {count(result.get('records', 0), 'record')} is in {stores or 'its homes'}"]
    files = result.get("files", 0)
    what = count(files, "file") if files else count(len(result.get("unsafe", [])), "record")
    text = (
        f"not yet: {what} ({size(result.get('bytes', 0))}) {'is' if what.startswith('1 ') else 'are'} only on this disk"
    )
    if not stores:
        return [f"{text}; no store is configured: name one with --store URL or in the configuration", *_unsafe(result)]
    takes = f"; {stores} takes them at {rate(result['rate'])}" if result.get("rate") else ""
    left = f", about {duration(result['left_s'])}" if takes and result.get("left_s") is not None else ""
    held = all(each.get("held") for each in result.get("unsafe", []))  # a push would not help: see the reasons
    next_step = "" if takes or held else ". Next: runfs push"
    return [text + takes + left + next_step, *_unsafe(result)]


def _store_names(stores: Sequence[Any]) -> list[str]:
    return [plain(store["name"] if isinstance(store, Mapping) else store) for store in stores]


def _unsafe(result: Result) -> Lines:
    rows = [f"{u['uuid']}: {plain(u.get('reason'))}, {size(u.get('bytes', 0))}" for u in result.get("unsafe", [])]
    return first(rows, "more records")


def reindex(result: Result, args: Mapping[str, Any]) -> Lines:
    text = f"{count(result.get('ingested', 0), 'record')} indexed"
    if result.get("restored_rows"):
        text += f", {count(result['restored_rows'], 'record')} put back into the index"
    damaged = [f"{plain(each.get('path'))}: {plain(each.get('reason'))}" for each in result.get("damaged", [])]
    return [
        text + (f"; {count(len(damaged), 'directory is', 'directories are')} damaged:" if damaged else ""),
        *damaged,
        *(f"{plain(name)}: no record is there" for name in result.get("empty", [])),
        *_elsewhere(result.get("elsewhere", [])),
    ]


def _elsewhere(found: Sequence[Mapping[str, Any]]) -> Lines:
    counts = Counter(str(each.get("project")) for each in found)
    return [
        f"{count(number, 'record belongs', 'records belong')} to {plain(project)} on this machine: left out"
        for project, number in sorted(counts.items())
    ]


def import_(result: Result, args: Mapping[str, Any]) -> Lines:
    would = "would be " if args.get("dry_run") else ""
    failed = [f"{plain(e.get('source'))}: not imported: {plain(e.get('reason'))}" for e in result.get("failed", [])]
    said = f"{count(len(result.get('imported', [])), 'record')} {would}imported"
    if result.get("already"):
        said = f"brought already ({date(result['pin'].get('at_ns', 0) / 1e9)}): {_names(result['already'])}"
    elif result.get("would_bring"):
        said = f"{plain(result['would_bring'])} would be brought; what is in it is known then"
    elif result.get("linked"):
        said += f"; used where {'it would be' if would else 'it is'}, {plain(result['linked'])}, and pinned"
    pin = result.get("pin") or {}
    etag = f", ETag {plain(pin['etag'])}" if pin.get("etag") else ""
    return [said, *([f"pinned reference: {plain(pin['digest'])}{etag}"] if pin.get("digest") else []), *failed]


def doctor(result: Result, args: Mapping[str, Any]) -> Lines:
    words = {True: "ok", False: "wrong", None: "unsure"}
    out = []
    for check in result.get("checks", []):
        advice = f". {plain(check['advice'])}" if check.get("advice") and check.get("ok") is not True else ""
        word = words.get(check.get("ok"), "unsure")
        out.append(f"{word:<7} {plain(check['name'])}: {plain(check.get('message', ''))}{advice}")
    return out


def umount(result: Result, args: Mapping[str, Any]) -> Lines:
    where = plain(result.get("mountpoint"))
    if result.get("how") == "stale":
        return [f"{where}: its daemon had gone; unmounted. What was not pushed is kept: see runfs safe, or mount again"]
    pending = result.get("pending") or {}
    if not (pending.get("files") or pending.get("records")):
        return [f"{where}: unmounted; nothing is left to push"]
    what = count(pending["files"], "file") if pending.get("files") else count(pending["records"], "record")
    held = f"{what} ({size(pending.get('bytes', 0))})"
    text = f"{where}: unmounted; {held} not yet in the homes: kept here, and the next mount goes on with them"
    failed = [f"{e['uuid']}: not pushed: {plain(e.get('reason'))}" for e in result.get("failed") or []]
    return [text, *first(failed, "more records")]


_RENDERERS: dict[str, Callable[[Result, Mapping[str, Any]], Lines]] = {
    "status": status,
    "ls": ls,
    "evict": evict,
    "hydrate": hydrate,
    "push": push,
    "pin": pin,
    "unpin": unpin,
    "safe": safe,
    "verify": render_trust.verify,
    "reindex": reindex,
    "import": import_,
    "stores": render_stores.stores,
    "stores check": render_stores.check,
    "stores sweep": render_stores.sweep,
    "receipts": render_trust.receipts,
    "conflicts": render_trust.conflicts,
    "doctor": doctor,
    "umount": umount,
    "versions": render_versions.versions,
    "versions restore": render_versions.restore,
    "versions prune": render_versions.prune,
    "transaction": render_versions.transaction,
}
