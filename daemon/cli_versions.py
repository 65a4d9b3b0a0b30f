"""`runfs versions ...` and `runfs transaction ...`. Used by `daemon.cli`. The work is in `vfs.versions.actions`."""

from collections.abc import Callable
from typing import Annotated, Any

import typer
import typer.core

from daemon import complete
from daemon.options import Config, DryRun, Index, Json, Mount, Project, Uuids
from daemon.target import Target
from daemon.terminal import perform
from vfs.errors import UsageError
from vfs.where import parse_age

Uuid = Annotated[str, typer.Argument(metavar="UUID", help="A record.", autocompletion=complete.uuids)]
Notes = Annotated[str | None, typer.Option("--notes", metavar="TEXT", help="What the new version is about.")]


class _ListByDefault(typer.core.TyperGroup):
    """`runfs versions UUID` is `runfs versions list UUID`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("-h", "--help"):
            args = ["list", *args]
        return super().parse_args(ctx, args)


versions_app = typer.Typer(
    cls=_ListByDefault,
    help="List, restore and prune earlier versions of records (also to be read in /.versions of the mount).",
    no_args_is_help=True,
)
transaction_app = typer.Typer(
    help="Group changes of a record: others see all of them at once, or none.", no_args_is_help=True
)
_named: list[Callable[[list[str] | None], list[str]]] = []


def use_names(record_names: Callable[[list[str] | None], list[str]]) -> None:
    """How a record may be typed; told by `daemon.cli`."""
    _named[:] = [record_names]


def _names(given: list[str] | None) -> list[str]:
    return _named[0](given)


@versions_app.callback()
def _versions() -> None:
    """Earlier versions of records."""


@versions_app.command("list")
def list_(
    uuids: Uuids = None,
    mount: Mount = None,
    project: Project = None,
    index: Index = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """List the versions of records: number, when, size, what changed, notes. `runfs versions UUID` is the same."""
    names = _names(uuids)
    if not names:
        raise UsageError("which records? Name at least one uuid; runfs ls lists them")
    perform(Target(mount, index, project, config), "versions", {"uuids": names}, as_json=as_json)


@versions_app.command()
def restore(
    uuid: Uuid,
    number: Annotated[int, typer.Argument(metavar="N", help="The version.", min=0)],
    paths: Annotated[
        list[str] | None, typer.Argument(metavar="[PATH]...", help="Only these, as paths in the record.")
    ] = None,
    store: Annotated[
        str | None, typer.Option("--store", metavar="NAME", help="The store whose version is meant.")
    ] = None,
    dry_run: DryRun = False,
    mount: Mount = None,
    project: Project = None,
    index: Index = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Make a record what it was in version N. What it is now is pushed first, and stays a version."""
    (name,) = _names([uuid])
    args = {"uuid": name, "number": number, "paths": paths or [], "store": store, "dry_run": dry_run}
    perform(Target(mount, index, project, config), "versions restore", args, as_json=as_json)


@versions_app.command()
def prune(
    uuids: Uuids = None,
    all_: Annotated[bool, typer.Option("--all", help="Every record.")] = False,
    keep: Annotated[
        int | None, typer.Option("--keep", metavar="N", min=0, help="The newest N earlier versions stay.")
    ] = None,
    older_than: Annotated[
        str | None, typer.Option("--older-than", metavar="AGE", help="Only versions older than e.g. 90d go.")
    ] = None,
    dry_run: DryRun = False,
    mount: Mount = None,
    project: Project = None,
    index: Index = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Remove earlier versions from the stores, and the objects that only they needed."""
    names = _names(uuids)
    if bool(names) == all_:
        raise UsageError("which records? Name them, or use --all")
    args = {"uuids": names, "all": all_, "keep": keep, "older_than": _age(older_than), "dry_run": dry_run}
    perform(Target(mount, index, project, config), "versions prune", args, as_json=as_json)


def _age(text: str | None) -> float | None:
    try:
        return None if text is None else parse_age(text)
    except UsageError as error:
        raise UsageError(f"--older-than: {error}") from None


@transaction_app.callback()
def _transaction() -> None:
    """Group changes of a record."""


@transaction_app.command()
def begin(
    uuid: Uuid,
    notes: Notes = None,
    mount: Mount = None,
    project: Project = None,
    index: Index = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Keep what the record is now; its pushes wait until commit or rollback."""
    _perform("begin", uuid, notes, Target(mount, index, project, config), as_json=as_json)


@transaction_app.command()
def commit(
    uuid: Uuid,
    notes: Notes = None,
    mount: Mount = None,
    project: Project = None,
    index: Index = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Publish all changes since begin as one version, with its notes."""
    _perform("commit", uuid, notes, Target(mount, index, project, config), as_json=as_json)


@transaction_app.command()
def rollback(
    uuid: Uuid,
    mount: Mount = None,
    project: Project = None,
    index: Index = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Undo all changes since begin: files, modes, times and names."""
    _perform("rollback", uuid, None, Target(mount, index, project, config), as_json=as_json)


def _perform(what: str, uuid: str, notes: str | None, target: Target, *, as_json: bool) -> None:
    (name,) = _names([uuid])
    perform(target, "transaction", {"what": what, "uuid": name, "notes": notes}, as_json=as_json)
