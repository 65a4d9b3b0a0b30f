"""The command line: what can be typed, and how it ends. Every command asks a daemon or does the work in this process.

The entry point of the package (`runfs`). Commands are thin: parameters become the arguments of `Session.run`, results
become text in `daemon.render`. What is heavy is loaded by the command that needs it. Exit codes: 0 done and safe, 1
something is not, 2 wrong usage.
"""

import errno
import io
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from daemon import cli_admin, cli_mount, cli_records, cli_stores, cli_trust, cli_versions, complete
from daemon.options import Config, DryRun, Index, Json, Mount, Project, Stores, Uuids
from daemon.protocol import error_message
from daemon.target import Target
from daemon.terminal import keep_trace, perform, print_json
from vfs.errors import RunfsError, UsageError
from vfs.where import parse_age, parse_size, parse_where

app = typer.Typer(
    name="runfs",
    help="Mount a machinable index as a file system; evict runs to a store and read them as if they were here.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(cli_mount.mount)
app.command()(cli_mount.umount)

Where = Annotated[
    str | None,
    typer.Option(
        "--where", metavar="EXPR", help="Records that fulfil e.g. 'status=finished and age>30d, config.lr>=0.1'."
    ),
]


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"runfs {version('runfs')}")
        except PackageNotFoundError:
            print("runfs (a checkout that is not installed)")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Mount a machinable index as a file system; evict runs to a store and read them as if they were here."""


@app.command()
def status(
    paths: Annotated[
        list[str] | None,
        typer.Argument(metavar="[UUID_OR_PATH]...", help="Records or files.", autocompletion=complete.uuids),
    ] = None,
    mount: Mount = None,
    project: Project = None,
    index: Index = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """What is here, what is away, what moves and who waits; for a path where its bytes are, and why."""
    args: dict[str, Any] = {"paths": [_path_or_uuid(path) for path in paths]} if paths else {}
    perform(Target(mount, index, project, config), "status", args, as_json=as_json)


@app.command()
def ls(
    uuids: Uuids = None,
    where: Where = None,
    mount: Mount = None,
    project: Project = None,
    index: Index = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """List records with their state, size and what the index knows of them."""
    args = {"uuids": record_names(uuids), "where": _checked_where(where)}
    perform(Target(mount, index, project, config), "ls", args, as_json=as_json)


@app.command()
def evict(
    uuids: Uuids = None,
    all_: Annotated[bool, typer.Option("--all", help="Every record that may go.")] = False,
    where: Where = None,
    older_than: Annotated[
        str | None, typer.Option("--older-than", metavar="AGE", help="Records unchanged for e.g. 30d or 12h.")
    ] = None,
    until_free: Annotated[
        str | None,
        typer.Option(
            "--until-free", metavar="SIZE", help="Oldest first, until this much of the disk is free (e.g. 50G)."
        ),
    ] = None,
    dry_run: DryRun = False,
    mount: Mount = None,
    project: Project = None,
    index: Index = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Free this disk: push and prove what is not yet proven, then drop local bytes. Nothing goes without proof."""
    names = record_names(uuids)
    if not (names or all_ or where or older_than or until_free):
        raise UsageError("which records? Name them, or use --where, --older-than, --until-free or --all")
    if names and all_:
        raise UsageError("either name records or use --all, not both")
    args = {
        "uuids": names,
        "all": all_,
        "where": _checked_where(where),
        "older_than": _parsed("--older-than", parse_age, older_than),
        "until_free": _parsed("--until-free", parse_size, until_free),
        "dry_run": dry_run,
    }
    perform(Target(mount, index, project, config), "evict", args, as_json=as_json)


