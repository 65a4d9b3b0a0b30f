"""Earlier versions of a record in a store: where they are, how one is kept, which are there.

Used by `vfs/wire.py` when it publishes, so by everything that publishes a record, and by the version commands. Blocks
on stores, each call within its deadline. Contents are never overwritten, so a manifest is all it takes to keep a
version:

    .runfs/<uuid>/versions/<n>.json    the manifest of version n, exactly as it was published

The present version is `.runfs/<uuid>/manifest.json`. Before it is replaced, it is written to its place among the
versions; so all that was ever published is there or is the present one, and nothing else is: what a crash or a lost
race leaves behind is a second copy of the present one. A number belongs to one manifest: it is larger than that of
the one it replaces, and replacing is conditional. Where two different manifests claim a number all the same (a store
without conditional writes and two writers), the one that is there stays.

Live runs are pushed twice a minute, and each push replaces the last. What was published while somebody wrote
("interim") and was replaced within `COALESCED_S` is not kept: a day of heartbeats makes no version, its end makes
one."""

import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from vfs.errors import Conflict, ManifestError, NotFound, StoreError
from vfs.manifest import Manifest, dump, parse, same_tree
from vfs.stores.protocol import Stat, Store

if TYPE_CHECKING:
    from vfs.wire import Kept

log = logging.getLogger(__name__)

COALESCED_S = 600.0  # longer than the pauses between pushes of a live run, shorter than a person's between two looks
# How long an announcement is believed. Who sweeps stops after a quarter of it; requests end at their deadlines.
ANNOUNCED_S = 600.0
_DIGITS = 19


def put(store: Store, key: str, body: bytes, *, if_absent: bool = False, if_version: str | None = None) -> None:
    """Write what is found by its key alone. Raises Conflict, and StoreError when the store has put it elsewhere
    (`Info.chooses_keys`): it may choose the keys of contents, which a manifest names, but not this one."""
    stat = store.write(key, body, if_absent=if_absent, if_version=if_version)
    if stat.key != key:
        store.delete(stat.key)
        raise StoreError(
            f"{store.name} put {key} under a key of its own, where nobody would find it: it can be no home of records"
        )


def version_key(uuid: str, number: int) -> str:
    """Where the manifest of an earlier version is in a store."""
    return f".runfs/{uuid}/versions/{number}.json"


def is_kept(manifest: Manifest, now_ns: int) -> bool:
    """Whether a manifest stays as a version when it is replaced now."""
    return not manifest.interim or now_ns - manifest.published_ns > COALESCED_S * 1e9


def keep(kept: "Kept", manifest: Manifest, told: Callable[[Manifest], None]) -> bool:
    """Keep the manifest that is about to be replaced; `told` hears of it. False when it is one that is not kept.
    Raises StoreError: then it must not be replaced."""
    if not is_kept(manifest, time.time_ns()):
        return False
    store, key, body = kept.store(), version_key(manifest.uuid, manifest.generation), dump(manifest)
    with kept.watched():
        try:
            if store.info().conditional_write:
                put(store, key, body, if_absent=True)
            elif _present(store, key) is None:
                put(store, key, body)
        except Conflict:
            there = _present(store, key)
            if there is not None and there != body:
                log.warning("%s: %s holds another version %d", manifest.uuid, kept.name, manifest.generation)
    told(manifest)
    return True


def _present(store: Store, key: str) -> bytes | None:
    try:
        return store.read(key)
    except NotFound:
        return None


def numbers(kept: "Kept", uuid: str) -> dict[int, Stat]:
    """The earlier versions that a store has of a record, by number. None from a store that cannot list."""
    store = kept.store()
    if not store.info().lists:
        return {}
    prefix = version_key(uuid, 0).removesuffix("0.json")
    found = {}
    with kept.watched():
        for stat in store.list(prefix, recursive=False):
            name = stat.key.removeprefix(prefix).removesuffix(".json")
            if name.isascii() and name.isdigit() and len(name) < _DIGITS and stat.key == version_key(uuid, int(name)):
                found[int(name)] = stat
    return found


def read(kept: "Kept", uuid: str, number: int) -> Manifest:
    """The manifest of one earlier version. Raises NotFound, ManifestError, StoreError."""
    with kept.watched():
        found = parse(kept.store().read(version_key(uuid, number)), uuid)
    if found.generation != number:
        raise ManifestError(f"{version_key(uuid, number)} in {kept.name} is version {found.generation}")
    return found


def same_state(one: Manifest, other: Manifest) -> bool:
    """Whether two manifests describe the same files and rows, whenever and wherever they were published."""
    return same_tree(one, other) and one.rows == other.rows


# --- what is just being removed ------------------------------------------------------------------------------------


@contextmanager
def announcing(kept: "Kept", uuid: str, keys: Sequence[str]) -> Iterator[None]:
    """Say in the store which objects are about to be removed, until they are. What a crash leaves is not believed after
    `ANNOUNCED_S`."""
    key = f"{_announced(uuid)}{os.urandom(8).hex()}.json"
    with kept.watched():
        put(kept.store(), key, json.dumps({"at_ns": time.time_ns(), "keys": list(keys)}).encode())
    yield
    with kept.watched():
        kept.store().delete(key)
    for stat in _announcements(kept, uuid):
        if _age_s(stat) > 2 * ANNOUNCED_S:
            with kept.watched():
                kept.store().delete(stat.key)


def lost(kept: "Kept", uuid: str, keys: Iterable[str]) -> set[str]:
    """Which of these objects are gone, or are about to be: asked after the manifest that needs them was published.
    Raises StoreError."""
    wanted = set(keys)
    going: set[str] = set()
    for stat in _announcements(kept, uuid) if wanted else ():
        if _age_s(stat) < ANNOUNCED_S:
            with kept.watched(), suppress(NotFound, ValueError, TypeError, KeyError):
                going |= set(json.loads(kept.store().read(stat.key))["keys"]) & wanted
    for key in wanted - going:  # after the announcements: who had ended before has removed it by now
        with kept.watched():
            try:
                kept.store().stat(key)
            except NotFound:
                going.add(key)
    return going


def _announced(uuid: str) -> str:
    return f".runfs/{uuid}/sweeping/"


def _announcements(kept: "Kept", uuid: str) -> list[Stat]:
    store = kept.store()
    with kept.watched():
        return list(store.list(_announced(uuid), recursive=False)) if store.info().lists else []


def _age_s(stat: Stat) -> float:
    return (time.time_ns() - stat.modified_ns) / 1e9 if stat.modified_ns is not None else 0.0
