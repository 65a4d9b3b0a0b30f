"""Telling systemd: real datagram sockets, in the file system and in the abstract namespace."""

import os
import socket
from pathlib import Path

import pytest

from daemon import notify


class TestNotify:
    @pytest.mark.parametrize("abstract", [False, True])
    def test_a_message_arrives(self, tmp_path: Path, abstract: bool) -> None:
        name = f"@runfs-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
            listening.bind("\0" + name[1:] if abstract else name)
            listening.settimeout(5)
            assert notify.notify("READY=1", "STATUS=ok", environ={"NOTIFY_SOCKET": name})
            assert listening.recv(1000) == b"READY=1\nSTATUS=ok"

    def test_nobody_listens(self, tmp_path: Path) -> None:
        assert not notify.notify("READY=1", environ={})
        assert not notify.notify("READY=1", environ={"NOTIFY_SOCKET": str(tmp_path / "absent")})
        assert not notify.notify("READY=1", environ={"NOTIFY_SOCKET": "vsock:2:1"})

    def test_the_watchdog(self) -> None:
        assert notify.watchdog_interval({"WATCHDOG_USEC": "60000000"}) == 30
        assert notify.watchdog_interval({"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": "1"}) is None
        assert notify.watchdog_interval({}) is None
        assert notify.watchdog_interval({"WATCHDOG_USEC": "x"}) is None
