"""Stores, and the registry of their types (brokers).

Used by the session and the command line: `open_store("s3://bucket/prefix")`. Opening may import a broker's
module (and whatever an installed package registered as an entry point); it asks no remote store anything.

A package adds a type of store with an entry point in the group `runfs.brokers`:

    [project.entry-points."runfs.brokers"]
    globus = "my_package.stores:Broker"

and `globus://...` is its URL. A broker is an object, or a class without arguments, as `protocol.Broker` says;
`base.BaseBroker` and `base.BaseStore` have what most of them share.
It is imported when a URL first asks for it; one that does not import never disturbs the others.
"""

import importlib
import threading
from collections.abc import Mapping
from importlib import metadata
from typing import Any, NamedTuple

from vfs.errors import ConfigError
from vfs.stores import urls
from vfs.stores.limits import read_limits
from vfs.stores.protocol import Broker, Check, Info, Stat, Store, Volume

__all__ = [
    "GROUP",
    "Broker",
    "Check",
    "Info",
    "Nature",
    "Stat",
    "Store",
    "Volume",
    "broker",
    "brokers",
    "nature",
    "open_store",
    "register",
    "unregister",
    "validate",
    "volume",
]

GROUP = "runfs.brokers"
REMOTE = "remote"  # takes every scheme that opendal has and nobody else claims

_BUILT_IN = {
    "command": "vfs.stores.command_store",
    "file": "vfs.stores.file",
    "fsspec": "vfs.stores.fsspec_store",
    "ftp": "vfs.stores.ftp",
    "globus": "vfs.stores.globus.store",
    "http": "vfs.stores.http_store",
    "machinable": "vfs.stores.machinable_store",
    "memory": "vfs.stores.memory",
    "nfs": "vfs.stores.nfs",
    REMOTE: "vfs.stores.remote",
    "sftp": "vfs.stores.sftp.store",
}
_WITH_TLS = {"ftps": "ftp", "https": "http"}  # the broker of a scheme that is not its own name
_registered: dict[str, Broker] = {}
_lock = threading.RLock()  # importing a broker may register others


class Nature(NamedTuple):
    """`read_only`: nothing is pushed there, and it is no copy that counts. `calculates`: asked last, and never for
    anything but a reader. `wants`: the options that a session should give (`BaseBroker.wants`)."""

    read_only: bool
    calculates: bool
    wants: frozenset[str]


def register(name: str, broker: Broker | type[Broker]) -> None:
    """Add a type of store. Raises ConfigError when the name is taken by another one, or it is no broker."""
    made = broker() if isinstance(broker, type) else broker
    if not isinstance(made, Broker):
        raise ConfigError(
            f"broker {name}: {type(made).__name__} has no schemes, validate, open and volume; "
            "vfs.stores.base.BaseBroker has what most brokers share"
        )
    with _lock:
        present = _registered.get(name)
        if present is not None and type(present) is not type(made):
            raise ConfigError(
                f"broker {name}: registered twice, by {_origin(present)} and {_origin(made)}; remove one of them"
            )
        _registered[name] = made


def unregister(name: str) -> None:
    """Forget a broker; a built-in one, or an entry point, is loaded again when it is asked for."""
    with _lock:
        _registered.pop(name, None)


def brokers() -> list[str]:
    """The names of all brokers there are, sorted; none is imported for it."""
    with _lock:
        return sorted({*_registered, *_BUILT_IN, *_entry_points()})


def broker(name: str) -> Broker:
    """The broker with this name. Raises ConfigError when there is none, or its package does not import."""
    with _lock:
        if name not in _registered:
            register(name, _load(name))
        return _registered[name]


def open_store(
    url_or_config: str | Mapping[str, Any], name: str | None = None, options: Mapping[str, Any] | None = None
) -> Store:
    """The store for a URL, or for a mapping with `url` and options in it. `name`: what people see. Raises
    ConfigError naming what is wrong, Unreachable for a local store whose disk is not there."""
    config = _config(url_or_config, name, options)
    chosen = _choose(config)
    _validate(chosen, config)
    return chosen.open(config)


