"""The control socket gives power over records: only its user and root are answered, and nobody can exhaust it."""

import errno
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from daemon import client, control, protocol
from daemon.client import ask
from tests.fake_session import FakeDaemon, fake_daemon
from tests.security.others import NOBODY, as_user
from vfs.errors import Refused

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


@pytest.fixture
def daemon(reachable: Path) -> Iterator[FakeDaemon]:
    with fake_daemon(reachable / "run", reachable / "mnt", reachable / "index") as daemon:
        yield daemon


def opened(path: Path) -> None:
    """Let everybody reach a socket, as after a chmod that should not have been: only the kernel's word is left."""
    path.chmod(0o666)
    path.parent.chmod(0o711)


def _connect(connection: socket.socket, path: Path) -> None:
    """As soon as the daemon has taken those before from its queue."""
    connection.setblocking(False)
    end = time.monotonic() + 20
    while number := connection.connect_ex(str(path)):
        if number != errno.EAGAIN:
            raise OSError(number, os.strerror(number))
        assert time.monotonic() < end, "the daemon takes no connections"
        time.sleep(0.005)
    connection.setblocking(True)


def tell(path: Path) -> str:
    """What the daemon answers to a request for its status."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        _connect(connection, path)
        connection.settimeout(10)
        connection.sendall(protocol.encode({"command": "status", "args": {}}))
        connection.shutdown(socket.SHUT_WR)
        received = b""
        while data := connection.recv(65536):
            received += data
    return received.decode()


def test_the_directory_keeps_others_out(daemon: FakeDaemon) -> None:
    def attempt() -> str:
        try:
            return tell(daemon.socket)
        except OSError as error:
            return type(error).__name__

    assert as_user(NOBODY, attempt) == "PermissionError"
    with pytest.raises(AssertionError, match=r"Refused: .*belongs to another user"):
        as_user(NOBODY, lambda: ask(daemon.socket, "status", {}))


def test_another_user_who_reaches_it_is_refused_by_the_kernels_word(daemon: FakeDaemon) -> None:
    opened(daemon.socket)
    answer = as_user(NOBODY, lambda: tell(daemon.socket))
    assert "this mount belongs to another user" in answer
    assert '"result"' not in answer
    assert '"result"' in tell(daemon.socket), "its own user is answered, before and after"


def test_root_is_answered(reachable: Path) -> None:
    """He could read the daemon's memory as well; and `runfs status` of an administrator should work."""
    place = reachable / "theirs"
    place.mkdir()
    os.chown(place, NOBODY, NOBODY)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        with fake_daemon(place / "run", place / "mnt", place / "index") as served:
            os.write(writing, os.fsencode(served.socket))
            os.close(writing)
            signal.pause()
        os._exit(0)
    os.close(writing)
    try:
        address = Path(os.fsdecode(os.read(reading, 4096)))
        assert '"result"' in tell(address)
        with pytest.raises(Refused, match=f"uid {NOBODY}"):  # but our command line does not ask a stranger's daemon
            ask(address, "status", {})
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
        os.close(reading)


def test_a_stranger_who_listens_first_is_asked_nothing(reachable: Path) -> None:
    """In /tmp somebody may have made the socket before us: the request, with what it says, must not reach him."""
    place = reachable / "theirs"
    place.mkdir(mode=0o777)
    place.chmod(0o777)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
            listening.bind(str(place / "x.sock"))
            os.chmod(place / "x.sock", 0o666)
            listening.listen(1)
            os.write(writing, b".")
            connection, _address = listening.accept()
            os.write(writing, b"got %d" % len(connection.recv(65536)))
        os._exit(0)
    os.close(writing)
    try:
        assert os.read(reading, 1) == b"."
        with pytest.raises(Refused, match=f"another user \\(uid {NOBODY}\\)"):
            client.ask(place / "x.sock", "push", {"uuids": ["secret"]})
        assert os.read(reading, 100) == b"got 0"
    finally:
        os.waitpid(child, 0)
        os.close(reading)


class TestBounds:
    def test_connections_that_say_nothing(self, daemon: FakeDaemon) -> None:
        with ExitStack() as stack:
            for _number in range(control.MAX_WAITING):
                each = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
                _connect(each, daemon.socket)
            answer = tell(daemon.socket)
            assert "programs are asking at once" in answer
        for _try in range(100):  # those are noticed to have gone
            if '"result"' in tell(daemon.socket):
                return
        raise AssertionError("the daemon does not answer any more")

    def test_a_request_without_an_end(self, daemon: FakeDaemon) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(20)
            connection.connect(str(daemon.socket))
            sent = 0
            try:
                while sent < 64 * protocol.MAX_REQUEST:
                    sent += connection.send(b"x" * 65536)
            except (BrokenPipeError, ConnectionResetError, TimeoutError):
                pass
            assert sent < 8 * protocol.MAX_REQUEST, "it was told so, and hung up on"
        assert ask(daemon.socket, "status", {}) is not None

    @pytest.mark.parametrize(
        "line",
        [b"[" * 500_000, b'{"command":' * 50_000, b'{"command": "status", "args": {"a": ' + b"9" * 100_000 + b"}}"],
    )
    def test_requests_made_to_hurt(self, daemon: FakeDaemon, line: bytes) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(20)
            connection.connect(str(daemon.socket))
            connection.sendall(line + b"\n")
            received: Any = connection.recv(65536)
        assert b'"UsageError"' in received
        assert ask(daemon.socket, "status", {}) is not None
