"""The steps of an SFTP store: finding, writing, giving names, listing. Coroutines for the one asyncio thread.

Used by `store.py`, inside `session.Calls.run`. The layout is `places.py`'s, so that a directory which the file
store wrote reads the same through SFTP. Protocol version 3 (draft-ietf-secsh-filexfer-02) and OpenSSH's extensions
(its file PROTOCOL): posix-rename, hardlink, fsync, copy-data, statvfs.

What a crash leaves: temporary files and claims in `.runfs.tmp`, which `sweep` removes.
"""

import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import asyncssh
from blake3 import blake3

from vfs.errors import NotFound, StoreError, Unreachable
from vfs.stores import places
from vfs.stores.file import Found
from vfs.stores.places import Place
from vfs.stores.sftp import errors as sftp_errors
from vfs.stores.sftp.config import Target
from vfs.stores.sftp.requests import all_of, described, in_flight, is_directory, is_file, later
from vfs.stores.sftp.session import Connection

T = TypeVar("T")

BLOCK = 256 * 1024  # bytes of a request at most; what OpenSSH takes
PIECE = 4 * 1024 * 1024
SINGLE = 0  # one request for each call: asyncssh leaves parts of its own parallel calls behind when one is cancelled
FULL_BELOW = 1024 * 1024  # bytes; a server that fails to write with less free space is full

GONE = (asyncssh.SFTPNoSuchFile, asyncssh.SFTPNoSuchPath)
# What a name that cannot be there is answered with: too long, a file where a directory is needed.
_NOT_THERE = (
    *GONE,
    asyncssh.SFTPFailure,
    asyncssh.SFTPBadMessage,
    asyncssh.SFTPNotADirectory,
    asyncssh.SFTPInvalidFilename,
)


@dataclass(frozen=True, slots=True)
class Written:
    """A temporary file that has all its bytes: where, how long, dated when (seconds), and what is in it."""

    place: Place
    size: int
    mtime: int
    digest: bytes | None


