"""How an object of an SFTP store gets its name: the server decides, and no lock is needed.

Used by `store.py`, inside `session.Calls.run`. Coroutines for the one asyncio thread.

- A new object: a hard link from the temporary file; it fails when the name exists.
- A replacement of version V: the temporary file is linked into a directory of its own, which is renamed to the
  claim of V; that fails while another claim of V has a file in it. Whoever has the claim looks whether the object
  still is V, and renames the file out of the claim to the object. A claim whose owner is slow or dead is emptied by
  the next one: then the owner's rename finds nothing, changes nothing, and it starts again. Each file in a claim has
  a name that nobody else uses, so a rename that arrives late does no harm either.
- Versions are made of size and time of change, which SFTP has in whole seconds: a replacement is dated at least one
  second after what it replaces.
"""

import asyncio
import contextlib
import os
import time

import asyncssh
from blake3 import blake3

from vfs import faults
from vfs.errors import Conflict, StoreError
from vfs.stores import places
from vfs.stores.file import Condition, Found
from vfs.stores.places import Place
from vfs.stores.protocol import Stat
from vfs.stores.sftp.files import GONE, Files, Written
from vfs.stores.sftp.requests import is_file, later, stat_of
from vfs.stores.sftp.session import Connection

CLAIM_S = 2.0  # a claim's owner needs two answers; after this it has lost the claim
LOOK_S = 0.05


