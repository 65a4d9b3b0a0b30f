"""What handlers wait for: bytes that are on their way, and the pushes that a close starts. On the trio thread.

A read that must wait is woken by the flight that brings its chunks. Every flight ends at its store's deadline, so every
wait here ends; waits other than reads have a deadline of their own, as only a buffered read dies with its process.
"""

import errno
import logging
import os
from collections.abc import Callable
from typing import Any, TypeVar

import trio

from vfs.core import Core
from vfs.errors import Refused, RunfsError, StoreTimeout
from vfs.filesystem import FileSystem, Handle, Needs
from vfs.hydrate import Hydrator
from vfs.push import Pusher
from vfs.units import Unit

log = logging.getLogger(__name__)
T = TypeVar("T")
_BUSY_S = 0.002  # between tries to open a file that is just being looked at by an eviction
_READ_DEADLINES = 4.0  # a read waits for this many deadlines: each replica may take one


class Transfers:
    """Waiting for bytes, for handlers. `pushing` pushes a unit now (on_close = "push")."""

    def __init__(self, core: Core, files: FileSystem, hydrator: Hydrator, pusher: Pusher) -> None:
        self._core = core
        self._files = files
        self._hydrator = hydrator
        self._pusher = pusher
        self._token = trio.lowlevel.current_trio_token()
        self._waiting: dict[int, tuple[Needs, Handle | None]] = {}
        self._answer = memoryview(bytearray(1 << 20))  # the most that the kernel asks for; new memory costs as much
        self._push_on_close = any(home.on_close == "push" for home in core.homes)

    def waiting(self) -> list[dict[str, Any]]:
        """Who waits for which file, for `status`."""
        return [_waiting(needs, handle) for needs, handle in list(self._waiting.values())]

    def opened(self, handle: Handle) -> None:
        """A file was opened: a walk over records goes on, if its record was brought for one."""
        if handle.node.unit.evicted:
            self._hydrator.ahead.opened(handle.node.unit)

    async def have(self, handle: Handle, offset: int, size: int) -> None:
        """Return when these bytes of an open file are here; start what a sequential reader will want next."""
        again = False
        while True:
            try:
                self._files.have(handle, offset, size, again=again)
            except Needs as needs:
                self._hydrator.ahead.touched(handle.node.unit)
                await self._bring(needs, self._core.settings.deadline_s * _READ_DEADLINES, handle)
                again = True
                continue
            break
        if (ahead := self._files.ahead(handle, offset, size)) and handle.partial is not None:
            self._start(handle.partial, ahead, handle.node.unit.uuid, b"")

    def _start(self, partial: Any, numbers: list[int], uuid: str, path: bytes) -> None:
        try:
            self._hydrator.request(partial, numbers, uuid, path)
        except RunfsError as error:
            log.debug("nothing is brought ahead: %s", error)

    async def retry(self, call: Callable[[], T], handle: Handle | None = None) -> T:
        """Do a call that may need bytes first, or meets an eviction that is just looking at the file."""
        deadline = trio.current_time() + self._core.settings.deadline_s
        while True:
            try:
                return call()
            except Needs as needs:
                await self._bring(needs, max(deadline - trio.current_time(), 0.0), handle)
            except BlockingIOError:
                if trio.current_time() > deadline:
                    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY)) from None
                await trio.sleep(_BUSY_S)

    async def _bring(self, needs: Needs, seconds: float, handle: Handle | None) -> None:
        """Have chunks brought and wait for those that are needed. Raises what the flight ended with, StoreTimeout."""
        landed = trio.Event()
        outcome: list[RunfsError | None] = []
        left = 0

        def land(error: RunfsError | None) -> None:
            self._token.run_sync_soon(arrive, error)

        def arrive(error: RunfsError | None) -> None:
            nonlocal left
            left -= 1
            outcome.append(error)
            if left <= 0 or error is not None:
                landed.set()

        try:
            if (before := needs.partial.failed_just_now(needs.numbers)) is not None:
                raise before
            for number in needs.numbers:
                left += needs.partial.when_here(number, land)
            self._hydrator.request(needs.partial, needs.numbers, needs.uuid, needs.path)
            if needs.ahead:
                self._start(needs.partial, needs.ahead, needs.uuid, needs.path)
            if left > 0:
                await self._wait(landed, needs, seconds, handle)
        finally:
            self._core.release(needs.partial)
        for error in outcome:
            if error is not None:
                raise error

    async def _wait(self, landed: trio.Event, needs: Needs, seconds: float, handle: Handle | None) -> None:
        self._waiting[id(landed)] = needs, handle
        try:
            with trio.move_on_after(seconds) as scope:
                await landed.wait()
        finally:
            del self._waiting[id(landed)]
        if scope.cancelled_caught:
            path = needs.path.decode("utf-8", "replace")
            error = StoreTimeout(f"{path} of {needs.uuid}: its bytes did not come within {seconds:.0f} s")
            needs.partial.note_failed(needs.numbers, error)
            raise error

    async def pread(self, handle: Handle, offset: int, size: int) -> bytes | bytearray | memoryview:
        """Read local bytes: at once when they are in the page cache, in a worker thread otherwise (that costs more).

        The bytes are good until the next call: who answers a request with them does so before another one is begun.
        """
        if size > len(self._answer):
            self._answer = memoryview(bytearray(size))
        buffer = self._answer[:size]
        try:
            count = os.preadv(handle.fd, [buffer], offset, os.RWF_NOWAIT)
        except (BlockingIOError, OSError) as error:
            if error.errno not in (errno.EAGAIN, errno.EOPNOTSUPP, errno.EINVAL):
                raise
            return await trio.to_thread.run_sync(os.pread, handle.fd, size, offset)
        if count == size:
            return buffer
        if offset + count >= os.fstat(handle.fd).st_size:
            return buffer[:count]
        return await trio.to_thread.run_sync(os.pread, handle.fd, size, offset)

    async def closed(self, handle: Handle) -> None:
        """A writer closed: with on_close = "push" the answer waits for the homes, at most for the deadline."""
        unit = handle.node.unit
        if not handle.writable or not self._push_on_close or not unit.dirty:
            return
        if unit.uuid in self._core.transactions:  # its pushes wait for the commit; the journal has it
            return
        with trio.move_on_after(self._core.settings.deadline_s) as scope:
            await trio.to_thread.run_sync(self._push_now, unit, abandon_on_cancel=True)
        if scope.cancelled_caught:
            raise StoreTimeout(f"{unit.uuid}: the homes did not take it within {self._core.settings.deadline_s:.0f} s")

    def _push_now(self, unit: Unit) -> None:
        wanted = [home for home in self._core.homes if home.on_close == "push"]
        outcome = self._pusher.push(unit, wanted)
        if outcome.failed:
            raise outcome.failed[0][1]
        if outcome.unsettled:
            raise Refused(f"{unit.uuid}: it is still being written to, so the homes do not have it; it is pushed later")


def _waiting(needs: Needs, handle: Handle | None) -> dict[str, Any]:
    return {
        "pid": handle.pid if handle else None,
        "process": _name_of(handle.pid) if handle else None,
        "uuid": needs.uuid,
        "path": needs.path.decode("utf-8", "replace"),
        "done": needs.partial.local_bytes,
        "size": needs.partial.size,
    }


def _name_of(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm") as file:
            return file.read().strip()
    except OSError:
        return "?"
