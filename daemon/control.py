"""The daemon's side of the control socket: one request and one answer a connection, progress in between.

Used by `daemon.mount`: `await nursery.start(control.serve, path, commands)`. Tasks here never block; the commands run
in worker threads. Only processes of the same user, or root, are answered: the socket is 0600 in a 0700 directory and
each peer's uid is asked of the kernel (SO_PEERCRED).

Tasks of one connection: the command's thread; one task that sends progress; one that waits for the asker to hang up.
What is sent is never cut in the middle of a line: after an interrupted send the connection is closed without answer.
A command whose asker has gone, or whose daemon stops, sees `progress.cancelled` and runs to its next safe point.
"""

import contextlib
import logging
import os
import socket
import struct
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import trio

from daemon.protocol import ALIVE_S, MAX_REQUEST, Commands, Progress, Request, decode_request, encode, error_message
from vfs.errors import MountpointError, Refused, RunfsError, UsageError
from vfs.private import private_directory

__all__ = ["Commands", "Progress", "serve"]

log = logging.getLogger(__name__)

REQUEST_S = 10.0  # a request arrives in this time or is dropped
SEND_S = 30.0  # an asker that takes nothing for this long has gone
LINGER_S = 1.0  # for an asker that sends on after its answer
LINGER_BYTES = 2 * MAX_REQUEST  # and for so much of it
MAX_CONNECTIONS = 64  # threads; enough for people, few enough to bound memory
MAX_WAITING = 256  # connections, those included whose request has not come yet; each has a descriptor and a task
KEPT_EVENTS = 64  # progress steps kept for a slow asker; older ones are left out


