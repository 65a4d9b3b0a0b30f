"""What goes wrong for real: a killed daemon, a store that is gone or silent or lies, a full disk, a second daemon.

Each test has a mount of its own. What may wait in a mount is done in another process with a limit.
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import in_ci
from tests.faults import FaultProxy
from tests.mounted.records import BIG, MIB, Record, Shared, ask, big_bytes, digest, evict, until
from tests.mounts import is_fuse_mount, unmount_under
from tests.servers import Seaweed

pytestmark = pytest.mark.mounted
DEADLINE_S = 2.0
READ_LIMIT_S = 4 * DEADLINE_S + 6  # each replica may take a deadline; and this machine may be slow
QUICK = ("-o", f"deadline_s={DEADLINE_S:g}")


@pytest.fixture
def place(tmp_path: Path) -> Shared:
    """A project of three records, not mounted yet."""
    return Shared(tmp_path, 3, QUICK)


def attempt(code: str, *arguments: object, limit_s: float = READ_LIMIT_S) -> subprocess.CompletedProcess[str]:
    """Python code in another process that must end in time; whatever it ends with."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=limit_s,
    )


READ = "import sys, hashlib; print(hashlib.sha256(open(sys.argv[1], 'rb').read()).hexdigest())"
ERRNO = "import sys, errno\ntry: open(sys.argv[1], 'rb').read()\nexcept OSError as e: print(errno.errorcode[e.errno])"


def reads(path: Path, limit_s: float = READ_LIMIT_S) -> str:
    """The digest of what a reader gets, or the name of its error."""
    code = f"try:\n    {READ}\nexcept OSError as e: import errno; print(errno.errorcode[e.errno])"
    done = attempt(code, path, limit_s=limit_s)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# --- a killed daemon --------------------------------------------------------------------------------------------------

WRITER = """
import os, sys
acknowledged = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
places = sys.argv[2:]
number = 0
try:
    maps = [os.open(place + "/big.bin", os.O_RDWR) for place in places]
    while True:
        for place, big in zip(places, maps):
            number += 1
            content = number.to_bytes(4, "little") * (1 + number * 997 % 30000)
            fd = os.open(f"{place}/w{number}", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            os.write(fd, content)
            if number % 2:
                os.fsync(fd)
                os.write(acknowledged, f"{place} w{number}\\n".encode())
            os.close(fd)
            os.write(acknowledged, f"{place} w{number}\\n".encode())
            os.pwrite(big, number.to_bytes(4, "little") * 1024, number % 700 * 8192)
            os.fsync(big)
            os.write(acknowledged, f"{place} b{number}\\n".encode())
except OSError:
    sys.exit(3)
"""


def check_acknowledged(lines: list[str]) -> int:
    """Every acknowledged write is in the files; slots of big.bin that were not written hold what they held."""
    original = big_bytes()
    checked = 0
    written: dict[str, dict[int, bytes]] = {}
    for line in lines:
        place, what = line.rsplit(" ", 1)
        number = int(what[1:])
        content = number.to_bytes(4, "little")
        if what[0] == "w":
            assert Path(place, what).read_bytes() == content * (1 + number * 997 % 30000), line
        else:
            written.setdefault(place, {})[number % 700 * 8192] = content * 1024
        checked += 1
    for place, slots in written.items():
        big = Path(place, "big.bin").read_bytes()
        assert len(big) == BIG
        last = max(slots)
        for offset in range(0, BIG, 4096):
            want = slots.get(offset, original[offset : offset + 4096])
            if big[offset : offset + 4096] != want:
                # One write may have been on its way: it shows in whole or not at all, in the slot after the last.
                assert offset not in slots, (place, offset)
                assert last < offset <= last + 3 * 8192, (place, offset)
    return checked


