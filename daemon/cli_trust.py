"""The commands about trust: `verify`, `receipts`, `conflicts`. Used by `daemon.cli`. The work is in `vfs.trust`."""

from collections.abc import Callable
from typing import Annotated, Any, Literal

import typer

from daemon import complete
from daemon.options import Config, DryRun, Index, Json, Mount, Project, Stores, Uuids
from daemon.target import Target
from daemon.terminal import perform
from vfs.errors import UsageError
from vfs.where import parse_size

_named: list[Callable[[list[str] | None], list[str]]] = []


def use_names(record_names: Callable[[list[str] | None], list[str]]) -> None:
    """How a record may be typed; told by `daemon.cli`."""
    _named[:] = [record_names]


def verify(
    uuids: Uuids = None,
    deep: Annotated[bool, typer.Option("--deep", help="Read every byte, here and in every store.")] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="Make right what is wrong, from a place that has it right. Implies --deep.")
    ] = False,
    rate: Annotated[
        str | None, typer.Option("--rate", metavar="SIZE/s", help="Read at most so much a second, e.g. 50MB/s.")
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Begin anew instead of going on where the last one was stopped.")
    ] = False,
    dry_run: DryRun = False,
    mount: Mount = None,
    project: Project = None,
    index: Index = None,
    config: Config = None,
    store: Stores = None,
    as_json: Json = False,
) -> None:
    """Check that the homes hold what the manifests say; with --deep byte by byte, and what is here too.

    --repair brings damaged files here from a store, and damaged objects again from here or another store. What no place
    has right is kept apart and told by runfs status. A scrub that was stopped or killed is gone on with by the next one
    of the same records.
    """
    deep = deep or repair
    if not deep and (rate or restart):
        raise UsageError("--rate and --restart are about --deep")
    args = {
        "uuids": _named[0](uuids),
        "deep": deep,
        "repair": repair,
        "rate": _rate(rate),
        "restart": restart,
        "dry_run": dry_run,
    }
    perform(Target(mount, index, project, config, tuple(store or ())), "verify", args, as_json=as_json)


def _rate(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        found = parse_size(text.strip().removesuffix("/s"))
    except UsageError as error:
        raise UsageError(f"--rate: {error}") from None
    if found <= 0:
        raise UsageError("--rate: write bytes a second, more than 0, such as 50MB/s")
    return float(found)


def receipts(
    uuids: Uuids = None,
    expired: Annotated[
        bool,
        typer.Option("--expired", help="Only proofs that are too old to count: the next eviction makes them anew."),
    ] = False,
    mount: Mount = None,
    project: Project = None,
    index: Index = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """The kept proofs of pushes and evictions: what, where, which digest, when verified, and until when that counts."""
    args = {"uuids": _named[0](uuids), "expired": expired}
    perform(Target(mount, index, project, config), "receipts", args, as_json=as_json)


def conflicts(
    uuid: Annotated[
        str | None,
        typer.Argument(metavar="[UUID]", help="A record; all of them if left out.", autocompletion=complete.uuids),
    ] = None,
    paths: Annotated[
        list[str] | None, typer.Argument(metavar="[PATH]...", help="Only these, as paths in the record.")
    ] = None,
    keep: Annotated[
        Literal["ours", "theirs", "both"] | None,
        typer.Option("--keep", help="Settle: this host's version stays, the other host's, or both under their names."),
    ] = None,
    dry_run: DryRun = False,
    mount: Mount = None,
    project: Project = None,
    index: Index = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """List what two hosts did to the same path, and settle it with --keep.

    Both versions stay until somebody settles it: one under its name, the other as PATH.conflict-DIGEST. What is given
    up stays in the stores as an earlier version. Exit code 1 while there are conflicts.
    """
    if keep is not None and uuid is None:
        raise UsageError("which record? Settling takes one: runfs conflicts UUID --keep ours|theirs|both")
    if paths and keep is None:
        raise UsageError("--keep says what to do about these paths")
    args: dict[str, Any] = {"uuids": _named[0]([uuid] if uuid else None), "paths": paths or [], "keep": keep}
    args |= {"dry_run": dry_run}
    perform(Target(mount, index, project, config), "conflicts", args, as_json=as_json)
