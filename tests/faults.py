"""A TCP proxy on loopback that misbehaves on command, to stand between a client and a real server.

Used by the fault tests. `FaultProxy(port)` as a context manager; set `mode` at any time: it holds for what is
forwarded from then on, also on open connections. Threads, so that it works beside any event loop. Modes:

    pass      forward everything
    refuse    the port is closed: connections are refused, open ones are reset
    silent    accept and take everything, never answer
    dribble   answers come at `rate` bytes per second
    cut       an answer is cut, with a reset, after `cut_after` bytes (counted for each connection from when the mode
              is set)
    delay     each piece of an answer comes `delay_s` late
    busy      every request gets 503 Slow Down, and the connection is closed
    say       requests whose method is in `methods` and whose first line has `only` in it get `saying`, each with the
              chance `share`, and the connection is closed; the others pass
    wrong     a bit in each piece of an answer's body is another one
"""

import contextlib
import random
import re
import socket
import struct
import threading
import time
from collections.abc import Callable
from types import TracebackType

BUSY = (
    b"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nContent-Length: 59\r\nConnection: close\r\n\r\n"
    b"<Error><Code>SlowDown</Code><Message>busy</Message></Error>"
)
METHODS = (b"GET", b"HEAD", b"PUT", b"POST", b"DELETE")
PIECE = 65536


def http_answer(status: str, code: str, *headers: str) -> bytes:
    """What an S3 server says when it refuses: `status` such as "403 Forbidden", the error's code, more headers."""
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()
    lines = [f"HTTP/1.1 {status}", "Content-Type: application/xml", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*lines, "Connection: close", "", ""]).encode() + body


_PASSIVE = re.compile(rb"\(127,0,0,1,(\d+),(\d+)\)")


class FaultProxy:
    """Forwards 127.0.0.1:`port` to 127.0.0.1:`to_port`. `accepted` counts connections since the start, `taken` the
    bytes that clients sent, `given` those that the server answered."""

    def __init__(self, to_port: int) -> None:
        self.to_port = to_port
        self.mode = "pass"
        self.rate = 1.0
        self.cut_after = 1000
        self.delay_s = 0.2
        self.saying = BUSY
        self.methods: tuple[bytes, ...] = METHODS
        self.share = 1.0
        self.only = b""
        self.said = 0  # requests that were answered with `saying`
        self._chance = random.Random(1)
        self.accepted = 0
        self.taken = 0
        self.given = 0
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self._listener.getsockname()[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> "FaultProxy":
        self._start(self._accept)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._listener.close()
        self._reset_all()
        for thread in self._threads:
            thread.join(5)

    def set(self, mode: str) -> None:
        """Change the mode; `refuse` also resets what is open."""
        before, self.mode = self.mode, mode
        if mode == "refuse":
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)  # at once, although a thread waits on it
            self._listener.close()
            self._listener = socket.socket()  # bound and not listening: refuses, and nobody else gets the port
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._listener.bind(("127.0.0.1", self.port))
            self._reset_all()
        elif before == "refuse":
            self._listener.listen(128)
            self._start(self._accept)

    @property
    def moved(self) -> int:
        """Bytes that went through, both ways together."""
        return self.taken + self.given

    def open_connections(self) -> int:
        """Connections from clients and to the server that are open now."""
        with self._lock:
            return len(self._open)

    def _start(self, target: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        listener = self._listener
        listener.settimeout(0.1)
        while not self._stop.is_set():
            try:
                client, _ = listener.accept()
            except TimeoutError:
                continue
            except OSError:
                return
            self.accepted += 1
            client.settimeout(None)
            self._start(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        try:
            server = socket.create_connection(("127.0.0.1", self.to_port), timeout=5)
        except OSError:
            client.close()
            return
        server.settimeout(None)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, PIECE)  # what waits in here was not taken by the client
        with self._lock:
            self._open |= {client, server}
        self._start(self._forward, client, server, False)
        self._forward(server, client, True)

    def _forward(self, source: socket.socket, target: socket.socket, answering: bool) -> None:
        sent = 0
        with contextlib.suppress(OSError):
            while data := source.recv(PIECE):
                if self.mode == "busy":
                    self._say(target if answering else source, BUSY)
                    break
                if self.mode == "say" and not answering and self._is_meant(data):
                    self.said += 1
                    self._say(source, self.saying)
                    break
                if not answering:
                    self.taken += len(data)
                    if self.mode != "silent":
                        target.sendall(data)
                    continue
                self.given += len(data)
                sent = self._answer(target, data, sent)
        self._close(source)
        self._close(target)

    def _answer(self, target: socket.socket, data: bytes, sent: int) -> int:
        if self.mode == "cut":
            target.sendall(data[: max(0, self.cut_after - sent)])
            if sent + len(data) > self.cut_after:
                raise ConnectionResetError
            return sent + len(data)
        if self.mode == "delay":
            self._stop.wait(self.delay_s)
        if self.mode == "wrong":
            data = _other_bit(data)
        while data:
            if self.mode == "silent":
                return 0
            if self.mode != "dribble":
                target.sendall(data)
                return 0
            step = max(1, int(self.rate / 10))
            target.sendall(data[:step])
            sent_now = len(data[:step])
            data = data[step:]
            if self._stop.wait(sent_now / self.rate):
                return 0
        return 0

    def _is_meant(self, data: bytes) -> bool:
        """Whether this begins a request that `say` is for."""
        method = data[:8].partition(b" ")[0]
        meant = method in METHODS and method in self.methods and self.only in data.partition(b"\r\n")[0]
        return meant and self._chance.random() < self.share

    @staticmethod
    def _say(client: socket.socket, answer: bytes) -> None:
        client.sendall(answer)
        client.shutdown(socket.SHUT_WR)
        client.settimeout(1.0)
        end = time.monotonic() + 1.0
        while time.monotonic() < end and client.recv(PIECE):
            pass  # what is still being sent: closing with it unread would reset the answer away

    def _reset_all(self) -> None:
        with self._lock:
            connections = list(self._open)
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._close(connection)

    def _close(self, connection: socket.socket) -> None:
        with self._lock:
            self._open.discard(connection)
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
        connection.close()


def _other_bit(data: bytes) -> bytes:
    """The same with one bit of it turned, in the last byte and never in a header."""
    head = data.find(b"\r\n\r\n") + 4 if data.startswith(b"HTTP/") else 0
    return data if head >= len(data) else data[:-1] + bytes([data[-1] ^ 1])


class FtpFaultProxy(FaultProxy):
    """The same for FTP: the ports for data that the server names are replaced by proxies that misbehave alike."""

    def __init__(self, to_port: int) -> None:
        super().__init__(to_port)
        self._data: list[FaultProxy] = []

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, value, trace)
        for each in self._data:
            each.__exit__(None, None, None)

    @property
    def moved(self) -> int:
        return super().moved + sum(each.moved for each in self._data)

    def set(self, mode: str) -> None:
        super().set(mode)
        for each in self._data:
            each.rate, each.cut_after = self.rate, self.cut_after
            each.set(mode)

    def _answer(self, target: socket.socket, data: bytes, sent: int) -> int:
        return super()._answer(target, _PASSIVE.sub(self._replaced, data), sent)

    def _replaced(self, found: re.Match[bytes]) -> bytes:
        proxy = FaultProxy(int(found[1]) * 256 + int(found[2]))
        proxy.mode, proxy.rate, proxy.cut_after = self.mode, self.rate, self.cut_after
        self._data.append(proxy.__enter__())
        return b"(127,0,0,1,%d,%d)" % divmod(proxy.port, 256)
