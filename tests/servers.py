"""Real servers for tests, from PyPI packages: SeaweedFS (S3) on loopback.

Used by every suite that needs an S3 server. `seaweedfs(directory)` starts one and stops it by process id.
Blocks until the server answers (about 3 s).
"""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import opendal

START_LIMIT_S = 60.0  # a slow shared machine; usually 3 s
STOP_LIMIT_S = 15.0


def free_ports(count: int) -> list[int]:
    """Ports free on loopback at this moment; all are held together, so they differ."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def find_program(name: str) -> str:
    """The program beside this interpreter, or on the PATH."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise FileNotFoundError(f"{name} is not installed; pip install 'runfs[test]'")
    return found


class Seaweed:
    """One SeaweedFS server with an S3 gateway. `stop()` and `start()` keep its data and ports.

    Identities: `access_key`/`secret_key` may do everything, `reader_key`/`reader_secret` may read and list
    only; anything else is refused.
    """

    access_key = "TESTACCESSKEY"
    secret_key = "test-secret-of-the-writer"
    reader_key = "TESTREADERKEY"
    reader_secret = "test-secret-of-the-reader"
    region = "us-east-1"
    bucket = "test-bucket"

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.ports = free_ports(8)
        self.port = self.ports[6]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.url = f"s3://{self.bucket}?endpoint={self.endpoint}&region={self.region}"
        self.process: subprocess.Popen[bytes] | None = None

    def options(self) -> dict[str, str]:
        """Store options for this server: merge them into a store's configuration."""
        return {"access_key_id": self.access_key, "secret_access_key": self.secret_key}

    def environment(self) -> dict[str, str]:
        """The usual environment variables with this server's credentials."""
        return {"AWS_ACCESS_KEY_ID": self.access_key, "AWS_SECRET_ACCESS_KEY": self.secret_key}

    def start(self) -> None:
        """Start the server and wait until it answers and the bucket exists."""
        self.directory.mkdir(parents=True, exist_ok=True)
        identities = self.directory / "identities.json"
        identities.write_text(json.dumps(self._identities()))
        with (self.directory / "weed.log").open("ab") as log:
            self.process = subprocess.Popen(
                self._command(identities), cwd=self.directory, stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Kill this server (its own process id only): its polite way takes 15 s, and what it answered for survives."""
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.wait(STOP_LIMIT_S)

    def _identities(self) -> dict[str, object]:
        return {
            "identities": [
                {
                    "name": "writer",
                    "credentials": [{"accessKey": self.access_key, "secretKey": self.secret_key}],
                    "actions": ["Admin", "Read", "Write", "List", "Tagging"],
                },
                {
                    "name": "reader",
                    "credentials": [{"accessKey": self.reader_key, "secretKey": self.reader_secret}],
                    "actions": ["Read", "List"],
                },
            ]
        }

    def _command(self, identities: Path) -> list[str]:
        master, master_grpc, volume, volume_grpc, filer, filer_grpc, s3, s3_grpc = self.ports
        options = {
            "dir": self.directory,
            "ip": "127.0.0.1",
            "ip.bind": "127.0.0.1",
            "master.telemetry": "false",
            "master.port": master,
            "master.port.grpc": master_grpc,
            "master.electionTimeout": "1s",  # it is alone; the default makes each restart take 10 s more
            "master.volumeSizeLimitMB": 256,
            "volume.port": volume,
            "volume.port.grpc": volume_grpc,
            "volume.max": 0,
            "volume.preStopSeconds": 0,
            "filer.port": filer,
            "filer.port.grpc": filer_grpc,
            "filer.localSocket": "filer.sock",  # in its own directory; the default is a name in /tmp that stays behind
            "s3.port": s3,
            "s3.port.grpc": s3_grpc,
            "s3.localSocket": "s3.sock",
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
            "s3.config": identities,
        }
        return [find_program("weed"), "server", "-s3", *(f"-{name}={value}" for name, value in options.items())]

    def _wait_until_ready(self) -> None:
        end = time.monotonic() + START_LIMIT_S
        while not (self._answers() and self._bucket_works()):
            if self.process is None or self.process.poll() is not None or time.monotonic() > end:
                log = (self.directory / "weed.log").read_text(errors="replace")[-2000:]
                raise RuntimeError(f"SeaweedFS did not start:\n{log}")
            time.sleep(0.1)

    def _answers(self) -> bool:
        try:
            urllib.request.urlopen(self.endpoint, timeout=2).close()
        except urllib.error.HTTPError as refused:
            refused.close()
            return True  # 403: it is there and wants a signature
        except OSError:
            return False
        return True

    def _bucket_works(self) -> bool:
        """An administrator's upload creates the bucket; it fails while the volume server is not registered
        yet."""
        operator = opendal.Operator(
            "s3", bucket=self.bucket, endpoint=self.endpoint, region=self.region, **self.options()
        ).layer(opendal.layers.TimeoutLayer(3, 3))
        try:
            operator.write("ready", b"ready")
            operator.delete("ready")
        except opendal.exceptions.Unexpected:
            return False
        return True


@contextlib.contextmanager
def seaweedfs(directory: str | os.PathLike[str]) -> Iterator[Seaweed]:
    """A running S3 server whose data is in `directory`."""
    server = Seaweed(Path(directory))
    server.start()
    try:
        yield server
    finally:
        server.stop()
