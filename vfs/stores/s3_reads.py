"""Ranges of S3 objects, from the socket straight into the caller's memory: two thirds of the engine's processor time.

Used by `remote_reads.py` for the first try of a read, where requests need no more than a signature (`s3_signing.py`)
and travel in the open: under TLS bytes are copied anyway, and the engine decrypts without holding up Python. Blocks its
caller within the limits of the given `Watch`, and a moment.

Nothing but the plain answer is understood: 206, with exactly the range that was asked for. For everything else `fill`
gives False, and the engine asks again: it knows what errors, redirects, short objects and other servers mean.
"""

import contextlib
import ipaddress
import math
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from vfs.stores.limits import Limits, Stalled, Watch
from vfs.stores.protocol import Arrived
from vfs.stores.remote_config import Target
from vfs.stores.s3_signing import Signer, signer

TOLD = 1 << 20  # bytes after which a reader is told: what was just copied is still in the processor's cache
KEPT = 16  # idle connections
IDLE_S = 15.0  # many servers close a quiet connection after that time or a little more
_LOOK_S = 1.0  # a wait on the socket ends after this time, to look at the limits
_NAMES_S = 60.0  # how long an address is believed
_HEAD = 16 * 1024  # bytes of an answer's head at most
_MEANT = frozenset({403, 404, 408, 412, 416, 429})  # with 5xx: about this request, not about the way we ask

_READ = frozenset({b"content-length", b"content-range", b"transfer-encoding", b"content-encoding", b"connection"})


class _NotUnderstood(Exception):
    """An answer that a server will give again: we are not to ask it."""


@dataclass(slots=True, eq=False)
class _Connection:
    socket: socket.socket
    head: bytearray = field(default_factory=lambda: bytearray(_HEAD))
    since: float = 0.0
    used: bool = False

    def is_quiet(self) -> bool:
        """Whether the server has not closed it meanwhile (nothing else can have come)."""
        try:
            self.socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        except OSError:
            pass
        return False


class Names:
    """The address of a host. Looking up a name has no limit of time, so it is done in a thread of its own, and until it
    is known the engine reads."""

    def __init__(self, host: str, port: int) -> None:
        self._host = host
        self._port = port
        self._found: tuple[str, int] | None = None
        self._since = -math.inf
        self._lock = threading.Lock()
        self._looking = False
        with contextlib.suppress(ValueError):
            self._found, self._since = (str(ipaddress.ip_address(host)), port), math.inf

    def address(self) -> tuple[str, int] | None:
        """What is known, at once; it is looked up again when it is old."""
        if time.monotonic() - self._since > _NAMES_S:
            with self._lock:
                begin, self._looking = not self._looking, True
            if begin:
                threading.Thread(target=self._look, name="runfs-names", daemon=True).start()
        return self._found

    def _look(self) -> None:
        found = None
        with contextlib.suppress(OSError, UnicodeError):
            found = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)[0][4]
        with self._lock:
            self._found = (str(found[0]), self._port) if found else None
            self._since, self._looking = time.monotonic(), False


