"""One mount from start to end: compose the parts, say ready, keep watch, drain, unmount.

Tasks in the nursery: pyfuse3's main loop; the control socket; the pusher (pushes what is dirty and quiet); the index
watch (what other processes changed, four times a second); the look over all records at start; the free-space
watch; the watchdog. Worker threads run pushes, evictions and commands. Between two checkpoints of the trio thread no
file operation runs: `core.commit` uses this for the moment in which a unit changes place.

Order at the end: no new pushes by themselves, drain what is dirty (bounded), unmount, close. SIGTERM and SIGINT do the
same as `runfs umount`.
"""

import logging
import os
import signal
import subprocess
from collections.abc import Callable
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pyfuse3
import trio

from daemon import control, mounts, notify
from daemon.operations import Operations, OperationsWithAttributes, close_all
from daemon.passthrough import Passthrough, fuse_descriptors
from daemon.transfers import Transfers
from daemon.upkeep import Upkeep
from vfs import report
from vfs.errors import MountpointError, Refused
from vfs.filesystem import FileSystem
from vfs.private import private_directory
from vfs.session import Progress, Session
from vfs.settings import Settings

log = logging.getLogger(__name__)
_READ_AHEAD_KB = 1024
_FUSE_CONF = Path("/etc/fuse.conf")
DRAIN_S = 60.0


def serve(settings: Settings, *, ready: Callable[[dict[str, Any]], None]) -> int:
    """Mount and serve until unmounted. `ready` is called once with the state. Returns the exit code.

    Raises MountpointError, IndexUnavailable, JournalLocked, ConfigError before anything is mounted.
    """
    if settings.mountpoint is None:
        raise MountpointError("where? Name a mountpoint: runfs mount MOUNTPOINT")
    private_directory(settings.runtime_dir, "RUNFS_RUNTIME_DIR")  # before there is a mount to take away again
    with closing(Session.open(settings, role="daemon")) as session:
        return trio.run(Mount(session).run, ready, strict_exception_groups=True)


