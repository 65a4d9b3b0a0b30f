"""The commands that start and end a mount: `runfs mount` and `runfs umount`.

Used by `daemon.cli`. `mount --foreground` is the daemon itself; without it the daemon is started in the background and
the command returns when the mount answers.
"""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from daemon import complete, mounts
from daemon.options import Config, DryRun, Index, Json, Project, Stores
from vfs.errors import RunfsError, UsageError

Options = Annotated[
    list[str] | None, typer.Option("-o", metavar="OPTIONS", help="Options as in fstab, separated by commas.")
]


def mount(
    mountpoint: Annotated[Path, typer.Argument(help="An empty directory.")],
    project: Project = None,
    index: Index = None,
    config: Config = None,
    store: Stores = None,
    foreground: Annotated[
        bool, typer.Option("--foreground", "-f", help="Stay: this process serves the mount.")
    ] = False,
    read_only: Annotated[bool, typer.Option("--read-only", help="Nothing can be written through the mount.")] = False,
    allow_other: Annotated[bool, typer.Option("--allow-other", help="Other users may use it too.")] = False,
    xattr: Annotated[bool, typer.Option("--xattr", help="Extended attributes (slower ls -l).")] = False,
    options: Options = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    ready_fd: Annotated[int | None, typer.Option("--ready-fd", hidden=True)] = None,
    log_file: Annotated[Path | None, typer.Option("--log-file", hidden=True)] = None,
) -> None:
    """Mount an index as a file system. Returns when the mount answers (unless --foreground)."""
    from daemon import config as configuration
    from daemon.launch import check_mountpoint
    from daemon.mountoptions import parse_options

    parsed = parse_options(options or [])
    flags: dict[str, Any] = {"index": index, "project": project, "read_only": read_only, "allow_other": allow_other}
    flags |= {"xattr": xattr, "stores": [*(store or []), *parsed.stores]}
    given = parsed.settings | {key: value for key, value in flags.items() if value}
    given |= {"mountpoint": mounts.real_mountpoint(mountpoint), "fuse_options": tuple(parsed.fuse)}
    file = config or (Path(parsed.config) if parsed.config else None)
    if ready_fd is not None:
        raise typer.Exit(_as_daemon(given, file, ready_fd, log_file))
    loaded = configuration.load(given, config=file, remembered=True)
    settings = loaded.settings()
    notes = [*loaded.warnings, *_recalled(loaded, settings), *([] if dry_run else check_mountpoint(settings))]
    for note in notes:
        typer.echo(f"runfs: {note}", err=True)
    if dry_run:
        _show_plan(settings, as_json)
    elif foreground or parsed.foreground:
        raise typer.Exit(_in_foreground(settings, file, as_json))
    else:
        from daemon.launch import start

        _announce(start(settings, _again(settings, given, file)), as_json)


def _recalled(loaded: Any, settings: Any) -> list[str]:
    """Without its stores a mount could not read what was evicted to them, so the last mount's are the fallback."""
    if loaded.origins.get("stores") != "the last mount" or not settings.stores:
        return []
    return [f"no store was named; using the last mount's: {', '.join(store.name for store in settings.stores)}"]


def _again(settings: Any, given: dict[str, Any], file: Path | None) -> list[str]:
    """The command line of the daemon: the same, with every path absolute."""
    arguments = ["mount", "--foreground", str(settings.mountpoint), "--index", str(settings.index)]
    if settings.project is not None:
        arguments += ["--project", str(settings.project)]
    if file is not None:
        arguments += ["--config", os.path.abspath(file.expanduser())]
    for url in given.get("stores", []):
        arguments += ["--store", url]
    switches = ("read_only", "allow_other", "xattr")
    arguments += ["--" + name.replace("_", "-") for name in switches if given.get(name) is True]
    taken = (*switches, "index", "project", "stores", "mountpoint", "fuse_options")
    own = [f"{key}={value}" for key, value in given.items() if key not in taken]
    for option in (*own, *settings.fuse_options):
        arguments += ["-o", option.replace(",", "\\,")]
    return arguments


def _as_daemon(given: dict[str, Any], file: Path | None, ready_fd: int, log_file: Path | None) -> int:
    """This process is the daemon in the background: tell the starter how it went."""
    from daemon import config as configuration
    from daemon import launch

    pipe = launch.ReadyPipe(ready_fd)
    try:
        settings = configuration.load(given, config=file, remembered=True).settings()
        launch.set_up_log(settings, log_file)
        return launch.run(settings, pipe.ready, file)
    except RunfsError as error:
        pipe.failed(error)
        raise
    except Exception as error:
        pipe.failed(RunfsError(f"unexpected {type(error).__name__}: {error}; the traceback is in {log_file}"))
        raise


def _in_foreground(settings: Any, file: Path | None, as_json: bool) -> int:
    from daemon import launch

    launch.set_up_log(settings, None)
    return launch.run(settings, lambda info: _announce(info, as_json), file)


def _announce(info: dict[str, Any], as_json: bool) -> None:
    from daemon.render import mounted
    from daemon.terminal import print_json

    if as_json:
        print_json({"exit": 0, **info})
    else:
        print(mounted(info), flush=True)
        for sentence in info.get("warnings", []):
            typer.echo(f"runfs: {sentence}", err=True)


def _show_plan(settings: Any, as_json: bool) -> None:
    from daemon.terminal import print_json

    if as_json:
        print_json({"settings": settings.shown(), "dry_run": True, "exit": 0})
        return
    stores = ", ".join(f"{store.name} ({store.url})" for store in settings.stores) or "no store"
    print(f"{settings.mountpoint}: would serve {settings.index} with {stores}")


def umount(
    mountpoint: Annotated[Path, typer.Argument(help="Where it is mounted.", autocompletion=complete.mountpoints)],
    timeout: Annotated[float, typer.Option("--timeout", metavar="SECONDS", help="For pushing what is left.")] = 60.0,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Push what is left, unmount, and say what could not be pushed. That stays here; the next mount goes on with it."""
    from daemon.target import Target
    from daemon.terminal import perform, reporting, show
    from daemon.unmount import unmount

    if not 0 <= timeout < float("inf"):
        raise UsageError("--timeout: write a number of seconds, 0 or more")
    if dry_run:
        perform(Target(mount=mountpoint), "safe", {"uuids": []}, as_json=as_json)
    with reporting(as_json) as reporter:
        result = unmount(
            mounts.runtime_of(os.environ, mounts.real_mountpoint(mountpoint)), mountpoint, timeout, reporter
        )
    show("umount", result, {}, as_json=as_json)
    raise typer.Exit(int(result.get("exit", 0)))
