"""The FUSE handlers: translate pyfuse3's calls to `vfs.filesystem` and back, nothing else.

Every handler has one shape and one error path (`handler`): an exception other than FUSEError would end the main loop.
All of them run on the trio thread; what waits for a disk goes to a worker thread, what waits for a store to
`Transfers`. Cancelled is never swallowed.
"""

import errno
import functools
import logging
import os
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import pyfuse3
import trio

from daemon.passthrough import PROBE, Passthrough
from daemon.transfers import Transfers
from daemon.upkeep import pyfuse3_later
from vfs.access import AT_ROOT
from vfs.errors import RunfsError
from vfs.filesystem import Attributes, Caller, Change, FileSystem, Handle, Listing
from vfs.tree import Inode

log = logging.getLogger(__name__)
_ASK_FIRST_S = 0.002  # the kernel lets go of a closed file a moment after it has told us
_ASK_MOST_S = 1.0
_DOTS = 2  # entries before all others
P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S", bound=pyfuse3.Operations)


def handler(
    method: Callable[Concatenate[S, P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate[S, P], Coroutine[Any, Any, R]]:
    """Map every error to an errno, in one place; what nobody expected is logged and answered with EIO."""

    @functools.wraps(method)
    async def wrapped(self: S, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return await method(self, *args, **kwargs)
        except pyfuse3.FUSEError:
            raise
        except RunfsError as error:
            log.info("%s: %s", method.__name__, error)
            raise pyfuse3.FUSEError(error.errno) from None
        except OSError as error:
            raise pyfuse3.FUSEError(error.errno or errno.EIO) from None
        except KeyError:
            raise pyfuse3.FUSEError(errno.ESTALE) from None  # an inode the kernel should have forgotten
        except Exception:
            log.exception("%s failed unexpectedly; please report this", method.__name__)
            raise pyfuse3.FUSEError(errno.EIO) from None

    return cast("Callable[Concatenate[S, P], Coroutine[Any, Any, R]]", wrapped)


class Operations(pyfuse3.Operations):
    """One mount's handlers. getxattr and its kin are left out: the kernel asks once and `ls -l` is ten times faster."""

    supports_dot_lookup = False
    enable_writeback_cache = False
    enable_acl = False

    def __init__(self, files: FileSystem, transfers: Transfers, passthrough: Passthrough) -> None:
        super().__init__()
        self._files = files
        self._transfers = transfers
        self._passthrough = passthrough
        self._handles: dict[int, Handle] = {}
        self._listings: dict[int, Listing] = {}
        self._next = 1
        self._row = pyfuse3.EntryAttributes()
        self._row.st_blksize = 1 << 20
        self._row.entry_timeout = self._row.attr_timeout = AT_ROOT

    def kept(self) -> dict[str, int]:
        """What is kept for the kernel: inodes, how often it looked them up, open files and directories."""
        inodes, lookups = self._files.tree.kept()
        return {"inodes": inodes, "lookups": lookups, "handles": len(self._handles), "listings": len(self._listings)}

    # --- names and attributes ----------------------------------------------------------------------------------

    @handler
    async def lookup(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        work = self._files.before_lookup(parent_inode, name)
        if work is not None:
            await trio.to_thread.run_sync(work)
        return entry(self._files.lookup(parent_inode, name))

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        for inode, count in inode_list:
            self._files.forget(inode, count)

    @handler
    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        return entry(self._files.getattr(inode))

    @handler
    async def setattr(
        self,
        inode: int,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        change = Change(
            mode=attr.st_mode if fields.update_mode else None,
            uid=attr.st_uid if fields.update_uid else None,
            gid=attr.st_gid if fields.update_gid else None,
            size=attr.st_size if fields.update_size else None,
            atime_ns=attr.st_atime_ns if fields.update_atime else None,
            mtime_ns=attr.st_mtime_ns if fields.update_mtime else None,
            by=ctx.uid,
        )
        handle = self._handles.get(fh) if fh is not None else None
        return entry(await self._transfers.retry(lambda: self._files.setattr(inode, change, handle)))

    @handler
    async def readlink(self, inode: int, ctx: pyfuse3.RequestContext) -> bytes:
        return self._files.readlink(inode)

    @handler
    async def mkdir(
        self, parent_inode: int, name: bytes, mode: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        return entry(self._files.mkdir(parent_inode, name, mode, caller(ctx)))

    @handler
    async def mknod(
        self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        return entry(self._files.mknod(parent_inode, name, mode, rdev, caller(ctx)))

    @handler
    async def symlink(
        self, parent_inode: int, name: bytes, target: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        return entry(self._files.symlink(parent_inode, name, target, caller(ctx)))

    @handler
    async def link(
        self, inode: int, new_parent_inode: int, new_name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        return entry(self._files.link(inode, new_parent_inode, new_name))

    @handler
    async def unlink(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        self._files.unlink(parent_inode, name)

    @handler
    async def rmdir(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        self._files.rmdir(parent_inode, name)

    @handler
    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: pyfuse3.RequestContext,
    ) -> None:
        self._files.rename(parent_inode_old, name_old, parent_inode_new, name_new, flags)

    @handler
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        found, answer = self._files.statfs(), pyfuse3.StatvfsData()
        for field in ("f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree", "f_favail"):
            setattr(answer, field, getattr(found, field))
        answer.f_namemax = 255
        return answer

    # --- directories -------------------------------------------------------------------------------------------

    @handler
    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        return self._add(self._listings, self._files.opendir(inode))

    @handler
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        listing, start = self._listings[fh], max(start_id - _DOTS, 0)
        self._files.rewind(listing, start_id)
        while (work := self._files.before_readdir(listing, start)) is not None:
            await trio.to_thread.run_sync(work)
        if start_id < _DOTS:
            for position, (name, attributes) in enumerate(self._files.dots(listing), 1):
                if position > start_id and not pyfuse3.readdir_reply(token, name, entry(attributes), position):
                    return
        if self._files.is_root(listing):
            self._readdir_root(listing, start, token)
            return
        for name, attributes, position in self._files.readdir(listing, start):
            if not pyfuse3.readdir_reply(token, name, entry(attributes), position + _DOTS):
                self._files.unseen(attributes.ino)
                return
            self._files.seen(attributes.ino)

    def _readdir_root(self, listing: Listing, start: int, token: pyfuse3.ReaddirToken) -> None:
        """Into one object, which pyfuse3 copies: a hundred thousand records are a tenth of a second."""
        out, reply = self._row, pyfuse3.readdir_reply
        for position, row in self._files.root_entries(listing, start):
            (
                name, out.st_ino, _link, out.st_mode, out.st_nlink, out.st_uid, out.st_gid, out.st_size, out.st_blocks,
                out.st_atime_ns, out.st_mtime_ns, out.st_ctime_ns,
            ) = row  # fmt: skip
            if not reply(token, name, out, position + _DOTS):
                return

    @handler
    async def releasedir(self, fh: int) -> None:
        self._files.closedir(self._listings.pop(fh))

    @handler
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        await trio.to_thread.run_sync(self._files.sync_directory_plan(self._listings[fh]))

    # --- files -------------------------------------------------------------------------------------------------

    def _add(self, table: dict[int, R], value: R) -> int:
        number = self._next
        self._next += 1
        table[number] = value
        return number

    @handler
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        if inode == PROBE:
            return self._passthrough.probe()
        handle = await self._transfers.retry(lambda: self._files.open(inode, flags, ctx.uid))
        handle.pid = ctx.pid
        self._transfers.opened(handle)
        content = self._files.content_to_keep(handle)
        kept = content is not None and self._passthrough.store(inode, content)
        return self._answer(handle, keep_cache=handle.keep_cache or kept)

    def _answer(self, handle: Handle, *, keep_cache: bool) -> pyfuse3.FileInfo:
        """What an open handler returns, as the last thing it does."""
        fh = self._add(self._handles, handle)
        try:
            return self._passthrough.answer(handle, fh, keep_cache=keep_cache)
        except OSError:
            self._files.release(self._handles.pop(fh))
            raise

    @handler
    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: pyfuse3.RequestContext
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        who = caller(ctx)
        handle, attributes = await self._transfers.retry(
            lambda: self._files.create(parent_inode, name, mode, flags, who)
        )
        handle.pid, told = ctx.pid, entry(attributes)
        return self._answer(handle, keep_cache=True), told

    @handler
    async def read(self, fh: int, off: int, size: int) -> bytes:
        handle = self._handles[fh]
        if handle.partial is not None:
            await self._transfers.have(handle, off, size)
        return cast("bytes", await self._transfers.pread(handle, off, size))  # any buffer will do

    @handler
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        handle = self._handles[fh]
        return await self._transfers.retry(lambda: self._files.write(handle, off, buf), handle)

    @handler
    async def flush(self, fh: int) -> None:
        handle = self._handles[fh]
        if self._files.catch_up(handle):  # a write through a map is told to nobody
            forget_attributes(handle.node.ino)
        await self._sync(handle)
        await self._transfers.closed(handle)

    @handler
    async def fsync(self, fh: int, datasync: bool) -> None:
        await self._sync(self._handles[fh], data_only=datasync, asked=True)

    async def _sync(self, handle: Handle, *, data_only: bool = False, asked: bool = False) -> None:
        plan = self._files.sync_plan(handle, data_only=data_only, asked=asked)
        if plan is not None:
            await trio.to_thread.run_sync(plan)

    @handler
    async def release(self, fh: int) -> None:
        handle = self._handles.pop(fh)
        self._passthrough.released(fh)
        if not self._files.release(handle):
            trio.lowlevel.spawn_system_task(self._release_later, handle)

    async def _release_later(self, handle: Handle) -> None:
        """Let go of a file when nobody has it mapped for writing any more, which nobody tells: ask now and then."""
        wait, over = _ASK_FIRST_S, False
        while not over:
            await trio.sleep(wait)
            wait = min(2 * wait, _ASK_MOST_S)
            try:
                if self._files.catch_up(handle):
                    pyfuse3_later(handle.node.ino)
                over = self._files.release(handle)
            except (OSError, RunfsError) as error:
                log.warning("what was written through a map may be noticed late: %s", error)
                over = True


class OperationsWithAttributes(Operations):
    """The same with extended attributes (`--xattr`)."""

    @handler
    async def getxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        return self._files.getxattr(inode, name)

    @handler
    async def listxattr(self, inode: int, ctx: pyfuse3.RequestContext) -> Sequence[bytes]:
        return self._files.listxattr(inode)

    @handler
    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: pyfuse3.RequestContext) -> None:
        self._files.setxattr(inode, name, value)

    @handler
    async def removexattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        self._files.removexattr(inode, name)


def forget_attributes(inode: Inode) -> None:
    """Have the kernel ask for an open file's attributes anew: that waits for nobody."""
    with suppress(OSError):  # the kernel does not know it any more
        pyfuse3.invalidate_inode(inode, attr_only=True)


def caller(ctx: pyfuse3.RequestContext) -> Caller:
    """Who asks."""
    return Caller(ctx.uid, ctx.gid, ctx.pid)


def entry(attributes: Attributes) -> pyfuse3.EntryAttributes:
    """Attributes in pyfuse3's form."""
    out = pyfuse3.EntryAttributes()
    out.st_ino = attributes.ino
    out.st_mode = attributes.mode
    out.st_nlink = attributes.nlink
    out.st_uid = attributes.uid
    out.st_gid = attributes.gid
    out.st_rdev = attributes.rdev
    out.st_size = attributes.size
    out.st_blksize = 1 << 20
    out.st_blocks = attributes.blocks
    out.st_atime_ns = attributes.atime_ns
    out.st_mtime_ns = attributes.mtime_ns
    out.st_ctime_ns = attributes.ctime_ns
    out.entry_timeout = attributes.entry_timeout
    out.attr_timeout = attributes.attr_timeout
    return out


def close_all(operations: Operations, files: FileSystem) -> None:
    """Release what is still open when the mount ends."""
    for handle in list(operations._handles.values()):
        try:
            files.release(handle)
        except OSError as error:
            log.warning("a handle could not be closed: %s", os.strerror(error.errno or errno.EIO))
    operations._handles.clear()
