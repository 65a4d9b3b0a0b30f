"""What only a directory store must do: stay inside, be durable, never take an unmounted disk for an empty store."""

import errno
import fcntl
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vfs.errors import ConfigError, Conflict, NotFound, StoreTimeout, Unreachable
from vfs.stores import keys, open_store, places, validate
from vfs.stores.file import FileStore


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "disk" / "store"


@pytest.fixture
def store(root: Path) -> FileStore:
    root.parent.mkdir()
    return FileStore(root)


def names(store: FileStore) -> set[str]:
    return {stat.key for stat in store.list()}


class TestTheDirectory:
    def test_is_made_when_its_parent_is_there(self, store: FileStore, root: Path) -> None:
        assert root.is_dir()

    def test_is_refused_when_its_parent_is_not(self, tmp_path: Path) -> None:
        with pytest.raises(Unreachable, match="mounted"):
            FileStore(tmp_path / "no" / "store")
        assert not (tmp_path / "no").exists()

    def test_a_used_store_that_is_empty_now_is_unreachable(self, root: Path) -> None:
        root.mkdir(parents=True)
        with pytest.raises(Unreachable, match=r"no \.runfs-store now"):
            FileStore(root, used=True)
        assert list(root.iterdir()) == []

    def test_a_used_store_that_is_gone_is_not_made(self, root: Path) -> None:
        root.parent.mkdir()
        with pytest.raises(Unreachable, match="mounted"):
            FileStore(root, used=True)
        assert not root.exists()

    def test_a_disk_that_vanishes_meanwhile(self, store: FileStore, root: Path) -> None:
        store.write("u/a", b"x")
        aside = root.with_name("aside")
        root.rename(aside)
        root.mkdir()
        for call in (lambda: store.stat("u/a"), lambda: store.write("u/b", b"x"), lambda: list(store.list())):
            with pytest.raises(Unreachable, match="mounted"):
                call()
        assert list(root.iterdir()) == []
        root.rmdir()
        with pytest.raises(Unreachable, match="mounted"):
            store.read("u/a")
        aside.rename(root)
        assert store.read("u/a") == b"x"

    def test_another_disk_in_its_place(self, store: FileStore, root: Path) -> None:
        store.write("u/a", b"x")
        root.rename(root.with_name("aside"))
        FileStore(root).write("u/a", b"y")
        with pytest.raises(Unreachable, match="another store"):
            store.read("u/a")

    def test_reading_leaves_no_marker(self, store: FileStore, root: Path) -> None:
        with pytest.raises(NotFound):
            store.stat("u/a")
        assert list(root.iterdir()) == []
        store.write("u/a", b"x")
        assert FileStore(root, used=True).read("u/a") == b"x"

    def test_any_tool_can_read_it(self, store: FileStore, root: Path) -> None:
        store.write("u/a/b.txt", b"x")
        assert (root / "u" / "a" / "b.txt").read_bytes() == b"x"
        (root / "u" / "by hand.txt").write_bytes(b"hand")
        assert names(store) == {"u/a/b.txt", "u/by hand.txt"}
        assert store.read("u/by hand.txt") == b"hand"


class TestStayingInside:
    @pytest.fixture
    def outside(self, tmp_path: Path) -> Path:
        made = tmp_path / "outside"
        made.mkdir()
        (made / "secret").write_bytes(b"secret")
        return made

    def test_links_to_directories_are_not_followed(self, store: FileStore, root: Path, outside: Path) -> None:
        (root / "u").symlink_to(outside)
        with pytest.raises(NotFound):
            store.read("u/secret")
        store.write("u/new", b"mine")
        assert store.read("u/new") == b"mine"
        store.delete("u/secret")
        assert {each.name: each.read_bytes() for each in outside.iterdir()} == {"secret": b"secret"}
        assert names(store) == {"u/new"}
        assert any("'u'" in problem for problem in store.problems)

    def test_links_to_files_are_neither_read_nor_written_through(
        self, store: FileStore, root: Path, outside: Path
    ) -> None:
        (root / "u").mkdir()
        (root / "u" / "link").symlink_to(outside / "secret")
        with pytest.raises(NotFound):
            store.read("u/link")
        store.write("u/link", b"mine")
        assert store.read("u/link") == b"mine"
        assert (outside / "secret").read_bytes() == b"secret"

    def test_a_link_in_place_of_the_temporary_area(self, store: FileStore, root: Path, outside: Path) -> None:
        (root / places.TEMPORARY).symlink_to(outside)
        with pytest.raises(Exception, match="Not a directory"):
            store.write("u/a", b"x")
        assert [each.name for each in outside.iterdir()] == ["secret"]

    def test_things_that_are_no_files_are_reported(self, store: FileStore, root: Path) -> None:
        (root / "u").mkdir()
        os.mkfifo(root / "u" / "fifo")
        (root / "u" / os.fsdecode(b"bad\xff")).write_bytes(b"x")
        (root / "u" / "ends with space ").write_bytes(b"x")
        (root / places.ALTERNATIVE).mkdir()
        (root / places.ALTERNATIVE / "not=ours").write_bytes(b"x")
        store.write("u/a", b"x")
        assert names(store) == {"u/a"}
        assert len(store.problems) == 4
        with pytest.raises(NotFound):
            store.read("u/fifo")


