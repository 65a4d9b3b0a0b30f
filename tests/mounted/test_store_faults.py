"""Each fault that a store can have, while a record is read, written, pushed, evicted and hydrated at once.

A real S3 server behind the proxy of `tests/faults.py`. Whatever it does: nobody sees wrong bytes, no call takes longer
than its deadlines allow, nothing is dropped that is not proven, and when it is over everything goes on by itself.
"""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults import FaultProxy, http_answer
from tests.mounted.records import Record, Shared, ask, digest, until
from tests.servers import Seaweed

pytestmark = pytest.mark.mounted
DEADLINE_S = 2.0
# A read may wait for the flight that was under way and for its own, each a deadline and the time its size may take; a
# command for an upload, the manifest and its proof. The rest is for a machine that does other things too.
CALL_LIMIT_S = 3 * DEADLINE_S + 8.0
COMMAND_LIMIT_S = 6 * DEADLINE_S + 10.0
OPTIONS = ("-o", f"deadline_s={DEADLINE_S:g}", "-o", "least_throughput=4MiB", "-o", "push.auto=false")
AWAY = ("EIO", "ETIMEDOUT", "EHOSTUNREACH")
EMPTY_LISTING = (
    b"<?xml version='1.0'?><ListBucketResult><IsTruncated>false</IsTruncated><KeyCount>0</KeyCount></ListBucketResult>"
)

READ = """
import errno, hashlib, sys
try:
    print(hashlib.sha256(open(sys.argv[1], 'rb').read()).hexdigest())
except OSError as error:
    print(errno.errorcode[error.errno])
"""
WRITE = """
import errno, os, sys
try:
    fd = os.open(sys.argv[1], os.O_WRONLY)
    os.pwrite(fd, b'WRITTEN', 2_500_000)
    os.fsync(fd)
    os.close(fd)
    print('done')
except OSError as error:
    print(errno.errorcode[error.errno])
"""


def listing(proxy: FaultProxy) -> None:
    """Listings do not know yet what was written."""
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/xml\r\nContent-Length: {len(EMPTY_LISTING)}\r\n"
    proxy.saying = head.encode() + b"Connection: close\r\n\r\n" + EMPTY_LISTING
    proxy.only = b"list-type="
    proxy.set("say")


def says(status: str, code: str, *headers: str, share: float = 1.0) -> Callable[[FaultProxy], None]:
    def fault(proxy: FaultProxy) -> None:
        proxy.saying, proxy.share = http_answer(status, code, *headers), share
        proxy.set("say")

    return fault


def mode(name: str, **more: Any) -> Callable[[FaultProxy], None]:
    def fault(proxy: FaultProxy) -> None:
        for attribute, value in more.items():
            setattr(proxy, attribute, value)
        proxy.set(name)

    return fault


FAULTS: dict[str, Callable[[FaultProxy], None]] = {
    "latency": mode("delay", delay_s=0.1),
    "reset": mode("cut", cut_after=0),
    "truncated": mode("cut", cut_after=300_000),
    "gone": mode("refuse"),
    "silent": mode("silent"),
    "a byte a second": mode("dribble", rate=1.0),
    "wrong bytes": mode("wrong"),
    "every answer 500": says("500 Internal Server Error", "InternalError"),
    "a storm of 503": says("503 Slow Down", "SlowDown", share=0.5),
    "throttled for an hour": says("429 Too Many Requests", "TooManyRequests", "Retry-After: 3600"),
    "busy for an hour": says("503 Service Unavailable", "ServiceUnavailable", "Retry-After: 3600"),
    "expired credentials": says("403 Forbidden", "ExpiredToken"),
    "another clock": says("403 Forbidden", "RequestTimeTooSkewed"),
    "old listings": listing,
}