class Mount:
    """A session behind a mountpoint."""

    def __init__(self, session: Session) -> None:
        assert session.settings.mountpoint is not None
        self.session = session
        self.mountpoint: Path = session.settings.mountpoint
        self.files = FileSystem(session.core)
        self._over = trio.Event()
        self._drain_s = DRAIN_S
        self._drained: dict[str, Any] = {}

    async def run(self, ready: Callable[[dict[str, Any]], None]) -> int:
        core = self.session.core
        transfers = Transfers(core, self.files, self.session.hydrator, self.session.pusher)
        self.session.waiting = transfers.waiting
        kind = OperationsWithAttributes if self.session.settings.xattr else Operations
        token = trio.lowlevel.current_trio_token()
        core.commit = partial(_on_loop, token)
        self.upkeep = Upkeep(self.session, self.files)
        passthrough = self._passthrough()
        self.upkeep.expire_name = passthrough.expire_name
        operations = kind(self.files, transfers, passthrough)
        before = fuse_descriptors()
        self._mount(operations)
        try:
            await passthrough.start(before)
            self.session.passthrough = lambda: passthrough.state
            self.session.kept = operations.kept
            with mounts.announced(
                self.session.settings.runtime_dir,
                self.mountpoint,
                self.session.settings.index,
                self.session.settings.state,
            ) as path:
                await self._serve(path, ready)
        finally:
            self.files.close()
            self.upkeep.close()
            passthrough.close()
            with suppress(Exception):
                pyfuse3.close(unmount=True)
            close_all(operations, self.files)
        return 0

    def _passthrough(self) -> Passthrough:
        settings = self.session.settings
        places = [os.fsencode(settings.cache_place), os.fsencode(settings.project_dir)]
        wanted = settings.passthrough == "auto"
        return Passthrough(self.files, wanted=wanted, places=places, hush=self.upkeep.hush)

    def _mount(self, operations: Operations) -> None:
        settings = self.session.settings
        options = {"fsname=runfs", "subtype=runfs", "default_permissions", *settings.fuse_options}
        options |= {"allow_other"} if settings.allow_other else set()
        if options & {"allow_other", "allow_root"} and os.geteuid() and not _others_allowed():
            raise MountpointError(
                f"{self.mountpoint}: a mount that others may enter has to be allowed by the administrator: "
                f"as root, add the line user_allow_other to {_FUSE_CONF}; or leave out --allow-other"
            )
        options |= {"ro"} if settings.read_only else set()
        try:
            pyfuse3.init(operations, str(self.mountpoint), options)
        except RuntimeError as error:
            raise MountpointError(
                f"{self.mountpoint} cannot be mounted ({error}); `runfs doctor` tells what this machine lacks"
            ) from error

    async def _serve(self, socket: Path, ready: Callable[[dict[str, Any]], None]) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._fuse, nursery.cancel_scope)
            await nursery.start(control.serve, socket, _Commands(self))
            nursery.start_soon(self._signals)
            nursery.start_soon(self._watchdog)
            nursery.start_soon(self._widen)
            self.upkeep.start(nursery)
            self.files.roots.start()
            await trio.to_thread.run_sync(self._try_stores)
            ready(report.overview(self.session))
            await self._over.wait()
            await self._unmount()
            # the main loop ends when the kernel has let go, and with it this nursery

    async def _fuse(self, scope: trio.CancelScope) -> None:
        await pyfuse3.main()
        self.session.stopping.set()
        scope.cancel()

    def _try_stores(self) -> None:
        """One quick question to each store, so that the first line says how it is; never more than a moment."""
        for home in self.session.core.stores:
            with suppress(Exception), home.watched():
                next(iter(home.store().list(".runfs/", deadline=min(3.0, home.deadline_s))), None)

    async def _signals(self) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as received:
            async for _number in received:
                log.info("asked to stop; draining for at most %.0f s", self._drain_s)
                self.finish(self._drain_s)

    async def _watchdog(self) -> None:
        interval = notify.watchdog_interval()
        while interval:
            notify.watchdog()
            await trio.sleep(interval)

    async def _widen(self) -> None:
        """The kernel sets its own read-ahead when it has talked to the main loop, so ours comes after that."""
        for _try in range(5):
            await trio.sleep(0.2)
            _read_ahead(self.mountpoint)

    def finish(self, drain_s: float) -> None:
        """Drain and unmount, from the trio thread."""
        self._drain_s = drain_s
        self._over.set()

    async def _unmount(self) -> None:
        notify.stopping()
        if not self._drained:
            await self.drain(self._drain_s, lambda _event: None)
        if not await trio.to_thread.run_sync(partial(_detach, self.mountpoint, lazily=False)):
            log.warning("%s is still in use; it is taken away from under its users", self.mountpoint)
            await trio.to_thread.run_sync(partial(_detach, self.mountpoint, lazily=True))
            pyfuse3.terminate()

    async def drain(self, seconds: float, tell: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """Push what is dirty, for at most so many seconds; what is left and why."""
        self._drained = await self.upkeep.drain(seconds, tell)
        return self._drained


def _others_allowed() -> bool:
    """Whether fusermount3 will mount for a user with `allow_other`; it tells nobody but its standard error."""
    try:
        lines = _FUSE_CONF.read_text(errors="replace").splitlines()
    except OSError:
        return True  # it will say
    return any(line.partition("#")[0].strip() == "user_allow_other" for line in lines)


def _on_loop(token: trio.lowlevel.TrioToken, call: Callable[[], None]) -> None:
    """Run a call on the trio thread, between two file operations, and wait for it (from any other thread)."""
    try:
        trio.from_thread.run_sync(call, trio_token=token)
    except trio.RunFinishedError:
        raise Refused("the mount has ended meanwhile; the next one goes on") from None


class _Commands:
    """What the control socket serves: the session's commands, and `umount`."""

    def __init__(self, mount: Mount) -> None:
        self._mount = mount

    def run(self, command: str, args: dict[str, Any], progress: Progress) -> dict[str, Any]:
        if command != "umount":
            return self._mount.session.run(command, args, progress)
        seconds = float(args.get("timeout") or 0.0)
        left = trio.from_thread.run(self._mount.drain, seconds, progress)
        if not _detach(self._mount.mountpoint, lazily=False):
            self._mount.upkeep.resume()
            users = ", ".join(f"{name}[{pid}]" for pid, name in users_of(self._mount.mountpoint)) or "a process"
            raise Refused(f"{self._mount.mountpoint} is in use by {users}: end it, or leave the directory; then again")
        trio.from_thread.run_sync(self._mount.finish, 0.0)
        return left


def _detach(mountpoint: Path, *, lazily: bool) -> bool:
    """Take the mount away; `lazily` also while processes are in it (they get ENOTCONN). False when it is busy."""
    if mounts.mounted_at(mountpoint) is None:
        return True
    command = ["fusermount3", "-u", *(["-z"] if lazily else []), str(mountpoint)]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        plain = ["umount", *(["-l"] if lazily else []), str(mountpoint)]
        return subprocess.run(plain, capture_output=True, check=False).returncode == 0


def users_of(mountpoint: Path) -> list[tuple[int, str]]:
    """Processes in a mount, as (pid, name): told by the names of what they have open, which asks the mount nothing."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid() and _is_in(entry, str(mountpoint)):
            with suppress(OSError):
                found.append((int(entry), Path(f"/proc/{entry}/comm").read_text().strip()))
    return found


def _is_in(pid: str, mountpoint: str) -> bool:
    links = [f"/proc/{pid}/cwd", f"/proc/{pid}/root"]
    with suppress(OSError):
        links += [f"/proc/{pid}/fd/{name}" for name in os.listdir(f"/proc/{pid}/fd")]
    for link in links:
        with suppress(OSError):
            if (os.readlink(link) + "/").startswith(mountpoint + "/"):
                return True
    return False


def _read_ahead(mountpoint: Path) -> bool:
    """Let the kernel ask for 1 MiB at a time, where we may (root); libfuse has no option for it. Whether it took."""
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        fields = line.split(" ")
        if fields[4] == str(mountpoint):
            setting = Path(f"/sys/class/bdi/{fields[2]}/read_ahead_kb")
            try:
                setting.write_text(str(_READ_AHEAD_KB))
                return setting.read_text().strip() == str(_READ_AHEAD_KB)
            except OSError as error:
                log.debug("reads stay smaller than they could be: %s", error)
    return True