class Ranges:
    """The ranges of one store's objects. Any thread may use it."""

    def __init__(self, target: Target, limits: Limits, signed: Signer) -> None:
        parts = urlsplit(signed.endpoint)
        self._names = Names(parts.hostname or "", parts.port or 80)
        self._host = parts.netloc
        self._prefix = f"{target.prefix}/" if target.prefix else ""
        self._limits = limits
        self._signer = signed
        self._lock = threading.Lock()
        self._idle: list[_Connection] = []
        self._closed = False
        self._understood = True

    def close(self) -> None:
        """Close every connection that is idle."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.socket.close()

    def fill(self, key: str, start: int, view: memoryview, watch: Watch, arrived: Arrived | None) -> bool:
        """Fill `view` with the object's bytes from `start` on. False where the engine is to be asked: then what is in
        `view` means nothing. Raises Stalled."""
        if not self._understood or self._names.address() is None:
            return False
        request = self._request(key, start, len(view))
        try:
            while True:
                connection = self._take()
                again = connection is not None
                connection = connection or self._connect(watch)
                with contextlib.suppress(ConnectionError):
                    return self._exchange(connection, request, start, view, watch, arrived)
                if not again or connection.used:  # else it was closed just when we took it
                    return False
        except _NotUnderstood:
            self._understood = False
            return False
        except OSError:
            return False

    def _request(self, key: str, start: int, length: int) -> bytes:
        address = self._signer.address(self._prefix + key, {})
        extra = {"range": f"bytes={start}-{start + length - 1}"}
        headers = self._signer.headers("GET", address, {}, b"", extra)
        lines = [f"GET {urlsplit(address).path} HTTP/1.1", f"Host: {self._host}", "User-Agent: runfs"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        return "\r\n".join([*lines, "Accept-Encoding: identity", "", ""]).encode("ascii")

    def _exchange(
        self,
        connection: _Connection,
        request: bytes,
        start: int,
        view: memoryview,
        watch: Watch,
        arrived: Arrived | None,
    ) -> bool:
        """One request and its answer; the connection is kept if it can be. `used`: whether an answer has begun."""
        connection.used = False
        whole = False
        try:
            connection.socket.sendall(request)
            first, keep = self._answer(connection, start, len(view), watch)
            if first is None:
                return False
            view[: len(first)] = first
            _body(connection.socket, view, len(first), watch, arrived)
            whole = keep
            return True
        finally:
            if whole:
                self._give_back(connection)
            else:
                connection.socket.close()

    def _answer(self, connection: _Connection, start: int, length: int, watch: Watch) -> tuple[memoryview | None, bool]:
        """The head of an answer: what came of the body with it (None: the engine is to be asked), and whether the
        connection can be kept. Raises _NotUnderstood, OSError, Stalled."""
        head, got = memoryview(connection.head), 0
        while (end := connection.head.find(b"\r\n\r\n", 0, got)) < 0:
            if got == len(head):
                raise _NotUnderstood
            got += _receive(connection.socket, head[got:], watch, 0)
            connection.used = True
        status, headers = _parsed(bytes(head[:end]))
        if status in _MEANT or status >= 500:
            return None, False
        sent = headers.get(b"content-range", b"").split(b"/")[0]
        if status == 206 and headers.get(b"content-length") != b"%d" % length:
            return None, False  # it ends before
        plain = status == 206 and sent == b"bytes %d-%d" % (start, start + length - 1)
        if not plain or b"transfer-encoding" in headers or headers.get(b"content-encoding", b"identity") != b"identity":
            raise _NotUnderstood
        first = head[end + 4 : got]
        if len(first) > length:
            raise _NotUnderstood
        return first, headers.get(b"connection", b"").lower() != b"close"

    # Connections
    # ----------------------------------------------------------------------------------------------------------

    def _connect(self, watch: Watch) -> _Connection:
        look_s = min(_LOOK_S, self._limits.window_s / 2)
        address = self._names.address()
        if address is None:
            raise OSError("the name of the host has to be looked up first")
        try:
            made = socket.create_connection(address, max(min(self._limits.window_s, watch.left()), look_s))
        except TimeoutError:
            raise Stalled(f"no connection in {self._limits.window_s:g} s") from None
        # A limit inside the kernel: with one of Python's own each piece would need a poll before it.
        made.settimeout(None)
        limit = struct.pack("ll", int(look_s), int(look_s % 1 * 1e6))
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return _Connection(made)

    def _take(self) -> _Connection | None:
        while True:
            with self._lock:
                if not self._idle:
                    return None
                connection = self._idle.pop()
            if time.monotonic() - connection.since < IDLE_S and connection.is_quiet():
                return connection
            connection.socket.close()

    def _give_back(self, connection: _Connection) -> None:
        connection.since = time.monotonic()
        with self._lock:
            if not self._closed and len(self._idle) < KEPT:
                self._idle.append(connection)
                return
        connection.socket.close()


def ranges(target: Target, limits: Limits) -> Ranges | None:
    """The ranges of a store, or None where the engine is to read them."""
    signed = signer(target)
    if signed is None or urlsplit(signed.endpoint).scheme != "http":
        return None
    host = urlsplit(signed.endpoint).hostname
    if host is None or ("http" in getproxies() and not proxy_bypass(host)):
        return None
    return Ranges(target, limits, signed)


def _body(sock: socket.socket, view: memoryview, done: int, watch: Watch, arrived: Arrived | None) -> None:
    while done < len(view):
        count = _receive(sock, view[done : (done // TOLD + 1) * TOLD], watch, socket.MSG_WAITALL)
        done += count
        if arrived is not None and done % TOLD == 0:
            watch.told(arrived, done)


def _receive(sock: socket.socket, into: memoryview, watch: Watch, flags: int) -> int:
    """The next bytes, at least one. Raises ConnectionError at the end of the connection, Stalled."""
    while True:
        try:
            count = sock.recv_into(into, 0, flags)
        except BlockingIOError:  # nothing within the socket's limit
            watch.came(0)
            continue
        if not count:
            raise ConnectionResetError("the connection was closed")
        watch.came(count)
        return count


def _parsed(head: bytes) -> tuple[int, dict[bytes, bytes]]:
    """The status of an answer and its headers, names in lower case. Raises _NotUnderstood."""
    first, *lines = head.split(b"\r\n")
    words = first.split(b" ", 2)
    if len(words) < 2 or words[0] != b"HTTP/1.1" or not words[1].isdigit():
        raise _NotUnderstood
    headers: dict[bytes, bytes] = {}
    for line in lines:
        name, colon, value = line.partition(b":")
        name = name.lower()
        if not colon or (name in headers and name in _READ):  # one said twice could be read in two ways
            raise _NotUnderstood
        headers[name] = value.strip()
    return int(words[1]), headers
