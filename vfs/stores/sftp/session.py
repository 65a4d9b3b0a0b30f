"""Single calls to an SFTP server, each inside its time budget: connecting, lanes, watching, trying again.

Used by `store.py`; `files.py` has the steps that run in here. `Calls.run` blocks its caller, at most for the
budget and `event_loop`'s margin; the rest is coroutines on the one asyncio thread. What bounds a call:

- everything ends when the budget is used up;
- a connection on which a call waits, and which for one window neither answers a question nor moves the least
  throughput, is given up: all calls on it are tried again on a new one;
- while the server syncs or copies a file it may be quiet on that lane, but has to answer a question on another.

Lanes: one SSH connection carries several SFTP sessions, because a session answers in order: behind a long fsync it
answers nothing. The first lane is for questions and reads, the others (opened when needed) for uploads and copies.

Dropped connections are tried again up to `ATTEMPTS` times, with growing pauses, never beyond the budget.
"""

import asyncio
import contextlib
import itertools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import asyncssh

from vfs.errors import StoreTimeout, Unreachable
from vfs.stores.event_loop import event_loop
from vfs.stores.limits import Budget, Limits
from vfs.stores.sftp import errors as sftp_errors
from vfs.stores.sftp.config import Target, connect_options

T = TypeVar("T")

ATTEMPTS = 4
FIRST_PAUSE_S = 0.1  # then three times as long each: a refused connection is reported after 1.3 s
LANES = 4  # besides the first; sshd allows ten sessions on a connection
CONNECT_WINDOWS = 2  # a new connection has some ten answers to wait for
DEAD_S = 1.0  # a call that got no answer at all for so long before its end leaves no connection behind

logging.getLogger("asyncssh").setLevel(logging.WARNING)  # it tells every file it opens


class Stalled(Exception):
    """Our own limit ended an attempt."""


ATTEMPT_ERRORS: tuple[type[Exception], ...] = (Stalled, OSError, asyncssh.Error)


@dataclass(slots=True)
class Abilities:
    """What the server offers, as found when connecting: `replace` (posix-rename), `link` (hardlink), `copy`
    (copy-data); `sync` (fsync) until it refuses one."""

    replace: bool
    link: bool
    copy: bool
    sync: bool = True


@dataclass(slots=True)
class Lane:
    """One SFTP session; `users` count who works on it."""

    sftp: asyncssh.SFTPClient
    users: int = 0


class Connection:
    """One SSH connection with its lanes. For the loop's thread. `moved` grows with each byte and each answer."""

    def __init__(self, ssh: asyncssh.SSHClientConnection, first: asyncssh.SFTPClient, limits: Limits) -> None:
        self.loop = asyncio.get_running_loop()
        self.limits = limits
        self.abilities = Abilities(False, False, False)
        self.moved = 0.0
        self.stalled: str | None = None
        self._ssh = ssh
        self._lanes = [Lane(first)]
        self._opening = asyncio.Lock()
        self._quiet: set[object] = set()  # tasks whose lane may rightly be silent
        self._least = limits.least_throughput * limits.window_s

    @property
    def sftp(self) -> asyncssh.SFTPClient:
        """The lane for questions and reads."""
        return self._lanes[0].sftp

    @property
    def usable(self) -> bool:
        """Whether another call may use it."""
        return self.stalled is None and self.loop is asyncio.get_running_loop() and not self._ssh.is_closed()

    async def ask(self, question: Awaitable[T]) -> T:
        """The answer to a question; that it came, even a refusal, is a sign of life."""
        try:
            answer = await question
        except asyncssh.SFTPConnectionLost:
            raise
        except asyncssh.SFTPError:
            self.moved += self._least
            raise
        self.moved += self._least
        return answer

    @contextlib.asynccontextmanager
    async def lane(self) -> AsyncIterator[asyncssh.SFTPClient]:
        """The lane for an upload or a copy that has the fewest users; a new one when all are in use."""
        lane = min(self._lanes[1:], key=lambda each: each.users, default=None)
        if (lane is None or lane.users) and len(self._lanes) <= LANES:
            async with self._opening:
                lane = await self._open_lane() or lane
        lane = lane or self._lanes[0]
        lane.users += 1
        try:
            yield lane.sftp
        finally:
            lane.users -= 1

    async def _open_lane(self) -> Lane | None:
        idle = next((each for each in self._lanes[1:] if not each.users), None)
        if idle is not None or len(self._lanes) > LANES:
            return idle
        try:
            lane = Lane(await self._ssh.start_sftp_client())
        except asyncssh.ChannelOpenError:  # the server's MaxSessions: make do with what there is
            return None
        self.moved += self._least
        self._lanes.append(lane)
        return lane

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Around a step during which the server's lane may be silent."""
        mark = object()
        self._quiet.add(mark)
        try:
            yield
        finally:
            self._quiet.discard(mark)
            self.moved += self._least

    async def watched(self, work: Coroutine[Any, Any, T]) -> T:
        """The work's result. Raises Stalled, and gives the connection up, when a window brings too little."""
        task = asyncio.ensure_future(work)
        began, at_begin = self.loop.time(), self.moved
        try:
            while True:
                before = self.moved
                done, _ = await asyncio.wait({task}, timeout=self.limits.window_s)
                if done:
                    return task.result()
                if self.moved - before < self._least and not (self._quiet and await self._answers()):
                    self.give_up(f"less than {self._least:.0f} bytes came in {self.limits.window_s:g} s")
                    raise Stalled(self.stalled)
        except asyncio.CancelledError:
            if self.moved == at_begin and self.loop.time() - began >= min(DEAD_S, self.limits.window_s):
                self.give_up(f"no answer in {self.loop.time() - began:.1f} s")
            raise
        finally:
            if not task.done():
                task.cancel()
            elif not task.cancelled():
                task.exception()  # seen, also where our own limit was first

    async def _answers(self) -> bool:
        """Whether the first lane answers. Where it is the only one it may be what is quiet: believed."""
        if len(self._lanes) == 1:
            return True
        try:
            async with asyncio.timeout(self.limits.window_s):
                await self.sftp.lstat(b".")
        except (TimeoutError, asyncssh.SFTPConnectionLost):
            return False
        except asyncssh.SFTPError:
            return True
        return True

    def give_up(self, why: str) -> None:
        """Close it at once; whoever still waits on it gets an error."""
        self.stalled = self.stalled or why
        self._ssh.abort()


