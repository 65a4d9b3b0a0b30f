"""The commands about stores: `runfs stores`, `runfs stores check` and `runfs stores sweep`.

Used by `daemon.cli`. `stores` asks the daemon, or a session here; the others read the configuration and need no index:
what they open they open themselves, so they can be used before the first mount.
"""

from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from daemon.options import Config, DryRun, Index, Json, Mount, Project, Stores
from daemon.target import Target
from daemon.terminal import perform, show
from vfs.errors import ConfigError, RunfsError, UsageError
from vfs.where import parse_age

stores_app = typer.Typer(help="Try the stores, check their configuration, tidy them.")

Which = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[NAME_OR_URL]...", help="Stores of the configuration, or any URL; all that are configured."
    ),
]
_AT_ONCE = 8  # stores that are tried at a time


@stores_app.callback(invoke_without_command=True)
def stores(
    context: typer.Context,
    mount: Mount = None,
    project: Project = None,
    index: Index = None,
    config: Config = None,
    store: Stores = None,
    as_json: Json = False,
) -> None:
    """Try each home for real: reachable, readable, writable, how fast, and what it can do."""
    given = [name for name, value in context.params.items() if value]
    if context.invoked_subcommand is None:
        perform(Target(mount, index, project, config, tuple(store or ())), "stores", {}, as_json=as_json)
    elif given:
        raise UsageError(f"write the options of {context.invoked_subcommand} behind it: runfs stores check --json")


@stores_app.command("check")
def check(
    which: Which = None, project: Project = None, index: Index = None, config: Config = None, as_json: Json = False
) -> None:
    """Check stores' configuration, then try each for real. Exit code 1: one does not work, 2: a wrong configuration."""
    from vfs.stores.checking import try_store

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        tried = list(pool.map(lambda each: try_store(*each), _named(which, project, index, config)))
    worst = [0 if each["ok"] else 1 if each["valid"] else 2 for each in tried]
    code = max(worst, default=0)
    show("stores check", {"stores": tried, "exit": code}, {}, as_json=as_json)
    raise typer.Exit(code)


@stores_app.command("sweep")
def sweep(
    which: Which = None,
    older_than: Annotated[
        str, typer.Option("--older-than", metavar="AGE", help="Uploads that nobody went on with for e.g. 12h.")
    ] = "1d",
    dry_run: DryRun = False,
    project: Project = None,
    index: Index = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Remove what interrupted uploads left in stores. Objects are never touched."""
    age = parse_age(older_than)
    swept = [_sweep(*each, age, dry_run) for each in _named(which, project, index, config)]
    code = int(any(each["error"] for each in swept))
    show("stores sweep", {"swept": swept, "older_than_s": age, "exit": code}, {"dry_run": dry_run}, as_json=as_json)
    raise typer.Exit(code)


def _sweep(name: str, url: str, options: dict[str, Any], age: float, dry_run: bool) -> dict[str, Any]:
    from vfs.stores import open_store

    shown: dict[str, Any] = {"name": name, "removed": None, "leaves": None, "error": None}
    try:
        with closing(_Opened(open_store(url, name, options))) as opened:
            info = opened.store.info()
            shown["leaves"] = info.sweeps and not info.read_only
            if shown["leaves"] and not dry_run:
                shown["removed"] = opened.store.sweep(age)
    except RunfsError as error:
        shown["error"] = str(error)
    return shown


class _Opened:
    """A store that is disconnected at the end."""

    def __init__(self, store: Any) -> None:
        self.store = store

    def close(self) -> None:
        self.store.disconnect()


def _named(
    which: list[str] | None, project: Path | None, index: Path | None, config: Path | None
) -> list[tuple[str, str, dict[str, Any]]]:
    """Name, URL and options of each store that is meant. Raises ConfigError, UsageError."""
    from daemon.config import load, without_index
    from daemon.storeurls import named_stores

    flags = {key: value for key, value in (("project", project), ("index", index)) if value}
    loaded = load(flags, config=config, remembered=True)
    settings = without_index(loaded).settings()
    stores = list(settings.stores)
    if which:
        tables = named_stores(which, [store.model_dump() for store in stores])
        meant = replace(loaded, values={**loaded.values, "stores": tables}, origins={})
        stores = list(without_index(meant).settings().stores)
    if not stores:
        raise UsageError("no store is configured: name one by its URL, or in the configuration (runfs config path)")
    return [(store.name, store.url, _options(settings, store, "index" in loaded.values)) for store in stores]


def _options(settings: Any, store: Any, has_index: bool) -> dict[str, Any]:
    """As a mount would give them."""
    from vfs.stores import nature

    def or_default(key: str) -> Any:
        own = getattr(store, key)
        return getattr(settings, key) if own is None else own

    given: dict[str, Any] = {key: or_default(key) for key in ("deadline_s", "least_throughput")}
    try:
        wants = nature(store.url, store.name, store.options).wants
    except ConfigError:  # the check says what is wrong
        wants = frozenset()
    if has_index:
        place = settings.cache_place / ".whole" / store.name
        given |= {k: v for k, v in (("place", str(place)), ("index", str(settings.index))) if k in wants}
    return {**given, **store.options}