def test_killed_while_writing(tmp_path: Path) -> None:
    """Every byte that fsync or close acknowledged is there after kill -9, and gets pushed by the next mount."""
    place = Shared(tmp_path, 2, ("-o", "push.auto=false"))
    manifest = tmp_path / "acknowledged"
    with place.mounted:
        records = [place.take("resident"), place.take("evicted")]
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(manifest), *(str(each.path) for each in records)])
        until(lambda: manifest.exists() and manifest.read_text().count("\n") > 90, "enough was acknowledged", 40)
        place.mounted.kill(unmount_stale=False)
        assert writer.wait(20) == 3
        unmount_under(tmp_path)
        lines = manifest.read_text().splitlines()
        place.mounted.start()
        queued = {each["uuid"] for each in ask(place.mounted, "status")["queue"]}
        assert queued >= {each.uuid for each in records}, "nothing was pending at the kill: this test shows nothing"
        last = next(line for line in reversed(lines) if " w" in line)
        assert not list(place.store.rglob(last.rsplit(" ", 1)[1])), "it was pushed before the kill"
        assert check_acknowledged(lines) == len(lines)
        place.mounted.stop()
        place.mounted.command += ["-o", "push.auto=true"]
        place.mounted.start()
        until(lambda: ask(place.mounted, "status")["queue"] == [], "the next mount pushes", 40)
        for each in records:
            each.evict()
        assert check_acknowledged(lines) == len(lines)


