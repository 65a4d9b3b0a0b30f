"""Starting the daemon of a mount, in this process or in the background.

Used by the `mount` command. In the background a new session runs `runfs mount --foreground` with a pipe on which it
says one line: {"ready": {...}} when the mount answers, or {"error": {...}}. The starter waits for that line only.
"""

import json
import logging
import logging.handlers
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from daemon import client, mounts, notify, render
from daemon.protocol import encode, error_from, error_message
from vfs import linux, mountinfo, places
from vfs.errors import MountpointError, RunfsError
from vfs.hiding import dresses, hide
from vfs.private import private_directory, private_opener
from vfs.settings import Settings, is_secret

START_S = 120.0  # a start that takes longer is reported, not ended: a large index on a slow disk may need it
_LOG_BYTES, _LOG_FILES = 10_000_000, 3
_SELF = (sys.executable, "-P", "-m", "daemon.cli")  # -P: no module of the current directory may take our place
_LOG_TAIL = 5  # lines of the log shown when a start fails

log = logging.getLogger(__name__)


# -- the mountpoint ------------------------------------------------------------------------------------------------


def check_mountpoint(settings: Settings) -> list[str]:
    """Whether the mountpoint can be used, before anything starts. Gives notes for the user.

    A mount whose daemon has died is taken away, since it can only give errors. Raises MountpointError with the fix.
    """
    path = settings.mountpoint
    assert path is not None  # the command line always sets it
    notes: list[str] = []
    mounted = mounts.mounted_at(path)
    if mounted is not None:
        _check_dead(settings, path, mounted)
        from daemon.unmount import detach

        detach(path)
        notes.append(f"{path}: its last daemon ended without unmounting; that was cleaned up, nothing is lost")
    _check_directory(path)
    for name, place in (("index", settings.index), ("state", settings.state), ("cache", settings.cache_place)):
        if path == place or path in Path(os.path.realpath(place)).parents:
            raise MountpointError(f"{path} holds the {name} ({place}); mount somewhere else")
    return notes


def _check_dead(settings: Settings, path: Path, mounted: mounts.Mount) -> None:
    if not mounted.is_runfs:
        raise MountpointError(f"{path}: {mounted.kind} is mounted there; choose another mountpoint")
    where = dict.fromkeys([settings.runtime_dir, mounts.runtime_of(os.environ, path)])
    if any(client.answers(places.socket_of(place, path)) for place in where):
        raise MountpointError(f"{path} is mounted already; see runfs status, or runfs umount {path} first")
    announced = (mounts.announced_at(place, path) for place in where)
    living = any(entry is not None and _alive(entry.pid) for entry in announced)
    if mounted.uid not in (None, os.geteuid()) or living:
        raise MountpointError(f"{path} is mounted already and its daemon does not answer; run: runfs umount {path}")
    if mountinfo.is_served(path):  # by a daemon that announced itself where nobody looks: it must not be taken away
        raise MountpointError(
            f"{path} is mounted already, by a daemon with another RUNFS_RUNTIME_DIR and RUNFS_STATE_DIR; set these as "
            f"they were, then run: runfs umount {path}"
        )


def _alive(pid: int) -> bool:
    try:
        # A process that has ended and was not waited for counts as gone: it serves nothing.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (OSError, IndexError):
        return False


def _check_directory(path: Path) -> None:
    try:
        entries = [entry.name for entry in os.scandir(path)]
    except FileNotFoundError:
        raise MountpointError(f"{path}: there is no such directory; make it: mkdir -p {path}") from None
    except NotADirectoryError:
        raise MountpointError(f"{path} is not a directory; a mountpoint has to be an empty one") from None
    except OSError as error:
        raise MountpointError(f"{path}: {error.strerror}; choose another mountpoint") from error
    if entries:
        what = f"{entries[0]}" + (f" and {len(entries) - 1} more" if len(entries) > 1 else "")
        raise MountpointError(f"{path} is not empty ({what}); a mount would hide that: choose an empty directory")


# -- this process as the daemon ------------------------------------------------------------------------------------


def run(settings: Settings, announce: Callable[[dict[str, Any]], None], config: Path | None) -> int:
    """Serve the mount until it ends; `announce` is called once with its state. The exit code."""
    from daemon.config import remember
    from daemon.mount import serve

    linux.keep_out_of_core_dumps()

    def ready(info: dict[str, Any]) -> None:
        remember(settings, config)
        notify.ready(render.mounted(info))
        announce(info)

    return serve(settings, ready=ready)