async def serve(
    path: Path,
    commands: Commands,
    *,
    alive_s: float = ALIVE_S,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until cancelled; the socket answers once `task_status` has started. Removes its socket at the end.

    A command that tells nothing for `alive_s` seconds is reported to be alive.

    On cancellation no new request is taken; those that run are told to stop and still get their answers.
    Raises MountpointError when another daemon answers at `path`.
    """
    private_directory(path.parent, "RUNFS_RUNTIME_DIR")
    with _listening(path) as listening:
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(listening))
        server = _Server(commands, alive_s)
        async with trio.open_nursery() as connections:
            task_status.started()
            try:
                await trio.serve_listeners(server.connection, [listener], handler_nursery=connections)
            finally:
                server.stop()


@contextlib.contextmanager
def _listening(path: Path) -> Iterator[socket.socket]:
    with short_path(path) as address, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        _make_way(path, address)
        listening.bind(address)
        path.chmod(0o600)
        listening.listen(MAX_CONNECTIONS)
        listening.setblocking(False)
        mine = path.stat().st_ino
        try:
            yield listening
        finally:
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_ino == mine:
                    path.unlink()


def _make_way(path: Path, address: str) -> None:
    """Remove what a killed daemon left; refuse when somebody answers there."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(2.0)
        try:
            probe.connect(address)
        except FileNotFoundError:
            return
        except (ConnectionRefusedError, ConnectionResetError):
            path.unlink(missing_ok=True)
            return
        except TimeoutError:
            pass  # somebody listens and is busy
    raise MountpointError(f"another runfs daemon answers at {path}; end it with runfs umount")


@contextlib.contextmanager
def short_path(path: Path) -> Iterator[str]:
    """A name for `path` that fits into a socket address (107 bytes), through the directory's descriptor if need be."""
    if len(os.fsencode(path)) < 108:
        yield str(path)
        return
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


class _Server:
    """The commands with the bound on how many run at a time."""

    def __init__(self, commands: Commands, alive_s: float) -> None:
        self._commands = commands
        self._alive_s = alive_s
        self._limiter = trio.CapacityLimiter(MAX_CONNECTIONS)
        self._running: set[_Steps] = set()
        self._connections = 0
        self._stopping = False

    def stop(self) -> None:
        """Tell every running command to end at its next safe point."""
        self._stopping = True
        for progress in self._running:
            progress.cancelled = True

    async def connection(self, stream: trio.SocketStream) -> None:
        sender = _Sender(stream)
        self._connections += 1
        try:
            async with stream:
                answer = await self._answer(stream, sender)
                # The work is done: its answer goes out even while the daemon stops, but never waits long.
                with trio.move_on_after(SEND_S, shield=True):
                    await sender.send(answer)
                    await _read_the_rest(stream)
        except trio.BrokenResourceError:
            log.debug("an asker hung up before its answer")
        finally:
            self._connections -= 1

    async def _answer(self, stream: trio.SocketStream, sender: "_Sender") -> dict[str, Any]:
        try:
            _check_peer(stream)
            if self._connections > MAX_WAITING:
                raise Refused(f"{MAX_WAITING} programs are asking at once; try again when some have been answered")
            request = await _read_request(stream)
            if len(self._running) >= MAX_CONNECTIONS:
                raise Refused(f"{MAX_CONNECTIONS} commands are running; try again when one has ended")
        except RunfsError as error:
            return error_message(error)
        return await self._run(request, stream, sender)

    async def _run(self, request: Request, stream: trio.SocketStream, sender: "_Sender") -> dict[str, Any]:
        progress = _Steps(trio.lowlevel.current_trio_token(), self._alive_s)
        progress.cancelled = self._stopping
        self._running.add(progress)
        try:
            async with trio.open_nursery() as nursery:
                nursery.cancel_scope.shield = True  # a thread cannot be cancelled: it is told to stop (see `stop`)
                nursery.start_soon(_watch_for_hangup, stream, progress)
                nursery.start_soon(_send_progress, sender, progress)
                answer = await trio.to_thread.run_sync(_call, self._commands, request, progress, limiter=self._limiter)
                progress.finish()
                await progress.sent.wait()
                nursery.cancel_scope.cancel()
        finally:
            self._running.discard(progress)
        return answer


def _call(commands: Commands, request: Request, progress: Progress) -> dict[str, Any]:
    """In a worker thread: the command's result or error, as it is sent."""
    try:
        answer = {"result": commands.run(request.command, request.args, progress)}
        encode(answer)  # a result that cannot be sent is an error of the command, found here
        return answer
    except RunfsError as error:
        return error_message(error)
    except Exception as error:
        log.exception("command %s failed", request.command)
        kind = type(error).__name__
        return {"error": {"type": kind, "message": f"{kind} in the daemon (a bug; its log has the details)", "exit": 1}}


def _check_peer(stream: trio.SocketStream) -> None:
    size = struct.calcsize("3i")
    _, uid, _ = struct.unpack("3i", stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    if uid not in (os.geteuid(), 0):
        raise Refused("this mount belongs to another user")


async def _read_request(stream: trio.SocketStream) -> Request:
    buffer = bytearray()
    with trio.move_on_after(REQUEST_S):
        while b"\n" not in buffer:
            if len(buffer) > MAX_REQUEST:
                raise UsageError(f"the request is longer than {MAX_REQUEST:,} bytes; ask for fewer records at a time")
            received = await stream.receive_some(65536)
            if not received:
                raise UsageError("the request ended without a newline")
            buffer += received
        return decode_request(bytes(buffer).split(b"\n", 1)[0])
    raise UsageError(f"the request did not arrive within {REQUEST_S:.0f} s")


async def _read_the_rest(stream: trio.SocketStream) -> None:
    """Closing over unread bytes would reset the connection and take the answer with it."""
    await stream.send_eof()
    left = LINGER_BYTES
    with trio.move_on_after(LINGER_S):
        while left > 0 and (data := await stream.receive_some(1 << 16)):
            left -= len(data)


class _Steps:
    """The progress of one command, from its thread to the sending task. Thread-safe; keeps the latest steps only."""

    def __init__(self, token: trio.lowlevel.TrioToken, alive_s: float) -> None:
        self._token = token
        self._alive_s = alive_s
        self._kept: deque[dict[str, Any]] = deque(maxlen=KEPT_EVENTS)
        self._news = trio.Event()
        self.cancelled = False
        self.finished = False
        self.sent = trio.Event()

    def __call__(self, event: dict[str, Any], /) -> None:
        self._kept.append(event)
        # The loop has ended only when the daemon is going down: then nobody is left to tell.
        with contextlib.suppress(trio.RunFinishedError):
            self._token.run_sync_soon(self._wake, idempotent=True)

    def _wake(self) -> None:
        self._news.set()

    def finish(self) -> None:
        self.finished = True
        self._news.set()

    async def wait(self) -> list[dict[str, Any]]:
        """The steps since the last call; an empty list when there were none for `alive_s` seconds or at the end."""
        with trio.move_on_after(self._alive_s):
            await self._news.wait()
        if not self.finished:
            self._news = trio.Event()
        kept: list[dict[str, Any]] = []
        while self._kept:
            kept.append(self._kept.popleft())
        return kept


class _Sender:
    """Sends whole lines or nothing more."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._whole = True

    async def send(self, message: dict[str, Any]) -> None:
        if not self._whole:
            raise trio.BrokenResourceError("the last line was cut")
        self._whole = False
        await self._stream.send_all(encode(message))
        self._whole = True


async def _send_progress(sender: _Sender, progress: _Steps) -> None:
    try:
        while not progress.finished:
            steps = await progress.wait()
            messages: list[dict[str, Any]] = [{"progress": step} for step in steps]
            if not messages and not progress.finished:
                messages = [{"alive": True}]
            for message in messages:
                with trio.fail_after(SEND_S):
                    await sender.send(message)
    except (trio.BrokenResourceError, trio.TooSlowError):
        progress.cancelled = True
    finally:
        progress.sent.set()


async def _watch_for_hangup(stream: trio.SocketStream, progress: _Steps) -> None:
    try:
        while await stream.receive_some(4096):
            pass  # more than one request is not answered, but it is no reason to hang up
        progress.cancelled = True
    except trio.BrokenResourceError:
        progress.cancelled = True
