"""What the commands about stores say, as lines of text.

Used by `daemon.render`. Nothing here blocks.
"""

from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

from daemon.quantities import count, duration, plain, size

Result = Mapping[str, Any]
Lines = list[str]


def stores(result: Result, args: Mapping[str, Any]) -> Lines:
    out: Lines = []
    for store in result.get("stores", []):
        check = store.get("check") or {}
        out.append(f"{plain(store['name'])}  {plain(store.get('url'))}  {_checked(check)}")
        out += [f"  {text}" for text in _abilities(store.get("info") or {})]
        out += [
            f"  warning  {plain(text)}" for text in [*(check.get("problems") or []), *(store.get("warnings") or [])]
        ]
    return out or ["no store is configured: name one with --store URL, or in the configuration (runfs config path)"]


def _checked(check: Mapping[str, Any]) -> str:
    if not check:
        return "not checked"
    names = ("reachable", "readable", "writable")
    facts = [name if check[name] else f"not {name}" for name in names if check.get(name) is not None]
    latency = check.get("latency_s")
    return ", ".join([*facts, *([f"{latency * 1000:,.0f} ms"] if latency is not None else [])])


def _abilities(info: Mapping[str, Any]) -> Lines:
    words = {"ranges": "ranges", "conditional_write": "conditional writes", "server_copy": "copies on the server"}
    words |= {"read_only": "reading only", "calculates": "makes what it is asked for"}
    able = [word for key, word in words.items() if info.get(key)]
    able += [f"{plain(info['checksum'])} checksums"] if info.get("checksum") else []
    text = f"{plain(info.get('broker', 'store'))}: {', '.join(able) or 'reads and writes only'}"
    single = "  several hosts must not write here at once" if info.get("conditional_write") is False else ""
    return [text] + ([single.strip()] if single and not info.get("read_only") else []) if info else []


def check(result: Result, args: Mapping[str, Any]) -> Lines:
    out: Lines = []
    for store in result.get("stores", []):
        tried, valid = store.get("check") or {}, store.get("valid")
        verdict = "ok" if store.get("ok") else "does not work" if valid else "wrong configuration"
        out.append(f"{plain(store['name'])}: {verdict}  {plain(store.get('url'))}")
        word = "note" if store.get("ok") else "error"
        out += [f"  {word:<8} {plain(text)}" for text in tried.get("problems") or []]
        out += [f"  warning  {plain(text)}" for text in store.get("warnings") or []]
        out += [f"  mount    {text}" for text in _volume(store.get("volume"))]
        if store.get("info"):
            out += [f"  tried    {_checked(tried)}{_skewed(tried)}"]
        if store.get("info") and tried.get("reachable"):  # some find out only then
            out += [
                f"  {word:<8} {text}" for word, text in zip_longest(["does"], in_words(store["info"]), fillvalue="")
            ]
    return out


def _volume(volume: Mapping[str, Any] | None) -> Lines:
    if not volume:
        return []
    return [
        f"{plain(volume['remote_path'])} must be mounted at {plain(volume['local_path'])} ({plain(volume['driver'])})"
    ]


def _skewed(tried: Mapping[str, Any]) -> str:
    skew = tried.get("clock_skew_s")
    return f", its clock is {skew:+,.0f} s off" if skew is not None and abs(skew) >= 1 else ""


_CAN = {  # what Info says: yes, and no where that is worth knowing
    "ranges": ("reads parts of an object", "reads whole objects only: a range costs all of it"),
    "lists": (None, "has no listing"),
    "atomic_replace": ("replaces an object in one step", "readers may see an object that is half replaced"),
    "conditional_write": ("conditional writes: several hosts may write", "no conditional writes: one host only"),
    "server_copy": ("copies on the server", None),
    "server_move": ("moves on the server", None),
    "resumes": ("goes on with interrupted uploads", None),
    "sweeps": ("interrupted uploads stay until: runfs stores sweep", None),
    "chooses_keys": ("names objects itself", None),
    "calculates": ("makes what is asked for: asked last", None),
}


def in_words(info: Mapping[str, Any]) -> Lines:
    """What a store can do, a line each."""
    writes = {"atomic_replace", "conditional_write", "server_copy", "server_move", "sweeps", "resumes", "chooses_keys"}
    only_reads = bool(info.get("read_only"))
    out = ["read only: nothing is pushed there"] if only_reads else []
    for key, (yes, no) in _CAN.items():
        text = yes if info.get(key) else no
        if text and not (only_reads and key in writes):
            out.append(text)
    kind = info.get("checksum")
    out.append(f"keeps {plain(kind)} checksums" if kind else "keeps no checksums: proofs are read back")
    if info.get("max_object"):
        out.append(f"objects of at most {size(info['max_object'])}")
    return out


def sweep(result: Result, args: Mapping[str, Any]) -> Lines:
    age = duration(result.get("older_than_s") or 0.0)
    out: Lines = []
    for each in result.get("swept", []):
        name = plain(each["name"])
        if each.get("error"):
            out.append(f"{name}: not swept: {plain(each['error'])}")
        elif not each.get("leaves"):
            out.append(f"{name}: interrupted uploads leave nothing there")
        elif args.get("dry_run"):
            out.append(f"{name}: what interrupted uploads left more than {age} ago would be removed")
        else:
            out.append(f"{name}: {count(each['removed'], 'interrupted upload')} of more than {age} ago removed")
    return out
