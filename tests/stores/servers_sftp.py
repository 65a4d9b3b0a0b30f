"""A real SFTP server for tests: Debian's openssh-server as a private process on loopback, with its own keys.

Used by the sftp suites and `tests/bench/sftp_clients.py`. `openssh(directory)` starts one and stops it by process id;
`apt-get install openssh-server` brings the program. Blocks until the port answers (well under a second).
"""

import asyncio
import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import asyncssh

from tests.servers import free_ports

START_LIMIT_S = 20.0
STOP_LIMIT_S = 10.0
PASSPHRASE = "a passphrase for tests"

CONFIG = """
Port {port}
ListenAddress 127.0.0.1
HostKey {directory}/host_key
PidFile none
AuthorizedKeysFile {directory}/authorized_keys
StrictModes no
UsePAM no
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
AllowAgentForwarding no
MaxStartups 200
MaxSessions 100
LogLevel VERBOSE
Subsystem sftp {subsystem}
"""


def sshd_program() -> str | None:
    """The server's program (it insists on being called by its full path), or None where it is not installed."""
    return shutil.which("sshd", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")


class OpenSsh:
    """One sshd whose users' home is irrelevant: paths are absolute. `stop()` and `start()` keep keys and port.

    `key`: the private key that is let in; `locked_key`: the same with a passphrase; `other_key`: one that is refused.
    """

    def __init__(self, directory: Path, subsystem: str = "internal-sftp") -> None:
        self.directory = directory
        self.port = free_ports(1)[0]
        self.user = getpass.getuser()
        self.key = directory / "key"
        self.locked_key = directory / "locked_key"
        self.other_key = directory / "other_key"
        self.known_hosts = directory / "known_hosts"
        self.log = directory / "sshd.log"
        self.process: subprocess.Popen[bytes] | None = None
        self._prepare(subsystem)

    def url(self, path: Path | str, port: int | None = None) -> str:
        """The store URL of a directory on this server."""
        return f"sftp://{self.user}@127.0.0.1:{port or self.port}{path}"

    def options(self) -> dict[str, str]:
        """Store options for this server: merge them into a store's configuration."""
        return {"key_file": str(self.key), "known_hosts": str(self.known_hosts)}

    def know(self, port: int) -> None:
        """Add this server's host key under another port (a proxy's) to `known_hosts`."""
        public = (self.directory / "host_key.pub").read_text().split()
        with self.known_hosts.open("a") as file:
            file.write(f"[127.0.0.1]:{port} {public[0]} {public[1]}\n")

    def start(self) -> None:
        """Start the server and wait until its port answers."""
        program = sshd_program()
        if program is None:
            raise FileNotFoundError("sshd is not installed; apt-get install openssh-server")
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # where root's sshd locks its children in
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [program, "-D", "-e", "-f", str(self.directory / "sshd_config")],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Kill this server and the processes of its connections."""
        process, self.process = self.process, None
        if process is not None:
            children = _children(process.pid)
            process.kill()
            process.wait(STOP_LIMIT_S)
            for child in children:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, 9)

    def children(self) -> list[int]:
        """The processes that serve connections now."""
        return [] if self.process is None else _children(self.process.pid)

    def _prepare(self, subsystem: str) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        for path, passphrase in (
            (self.directory / "host_key", ""),
            (self.key, ""),
            (self.locked_key, PASSPHRASE),
            (self.other_key, ""),
        ):
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-a", "1", "-N", passphrase, "-C", "test", "-f", str(path)]
            subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
        allowed = [each.with_suffix(".pub").read_text() for each in (self.key, self.locked_key)]
        (self.directory / "authorized_keys").write_text("".join(allowed))
        self.know(self.port)
        config = CONFIG.format(port=self.port, directory=self.directory, subsystem=subsystem)
        (self.directory / "sshd_config").write_text(config)

    def _wait_until_ready(self) -> None:
        end = time.monotonic() + START_LIMIT_S
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=2) as made:
                if made.recv(4) == b"SSH-":
                    return
            if self.process is None or self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"sshd did not start:\n{self.log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.05)


def _children(parent: int) -> list[int]:
    """All processes below one, nearest first."""
    found: list[int] = []
    for task in Path(f"/proc/{parent}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += map(int, task.read_text().split())
    return [*found, *(below for each in found for below in _children(each))]


@contextlib.contextmanager
def openssh(directory: str | os.PathLike[str], subsystem: str = "internal-sftp") -> Iterator[OpenSsh]:
    """A running SFTP server whose keys are in `directory`."""
    server = OpenSsh(Path(directory), subsystem)
    server.start()
    try:
        yield server
    finally:
        server.stop()


class _LetsIn(asyncssh.SSHServer):
    """Lets in whoever knows the password."""

    def __init__(self, password: str, connections: list[asyncssh.SSHServerConnection]) -> None:
        self._password = password
        self._connections = connections

    def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
        self._connections.append(conn)

    def begin_auth(self, username: str) -> bool:
        return True

    def password_auth_supported(self) -> bool:
        return True

    def validate_password(self, username: str, password: str) -> bool:
        return password == self._password


@contextlib.contextmanager
def password_server(directory: Path, password: str) -> Iterator[int]:
    """Another SFTP server, asyncssh's own, that wants a password; its port. Its host key is in `known_hosts` there."""
    key = asyncssh.generate_private_key("ssh-ed25519")
    connections: list[asyncssh.SSHServerConnection] = []
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def listen() -> asyncssh.SSHAcceptor:
        return await asyncssh.listen(
            "127.0.0.1",
            0,
            server_factory=lambda: _LetsIn(password, connections),
            server_host_keys=[key],
            sftp_factory=True,
        )

    async def close(listener: asyncssh.SSHAcceptor) -> None:
        listener.close()
        for connection in connections:
            connection.abort()
            await connection.wait_closed()
        await listener.wait_closed()
        await asyncio.sleep(0.05)  # transports are closed in the loop's next rounds

    try:
        listener = asyncio.run_coroutine_threadsafe(listen(), loop).result(START_LIMIT_S)
        port = listener.get_port()
        public = key.export_public_key().decode().strip()
        (directory / "known_hosts").write_text(f"[127.0.0.1]:{port} {public}\n")
        yield port
        asyncio.run_coroutine_threadsafe(close(listener), loop).result(STOP_LIMIT_S)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(STOP_LIMIT_S)
        loop.close()
