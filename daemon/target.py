"""Whom a command asks: the daemon of a mount, or a session in this process where no daemon runs.

Used by the command line. Loads nothing heavy when a daemon answers. A mount is found by --mount or RUNFS_MOUNT, else
by the index of the current directory, else it is the only one there is.
"""

import os
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from daemon import client, mounts
from daemon.protocol import Progress
from vfs import places
from vfs.errors import MountpointError, UsageError


@dataclass(frozen=True, slots=True)
class Target:
    """What the flags of a command say about whom to ask."""

    mount: Path | None = None
    index: Path | None = None
    project: Path | None = None
    config: Path | None = None
    stores: tuple[str, ...] = ()
    create_index: bool = False
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)

    def run(self, command: str, args: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """The result of a command. Raises RunfsError; blocks until the work has ended."""
        daemon = self.daemon()
        if daemon is None:
            return self._run_here(command, args, progress)
        if self.stores:
            raise UsageError(
                f"{daemon.mountpoint} is mounted and has its own stores; leave out --store, or mount again"
            )
        result = client.ask(daemon.socket, command, args, progress)
        if result is None:
            raise client.DaemonLost(f"the daemon of {daemon.mountpoint} has just ended; run the command again")
        return result

    def daemon(self) -> mounts.Running | None:
        """The daemon to ask; None when the work is to be done here. Raises UsageError when it is not clear which."""
        named = self.mount or (Path(self.environ["RUNFS_MOUNT"]) if self.environ.get("RUNFS_MOUNT") else None)
        if named is not None:
            return self._named(mounts.real_mountpoint(named))
        if self.index is None and self.project is None:
            around = mounts.mount_around(Path.cwd())
            if around is not None and around.is_runfs:
                return self._named(Path(around.mountpoint))
        index = self._index()
        alive = [each for each in self._running() if index is None or each.index == os.path.realpath(index)]
        if len(alive) > 1:
            raise UsageError(f"several mounts could be meant: {_listed(alive)}. Name one with --mount or RUNFS_MOUNT")
        return alive[0] if alive else None

    def _running(self) -> list[mounts.Running]:
        return [each for each in mounts.running_anywhere(self.environ) if client.answers(each.socket)]

    def _index(self) -> Path | None:
        flags = {"index": self.index, "project": self.project}
        if self.index is None and self.project is None and not self.environ.get("MACHINABLE_INDEX"):
            return places.find_index(Path.cwd())
        from daemon.config import find_index

        found = find_index(flags, self.environ, Path.cwd())
        return found[0] if found else None

    def _named(self, mountpoint: Path) -> mounts.Running:
        where = mounts.runtime_of(self.environ, mountpoint)
        path = places.socket_of(where, mountpoint)
        if not client.answers(path):
            raise MountpointError(self._why_not(mountpoint))
        entry = mounts.announced_at(where, mountpoint)
        return entry or mounts.Running(0, str(mountpoint), "", 0.0, path)

    def _why_not(self, mountpoint: Path) -> str:
        mounted = mounts.mounted_at(mountpoint)
        if mounted is not None and mounted.is_runfs:
            if mounted.uid not in (None, os.geteuid()):
                return f"{mountpoint} was mounted by uid {mounted.uid}; run the command as that user"
            return (
                f"{mountpoint}: its daemon is gone. Run: runfs umount {mountpoint}, then mount again; nothing is lost"
            )
        alive = self._running()
        there = f"there is {_listed(alive)}" if alive else "no mount of runfs is running"
        if self.environ.get("RUNFS_MOUNT") and self.mount is None:
            there += " (RUNFS_MOUNT names it; unset it to work without a mount)"
        return f"runfs has nothing mounted at {mountpoint}; {there}"

    def _run_here(self, command: str, args: dict[str, Any], progress: Progress) -> dict[str, Any]:
        settings = self.settings()  # first: what is wrong there is said before anything heavy is loaded
        from vfs import linux
        from vfs.session import Session

        linux.keep_out_of_core_dumps()
        with closing(Session.open(settings, role="command")) as session:
            return session.run(command, args, progress)

    def settings(self) -> Any:
        """The settings for work in this process. Raises ConfigError, IndexMissing."""
        from daemon.config import load

        flags = {
            "index": self.index,
            "project": self.project,
            "stores": list(self.stores),
            "create_index": self.create_index,
        }
        given = {key: value for key, value in flags.items() if value}
        return load(given, config=self.config, environ=self.environ, remembered=True).settings()


def _listed(alive: list[mounts.Running]) -> str:
    return ", ".join(f"{each.mountpoint} (of {each.index})" for each in alive)
