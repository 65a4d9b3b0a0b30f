"""A directory on a network mount as a store: a file store that insists on its mount.

Used through `open_store("nfs:///mnt/share/dir?mount=/mnt/share&remote=host:/export")`. Any kind of network mount will
do (NFS, CIFS, ...); mounting it is not done here. Blocks as long as the kernel does: on a hard mount a call to a silent
server waits until it is back (mount with `soft` to get an error instead).

Before each call the mount has to be there, as /proc/self/mountinfo tells it (which asks no server): else what is below
is this machine's own disk, and the call raises Unreachable. The server may replace the directory behind an open
descriptor (ESTALE): every call opens anew, and is made again a few times when that happens.
"""

import errno
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from vfs.errors import ConfigError, Unreachable
from vfs.stores import urls
from vfs.stores.base import BaseBroker, from_bytes
from vfs.stores.file import FileStore
from vfs.stores.limits import Limits, read_limits
from vfs.stores.protocol import Arrived, Info, Stat, Volume

T = TypeVar("T")

ATTEMPTS = 3
PAUSE_S = 0.1  # the kernel looks a stale directory up again at once; this is for a server that just starts
_NETWORK = re.compile(r"nfs[34]?")
_ESCAPED = re.compile(r"\\([0-7]{3})")


class NfsStore(FileStore):
    """A file store whose directory is on a mount. Made by `Broker.open`."""

    def __init__(
        self,
        root: Path,
        mount: Path,
        remote: str | None = None,
        *,
        name: str | None = None,
        url: str | None = None,
        used: bool = False,
        read_only: bool = False,
        limits: Limits | None = None,
    ) -> None:
        self._mount = mount
        self._remote = remote
        shown = name or root.name or "nfs"
        self._shown = shown
        super().__init__(root, name=shown, url=url, used=used, read_only=read_only, limits=limits, guard=self._insist)

    def info(self) -> Info:
        return replace(super().info(), broker="nfs")

    def stat(self, key: str, *, deadline: float | None = None) -> Stat:
        return _again(lambda: super(NfsStore, self).stat(key, deadline=deadline))

    def read(self, key: str, start: int = 0, length: int | None = None, *, deadline: float | None = None) -> bytes:
        return _again(lambda: super(NfsStore, self).read(key, start, length, deadline=deadline))

    def read_into(
        self,
        key: str,
        buffer: memoryview,
        start: int = 0,
        *,
        arrived: Arrived | None = None,
        deadline: float | None = None,
    ) -> int:
        return _again(lambda: super(NfsStore, self).read_into(key, buffer, start, arrived=arrived, deadline=deadline))

    def write(
        self,
        key: str,
        data: bytes,
        *,
        if_absent: bool = False,
        if_version: str | None = None,
        deadline: float | None = None,
    ) -> Stat:
        return _again(
            lambda: super(NfsStore, self).upload(
                key, from_bytes(data), len(data), if_absent=if_absent, if_version=if_version, deadline=deadline
            )
        )

    def upload(
        self,
        key: str,
        source: Callable[[int, int], bytes],
        size: int,
        *,
        if_absent: bool = False,
        if_version: str | None = None,
        progress: Callable[[int], None] | None = None,
        deadline: float | None = None,
    ) -> Stat:
        """As the protocol says; made again only while nothing was asked of `source`, which gives its bytes once."""
        asked = False

        def once(offset: int, length: int) -> bytes:
            nonlocal asked
            asked = True
            return source(offset, length)

        def send() -> Stat:
            return super(NfsStore, self).upload(
                key,
                once,
                size,
                if_absent=if_absent,
                if_version=if_version,
                progress=progress,
                deadline=deadline,
            )

        return _again(send, lambda: not asked)

    def list(self, prefix: str = "", *, recursive: bool = True, deadline: float | None = None) -> Iterator[Stat]:
        """As the protocol says; begun again only while nothing was given."""
        given = False

        def begin() -> tuple[Iterator[Stat], Stat | None]:
            listing = super(NfsStore, self).list(prefix, recursive=recursive, deadline=deadline)
            return listing, next(listing, None)

        listing, first = _again(begin, lambda: not given)
        if first is not None:
            given = True
            yield first
            yield from listing

    def delete(self, key: str, *, deadline: float | None = None) -> None:
        _again(lambda: super(NfsStore, self).delete(key, deadline=deadline))

    def copy(self, source: str, target: str, *, if_absent: bool = False, deadline: float | None = None) -> Stat:
        return _again(lambda: super(NfsStore, self).copy(source, target, if_absent=if_absent, deadline=deadline))

    def move(self, source: str, target: str, *, if_absent: bool = False, deadline: float | None = None) -> Stat:
        return _again(lambda: super(NfsStore, self).move(source, target, if_absent=if_absent, deadline=deadline))

    def local_path(self, key: str) -> Path | None:
        return _again(lambda: super(NfsStore, self).local_path(key))

    def _insist(self) -> None:
        """Raises Unreachable when the mount is not there, or is another one."""
        found = _mounted_at(self._mount)
        if not found or found[0] == "autofs":
            with suppress(OSError):
                os.stat(self._mount / ".")  # what mounts on demand does it now
            found = _mounted_at(self._mount)
        what = f"mount {self._remote} there" if self._remote else "mount the server's directory there"
        if not found or found[0] == "autofs":
            raise Unreachable(
                f"{self._shown}: {self._mount} is not mounted; {what} (see mount(8)), or name the directory that the "
                f"server's is mounted on as mount=DIRECTORY"
            )
        kind, source = found
        if self._remote and _NETWORK.fullmatch(kind) and source.rstrip("/") != self._remote.rstrip("/"):
            raise Unreachable(f"{self._shown}: {self._mount} has {source} mounted, not {self._remote}; {what}")