class Names(Files):
    """The directory of one store, with what gives and takes names in it."""

    async def publish(self, connection: Connection, key: str, written: Written, wish: Condition, again: bool) -> Stat:
        """Give a temporary file its name. `again`: an earlier try may have done it already. Raises Conflict."""
        try:
            stat = await self._publish(connection, key, written, wish, again)
        except GONE:
            raise StoreError(f"{self._name}: {key}: its temporary file is gone; was it swept? Try again") from None
        with contextlib.suppress(asyncssh.Error, OSError):  # done is done; `sweep` comes by
            await self.remove(connection, written.place)  # its second link
        return stat

    async def _publish(self, connection: Connection, key: str, written: Written, wish: Condition, again: bool) -> Stat:
        while True:
            found = await self.find(connection, key)
            if again and found is not None and await self._is_ours(connection, found, written):
                return _verified(found.stat)
            self.check(key, wish, found)
            if found is None:
                done = await self._put_new(connection, key, written)
            else:
                done = await self._put_over(connection, key, written, found)
            if done is not None:
                return done

    def check(self, key: str, wish: Condition, found: Found | None) -> None:
        """Raises Conflict where a condition does not hold."""
        if wish.if_absent and found is not None:
            raise Conflict(f"{self._name}: {key} exists already")
        if wish.if_version is not None and (found is None or found.stat.version != wish.if_version):
            raise Conflict(f"{self._name}: {key} was changed by somebody else meanwhile")

    async def _is_ours(self, connection: Connection, found: Found, written: Written) -> bool:
        """Whether an object has exactly the temporary file's bytes."""
        if found.stat.size != written.size:
            return False
        ours = written.digest or await self.digest(connection, written.place, written.size)
        return await self.digest(connection, found.place, written.size) == ours

    async def _put_new(self, connection: Connection, key: str, written: Written) -> Stat | None:
        """Link it under the first of its names that can be had; None when somebody was faster."""
        for place in (places.plain(key), places.alternative(key)):
            for with_directories in (False, True):
                try:
                    if with_directories:
                        await self._make_directories(connection, place[:-1])
                    faults.point("sftp.naming")
                    await self._link_or_rename(connection, written.place, place)
                    return stat_of(key, written.size, written.mtime)
                except GONE:
                    await connection.ask(connection.sftp.lstat(self.path(written.place)))  # ours gone: say so
                except (asyncssh.SFTPFailure, asyncssh.SFTPBadMessage, asyncssh.SFTPFileAlreadyExists):
                    present = (await self._look(connection, place))[1]
                    if present is not None and is_file(present):
                        return None
                    break  # something else has the name: the other place
        raise StoreError(f"{self._name}: {self._target.place} has no place for {key}; is something else in its way?")

    async def _make_directories(self, connection: Connection, place: Place) -> None:
        for depth in range(1, len(place) + 1):
            await self._make_directory(connection, place[:depth])

    async def _put_over(self, connection: Connection, key: str, written: Written, found: Found) -> Stat | None:
        """Replace a version; None when it is not there any more."""
        sftp, mtime = connection.sftp, written.mtime
        before = (found.stat.modified_ns or 0) // 10**9
        if mtime <= before:
            mtime = before + 1
            await connection.ask(sftp.setstat(self.path(written.place), asyncssh.SFTPAttrs(atime=mtime, mtime=mtime)))
        source, target = self.path(written.place), self.path(found.place)
        abilities = connection.abilities
        if abilities.link and abilities.replace:
            if not await self._replace(connection, key, written.place, found):
                return None
        elif abilities.replace:
            await connection.ask(sftp.posix_rename(source, target))
        else:
            await self.remove(connection, found.place)
            await connection.ask(sftp.rename(source, target))
        return stat_of(key, written.size, mtime)

    async def _replace(self, connection: Connection, key: str, source: Place, found: Found) -> bool:
        """Rename over a version that nobody else may replace meanwhile; whether it was still that version."""
        version = found.stat.version or ""
        mark = blake3("/".join((*found.place, version)).encode("utf-8", "surrogateescape")).hexdigest(16)
        name = f"{source[-1]}-{os.urandom(4).hex()}"  # of this try only: one that arrives late must find nothing
        own, claim = (places.TEMPORARY, name + ".d"), (places.TEMPORARY, f"claim-{mark}")
        mine = (*claim, name)
        try:
            await self._claim(connection, source, own, mine)
            now = await self.find(connection, key)
            if now is None or now.place != found.place or now.stat.version != version:
                return False
            return await self._take(connection, mine, found.place)
        finally:
            later(self._forget(connection, own, mine))

    async def _take(self, connection: Connection, mine: Place, target: Place) -> bool:
        """Rename out of the claim; False when we were too slow, and somebody emptied it."""
        faults.point("sftp.replacing")
        try:
            await connection.ask(connection.sftp.posix_rename(self.path(mine), self.path(target)))
        except GONE:
            return False
        return True

    async def _claim(self, connection: Connection, source: Place, own: Place, mine: Place) -> None:
        sftp, claim = connection.sftp, mine[:-1]
        await connection.ask(sftp.mkdir(self.path(own)))
        await connection.ask(sftp.link(self.path(source), self.path((*own, mine[-1]))))
        seen: dict[str, float] = {}
        while True:
            try:
                return await connection.ask(sftp.posix_rename(self.path(own), self.path(claim)))
            except asyncssh.SFTPFailure:  # somebody's file is in it
                await self._empty_if_stale(connection, claim, seen)

    async def _empty_if_stale(self, connection: Connection, claim: Place, seen: dict[str, float]) -> None:
        now = time.monotonic()
        for name in await self.names(connection, claim):
            if now - seen.setdefault(name, now) > CLAIM_S:
                await self.remove(connection, (*claim, name))
        await asyncio.sleep(LOOK_S)

    async def _forget(self, connection: Connection, own: Place, mine: Place) -> None:
        """Clear up after a claim: our files, where they still are, and directories that are empty."""
        for directory in (own, mine[:-1]):
            with contextlib.suppress(asyncssh.Error, OSError):
                await self.remove(connection, (*directory, mine[-1]))
                await connection.sftp.rmdir(self.path(directory))

    async def delete(self, connection: Connection, key: str) -> None:
        """Remove an object, and the directories that are empty without it."""
        found = await self.find(connection, key)
        if found is None:
            return await self.confirm_missing(connection)
        await self.remove(connection, found.place)
        with contextlib.suppress(asyncssh.SFTPError):  # not empty
            for depth in range(len(found.place) - 1, 0, -1):
                await connection.ask(connection.sftp.rmdir(self.path(found.place[:depth])))
        return None

    async def link_temporary(self, connection: Connection, found: Found, place: Place) -> Written:
        """A second name for an object's file, from which it can be published under another key."""
        source, target = self.path(found.place), self.path(place)
        try:
            await connection.ask(connection.sftp.link(source, target))
        except GONE:
            await self.make_area(connection)
            await connection.ask(connection.sftp.link(source, target))
        return Written(place, found.stat.size, (found.stat.modified_ns or 0) // 10**9, None)


def _verified(stat: Stat) -> Stat:
    return Stat(stat.key, stat.size, stat.version, stat.modified_ns, stat.checksum, verified=True)