def validate(
    url_or_config: str | Mapping[str, Any], name: str | None = None, options: Mapping[str, Any] | None = None
) -> list[str]:
    """Warnings about a store's configuration. Raises ConfigError. Opens no connection."""
    config = _config(url_or_config, name, options)
    return _validate(_choose(config), config)


def volume(
    url_or_config: str | Mapping[str, Any], name: str | None = None, options: Mapping[str, Any] | None = None
) -> Volume | None:
    """What must be mounted on this machine before the store can be used, or None. Raises ConfigError."""
    config = _config(url_or_config, name, options)
    return _choose(config).volume(config)


def nature(
    url_or_config: str | Mapping[str, Any], name: str | None = None, options: Mapping[str, Any] | None = None
) -> Nature:
    """What is known of a store from its configuration alone. Raises ConfigError."""
    config = _config(url_or_config, name, options)
    chosen = _choose(config)
    calculates = bool(getattr(chosen, "calculates", False))
    read_only = calculates or bool(getattr(chosen, "read_only", False))
    return Nature(
        read_only or urls.truth(config, urls.split(config), "read_only"),
        calculates,
        getattr(chosen, "wants", frozenset()),
    )


def _validate(chosen: Broker, config: Mapping[str, Any]) -> list[str]:
    """The broker's warnings; what is common to all of them is looked at here, whatever the broker does. Raises
    ConfigError."""
    warnings = chosen.validate(config)
    urls.truth(config, urls.split(config), "read_only")
    read_limits(config)
    return warnings


def _config(
    url_or_config: str | Mapping[str, Any], name: str | None, options: Mapping[str, Any] | None
) -> dict[str, Any]:
    given: dict[str, Any] = {"url": url_or_config} if isinstance(url_or_config, str) else dict(url_or_config)
    nested: Mapping[str, Any] = given.pop("options", None) or {}
    config = {**given, **nested, **(options or {})}
    if name is not None:
        config["name"] = name
    return config


def _choose(config: Mapping[str, Any]) -> Broker:
    named = config.get("broker")
    if named is not None:
        return broker(str(named))
    url = config.get("url")
    scheme = url.split("://", 1)[0].lower() if isinstance(url, str) and "://" in url else ""
    if not scheme:
        raise ConfigError("a store needs a url such as s3://bucket/prefix or file:///directory")
    known = set(brokers()) - {REMOTE}
    candidates = (_WITH_TLS.get(scheme, scheme), scheme.partition("+")[0])  # ftps://, fsspec+memory://
    named = next((each for each in candidates if each in known), None)
    if named is not None:
        return broker(named)
    return _by_scheme(scheme) or broker(REMOTE)


def _by_scheme(scheme: str) -> Broker | None:
    with _lock:
        return next(
            (each for name, each in sorted(_registered.items()) if name != REMOTE and scheme in each.schemes), None
        )


def _load(name: str) -> Any:
    if name in _BUILT_IN:  # works from a checkout too, and an installed package cannot take these names
        return importlib.import_module(_BUILT_IN[name]).Broker
    found = _entry_points().get(name)
    if found is None:
        raise ConfigError(f"broker {name}: not known; there are {', '.join(brokers())}")
    try:
        return found.load()
    except Exception as error:  # somebody else's package: whatever it raises, the message names it
        package = found.dist.name if found.dist is not None else "an unknown package"
        raise ConfigError(f"broker {name} from {package} cannot be loaded: {error}") from error


def _entry_points() -> dict[str, metadata.EntryPoint]:
    return {each.name: each for each in metadata.entry_points(group=GROUP)}


def _origin(broker: Broker) -> str:
    return f"{type(broker).__module__}.{type(broker).__qualname__}"
