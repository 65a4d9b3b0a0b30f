"""Connections to an FTP server, each call inside its time budget, with our errors.

Used by `ftp.py`. Blocks its caller, at most for the budget and a moment. What bounds a call: each wait on a socket ends
after the limits' window, and when the budget is used up an alarm shuts the connection, whatever it is doing (a server
that sends a byte a second would never meet a limit of a single wait).

Control connections are kept for the next call; one that the server has closed meanwhile is replaced once, unseen.
"""

import contextlib
import ftplib
import itertools
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from vfs.errors import Denied, NotFound, StoreError, StoreFull, StoreTimeout, Unreachable
from vfs.stores.limits import Budget, Limits

T = TypeVar("T")

ATTEMPTS = 4
FIRST_PAUSE_S = 0.1  # then three times as long each
KEPT = 8  # idle connections; servers often allow no more than ten from one address
IDLE_S = 60.0  # servers and firewalls forget a quiet connection after some minutes
PIECE = 1 << 20  # bytes taken from a connection at a time
WINDOW = 1 << 16  # bytes on the way at most when little is wanted
ERRORS = (ftplib.Error, OSError, EOFError, ValueError)
_FULL = re.compile(r"^(452|552)|quota|no space", re.I)
_DENIED = re.compile(r"^(53[0-2])|permission|denied|not allowed", re.I)


@dataclass(frozen=True, slots=True)
class Account:
    """Where to log in, as whom. `password` is never shown. `tls`: `no`, `explicit` (asked for on the ordinary port) or
    `implicit` (a port of its own)."""

    host: str
    port: int
    user: str
    password: str
    tls: str

    def __repr__(self) -> str:
        return f"Account({self.host}:{self.port})"


class Stalled(Exception):
    """Our own limit ended an attempt."""


class Session:
    """One control connection, logged in. For one thread at a time."""

    def __init__(self, account: Account, limits: Limits, budget: Budget) -> None:
        self.limits = limits
        self.used_at = time.monotonic()
        self.busy = False  # in the middle of a transfer: good for nothing else
        self._data: socket.socket | None = None
        self.ftp = _client(account.tls)
        try:
            with self.alarm(budget):
                self._log_in(account, max(0.01, min(limits.window_s, budget.left())))
        except BaseException:
            self.close()
            raise

    def _log_in(self, account: Account, limit_s: float) -> None:
        self.ftp.connect(account.host, account.port, limit_s)
        if isinstance(self.ftp, ftplib.FTP_TLS) and account.tls == "explicit":
            try:
                self.ftp.auth()
            except ftplib.error_perm:
                raise ftplib.error_perm("534 that it has no TLS (AUTH TLS): leave out tls, or use ftps://") from None
        self.ftp.login(account.user, account.password)
        if isinstance(self.ftp, ftplib.FTP_TLS):
            try:
                self.ftp.prot_p()
            except ftplib.error_perm:
                refusal = "534 that it does not encrypt data, only the login (PROT P): it is not used with TLS"
                raise ftplib.error_perm(refusal) from None
        self.ftp.voidcmd("TYPE I")
        if self.ftp.sock is not None:
            self.ftp.sock.settimeout(self.limits.window_s)
            self.ftp.timeout = self.limits.window_s

    @contextlib.contextmanager
    def alarm(self, budget: Budget) -> Iterator[None]:
        """Shut the connection when the budget is used up."""
        timer = threading.Timer(budget.left(), self.shut)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def shut(self) -> None:
        """Break off whatever is under way. Any thread may call it."""
        for each in (self._data, self.ftp.sock):
            if each is not None:
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.ftp.close()

    @contextlib.contextmanager
    def transfer(self, command: str, start: int | None = None, length: int | None = None) -> Iterator["Data"]:
        """The data connection of a command. Ends with the server's word that all went well, which is not asked for
        where a download was left early."""
        connection = self.ftp.transfercmd(command, start or None)
        if length is not None and length < PIECE:  # FTP has no end of a range: the server sends as much as the
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, WINDOW)  # window takes until we hang up
        self.busy = True
        self._data = connection
        data = Data(connection, self.limits)
        try:
            yield data
            if isinstance(connection, ssl.SSLSocket) and not data.left_early:
                with contextlib.suppress(OSError):  # whether all came is told by the answer and the size
                    connection = connection.unwrap()
        finally:
            self._data = None
            connection.close()
        try:
            self.ftp.voidresp()
        except (ftplib.error_temp, ftplib.error_perm):
            if not data.left_early:
                raise
        self.busy = False


