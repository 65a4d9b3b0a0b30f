"""What people read of scrubs, receipts and conflicts: results as lines of text. Used by `daemon.render`."""

from collections.abc import Mapping
from typing import Any

from daemon.quantities import ago, count, date, plain, size
from daemon.render_status import Lines, Result, table


def verify(result: Result, args: Mapping[str, Any]) -> Lines:
    bad = result.get("bad", [])
    left = [each for each in bad if each.get("outcome") != "repaired"]
    repaired = result.get("repaired") or 0
    verdict = f"{count(len(left), 'is', 'are')} wrong or missing" if left else "all as they should be"
    verdict += f", {count(repaired)} repaired" if repaired else ""
    out = [f"{count(result.get('checked', 0), 'file')} checked, {size(result.get('bytes', 0))}: {verdict}"]
    if result.get("resumed"):
        out.append(f"went on with a scrub begun {ago(result['resumed'])}; --restart begins anew")
    for each in bad:
        where = f" in {plain(each['store'])}" if each.get("store") else ""
        outcome = f"{plain(each['outcome'])}: " if each.get("outcome") else ""
        what = plain(each.get("path") or "manifest")
        out.append(f"{each['uuid']}: {what}{where}: {outcome}{plain(each.get('reason'))}")
    if left and result.get("repair") is False and not args.get("dry_run"):
        out.append("next: runfs verify --repair")
    if result.get("stopped"):
        out.append("stopped before the end; the same command goes on from here")
    return out


def receipts(result: Result, args: Mapping[str, Any]) -> Lines:
    rows = [
        tuple(
            plain(cell)
            for cell in (
                date(each.get("at")),
                each.get("what", ""),
                each.get("uuid", ""),
                each.get("store") or "",
                count(each.get("files") or 0),
                size(each.get("bytes") or 0),
                str(each.get("digest") or "")[:16],
                each.get("proof") or "",
                _until(each),
            )
        )
        for each in result.get("receipts", [])
    ]
    columns = ("at", "what", "record", "store", "files", "size", "digest", "proof", "counts until")
    return table(columns, rows) or ["no receipts"]


def _until(each: Mapping[str, Any]) -> str:
    if each.get("expires_at") is None:
        return ""
    return "expired" if each.get("expired") else date(each["expires_at"])


def conflicts(result: Result, args: Mapping[str, Any]) -> Lines:
    if "settled" in result:
        return _settled(result)
    found = result.get("conflicts", [])
    if not found:
        return ["no conflicts"]
    out: Lines = []
    for each in found:
        out.append(f"{plain(each.get('uuid'))}: {plain(each.get('path'))}: {plain(each.get('kind'))}")
        for whose in ("ours", "theirs"):
            side = each.get(whose)
            said = f"{plain(side['path'])}, {size(side['size'])}, {date(side['mtime'])}" if side else "removed"
            out.append(f"  {whose:<7} {said}")
    one = plain(found[0].get("uuid"))
    return [*out, f"settle with: runfs conflicts {one} [PATH]... --keep ours|theirs|both"]


def _settled(result: Result) -> Lines:
    would, kept = "would be " if result.get("dry_run") else "", plain(result.get("keep"))
    out = []
    for each in result.get("settled", []):
        side = each.get(str(result.get("keep")))
        said = "both stay under their names"
        if result.get("keep") != "both":
            said = f"{kept} {'stays' if side else 'was a removal: it goes'}"
        out.append(f"{plain(each.get('uuid'))}: {plain(each.get('path'))}: {would}settled, {said}")
    for each in result.get("failed", []):
        out.append(f"{plain(each.get('uuid'))}: {plain(each.get('path'))}: not settled: {plain(each.get('reason'))}")
    return out or ["nothing to settle"]
