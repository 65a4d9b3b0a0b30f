"""What a machine does to a daemon: no space anywhere, a home that may only be read, no memory, no descriptors, a second
daemon by another way."""

import errno
import os
import resource
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import projects
from tests.model.disks import Filler, ext4_disk
from tests.mounted.records import MIB, Shared, _template, ask, big_bytes, differences, digest, tree, until
from tests.mounted.test_faults import reads
from tests.mounts import is_fuse_mount

pytestmark = pytest.mark.mounted
OPTIONS = ("-o", "push.auto=false", "-o", "cache.high=none", "-o", "deadline_s=5")


class OnDisk(Shared):
    """Project, state and cache on an ext4 of their own; the store elsewhere."""

    def __init__(self, place: Path, disk: Path, records: int) -> None:
        if not _template:  # it must outlive this disk
            _template.append(projects.create(place / "template", [{"size": 1000}], report=False))
        super().__init__(disk, records, OPTIONS)
        self.disk = disk
        self.filler = Filler(disk)
        self.store = place / "store"
        command = self.mounted.command
        command[command.index("--store") + 1] = self.store.as_uri()
        self.mounted.environment["RUNFS_RUNTIME_DIR"] = str(place / "r")
        self.mounted.path = place / "mnt"
        self.mounted.log_path = place / "log"
        command[1] = self.mounted.environment["RUNFS_MOUNT"] = str(self.mounted.path)

    def free(self) -> int:
        room = os.statvfs(self.disk)
        return room.f_bavail * room.f_frsize


@pytest.fixture
def small(tmp_path: Path) -> Iterator[OnDisk]:
    with ext4_disk(tmp_path / "disk", 256) as disk:
        made = OnDisk(tmp_path, disk, 4)
        with made.mounted:
            yield made
        log = made.mounted.log()
        assert "please report this" not in log, log
        assert "Traceback" not in log, log


class TestNoSpace:
    """The disk of the records, the state and the cache takes not one byte more."""

    def test_writers_are_told_before_anything_is_half_written(self, small: OnDisk) -> None:
        """What would have to bring a chunk first, and what goes to a new file."""
        record = small.take("evicted")
        before = tree(record.path.parent / record.uuid / "sub")
        small.filler.fill()

        def in_the_middle() -> None:
            with (record.path / "big.bin").open("r+b", buffering=0) as file:
                file.seek(2 * MIB + 100)
                file.write(b"W" * 5000)

        for what in (
            in_the_middle,
            lambda: (record.path / "new").write_bytes(b"n" * 8192),
            lambda: (record.path / "dir").mkdir(),
        ):
            with pytest.raises(OSError, match="No space"):
                what()
        small.filler.free()
        assert tree(record.path.parent / record.uuid / "sub") == before
        (record.path / "new").unlink(missing_ok=True)
        record.same()
        with (record.path / "big.bin").open("rb") as file:
            file.seek(2 * MIB)
            assert file.read(MIB) == big_bytes()[2 * MIB : 3 * MIB]

    def test_room_can_be_made(self, small: OnDisk) -> None:
        """Eviction needs some room itself: it must work all the same, or nobody gets out of this."""
        record, other = small.take("resident"), small.take("resident")
        assert ask(small.mounted, "push")["exit"] == 0
        small.filler.fill()
        assert small.free() < 8192
        done = ask(small.mounted, "evict", uuids=[record.uuid])
        assert done["exit"] == 0, done
        assert record.working.is_symlink()
        assert small.free() > 4 * MIB
        with (other.path / "new").open("wb") as file:
            file.write(b"there is room again" * 1000)
        (other.plain / "new").write_bytes(b"there is room again" * 1000)
        small.filler.free()
        record.same()
        other.check()

    def test_without_a_mount(self, small: OnDisk) -> None:
        """A daemon that was killed on a full disk starts, or room can be made without it."""
        record = small.take("resident")
        done = ask(small.mounted, "push")
        assert done["exit"] == 0, done
        small.filler.fill()
        small.mounted.kill()
        small.mounted.start()
        done = ask(small.mounted, "evict", uuids=[record.uuid])
        assert done["exit"] == 0, done
        small.filler.free()
        record.same()


def test_a_home_that_may_only_be_read(small: OnDisk) -> None:
    """Its file system went read-only, as ext4 does after an error: reading works, the rest says why, and it goes on."""
    resident, away = small.take("resident"), small.take("evicted")
    bound = small.project.path / "storage"
    subprocess.run(["mount", "--bind", str(bound), str(bound)], check=True)
    try:
        small.mounted.stop()
        small.mounted.start()
        subprocess.run(["mount", "-o", "remount,bind,ro", str(bound)], check=True)
        assert digest(resident.path / "big.bin") == digest(resident.plain / "big.bin")
        away.same()
        for what in (
            lambda: (resident.path / "new").write_bytes(b"n"),
            lambda: (resident.path / "small.txt").open("a"),
            lambda: (resident.path / "small.txt").unlink(),
        ):
            with pytest.raises(OSError, match="Read-only file system"):
                what()
        done = ask(small.mounted, "evict", uuids=[resident.uuid])
        assert done["exit"] == 1
        assert "ead-only" in done["stay"][0]["reason"], done
        assert (resident.working / "id.json").exists()
        subprocess.run(["mount", "-o", "remount,bind,rw", str(bound)], check=True)
        (resident.path / "new").write_bytes(b"n")
        (resident.plain / "new").write_bytes(b"n")
        resident.check()
    finally:
        small.mounted.stop()
        subprocess.run(["umount", "-l", str(bound)], check=True)