def _mounted_at(directory: Path) -> tuple[str, str] | None:
    """The type and the source of what is mounted on a directory (the topmost, if several are), or None. The format
    is proc(5)'s."""
    found = None
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            before, _, after = line.partition(" - ")
            fields, kinds = before.split(" "), after.split(" ")
            if len(fields) > 4 and len(kinds) > 1 and _plain(fields[4]) == str(directory):
                found = (kinds[0], _plain(kinds[1]))
    return found


def _plain(text: str) -> str:
    return _ESCAPED.sub(lambda octal: chr(int(octal[1], 8)), text)


def _again(call: Callable[[], T], may_repeat: Callable[[], bool] = lambda: True) -> T:
    """The call's result; made again when what it had opened went stale."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return call()
        except Unreachable as error:
            cause = error.__cause__
            stale = isinstance(cause, OSError) and cause.errno == errno.ESTALE
            if not stale or attempt == ATTEMPTS or not may_repeat():
                raise
        time.sleep(PAUSE_S * (attempt - 1))
    raise AssertionError("unreachable")


class Broker(BaseBroker):
    """`nfs:///directory?mount=/mountpoint&remote=host:/export`. Options: `mount`, the directory that has to be a mount
    point (default: the store's own); `remote`, what is to be mounted there (`host:/export`); `read_only`; `used`."""

    def validate(self, config: Mapping[str, Any]) -> list[str]:
        self._read(config)
        return []

    def open(self, config: Mapping[str, Any]) -> NfsStore:
        location, root, mount, remote = self._read(config)
        return NfsStore(
            root,
            mount,
            remote,
            name=config.get("name"),
            url=location.url,
            used=bool(config.get("used")),
            read_only=urls.truth(config, location, "read_only"),
            limits=read_limits(config),
        )

    def volume(self, config: Mapping[str, Any]) -> Volume | None:
        _, _, mount, remote = self._read(config)
        return None if remote is None else Volume("nfs", remote, mount)

    def _read(self, config: Mapping[str, Any]) -> tuple[urls.Location, Path, Path, str | None]:
        location = urls.split(config)
        urls.refuse_unknown(config, location, {"read_only", "mount", "remote"})
        urls.truth(config, location, "read_only")
        read_limits(config)
        if location.host or not location.path:
            raise ConfigError(
                f"url = {location.url!r}: give nfs:///directory with three slashes, the directory as it is mounted "
                f"here; name the server in remote=host:/export"
            )
        root = Path("/" + location.path)
        mount = Path(str(urls.option(config, location, "mount") or root))
        if not mount.is_absolute() or not root.is_relative_to(mount) or mount == Path("/"):
            raise ConfigError(f"mount = {str(mount)!r}: give the mount point that {root} is on, or {root} itself")
        remote = urls.option(config, location, "remote")
        if remote is not None and not re.fullmatch(r"[^:/\s]+:/.*|\[[0-9A-Fa-f:.]+\]:/.*", str(remote)):
            raise ConfigError(f"remote = {remote!r}: give host:/export, as mount(8) takes it")
        return location, root, mount, None if remote is None else str(remote)
