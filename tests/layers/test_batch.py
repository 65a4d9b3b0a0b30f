"""Many files of a store at once: each one reported, none stopping another, nothing outside the directory."""

import itertools
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vfs.errors import Conflict, NotFound, StoreError, StoreTimeout, Unreachable, UsageError
from vfs.events import Ended, Event, Events, Started
from vfs.stores import Store, keys, open_store
from vfs.stores.batch import (
    Cancelled,
    Outcome,
    Wanted,
    delete_files,
    list_files,
    list_pages,
    local_files,
    move_files,
    read_files,
    upload_files,
)
from vfs.stores.memory import MemoryStore

MIB = 1024 * 1024


@pytest.fixture
def memory() -> MemoryStore:
    return MemoryStore("lab")


@pytest.fixture
def disk(tmp_path: Path) -> Store:
    return open_store(f"file://{tmp_path}/store", name="disk")


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "target"


def by_key(outcomes: Iterable[Outcome]) -> dict[str, Outcome]:
    every = list(outcomes)
    found = {outcome.key: outcome for outcome in every}
    assert len(found) == len(every)
    return found


def tree(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


class TestListing:
    def test_files_and_pages(self, memory: MemoryStore) -> None:
        wanted = {f"u/{number}": number for number in range(25)}
        for key, size in wanted.items():
            memory.write(key, bytes(size))
        memory.write("u/deep/x", b"1")
        assert dict(list_files(memory, "u/", recursive=False)) == wanted
        assert dict(list_files(memory)) == {**wanted, "u/deep/x": 1}
        pages = list(list_pages(memory, "u/", page=10))
        assert [len(page) for page in pages] == [10, 10, 6]
        assert dict(itertools.chain(*pages)) == {**wanted, "u/deep/x": 1}
        assert list(list_pages(memory, "none/")) == []


class TestReading:
    @pytest.mark.parametrize("size", [0, 1, 8 * MIB, 8 * MIB + 1, 17 * MIB])
    def test_whole_files(self, memory: MemoryStore, disk: Store, target: Path, size: int) -> None:
        data = random.Random(size).randbytes(size)
        for store, verified in ((memory, True), (disk, False)):
            store.write("u/d/a.bin", data)
            outcome = next(read_files(store, ["u/d/a.bin"], target))
            assert outcome == Outcome("u/d/a.bin", target / "u/d/a.bin", size, verified=verified)
            assert tree(target) == {"u/d/a.bin": data}

    def test_names_are_those_that_the_keys_stand_for(self, memory: MemoryStore, target: Path) -> None:
        paths = [b"u/a b", b"u/\xff", "u/ü".encode(), b"u/a%20"]
        for path in paths:
            memory.write(keys.encode(path), path)
        outcomes = list(read_files(memory, [key for key, _ in list_files(memory)], target))
        assert [outcome.error for outcome in outcomes] == [None] * 4
        assert {os.fsencode(outcome.path or "")[len(os.fsencode(target)) + 1 :] for outcome in outcomes} == set(paths)

    def test_each_failure_is_its_own(self, memory: MemoryStore, target: Path) -> None:
        memory.write("u/a", b"1")
        memory.write("u/b", b"22")

        def before(operation: str, key: str) -> None:
            if key == "u/b":
                raise Unreachable("no connection")

        memory.before = before
        found = by_key(read_files(memory, ["u/none", "u/a", "u/b", "bad//key"], target))
        assert isinstance(found["u/none"].error, NotFound)
        assert isinstance(found["u/b"].error, Unreachable)
        assert isinstance(found["bad//key"].error, UsageError)
        assert found["u/a"].error is None
        assert tree(target) == {"u/a": b"1"}

    def test_ranges(self, memory: MemoryStore, target: Path) -> None:
        data = random.Random(1).randbytes(20 * MIB)
        memory.write("u/a", data)
        wanted = [
            Wanted("u/a", "head", 0, 10),
            Wanted("u/a", "middle", 5, 9 * MIB),
            Wanted("u/a", "tail", 20 * MIB - 3, 10),
            Wanted("u/a", "beyond", 21 * MIB, 10),
        ]
        assert {outcome.error for outcome in read_files(memory, wanted, target)} == {None}
        assert tree(target) == {
            "head": data[:10],
            "middle": data[5 : 5 + 9 * MIB],
            "tail": data[-3:],
            "beyond": b"",
        }
        with pytest.raises(UsageError):
            Wanted("u/a", start=-1)

    def test_partial_links_where_the_store_has_a_file(self, memory: MemoryStore, disk: Store, target: Path) -> None:
        for store in (memory, disk):
            store.write("u/a", b"content")
        outcome = next(read_files(disk, ["u/a"], target, partial=True))
        assert (outcome.path, outcome.size) == (target / "u/a", 0)
        assert (target / "u/a").is_symlink()
        assert (target / "u/a").read_bytes() == b"content"
        next(read_files(disk, [Wanted("u/a", "part", 1, 2)], target, partial=True))
        assert not (target / "part").is_symlink()
        found = by_key(read_files(disk, ["u/none"], target, partial=True))
        assert isinstance(found["u/none"].error, NotFound)
        next(read_files(memory, ["u/a"], target, partial=True))
        assert not (target / "u/a").is_symlink()
        assert disk.read("u/a") == b"content"

    def test_replaces_whole_and_leaves_no_parts(self, memory: MemoryStore, target: Path) -> None:
        target.mkdir()
        (target / "a").write_bytes(b"before, and longer")
        memory.write("a", b"after")
        list(read_files(memory, ["a"], target))
        assert tree(target) == {"a": b"after"}
        memory.before = lambda operation, key: time.sleep(0)
        memory.write("a", b"newer")

        class Broken(MemoryStore):
            def read_into(self, *args: Any, **kwargs: Any) -> int:
                raise StoreError("the connection was cut")

        broken = Broken("broken", objects=memory._objects)
        assert isinstance(next(read_files(broken, ["a"], target)).error, StoreError)
        assert tree(target) == {"a": b"after"}

    def test_a_directory_that_is_not_there(self, memory: MemoryStore, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            list(read_files(memory, ["a"], tmp_path / "no" / "where"))


class TestBadNames:
    @pytest.mark.parametrize("name", ["..", "../a", "a/../../b", "/etc/passwd", "a//b", "./a", "", "a/", "a\0b"])
    def test_a_name_that_leads_out_is_refused(self, memory: MemoryStore, target: Path, name: str) -> None:
        memory.write("a", b"1")
        outcome = next(read_files(memory, [Wanted("a", name)], target))
        assert isinstance(outcome.error, UsageError)
        assert set(target.parent.iterdir()) <= {target}
        assert list(target.iterdir()) == []

    def test_a_key_that_stands_for_one_too(self, memory: MemoryStore, target: Path) -> None:
        key = keys.encode(b"../outside")
        memory.write(key, b"1")
        assert isinstance(next(read_files(memory, [key], target)).error, UsageError)
        assert list(target.iterdir()) == []

    def test_links_in_the_directory_are_not_followed(self, memory: MemoryStore, target: Path, tmp_path: Path) -> None:
        outside = tmp_path / "outside"
        outside.mkdir()
        (outside / "file").write_bytes(b"theirs")
        target.mkdir()
        (target / "way").symlink_to(outside)
        (target / "leaf").symlink_to(outside / "file")
        (target / "file").write_bytes(b"")
        for key in ("way/a", "leaf", "file/below"):
            memory.write(key, b"ours")
        found = by_key(read_files(memory, ["way/a", "leaf", "file/below"], target))
        assert isinstance(found["way/a"].error, UsageError)
        assert isinstance(found["file/below"].error, UsageError)
        assert "in the way" in str(found["way/a"].error)
        assert found["leaf"].error is None
        assert (target / "leaf").read_bytes() == b"ours"
        assert not (target / "leaf").is_symlink()
        assert tree(outside) == {"file": b"theirs"}

    def test_a_directory_has_the_name(self, memory: MemoryStore, target: Path) -> None:
        (target / "a").mkdir(parents=True)
        memory.write("a", b"1")
        assert isinstance(next(read_files(memory, ["a"], target)).error, OSError)
        assert [path.name for path in target.iterdir()] == ["a"]


class TestLyingStores:
    @pytest.mark.parametrize("size", [10, 9 * MIB])
    @pytest.mark.parametrize("by", [-1, 1])
    def test_another_size_than_was_said(self, target: Path, size: int, by: int) -> None:
        class Lying(MemoryStore):
            def stat(self, key: str, *, deadline: float | None = None) -> Any:
                from dataclasses import replace

                return replace(super().stat(key), size=size - by)

        store = Lying("lying")
        store.write("a", bytes(size))
        assert isinstance(next(read_files(store, ["a"], target)).error, StoreError)
        assert list(target.iterdir()) == []

    def test_replaced_between_two_pieces(self, memory: MemoryStore, target: Path) -> None:
        memory.write("a", bytes(9 * MIB))
        reads = 0

        def before(operation: str, key: str) -> None:
            nonlocal reads
            reads += operation == "read"
            if reads == 2:
                memory.before = None
                memory.write("a", b"\1" * (9 * MIB))

        memory.before = before
        outcome = next(read_files(memory, ["a"], target))
        assert isinstance(outcome.error, Conflict)
        assert list(target.iterdir()) == []

    def test_bytes_that_do_not_fit_its_checksum_are_not_called_verified(self, target: Path) -> None:
        class Lying(MemoryStore):
            def read(self, *args: Any, **kwargs: Any) -> bytes:
                return super().read(*args, **kwargs).replace(b"1", b"2")

        store = Lying("lying")
        store.write("a", b"1")
        assert not next(read_files(store, ["a"], target)).verified


class TestUploading:
    def test_files(self, memory: MemoryStore, tmp_path: Path) -> None:
        small, large = tmp_path / "small", tmp_path / "large"
        small.write_bytes(b"1")
        data = random.Random(2).randbytes(9 * MIB)
        large.write_bytes(data)
        os.mkfifo(tmp_path / "fifo")
        memory.write("taken", b"theirs")
        pairs = [
            (small, "u/small"),
            (large, "u/large"),
            (tmp_path / "none", "u/none"),
            (tmp_path / "fifo", "u/fifo"),
            (tmp_path, "u/directory"),
            (small, "not a key"),
            (small, "taken"),
        ]
        found = by_key(upload_files(memory, pairs, if_absent=True))
        assert found["u/small"] == Outcome("u/small", small, 1, verified=True)
        assert found["u/large"].size == 9 * MIB
        assert isinstance(found["u/none"].error, FileNotFoundError)
        assert isinstance(found["u/fifo"].error, UsageError)
        assert isinstance(found["u/directory"].error, UsageError)
        assert isinstance(found["not a key"].error, UsageError)
        assert isinstance(found["taken"].error, Conflict)
        assert memory.read("u/large") == data
        assert {key for key, _ in list_files(memory)} == {"u/small", "u/large", "taken"}

    def test_a_file_that_changes_meanwhile_is_told(self, memory: MemoryStore, tmp_path: Path) -> None:
        file = tmp_path / "log"
        file.write_bytes(b"1")

        def before(operation: str, key: str) -> None:
            with file.open("ab") as stream:
                stream.write(b"2")

        memory.before = before
        outcome = next(upload_files(memory, [(file, "u/log")]))
        assert isinstance(outcome.error, Conflict)
        assert "upload it again" in str(outcome.error)

    def test_the_key_it_was_answered_with(self, tmp_path: Path) -> None:
        class Choosing(MemoryStore):
            def upload(self, key: str, *args: Any, **kwargs: Any) -> Any:
                return super().upload(f"chosen/{key}", *args, **kwargs)

        (tmp_path / "a").write_bytes(b"1")
        assert next(upload_files(Choosing("c"), [(tmp_path / "a", "a")])).key == "chosen/a"


class TestMovingAndDeleting:
    def test_move(self, memory: MemoryStore) -> None:
        for key in ("a", "b", "taken"):
            memory.write(key, key.encode())
        found = by_key(move_files(memory, [("a", "x/a"), ("none", "x/b"), ("b", "taken")], if_absent=True))
        assert found["x/a"].size == 1
        assert isinstance(found["none"].error, NotFound)
        assert isinstance(found["b"].error, Conflict)
        assert {key for key, _ in list_files(memory)} == {"x/a", "b", "taken"}

    def test_delete(self, memory: MemoryStore) -> None:
        every = ["u/a", "u/.machinable", "u/nested/.machinable", ".runfs/u/manifest.json", "u/b.machinable"]
        for key in every:
            memory.write(key, b"1")
        found = by_key(delete_files(memory, [*every, "u/none"], keep_records=True))
        assert {key for key, outcome in found.items() if outcome.kept} == {*every[1:4]}
        assert {key for key, _ in list_files(memory)} == {*every[1:4]}
        assert isinstance(found["u/none"].error, NotFound)
        assert [outcome.error for outcome in delete_files(memory, every[1:4])] == [None] * 3
        assert list(list_files(memory)) == []

    def test_local_files(self, memory: MemoryStore, disk: Store) -> None:
        memory.write("u/a", b"1")
        disk.write("u/a", b"1")
        found = by_key(local_files(disk, ["u/a", "u/none"]))
        assert found["u/a"].path is not None
        assert found["u/a"].path.read_bytes() == b"1"
        assert isinstance(found["u/none"].error, NotFound)
        assert next(local_files(memory, ["u/a"])).path is None


class TestManyFiles:
    def test_memory_and_names_are_taken_as_it_goes(self, memory: MemoryStore, target: Path) -> None:
        memory.write("a", b"1")
        taken = 0

        def endless() -> Iterator[Wanted]:
            nonlocal taken
            for number in itertools.count():
                taken += 1
                yield Wanted("a", f"{number}")

        reading = read_files(memory, endless(), target, threads=4)
        some = list(itertools.islice(reading, 50))
        assert {outcome.error for outcome in some} == {None}
        reading.close()  # type: ignore[attr-defined]
        assert taken <= 50 + 2 * 8
        before = set(target.iterdir())
        time.sleep(0.05)
        assert set(target.iterdir()) == before
        assert not [path for path in before if path.name.startswith(".")]

    def test_several_at_a_time_and_no_more(self, memory: MemoryStore) -> None:
        now = most = 0
        lock = threading.Lock()

        def before(operation: str, key: str) -> None:
            nonlocal now, most
            with lock:
                now += 1
                most = max(most, now)
            time.sleep(0.005)
            with lock:
                now -= 1

        memory.before = before
        assert len(list(delete_files(memory, map(str, range(100)), threads=5))) == 100
        assert 2 <= most <= 5

    def test_the_deadline_is_each_files_own(self, memory: MemoryStore, target: Path) -> None:
        for key in ("slow", *map(str, range(20))):
            memory.write(key, bytes(9 * MIB if key == "slow" else 1))
        memory.before = lambda operation, key: time.sleep(0.15 if key == "slow" else 0.02)
        found = by_key(read_files(memory, ["slow", *map(str, range(20))], target, threads=2, deadline=0.25))
        slow = found.pop("slow")
        assert isinstance(slow.error, StoreTimeout)
        assert "0.25 s" in str(slow.error)
        assert {outcome.error for outcome in found.values()} == {None}

    def test_cancel(self, memory: MemoryStore, target: Path) -> None:
        memory.write("a", bytes(9 * MIB))
        cancel = threading.Event()
        memory.before = lambda operation, key: time.sleep(0.01)
        wanted = [Wanted("a", str(number)) for number in range(1000)]
        outcomes = []
        for outcome in read_files(memory, wanted, target, threads=2, cancel=cancel):
            outcomes.append(outcome)
            cancel.set()
        assert 1 < len(outcomes) < 10
        assert any(isinstance(outcome.error, Cancelled) for outcome in outcomes)
        assert len(tree(target)) == sum(outcome.error is None for outcome in outcomes)

    def test_when_the_names_themselves_fail_those_under_way_are_still_told(self, memory: MemoryStore) -> None:
        memory.write("a", b"1")

        def names() -> Iterator[str]:
            yield "a"
            raise Unreachable("the listing broke off")

        told: list[Outcome] = []
        deleting = delete_files(memory, names())
        told.append(next(deleting))
        assert told == [Outcome("a")]
        with pytest.raises(Unreachable, match="broke off"):
            next(deleting)

    def test_progress(self, memory: MemoryStore, target: Path) -> None:
        memory.write("a", bytes(9 * MIB))
        heard: list[Event] = []
        events = Events()
        events.subscribe(heard.append)
        list(read_files(memory, ["a", "none"], target, events=events))
        assert isinstance(heard[0], Started)
        assert (heard[0].what, heard[0].name, heard[0].size) == ("read", "a", 9 * MIB)
        assert [type(event).__name__ for event in heard] == ["Started", "Stepped", "Stepped", "Ended"]
        assert heard[-1] == Ended(heard[0].id, None)


FULL = """
import resource, sys
from pathlib import Path
from vfs.stores.batch import read_files
from vfs.stores.memory import MemoryStore

store = MemoryStore()
store.write("big", bytes(9 << 20))
store.write("piece", bytes(6 << 20))
store.write("small", bytes(1000))
resource.setrlimit(resource.RLIMIT_FSIZE, (5 << 20, 5 << 20))
for outcome in read_files(store, ["big", "piece", "small"], Path(sys.argv[1])):
    print(outcome.key, type(outcome.error).__name__)
"""


def test_a_disk_that_takes_no_more(target: Path) -> None:
    """A limit on the size of files stands for it: like a full disk it first takes a part of a write."""
    code = [sys.executable, "-c", FULL, str(target)]
    done = subprocess.run(code, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    assert set(done.stdout.splitlines()) == {"big OSError", "piece OSError", "small NoneType"}
    assert {path.name: path.stat().st_size for path in target.iterdir()} == {"small": 1000}