def set_up_log(settings: Settings, file: Path | None) -> None:
    """Log to stderr, or to a file that is rotated (three of 10 MB at most)."""
    handler: logging.Handler = logging.StreamHandler()
    if file is not None:
        handler = _PrivateLog(file, maxBytes=_LOG_BYTES, backupCount=_LOG_FILES - 1)
    # The journal of systemd has its own times.
    moment = "" if file is None and os.environ.get("JOURNAL_STREAM") else "%(asctime)s "
    handler.setFormatter(_Discreet(f"{moment}%(levelname)s %(name)s: %(message)s", secrets_of(settings)))
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler], force=True)


def secrets_of(settings: Settings) -> list[str]:
    """What the configuration and the environment hold that no log may: libraries write there too."""
    named = [(name, str(value)) for store in settings.stores for name, value in store.options.items()]
    users = dict(named)
    return dresses([value for name, value in [*named, *os.environ.items()] if is_secret(name)], users)


class _Discreet(logging.Formatter):
    """Hides secrets in whatever is logged, tracebacks of libraries included."""

    def __init__(self, form: str, dressed: list[str]) -> None:
        super().__init__(form)
        self._dressed = dressed

    def format(self, record: logging.LogRecord) -> str:
        return hide(super().format(record), self._dressed)


class _PrivateLog(logging.handlers.RotatingFileHandler):
    """A log that only its user can read, also after it was rotated: it names what records hold."""

    def _open(self) -> TextIOWrapper:
        return open(self.baseFilename, "a", encoding="utf-8", errors="backslashreplace", opener=private_opener)


class ReadyPipe:
    """The daemon's end of the starter's pipe: one line, then closed. A starter that has gone is no trouble."""

    def __init__(self, descriptor: int) -> None:
        os.set_inheritable(descriptor, False)
        self._descriptor: int | None = descriptor

    def ready(self, info: dict[str, Any]) -> None:
        self._say({"ready": info})

    def failed(self, error: RunfsError) -> None:
        self._say(error_message(error))

    def _say(self, message: dict[str, Any]) -> None:
        if self._descriptor is None:
            return
        descriptor, self._descriptor = self._descriptor, None
        try:
            with os.fdopen(descriptor, "wb") as pipe:
                pipe.write(encode(message))
        except BrokenPipeError:
            log.info("whoever started this daemon did not wait for it")


# -- a daemon in the background ------------------------------------------------------------------------------------


def start(settings: Settings, arguments: Sequence[str], program: Sequence[str] = _SELF) -> dict[str, Any]:
    """Start `runfs ARGUMENTS` in a session of its own and wait until its mount answers; what it said then.

    Raises the daemon's own error, or RunfsError with the end of its log.
    """
    private_directory(settings.log.parent, "RUNFS_STATE_DIR")
    reading, writing = os.pipe()
    try:
        with open(settings.log, "ab", opener=private_opener) as output:
            process = subprocess.Popen(
                [*program, *arguments, "--ready-fd", str(writing), "--log-file", str(settings.log)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd="/",  # so that it holds no directory somebody wants to unmount or remove
                env=_environment(settings),
                pass_fds=(writing,),
                start_new_session=True,
            )
    finally:
        os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        try:
            return _answer(pipe.fileno(), process, settings.log)
        except KeyboardInterrupt:
            process.terminate()
            raise


def _environment(settings: Settings) -> dict[str, str]:
    """Ours, with the places made absolute (its current directory is another) and this package to be found."""
    places_of = {"STATE": settings.state_dir, "CACHE": settings.cache_dir, "RUNTIME": settings.runtime_dir}
    directories = {f"RUNFS_{name}_DIR": str(place) for name, place in places_of.items()}
    root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    kept = {name: value for name, value in os.environ.items() if name not in ("RUNFS_MOUNT", "NOTIFY_SOCKET")}
    return {**kept, **directories, "PYTHONPATH": path}


def _answer(descriptor: int, process: subprocess.Popen[bytes], log_file: Path) -> dict[str, Any]:
    line, deadline = b"", time.monotonic() + START_S
    while not line.endswith(b"\n"):
        if not select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise RunfsError(f"the daemon (pid {process.pid}) is still starting after {START_S:.0f} s; see {log_file}")
        received = os.read(descriptor, 65536)
        if not received:
            raise _died(process, log_file)
        line += received
    message = json.loads(line)
    if "error" in message:
        process.wait()
        raise error_from(message["error"])
    ready: dict[str, Any] = message["ready"]
    # It lives on without us: nobody will wait for it here, and that is no leak to warn about.
    process.returncode = 0
    return ready


def _died(process: subprocess.Popen[bytes], log_file: Path) -> RunfsError:
    code = process.wait()
    tail = " | ".join(log_file.read_text(errors="replace").splitlines()[-_LOG_TAIL:])
    error = RunfsError(f"the daemon ended (exit {code}) before the mount answered; see {log_file}: {tail}")
    error.exit_code = 2 if code == 2 else 1
    return error