class Data:
    """A data connection that has to bring the least throughput."""

    def __init__(self, connection: socket.socket, limits: Limits) -> None:
        self._connection = connection
        self._limits = limits
        self._least = limits.least_throughput * limits.window_s
        self._end = time.monotonic() + limits.window_s
        self._moved = 0
        self.left_early = False

    def receive(self, length: int | None) -> bytes:
        """`length` bytes, or all there are."""
        pieces: list[bytes] = []
        done = 0
        while length is None or done < length:
            piece = self._connection.recv(PIECE if length is None else min(PIECE, length - done))
            if not piece:
                return b"".join(pieces)
            pieces.append(piece)
            done += len(piece)
            self._count(len(piece))
        self.left_early = True
        return b"".join(pieces)

    def send(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            sent = self._connection.send(view[: 1 << 20])
            self._count(sent)
            view = view[sent:]

    def _count(self, moved: int) -> None:
        self._moved += moved
        now = time.monotonic()
        if self._moved >= self._least:
            self._end, self._moved = now + self._limits.window_s, 0
        elif now > self._end:
            raise Stalled(f"less than {self._least:.0f} bytes moved in {self._limits.window_s:g} s")

    def rest(self) -> None:
        """Start a new window: the pause was ours (the source of an upload took its time)."""
        self._end = time.monotonic() + self._limits.window_s


class Sessions:
    """The connections of one store. Any thread may use it."""

    def __init__(self, name: str, account: Account, limits: Limits) -> None:
        self._name = name
        self._account = account
        self._limits = limits
        self._idle: list[Session] = []
        self._lock = threading.Lock()
        self._closed = False

    def run(
        self, operation: str, key: str, work: Callable[[Session], T], budget: Budget, attempts: int = ATTEMPTS
    ) -> T:
        """The work's result on some connection; tried again after temporary faults. Raises StoreError."""
        pause = FIRST_PAUSE_S
        for number in itertools.count(1):
            try:
                return self._attempt(work, budget)
            except (*ERRORS, Stalled, StoreError) as error:
                failure = error if isinstance(error, StoreError) else self._explained(error, operation, key, budget)
                if not failure.temporary or number >= attempts or pause >= budget.left():
                    raise failure from None
            time.sleep(pause)
            pause *= 3
        raise AssertionError("unreachable")

    def close(self) -> None:
        """Close every connection that is idle; those in use are closed by whoever uses them."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for session in idle:
            session.close()

    def _attempt(self, work: Callable[[Session], T], budget: Budget) -> T:
        session = self._take() or Session(self._account, self._limits, budget)
        with session.alarm(budget):
            try:
                result = work(session)
            except (ftplib.error_perm, StoreError):  # an answer like any other
                self._give_back(session)
                raise
            except BaseException:
                session.close()
                raise
        self._give_back(session)
        return result

    def _take(self) -> Session | None:
        while True:
            with self._lock:
                if not self._idle:
                    return None
                session = self._idle.pop()
            if time.monotonic() - session.used_at < IDLE_S and self._is_alive(session):
                return session
            session.close()

    def _is_alive(self, session: Session) -> bool:
        """Whether the server has not said anything (it only would to say goodbye)."""
        connection = session.ftp.sock
        if connection is None or isinstance(connection, ssl.SSLSocket):
            return connection is not None
        try:
            connection.setblocking(False)
            connection.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            connection.settimeout(self._limits.window_s)
            return True
        except OSError:
            pass
        return False

    def _give_back(self, session: Session) -> None:
        session.used_at = time.monotonic()
        with self._lock:
            if not self._closed and not session.busy and len(self._idle) < KEPT:
                self._idle.append(session)
                return
        session.close()

    def _explained(self, error: Exception, operation: str, key: str, budget: Budget) -> StoreError:
        what = f"{self._name}: {operation} {key}".rstrip()
        place = f"{self._account.host}:{self._account.port}"
        if not budget.left() or isinstance(error, Stalled | TimeoutError):
            why = str(error) if isinstance(error, Stalled) else f"no end within {budget.total_s:g} s"
            late = StoreTimeout(f"{what}: {why}; {place} may be overloaded or cut off: runfs stores tries it")
            late.temporary = True
            return late
        if isinstance(error, ftplib.error_perm):
            return _refused(str(error), what, place)
        return _broken(error, what, place)


def _refused(text: str, what: str, place: str) -> StoreError:
    if _FULL.search(text):
        return StoreFull(f"{what}: {place} takes no more ({text[:100]}); make room there or use another store")
    if text.startswith("530"):
        return Denied(f"{what}: {place} refused the login; check the credentials (user, password)")
    if _DENIED.search(text):
        return Denied(f"{what}: refused ({text[:100]}); these credentials may not do that")
    if text.startswith("550"):
        return NotFound(f"{what}: there is no such object")
    made = StoreError(f"{what}: {place} says {text[:200]}")
    made.temporary = text.startswith("551")  # it failed in the middle of a file, which may be replaced just then
    return made


def _broken(error: Exception, what: str, place: str) -> StoreError:
    if isinstance(error, ssl.SSLCertVerificationError):
        made: StoreError = Denied(f"{what}: the certificate of {place} is not valid ({error.verify_message}); check it")
        return made
    if isinstance(error, ValueError):
        return StoreError(f"{what}: FTP has no way to say that name")
    if isinstance(error, ftplib.error_temp) and _FULL.search(str(error)):
        return _refused(str(error), what, place)
    if isinstance(error, ftplib.error_temp):
        made = Unreachable(f"{what}: {place} is not able to answer ({str(error)[:100]}); try again later")
        made.temporary = True
        return made
    cause = getattr(error, "strerror", None) or str(error)[:100] or "the connection ended"
    made = Unreachable(f"{what}: no connection to {place} ({cause}); is it running, and the network up?")
    made.temporary = True
    return made


class _ImplicitTls(ftplib.FTP_TLS):
    """TLS from the first byte on."""

    def connect(self, host: str = "", port: int = 0, timeout: float = 0.0, *_: object) -> str:
        self.host, self.port, self.timeout = host, port, timeout
        plain = socket.create_connection((host, port), timeout)
        try:
            self.sock = self.context.wrap_socket(plain, server_hostname=host)
        except BaseException:
            plain.close()
            raise
        self.af = plain.family
        self.file = self.sock.makefile("r", encoding=self.encoding)
        self.welcome = self.getresp()
        return self.welcome


def _client(tls: str) -> ftplib.FTP:
    if tls == "no":
        return ftplib.FTP(encoding="utf-8")
    kind = _ImplicitTls if tls == "implicit" else ftplib.FTP_TLS
    return kind(context=ssl.create_default_context(), encoding="utf-8")
