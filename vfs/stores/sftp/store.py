"""A directory on any machine that can be reached with SSH, as a store.

Used through `open_store("sftp://host/directory")`. Every method blocks its caller, at most for the call's deadline and
`event_loop`'s margin; the waiting itself happens on the one asyncio thread (`session.py`).

The client is asyncssh. Compared on loopback with OpenSSH 9.2, two cores (tests/bench/sftp_clients.py; 256 MB, 1000
files of 2 kB, 16 at a time; other work ran beside it, so only the order of size counts):

    client                       put MB/s   get MB/s   writes/s   reads/s   memory MB
    asyncssh, AES-GCM first          139        119       1230       672          63
    asyncssh as it comes              59         42        270       232          62
    paramiko                          72         40        825       615          55
    paramiko through fsspec           53         37        186       373          57
    sftp(1)                           76         81        241       283          31

The store needs as much processor time for a byte as asyncssh alone (128 MB: 0.45 s up, 0.35 s down); a small write is
nine requests where a bare one is three.

asyncssh is released every few months, reads the user's SSH configuration, pipelines, has OpenSSH's extensions, and
its calls can be cancelled at any time, on which our deadlines depend; with AES-GCM it is also the fastest. paramiko
has neither cancelling nor the extensions; sftp(1) cannot link, sync, or say what failed.

Durable as far as SFTP goes: the bytes are synced before they get their name; a directory cannot be synced, so a power
cut of the server may take the names of the last seconds. Symbolic links: an object is never one, and listings enter
none; those in the way to the directory, or made by hand below it, are the server's business.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from typing import Any, TypeVar

import asyncssh
from blake3 import blake3

from vfs.errors import StoreError
from vfs.stores import keys, places
from vfs.stores.base import BaseBroker, BaseStore, from_bytes, is_wanted, take_piece
from vfs.stores.file import Condition, Listing
from vfs.stores.limits import Budget, Limits, read_limits
from vfs.stores.places import Place
from vfs.stores.protocol import Info, Stat
from vfs.stores.sftp import config as sftp_config
from vfs.stores.sftp.config import Target
from vfs.stores.sftp.files import Files, Written
from vfs.stores.sftp.names import Names
from vfs.stores.sftp.requests import described, is_directory, is_file
from vfs.stores.sftp.session import Calls, Connection

T = TypeVar("T")

PIECE = 8 * 1024 * 1024  # bytes of an upload handed over at a time
PAGE = 1000  # entries handed over at a time
DIRECTORIES = 8  # read at a time


class SftpStore(BaseStore):
    """A directory behind SFTP. Made by `Broker.open`. Any number of threads, processes and machines may use the same
    directory through SFTP; the file store beside them too, but then `if_version` holds only among those of a kind."""

    def __init__(self, target: Target, limits: Limits) -> None:
        super().__init__(target.name, target.url, read_only=target.read_only, limits=limits)
        self._configured = target
        self._take(target)

    def info(self) -> Info:
        """As the protocol says. What depends on the server's extensions is not claimed before the first call has
        connected."""
        can = self._calls.abilities
        by_server = can is not None and can.link and can.replace
        return Info(
            broker="sftp",
            atomic_replace=can is not None and can.replace,
            conditional_write=by_server,
            server_copy=can is not None and can.copy,
            server_move=by_server,
            read_only=self._read_only,
            sweeps=True,
        )

    def connect(self, credentials: Mapping[str, str] | None = None) -> None:
        if not self.connected and not credentials:
            self._take(self._configured)
        super().connect(credentials)

    def disconnect(self) -> None:
        super().disconnect()
        self._calls.close()

    def _use(self, credentials: Mapping[str, str]) -> None:
        target = sftp_config.with_credentials(self._configured, credentials)
        self._calls.close()
        self._take(target)

    def _take(self, target: Target) -> None:
        self._files = Names(target, target.used)
        self._calls = Calls(target, self._limits, self._files.prepare)

    def stat(self, key: str, *, deadline: float | None = None) -> Stat:
        self._begin("stat", keys.check_readable(key))
        return self._stat(key, self._limits.budget(deadline))

    def read(self, key: str, start: int = 0, length: int | None = None, *, deadline: float | None = None) -> bytes:
        self._begin("read", keys.check_readable(key))
        self._check_range(key, start, length)
        if length == 0:
            return b""
        budget = self._limits.budget(deadline, length or 0)
        if length is None and deadline is None:
            size = self._stat(key, budget).size - start  # how long it may take depends on how much it is
            budget = self._limits.budget(None, max(0, size))
        return self._run("read", key, lambda link: self._files.read(link, key, start, length), budget)

    def write(
        self,
        key: str,
        data: bytes,
        *,
        if_absent: bool = False,
        if_version: str | None = None,
        deadline: float | None = None,
    ) -> Stat:
        if len(data) > PIECE:
            return self.upload(
                key, from_bytes(data), len(data), if_absent=if_absent, if_version=if_version, deadline=deadline
            )
        self._begin("write", keys.check_writable(key), changes=True)
        budget = self._limits.budget(deadline, len(data))
        wish = Condition(if_absent, if_version)
        self._look_first(key, wish, budget)
        place = self._files.temporary_place()
        try:
            written = self._run("write", key, lambda link: self._files.write_whole(link, place, data), budget)
            return self._publish("write", key, written, wish, budget)
        except BaseException:
            self._discard(place)
            raise

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
        self._begin("upload", keys.check_writable(key), changes=True)
        budget = self._limits.budget(deadline, size)
        wish = Condition(if_absent, if_version)
        self._look_first(key, wish, budget)
        place = self._files.temporary_place()
        try:
            written = self._send(place, key, source, size, progress, budget)
            return self._publish("upload", key, written, wish, budget)
        except BaseException:
            self._discard(place)
            raise

    def list(self, prefix: str = "", *, recursive: bool = True, deadline: float | None = None) -> Iterator[Stat]:
        self._begin("list", prefix)
        self._check_prefix(prefix)
        for names, alternative in ((places.plain(prefix)[:-1], False), ((places.ALTERNATIVE,), True)):
            walk = _Walk(self, names, Listing(prefix, recursive, _alternative_key if alternative else _plain_key))
            while walk.more:
                budget = self._limits.budget(deadline)
                yield from self._run("list", prefix, walk.page, budget)

    def delete(self, key: str, *, deadline: float | None = None) -> None:
        self._begin("delete", keys.check_readable(key), changes=True)
        self._run("delete", key, lambda link: self._files.delete(link, key), self._limits.budget(deadline))

    def copy(self, source: str, target: str, *, if_absent: bool = False, deadline: float | None = None) -> Stat:
        """As the protocol says; by the server where it has copy-data, else through this machine."""
        keys.check_readable(source)
        self._begin("copy", keys.check_writable(target), changes=True)
        found = self._stat(source, self._limits.budget(deadline))
        if not self.info().server_copy:
            return super().copy(source, target, if_absent=if_absent, deadline=deadline)
        budget = self._limits.budget(deadline, found.size)
        wish = Condition(if_absent, None)
        self._look_first(target, wish, budget)
        place = self._files.temporary_place()

        async def copied(link: Connection) -> Written:
            return await self._files.copy(link, await self._files.existing(link, "copy", source), place)

        try:
            return self._publish("copy", target, self._run("copy", source, copied, budget), wish, budget)
        except BaseException:
            self._discard(place)
            raise

    def move(self, source: str, target: str, *, if_absent: bool = False, deadline: float | None = None) -> Stat:
        """As the protocol says: the file gets its second name before it loses the first."""
        keys.check_readable(source)
        self._begin("move", keys.check_writable(target), changes=True)
        budget = self._limits.budget(deadline)
        found = self._stat(source, budget)
        if source == target:
            return found
        if not self.info().server_move:
            return super().move(source, target, if_absent=if_absent, deadline=deadline)
        place = self._files.temporary_place()

        async def linked(link: Connection) -> Written:
            there = await self._files.existing(link, "move", source)
            return await self._files.link_temporary(link, there, place)

        try:
            written = self._run("move", source, linked, budget, attempts=1)
            moved = self._publish("move", target, written, Condition(if_absent, None), budget)
            self._run("move", source, lambda link: self._files.delete(link, source), budget)
            return moved
        except BaseException:
            self._discard(place)
            raise

    def sweep(self, older_than_s: float = 86400.0, *, deadline: float | None = None) -> int:
        self._begin("sweep", "", changes=True)
        budget = self._limits.budget(deadline)
        return self._run("sweep", "", lambda link: self._files.sweep(link, older_than_s), budget)

    def _stat(self, key: str, budget: Budget) -> Stat:
        async def ask(link: Connection) -> Stat:
            return (await self._files.existing(link, "stat", key)).stat

        return self._run("stat", key, ask, budget)

    def _look_first(self, key: str, wish: Condition, budget: Budget) -> None:
        """A look before the work; what counts is decided when the object gets its name."""

        async def look(link: Connection) -> None:
            self._files.check(key, wish, await self._files.find(link, key))

        if not wish.free:
            self._run("stat", key, look, budget)

    def _send(
        self,
        place: Place,
        key: str,
        source: Callable[[int, int], bytes],
        size: int,
        progress: Callable[[int], None] | None,
        budget: Budget,
    ) -> Written:
        """The whole source in a temporary file. A piece that a dropped connection took is sent again."""
        hashed = blake3()
        for offset in range(0, size, PIECE):
            piece = take_piece(self.name, key, source, offset, min(PIECE, size - offset))
            hashed.update(piece)
            self._run("upload", key, _writing(self._files, place, piece, offset), budget)
            if progress is not None:
                progress(offset + len(piece))
        digest = hashed.digest()
        return self._run("upload", key, lambda link: self._files.end(link, place, size, digest), budget)

    def _publish(self, operation: str, key: str, written: Written, wish: Condition, budget: Budget) -> Stat:
        tried = False

        async def publish(link: Connection) -> Stat:
            nonlocal tried
            again, tried = tried, True
            return await self._files.publish(link, key, written, wish, again)

        return self._run(operation, key, publish, budget)

    def _discard(self, place: Place) -> None:
        """Remove a temporary file, if the server still answers; nobody waits for it."""
        self._calls.run_later(lambda link: self._files.remove(link, place))

    def _run(
        self,
        operation: str,
        key: str,
        attempt: Callable[[Connection], Coroutine[Any, Any, T]],
        budget: Budget,
        attempts: int = 4,
    ) -> T:
        return self._calls.run(operation, key, attempt, budget, attempts)


class _Walk:
    """A listing under way: directories still to be read, and those being read. `more`: until nothing is left."""

    def __init__(self, store: SftpStore, start: Place, listing: Listing) -> None:
        self._store = store
        self._listing = listing
        self._todo: list[Place] = [start]
        self._open: list[tuple[Place, AsyncIterator[tuple[str, asyncssh.SFTPAttrs]]]] = []
        self._link: Connection | None = None
        self.more = True
        self._first = True

    async def page(self, link: Connection) -> list[Stat]:
        """The next objects. Tried again after a dropped connection only while no directory is half read."""
        files = self._store._files
        if self._first:
            await files.confirm_missing(link)
            self._first = False
        if self._open and link is not self._link:
            raise StoreError(f"{self._store.name}: list {self._listing.prefix}: the connection was lost; list again")
        self._link = link
        todo = self._todo
        taken, self._todo = todo[-DIRECTORIES:], todo[:-DIRECTORIES]
        reading = [*self._open, *((place, files.entries(link, place)) for place in taken)]
        try:
            read = await asyncio.gather(*(self._some(place, entries) for place, entries in reading))
        except BaseException:
            if not self._open:
                self._todo = todo
            raise
        self._open = [each for each, (_, ended) in zip(reading, read, strict=True) if not ended]
        found: list[Stat] = []
        for (place, _), (entries, _) in zip(reading, read, strict=True):
            for name, attributes in entries:
                found += self._take((*place, name), attributes)
        self.more = bool(self._open or self._todo)
        return found

    async def _some(
        self, place: Place, entries: AsyncIterator[tuple[str, asyncssh.SFTPAttrs]]
    ) -> tuple[list[tuple[str, asyncssh.SFTPAttrs]], bool]:
        found: list[tuple[str, asyncssh.SFTPAttrs]] = []
        async for entry in entries:
            found.append(entry)
            if len(found) == PAGE:
                return found, False
        return found, True

    def _take(self, place: Place, attributes: asyncssh.SFTPAttrs) -> Iterator[Stat]:
        if len(place) == 1 and place[0] in places.HIDDEN:
            return
        if "/" in place[-1]:
            return self._store._note_problem("/".join(place), "is no name that a directory can have")
        if is_directory(attributes):
            if self._listing.may_be_below(place):
                self._todo.append(place)
            return
        key = self._listing.key_of(place)
        reason = "is no name of ours" if key is None else keys.why_not_readable(key)
        if reason is None and not is_file(attributes):
            reason = "is no regular file"
        if reason is not None:
            self._store._note_problem("/".join(place), reason)
        elif key is not None and is_wanted(key, self._listing.prefix, self._listing.recursive):
            yield described(key, attributes)


def _writing(
    files: Files, place: Place, piece: bytes, offset: int
) -> Callable[[Connection], Coroutine[Any, Any, None]]:
    return lambda link: files.write(link, place, piece, offset, new=offset == 0)


def _plain_key(place: Place) -> str | None:
    return "/".join(place)


def _alternative_key(place: Place) -> str | None:
    return places.key_of_alternative(place[1:])


class Broker(BaseBroker):
    """`sftp://[user@]host[:port]/directory`. Options: `key_file`, `passphrase`, `password`, `known_hosts`,
    `ssh_config`, `user`, `port`, `read_only`; `used` says that it was written to before."""

    def validate(self, config: Mapping[str, Any]) -> list[str]:
        read_limits(config)
        return sftp_config.warnings(sftp_config.target(config))

    def open(self, config: Mapping[str, Any]) -> SftpStore:
        return SftpStore(sftp_config.target(config), read_limits(config))
