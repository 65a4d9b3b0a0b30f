"""A store's configuration looked at, and the store tried for real: what `runfs stores` and `doctor` report.

Used by `vfs.doctor` and the command line. Blocks for a few calls of the store, each at most its deadline. Results
are dicts that JSON can hold.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from vfs.errors import ConfigError, RunfsError
from vfs.stores import open_store, validate, volume
from vfs.stores.protocol import Store


def try_store(
    name: str, url: str, options: Mapping[str, Any], *, opened: Callable[[], Store] | None = None
) -> dict[str, Any]:
    """Check a configuration, then try the store. `opened` gives it where it is open already; otherwise it is opened
    here and disconnected again. Never raises a RunfsError.

    `warnings`: the broker's. `valid`: whether the configuration can be at all; where it is false, or the store failed,
    `check.problems` says why. `volume`: what has to be mounted for it, or None. `ok`: usable as it is meant to be.
    """
    shown: dict[str, Any] = {"name": name, "url": url, "broker": None, "info": None, "volume": None}
    shown |= {"warnings": [], "valid": False, "ok": False}
    try:
        shown["warnings"] = validate(url, name, options)
        needed = volume(url, name, options)
        shown["volume"] = {**asdict(needed), "local_path": str(needed.local_path)} if needed else None
        shown["valid"] = True
        store = opened() if opened is not None else open_store(url, name, options)
    except RunfsError as error:
        shown["valid"] = shown["valid"] and not isinstance(error, ConfigError)
        return shown | {"check": {"reachable": False, "problems": [str(error)]}}
    try:
        check, info = store.check(), store.info()
    finally:
        if opened is None:
            store.disconnect()
    readable = check.readable or not info.lists  # without a listing nothing is known that could be read as a test
    ok = check.reachable and readable and (check.writable or info.read_only)
    return shown | {"broker": info.broker, "info": asdict(info), "check": asdict(check), "ok": ok}
