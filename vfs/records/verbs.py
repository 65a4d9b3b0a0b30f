"""Records in stores as commands: `(records, args) -> result`, dicts that JSON can hold. `runfs records` shows them, and
`vfs/machinable_storage.py` reads them: their keys are an interface. Blocks as `vfs.records` does.
"""

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from vfs.errors import DamagedRecord, RunfsError, UsageError
from vfs.format import read_header
from vfs.records import Records
from vfs.records.local import finder, root_of
from vfs.settings import Settings, StoreSettings
from vfs.stores import Store, nature, open_store

log = logging.getLogger(__name__)

Args = Mapping[str, Any]
Verb = Callable[[Records, Args], dict[str, Any]]


@contextmanager
def opened(settings: Settings, *, new: bool = True) -> Iterator[Records]:
    """Records in the configured stores that keep what they are given; a store that calculates is left out. `new`: a
    directory that is not there yet becomes one. Raises ConfigError, UsageError when there is none."""
    stores: list[Store] = []
    try:
        for each in settings.stores:
            if not new:
                _must_be_there(each.url)
            if not nature(each.url, each.name, each.options).calculates:
                stores.append(_open(each, settings))
        if not stores:
            raise UsageError("no store is configured: name one with --store URL, or in the configuration file")
        yield Records(stores)
    finally:
        for store in stores:
            store.disconnect()


def _must_be_there(url: str) -> None:
    """Who only looks must not make a store of a mistyped directory."""
    parts = urlsplit(url)
    if parts.scheme == "file" and not os.path.isdir(unquote(parts.path)):
        raise UsageError(f"{url}: there is no such directory")


def _open(given: StoreSettings, settings: Settings) -> Store:
    own, least = given.deadline_s, given.least_throughput
    limits = {
        "deadline_s": settings.deadline_s if own is None else own,
        "least_throughput": settings.least_throughput if least is None else least,
    }
    return open_store(given.url, given.name, {**limits, **given.options})


def commit(records: Records, args: Args) -> dict[str, Any]:
    """Bring directories to the stores; each record once, however many of its nested ones are named."""
    committed: list[dict[str, Any]] = []
    failed: list[dict[str, str]] = []
    done: set[str] = set()
    for directory in args["directories"]:
        try:
            uuid, root = root_of(directory)
            if uuid not in done:
                committed.append(_commit(records, uuid, root, dry_run=bool(args.get("dry_run"))))
                done.add(uuid)
        except (RunfsError, OSError) as error:
            failed.append({"source": str(directory), "reason": str(error)})
    return {"committed": committed, "failed": failed, "exit": int(bool(failed))}


def _commit(records: Records, uuid: str, root: Path, *, dry_run: bool) -> dict[str, Any]:
    shown: dict[str, Any] = {"uuid": uuid, "directory": str(root), "uri": records.home_uri(uuid)}
    if dry_run:
        return shown
    done = records.commit(root)
    stores = [{"store": name, "files": files, "bytes": size} for name, (files, size) in done.stores.items()]
    clashes = [[os.fsdecode(path), os.fsdecode(second)] for path, second in done.clashes]
    return {**shown, "stores": stores, "clashes": clashes, "unsettled": [os.fsdecode(path) for path in done.unsettled]}


def upload(records: Records, args: Args) -> dict[str, Any]:
    """Bring a record and those related to it to the stores."""
    places = args.get("storage") or [Path(args["directory"]).absolute().parent.parent]
    done = records.upload(args["directory"], int(args.get("related", 1)), finder(places))
    failed = [{"source": uuid, "reason": reason} for uuid, reason in done.failed.items()]
    return {"committed": [{"uuid": uuid} for uuid in done.done], "failed": failed, "exit": int(bool(failed))}


def contains(records: Records, args: Args) -> dict[str, Any]:
    """Whether a store has a record."""
    found = records.contains(args["uuid"], args.get("root"))
    return {"uuid": args["uuid"], "contains": found, "exit": int(not found)}


def retrieve(records: Records, args: Args) -> dict[str, Any]:
    """Make a directory hold a record."""
    uuid, directory = args["uuid"], os.path.abspath(args["directory"])
    if args.get("dry_run"):
        store = "" if records.contains(uuid, args.get("root")) else None
    else:
        store = records.fetch(uuid, directory, args.get("root"))
    return {
        "uuid": uuid,
        "directory": directory,
        "store": store,
        "found": store is not None,
        "exit": int(store is None),
    }


def download(records: Records, args: Args) -> dict[str, Any]:
    """Bring a record and those related to it into directories named after them."""
    done = records.download(args["uuid"], args["destination"], int(args.get("related", 1)))
    failed = [{"source": uuid, "reason": reason} for uuid, reason in done.failed.items()]
    retrieved = [
        {"uuid": uuid, "directory": str(place)} for uuid, place in zip(done.done, done.directories, strict=True)
    ]
    return {"retrieved": retrieved, "failed": failed, "exit": int(bool(failed))}


def delete(records: Records, args: Args) -> dict[str, Any]:
    """Remove a record from the stores."""
    uuid = args["uuid"]
    gone = records.contains(uuid) if args.get("dry_run") else records.delete(uuid)
    return {"uuid": uuid, "deleted": gone, "exit": int(not gone)}


def walk(records: Records, args: Args) -> dict[str, Any]:
    """Every record in the stores."""
    found = [
        {
            "uuid": each.uuid,
            "store": each.store,
            "files": each.files,
            "bytes": each.size,
            "plain": each.plain,
            "nested": sorted(str(row["record_id"]) for row in each.rows if row.get("record_id") != each.uuid),
            "uri": records.home_uri(each.uuid),
        }
        for each in records.walk()
    ]
    return {"records": found, "damaged": _damaged(records), "exit": int(bool(records.damaged))}


def search(records: Records, args: Args) -> dict[str, Any]:
    """Records with these keys, the newest first: given, or those of the record in a directory."""
    identity, predicate = args.get("identity_key"), args.get("predicate_key")
    if args.get("like"):
        header = read_header(args["like"])
        identity, predicate = header.identity_key, header.predicate_key
    if not identity:
        raise UsageError("which records? Give --identity-key, or --like with the directory of a record")
    return {"uuids": records.search(identity, predicate), "damaged": _damaged(records), "exit": 0}


def where(records: Records, args: Args) -> dict[str, Any]:
    """What the stores are called, and where a record belongs."""
    uuid = args.get("uuid")
    return {"id": records.id, "root": records.root(), "uri": records.home_uri(uuid) if uuid else None, "exit": 0}


def _damaged(records: Records) -> list[dict[str, str]]:
    return [{"path": key, "reason": reason} for key, reason in records.damaged]


VERBS: dict[str, Verb] = {
    "commit": commit,
    "upload": upload,
    "contains": contains,
    "retrieve": retrieve,
    "download": download,
    "delete": delete,
    "walk": walk,
    "search": search,
    "where": where,
}


def run(settings: Settings, verb: str, args: Args) -> dict[str, Any]:
    """Run one of `VERBS` on the configured stores. Raises RunfsError."""
    with opened(settings, new=verb not in ("walk", "retrieve", "download")) as records:
        try:
            return VERBS[verb](records, args)
        except OSError as error:
            raise DamagedRecord(f"{error.filename or verb}: {error.strerror or error}") from error
