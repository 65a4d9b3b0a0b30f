"""What people read of `runfs records`: results of `vfs.records.verbs` as lines of text. Pure functions."""

from collections.abc import Mapping, Sequence
from typing import Any

from daemon.quantities import count, plain, size

Lines = list[str]


def lines(verb: str, result: Mapping[str, Any], args: Mapping[str, Any]) -> Lines:
    """The text of a result."""
    return [*_SAID[verb](result, bool(args.get("dry_run"))), *_troubles(result)]


def _troubles(result: Mapping[str, Any]) -> Lines:
    found = [*result.get("failed", []), *result.get("damaged", [])]
    return [f"{plain(each.get('source') or each.get('path'))}: {plain(each.get('reason'))}" for each in found]


def _commit(result: Mapping[str, Any], dry: bool) -> Lines:
    out = []
    for each in result["committed"]:
        stores: Sequence[Mapping[str, Any]] = each.get("stores", [])
        said = [f"{plain(s['store'])}: {count(s['files'], 'file')}, {size(s['bytes'])}" for s in stores]
        out.append(f"{each['uuid']}: {'would be ' if dry else ''}committed{' to ' if said else ''}{'; '.join(said)}")
        out += [f"  {plain(path)} clashed; theirs is {plain(second)}" for path, second in each.get("clashes", [])]
        if each.get("unsettled"):
            out.append(f"  {count(len(each['unsettled']), 'file')} still being written: commit again when the run ends")
    return out or ["nothing committed"]


def _contains(result: Mapping[str, Any], _dry: bool) -> Lines:
    return [f"{result['uuid']}: {'yes' if result['contains'] else 'in none of the stores'}"]


def _retrieve(result: Mapping[str, Any], dry: bool) -> Lines:
    if not result["found"]:
        return [f"{result['uuid']}: in none of the stores; runfs records walk lists what is there"]
    where = plain(result["directory"])
    return [
        f"{where}: would be {result['uuid']}" if dry else f"{where}: {result['uuid']} from {plain(result['store'])}"
    ]


def _download(result: Mapping[str, Any], _dry: bool) -> Lines:
    return [f"{plain(each['directory'])}: {each['uuid']}" for each in result["retrieved"]]


def _delete(result: Mapping[str, Any], dry: bool) -> Lines:
    if not result["deleted"]:
        return [f"{result['uuid']}: in none of the stores"]
    return [f"{result['uuid']}: {'would be ' if dry else ''}deleted from the stores"]


def _walk(result: Mapping[str, Any], _dry: bool) -> Lines:
    return [
        f"{each['uuid']}  {plain(each['store'])}  {count(each['files'], 'file')}  {size(each['bytes'])}"
        + ("  no manifest" if each["plain"] else "")
        for each in result["records"]
    ] or ["no records"]


def _search(result: Mapping[str, Any], _dry: bool) -> Lines:
    return list(result["uuids"]) or ["none found"]


def _where(result: Mapping[str, Any], _dry: bool) -> Lines:
    return [f"{plain(result['id'])}  {plain(result['root'])}", *([plain(result["uri"])] if result["uri"] else [])]


_SAID = {
    "commit": _commit,
    "upload": _commit,
    "contains": _contains,
    "retrieve": _retrieve,
    "download": _download,
    "delete": _delete,
    "walk": _walk,
    "search": _search,
    "where": _where,
}