def test_killed_while_evicting_and_hydrating(tmp_path: Path) -> None:
    """Whatever step the kill meets, every record is whole afterwards, in its directory and in the mount."""
    place = Shared(tmp_path, 4)
    waits = random.Random(3)
    with place.mounted:
        records = [place.take("resident") for _ in range(4)]
        for _round in range(4):
            command = ["evict", *(each.uuid for each in records)] if _round % 2 == 0 else ["hydrate", "--restore"]
            command += [] if _round % 2 == 0 else [each.uuid for each in records]
            runs = subprocess.Popen(
                [sys.executable, "-m", "daemon.cli", *command],
                cwd=Path(__file__).parent.parent.parent,
                env=place.mounted.environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            time.sleep(0.5 + waits.random() * 0.6)
            place.mounted.kill()
            runs.wait(20)
            for each in records:  # with no daemon: the whole directory, or a link that leads nowhere
                if not each.working.is_symlink():
                    assert digest(each.working / "big.bin") == digest(each.plain / "big.bin")
            place.mounted.start()
            for each in records:
                each.same()


# --- the mountpoint ---------------------------------------------------------------------------------------------------


class TestMountpoint:
    def test_stale_after_a_kill(self, place: Shared) -> None:
        """The next mount takes the dead one away and says so."""
        with place.mounted:
            record = place.take("evicted")
            place.mounted.kill(unmount_stale=False)
            assert is_fuse_mount(place.mounted.path)
            arguments = [each for each in place.mounted.command if each != "--foreground"]
            done = place.mounted.runfs(*arguments)
            assert done.returncode == 0, done.stderr
            assert "ended without unmounting" in done.stdout + done.stderr
            record.same()
            assert place.mounted.umount().returncode == 0
            assert not is_fuse_mount(place.mounted.path)

    def test_umount_of_a_stale_one(self, place: Shared) -> None:
        with place.mounted:
            place.mounted.kill(unmount_stale=False)
            assert place.mounted.umount().returncode == 0
            assert not is_fuse_mount(place.mounted.path)
            assert list(place.mounted.path.iterdir()) == []

    def test_busy_not_empty_or_missing(self, place: Shared, tmp_path: Path) -> None:
        full = tmp_path / "full"
        full.mkdir()
        (full / "thesis.tex").touch()
        with place.mounted:
            arguments = [each for each in place.mounted.command if each != "--foreground"]
            for where, says in (
                (place.mounted.path, "mounted already"),
                (full, "not empty (thesis.tex)"),
                (tmp_path / "missing", "no such directory"),
            ):
                arguments[1] = str(where)
                done = place.mounted.runfs(*arguments)
                assert done.returncode == 2, done.stderr
                assert says in done.stderr
            assert os.listdir(place.mounted.path)

    def test_a_second_daemon_on_one_index(self, place: Shared, tmp_path: Path) -> None:
        second = tmp_path / "second"
        second.mkdir()
        with place.mounted:
            arguments = [each for each in place.mounted.command if each != "--foreground"]
            arguments[1] = str(second)
            done = place.mounted.runfs(*arguments)
            assert done.returncode == 2
            assert str(place.mounted.path) in done.stderr
            assert not is_fuse_mount(second)
            assert place.take("evicted").uuid in os.listdir(place.mounted.path)

    def test_umount_while_a_file_is_open(self, place: Shared) -> None:
        """It refuses or lets go, and says which; a reader's bytes are right as long as it gets any."""
        with place.mounted:
            record = place.take("evicted")
            with (record.path / "big.bin").open("rb") as file:
                assert file.read(10) == big_bytes()[:10]
                done = place.mounted.umount(timeout=2)
                assert done.returncode == 0 or "open" in done.stderr + done.stdout or "use" in done.stderr + done.stdout


# --- what was not pushed ------------------------------------------------------------------------------------------


def test_umount_says_what_is_not_pushed_and_the_next_mount_pushes(place: Shared) -> None:
    hidden = place.store.with_name("hidden")
    with place.mounted:
        record = place.take("evicted")
        place.store.rename(hidden)
        (record.path / "new").write_bytes(b"only here")
        done = place.mounted.umount(timeout=3)
        assert "not yet in the homes" in done.stdout + done.stderr
        assert done.returncode == 1
        until(lambda: not is_fuse_mount(place.mounted.path), "it is unmounted all the same")
        assert place.mounted.process is not None
        place.mounted.process.wait(30)
        hidden.rename(place.store)
        place.mounted.start()
        until(lambda: ask(place.mounted, "status")["queue"] == [], "the next mount pushes", 30)
        assert [path.read_bytes() for path in place.store.rglob("new")] == [b"only here"]


# --- stores -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def proxy(seaweed: Seaweed) -> Iterator[FaultProxy]:
    with FaultProxy(seaweed.port) as made:
        yield made


@pytest.fixture
def remote(tmp_path: Path, seaweed: Seaweed, proxy: FaultProxy) -> Iterator[Shared]:
    """Mounted, with a real S3 server behind a proxy as its only store, and short deadlines."""
    made = Shared(tmp_path, 3, QUICK)
    made.mounted.environment.update(seaweed.environment())
    url = f"s3://{seaweed.bucket}/{tmp_path.name}?endpoint={proxy.endpoint}&region={seaweed.region}"
    command = made.mounted.command
    command[command.index("--store") + 1] = url
    with made.mounted:
        yield made


def comes_back(record: Record) -> None:
    """Soon after its store does: what is under way to a silent one must end first."""
    right = digest(record.plain / "big.bin")
    until(lambda: reads(record.path / "big.bin") == right, "it can be read again", READ_LIMIT_S)


class TestStoreIsGone:
    @pytest.mark.parametrize("mode", ["refuse", "silent"])
    def test_a_read_ends_others_go_on_and_it_comes_back(self, remote: Shared, proxy: FaultProxy, mode: str) -> None:
        record, resident = remote.take("evicted"), remote.take("resident")
        proxy.set(mode)
        began = time.monotonic()
        waiting = subprocess.Popen([sys.executable, "-c", ERRNO, str(record.path / "big.bin")], stdout=subprocess.PIPE)
        time.sleep(0.3)
        before = time.monotonic()
        assert sorted(os.listdir(record.path)) == sorted(os.listdir(record.plain))
        assert (record.path / "small.txt").read_bytes() == (record.plain / "small.txt").read_bytes()
        assert os.stat(record.path / "big.bin").st_size == BIG
        assert digest(resident.path / "big.bin") == digest(resident.plain / "big.bin")
        assert time.monotonic() - before < 2.0
        told, _ = waiting.communicate(timeout=READ_LIMIT_S)
        assert told.decode().strip() in ("EIO", "ETIMEDOUT", "EHOSTUNREACH")
        assert time.monotonic() - began < READ_LIMIT_S
        proxy.set("pass")
        comes_back(record)
        record.same()

    def test_sigkill_frees_a_reader_at_once(self, remote: Shared, proxy: FaultProxy) -> None:
        record = remote.take("evicted")
        proxy.set("silent")
        reader = subprocess.Popen([sys.executable, "-c", READ, str(record.path / "big.bin")], stderr=subprocess.DEVNULL)
        until(lambda: bool(ask(remote.mounted, "status")["waiting"]), "it waits and status shows it", 5)
        assert ask(remote.mounted, "status")["waiting"][0]["pid"] == reader.pid
        began = time.monotonic()
        reader.send_signal(signal.SIGKILL)
        reader.wait(READ_LIMIT_S)
        assert time.monotonic() - began < 0.5
        proxy.set("pass")
        until(lambda: not ask(remote.mounted, "status")["waiting"], "nobody waits any more", READ_LIMIT_S)
        comes_back(record)

    def test_writes_that_must_wait_end_at_the_deadline(self, remote: Shared, proxy: FaultProxy) -> None:
        record = remote.take("evicted")
        proxy.set("silent")
        for code in (
            "os.truncate(sys.argv[1], 1_500_000)",
            "fd = os.open(sys.argv[1], os.O_WRONLY); os.pwrite(fd, b'x', 3_500_000)",
        ):
            began = time.monotonic()
            done = attempt(f"import os, sys\ntry:\n    {code}\nexcept OSError: sys.exit(7)", record.path / "big.bin")
            assert done.returncode == 7
            assert time.monotonic() - began < DEADLINE_S + 4
        proxy.set("pass")
        record.check()

    def test_down_at_mount(self, remote: Shared, proxy: FaultProxy) -> None:
        record, resident = remote.take("evicted"), remote.take("resident")
        assert remote.mounted.umount().returncode == 0
        proxy.set("silent")
        remote.mounted.start()
        assert digest(resident.path / "big.bin") == digest(resident.plain / "big.bin")
        assert (record.path / "small.txt").read_bytes() == (record.plain / "small.txt").read_bytes()
        assert reads(record.path / "big.bin") in ("EIO", "ETIMEDOUT", "EHOSTUNREACH")
        proxy.set("pass")
        comes_back(record)
        record.same()

    def test_a_store_in_a_directory_that_is_unplugged(self, place: Shared) -> None:
        hidden = place.store.with_name("hidden")
        with place.mounted:
            record = place.take("evicted")
            place.store.rename(hidden)
            assert reads(record.path / "big.bin") in ("EIO", "EHOSTUNREACH")
            (record.path / "new").write_bytes(b"written meanwhile")
            place.store.mkdir()  # the empty mountpoint of a disk that is not there must not look like a store
            assert reads(record.path / "big.bin") in ("EIO", "EHOSTUNREACH")
            assert ask(place.mounted, "push", uuids=[record.uuid])["exit"] == 1
            place.store.rmdir()
            hidden.rename(place.store)
            comes_back(record)
            record.evict()
            assert (record.path / "new").read_bytes() == b"written meanwhile"


# --- wrong bytes --------------------------------------------------------------------------------------------------


def spoil(store: Path) -> None:
    """Turn one bit in the middle of every copy of big.bin in a store."""
    found = [path for path in store.rglob("*") if path.is_file() and path.stat().st_size == BIG]
    assert found
    for path in found:
        with path.open("r+b") as file:
            file.seek(BIG // 2)
            byte = file.read(1)[0]
            file.seek(BIG // 2)
            file.write(bytes([byte ^ 1]))


class TestWrongBytes:
    def test_nobody_sees_them_and_status_explains(self, place: Shared) -> None:
        with place.mounted:
            record = place.take("evicted")
            spoil(place.store)
            assert reads(record.path / "big.bin") == "EIO"
            with (record.path / "big.bin").open("rb") as file:  # what is right can be had
                assert file.read(MIB) == big_bytes()[:MIB]
            said = place.mounted.runfs("status", str(record.path / "big.bin"))
            assert "right bytes" in said.stdout + said.stderr
            assert "right bytes" in place.mounted.log()
            assert digest(record.path / "log.txt") == digest(record.plain / "log.txt")

    def test_the_other_replica_is_used(self, tmp_path: Path) -> None:
        place = Shared(tmp_path, 1, QUICK)
        second = tmp_path / "second store"
        place.mounted.command += ["--store", second.as_uri()]
        with place.mounted:
            record = place.take("evicted")
            spoil(place.store)
            assert reads(record.path / "big.bin") == digest(record.plain / "big.bin")
            assert "right bytes" in place.mounted.log()

    def test_a_damaged_copy_is_no_proof(self, tmp_path: Path) -> None:
        """A record whose copies are proven anew is not dropped on the word of a store that lost it."""
        place = Shared(tmp_path, 1, (*QUICK, "-o", "proof.max_age=0"))
        with place.mounted:
            record = place.take("resident")
            assert ask(place.mounted, "push", uuids=[record.uuid])["exit"] == 0
            spoil(place.store)
            answer = ask(place.mounted, "evict", uuids=[record.uuid])
            assert answer["exit"] == 1
            assert answer["evicted"] == []
            assert not record.working.is_symlink()
            record.same()


# --- a full disk --------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MiB for the cache."""
    disk = tmp_path / "small disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)]
    made = subprocess.run(command, capture_output=True, text=True)
    if made.returncode != 0:
        if in_ci():
            pytest.fail(f"no tmpfs can be mounted: {made.stderr}")
        pytest.skip(f"mounting a small file system needs root: {made.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def overfill(path: Path) -> None:
    """Write more than the small disk holds."""
    with path.open("wb", buffering=0) as file:
        for _ in range(80):
            file.write(b"m" * MIB)


class TestFullDisk:
    SIZE = 96 * MIB

    def test_reads_and_writes_say_so_and_nothing_is_wrong(self, tmp_path: Path, small_disk: Path) -> None:
        place = Shared(tmp_path, 2, (*QUICK, "-o", "cache.high=none"))
        place.mounted.environment["RUNFS_CACHE_DIR"] = str(small_disk)

        def make(directory: Path) -> None:
            with (directory / "huge.bin").open("wb") as file:
                for number in range(self.SIZE // MIB):
                    file.write(number.to_bytes(4, "little") * (MIB // 4))

        with place.mounted:
            record = place.take("evicted", make)
            huge = record.path / "huge.bin"
            assert reads(huge, 60) == "ENOSPC"
            kept = 0
            with huge.open("rb") as file:
                for number in range(self.SIZE // MIB):
                    try:
                        assert file.read(MIB) == number.to_bytes(4, "little") * (MIB // 4)
                    except OSError:
                        break
                    kept += 1
            assert 0 < kept < self.SIZE // MIB
            with pytest.raises(OSError, match="No space"):
                overfill(record.path / "mine")
            written = (record.path / "mine").read_bytes()
            assert written == b"m" * len(written)
            (record.path / "mine").unlink()
            answer = ask(place.mounted, "hydrate", uuids=[record.uuid])
            assert answer["exit"] == 1
            assert "space" in answer["failed"][0]["reason"]
            evict(place.mounted, record.uuid)  # makes room
            with huge.open("rb") as file:
                file.seek(90 * MIB)
                assert file.read(MIB) == (90).to_bytes(4, "little") * (MIB // 4)
            subprocess.run(["mount", "-o", "remount,size=256m", str(small_disk)], check=True)
            assert reads(huge, 60) == digest(record.plain / "huge.bin")
            record.same()

    def test_an_eviction_that_does_not_fit_leaves_all_as_it_was(self, tmp_path: Path, small_disk: Path) -> None:
        place = Shared(tmp_path, 1, (*QUICK, "-o", "cache.high=none", "-o", "cache.keep_small=1G"))
        place.mounted.environment["RUNFS_CACHE_DIR"] = str(small_disk)
        with place.mounted:
            record = place.take("resident", lambda at: (at / "huge.bin").write_bytes(b"h" * self.SIZE))
            answer = ask(place.mounted, "evict", uuids=[record.uuid])
            assert answer["exit"] == 1
            assert "space" in answer["stay"][0]["reason"]
            assert not record.working.is_symlink()
            record.same()