class Calls:
    """The calls of one store. Any thread may use it. `prepare` runs on each new connection before any call."""

    def __init__(self, target: Target, limits: Limits, prepare: Callable[[Connection], Awaitable[None]]) -> None:
        self._target = target
        self._limits = limits
        self._prepare = prepare
        self._connection: Connection | None = None
        self._connecting: asyncio.Task[Connection] | None = None
        self._waiting = 0  # calls that wait for it
        self.closed = False

    @property
    def abilities(self) -> Abilities | None:
        """What the server offers; None before the first connection."""
        return None if self._connection is None else self._connection.abilities

    def run(
        self,
        operation: str,
        key: str,
        attempt: Callable[[Connection], Coroutine[Any, Any, T]],
        budget: Budget,
        attempts: int = ATTEMPTS,
    ) -> T:
        """What `attempt` gives. Raises its StoreErrors, and those of the connection in our words."""
        if self.closed:
            raise Unreachable(f"{self._target.name}: {operation} {key}: the store was closed")
        try:
            return event_loop().run(self._attempts(operation, key, attempt, budget, attempts), budget.left())
        except TimeoutError:
            why = f"no end within {budget.total_s:g} s"
            raise sftp_errors.timed_out(self._target, operation, key, why) from None

    def run_later(self, attempt: Callable[[Connection], Coroutine[Any, Any, None]]) -> None:
        """Run it on the connection there is, if it still works; nobody waits, failures are nobody's business."""
        connection = self._connection
        if connection is None:
            return

        async def quietly() -> None:
            if connection.usable:
                with contextlib.suppress(*ATTEMPT_ERRORS, TimeoutError):
                    async with asyncio.timeout(self._limits.window_s):
                        await attempt(connection)

        with contextlib.suppress(RuntimeError):  # that loop has ended already
            asyncio.run_coroutine_threadsafe(quietly(), connection.loop)

    def close(self) -> None:
        """Close the connection; calls that are under way end with an error."""
        self.closed = True
        connection = self._connection
        if connection is not None:
            with contextlib.suppress(RuntimeError):  # that loop has ended already
                connection.loop.call_soon_threadsafe(connection.give_up, "the store was closed")

    async def _attempts(
        self,
        operation: str,
        key: str,
        attempt: Callable[[Connection], Coroutine[Any, Any, T]],
        budget: Budget,
        attempts: int,
    ) -> T:
        pause = FIRST_PAUSE_S
        for number in itertools.count(1):
            connection: Connection | None = None
            try:
                connection = await self._connected()
                return await connection.watched(attempt(connection))
            except ATTEMPT_ERRORS as error:
                failure = self._explained(error, connection, operation, key)
                again = isinstance(failure, Unreachable | StoreTimeout) and number < attempts
                if not again or pause >= budget.left() or self.closed:
                    raise failure from error
            await asyncio.sleep(pause)
            pause *= 3
        raise AssertionError("unreachable")

    def _explained(self, error: Exception, connection: Connection | None, operation: str, key: str) -> Exception:
        if isinstance(error, Stalled):
            return sftp_errors.timed_out(self._target, operation, key, str(error))
        lost = isinstance(error, asyncssh.SFTPConnectionLost | asyncssh.DisconnectError | OSError)
        if lost and connection is not None and connection.stalled is not None:
            return sftp_errors.timed_out(self._target, operation, key, connection.stalled)
        return sftp_errors.explain(error, self._target, operation, key)

    async def _connected(self) -> Connection:
        current = self._connection
        if current is not None and current.usable:
            return current
        loop = asyncio.get_running_loop()
        if self._connecting is None or self._connecting.done() or self._connecting.get_loop() is not loop:
            self._connecting = asyncio.ensure_future(self._connect())
            self._connecting.add_done_callback(_look_at)
        connecting = self._connecting
        self._waiting += 1
        try:
            return await asyncio.shield(connecting)  # others may wait for it too
        finally:
            self._waiting -= 1
            if not self._waiting:
                connecting.cancel()  # nothing, when it has ended: else the next call shall not wait for a dead one

    async def _connect(self) -> Connection:
        limit = CONNECT_WINDOWS * self._limits.window_s
        ssh: asyncssh.SSHClientConnection | None = None
        try:
            async with asyncio.timeout(limit):
                options = await asyncio.to_thread(connect_options, self._target)
                ssh = await asyncssh.connect(self._target.host, **options)
                connection = Connection(ssh, await ssh.start_sftp_client(), self._limits)
                await self._prepare(connection)
        except BaseException as error:
            if ssh is not None:
                ssh.abort()
            if isinstance(error, TimeoutError):
                raise Stalled(f"no connection in {limit:g} s") from None
            if sftp_errors.is_key_error(error):
                raise sftp_errors.bad_key(error, self._target) from None
            raise
        if self.closed:
            connection.give_up("the store was closed")
        self._connection = connection
        return connection


def _look_at(task: "asyncio.Task[Connection]") -> None:
    if not task.cancelled():
        task.exception()  # everybody who waited may have given up: no complaint about that at the end
