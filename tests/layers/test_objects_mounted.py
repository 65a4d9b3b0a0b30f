"""Items on a store that is mounted on another: what shows through, what comes up, what goes down."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.layers.test_objects import BIG, open_kind, read
from vfs.errors import Denied, NotFound, Refused, Unreachable, UsageError
from vfs.manifest import CHUNK
from vfs.objects import Bucket, Objects, prefix_of
from vfs.objects import format as form
from vfs.stores import Store
from vfs.stores.memory import MemoryStore
from vfs.stores.memory import Objects as Content
from vfs.stores.mounted import MountedStore

SMALL = BIG[: CHUNK + 5]


class Mounted:
    """A front and a backing store, each to be used by itself too."""

    def __init__(self, front: Store, backing: Store) -> None:
        self.front, self.backing = front, backing
        self.behind = Objects(backing).bucket("b")
        self.store = MountedStore(front, prefix_of("b", "mine"), backing)
        self.objects = Objects(self.store)
        self.items = self.objects.bucket("b")

    def in_front(self, kind: str) -> int:
        return sum(kind in stat.key for stat in self.front.list())


@pytest.fixture(params=["memory", "s3"])
def mounted(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Mounted]:
    front, backing = open_kind(request, "file", tmp_path), open_kind(request, request.param, tmp_path)
    yield Mounted(front, backing)
    backing.disconnect()


@pytest.fixture
def quick() -> Mounted:
    return Mounted(MemoryStore("front"), MemoryStore("backing"))


class TestOnRealStores:
    def test_reads_fall_through(self, mounted: Mounted) -> None:
        mounted.behind.put("mine/a", BIG, {"n": 1})
        mounted.behind.put("theirs", b"x")
        assert (read(mounted.items, "mine/a"), read(mounted.items, "theirs")) == (BIG, b"x")
        assert mounted.in_front("") == 0

    def test_a_put_comes_up_and_leaves_the_backing_alone(self, mounted: Mounted) -> None:
        mounted.behind.put("mine/a", BIG, {"n": 1})
        assert mounted.items.put("mine/a", b"second").version == 2
        assert (read(mounted.items, "mine/a", 1), read(mounted.items, "mine/a")) == (BIG, b"second")
        assert [stats.version for stats in mounted.behind.versions("mine/a")] == [1]
        assert mounted.in_front("%data") == 2

    def test_a_metadata_only_write_comes_up_with_its_bytes(self, mounted: Mounted) -> None:
        mounted.behind.put("mine/a", BIG, {"n": 1})
        mounted.items.update_metadata("mine/a", {"m": 2})
        assert mounted.behind.stats("mine/a").metadata == {"n": 1}
        mounted.behind.remove("mine/a")
        assert read(mounted.items, "mine/a") == BIG
        assert mounted.items.stats("mine/a").metadata == {"n": 1, "m": 2}

    def test_listings_merge(self, mounted: Mounted) -> None:
        for name in ("mine/both", "mine/behind", "theirs"):
            mounted.behind.put(name, b"", {"from": "behind"})
        mounted.items.put("mine/both", b"", {"from": "front"})
        mounted.items.put("mine/front", b"", {"from": "front"})
        found = {stats.name: stats.metadata["from"] for stats in mounted.items.find()}
        assert found == {"mine/both": "front", "mine/behind": "behind", "theirs": "behind", "mine/front": "front"}
        assert len(list(mounted.items.keys())) == 4
        assert set(mounted.items.keys(**{"from": "front"})) == {"mine/both", "mine/front"}

    def test_push(self, mounted: Mounted) -> None:
        mounted.behind.put("mine/a", b"one")
        mounted.items.put("mine/a", BIG, {"n": 2})
        mounted.items.push("mine/a")
        assert (read(mounted.behind, "mine/a", 1), read(mounted.behind, "mine/a", 2)) == (b"one", BIG)
        assert read(mounted.items, "mine/a") == BIG
        assert mounted.in_front("%data") == mounted.in_front("%digests") == 0
        mounted.items.push("mine/a")
        assert mounted.items.put("mine/a", b"three").version == 3
        mounted.items.push("mine/a")
        assert read(mounted.behind, "mine/a", 3) == b"three"

    def test_a_transaction(self, mounted: Mounted) -> None:
        mounted.behind.put("mine/a", b"one")
        with mounted.objects.transaction():
            mounted.items.put("mine/a", b"two")
            mounted.items.put("mine/b", b"new")
            assert set(Objects(mounted.store).bucket("b").keys()) == {"mine/a"}
            assert read(Objects(mounted.store).bucket("b"), "mine/a") == b"one"
        assert read(Objects(mounted.store).bucket("b"), "mine/a") == b"two"
        assert read(mounted.items, "mine/b") == b"new"
        assert mounted.in_front("%transactions") == 0


class TestWhatIsRefused:
    def test_changes_outside_the_prefix(self, quick: Mounted) -> None:
        quick.behind.put("theirs", b"x")
        calls: list[Callable[[], object]] = [
            lambda: quick.items.put("theirs", b"y"),
            lambda: quick.items.put("new", b"y"),
            lambda: quick.items.put("mine-too", b"y"),
            lambda: quick.items.set_metadata("theirs", {"n": 1}),
            lambda: quick.items.copy("theirs", "new"),
            lambda: quick.objects.bucket("other bucket"),
        ]
        for call in calls:
            with pytest.raises(Denied, match="allowed under"):
                call()
        assert read(quick.items, "theirs") == b"x"
        assert quick.items.copy("theirs", "mine/theirs").version == 1

    def test_deletes_of_what_is_only_behind(self, quick: Mounted) -> None:
        quick.behind.put("mine/a", b"one")
        quick.behind.put("theirs", b"x")
        for name in ("mine/a", "theirs"):
            with pytest.raises(Refused, match="remove it there"):
                quick.items.remove(name)
        quick.items.put("mine/a", b"two")
        with pytest.raises(Refused, match="remove it there"):
            quick.items.remove("mine/a", 1)
        quick.items.remove("mine/a", 2)
        assert read(quick.items, "mine/a") == b"one"
        with pytest.raises(Denied):
            quick.objects.remove("b", force=True)
        assert read(quick.behind, "mine/a") == b"one"

    def test_a_delete_shows_the_backing_again(self, quick: Mounted) -> None:
        quick.behind.put("mine/a", b"one", {"n": 1})
        quick.items.put("mine/a", b"two")
        quick.items.set_metadata("mine/a", {"n": 2}, 1)
        quick.items.remove("mine/a")
        assert [(stats.version, stats.metadata) for stats in quick.items.versions("mine/a")] == [(1, {"n": 1})]
        with quick.objects.transaction():
            quick.items.put("mine/new", b"")
            quick.items.put("mine/a", b"two again")
        with quick.objects.transaction():
            quick.items.remove("mine/new")
            quick.items.remove("mine/a")
            assert list(quick.items.keys()) == ["mine/a"]
        assert read(quick.items, "mine/a") == b"one"
        with pytest.raises(NotFound):
            quick.items.get("mine/new")

    def test_push_where_it_cannot_be(self, quick: Mounted) -> None:
        with pytest.raises(NotFound):
            quick.items.push("mine/none")
        with pytest.raises(UsageError, match="not mounted"):
            quick.behind.push("a")
        with quick.objects.transaction():
            quick.items.put("mine/a", b"x")
            with pytest.raises(UsageError, match="transaction"):
                quick.items.push("mine/a")
            with pytest.raises(Refused, match="a transaction is changing it"):
                Objects(quick.store).bucket("b").push("mine/a")


class TestPush:
    def test_versions_the_backing_got_meanwhile_stay(self, quick: Mounted) -> None:
        quick.behind.put("mine/a", b"1")
        quick.items.put("mine/a", b"2 front")
        quick.behind.put("mine/a", b"2 behind")
        quick.items.push("mine/a")
        contents = [read(quick.behind, "mine/a", stats.version) for stats in quick.behind.versions("mine/a")]
        assert contents == [b"1", b"2 behind", b"2 front"]
        quick.items.update_metadata("mine/a", {"n": 1})
        quick.items.push("mine/a")
        assert [stats.metadata for stats in quick.behind.versions("mine/a")] == [{}, {}, {"n": 1}]

    def test_cut_short_at_any_operation_it_is_done_again(self) -> None:
        for number in itertools.count(1):
            front, backing = Content(), Content()
            whole = Mounted(MemoryStore(objects=front), MemoryStore(objects=backing))
            whole.behind.put("mine/a", b"1")
            whole.items.put("mine/a", SMALL, {"n": 2})
            whole.items.put("mine/new", SMALL, {"n": 1})
            whole.behind.put("mine/a", b"2 behind")
            calls = itertools.count(1)

            def fail(operation: str, key: str, calls: Iterator[int] = calls, number: int = number) -> None:
                if next(calls) >= number:
                    raise Unreachable("gone")

            broken = MountedStore(
                MemoryStore(objects=front, before=fail),
                whole.store.prefix,
                MemoryStore(objects=backing, before=fail),
            )
            done = True
            for name in ("mine/a", "mine/new"):
                try:
                    Bucket(Objects(broken), "b").push(name)
                except Unreachable:
                    done = False
                assert (read(whole.items, "mine/a"), read(whole.items, "mine/new")) == (SMALL, SMALL)
                assert read(whole.behind, "mine/a", 1) == b"1"
            for name in ("mine/a", "mine/new"):
                whole.items.push(name)
                assert read(whole.behind, name) == SMALL
            found = [
                (stats.version, read(whole.behind, "mine/a", stats.version))
                for stats in whole.behind.versions("mine/a")
            ]
            assert found == [(1, b"1"), (2, b"2 behind"), (3, SMALL)]
            if done and next(calls) < number:
                break

    def test_a_put_during_it_is_not_lost(self, quick: Mounted) -> None:
        quick.items.put("mine/a", b"1")
        during: list[str] = []

        def put(operation: str, key: str) -> None:
            if operation == "write" and key.endswith(form.ITEM) and not during:
                during.append(key)
                Objects(quick.store).bucket("b").put("mine/a", b"2")

        assert isinstance(quick.backing, MemoryStore)
        quick.backing.before = put
        quick.items.push("mine/a")
        assert during
        assert read(quick.items, "mine/a") == b"2"
        assert [stats.version for stats in quick.items.versions("mine/a")] == [1, 2]


class TestTransactionsBehind:
    def test_one_under_way_in_the_backing_stays_there(self, quick: Mounted) -> None:
        behind = Objects(quick.backing)
        theirs = behind.bucket("b")
        theirs.put("mine/a", b"1")
        with behind.transaction():
            theirs.put("mine/a", b"2 behind")
            assert read(quick.items, "mine/a") == b"1"
            quick.items.update_metadata("mine/a", {"n": 1})
        assert read(quick.items, "mine/a") == b"1"  # ours came up before theirs was there
        quick.items.push("mine/a")
        assert read(quick.items, "mine/a") == b"2 behind"
        assert [stats.metadata for stats in quick.items.versions("mine/a")] == [{"n": 1}, {}]

    def test_own_removals_are_seen_inside(self, quick: Mounted) -> None:
        quick.behind.put("mine/a", b"1")
        quick.items.put("mine/a", b"2")
        with quick.objects.transaction():
            quick.items.remove("mine/a")
            assert read(quick.items, "mine/a") == b"1"
            assert read(Objects(quick.store).bucket("b"), "mine/a") == b"2"

    def test_a_committed_one_is_seen(self, quick: Mounted) -> None:
        behind = Objects(quick.backing)
        with behind.transaction():
            behind.bucket("b").put("mine/a", b"1")
        assert read(quick.items, "mine/a") == b"1"
