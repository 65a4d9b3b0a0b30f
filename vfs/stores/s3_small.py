"""Whole small objects from S3, many at a time on one thread: what a reader of many small files waits for.

Used by `remote.py` where the credentials are plain keys (`s3_signing.py`). A request costs a third of the processor
time that it costs through opendal, as nothing changes threads: plain HTTP/1.1, one request after the other on each of
up to `CONNECTIONS` kept connections, sockets that never block. Only the answer everybody hopes for is understood, 200
with exactly the bytes announced. Whatever else happens, the object is given as None: the caller asks for it again in
the way that knows retries, redirections and other replicas, and explains what is wrong.

Limits: a request that has no whole answer within `_patience` is given up. Connecting has the same limit, and nothing is
taken from the caller before a connection stands, so no object waits for a server that is not there. Nor for its name:
it is looked up beside, and until it is known there is nothing to use here.
"""

import os
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Generic, TypeVar
from urllib.parse import urlsplit

from vfs.stores.limits import Limits
from vfs.stores.remote_config import Target
from vfs.stores.s3_reads import Names
from vfs.stores.s3_signing import Signer, signer

T = TypeVar("T")
Wanted = tuple[T, str, int]  # the caller's own name for it, key, bytes

CONNECTIONS = 16
IDLE_S = 10.0  # servers close a quiet connection after 15 s or more
_PATIENCE_S = 3.0  # without an answer for this long, the other way is tried
_OFF_S = 60.0  # a server that could not be connected to is not tried this way for so long
_HEAD_MOST = 16384  # bytes of an answer before its body
_PIECE = 256 << 10  # bytes taken from a socket at a time
_PROXIES = ("http_proxy", "https_proxy", "all_proxy")
_IN, _OUT = select.EPOLLIN, select.EPOLLOUT