class TestPlaces:
    def test_every_key_has_its_own_and_comes_back(self) -> None:
        made = ["a", "a/b", "a+b".replace("+", "%2B"), "x" * 199, "x" * 200, "x" * 201, "x" * 400, "x" * 401]
        made += ["/".join(["part"] * 100), keys.encode(b"\xff" * 84)]
        found = {places.alternative(key): key for key in made}
        assert len(found) == len(made)
        assert all(places.key_of_alternative(place[1:]) == key for place, key in found.items())
        assert all(len(name) <= 201 for place in found for name in place)

    def test_parts_longer_than_a_file_name(self, store: FileStore) -> None:
        key = "u/" + "y" * 600
        store.write(key, b"long", if_absent=True)
        with pytest.raises(Conflict):
            store.write(key, b"other", if_absent=True)
        assert store.read(key) == b"long"
        assert names(store) == {key}
        store.delete(key)
        assert names(store) == set()

    def test_an_object_keeps_its_place_while_it_exists(self, store: FileStore) -> None:
        store.write("u/a", b"1")
        store.write("u/a/b", b"2")
        store.delete("u/a")
        store.write("u/a/b", b"3")
        assert store.read("u/a/b") == b"3"
        assert [stat.key for stat in store.list()] == ["u/a/b"]
        store.delete("u/a/b")
        assert names(store) == set()


