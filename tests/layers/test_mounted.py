"""A store mounted at a prefix of another one. The contract suite runs on it too; here is what is its own."""

import random
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from vfs.errors import Conflict, Denied, NotFound, StoreTimeout, Unreachable, UsageError, WrongBytes
from vfs.stores import Info, Stat, checksums
from vfs.stores.memory import MemoryStore
from vfs.stores.merging import merge
from vfs.stores.mounted import MountedStore

MIB = 1024 * 1024


@pytest.fixture
def front() -> MemoryStore:
    return MemoryStore("front")


@pytest.fixture
def backing() -> MemoryStore:
    store = MemoryStore("backing")
    for key, data in (("a", b"outside"), ("m/both", b"old"), ("m/below", b"below"), ("m/d/deep", b"deep")):
        store.write(key, data)
    return store


@pytest.fixture
def store(front: MemoryStore, backing: MemoryStore) -> MountedStore:
    front.write("both", b"newer")
    front.write("only", b"only here")
    return MountedStore(front, "m/", backing, name="whole")


def held(store: MemoryStore) -> dict[str, bytes]:
    return {stat.key: store.read(stat.key) for stat in store.list()}


class TestReading:
    def test_the_front_covers_and_the_rest_shows_through(self, store: MountedStore) -> None:
        expected = {
            "a": b"outside",
            "m/both": b"newer",
            "m/below": b"below",
            "m/d/deep": b"deep",
            "m/only": b"only here",
        }
        listed = [stat.key for stat in store.list()]
        assert sorted(listed) == sorted(expected)
        for key, data in expected.items():
            assert store.read(key) == data
            assert (store.stat(key).key, store.stat(key).size) == (key, len(data))
        assert store.read("m/both", 1, 2) == b"ew"
        for key in ("only", "both", "m", "m/none", "none"):
            with pytest.raises(NotFound):
                store.read(key)

    @pytest.mark.parametrize(
        ("prefix", "recursive", "expected"),
        [
            ("", False, {"a"}),
            ("m/", False, {"m/both", "m/below", "m/only"}),
            ("m/", True, {"m/both", "m/below", "m/only", "m/d/deep"}),
            ("m", True, {"m/both", "m/below", "m/only", "m/d/deep"}),
            ("m", False, set()),
            ("m/o", True, {"m/only"}),
            ("m/d/", False, {"m/d/deep"}),
            ("z/", True, set()),
        ],
    )
    def test_listings(self, store: MountedStore, prefix: str, recursive: bool, expected: set[str]) -> None:
        listed = [stat.key for stat in store.list(prefix, recursive=recursive)]
        assert sorted(listed) == sorted(expected)

    def test_a_front_that_cannot_be_asked_is_no_reason_to_show_older_bytes(
        self, store: MountedStore, front: MemoryStore
    ) -> None:
        def broken(operation: str, key: str) -> None:
            raise Unreachable("front: no connection")

        front.before = broken
        for call in (
            lambda: store.read("m/both"),
            lambda: store.stat("m/below"),
            lambda: list(store.list("m/")),
            lambda: store.delete("m/below"),
            lambda: store.write("m/new", b"x", if_absent=True),
        ):
            with pytest.raises(Unreachable):
                call()
        assert store.read("a") == b"outside"

    def test_what_was_found_odd_in_its_parts_is_told(self, store: MountedStore, backing: MemoryStore) -> None:
        backing.problems.append("backing: left out of the listing: 'a//b'")
        list(store.list())
        list(store.list())
        assert store.problems == backing.problems


class TestMerging:
    @pytest.mark.parametrize("remembered", [0, 1, 3, 100])
    def test_no_key_twice_however_few_are_remembered(self, remembered: int) -> None:
        def stats(*names: str) -> list[Stat]:
            return [Stat(name, 0, None, None, None) for name in names]

        asked: list[str] = []

        def has(number: int, key: str) -> bool:
            asked.append(key)
            return key in ("abcde", "xcayb")[number]

        merged = merge([stats(*"ebadc"), stats(*"xcayb"), stats(*"zxe")], has, remembered)
        assert sorted(stat.key for stat in merged) == sorted("abcdexyz")
        assert (asked == []) == (remembered == 100)

    def test_lazily(self) -> None:
        def second() -> Iterator[Stat]:
            raise AssertionError("the second listing was begun too early")
            yield

        merged = merge([[Stat("a", 0, None, None, None)], second()], lambda number, key: False)
        assert next(merged).key == "a"
        with pytest.raises(AssertionError):
            next(merged)