@pytest.fixture(scope="module")
def proxy(seaweed: Seaweed) -> Iterator[FaultProxy]:
    with FaultProxy(seaweed.port) as made:
        yield made


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory, seaweed: Seaweed, proxy: FaultProxy) -> Iterator[Shared]:
    place = tmp_path_factory.mktemp("remote")
    made = Shared(place, 4 * len(FAULTS) + 4, OPTIONS)
    made.mounted.environment.update(seaweed.environment())
    url = f"s3://{seaweed.bucket}/{place.name}-{time.time_ns()}?endpoint={proxy.endpoint}&region={seaweed.region}"
    command = made.mounted.command
    command[command.index("--store") + 1] = url
    with made.mounted:
        yield made
    log = made.mounted.log()
    assert "please report this" not in log, log
    assert "Traceback" not in log, log


class Timed:
    """Calls in other processes and threads, all at once, with how long each took."""

    def __init__(self) -> None:
        self.took: dict[str, float] = {}
        self.said: dict[str, Any] = {}
        self._threads: list[threading.Thread] = []

    def begin(self, name: str, call: Callable[[], Any]) -> None:
        def run() -> None:
            began = time.monotonic()
            try:
                self.said[name] = call()
            except Exception as error:
                self.said[name] = error
            self.took[name] = time.monotonic() - began

        self._threads.append(threading.Thread(target=run))
        self._threads[-1].start()

    def end(self) -> None:
        for thread in self._threads:
            thread.join(2 * COMMAND_LIMIT_S)
            assert not thread.is_alive()


def program(code: str, path: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize("name", FAULTS)
def test_every_call_ends_and_nothing_is_wrong(remote: Shared, proxy: FaultProxy, name: str) -> None:
    read, write, gone = (remote.take("evicted") for _ in range(3))
    dirty = remote.take("resident")
    (dirty.path / "new").write_bytes(b"n" * 300_000)
    (dirty.plain / "new").write_bytes(b"n" * 300_000)
    timed = Timed()
    try:
        FAULTS[name](proxy)
        timed.begin("read", lambda: program(READ, read.path / "big.bin"))
        timed.begin("write", lambda: program(WRITE, write.path / "big.bin"))
        timed.begin("evict", lambda: ask(remote.mounted, "evict", uuids=[dirty.uuid]))
        timed.begin("hydrate", lambda: ask(remote.mounted, "hydrate", uuids=[gone.uuid]))
        timed.begin("status", lambda: ask(remote.mounted, "status"))
        timed.begin("list", lambda: program("import os, sys; os.listdir(sys.argv[1])", gone.path))
        timed.end()
    finally:
        proxy.only, proxy.share = b"", 1.0
        proxy.set("pass")
    limits = {"read": CALL_LIMIT_S, "write": CALL_LIMIT_S, "list": 5.0, "status": 8.0}
    late = {call: f"{took:.1f} s" for call, took in timed.took.items() if took > limits.get(call, COMMAND_LIMIT_S)}
    assert not late, (late, timed.said)
    assert timed.said["read"] in (digest(read.plain / "big.bin"), *AWAY)
    assert timed.said["write"] in ("done", *AWAY)
    if timed.said["write"] == "done":
        with (write.plain / "big.bin").open("r+b") as file:
            file.seek(2_500_000)
            file.write(b"WRITTEN")
    assert timed.said["evict"]["exit"] in (0, 1)
    assert dirty.working.is_symlink() == (timed.said["evict"]["exit"] == 0)
    for record in (read, write, gone, dirty):
        comes_back(record)
        record.check()


def comes_back(record: Record) -> None:
    """Soon after the store does."""
    until(lambda: program(READ, record.path / "big.bin") not in AWAY, f"{record.uuid} can be read again", 30)


def test_sigkill_frees_whoever_waits_in_a_read_of_a_trickle(remote: Shared, proxy: FaultProxy) -> None:
    """Not only of a silent store: bytes arrive, too slowly."""
    record = remote.take("evicted")
    FAULTS["a byte a second"](proxy)
    try:
        reader = subprocess.Popen([sys.executable, "-c", READ, str(record.path / "big.bin")], stdout=subprocess.DEVNULL)
        until(lambda: bool(ask(remote.mounted, "status")["waiting"]), "it waits", 10)
        began = time.monotonic()
        reader.send_signal(signal.SIGKILL)
        reader.wait(CALL_LIMIT_S)
        assert time.monotonic() - began < 1.0
    finally:
        proxy.set("pass")
    comes_back(record)
    record.check()
