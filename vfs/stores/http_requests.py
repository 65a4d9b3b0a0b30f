"""Single HTTP requests inside a time budget, with our errors; answers are believed only as far as they agree.

Used by `http_store.py` and by the S3 uploads that go on where they were (`s3_parts.py`). The standard library's client.
Blocks its caller, at most for the budget and a moment: each wait on the socket ends after the limits' window, and when
the budget is used up an alarm shuts the connection, whatever it is doing.

Not used: proxies from the environment, cookies, compressed answers.
"""

import contextlib
import http.client
import itertools
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar
from urllib.parse import urljoin, urlsplit

from vfs.errors import Denied, NotFound, StoreError, StoreFull, StoreTimeout, Unreachable
from vfs.stores.limits import Budget, Limits

T = TypeVar("T")

ATTEMPTS = 4
FIRST_PAUSE_S = 0.1  # then three times as long each
REDIRECTS = 5
KEPT = 8  # idle connections
IDLE_S = 15.0  # many servers close a quiet connection after that time or a little more
PIECE = 1 << 20  # bytes taken from a connection at a time
_MOVED = (301, 302, 303, 307, 308)
_FAILURES = (OSError, http.client.HTTPException, ValueError)

Connection = http.client.HTTPConnection
Origin = tuple[str, str]  # scheme and host with port


class Stalled(Exception):
    """Our own limit ended an attempt."""


class Reply:
    """An answer whose body is still on its way. `url` is where it came from in the end."""

    def __init__(self, answer: http.client.HTTPResponse, url: str, limits: Limits) -> None:
        self._answer = answer
        self._limits = limits
        self.url = url
        self.status: int = answer.status

    def header(self, name: str) -> str | None:
        return self._answer.headers.get(name)

    def length(self) -> int | None:
        """The body's bytes as announced; None where that cannot be known beforehand."""
        text = self.header("Content-Length")
        return int(text) if text and text.isascii() and text.isdigit() else None

    @property
    def bounded(self) -> bool:
        """Whether the end of the body can be told from a connection that broke."""
        return self.length() is not None or self._answer.chunked

    def pieces(self, most: int) -> Iterator[bytes]:
        """The body, to its end or `most` bytes. Raises Stalled below the least throughput."""
        least = self._limits.least_throughput * self._limits.window_s
        end, moved = time.monotonic() + self._limits.window_s, 0
        while most > 0:
            piece = self._answer.read1(min(PIECE, most))
            if not piece:
                return
            most -= len(piece)
            moved += len(piece)
            now = time.monotonic()
            if moved >= least:
                end, moved = now + self._limits.window_s, 0
            elif now > end:
                raise Stalled(f"less than {least:.0f} bytes came in {self._limits.window_s:g} s")
            yield piece

    def body(self, most: int) -> bytes:
        """The body, to its end or `most` bytes."""
        return b"".join(self.pieces(most))