class TestChanging:
    def test_only_under_the_prefix_and_only_in_front(self, store: MountedStore, backing: MemoryStore) -> None:
        before = held(backing)
        store.write("m/below", b"changed")
        store.copy("m/d/deep", "m/copy")
        store.copy("a", "m/from-outside")
        store.move("m/only", "m/moved")
        assert store.read("m/below") == b"changed"
        assert store.read("m/copy") == b"deep"
        assert store.read("m/from-outside") == b"outside"
        assert store.read("m/moved") == b"only here"
        for change in (
            lambda: store.write("a", b"x"),
            lambda: store.write("mm/a", b"x"),
            lambda: store.delete("a"),
            lambda: store.copy("m/below", "b"),
            lambda: store.move("m/below", "b"),
            lambda: store.move("a", "m/b"),
            lambda: store.copy_up("a"),
            lambda: store.push("a"),
        ):
            with pytest.raises(Denied, match="under m/ only"):
                change()
        assert held(backing) == before

    def test_a_delete_behind_is_refused_and_one_in_front_uncovers(
        self, store: MountedStore, front: MemoryStore, backing: MemoryStore
    ) -> None:
        before = held(backing)
        with pytest.raises(Denied, match=r"only backing has it; delete it there"):
            store.delete("m/below")
        store.delete("m/both")
        assert store.read("m/both") == b"old"
        with pytest.raises(Denied):
            store.delete("m/both")
        store.delete("m/only")
        store.delete("m/only")
        store.delete("m/never")
        assert "m/only" not in {stat.key for stat in store.list()}
        assert held(front) == {}
        assert held(backing) == before

    def test_a_move_of_what_would_stay_is_refused(self, store: MountedStore, front: MemoryStore) -> None:
        before = held(front)
        for source in ("m/below", "m/both"):
            with pytest.raises(Denied, match="copy it instead"):
                store.move(source, "m/target")
        assert held(front) == before

    def test_conditions_count_for_both(self, store: MountedStore, front: MemoryStore) -> None:
        for key in ("m/below", "m/both", "m/only"):
            with pytest.raises(Conflict):
                store.write(key, b"x", if_absent=True)
            with pytest.raises(Conflict):
                store.write(key, b"x", if_version="another")
            with pytest.raises(Conflict):
                store.copy("a", key, if_absent=True)
            version = store.stat(key).version
            written = store.write(key, b"new " + key.encode(), if_version=version)
            assert front.read(key[2:]) == b"new " + key.encode()
            with pytest.raises(Conflict):
                store.write(key, b"x", if_version=version)
            store.write(key, b"newer still", if_version=written.version)
        with pytest.raises(Conflict):
            store.move("m/only", "m/d/deep", if_absent=True)
        with pytest.raises(Conflict):
            store.write("m/none", b"x", if_version="1")

    def test_if_version_behind_loses_against_a_writer_in_front(
        self, store: MountedStore, front: MemoryStore, backing: MemoryStore
    ) -> None:
        """Somebody writes between our look behind and our write in front."""
        version = store.stat("m/below").version

        def meanwhile(operation: str, key: str) -> None:
            if operation == "upload":
                front.before = None
                front.write("below", b"theirs")

        front.before = meanwhile
        with pytest.raises(Conflict):
            store.write("m/below", b"ours", if_version=version)
        assert store.read("m/below") == b"theirs"

    def test_read_only(self, front: MemoryStore, backing: MemoryStore) -> None:
        front.write("x", b"1")
        for store in (
            MountedStore(front, "m/", backing, read_only=True),
            MountedStore(MemoryStore("f", read_only=True), "m/", backing),
        ):
            assert store.info().read_only
            for change in (
                lambda store=store: store.write("m/a", b"x"),
                lambda store=store: store.delete("m/x"),
                lambda store=store: store.copy_up("m/below"),
                lambda store=store: store.push("m/x"),
                lambda store=store: store.sweep(),
            ):
                with pytest.raises(Denied, match="read-only"):
                    change()

    @pytest.mark.parametrize("prefix", ["m", "/", "m//", "../", ".runfsx/", "m /"])
    def test_what_is_no_prefix(self, front: MemoryStore, backing: MemoryStore, prefix: str) -> None:
        with pytest.raises(UsageError):
            MountedStore(front, prefix, backing)


class TestUp:
    def test_copies_once_and_proves_it(self, store: MountedStore, front: MemoryStore) -> None:
        assert store.copy_up("m/below").key == "m/below"
        assert front.read("below") == b"below"
        front.write("below", b"edited")
        store.copy_up("m/below")
        assert store.read("m/below") == b"edited"
        with pytest.raises(NotFound):
            store.copy_up("m/none")

    def test_a_front_that_lies_is_found_and_left_clean(self, backing: MemoryStore) -> None:
        store = MountedStore(Lying("lying"), "m/", backing)
        with pytest.raises(WrongBytes, match="lying gave back other bytes"):
            store.copy_up("m/below")
        assert store.read("m/below") == b"below"


