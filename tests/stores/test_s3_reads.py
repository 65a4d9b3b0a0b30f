"""Ranges of S3 objects straight from the socket: the plain answer, and everything that is left to the engine."""

import random
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from tests.faults import FaultProxy
from tests.servers import Seaweed
from tests.stores.conftest import MakeStore
from vfs.stores.limits import Limits, Stalled, Watch
from vfs.stores.remote_config import target
from vfs.stores.s3_parts import Signer
from vfs.stores.s3_reads import TOLD, Ranges, ranges
from vfs.stores.s3_small import small_reads

DATA = random.Random(7).randbytes(3 * TOLD + 777)
LIMITS = Limits(deadline_s=5, window_s=1)

Answer = Callable[[int, int], bytes]


def plain(start: int, end: int, *more: str) -> bytes:
    """The answer that is understood."""
    head = [
        "HTTP/1.1 206 Partial Content",
        f"Content-Length: {end - start}",
        f"content-range: bytes {start}-{end - 1}/{len(DATA)}",
        *more,
    ]
    return "\r\n".join([*head, "", ""]).encode() + DATA[start:end]


def with_head(*lines: str) -> Answer:
    return lambda start, end: "\r\n".join([*lines, "", ""]).encode() + DATA[start:end]


class Server:
    """Gives scripted answers, the next one to each request; then it closes. `connections` and `requests` count."""

    def __init__(self, answers: Sequence[Answer]) -> None:
        self.answers = list(answers)
        self.connections = 0
        self.requests: list[bytes] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                self.connections += 1
                with connection, suppress(OSError):
                    self._talk(connection)

    def _talk(self, connection: socket.socket) -> None:
        while self.answers:
            request = b""
            while b"\r\n\r\n" not in request:
                piece = connection.recv(65536)
                if not piece:
                    return
                request += piece
            self.requests.append(request)
            given = next(line for line in request.split(b"\r\n") if line.lower().startswith(b"range: "))
            start, last = given[len(b"range: bytes=") :].split(b"-")
            answer = self.answers.pop(0)(int(start), int(last) + 1)
            connection.sendall(answer)
            if b"closing" in answer[:300]:
                return

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.thread.join(5)


@contextmanager
def served(*answers: Answer) -> Iterator[tuple[Server, Ranges]]:
    server = Server(answers)
    made = ranges(configured(f"http://127.0.0.1:{server.port}"), LIMITS)
    assert made is not None
    try:
        yield server, made
    finally:
        made.close()
        server.close()


def configured(endpoint: str, **more: str) -> object:
    keys = {"access_key_id": "AK", "secret_access_key": "a secret"}
    return target({"url": f"s3://bucket/pre?endpoint={endpoint}", "name": "lab", **keys, **more})


def fill(made: Ranges, start: int = 0, length: int = 1000) -> bytes | None:
    """The bytes, or None where the engine is to be asked."""
    buffer = bytearray(length)
    if made.fill("a key", start, memoryview(buffer), Watch(LIMITS, LIMITS.budget(None)), None):
        return bytes(buffer)
    return None


def test_plain_answers_come_over_one_connection() -> None:
    with served(*[plain] * 3) as (server, made):
        assert fill(made, 5, 1000) == DATA[5:1005]
        assert fill(made, 0, len(DATA)) == DATA
        assert fill(made, len(DATA) - 1, 1) == DATA[-1:]
        assert server.connections == 1
        assert server.requests[0].startswith(b"GET /bucket/pre/a%20key HTTP/1.1\r\n")
        assert b"a secret" not in b"".join(server.requests)


def test_what_is_there_is_told_at_each_mebibyte() -> None:
    told: list[tuple[int, bool]] = []
    buffer = bytearray(len(DATA))
    with served(plain) as (_, made):
        watch = Watch(LIMITS, LIMITS.budget(None))
        assert made.fill(
            "k", 0, memoryview(buffer), watch, lambda count: told.append((count, buffer[:count] == DATA[:count]))
        )
    assert told == [(TOLD, True), (2 * TOLD, True), (3 * TOLD, True)]


def test_a_connection_that_was_closed_meanwhile_is_replaced() -> None:
    with served(lambda a, b: plain(a, b, "X-Note: closing"), plain) as (server, made):
        assert fill(made) == DATA[:1000]
        assert fill(made) == DATA[:1000]
        assert server.connections == 2


def test_a_server_that_says_close_is_believed() -> None:
    with served(lambda a, b: plain(a, b, "Connection: close", "X-Note: closing"), plain) as (server, made):
        assert fill(made) == DATA[:1000]
        assert fill(made) == DATA[:1000]
        assert server.connections == 2


STRANGE: dict[str, Answer] = {
    "range ignored": lambda start, end: b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(DATA) + DATA,
    "another range": lambda start, end: plain(start + 1, end + 1),
    "chunked": lambda start, end: plain(start, end, "Transfer-Encoding: chunked"),
    "compressed": lambda start, end: plain(start, end, "Content-Encoding: gzip"),
    "two lengths": lambda start, end: plain(start, end, "Content-Length: 7"),
    "two ranges": lambda start, end: plain(start, end, f"Content-Range: bytes {start}-{end}/9"),
    "no range said": with_head("HTTP/1.1 206 Partial Content", "Content-Length: 1000"),
    "more than announced": lambda start, end: plain(start, end) + b"more",
    "no HTTP": lambda start, end: b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
    "a line without a colon": with_head("HTTP/1.1 206 Partial Content", "nonsense"),
    "an endless head": lambda start, end: b"HTTP/1.1 206 Partial Content\r\n" + b"X: y\r\n" * 10_000,
    "elsewhere": with_head("HTTP/1.1 301 Moved", "Location: http://127.0.0.1:1/", "Content-Length: 0"),
    "bad request": with_head("HTTP/1.1 400 Bad Request", "Content-Length: 0"),
}


