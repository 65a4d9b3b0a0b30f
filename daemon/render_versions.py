"""What people read of versions and transactions: results as lines of text. Pure functions, used by `daemon.render`."""

from collections.abc import Mapping
from typing import Any

from daemon.quantities import count, date, plain, size
from daemon.render_status import Lines, Result, first, table

_COLUMNS = ("version", "at", "files", "size", "changed", "store", "notes")


def versions(result: Result, args: Mapping[str, Any]) -> Lines:
    out: Lines = []
    records = result.get("records", [])
    for record in records:
        rows = [_row(each) for each in record.get("versions", [])]
        out += [plain(record["uuid"])] if len(records) > 1 else []
        out += table(_COLUMNS, rows) or [f"{plain(record['uuid'])}: no store has a version of it; runfs push"]
        out += [f"{plain(e['store'])} does not answer: {plain(e['reason'])}" for e in record.get("failed", [])]
    return out


def _row(each: Mapping[str, Any]) -> tuple[str, ...]:
    if each.get("error"):
        return (str(each["number"]), "", "", "", "", plain(each.get("store")), f"damaged: {plain(each['error'])}")
    marks = [word for word in ("present", "interim") if each.get(word)]
    notes = [f"({', '.join(marks)})"] if marks else []
    return (
        str(each["number"]),
        date(each.get("at")),
        count(each.get("files") or 0),
        size(each.get("bytes") or 0),
        size(each["changed_bytes"]) if each.get("changed_bytes") is not None else "",
        plain(each.get("store")),
        " ".join([*notes, *([plain(each["notes"])] if each.get("notes") else [])]),
    )


def restore(result: Result, args: Mapping[str, Any]) -> Lines:
    uuid, number = plain(result.get("uuid")), result.get("number")
    if not result.get("paths"):
        return [f"{uuid}: it is what it was in version {number}; nothing to do"]
    would = "would change" if result.get("dry_run") else "changed"
    what = f"{count(result['paths'], 'path')} {would} to what they were in version {number}"
    made = f", {size(result['bytes'])} of contents" if result.get("bytes") else ""
    new = f"; it is version {result['version']} now" if result.get("version") and not result.get("dry_run") else ""
    out = [f"{uuid}: {what}{made}{new}"]
    for word, verb in (("removed", "removed"), ("made", "brought back"), ("touched", "mode or time")):
        out += [f"  {verb:<12} {plain(path)}" for path in result.get(word, [])] if result.get("dry_run") else []
    return [*first(out, "more paths"), *_failed(result)]


def _failed(result: Result) -> Lines:
    return [
        f"{plain(result.get('uuid'))}: not pushed yet{_to(e)}: {plain(e.get('reason'))}"
        for e in result.get("failed", [])
    ]


def _to(entry: Mapping[str, Any]) -> str:
    return f" to {plain(entry['store'])}" if entry.get("store") else ""


def prune(result: Result, args: Mapping[str, Any]) -> Lines:
    would = "would be " if result.get("dry_run") else ""
    gone, objects = result.get("versions", 0), result.get("objects", 0)
    if gone or objects:
        out = [
            f"{count(gone, 'version')} and {count(objects, 'object')} {would}removed, {size(result.get('bytes', 0))}"
        ]
    else:
        out = ["nothing to prune"]
    for each in result.get("pruned", []):
        for bad in each.get("damaged", []):
            where = f"version {bad['number']} in {plain(each['store'])} cannot be read ({plain(bad['reason'])})"
            out.append(f"{each['uuid']}: {where}; as long as it is there, no object of the record is removed")
    if result.get("uploads"):
        out.append(f"{count(result['uploads'], 'unfinished upload')} removed")
    return out + [f"{plain(e.get('uuid'))}: {plain(e.get('reason'))}{_in(e)}" for e in result.get("failed", [])]


def _in(entry: Mapping[str, Any]) -> str:
    return f" (in {plain(entry['store'])})" if entry.get("store") else ""


def transaction(result: Result, args: Mapping[str, Any]) -> Lines:
    uuid, what = plain(result.get("uuid")), result.get("what")
    if what == "begin":
        return [
            f"{uuid}: a transaction is open; others go on seeing it as it is now until: runfs transaction commit {uuid}"
        ]
    if what == "rollback":
        return [f"{uuid}: rolled back; {count(result.get('paths') or 0, 'path')} changed back"]
    if result.get("failed"):
        return [f"{uuid}: committed, and published as soon as that works", *_failed(result)]
    number = result.get("version")
    return [f"{uuid}: committed as version {number}" if number else f"{uuid}: committed; nothing had changed"]