class TestDown:
    @pytest.mark.parametrize("size", [0, 5, 17 * MIB])
    def test_push(self, store: MountedStore, front: MemoryStore, backing: MemoryStore, size: int) -> None:
        data = random.Random(size).randbytes(size)
        store.write("m/new", data)
        store.write("m/both", data)
        steps: list[int] = []
        for key in ("m/new", "m/both"):
            assert store.push(key, progress=steps.append).key == key
            assert backing.read(key) == data
            assert store.read(key) == data
        assert set(held(front)) == {"only"}
        assert size == 0 or steps[-1] == size
        assert store.push("m/new").size == size
        with pytest.raises(NotFound):
            store.push("m/none")

    @pytest.mark.parametrize("step", range(1, 12))
    def test_a_stop_at_any_step_loses_nothing_and_pushing_again_finishes(
        self, front: MemoryStore, backing: MemoryStore, step: int
    ) -> None:
        class Stop(BaseException):
            pass

        calls = 0

        def stop(operation: str, key: str) -> None:
            nonlocal calls
            calls += 1
            if calls == step:
                raise Stop

        front.write("both", b"newer")
        store = MountedStore(front, "m/", backing)
        front.before = backing.before = stop
        try:
            store.push("m/both")
        except Stop:
            pass
        else:
            assert step > 8, f"only {calls} calls"
        front.before = backing.before = None
        assert store.read("m/both") == b"newer"
        store.push("m/both")
        assert (held(front), backing.read("m/both")) == ({}, b"newer")

    def test_a_backing_store_that_lies_does_not_get_the_only_copy(self, front: MemoryStore) -> None:
        front.write("a", b"precious")
        store = MountedStore(front, "", Lying("lying"))
        with pytest.raises(WrongBytes):
            store.push("a")
        assert store.read("a") == b"precious"

    def test_what_is_written_while_it_is_read_stays_in_front_and_no_mixture_behind(
        self, front: MemoryStore, backing: MemoryStore
    ) -> None:
        """By another process: this one's own writers wait."""
        front.write("both", bytes(9 * MIB))
        store = MountedStore(front, "m/", backing)

        def meanwhile(operation: str, key: str) -> None:
            if operation == "read":
                front.before = None
                front.write("both", b"\1" * (9 * MIB))

        front.before = meanwhile
        with pytest.raises(Conflict, match="try again"):
            store.push("m/both")
        assert front.read("both") == b"\1" * (9 * MIB)
        assert backing.read("m/both") == b"old"

    def test_what_is_written_just_before_the_end_stays_in_front(self, front: MemoryStore) -> None:
        class Slow(MemoryStore):
            def upload(self, *args: Any, **kwargs: Any) -> Stat:
                stat = super().upload(*args, **kwargs)
                front.write("both", b"theirs")
                return stat

        front.write("both", b"first")
        store = MountedStore(front, "m/", Slow("slow"))
        with pytest.raises(Conflict, match="push it again"):
            store.push("m/both")
        assert front.read("both") == b"theirs"

    def test_a_writer_of_this_process_waits_for_the_push(self, front: MemoryStore, backing: MemoryStore) -> None:
        front.write("both", b"first")
        store = MountedStore(front, "m/", backing)
        there, go = threading.Event(), threading.Event()

        def wait(operation: str, key: str) -> None:
            if operation == "upload":
                there.set()
                go.wait(10)

        backing.before = wait
        pusher = threading.Thread(target=store.push, args=("m/both",))
        pusher.start()
        there.wait(10)
        store.write("m/other", b"not in the way")
        with pytest.raises(StoreTimeout, match="another thread"):
            store.write("m/both", b"second", deadline=0.05)
        writer = threading.Thread(target=store.write, args=("m/both", b"second"))
        writer.start()
        go.set()
        pusher.join()
        writer.join()
        assert (store.read("m/both"), backing.read("m/both")) == (b"second", b"first")


class TestAsAWhole:
    def test_info_is_what_both_can(self, front: MemoryStore) -> None:
        info = MountedStore(front, "m/", Lying("lying")).info()
        assert (info.broker, info.checksum, info.conditional_write) == ("mounted", checksums.MD5, True)
        info = MountedStore(Lying("lying"), "m/", front).info()
        assert info.checksum is None

    def test_a_checksum_that_info_does_not_promise_is_not_given(self, backing: MemoryStore) -> None:
        store = MountedStore(Lying("lying"), "m/", backing)
        assert store.stat("m/below").checksum is None
        assert [stat.checksum for stat in store.list("m/d")] == [None]

    def test_check_tries_under_the_prefix(self, store: MountedStore, backing: MemoryStore) -> None:
        before = held(backing)
        found = store.check()
        assert (found.problems, found.writable, found.conditional) == ([], True, True)
        assert held(backing) == before

    def test_both_are_disconnected(self, store: MountedStore, front: MemoryStore, backing: MemoryStore) -> None:
        store.disconnect()
        assert (store.connected, front.connected, backing.connected) == (False, False, False)
        with pytest.raises(Unreachable):
            store.read("a")
        store.connect()
        assert store.read("m/both") == b"newer"
        front.disconnect()
        assert not store.connected


class Lying(MemoryStore):
    """Keeps no checksum, and the first byte of everything is wrong."""

    def info(self) -> Info:
        return replace(super().info(), checksum=None)

    def upload(self, *args: Any, **kwargs: Any) -> Stat:
        return replace(super().upload(*args, **kwargs), checksum=None, verified=False)

    def stat(self, key: str, *, deadline: float | None = None) -> Stat:
        return replace(super().stat(key), checksum=None)

    def read(self, key: str, start: int = 0, length: int | None = None, *, deadline: float | None = None) -> bytes:
        data = super().read(key, start, length)
        return b"\0" + data[1:] if start == 0 and data else data