@app.command()
def hydrate(
    uuids: Uuids = None,
    all_: Annotated[bool, typer.Option("--all", help="Every evicted record.")] = False,
    restore: Annotated[bool, typer.Option("--restore", help="Put them back into their own directory.")] = False,
    dry_run: DryRun = False,
    mount: Mount = None,
    project: Project = None,
    index: Index = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Bring evicted records' bytes back."""
    names = record_names(uuids) if all_ and not uuids else _some_records(uuids)
    if names and all_:
        raise UsageError("either name records or use --all, not both")
    args = {"uuids": names, "all": all_, "restore": restore, "dry_run": dry_run}
    perform(Target(mount, index, project, config), "hydrate", args, as_json=as_json)


@app.command()
def pin(
    uuids: Uuids = None,
    dry_run: DryRun = False,
    mount: Mount = None,
    project: Project = None,
    index: Index = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Keep records on this disk: a pinned record is never evicted."""
    args = {"uuids": _some_records(uuids), "dry_run": dry_run}
    perform(Target(mount, index, project, config), "pin", args, as_json=as_json)


@app.command()
def unpin(
    uuids: Uuids = None,
    dry_run: DryRun = False,
    mount: Mount = None,
    project: Project = None,
    index: Index = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Let records be evicted again."""
    args = {"uuids": _some_records(uuids), "dry_run": dry_run}
    perform(Target(mount, index, project, config), "unpin", args, as_json=as_json)


@app.command()
def push(
    uuids: Uuids = None,
    dry_run: DryRun = False,
    mount: Mount = None,
    project: Project = None,
    index: Index = None,
    config: Config = None,
    store: Stores = None,
    as_json: Json = False,
) -> None:
    """Bring local changes to the homes, and wait until they are there. Without a uuid: everything."""
    args = {"uuids": record_names(uuids), "dry_run": dry_run}
    perform(Target(mount, index, project, config, tuple(store or ())), "push", args, as_json=as_json)


@app.command()
def safe(
    uuids: Uuids = None,
    mount: Mount = None,
    project: Project = None,
    index: Index = None,
    config: Config = None,
    store: Stores = None,
    as_json: Json = False,
) -> None:
    """Could this machine be lost now? Exit code 0: yes; 1: no, and what is only here."""
    target = Target(mount, index, project, config, tuple(store or ()))
    perform(target, "safe", {"uuids": record_names(uuids)}, as_json=as_json)


app.command()(cli_trust.verify)


@app.command()
def reindex(
    from_: Annotated[
        list[str] | None,
        typer.Option("--from", metavar="DIR_OR_STORE", help="Where records are; the project's storage by default."),
    ] = None,
    dry_run: DryRun = False,
    mount: Mount = None,
    project: Project = None,
    index: Index = None,
    config: Config = None,
    store: Stores = None,
    as_json: Json = False,
) -> None:
    """Rebuild the index from record directories and stores; makes it where there is none. Nothing is overwritten.

    With --store alone everything comes from that store: the records are there as evicted ones.
    """
    sources = [source if _is_store(source) else os.path.abspath(source) for source in from_ or []]
    target = Target(mount, index, project, config, tuple(store or ()), create_index=not dry_run)
    if store and target.daemon() is not None:  # it has its stores open already: those are meant
        sources, target = [*sources, *store], replace(target, stores=())
    args = {"from": sources, "stores": bool(store), "dry_run": dry_run}
    perform(target, "reindex", args, as_json=as_json)


def _is_store(source: str) -> bool:
    """A URL, or a name that is no directory here."""
    return "://" in source or ("/" not in source and not os.path.isdir(source))


@app.command("import")
def import_(
    source: Annotated[
        str,
        typer.Argument(
            metavar="DIR_OR_URL_OR_ADDRESS",
            help="A directory or store URL that holds records; url+https://HOST/ARCHIVE, file+PATH, or link+DIR.",
        ),
    ],
    dry_run: DryRun = False,
    mount: Mount = None,
    project: Project = None,
    index: Index = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Take records of another machine, store or archive into this index. An address is brought once."""
    place = source if "://" in source else _absolute(source)
    perform(Target(mount, index, project, config), "import", {"source": place, "dry_run": dry_run}, as_json=as_json)


def _absolute(source: str) -> str:
    """A path, or file+ or link+ and a path, made absolute."""
    kind, plus, path = source.partition("+")
    if plus and kind.isalpha() and kind.islower() and not os.path.exists(source):
        return f"{kind}+{os.path.abspath(os.path.expanduser(path))}" if kind in ("file", "link") else source
    return os.path.abspath(source)


app.command()(cli_trust.receipts)
app.command()(cli_trust.conflicts)


@app.command()
def doctor(
    mount: Mount = None, project: Project = None, index: Index = None, config: Config = None, as_json: Json = False
) -> None:
    """Look for what is wrong with this machine, the index, the mount and the stores, and say what to do."""
    perform(Target(mount, index, project, config), "doctor", {}, as_json=as_json)


app.add_typer(cli_records.records_app, name="records")
app.add_typer(cli_stores.stores_app, name="stores")
app.add_typer(cli_versions.versions_app, name="versions")
app.add_typer(cli_versions.transaction_app, name="transaction")
app.add_typer(cli_admin.config_app, name="config")
app.add_typer(cli_admin.systemd_app, name="systemd")


# -- what is typed for a record ------------------------------------------------------------------------------------


def record_names(given: Sequence[str] | None) -> list[str]:
    """The records named: uuids, paths in a mount (as Tab gives them), or - for one a line on stdin."""
    names: list[str] = []
    for text in given or ():
        names += [line.strip() for line in sys.stdin if line.strip()] if text == "-" else [text]
    return [_record_name(name) for name in names]


cli_versions.use_names(record_names)
cli_trust.use_names(record_names)


def _record_name(text: str) -> str:
    from daemon.mounts import mount_around

    if "/" not in text:
        return text
    path = Path(os.path.abspath(text))
    around = mount_around(path)
    inside = path.relative_to(around.mountpoint).parts if around is not None and around.is_runfs else ()
    if inside[:1] == (".versions",):
        inside = inside[1:]
    return inside[0] if inside else str(path)


def _path_or_uuid(text: str) -> str:
    """For `status`: a path is made absolute, without following the link of an evicted record."""
    return os.path.abspath(text) if "/" in text or os.path.lexists(text) else text


def _some_records(given: Sequence[str] | None) -> list[str]:
    names = record_names(given)
    if not names:
        raise UsageError("which records? Name at least one uuid; runfs ls lists them")
    return names


def _parsed(flag: str, parse: Callable[[str], float], text: str | None) -> float | None:
    try:
        return None if text is None else parse(text)
    except UsageError as error:
        raise UsageError(f"{flag}: {error}") from None


def _checked_where(where: str | None) -> str | None:
    if where is not None:
        parse_where(where)  # refused here, before anything starts
    return where


# -- the end -------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and give its exit code; every failure is one line on stderr."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names are bytes and need not be text
    as_json = "--json" in arguments
    try:
        code = app(args=arguments, prog_name="runfs", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except RunfsError as error:
        return _failed(error, as_json)
    except BrokenPipeError:
        # Whoever read our output has seen enough; Python must not write the rest at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("runfs: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        return _unexpected(error, as_json)


def _failed(error: RunfsError, as_json: bool) -> int:
    print(f"runfs: {error}", file=sys.stderr)
    if as_json:
        print_json(error_message(error))
    return error.exit_code


def _unexpected(error: Exception, as_json: bool) -> int:
    wrong_usage = getattr(error, "format_message", None)  # how typer and click tell of wrong usage
    if wrong_usage is not None:
        context = getattr(error, "ctx", None)
        hint = f" (see {context.command_path} --help)" if context is not None else ""
        said = wrong_usage().rstrip(".") or "which command?"  # nothing: a group alone, whose help was printed
        return _failed(UsageError(f"{said}{hint}"), as_json)
    if os.environ.get("RUNFS_DEBUG"):
        raise error
    if isinstance(error, OSError) and error.errno == errno.ENOTCONN:
        return _failed(
            RunfsError("this place lies in a mount whose daemon is gone; run: runfs umount MOUNTPOINT"), as_json
        )
    kind = type(error).__name__
    return _failed(RunfsError(f"unexpected {kind}: {error}. {keep_trace()}"), as_json)


if __name__ == "__main__":
    sys.exit(main())
