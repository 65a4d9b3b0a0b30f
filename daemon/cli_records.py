"""`runfs records ...`: records in stores with no mount and no index. Used by `daemon.cli`, and by the storage module of
machinable through `--json`. The work is done in this process (`vfs.records.verbs`); a daemon is not asked.
"""

from pathlib import Path
from typing import Annotated, Any

import typer

from daemon.options import Config, DryRun, Json, Project, Stores

records_app = typer.Typer(
    help="Records in stores, with no mount and no index: commit, retrieve, search, delete.", no_args_is_help=True
)
Uuid = Annotated[str, typer.Argument(metavar="UUID", help="A record.")]
Root = Annotated[
    str | None,
    typer.Option("--root", metavar="UUID", help="The record that it is nested in, or itself, if known: faster."),
]
Related = Annotated[
    int, typer.Option("--related", min=0, max=2, help="0: this one only; 1: those it is related to; 2: theirs too.")
]


@records_app.callback()
def _records() -> None:
    """Records in stores, with no mount and no index."""


def _perform(verb: str, args: dict[str, Any], given: tuple[Any, ...]) -> None:
    from daemon.config import load, without_index
    from daemon.render_records import lines
    from daemon.terminal import print_json
    from vfs.records.verbs import run

    stores, config, project, as_json = given
    flags = {key: value for key, value in (("stores", list(stores or ())), ("project", project)) if value}
    settings = without_index(load(flags, config=config, remembered=True)).settings()
    result = run(settings, verb, args)
    if as_json:
        print_json(result)
    else:
        for line in lines(verb, result, args):
            print(line)
    raise typer.Exit(int(result["exit"]))


@records_app.command()
def commit(
    directories: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Directories of records.")],
    dry_run: DryRun = False,
    store: Stores = None,
    config: Config = None,
    project: Project = None,
    as_json: Json = False,
) -> None:
    """Bring records to the stores: new ones, and what changed in those that are there."""
    args = {"directories": [str(each) for each in directories], "dry_run": dry_run}
    _perform("commit", args, (store, config, project, as_json))


@records_app.command()
def upload(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The directory of a record.")],
    related: Related = 1,
    storage: Annotated[
        list[Path] | None, typer.Option("--storage", metavar="DIR", help="Where related records are looked for.")
    ] = None,
    store: Stores = None,
    config: Config = None,
    project: Project = None,
    as_json: Json = False,
) -> None:
    """Bring a record and those that it is related to to the stores."""
    args = {"directory": str(directory), "related": related, "storage": storage}
    _perform("upload", args, (store, config, project, as_json))


@records_app.command()
def contains(
    uuid: Uuid,
    root: Root = None,
    store: Stores = None,
    config: Config = None,
    project: Project = None,
    as_json: Json = False,
) -> None:
    """Is a record in a store? Exit code 0 if it is."""
    _perform("contains", {"uuid": uuid, "root": root}, (store, config, project, as_json))


@records_app.command()
def retrieve(
    uuid: Uuid,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where it goes: new, empty, or this record's.")],
    root: Root = None,
    dry_run: DryRun = False,
    store: Stores = None,
    config: Config = None,
    project: Project = None,
    as_json: Json = False,
) -> None:
    """Bring a record into a directory, whole and checked. Nothing that is there is overwritten."""
    args = {"uuid": uuid, "directory": str(directory), "root": root, "dry_run": dry_run}
    _perform("retrieve", args, (store, config, project, as_json))


@records_app.command()
def download(
    uuid: Uuid,
    destination: Annotated[Path, typer.Argument(metavar="DIR", help="Gets a directory for each record.")],
    related: Related = 1,
    store: Stores = None,
    config: Config = None,
    project: Project = None,
    as_json: Json = False,
) -> None:
    """Bring a record, and those that it is related to, into directories named after them."""
    args = {"uuid": uuid, "destination": str(destination), "related": related}
    _perform("download", args, (store, config, project, as_json))


@records_app.command()
def delete(
    uuid: Uuid,
    dry_run: DryRun = False,
    store: Stores = None,
    config: Config = None,
    project: Project = None,
    as_json: Json = False,
) -> None:
    """Remove a record from the stores, with its earlier versions. Local directories are not touched."""
    _perform("delete", {"uuid": uuid, "dry_run": dry_run}, (store, config, project, as_json))


@records_app.command()
def walk(store: Stores = None, config: Config = None, project: Project = None, as_json: Json = False) -> None:
    """List the records in the stores, also those that another tool put there."""
    _perform("walk", {}, (store, config, project, as_json))


@records_app.command()
def search(
    identity_key: Annotated[str | None, typer.Option("--identity-key", metavar="KEY", help="As in id.json.")] = None,
    predicate_key: Annotated[str | None, typer.Option("--predicate-key", metavar="KEY", help="As in id.json.")] = None,
    like: Annotated[Path | None, typer.Option("--like", metavar="DIR", help="The keys of the record there.")] = None,
    store: Stores = None,
    config: Config = None,
    project: Project = None,
    as_json: Json = False,
) -> None:
    """Find records by their keys, the newest first."""
    args = {"identity_key": identity_key, "predicate_key": predicate_key, "like": like and str(like)}
    _perform("search", args, (store, config, project, as_json))


@records_app.command(hidden=True)
def where(
    uuid: Annotated[str | None, typer.Argument(metavar="[UUID]")] = None,
    store: Stores = None,
    config: Config = None,
    project: Project = None,
    as_json: Json = False,
) -> None:
    """What the stores are called, and where a record belongs in them."""
    _perform("where", {"uuid": uuid}, (store, config, project, as_json))