@pytest.mark.parametrize("answer", STRANGE.values(), ids=STRANGE)
def test_a_server_that_answers_otherwise_is_left_to_the_engine(answer: Answer) -> None:
    """For good: it would answer each request so."""
    with served(answer, plain) as (server, made):
        assert fill(made) is None
        assert fill(made) is None
        assert len(server.requests) == 1


PASSING: dict[str, Answer] = {
    "not found": with_head("HTTP/1.1 404 Not Found", "Content-Length: 0"),
    "denied": with_head("HTTP/1.1 403 Forbidden", "Content-Length: 0"),
    "beyond the end": with_head("HTTP/1.1 416 Range Not Satisfiable", "Content-Length: 0"),
    "busy": with_head("HTTP/1.1 503 Slow Down", "Content-Length: 0"),
    "shorter": lambda start, end: plain(start, end - 1),
    "cut": lambda start, end: plain(start, end, "X-Note: closing")[:-1],
    "hung up": lambda start, end: b"",
}


@pytest.mark.parametrize("answer", PASSING.values(), ids=PASSING)
def test_what_is_about_one_request_is_left_to_the_engine_once(answer: Answer) -> None:
    last = answer is PASSING["hung up"]
    with served(*([answer] if last else [answer, plain])) as (_, made):
        assert fill(made) is None
        assert fill(made) == (None if last else DATA[:1000])


def test_silence_is_broken_off() -> None:
    with served(plain, lambda start, end: time.sleep(8) or b"") as (_, made):  # type: ignore[func-returns-value]
        fill(made)
        began = time.monotonic()
        with pytest.raises(Stalled):
            fill(made)
        assert time.monotonic() - began < 4


@pytest.mark.parametrize(
    ("endpoint", "more"),
    [
        ("https://s3.example", {}),
        ("http://127.0.0.1:1", {"role_arn": "arn:aws:iam::1:role/x"}),
        ("http://127.0.0.1:1", {"enable_virtual_host_style": "true"}),
    ],
)
def test_what_needs_more_than_a_signature_is_left_to_the_engine(endpoint: str, more: dict[str, str]) -> None:
    assert ranges(configured(endpoint, **more), LIMITS) is None


def test_a_proxy_is_left_to_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert ranges(configured("http://s3.example"), LIMITS) is None
    monkeypatch.setenv("no_proxy", "s3.example")
    assert ranges(configured("http://s3.example"), LIMITS) is not None


def test_names_are_looked_up_aside() -> None:
    """Nobody waits for that: until it is known the engine reads."""
    with served(plain) as (server, _):
        made = ranges(configured(f"http://localhost:{server.port}"), LIMITS)
        assert made is not None
        assert fill(made) is None
        end = time.monotonic() + 5
        while (found := fill(made)) is None and time.monotonic() < end:
            time.sleep(0.01)
        assert found == DATA[:1000]
        made.close()


def test_small_reads_do_not_wait_for_a_name_either(monkeypatch: pytest.MonkeyPatch) -> None:
    known = threading.Event()
    look_up = socket.getaddrinfo

    def slow(host: str, *args: Any, **options: Any) -> Any:
        if host == "localhost":
            assert known.wait(10)
        return look_up(host, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    made = small_reads(configured("http://localhost:9"), LIMITS)
    assert made is not None
    assert not made.usable
    with pytest.raises(OSError, match="looked up"):
        made.begin()
    known.set()
    end = time.monotonic() + 5
    while not made.usable and time.monotonic() < end:
        time.sleep(0.01)
    assert made.usable
    made.close()


def test_a_real_server(seaweed: Seaweed, s3: MakeStore) -> None:
    s3().write("u/data", DATA)
    with FaultProxy(seaweed.port) as proxy:
        store = s3(endpoint=proxy.endpoint)
        buffer = bytearray(len(DATA))
        for start in (0, 1, TOLD, len(DATA) - 1):
            view = memoryview(buffer)[: len(DATA) - start]
            assert store.read_into("u/data", view, start) == len(DATA) - start
            assert view == DATA[start:]
        assert proxy.accepted == 1, "all of it straight, over one connection"
        store.disconnect()


@pytest.mark.parametrize(
    ("endpoint", "signed"),
    [
        ("http://s3.lab.example", True),
        ("http://127.0.0.1.evil.example", True),
        ("http://192.168.1.7:9000", True),
        ("https://s3.lab.example", False),
        ("http://127.0.0.1:8333", False),
        ("http://[::1]:8333", False),
        ("http://localhost:8333", False),
    ],
)
def test_a_body_is_signed_where_somebody_could_change_it(endpoint: str, signed: bool) -> None:
    signer = Signer(endpoint, "bucket", "us-east-1", "AK", "a secret", None)
    headers = signer.headers("PUT", f"{endpoint}/bucket/k", {}, b"body")
    assert (headers["x-amz-content-sha256"] != "UNSIGNED-PAYLOAD") is signed
