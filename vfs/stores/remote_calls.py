"""Single calls to a remote engine, each inside its time budget: the only module that talks to opendal.

Used by `remote.py`. Every method blocks its caller, at most for the budget and `event_loop`'s margin. What
bounds a call:

- everything ends when the budget is used up; the call is cancelled, which closes its socket;
- a question (stat, delete, ...) that gets no answer in one window is asked again, on a new connection;
- a read is streamed, and is broken off when a window brings less than the least throughput;
- a request whose progress cannot be seen (a write, a part of an upload) is watched: each window that passes
  without its end, the store has to answer a small question, or the request counts as hanging.

Temporary faults are tried again up to `ATTEMPTS` times, with growing pauses, never beyond the budget.
"""

import asyncio
import contextlib
import itertools
import os
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from functools import partial
from typing import Any, TypedDict, TypeVar

import opendal
from opendal.file import AsyncFile
from opendal.layers import RetryLayer, TimeoutLayer
from opendal.types import Metadata

from vfs.errors import ConfigError, Conflict, NotFound, StoreError, Unreachable
from vfs.stores import checksums, remote_errors
from vfs.stores.event_loop import event_loop
from vfs.stores.limits import Budget, Limits, Stalled
from vfs.stores.remote_config import BUCKET_ENGINES, Target

T = TypeVar("T")

ATTEMPTS = 4
FIRST_PAUSE_S = 0.1  # then three times as long each: a refused connection is reported after 1.3 s
FLIGHTS = 4  # parts of an upload at a time: 8 were not faster and doubled the memory
TEMPORARY = ".runfs/tmp-"  # where engines that replace non-atomically get the bytes before they are renamed
READ_PIECE = 8 * 1024 * 1024  # at most; the engine gives what has arrived


class Condition(TypedDict, total=False):
    """A condition on a write, as opendal's arguments."""

    if_not_exists: bool
    if_match: str


class MaybeOurs(Conflict):
    """A condition did not hold, but an earlier try of the same write may have been the one that won."""


ATTEMPT_ERRORS: tuple[type[Exception], ...] = (Stalled, *remote_errors.OPENDAL_ERRORS)