class Client:
    """Requests of one store. `headers` go with each, to the first host only. Any thread may use it."""

    def __init__(
        self, name: str, limits: Limits, headers: Mapping[str, str] | None = None, secrets: Sequence[str] = ()
    ) -> None:
        self._name = name
        self._limits = limits
        self._headers = dict(headers or {})
        self._secrets = secrets
        self._idle: dict[Origin, list[tuple[float, Connection]]] = {}
        self._lock = threading.Lock()
        self._closed = False

    def run(
        self,
        what: tuple[str, str],
        method: str,
        url: str,
        handle: Callable[[Reply], T],
        budget: Budget,
        *,
        headers: Callable[[], Mapping[str, str]] | None = None,
        body: bytes | None = None,
        wait: int = 0,
    ) -> T:
        """What `handle` makes of the answer; asked again after temporary faults. `what`: the operation and the key, for
        messages. `headers` is called for each try. The answer is waited for as long as moving `wait` bytes may take.
        Raises StoreError."""
        patience = self._limits.slowest(wait)
        pause = FIRST_PAUSE_S
        for number in itertools.count(1):
            try:
                given = {**self._headers, **(headers() if headers else {})}
                return self._followed(method, url, given, body, budget, handle, patience)
            except (*_FAILURES, Stalled, StoreError) as error:
                failure = error if isinstance(error, StoreError) else self._explained(error, what, url, budget)
                if not failure.temporary or number >= ATTEMPTS or pause >= budget.left():
                    raise failure from None
            time.sleep(pause)
            pause *= 3
        raise AssertionError("unreachable")

    def close(self) -> None:
        """Close every connection that is idle."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, {}
        for _, connection in itertools.chain.from_iterable(idle.values()):
            connection.close()

    def failure(self, what: tuple[str, str], reply: Reply, detail: str = "") -> StoreError:
        """The error for a status that is no answer."""
        text = f"{self._name}: {what[0]} {what[1]}".rstrip()
        place = urlsplit(reply.url).netloc
        said = f"{reply.status}{f', {detail}' if detail else ''}"
        if reply.status in (404, 410):
            return NotFound(f"{text}: there is no such object")
        if reply.status in (401, 403, 407):
            return Denied(f"{text}: refused ({said}); check the credentials and what they may do")
        if reply.status == 507:
            return StoreFull(f"{text}: {place} takes no more ({said}); make room there or use another store")
        if reply.status >= 500 or reply.status in (408, 429):
            return _temporary(Unreachable(f"{text}: {place} is not able to answer ({said}); try again later"))
        return StoreError(f"{text}: {place} answered {said}")

    def _followed(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        body: bytes | None,
        budget: Budget,
        handle: Callable[[Reply], T],
        patience: float,
    ) -> T:
        first = urlsplit(url)
        for _ in range(REDIRECTS + 1):
            here = urlsplit(url)
            own = {**headers} if (here.scheme, here.netloc) == (first.scheme, first.netloc) else _harmless(headers)
            with self._exchange(method, url, own, body, budget, patience) as reply:
                if reply.status not in _MOVED or body is not None:
                    return handle(reply)
                target = urljoin(url, reply.header("Location") or "")
            after = urlsplit(target)
            if after.scheme not in ("http", "https") or (here.scheme == "https" and after.scheme == "http"):
                raise StoreError(f"{self._name}: {here.netloc} leads to {after.scheme}://{after.netloc}: not followed")
            if after.path.endswith("/") and not first.path.endswith("/"):
                raise NotFound(f"{self._name}: {first.path}: there is no such object (it is a directory)")
            url = target
        raise StoreError(f"{self._name}: {first.netloc} leads from one address to the next without end")

    @contextlib.contextmanager
    def _exchange(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | None, budget: Budget, patience: float
    ) -> Iterator[Reply]:
        parts = urlsplit(url)
        origin = (parts.scheme, parts.netloc)
        connection = self._take(origin) or self._connection(origin)
        timer = threading.Timer(budget.left(), _shut, [connection])
        timer.daemon = True
        timer.start()
        answer = None
        try:
            target = parts.path + (f"?{parts.query}" if parts.query else "")
            answer = self._answer(connection, method, target, headers, body, patience)
            yield Reply(answer, url, self._limits)
        finally:
            timer.cancel()
            if answer is not None and answer.isclosed() and not answer.will_close:
                self._give_back(origin, connection)
            else:
                connection.close()
                if answer is not None:
                    answer.close()

    def _answer(
        self,
        connection: Connection,
        method: str,
        target: str,
        headers: Mapping[str, str],
        body: bytes | None,
        patience: float,
    ) -> http.client.HTTPResponse:
        sized = len(body or b"")
        if connection.sock is None:
            connection.connect()
        # The limit of sending is one for all of it, not one for each piece.
        connection.sock.settimeout(self._limits.slowest(sized) if sized else self._limits.window_s)
        given = {"Accept-Encoding": "identity", "User-Agent": "runfs", **headers}
        connection.request(method, target or "/", body=body, headers=given)
        connection.sock.settimeout(patience)
        return connection.getresponse()

    def _connection(self, origin: Origin) -> Connection:
        scheme, place = origin
        if scheme == "https":
            return http.client.HTTPSConnection(
                place, timeout=self._limits.window_s, context=ssl.create_default_context()
            )
        return Connection(place, timeout=self._limits.window_s)

    def _take(self, origin: Origin) -> Connection | None:
        while True:
            with self._lock:
                waiting = self._idle.get(origin)
                if not waiting:
                    return None
                since, connection = waiting.pop()
            if time.monotonic() - since < IDLE_S and _is_quiet(connection):
                return connection
            connection.close()

    def _give_back(self, origin: Origin, connection: Connection) -> None:
        with self._lock:
            waiting = self._idle.setdefault(origin, [])
            if not self._closed and connection.sock is not None and len(waiting) < KEPT:
                waiting.append((time.monotonic(), connection))
                return
        connection.close()

    def _explained(self, error: Exception, what: tuple[str, str], url: str, budget: Budget) -> StoreError:
        text = f"{self._name}: {what[0]} {what[1]}".rstrip()
        place = urlsplit(url).netloc
        if not budget.left() or isinstance(error, Stalled | TimeoutError):
            why = str(error) if isinstance(error, Stalled) else f"no answer within {budget.total_s:g} s"
            late = StoreTimeout(f"{text}: {why}; {place} may be overloaded or cut off: runfs stores tries it")
            return _temporary(late)
        if isinstance(error, ssl.SSLCertVerificationError):
            return Denied(f"{text}: the certificate of {place} is not valid ({error.verify_message}); check it")
        cause = getattr(error, "strerror", None) or str(error)[:100] or type(error).__name__
        for secret in self._secrets:
            cause = str(cause).replace(secret, "***")
        return _temporary(
            Unreachable(f"{text}: no connection to {place} ({cause}); is it running, and the network up?")
        )


def short(name: str, what: tuple[str, str]) -> StoreError:
    """The error for a body that ended before its announced end."""
    return _temporary(StoreError(f"{name}: {what[0]} {what[1]}: the server sent fewer bytes than it promised"))


def _temporary(error: StoreError) -> StoreError:
    error.temporary = True
    return error


def _harmless(headers: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name.lower() != "authorization"}


def _shut(connection: Connection) -> None:
    if connection.sock is not None:
        with contextlib.suppress(OSError):
            connection.sock.shutdown(socket.SHUT_RDWR)


def _is_quiet(connection: Connection) -> bool:
    """Whether the server has not closed a connection that was kept (nothing else can have come)."""
    if connection.sock is None:
        return False
    if isinstance(connection.sock, ssl.SSLSocket):
        return True
    try:
        connection.sock.setblocking(False)
        connection.sock.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False