class Files:
    """The directory of one store. Coroutines; each takes the connection it runs on."""

    def __init__(self, target: Target, used: bool) -> None:
        self._target = target
        self._name = target.name
        self._used = used
        self._identity: bytes | None = None

    def path(self, place: Sequence[str] = ()) -> bytes:
        """A place as the server knows it."""
        return "/".join((self._target.root.rstrip("/"), *place)).encode("utf-8", "surrogateescape")

    # The store's directory
    # ------------------------------------------------------------------------------------------------------------

    async def prepare(self, connection: Connection) -> None:
        """On a new connection: find out what the server offers, and whether the directory is the one it was."""
        nothing = self.path((places.TEMPORARY, f"none-{os.urandom(8).hex()}"))
        sftp = connection.sftp
        replace, link = await all_of(
            _offered(sftp.posix_rename(nothing, nothing)), _offered(sftp.link(nothing, nothing))
        )
        connection.abilities.replace, connection.abilities.link = replace, link
        connection.abilities.copy = sftp.supports_remote_copy
        await self.look_at_marker(connection)

    async def look_at_marker(self, connection: Connection) -> bytes | None:
        """The marker. Raises Unreachable when this is not the directory it was: a disk of the server is missing."""
        found = await self._read_marker(connection)
        where = f"{self._target.root} on {self._target.place}"
        if found is None and (self._used or self._identity is not None):
            raise Unreachable(
                f"{self._name}: {where} was a store, and has no {places.MARKER} now; is the server's disk mounted? "
                f"If the store was emptied on purpose, make it anew under another name"
            )
        if found is not None and self._identity is not None and found != self._identity:
            raise Unreachable(f"{self._name}: {where} is another store than before; is the right disk mounted there?")
        self._identity = found
        return found

    async def confirm_missing(self, connection: Connection) -> None:
        """Before something counts as not there: is the store?"""
        if self._used or self._identity is not None:
            await self.look_at_marker(connection)

    async def _read_marker(self, connection: Connection) -> bytes | None:
        try:
            async with connection.sftp.open(self.path((places.MARKER,)), "rb", block_size=SINGLE) as file:
                content: Any = await connection.ask(file.read(4096))
                return bytes(content)
        except GONE:
            return None

    async def make_area(self, connection: Connection) -> None:
        """The place for temporary files, and the marker of a new store. Raises Unreachable, Denied."""
        if await self.look_at_marker(connection) is None:
            await self._make_directory(connection, ())
        await self._make_directory(connection, (places.TEMPORARY,))
        if self._identity is not None:
            return
        temporary = self.temporary_place()
        async with connection.sftp.open(self.path(temporary), "xb", block_size=SINGLE) as file:
            await connection.ask(file.write(b'{"runfs-store": 1, "id": "%s"}\n' % os.urandom(16).hex().encode()))
            await self.sync(connection, file)
        with contextlib.suppress(asyncssh.SFTPFailure, asyncssh.SFTPFileAlreadyExists):  # another writer's counts
            await self._link_or_rename(connection, temporary, (places.MARKER,))
        await self.remove(connection, temporary)
        self._identity = await self._read_marker(connection)

    async def _make_directory(self, connection: Connection, place: Place) -> None:
        try:
            await connection.ask(connection.sftp.mkdir(self.path(place)))
        except (asyncssh.SFTPFailure, asyncssh.SFTPFileAlreadyExists):
            return  # it exists; if not, what comes next says so
        except GONE as error:
            if place:
                raise
            raise Unreachable(
                f"{self._name}: {self._target.root} is not there on {self._target.place}, nor the directory above it; "
                f"is the server's disk mounted? Else make it there with mkdir"
            ) from error

    # Finding and reading
    # ------------------------------------------------------------------------------------------------------------

    async def find(self, connection: Connection, key: str) -> Found | None:
        """Where an object is and what it is, or None."""
        found = await all_of(*(self._look(connection, place) for place in (places.plain(key), places.alternative(key))))
        for place, attributes in found:
            if attributes is not None and is_file(attributes):
                return Found(place, described(key, attributes))
        return None

    async def existing(self, connection: Connection, operation: str, key: str) -> Found:
        """Like `find`. Raises NotFound."""
        found = await self.find(connection, key)
        if found is None:
            await self.confirm_missing(connection)
            raise NotFound(f"{self._name}: {operation} {key}: there is no such object")
        return found

    async def _look(self, connection: Connection, place: Place) -> tuple[Place, asyncssh.SFTPAttrs | None]:
        try:
            return place, await connection.ask(connection.sftp.lstat(self.path(place)))
        except _NOT_THERE:
            return place, None

    async def read(self, connection: Connection, key: str, start: int, length: int | None) -> bytes:
        """The bytes asked for; fewer only where the object ends. Raises NotFound."""
        found = await self.existing(connection, "read", key)
        try:
            file = await connection.sftp.open(self.path(found.place), "rb", block_size=SINGLE)
        except GONE:
            raise NotFound(f"{self._name}: read {key}: there is no such object") from None
        try:
            size = (await connection.ask(file.stat())).size or 0
            wanted = max(0, size - start)
            wanted = wanted if length is None else min(length, wanted)
            return await self._blocks(connection, file, key, start, wanted)
        finally:
            later(file.close())

    async def _blocks(self, connection: Connection, file: Any, key: str, start: int, length: int) -> bytes:
        """All bytes of a range, requested several blocks at a time."""
        step = min(BLOCK, connection.sftp.limits.max_read_len)
        blocks: dict[int, bytes] = {}

        async def get(offset: int) -> None:
            wanted = min(step, start + length - offset)
            block = b""
            while len(block) < wanted:  # a server may give less at a time
                piece = bytes(await file.read(wanted - len(block), offset + len(block)))
                if not piece:
                    raise StoreError(f"{self._name}: read {key}: it became shorter meanwhile; read it again")
                connection.moved += len(piece)
                block += piece
            blocks[offset] = block

        await in_flight(get, range(start, start + length, step))
        return b"".join(blocks[offset] for offset in sorted(blocks))

    async def digest(self, connection: Connection, place: Place, size: int) -> bytes:
        """The BLAKE3 of what a file has."""
        hashed = blake3()
        async with connection.sftp.open(self.path(place), "rb", block_size=SINGLE) as file:
            for offset in range(0, size, PIECE):
                hashed.update(await self._blocks(connection, file, "", offset, min(PIECE, size - offset)))
        return hashed.digest()

    # Writing
    # ------------------------------------------------------------------------------------------------------------

    @staticmethod
    def temporary_place() -> Place:
        """A place for a new temporary file."""
        return (places.TEMPORARY, f"{os.getpid()}-{os.urandom(8).hex()}")

    @contextlib.asynccontextmanager
    async def opened(self, connection: Connection, place: Place, *, new: bool) -> AsyncIterator[Any]:
        """A temporary file on a lane of its own; `new`: made now (with its directory, where that is missing)."""
        async with connection.lane() as sftp:
            flags = asyncssh.FXF_WRITE | (asyncssh.FXF_CREAT if new else 0)
            try:
                file = await connection.ask(sftp.open(self.path(place), flags, block_size=SINGLE, encoding=None))
            except GONE:
                if not new:
                    raise
                await self.make_area(connection)
                file = await connection.ask(sftp.open(self.path(place), flags, block_size=SINGLE, encoding=None))
            try:
                yield file
            finally:
                later(file.close())

    async def write(self, connection: Connection, place: Place, data: bytes, offset: int, *, new: bool) -> None:
        """Put bytes into a temporary file. Raises StoreFull."""
        async with self.opened(connection, place, new=new) as file:
            await self._write(connection, file, data, offset)

    async def write_whole(self, connection: Connection, place: Place, data: bytes) -> Written:
        """A temporary file with these bytes, synced."""
        async with self.opened(connection, place, new=True) as file:
            await self._write(connection, file, data, 0)
            return await self._ended(connection, file, place, len(data), blake3(data).digest())

    async def end(self, connection: Connection, place: Place, size: int, digest: bytes) -> Written:
        """Sync a temporary file that was written piece by piece."""
        async with self.opened(connection, place, new=not size) as file:
            return await self._ended(connection, file, place, size, digest)

    async def _write(self, connection: Connection, file: Any, data: bytes, offset: int) -> None:
        view = memoryview(data)
        step = min(BLOCK, connection.sftp.limits.max_write_len)

        async def put(at: int) -> None:
            piece = bytes(view[at : at + step])
            await file.write(piece, offset + at)
            connection.moved += len(piece)

        try:
            await in_flight(put, range(0, len(data), step))
        except asyncssh.SFTPFailure:
            if await self._is_full(connection):
                raise sftp_errors.full(self._target, "write", "") from None
            raise

    async def _is_full(self, connection: Connection) -> bool:
        """Version 3 has no word for a full disk: an unexplained failure on one that has no room is that."""
        try:
            room = await connection.ask(connection.sftp.statvfs(self.path()))
        except asyncssh.SFTPError:
            return False
        return room.bavail * room.frsize < FULL_BELOW

    async def _ended(self, connection: Connection, file: Any, place: Place, size: int, digest: bytes) -> Written:
        await self.sync(connection, file)
        attributes = await connection.ask(file.stat())
        if attributes.size != size:
            raise StoreError(
                f"{self._name}: {self._target.place} kept {attributes.size} of {size} bytes; its log may say why"
            )
        return Written(place, size, attributes.mtime or 0, digest)

    async def sync(self, connection: Connection, file: Any) -> None:
        """Make a file's bytes durable, where the server can."""
        if not connection.abilities.sync:
            return
        try:
            with connection.quiet():
                await file.fsync()
        except asyncssh.SFTPOpUnsupported:
            connection.abilities.sync = False

    async def copy(self, connection: Connection, source: Found, place: Place) -> Written:
        """A temporary file with the bytes of an object, copied by the server."""
        async with connection.lane() as sftp, sftp.open(self.path(source.place), "rb", block_size=SINGLE) as original:
            size = (await connection.ask(original.stat())).size or 0
            async with self.opened(connection, place, new=True):
                pass  # makes the directory where it is missing
            async with sftp.open(self.path(place), "wb", block_size=SINGLE) as file:
                with connection.quiet():
                    await sftp.remote_copy(original, file)
                await self.sync(connection, file)
                attributes = await connection.ask(file.stat())
        if attributes.size != size:
            raise StoreError(f"{self._name}: {self._target.place} copied {attributes.size} of {size} bytes; try again")
        return Written(place, size, attributes.mtime or 0, None)

    async def _link_or_rename(self, connection: Connection, source: Place, target: Place) -> None:
        """Fails when the target exists: a link by its nature, a rename as version 3 wants it."""
        move = connection.sftp.link if connection.abilities.link else connection.sftp.rename
        await connection.ask(move(self.path(source), self.path(target)))

    async def remove(self, connection: Connection, place: Place) -> None:
        """Remove a file; no error when it is not there."""
        with contextlib.suppress(*GONE):
            await connection.ask(connection.sftp.remove(self.path(place)))

    async def names(self, connection: Connection, place: Place) -> list[str]:
        """The names in a directory; none where there is no such directory."""
        return [name async for name, _ in self.entries(connection, place)]

    async def entries(self, connection: Connection, place: Place) -> AsyncIterator[tuple[str, asyncssh.SFTPAttrs]]:
        """What is in a directory, as the server sends it; nothing where there is no such directory."""
        with contextlib.suppress(*GONE):
            async for entry in connection.sftp.scandir(self.path(place)):
                connection.moved += connection.limits.least_throughput * connection.limits.window_s / 100
                name = bytes(entry.filename).decode("utf-8", "surrogateescape")  # type: ignore[arg-type]
                if name not in (".", ".."):
                    yield name, entry.attrs

    async def sweep(self, connection: Connection, older_than_s: float) -> int:
        """Remove old temporary files and claims; how many. Ages are by the server's clock."""
        area = (places.TEMPORARY,)
        found = [(name, each) async for name, each in self.entries(connection, area) if name != "lock"]
        if not found:
            return 0
        place = self.temporary_place()
        now = (await self.write_whole(connection, place, b"now")).mtime
        await self.remove(connection, place)
        removed = 0
        for name, attributes in found:
            if now - (attributes.mtime or 0) > older_than_s:
                removed += await self._sweep_one(connection, (*area, name), is_directory(attributes))
        return removed

    async def _sweep_one(self, connection: Connection, place: Place, directory: bool) -> int:
        if not directory:
            await self.remove(connection, place)
            return 1
        for name in await self.names(connection, place):
            await self.remove(connection, (*place, name))
        with contextlib.suppress(asyncssh.SFTPError):
            await connection.ask(connection.sftp.rmdir(self.path(place)))
        return 1


async def _offered(trial: Awaitable[object]) -> bool:
    """Whether the server has an operation, tried on a name that is not there."""
    try:
        await trial
    except (asyncssh.SFTPOpUnsupported, asyncssh.SFTPPermissionDenied):
        return False
    except asyncssh.SFTPConnectionLost:
        raise
    except asyncssh.SFTPError:
        return True
    return True