class Calls:
    """The calls of one store. Any thread may use it."""

    def __init__(self, target: Target, limits: Limits) -> None:
        self._target = target
        self._limits = limits
        self.operator = _operator(target)
        window = limits.window_s
        self.listing = _retried(self.operator, window, window)
        self._parts = _retried(self.operator, window, limits.slowest(checksums.PART))
        self._bucket_seen = False
        self.can = self.operator.capability()
        self.conditional = target.conditions and self.can.write_with_if_not_exists and self.can.write_with_if_match
        self.by_rename = target.scheme == "webdav"  # overwriting there shows readers empty and cut files
        self.closed = False

    # Questions
    # --------------------------------------------------------------------------------------------------------

    def stat(self, key: str, budget: Budget) -> Metadata:
        """opendal's description of an object. Raises NotFound, and Unreachable where the bucket itself is not
        there."""

        async def ask() -> Metadata:
            try:
                found = await self.in_window(self.operator.stat(key))
            except opendal.exceptions.NotFound:
                await self._confirm_bucket()
                raise
            self._bucket_seen = True
            return found

        return self.run("stat", key, ask, budget)

    def delete(self, key: str, budget: Budget) -> None:
        """Remove one object. It is looked at before: servers that keep objects as files may remove something else, a
        directory with all that is in it (WebDAV) or an object with the name of the parent (`rclone serve s3`)."""

        async def remove() -> None:
            with contextlib.suppress(opendal.exceptions.NotFound):
                if not (await self.in_window(self.operator.stat(key))).mode.is_dir():
                    await self.in_window(self.operator.delete(key))

        self.run("delete", key, remove, budget)

    def size(self, key: str, budget: Budget) -> int:
        """The bytes of an object that answered oddly. Raises NotFound where it is a directory."""
        found = self.stat(key, budget)
        if found.mode.is_dir():
            raise NotFound(f"{self._target.name}: read {key}: there is no such object")
        return found.content_length

    def copy(self, source: str, target: str, size: int, budget: Budget) -> None:
        async def duplicate(into: str) -> None:
            await self.watched(lambda: self.operator.copy(source, into), size)

        attempt = partial(self._by_rename, target, duplicate) if self.by_rename else partial(duplicate, target)
        self.run("copy", source, attempt, budget)

    def rename(self, source: str, target: str, budget: Budget) -> None:
        self.run("move", source, lambda: self._rename(source, target), budget, attempts=1)

    async def _rename(self, source: str, target: str) -> None:
        if await self._is_directory(target):  # WebDAV would remove it, with all that is in it, to make room
            where = f"{self._target.name}: {target}"
            raise Conflict(f"{where}: there are objects below that name, and no object can be beside them; use another")
        await self.in_window(self.operator.rename(source, target))

    async def _is_directory(self, key: str) -> bool:
        try:
            return (await self.in_window(self.operator.stat(key))).mode.is_dir()
        except opendal.exceptions.NotFound:
            return False

    async def _confirm_bucket(self) -> None:
        """A missing bucket answers a stat like a missing object. An empty store is believed only when it can
        be listed."""
        if self._bucket_seen or self._target.scheme not in BUCKET_ENGINES:
            return
        with contextlib.suppress(opendal.exceptions.PermissionDenied):  # may read, may not list: as good as seen
            async for _ in await self.in_window(self.operator.list("", limit=1)):
                break
        self._bucket_seen = True

    # Bytes
    # ------------------------------------------------------------------------------------------------------------

    def read(self, key: str, start: int, length: int | None, budget: Budget) -> bytes:
        """The bytes asked for; fewer only where the object ends."""
        return self.run("read", key, lambda: self._read(key, start, length), budget)

    async def _read(self, key: str, start: int, length: int | None) -> bytes:
        try:
            return await self._stream(key, start, length)
        except OSError as error:
            if not is_beyond_the_end(error):
                raise
            found = await self.in_window(self.operator.stat(key))
            if found.mode.is_dir():
                raise NotFound(f"{self._target.name}: read {key}: there is no such object") from None
            size = found.content_length
            if start < size and (length is None or start + length <= size):
                raise  # the object is long enough: the answer was cut
        return await self._stream(key, start, size - start) if start < size else b""

    async def _stream(self, key: str, start: int, length: int | None) -> bytes:
        """Reads to the end of the range; ends itself when a window brings less than the least throughput."""
        least = self._limits.least_throughput * self._limits.window_s
        pieces: list[bytes] = []
        missing, in_window = length, 0
        clock = asyncio.get_running_loop().time
        try:
            async with asyncio.timeout(self._limits.window_s) as window:
                file = await self._opened(key, start, length)
                while missing is None or missing > 0:
                    piece = await file.read(READ_PIECE if missing is None else missing)
                    if not piece:
                        break
                    pieces.append(piece)
                    missing = None if missing is None else missing - len(piece)
                    in_window += len(piece)
                    if in_window >= least:
                        in_window = 0
                        window.reschedule(clock() + self._limits.window_s)
        except TimeoutError:
            raise Stalled(f"less than {least:.0f} bytes came in {self._limits.window_s:g} s") from None
        if missing:
            raise OSError("Unexpected (temporary) at read => reader got too little data")
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def _opened(self, key: str, start: int, length: int | None) -> AsyncFile:
        if length is None:
            return await self.operator.open(key, "rb", offset=start)
        return await self.operator.open(key, "rb", offset=start, size=length)

    def write(self, key: str, data: bytes, condition: Condition, budget: Budget) -> None:
        """Put one object in one request. Raises Conflict, MaybeOurs."""
        tries = itertools.count(1)
        last = 1

        async def fill(into: str) -> None:
            await self.watched(lambda: self.operator.write(into, data, **condition), len(data))

        async def put() -> None:
            nonlocal last
            last = next(tries)
            await (self._by_rename(key, fill) if self.by_rename else fill(key))

        try:
            self.run("write", key, put, budget)
        except Conflict as lost:
            if last > 1:
                raise MaybeOurs(str(lost)) from lost
            raise

    async def _by_rename(self, key: str, fill: Callable[[str], Awaitable[None]]) -> None:
        """Make an object under a temporary key, then give it its own."""
        temporary = _temporary_key()
        try:
            await fill(temporary)
            await self._rename(temporary, key)
        except BaseException:
            with contextlib.suppress(*ATTEMPT_ERRORS):  # the first error is the one to report
                await self.in_window(self.operator.delete(temporary))
            raise

    @contextlib.contextmanager
    def writer(self, key: str, part: int, condition: Condition, budget: Budget) -> "Iterator[PartWriter]":
        """A multipart upload. Without `commit` nothing becomes visible: opendal's file is dropped, never
        closed (its own context manager would publish what was sent so far)."""
        file = self.run("upload", key, lambda: self._open_parts(key, part, condition), budget)
        writer = PartWriter(self, key, file, budget)
        try:
            yield writer
        finally:
            del file
            writer.forget()

    async def _open_parts(self, key: str, part: int, condition: Condition) -> AsyncFile:
        return await self._parts.open(key, "wb", chunk=part, concurrent=FLIGHTS, **condition)

    # Limits
    # -----------------------------------------------------------------------------------------------------------

    def run(
        self,
        operation: str,
        key: str,
        attempt: Callable[[], Coroutine[Any, Any, T]],
        budget: Budget,
        attempts: int = ATTEMPTS,
    ) -> T:
        if self.closed:
            raise Unreachable(f"{self._target.name}: {operation} {key}: the store was closed")
        try:
            return event_loop().run(self._attempts(operation, key, attempt, budget, attempts), budget.left())
        except TimeoutError:
            why = f"no end within {budget.total_s:g} s"
            raise remote_errors.timed_out(self._target.name, self._target.place, operation, key, why) from None

    async def _attempts(
        self,
        operation: str,
        key: str,
        attempt: Callable[[], Coroutine[Any, Any, T]],
        budget: Budget,
        attempts: int,
    ) -> T:
        pause = FIRST_PAUSE_S
        for number in itertools.count(1):
            try:
                return await attempt()
            except ATTEMPT_ERRORS as error:
                failure = self.explained(error, operation, key)
                if not failure.temporary or number >= attempts or pause >= budget.left():
                    raise failure from None  # opendal's text has URLs and signatures in it
            await asyncio.sleep(pause)
            pause *= 3
        raise AssertionError("unreachable")

    def explained(self, error: Exception, operation: str, key: str) -> StoreError:
        target = self._target
        if isinstance(error, Stalled):
            return remote_errors.timed_out(target.name, target.place, operation, key, str(error))
        return remote_errors.explain(error, target.name, target.place, operation, key, target.secrets(), target.scheme)

    async def in_window(self, awaitable: Awaitable[T]) -> T:
        """The answer to a small question, within one window."""
        try:
            async with asyncio.timeout(self._limits.window_s):
                return await awaitable
        except TimeoutError:
            raise Stalled(f"no answer in {self._limits.window_s:g} s") from None

    async def watched(self, begin: Callable[[], Awaitable[T]], size: int) -> T:
        """The end of a request whose progress cannot be seen."""
        clock = asyncio.get_running_loop().time
        end = clock() + self._limits.slowest(size)

        async def request() -> T:
            return await begin()

        task = asyncio.ensure_future(request())
        try:
            while True:
                done, _ = await asyncio.wait({task}, timeout=min(self._limits.window_s, max(0.0, end - clock())))
                if done:
                    return task.result()
                if clock() >= end:
                    raise Stalled(f"{size} bytes were not taken in {self._limits.slowest(size):.0f} s")
                await self._ask_if_alive()
        finally:
            if not task.done():
                task.cancel()

    async def _ask_if_alive(self) -> None:
        """Any answer will do; none within a window means that whatever else is under way hangs."""
        try:
            await self.in_window(self.operator.stat(".runfs/alive"))
        except remote_errors.OPENDAL_ERRORS as error:
            if self.explained(error, "stat", "").temporary:
                raise