class TestDurability:
    def test_the_file_is_synced_before_it_has_its_name_and_the_directory_after(
        self, store: FileStore, root: Path, tmp_path: Path
    ) -> None:
        strace = shutil.which("strace")
        if strace is None:
            pytest.skip("strace is not installed")
        trace = tmp_path / "trace"
        code = f"from vfs.stores import open_store; open_store('file://{root}').write('u/new/a', b'x' * 100)"
        calls = "trace=fsync,link,linkat,rename,renameat,renameat2,mkdirat"
        subprocess.run([strace, "-f", "-y", "-e", calls, "-o", trace, sys.executable, "-c", code], check=True)
        steps = [line.split(" ", 1)[1].strip() for line in trace.read_text().splitlines() if "store" in line]
        named = next(at for at, step in enumerate(steps) if "linkat" in step and '"a"' in step)
        temporary = steps[named].split('"')[1]
        assert any(step.startswith("fsync") and temporary in step for step in steps[:named])
        assert any(step.startswith("fsync") and "/u/new>" in step for step in steps[named:])
        assert any(step.startswith("fsync") and "/u>" in step for step in steps[:named])

    def test_temporary_files_go_and_old_ones_are_swept(self, store: FileStore, root: Path) -> None:
        store.write("u/a", b"x")
        area = root / places.TEMPORARY
        assert [each.name for each in area.iterdir()] == ["lock"]
        (area / "old").write_bytes(b"x")
        os.utime(area / "old", (1, 1))
        (area / "young").write_bytes(b"x")
        FileStore(root).write("u/b", b"x")
        assert {each.name for each in area.iterdir()} == {"lock", "young"}

    def test_a_crash_before_the_name_leaves_nothing_visible(self, store: FileStore, root: Path) -> None:
        code = (
            "import os\n"
            "from vfs.stores import open_store\n"
            f"store = open_store('file://{root}')\n"
            "store.upload('u/a', lambda offset, length: os._exit(9) if offset else bytes(length), 20 * 2**20)\n"
        )
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
        assert names(store) == set()

    def test_the_lock_is_waited_for_and_not_for_ever(self, store: FileStore, root: Path) -> None:
        store.write("u/a", b"x")
        with (root / places.TEMPORARY / "lock").open("rb+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with pytest.raises(StoreTimeout, match="lock"):
                store.write("u/a", b"y", deadline=0.2)
            threading.Timer(0.2, lambda: fcntl.flock(lock, fcntl.LOCK_UN)).start()
            store.write("u/a", b"z", deadline=5)
        assert store.read("u/a") == b"z"

    def test_two_processes_cannot_both_win(self, store: FileStore, root: Path) -> None:
        version = store.write("u/a", b"base").version
        code = (
            "import sys\n"
            "from vfs.errors import Conflict\n"
            "from vfs.stores import open_store\n"
            f"store = open_store('file://{root}')\n"
            "sys.stdin.read(1)\n"
            f"try: store.write('u/a', sys.argv[1].encode(), if_version={version!r})\n"
            "except Conflict: sys.exit(3)\n"
        )
        racing = [
            subprocess.Popen([sys.executable, "-c", code, f"writer {number}"], stdin=subprocess.PIPE)
            for number in range(4)
        ]
        for each in racing:
            each.communicate(b"g", timeout=30)
        codes = [each.returncode for each in racing]
        assert sorted(codes) == [0, 3, 3, 3]
        assert store.read("u/a") == b"writer %d" % codes.index(0)

    def test_the_deadline_of_an_upload(self, store: FileStore) -> None:
        def slow(offset: int, length: int) -> bytes:
            time.sleep(0.1)
            return bytes(length)

        with pytest.raises(StoreTimeout):
            store.upload("u/a", slow, 100 * 2**20, deadline=0.15)
        assert names(store) == set()


class TestCopying:
    DATA = random.Random(7).randbytes(9_000_001)

    def test_is_the_file_systems_work(self, store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
        store.write("u/a", self.DATA)

        def never(*_: object) -> bytes:
            raise AssertionError("the bytes came through here")

        with monkeypatch.context() as patched:
            patched.setattr(os, "pread", never)
            assert store.copy("u/a", "u/b").size == len(self.DATA)
        assert store.read("u/b") == self.DATA

    @pytest.mark.parametrize("why", [errno.EXDEV, errno.EOPNOTSUPP, 0])
    def test_where_it_cannot_they_come_through_here(
        self, store: FileStore, monkeypatch: pytest.MonkeyPatch, why: int
    ) -> None:
        store.write("u/a", self.DATA)

        def unable(*_: object) -> int:
            if why:
                raise OSError(why, os.strerror(why))
            return 0

        monkeypatch.setattr(os, "copy_file_range", unable)
        store.copy("u/a", "u/b")
        assert store.read("u/b") == self.DATA

    def test_one_that_is_cut_meanwhile(self, store: FileStore, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        store.write("u/a", self.DATA)
        honest = os.copy_file_range

        def cutting(*arguments: int) -> int:
            os.truncate(root / "u" / "a", 1_000_000)
            return honest(*arguments)

        monkeypatch.setattr(os, "copy_file_range", cutting)
        with pytest.raises(Conflict, match="became shorter meanwhile"):
            store.copy("u/a", "u/b")
        assert names(store) == {"u/a"}


class TestMoving:
    def test_the_file_itself_moves(self, store: FileStore, root: Path) -> None:
        written = store.write("u/a", b"content")
        number = (root / "u" / "a").stat().st_ino
        moved = store.move("u/a", "v/b/c", if_absent=True)
        assert (root / "v" / "b" / "c").stat().st_ino == number
        assert (moved.size, moved.modified_ns) == (written.size, written.modified_ns)
        assert not (root / "u").exists()

    def test_to_below_itself_and_back(self, store: FileStore) -> None:
        store.write("u/a", b"content")
        store.move("u/a", "u/a/b")
        assert names(store) == {"u/a/b"}
        store.move("u/a/b", "u/a")
        assert names(store) == {"u/a"}
        assert store.read("u/a") == b"content"

    @pytest.mark.parametrize("target", ["v/new", "v/there"])
    def test_a_crash_leaves_both_or_the_target_never_neither(self, store: FileStore, root: Path, target: str) -> None:
        """The process ends after each of the calls that change names; then the move is made again."""
        for step in range(6):
            store.write("u/a", b"content")
            store.write("v/there", b"before")
            code = (
                "import os\n"
                "from vfs.stores import open_store\n"
                f"store, left = open_store('file://{root}'), {step}\n"
                "def dying(call):\n"
                "    def counted(*args, **options):\n"
                "        global left\n"
                "        result, left = call(*args, **options), left - 1\n"
                "        return os._exit(9) if left < 0 else result\n"
                "    return counted\n"
                "for name in ('link', 'rename', 'unlink', 'rmdir', 'mkdir'):\n"
                "    setattr(os, name, dying(getattr(os, name)))\n"
                f"store.move('u/a', {target!r})\n"
            )
            done = subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode
            found = {stat.key: store.read(stat.key) for stat in store.list()}
            assert b"content" in (found.get("u/a"), found.get(target))
            assert found.get(target) in ((None, b"content") if target == "v/new" else (b"before", b"content"))
            assert set(found) <= {"u/a", "v/there", target}
            if "u/a" in found:
                store.move("u/a", target)
            assert store.read(target) == b"content"
            assert "u/a" not in names(store)
            store.delete(target)
            if done == 0:
                break
        assert done == 0
        assert step > 0

    def test_two_names_of_one_file_become_one(self, store: FileStore, root: Path) -> None:
        """What a crash between the link and the unlink leaves."""
        store.write("u/a", b"content")
        (root / "v").mkdir()
        os.link(root / "u" / "a", root / "v" / "b")
        assert store.move("u/a", "v/b").size == 7
        assert names(store) == {"v/b"}
        assert store.read("v/b") == b"content"

    def test_races_of_movers(self, store: FileStore) -> None:
        store.write("u/a", b"content")
        barrier = threading.Barrier(8)

        def race(number: int) -> bool:
            barrier.wait(10)
            try:
                store.move("u/a", f"v/{number}", if_absent=True)
            except NotFound:
                return False
            return True

        with ThreadPoolExecutor(8) as pool:
            assert sum(pool.map(race, range(8))) == 1
        assert len(names(store)) == 1


class TestSweeping:
    def test_by_age_and_never_objects_or_the_lock(self, store: FileStore, root: Path) -> None:
        store.write("u/a", b"x")
        os.utime(root / "u" / "a", (1, 1))
        area = root / places.TEMPORARY
        for name, age in (("old", 7200), ("young", 60)):
            (area / name).write_bytes(b"x")
            os.utime(area / name, (time.time() - age, time.time() - age))
        os.utime(area / "lock", (1, 1))
        assert store.sweep(3600) == 1
        assert {each.name for each in area.iterdir()} == {"lock", "young"}
        assert store.sweep(30) == 1
        assert names(store) == {"u/a"}

    def test_an_upload_under_way_is_not_swept(self, store: FileStore) -> None:
        def source(offset: int, length: int) -> bytes:
            assert FileStore(store.local_path("u/a").parent.parent).sweep(5) == 0  # type: ignore[union-attr]
            return bytes(length)

        store.write("u/a", b"x")
        assert store.upload("u/b", source, 9 * 2**20).size == 9 * 2**20


class TestConfiguration:
    def test_urls(self, root: Path) -> None:
        root.parent.mkdir()
        store = open_store(f"file://{root}")
        assert store.name == "store"
        assert store.url == f"file://{root}"
        assert open_store(f"file://{root}", name="disk").name == "disk"
        assert validate(f"file://{root}") == []

    @pytest.mark.parametrize(
        "url", ["file://host/dir", "file://", "file:///", "file:///d?reed_only=1", "file:///d?read_only=maybe"]
    )
    def test_bad_ones(self, url: str) -> None:
        with pytest.raises(ConfigError):
            open_store(url)

    def test_odd_directory_names(self, tmp_path: Path) -> None:
        (tmp_path / "a b%").mkdir()
        store = open_store(f"file://{tmp_path}/a%20b%25/st%C3%BC%FF")
        store.write("u/a", b"x")
        assert (Path(os.fsdecode(os.fsencode(tmp_path) + b"/a b%/st\xc3\xbc\xff")) / "u" / "a").read_bytes() == b"x"