class SmallReads:
    """The small reads of one store. Any thread may call `each`, several at a time."""

    def __init__(self, target: Target, limits: Limits, signed: Signer) -> None:
        parts = urlsplit(signed.endpoint)
        secure = parts.scheme == "https"
        self._signer = signed
        self._prefix = f"{target.prefix}/" if target.prefix else ""
        self._host = parts.netloc
        self._name = parts.hostname or ""
        self._names = Names(self._name, parts.port or (443 if secure else 80))
        self._context = ssl.create_default_context() if secure else None
        self._limits = limits
        self._idle: list[tuple[float, socket.socket]] = []
        self._lock = threading.Lock()
        self._off_until = 0.0
        self._closed = False

    @property
    def usable(self) -> bool:
        """Whether the server's address is known, and it could be connected to when that was last tried, or it is time
        to try again."""
        return not self._closed and time.monotonic() >= self._off_until and self._names.address() is not None

    def each(self, wanted: Iterator[Wanted[T]]) -> Iterator[tuple[T, bytes | None]]:
        """Each object whole, in the order of arrival; None for one that did not come this way. `wanted` is asked for
        the next one when a connection is free for it; what it was not asked for, when this ends, was not tried."""
        return _Run(self, wanted).results()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for _since, each in idle:
            each.close()

    def request(self, key: str) -> bytes:
        """A signed request for a whole object."""
        url = self._signer.address(self._prefix + key, {}).removesuffix("?")
        headers = self._signer.headers("GET", url, {}, b"")
        lines = [f"GET {urlsplit(url).path} HTTP/1.1", f"Host: {self._host}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        return "\r\n".join([*lines, "", ""]).encode()

    def patience(self, size: int) -> float:
        """Seconds for one object."""
        first = min(_PATIENCE_S, self._limits.window_s, self._limits.deadline_s / 4)
        return first + min(size / self._limits.least_throughput, self._limits.deadline_s / 4)

    def take(self) -> socket.socket | None:
        """A connection that was kept."""
        with self._lock:
            while self._idle:
                since, found = self._idle.pop()
                if time.monotonic() - since < IDLE_S:
                    return found
                found.close()
        return None

    def keep(self, connection: socket.socket) -> None:
        with self._lock:
            if not self._closed and len(self._idle) < 2 * CONNECTIONS:
                self._idle.append((time.monotonic(), connection))
                return
        connection.close()

    def begin(self) -> socket.socket:
        """A new connection, which is not there yet. Raises OSError."""
        known = self._names.address()
        if known is None:
            raise OSError("the name of the host has to be looked up first")
        found = socket.getaddrinfo(*known, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
        family, kind, protocol, _name, address = found[0]
        made = socket.socket(family, kind, protocol)
        try:
            made.setblocking(False)
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with suppress(BlockingIOError):
                made.connect(address)
        except BaseException:
            made.close()
            raise
        return made

    def secured(self, connection: socket.socket) -> socket.socket:
        """A connection that stands, with TLS on top where the endpoint wants it; the handshake is still to come."""
        if self._context is None:
            return connection
        return self._context.wrap_socket(connection, server_hostname=self._name, do_handshake_on_connect=False)

    def unreachable(self) -> None:
        self._off_until = time.monotonic() + _OFF_S


class _Connection(Generic[T]):
    """One connection and the object that travels on it. `step`: what is done when the socket is ready."""

    __slots__ = ("body", "end", "events", "received", "reused", "socket", "stays", "step", "to_send", "wanted")

    def __init__(self, made: socket.socket, step: "Callable[[_Connection[T]], int]", end: float, reused: bool) -> None:
        self.socket = made
        self.step = step
        self.end = end
        self.reused = reused
        self.wanted: Wanted[T] | None = None
        self.to_send = b""
        self.received = bytearray()
        self.body = 0  # where the body begins, once that is known
        self.stays = True  # after this answer
        self.events = 0


class _Unusable(Exception):
    """The connection, or what came on it, is no use."""


class _Run(Generic[T]):
    """One call of `each`: its connections, by descriptor."""

    def __init__(self, reads: SmallReads, wanted: Iterator[Wanted[T]]) -> None:
        self._reads = reads
        self._wanted = wanted
        self._again: list[Wanted[T]] = []  # a kept connection turned out to be closed under them
        self._over = False
        self._stands = False  # whether a new connection ever did
        self._poll = select.epoll()
        self._connections: dict[int, _Connection[T]] = {}
        self._done: list[tuple[T, bytes | None]] = []

    def results(self) -> Iterator[tuple[T, bytes | None]]:
        try:
            self._open()
            while self._connections:
                for number, _events in self._poll.poll(self._wait()):
                    if (connection := self._connections.get(number)) is not None:
                        self._go_on(connection)
                self._give_up_late()
                yield from self._done
                self._done.clear()
            yield from self._done
            yield from ((wanted[0], None) for wanted in self._again)
        finally:
            for connection in list(self._connections.values()):
                self._drop(connection)
            self._poll.close()

    def _wait(self) -> float:
        return max(0.0, min(each.end for each in self._connections.values()) - time.monotonic())

    # --- connections -------------------------------------------------------------------------------------------

    def _open(self) -> None:
        """One connection more: a kept one, or a new one."""
        end = time.monotonic() + self._reads.patience(0)
        if (kept := self._reads.take()) is not None:
            connection = _Connection[T](kept, self._exchange, end, True)
            self._add(connection, _IN)
            try:
                self._feed(connection)
            except (OSError, ValueError):  # it was closed meanwhile
                self._failed(connection)
            return
        try:
            made = self._reads.begin()
        except OSError:
            self._no_connection()
            return
        self._add(_Connection[T](made, self._connect, end, False), _OUT)

    def _add(self, connection: _Connection[T], events: int) -> None:
        self._connections[connection.socket.fileno()] = connection
        connection.events = events
        self._poll.register(connection.socket, events)

    def _no_connection(self) -> None:
        if not self._stands:
            self._reads.unreachable()

    def _connect(self, connection: _Connection[T]) -> int:
        number = connection.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if number:
            raise OSError(number, os.strerror(number))
        connection.socket = self._reads.secured(connection.socket)
        connection.step = self._greet
        return self._greet(connection)

    def _greet(self, connection: _Connection[T]) -> int:
        if isinstance(connection.socket, ssl.SSLSocket):
            try:
                connection.socket.do_handshake()
            except ssl.SSLWantReadError:
                return _IN
            except ssl.SSLWantWriteError:
                return _OUT
        self._stands = True
        connection.step = self._exchange
        self._feed(connection)
        return _OUT if connection.to_send else _IN

    def _go_on(self, connection: _Connection[T]) -> None:
        number = connection.socket.fileno()
        try:
            events = connection.step(connection)
            if events != connection.events and number in self._connections:
                self._poll.modify(number, events)
                connection.events = events
        except (OSError, ValueError, _Unusable):
            self._failed(connection)

    def _failed(self, connection: _Connection[T]) -> None:
        self._drop(connection)
        if connection.wanted is None:
            self._no_connection()
        elif connection.reused and not connection.received:
            self._again.append(connection.wanted)
            self._open()
        else:
            self._done.append((connection.wanted[0], None))
            self._open()

    def _drop(self, connection: _Connection[T]) -> None:
        number = connection.socket.fileno()
        if self._connections.pop(number, None) is not None:
            self._poll.unregister(number)
        connection.socket.close()

    def _give_up_late(self) -> None:
        now = time.monotonic()
        for connection in [each for each in self._connections.values() if each.end < now]:
            connection.reused = False  # an answer that does not come is no closed connection
            self._failed(connection)

    # --- requests ----------------------------------------------------------------------------------------------

    def _next(self) -> Wanted[T] | None:
        if self._again:
            return self._again.pop()
        found = None if self._over else next(self._wanted, None)
        self._over = found is None
        return found

    def _feed(self, connection: _Connection[T]) -> None:
        """Send the next request on a connection that is free; without one it is kept for later."""
        connection.wanted = self._next()
        if connection.wanted is None:
            number = connection.socket.fileno()
            del self._connections[number]
            self._poll.unregister(number)
            self._reads.keep(connection.socket)
            return
        _name, key, size = connection.wanted
        connection.end = time.monotonic() + self._reads.patience(size)
        connection.received, connection.body = bytearray(), 0
        connection.to_send = self._reads.request(key)
        self._send(connection)
        if len(self._connections) < CONNECTIONS and not self._over:
            self._open()

    @staticmethod
    def _send(connection: _Connection[T]) -> None:
        with suppress(BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            connection.to_send = connection.to_send[connection.socket.send(connection.to_send) :]

    def _exchange(self, connection: _Connection[T]) -> int:
        if connection.to_send:
            self._send(connection)
            if connection.to_send:
                return _IN | _OUT
        while True:
            try:
                piece = connection.socket.recv(_PIECE)
            except (BlockingIOError, ssl.SSLWantReadError):
                return _IN
            except ssl.SSLWantWriteError:
                return _OUT
            if not piece:
                raise _Unusable
            connection.received += piece
            if self._is_whole(connection):
                self._taken(connection)
                return _OUT if connection.to_send else _IN
            if not isinstance(connection.socket, ssl.SSLSocket):
                return _IN

    @staticmethod
    def _is_whole(connection: _Connection[T]) -> bool:
        """Whether all of the answer has come. Raises _Unusable for another one than hoped for."""
        received = connection.received
        assert connection.wanted is not None
        size = connection.wanted[2]
        if not connection.body:
            connection.body = received.find(b"\r\n\r\n") + 4
            if connection.body < 4:
                connection.body = 0
                if len(received) > _HEAD_MOST:
                    raise _Unusable
                return False
            connection.stays = _check_head(bytes(received[: connection.body]), size)
        if len(received) > connection.body + size:
            raise _Unusable
        return len(received) == connection.body + size

    def _taken(self, connection: _Connection[T]) -> None:
        """An answer is whole: the next request, on this connection or another one."""
        assert connection.wanted is not None
        self._done.append((connection.wanted[0], bytes(memoryview(connection.received)[connection.body :])))
        connection.wanted, connection.reused = None, True
        if connection.stays:
            self._feed(connection)
        else:
            self._drop(connection)
            self._open()


def _check_head(head: bytes, size: int) -> bool:
    """Whether the connection stays open after this answer. Raises _Unusable unless it is 200 with `size` bytes."""
    lines = head.split(b"\r\n")
    if not lines[0].startswith(b"HTTP/1.1 200"):
        raise _Unusable
    fields = {}
    for line in lines[1:-2]:
        name, _colon, value = line.partition(b":")
        fields[name.strip().lower()] = value.strip()
    if fields.get(b"content-length") != b"%d" % size or b"transfer-encoding" in fields or b"content-encoding" in fields:
        raise _Unusable
    return fields.get(b"connection", b"").lower() != b"close"


def small_reads(target: Target, limits: Limits) -> SmallReads | None:
    """The small reads of a store, None where its requests need more than we can give."""
    if any(os.environ.get(name) or os.environ.get(name.upper()) for name in _PROXIES):
        return None
    signed = signer(target)
    return None if signed is None else SmallReads(target, limits, signed)
