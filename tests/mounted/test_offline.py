"""No network at all, from the mount to the unmount, and its return; dead and hanging mounts, as others see them."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults import FaultProxy
from tests.mounted.records import BIG, Shared, digest, until
from tests.mounting import Mounted
from tests.mounts import unmount_under
from tests.projects import Project
from tests.servers import Seaweed

pytestmark = pytest.mark.mounted
Make = Callable[..., Project]
Mount = Callable[..., Mounted]
DEADLINE_S = 2.0
SLACK_S = 15.0  # of a busy machine; what is asserted is that there is an end
DRAIN_S = 1.0


@pytest.fixture
def proxy(seaweed: Seaweed) -> Iterator[FaultProxy]:
    with FaultProxy(seaweed.port) as made:
        yield made


@pytest.fixture
def remote(tmp_path: Path, seaweed: Seaweed, proxy: FaultProxy) -> Iterator[Shared]:
    """Not mounted yet: an S3 server behind a proxy as the only store."""
    made = Shared(tmp_path, 3, ("-o", f"deadline_s={DEADLINE_S:g}"))
    made.mounted.environment.update(seaweed.environment())
    url = f"s3://{seaweed.bucket}/{tmp_path.name}?endpoint={proxy.endpoint}&region={seaweed.region}"
    command = made.mounted.command
    command[command.index("--store") + 1] = url
    yield made
    proxy.set("pass")
    made.mounted.stop()


class Clock:
    """The longest that anything took."""

    def __init__(self) -> None:
        self.took: dict[str, float] = {}

    def __call__(self, what: str, call: Callable[[], object], limit_s: float) -> object:
        began = time.monotonic()
        found = call()
        self.took[what] = time.monotonic() - began
        assert self.took[what] < limit_s + SLACK_S, self.took
        return found


@pytest.mark.parametrize("mode", ["refuse", "silent"])
def test_a_day_without_a_network(remote: Shared, proxy: FaultProxy, mode: str) -> None:
    mounted, clock = remote.mounted, Clock()
    mounted.start()
    evicted, resident = remote.take("evicted"), remote.take("resident")
    assert mounted.umount().returncode == 0
    proxy.set(mode)

    clock("mount", mounted.start, 3 * DEADLINE_S)
    local = DEADLINE_S  # nothing of this asks a store at all
    names = clock("list", lambda: os.listdir(mounted.path), local)
    assert {evicted.uuid, resident.uuid} <= set(names)  # type: ignore[arg-type]
    assert clock("attributes", lambda: os.stat(evicted.path / "big.bin").st_size, local) == BIG
    assert clock("read", lambda: digest(resident.path / "big.bin"), local) == digest(resident.plain / "big.bin")
    kept = clock("read what was kept", (evicted.path / "small.txt").read_bytes, local)
    assert kept == (evicted.plain / "small.txt").read_bytes()
    for record in (evicted, resident):
        clock("write", lambda record=record: (record.path / "offline.txt").write_bytes(b"written offline"), local)
        clock("rename", lambda record=record: os.rename(record.path / "offline.txt", record.path / "kept.txt"), local)
    clock("status", lambda: mounted.json("status"), local)
    clock("safe", lambda: mounted.json("safe", exit_code=1), local)
    clock("evict", lambda: mounted.json("evict", resident.uuid, exit_code=1), 6 * DEADLINE_S)
    left = clock("umount", lambda: mounted.umount(DRAIN_S), DRAIN_S + 4 * DEADLINE_S)
    assert isinstance(left, subprocess.CompletedProcess)
    assert left.returncode == 1, "it says that not all is in the store"
    assert "the next mount goes on" in left.stdout
    assert mounted.process is not None
    mounted.process.wait(SLACK_S)
    assert not os.path.ismount(mounted.path)

    clock("mount again", mounted.start, 3 * DEADLINE_S)
    for record in (evicted, resident):
        assert (record.path / "kept.txt").read_bytes() == b"written offline"
    proxy.set("pass")
    until(lambda: mounted.runfs("safe").returncode == 0, "it drains by itself when the network is back", 60)
    assert digest(evicted.path / "big.bin") == digest(evicted.plain / "big.bin")
    print("longest:", max(clock.took.items(), key=lambda item: item[1]))


def test_status_of_a_dead_mount(
    make_project: Callable[..., Project], mount: Callable[..., Mounted], tmp_path: Path
) -> None:
    """Asked without naming the mount, as somebody does who does not know that its daemon was killed."""
    mounted = mount(make_project(runs=1, report=False), stores=[(tmp_path / "store").as_uri()])
    mounted.kill(unmount_stale=False)
    environment = {**mounted.environment}
    del environment["RUNFS_MOUNT"]
    command = [sys.executable, "-m", "daemon.cli", "status", "--project", str(mounted.project.path)]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 1, done
        assert f"{mounted.path}: its daemon is gone. Run: runfs umount {mounted.path}" in done.stdout
    finally:
        unmount_under(tmp_path)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, "not mounted" in done.stdout) == (0, True), done


def test_doctor_beside_a_mount_that_hangs(make_project: Make, mount: Mount) -> None:
    other = make_project("other", runs=1, report=False)
    mounted = mount(make_project(runs=1, report=False))
    mounted.pause()
    try:
        environment = {key: value for key, value in mounted.environment.items() if key != "RUNFS_MOUNT"}
        command = [sys.executable, "-m", "daemon.cli", "doctor", "--project", str(other.path)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=90)
        assert f"{mounted.path} is another mount of runfs" in done.stdout
    finally:
        mounted.resume()


BUSY = """
import os, sys
fd = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT, 0o644)
print("ready", flush=True)
number = 0
while True:
    number += 1
    os.pwrite(fd, b"%d" % number, number % 50 * 700_000)
"""


def test_close_says_what_a_push_left_unsettled(make_project: Make, mount: Mount, tmp_path: Path) -> None:
    """With on_close = "push": another program goes on writing to a file of the record, so the homes cannot have it."""
    project = make_project(runs=1, report=False)
    options = ["-o", "push.auto=false,on_close=push"]
    mounted = mount(project, stores=[(tmp_path / "store").as_uri()], options=options)
    (uuid,) = project.runs
    mounted.json("push")
    busy = subprocess.Popen([sys.executable, "-c", BUSY, str(project.directory(uuid) / "busy")], stdout=subprocess.PIPE)
    try:
        assert busy.stdout is not None
        busy.stdout.readline()
        code = (
            "import os, sys\nfd = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)\nos.write(fd, b'mine')\nos.close(fd)"
        )
        done = mounted.bounded([sys.executable, "-c", code, str(mounted.path / uuid / "mine")])
        assert "Device or resource busy" in done.stderr, done
        assert (mounted.path / uuid / "mine").read_bytes() == b"mine", "it is here all the same"
        assert mounted.json("safe", exit_code=1)["unsafe"]
    finally:
        busy.kill()
        busy.wait()
        busy.stdout.close() if busy.stdout else None
    assert mounted.json("push")["failed"] == []
    assert mounted.json("safe")["safe"]