def limit(pid: int, what: int, value: int) -> tuple[int, int]:
    """Give a process another limit; the one it had."""
    before = resource.prlimit(pid, what)
    resource.prlimit(pid, what, (value, before[1]))
    return before


class TestFewResources:
    """The daemon runs short of something: who asks gets an error, it goes on, and nothing is lost."""

    @pytest.fixture
    def place(self, tmp_path: Path) -> Iterator[Shared]:
        made = Shared(tmp_path, 3, OPTIONS)
        with made.mounted:
            yield made

    def test_descriptors(self, place: Shared) -> None:
        away, resident = place.take("evicted"), place.take("resident")
        used = len(os.listdir(f"/proc/{place.mounted.pid}/fd"))
        before = limit(place.mounted.pid, resource.RLIMIT_NOFILE, used + 12)
        held = []
        told = 0
        for number in range(60):
            try:
                held.append((resident.path / f"n{number}").open("wb", buffering=0))
                held[-1].write(b"%d" % number)
            except OSError as error:
                told += error.errno in (errno.EMFILE, errno.ENFILE)
        assert told == 60 - len(held) > 20
        assert len(held) > 2
        assert reads(away.path / "big.bin", 60) in ("EMFILE", "EIO", digest(away.plain / "big.bin"))
        answer = ask_anyway(place, "evict", away.uuid)
        resource.prlimit(place.mounted.pid, resource.RLIMIT_NOFILE, before)
        for file in held:
            file.close()
        for path in resident.path.glob("n[0-9]*"):
            assert path.read_bytes() in (path.name[1:].encode(), b"")
            assert path.read_bytes() or path.name not in [Path(file.name).name for file in held]
            (resident.plain / path.name).write_bytes(path.read_bytes())
        away.same()
        assert answer is None or answer["exit"] in (0, 1)
        resident.check()
        away.check()

    def test_memory(self, place: Shared) -> None:
        away, resident, written = place.take("evicted"), place.take("resident"), place.take("evicted")
        status = Path(f"/proc/{place.mounted.pid}/status").read_text()
        size = int(status.split("VmSize:")[1].split()[0]) * 1024
        before = limit(place.mounted.pid, resource.RLIMIT_AS, size + 2 * MIB)
        try:
            said = reads(away.path / "big.bin", 90)
            assert said in ("EIO", "ENOMEM", "ETIMEDOUT", digest(away.plain / "big.bin"))
            with_error = 0
            for number in range(20):
                try:
                    (written.path / f"n{number}").write_bytes(b"%d" % number * 100_000)
                    (written.plain / f"n{number}").write_bytes(b"%d" % number * 100_000)
                except OSError:
                    with_error += 1
                    (written.plain / f"n{number}").unlink(missing_ok=True)
            ask_anyway(place, "evict", resident.uuid)
            ask_anyway(place, "push", written.uuid)
        finally:
            resource.prlimit(place.mounted.pid, resource.RLIMIT_AS, before)
        assert place.mounted.process is not None
        time.sleep(0.5)
        assert place.mounted.process.poll() is None, "the daemon ended for want of memory"
        until(lambda: reads(away.path / "big.bin", 60) == digest(away.plain / "big.bin"), "it reads again", 60)
        for number in range(20):  # what was refused may be there in part
            if not (written.plain / f"n{number}").exists():
                (written.path / f"n{number}").unlink(missing_ok=True)
        for record in (away, resident, written):
            record.check()


def ask_anyway(place: Shared, command: str, uuid: str) -> dict[str, object] | None:
    """A command that may have no answer at all."""
    try:
        return ask(place.mounted, command, uuids=[uuid])
    except Exception:
        return None


@pytest.mark.parametrize("way", ["another path", "another state", "the same state"])
def test_a_second_daemon_by_another_way(tmp_path: Path, way: str) -> None:
    """It refuses, and names the first."""
    place = Shared(tmp_path, 2, OPTIONS)
    second = tmp_path / "second"
    second.mkdir()
    with place.mounted:
        record = place.take("evicted")
        arguments = [each for each in place.mounted.command if each != "--foreground"]
        arguments[1] = str(second)
        if way == "another path":
            (tmp_path / "alias").symlink_to(place.project.path)
            arguments[arguments.index("--project") + 1] = str(tmp_path / "alias")
        environment = dict(place.mounted.environment)
        if way == "another state":
            environment |= {f"RUNFS_{name}_DIR": str(tmp_path / f"x{name}") for name in ("STATE", "CACHE", "RUNTIME")}
        place.mounted.environment, mine = environment, place.mounted.environment
        done = place.mounted.runfs(*arguments)
        place.mounted.environment = mine
        try:
            assert done.returncode == 2, done.stdout + done.stderr
            assert str(place.mounted.path) in done.stderr or str(place.mounted.pid) in done.stderr, done.stderr
            assert not is_fuse_mount(second)
        finally:
            subprocess.run(["fusermount3", "-u", "-z", str(second)], check=False, capture_output=True)
        assert not differences(tree(record.path), tree(record.plain))
