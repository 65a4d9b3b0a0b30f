"""The commands about the configuration and the service: `runfs config ...` and `runfs systemd ...`.

Used by `daemon.cli`. They read and write local files only.
"""

from pathlib import Path
from typing import Annotated, Any

import typer

from daemon.options import Config, DryRun, Index, Json, Project
from vfs.errors import Refused, RunfsError

config_app = typer.Typer(help="Show, find and check the configuration.", no_args_is_help=True)
systemd_app = typer.Typer(help="Run mounts as services.", no_args_is_help=True)


@config_app.callback()
def _config() -> None:
    """Show, find and check the configuration."""


@systemd_app.callback()
def _systemd() -> None:
    """Run mounts as services."""


def _load(project: Path | None, index: Path | None, config: Path | None) -> Any:
    from daemon.config import load

    flags = {key: value for key, value in (("project", project), ("index", index)) if value}
    return load(flags, config=config)


@config_app.command("show")
def show(project: Project = None, index: Index = None, config: Config = None, as_json: Json = False) -> None:
    """Every setting as it is used here, and where it comes from. Secrets are never shown."""
    from daemon import config as configuration
    from daemon.terminal import print_json

    shown = configuration.shown(_load(project, index, config))
    if as_json:
        print_json({**shown, "exit": 0})
        return
    for line in configuration.as_toml(shown):
        print(line)


@config_app.command("path")
def path(config: Config = None, as_json: Json = False) -> None:
    """Where the configuration file is, or would be."""
    import os

    from daemon.directories import config_file
    from daemon.terminal import print_json

    file = config.expanduser() if config is not None else config_file(os.environ)
    if as_json:
        print_json({"file": str(file), "exists": file.is_file(), "exit": 0})
    else:
        print(file)


@config_app.command("check")
def check(project: Project = None, index: Index = None, config: Config = None, as_json: Json = False) -> None:
    """Check the configuration without asking any store (runfs stores does that)."""
    from daemon import config as configuration
    from daemon.render import doctor
    from daemon.terminal import print_json

    result = configuration.checked(_load(project, index, config))
    if as_json:
        print_json(result)
    else:
        for line in doctor(result, {}):
            print(line)
    raise typer.Exit(result["exit"])


@config_app.command("storage-module")
def storage_module(
    file: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="Where to write it, e.g. runfs_storage.py; else stdout.")
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """A machinable Storage that keeps a project's records in runfs's stores: one module, for the project itself."""
    from importlib.resources import files

    source = (files("vfs") / "machinable_storage.py").read_text(encoding="utf-8")
    if file is None:
        print(source, end="")
        return
    if file.exists() and file.read_text(encoding="utf-8", errors="replace") != source:
        raise Refused(f"{file} is there already and is something else; remove it first, or name another file")
    if not dry_run:
        if not file.absolute().parent.is_dir():
            raise Refused(f"{file}: there is no directory {file.parent}; make it, or write the file somewhere else")
        file.write_text(source, encoding="utf-8")
    print(f"{file}: {'would be ' if dry_run else ''}written; connect it with get({file.stem!r}, {{'store': URL}})")


@systemd_app.command("install")
def install(
    user: Annotated[bool, typer.Option("--user", help="For this user only, without root.")] = False,
    mountpoint: Annotated[
        Path | None, typer.Option("--mountpoint", metavar="DIR", help="Say how to start the mount there.")
    ] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Install the units (and, for the system, the fstab helper) with the path of this runfs in them."""
    from daemon.systemd import install as install_units
    from daemon.terminal import print_json

    try:
        result = install_units(user=user, mountpoint=mountpoint, dry_run=dry_run)
    except PermissionError as error:
        raise RunfsError(f"{error.filename}: permission denied; run as root, or with --user") from error
    if as_json:
        print_json(result)
        return
    for entry in result["files"]:
        print(f"{entry['path']}{': would be written:' if dry_run else ''}")
        if dry_run:
            print(entry["content"])
    for step in result["next"]:
        print(f"next: {step}")
