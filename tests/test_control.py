"""The control socket with real sockets, threads and processes: who is answered, what is malformed, who hangs up."""

import ctypes
import json
import os
import platform
import socket
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from daemon import client, control, mounts, protocol
from daemon.client import DaemonLost, ask
from tests.fake_session import FakeDaemon, FakeSession, fake_daemon
from vfs import places
from vfs.errors import MountpointError, Refused, RunfsError, UsageError


@pytest.fixture
def runtime(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def daemon(runtime: Path, tmp_path: Path) -> Iterator[FakeDaemon]:
    with fake_daemon(runtime, tmp_path / "mnt", tmp_path / "index") as daemon:
        yield daemon


def raw(path: Path, sent: bytes, *, end: bool = False) -> list[dict[str, Any]]:
    """What the daemon answers to some bytes."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(20)
        connection.connect(str(path))
        try:
            connection.sendall(sent)
            if end:
                connection.shutdown(socket.SHUT_WR)
        except BrokenPipeError:
            pass  # it may answer and close before it has read all
        received = b""
        while chunk := connection.recv(65536):
            received += chunk
    return [json.loads(line) for line in received.splitlines()]


def test_a_result_with_its_progress(daemon: FakeDaemon) -> None:
    steps: list[dict[str, Any]] = []
    result = ask(daemon.socket, "push", {"uuids": []}, steps.append)
    assert result == {
        "pushed": [{"uuid": "qcmIdGsGCpwS", "bytes": 100, "files": 1, "store": "lab"}],
        "failed": [],
        "exit": 0,
    }
    assert [step["done"] for step in steps] == [0, 20, 40, 60, 80, 100]


def test_arguments_arrive(daemon: FakeDaemon) -> None:
    assert ask(daemon.socket, "pin", {"uuids": ["a", "b"]}) == {"changed": ["a", "b"], "exit": 0}
    assert ask(daemon.socket, "pin", {"uuids": ["b", "c"]}) == {"changed": ["c"], "exit": 0}
    assert daemon.session.pinned == {"a", "b", "c"}


def test_an_error_comes_back_as_its_class(daemon: FakeDaemon) -> None:
    with pytest.raises(Refused, match="is live") as caught:
        ask(daemon.socket, "evict", {})
    assert caught.value.exit_code == 1
    with pytest.raises(UsageError) as wrong:
        ask(daemon.socket, "nonsense", {})
    assert wrong.value.exit_code == 2


def test_a_bug_is_an_error_that_does_not_tell_its_values(daemon: FakeDaemon, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(RunfsError, match="ZeroDivisionError in the daemon") as caught:
        ask(daemon.socket, "bug", {})
    assert "secret" not in str(caught.value)
    assert "ZeroDivisionError: a secret value" in caplog.text  # the log has the traceback
    assert ask(daemon.socket, "status", {}) is not None


def test_numbers_json_has_not_and_names_that_are_no_text(daemon: FakeDaemon) -> None:
    assert ask(daemon.socket, "odd", {}) == {"rate": None, "name": "\udcff\n", "exit": 0}


def test_modes_of_socket_and_directory(daemon: FakeDaemon) -> None:
    assert stat.S_IMODE(daemon.socket.stat().st_mode) == 0o600
    assert stat.S_IMODE(daemon.socket.parent.stat().st_mode) == 0o700


@pytest.mark.parametrize(
    ("sent", "says"),
    [
        (b"hello\n", "not one line of JSON"),
        (b"\n", "not one line of JSON"),
        (b"\xff\xfe\n", "not one line of JSON"),
        (b"[" * 100_000 + b"\n", "not one line of JSON"),
        (b"[]\n", "no command"),
        (b"{}\n", "no command"),
        (b'{"command": 3}\n', "no command"),
        (b'{"command": "status", "args": []}\n', "not an object"),
        (b'{"command": "x' + b"y" * (2 << 20) + b'"}\n', "longer than"),
    ],
)
def test_a_malformed_request_is_answered(daemon: FakeDaemon, sent: bytes, says: str) -> None:
    (answer,) = raw(daemon.socket, sent)
    assert says in answer["error"]["message"]
    assert answer["error"]["exit"] == 2
    assert ask(daemon.socket, "status", {}) is not None


def test_a_request_that_ends_too_early(daemon: FakeDaemon) -> None:
    (answer,) = raw(daemon.socket, b'{"command": "status"', end=True)
    assert "without a newline" in answer["error"]["message"]


def test_more_after_the_request_is_no_trouble(daemon: FakeDaemon) -> None:
    (answer,) = raw(daemon.socket, b'{"command": "pin", "args": {"uuids": []}}\n{"command": "bug"}\n')
    assert answer["result"]["exit"] == 0


def test_an_asker_that_hangs_up_stops_its_command_and_nothing_else(daemon: FakeDaemon) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(str(daemon.socket))
        connection.sendall(b'{"command": "wait"}\n')
        assert daemon.session.started.wait(10)
    assert daemon.session.cancelled.wait(10)
    assert ask(daemon.socket, "status", {}) is not None


def test_an_asker_that_reads_nothing_does_not_hold_the_command_up(daemon: FakeDaemon) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(str(daemon.socket))
        connection.sendall(b'{"command": "wait", "args": {"seconds": 0.3}}\n')
        assert daemon.session.ended.wait(10)
        assert ask(daemon.socket, "status", {}) is not None


def test_many_at_once(daemon: FakeDaemon) -> None:
    answers: list[dict[str, Any] | None] = []
    waiting = threading.Thread(target=ask, args=(daemon.socket, "wait", {"seconds": 2.0}))
    waiting.start()
    threads = [threading.Thread(target=lambda: answers.append(ask(daemon.socket, "status", {}))) for _ in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert not daemon.session.ended.is_set()  # a long command held none of them up
    assert [answer["records"] for answer in answers if answer] == [1284] * 30
    waiting.join(10)


def test_a_stopping_daemon_stops_its_commands_and_still_answers(runtime: Path, tmp_path: Path) -> None:
    answers: list[dict[str, Any] | None] = []
    with fake_daemon(runtime, tmp_path / "mnt", tmp_path / "index") as daemon:
        asking = threading.Thread(target=lambda: answers.append(ask(daemon.socket, "wait", {})))
        asking.start()
        assert daemon.session.started.wait(10)
    asking.join(10)
    assert answers == [{"stopped": True, "exit": 1}]
    assert not daemon.socket.exists()
    assert mounts.running(runtime) == []


def test_nobody_listens(tmp_path: Path) -> None:
    assert ask(tmp_path / "absent.sock", "status", {}) is None
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(str(tmp_path / "dead.sock"))
    assert ask(tmp_path / "dead.sock", "status", {}) is None


def test_a_second_daemon_is_refused_and_a_dead_ones_socket_is_replaced(daemon: FakeDaemon, tmp_path: Path) -> None:
    with pytest.raises(BaseExceptionGroup) as caught:
        trio.run(_serve_once, daemon.socket)
    assert caught.group_contains(MountpointError, match="another runfs daemon")
    assert ask(daemon.socket, "status", {}) is not None
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        (tmp_path / "own").mkdir(mode=0o700)
        dead.bind(str(tmp_path / "own" / "dead.sock"))
    trio.run(_serve_once, tmp_path / "own" / "dead.sock")
    assert not (tmp_path / "own" / "dead.sock").exists()


def test_a_silent_command_is_reported_alive(tmp_path: Path) -> None:
    """Else the command line would give up on a push of one large file."""
    daemon = FakeDaemon(tmp_path / "s", FakeSession(), alive_s=0.05)
    daemon.start()
    try:
        assert ask(daemon.socket, "quiet", {"seconds": 0.5}, silence_s=0.3) == {"exit": 0}
    finally:
        daemon.stop()


async def _serve_once(path: Path) -> None:
    async with trio.open_nursery() as nursery:
        await nursery.start(control.serve, path, FakeSession())
        nursery.cancel_scope.cancel()


def test_a_path_longer_than_a_socket_address(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    with fake_daemon(deep, tmp_path / "mnt", tmp_path / "index") as daemon:
        assert len(str(daemon.socket)) > 200
        assert ask(daemon.socket, "status", {}) is not None


def _listen_once(path: Path, *sent: bytes, then_wait: float = 0.0) -> threading.Thread:
    """A daemon that sends some bytes whatever it is asked, and ends."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listening.bind(str(path))
    listening.listen(1)

    def main() -> None:
        with listening, listening.accept()[0] as connection:
            connection.recv(65536)
            for part in sent:
                connection.sendall(part)
            time.sleep(then_wait)

    thread = threading.Thread(target=main)
    thread.start()
    return thread


@pytest.mark.parametrize("sent", [b"", b'{"progress": {}}\n', b'{"result": {"exit"', b'{"alive": true}\n'])
def test_a_daemon_that_dies_at_work(tmp_path: Path, sent: bytes) -> None:
    thread = _listen_once(tmp_path / "s", sent)
    with pytest.raises(DaemonLost, match="ended while"):
        ask(tmp_path / "s", "push", {})
    thread.join(10)


def test_a_silent_daemon_is_given_up(tmp_path: Path) -> None:
    thread = _listen_once(tmp_path / "s", then_wait=1.0)
    started = time.monotonic()
    with pytest.raises(DaemonLost, match="silent"):
        ask(tmp_path / "s", "push", {}, silence_s=0.2)
    assert time.monotonic() - started < 0.9
    thread.join(10)


def test_messages_of_another_version_are_passed_over(tmp_path: Path) -> None:
    lines = (b'{"alive": true}\n', b'{"news": 1}\n', b'{"result": {"exit": 0}}\n')
    thread = _listen_once(tmp_path / "s", *lines)
    assert ask(tmp_path / "s", "push", {}) == {"exit": 0}
    thread.join(10)


def test_an_unknown_kind_of_error_keeps_its_exit_code() -> None:
    error = protocol.error_from({"type": "SomethingNew", "message": "m", "exit": 2})
    assert (type(error), str(error), error.exit_code) == (RunfsError, "m", 2)
    assert type(protocol.error_from({"type": "errno", "message": "m"})) is RunfsError


SETRESUID = {"x86_64": 117, "aarch64": 147}.get(platform.machine())  # the system call, which is for one thread only


@pytest.mark.skipif(os.geteuid() != 0 or SETRESUID is None, reason="only root can become another user")
def test_another_user_is_not_answered() -> None:
    """Even when the modes let it in."""
    answers: list[dict[str, Any]] = []

    def ask_as_nobody(path: Path) -> None:
        assert ctypes.CDLL(None).syscall(SETRESUID, -1, 65534, -1) == 0
        answers.extend(raw(path, b'{"command": "status"}\n'))

    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        with fake_daemon(Path(directory) / "run", Path("/mnt"), Path("/index")) as daemon:
            daemon.socket.parent.chmod(0o755)
            daemon.socket.chmod(0o666)
            thread = threading.Thread(target=ask_as_nobody, args=(daemon.socket,))
            thread.start()
            thread.join(10)
            assert [answer["error"]["message"] for answer in answers] == ["this mount belongs to another user"]
            assert daemon.session.calls == []


class TestMounts:
    def test_announcing(self, tmp_path: Path) -> None:
        (tmp_path / "index").touch()
        with mounts.announced(tmp_path / "run", tmp_path / "mnt", tmp_path / "index") as path:
            assert path == places.socket_of(tmp_path / "run", tmp_path / "mnt")
            (entry,) = mounts.running(tmp_path / "run")
            assert (entry.pid, entry.mountpoint, entry.socket) == (os.getpid(), str(tmp_path / "mnt"), path)
            assert not client.answers(path)
        assert mounts.running(tmp_path / "run") == []

    def test_files_that_are_no_announcement(self, tmp_path: Path) -> None:
        (tmp_path / "a.json").write_text("{")
        (tmp_path / "b.json").write_text("[]")
        (tmp_path / "c.json").write_text('{"pid": 1}')
        assert mounts.running(tmp_path) == []
        assert mounts.running(tmp_path / "absent") == []

    def test_the_kernels_table(self) -> None:
        table = mounts.mount_table()
        assert mounts.mounted_at(Path("/proc"), table) is not None
        around = mounts.mount_around(Path("/proc/self/status"), table)
        assert around is not None
        assert around.mountpoint == "/proc"
        assert not around.is_runfs

    def test_a_link_to_a_mountpoint(self, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to("/proc")
        assert mounts.real_mountpoint(tmp_path / "link") == Path("/proc")
        assert mounts.real_mountpoint(tmp_path / "x" / ".." / "absent") == tmp_path / "absent"

    def test_a_mount_with_odd_names(self) -> None:
        line = r"36 35 0:50 / /mnt/a\040b\134c rw,nosuid - fuse.runfs runfs#/i\040x rw,user_id=1000,group_id=0"
        mount = mounts.parse_line(line)
        assert mount is not None
        assert (mount.mountpoint, mount.source, mount.uid, mount.is_runfs) == ("/mnt/a b\\c", "runfs#/i x", 1000, True)
        assert mounts.parse_line("nonsense") is None
