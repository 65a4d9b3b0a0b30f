"""What people read of the state of a mount: `status`, `ls`, and the line a mount starts with. Pure functions.

Used by `daemon.render`, which has the other commands. Results are the JSON-able dicts of `Session.run`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from daemon.quantities import ago, clock, count, date, duration, plain, rate, size

Result = Mapping[str, Any]
Lines = list[str]

SHOWN = 10  # rows of a list that may be long; the rest is counted, and --json has them all
_VERBS = {"push": ("pushing", "->"), "hydrate": ("hydrating", "<-"), "verify": ("checking", "of")}
_PROOFS = {"checksum": "checksums read", "read": "read back"}  # and "md5 of the store"


def first(rows: Lines, more: str) -> Lines:
    """The first rows, and how many there are beside them."""
    return rows[:SHOWN] + ([f"and {count(len(rows) - SHOWN)} {more} (--json has all)"] if len(rows) > SHOWN else [])


# -- status --------------------------------------------------------------------------------------------------------


def status(result: Result, args: Mapping[str, Any]) -> Lines:
    if "paths" in result:
        return [line for path in result["paths"] for line in _path_lines(path)]
    out = [] if result.get("mountpoint") else [_not_mounted(result)]
    out.append(_states(result.get("states", {})))
    out += [_transaction(each) for each in result.get("transactions", [])][:SHOWN]
    out += [_moving(move) for move in result.get("moving", [])]
    out += [_waiting(wait) for wait in result.get("waiting", [])]
    out += first([_damaged(each) for each in result.get("quarantine", [])], "more are damaged")
    out += first([_conflict(each) for each in result.get("conflicts", [])], "more conflicts")
    out += first([_queued(entry) for entry in result.get("queue", [])], "more are queued")
    out += [
        f"store     {plain(s['name'])}: {_reach(s)}" for s in result.get("stores", []) if s.get("reachable") is False
    ]
    return out + [f"warning   {plain(text)}" for text in result.get("warnings", [])]


def _states(states: Mapping[str, Mapping[str, Any]]) -> str:
    resident, evicted, dirty = (states.get(name, {}) for name in ("resident", "evicted", "dirty"))
    parts = [f"resident  {count(resident.get('records', 0), 'record')}  {size(resident.get('bytes', 0))}"]
    back = evicted.get("cached_bytes", 0)
    # What is kept small and the file system's blocks can make it more than was evicted.
    all_back = back >= evicted.get("bytes", 0)
    hint = f" ({'all' if all_back else size(back)} of it back in the cache)" if back else ""
    parts.append(f"evicted  {count(evicted.get('records', 0))}  {size(evicted.get('bytes', 0))}{hint}")
    if dirty.get("files") or dirty.get("records"):
        what = count(dirty["files"], "file") if dirty.get("files") else count(dirty["records"], "record")
        parts.append(f"dirty  {what}  {size(dirty.get('bytes', 0))}")
    return "     ".join(parts)


def _moving(move: Mapping[str, Any]) -> str:
    verb, arrow = _VERBS.get(str(move.get("what")), (str(move.get("what")), "at"))
    what = f"{plain(move['path'])} of {move.get('uuid')}" if move.get("path") else plain(move.get("uuid", ""))
    store = f" {arrow} {plain(move['store'])}" if move.get("store") else ""
    parts = [f"{verb:<9} {what}{store}", share(move), rate(move.get("rate")), _left(move)]
    return "   ".join(part for part in parts if part)


def share(move: Mapping[str, Any]) -> str:
    """`41 %`, or what is done where the whole is not known."""
    total, done = move.get("size") or move.get("total"), move.get("done")
    if done is None:
        return ""
    return f"{min(100, int(100 * done / total))} %" if total else size(done)


def _transaction(each: Mapping[str, Any]) -> str:
    """open      transaction of qcmIdGsGCpwS, since 2 h: cleaned the labels"""
    notes = f": {plain(each['notes'])}" if each.get("notes") else ""
    since = ago(each.get("since")).removesuffix(" ago")
    return f"{plain(each.get('state')):<9} transaction of {plain(each.get('uuid'))}, since {since}{notes}"


def _left(move: Mapping[str, Any]) -> str:
    left = clock(move.get("left_s"))
    return f"{left} left" if left else ""


def _waiting(wait: Mapping[str, Any]) -> str:
    who = process(wait)
    here = f"{size(wait.get('done', 0))} of {size(wait.get('size'))} here"
    return f"waiting   {who} reads {plain(wait.get('path', ''))} of {wait.get('uuid')}   {here}"


def process(entry: Mapping[str, Any]) -> str:
    """python[4121]"""
    return f"{plain(entry.get('process') or 'process')}[{entry.get('pid', '?')}]"


def _not_mounted(result: Result) -> str:
    if not result.get("dead_mount"):
        return f"not mounted: {plain(result.get('index', 'this index'))}"
    where = plain(result["dead_mount"])
    return f"{where}: its daemon is gone. Run: runfs umount {where}, then mount again; nothing is lost"


def _damaged(each: Mapping[str, Any]) -> str:
    kept = f"; the damaged bytes are {plain(each['kept'])}" if each.get("kept") else ""
    what = f"{plain(each.get('path'))} of {plain(each.get('uuid'))}"
    return f"damaged   {what}: no right copy is left ({plain(each.get('reason'))}){kept}"


def _conflict(each: Mapping[str, Any]) -> str:
    uuid = plain(each.get("uuid"))
    return f"conflict  {plain(each.get('path'))} of {uuid}: {plain(each.get('kind'))}; runfs conflicts {uuid}"


def _queued(entry: Mapping[str, Any]) -> str:
    text = f"queued    {entry.get('uuid')}: {plain(entry.get('why', 'to be pushed'))}"
    if entry.get("since"):
        text += f", since {ago(entry['since']).removesuffix(' ago')}"
    if entry.get("attempts"):
        text += f", tried {count(entry['attempts'], 'time')}"
    if entry.get("next_try_s"):
        text += f", again in {duration(entry['next_try_s'])}"
    return text + (f": {plain(entry['error'])}" if entry.get("error") else "")


def _reach(store: Mapping[str, Any]) -> str:
    """`reachable, 41 ms` or why not."""
    if store.get("reachable") is False:
        reason = f": {plain(store['error'])}" if store.get("error") else ""
        return f"not reachable{reason}"
    if store.get("reachable") is None:
        return "not asked yet"
    latency = store.get("latency_ms")
    return f"reachable, {latency:,.0f} ms" if latency is not None else "reachable"


def _path_lines(path: Mapping[str, Any]) -> Lines:
    local, total = path.get("local_bytes"), path.get("size")
    partly = f" ({size(local)} here)" if local and total and local < total else ""
    facts = [f"{path.get('state', 'unknown')}, {size(total)}{partly}"]
    facts += [name for name in ("pinned", "live", "dirty") if path.get(name) and path.get("state") != name]
    replicas = path.get("replicas") or []
    facts += [f"in {replica(each)}" for each in replicas] or ["in no store"]
    out = [f"{plain(path.get('path'))}  {', '.join(facts)}"]
    if path.get("digest"):
        out.append(f"  digest  {plain(path['digest'])}")
    out += [f"  stays   {plain(reason)}" for reason in path.get("stays") or []]
    return out + ([f"  error   {plain(path['error'])}"] if path.get("error") else [])


def replica(entry: Mapping[str, Any]) -> str:
    """lab (checksums read 2 h ago)"""
    when = ago(entry.get("verified_at"))
    words = [
        _PROOFS.get(word, plain(word).replace(" of the store", " checksums read"))
        for word in str(entry.get("how") or "verified" if when else "").split(" and ")
    ]
    how = " and ".join(words) or "not verified"
    return f"{plain(entry.get('store'))} ({how}{' ' + when if when else ''})"


def mounted(info: Result) -> str:
    """The line `runfs mount` prints: /mnt/runs: 1,284 records, 5 evicted; lab: reachable, 41 ms"""
    evicted = info.get("states", {}).get("evicted", {}).get("records", 0)
    text = f"{plain(info.get('mountpoint'))}: {count(info.get('records', 0), 'record')}, {count(evicted)} evicted"
    stores = [f"{plain(store['name'])}: {_reach(store)}" for store in info.get("stores", [])]
    return "; ".join([text, *(stores or ["no store: nothing can be pushed or evicted (mount with --store URL)"])])


# -- ls ------------------------------------------------------------------------------------------------------------

LS_COLUMNS = ("uuid", "state", "size", "here", "kind", "status", "created", "label", "module")


def ls_rows(result: Result) -> list[tuple[str, ...]]:
    """One row a record, for a table."""
    return [
        (
            plain(r["uuid"]),
            plain(r.get("state") or "") + (" pinned" if r.get("pinned") else ""),
            size(r["size"]) if r.get("size") is not None else "",
            size(r["local_bytes"]) if r.get("local_bytes") is not None else "",
            plain(r.get("kind") or "") + (f" +{r['nested']}" if r.get("nested") else ""),
            plain(r.get("status") or ""),
            date(r.get("created_at")),
            plain(r.get("label") or ""),
            plain(r.get("module") or ""),
        )
        for r in result.get("records", [])
    ]


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Lines:
    """Aligned columns; a column with nothing in it is left out."""
    body = [tuple(row) for row in rows]
    if not body:
        return []
    used = [i for i in range(len(columns)) if any(row[i] for row in body)]
    widths = {i: max(len(columns[i]), *(len(row[i]) for row in body)) for i in used}
    right = {i for i in used if columns[i] in ("size", "here", "files", "latency")}
    shape = [(columns, True), *((row, False) for row in body)]
    return ["  ".join(_cell(row[i], widths[i], i in right) for i in used).rstrip() for row, _ in shape]


def _cell(text: str, width: int, right: bool) -> str:
    return text.rjust(width) if right else text.ljust(width)


def ls(result: Result, args: Mapping[str, Any]) -> Lines:
    rows = table(LS_COLUMNS, ls_rows(result))
    return rows or ["no records" + (" match" if args.get("where") else "")]