class PartWriter:
    """One multipart upload under way. For the thread that made it."""

    def __init__(self, calls: Calls, key: str, file: AsyncFile, budget: Budget) -> None:
        self._calls = calls
        self._key = key
        self._file: AsyncFile | None = file
        self._budget = budget

    def send(self, data: bytes) -> None:
        """Hand over the next part; waits while `FLIGHTS` are under way. Parts are tried again inside
        opendal."""
        file = self._open_file()
        self._wait(lambda: file.write(data), FLIGHTS * len(data))

    def commit(self) -> Conflict | None:
        """Make it visible. Returns the Conflict when a condition did not hold: it may be our own commit, sent
        twice."""
        file = self._open_file()
        try:
            self._wait(file.close, FLIGHTS * checksums.PART)
        except Conflict as lost:
            return lost
        return None

    def forget(self) -> None:
        """Let go of the file: what was not committed is never seen by anyone."""
        self._file = None

    def _wait(self, begin: Callable[[], Awaitable[object]], size: int) -> None:
        calls = self._calls
        calls.run("upload", self._key, lambda: calls.watched(begin, size), self._budget, attempts=1)

    def _open_file(self) -> AsyncFile:
        if self._file is None:
            raise StoreError(f"upload {self._key}: it was given up")
        return self._file


def _operator(target: Target) -> opendal.AsyncOperator:
    try:
        return opendal.AsyncOperator(target.scheme, **target.options)
    except remote_errors.OPENDAL_ERRORS as error:
        reason = remote_errors.explain(error, target.name, target.place, "open", "", target.secrets(), target.scheme)
        raise ConfigError(f"store {target.url}: {reason}") from None


def _retried(operator: opendal.AsyncOperator, question_s: float, transfer_s: float) -> opendal.AsyncOperator:
    """opendal's own retries, where we cannot retry a step ourselves: inside listings and multipart
    uploads."""
    return operator.layer(TimeoutLayer(question_s, transfer_s)).layer(
        RetryLayer(max_times=ATTEMPTS - 1, factor=3.0, max_delay=1.0, min_delay=FIRST_PAUSE_S)
    )


def is_beyond_the_end(error: OSError) -> bool:
    """Whether the range may begin or end after the object's end, or the key be a directory (WebDAV: 405): something
    that only a look at the object can tell."""
    text = str(error)
    told = "too little data" in text or "status: 416" in text or "status: 405" in text
    return told or remote_errors.kind(error) == "RangeNotSatisfied"


def _temporary_key() -> str:
    return TEMPORARY + os.urandom(8).hex()
