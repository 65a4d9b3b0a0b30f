"""Items while a store is away: what is read from where, what waits, and what is said to be stale."""

import itertools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults import FaultProxy
from tests.layers.test_objects import BIG, read
from tests.servers import Seaweed
from vfs.errors import Denied, NotFound, StoreError, StoreTimeout, Unreachable
from vfs.events import Events, ObjectSet
from vfs.manifest import CHUNK
from vfs.objects import Bucket, Objects
from vfs.objects import format as form
from vfs.stores import Info, Stat, Store, open_store
from vfs.stores.health import UNWELL_S
from vfs.stores.memory import MemoryStore
from vfs.stores.memory import Objects as Content


class Away:
    """A store that can go away, and counts what it is asked."""

    def __init__(self, name: str = "lab", content: Content | None = None) -> None:
        self.away = False
        self.asked: list[tuple[str, str]] = []
        self.store = MemoryStore(name, objects=content, before=self._before)

    def _before(self, operation: str, key: str) -> None:
        self.asked.append((operation, key))
        if self.away:
            raise Unreachable(f"{self.store.name}: no connection")


class Forgetful(MemoryStore):
    """`after(operation, key)` may raise when a write is done: its answer is lost."""

    after: Callable[[str, str], None] | None = None

    def write(self, key: str, data: bytes, **more: Any) -> Stat:
        stat = super().write(key, data, **more)
        if self.after is not None:
            self.after("write", key)
        return stat


@pytest.fixture
def lab() -> Away:
    return Away()


@pytest.fixture(params=["memory", "file"])
def local(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return MemoryStore("here") if request.param == "memory" else open_store(f"file://{tmp_path}/here")


class TestReading:
    def test_what_was_read_is_here(self, lab: Away, local: Store) -> None:
        objects = Objects(lab.store, local=local)
        items = objects.bucket("b")
        items.put("a", BIG, {"n": 1})
        items.put("b", b"never read")
        assert read(items, "a") == BIG
        lab.away = True
        with items.get("a") as item:
            assert item.read() == BIG
            assert "no connection" in item.stats.stale
        assert items.stats("a").metadata == {"n": 1}
        with pytest.raises(Unreachable):
            read(items, "b")
        with pytest.raises(Unreachable):
            items.get("c")
        again = Objects(lab.store, local=local).bucket("b")
        assert read(again, "a") == BIG

    def test_only_what_was_read(self, lab: Away, local: Store) -> None:
        items = Objects(lab.store, local=local).bucket("b")
        items.put("a", BIG)
        with items.get("a") as item:
            item.seek(CHUNK)
            item.read(10)
            lab.asked.clear()
            item.seek(CHUNK + 10)
            assert item.read(10) == BIG[CHUNK + 10 : CHUNK + 20]
        assert sum("%chunk" in stat.key for stat in local.list()) == 1
        with items.get("a") as item:
            lab.asked.clear()
            item.seek(CHUNK)
            item.read(CHUNK)
            assert [key for operation, key in lab.asked if "%data" in key] == []

    def test_rot_here_is_found_and_brought_again(self, lab: Away, local: Store) -> None:
        items = Objects(lab.store, local=local).bucket("b")
        items.put("a", BIG)
        assert read(items, "a") == BIG
        for stat in list(local.list()):
            if "%chunk" in stat.key:
                local.write(stat.key, bytes(stat.size))
        assert read(items, "a") == BIG
        assert sum(local.read(stat.key) == BIG[:CHUNK] for stat in local.list() if "%chunk" in stat.key) == 1

    def test_a_local_store_that_is_full_disturbs_nobody(self, lab: Away) -> None:
        def full(operation: str, key: str) -> None:
            if operation in ("write", "upload"):
                raise StoreError("full")

        items = Objects(lab.store, local=MemoryStore("here", before=full)).bucket("b")
        items.put("a", BIG)
        assert read(items, "a") == BIG

    def test_versions_that_were_removed_leave_this_machine(self, lab: Away, local: Store) -> None:
        items = Objects(lab.store, local=local).bucket("b")
        items.put("a", BIG)
        assert read(items, "a") == BIG
        Objects(lab.store).bucket("b").remove("a")
        with pytest.raises(NotFound):
            items.get("a")
        assert not [stat.key for stat in local.list() if "%chunk" in stat.key or "%data" in stat.key]

    def test_nobody_waits_for_a_store_that_just_failed(self, lab: Away, local: Store) -> None:
        items = Objects(lab.store, local=local).bucket("b")
        items.put("a", BIG)
        assert read(items, "a") == BIG
        lab.away = True
        read(items, "a")
        lab.asked.clear()
        assert read(items, "a") == BIG
        assert items.stats("a").stale
        assert lab.asked == []
        assert UNWELL_S <= 30


class TestListing:
    def test_says_what_is_stale(self, lab: Away, local: Store) -> None:
        objects = Objects(lab.store, local=local)
        items = objects.bucket("b")
        objects.bucket("unread")
        for name in ("a", "b", "c"):
            items.put(name, b"x", {"n": name})
        found = items.find()
        assert {stats.name for stats in found} == {"a", "b", "c"}
        assert (found.stale, found.reason) == (False, "")
        lab.away = True
        found = items.find()
        assert {(stats.name, bool(stats.stale)) for stats in found} == {("a", True), ("b", True), ("c", True)}
        assert found.stale
        assert "lab: no connection" in found.reason
        names = items.keys(n="b")
        assert list(names) == ["b"]
        assert names.stale
        buckets = objects.buckets()
        assert set(buckets) == {"b", "unread"}
        assert buckets.stale

    def test_a_store_that_goes_away_in_the_middle(self, lab: Away, local: Store) -> None:
        items = Objects(lab.store, local=local).bucket("b")
        for number in range(100):
            items.put(f"{number}", b"")
        found = items.find()
        first = next(found)
        lab.away = True
        assert sorted([first.name, *(stats.name for stats in found)]) == sorted(f"{number}" for number in range(100))
        assert found.stale

    def test_with_nothing_here_it_is_an_error(self, lab: Away) -> None:
        objects = Objects(lab.store)
        items = objects.bucket("b")
        lab.away = True
        for found in (items.keys(), items.find(), objects.buckets()):
            with pytest.raises(Unreachable):
                list(found)


class TestWriting:
    def test_waits_and_is_sent(self, lab: Away, local: Store) -> None:
        events = Events()
        told: list[object] = []
        events.subscribe(told.append, ObjectSet)
        objects = Objects(lab.store, local=local, events=events)
        items, others = objects.bucket("b"), Objects(lab.store).bucket("b")
        items.put("a", b"1", {"n": 1})
        told.clear()
        lab.away = True
        put = items.put("a", BIG, {"n": 2})
        assert (put.version, put.waiting) == (2, True)
        items.update_metadata("a", {"m": 3})
        items.put("new", b"new")
        items.remove("a", 1)
        items.copy("a", "copied")
        assert told == []
        again = Objects(lab.store, local=local)  # another process
        for each in (objects, again):
            view = Bucket(each, "b")
            assert (read(view, "a"), read(view, "new"), read(view, "copied")) == (BIG, b"new", BIG)
            assert view.stats("a").metadata == {"n": 2, "m": 3}
            assert [stats.version for stats in view.versions("a")] == [2]
            assert set(view.keys()) == {"a", "new", "copied"}
        assert [each.what for each in again.pending()] == ["put", "metadata", "put", "remove", "put"]
        settled = again.settle()
        assert (settled.sent, settled.left) == (0, 5)
        assert "no connection" in settled.problems[0]
        lab.away = False
        assert objects.settle().sent == 5
        assert objects.pending() == []
        assert (read(others, "a"), read(others, "new"), read(others, "copied")) == (BIG, b"new", BIG)
        assert [(stats.version, stats.metadata) for stats in others.versions("a")] == [(2, {"n": 2, "m": 3})]
        assert told == [ObjectSet("lab", "b/a")] * 2 + [ObjectSet("lab", f"b/{name}") for name in ("new", "copied")]
        assert not items.stats("a").waiting

    def test_others_put_first(self, lab: Away, local: Store) -> None:
        objects = Objects(lab.store, local=local)
        items = objects.bucket("b")
        items.put("a", b"1")
        lab.away = True
        assert items.put("a", b"ours").version == 2
        lab.away = False
        Objects(lab.store).bucket("b").put("a", b"theirs")
        assert objects.settle().sent == 1
        assert [read(items, "a", stats.version) for stats in items.versions("a")] == [b"1", b"theirs", b"ours"]

    def test_a_change_sends_what_waits_first(self, lab: Away, local: Store) -> None:
        first = Objects(lab.store, local=local)
        first.bucket("b")
        lab.away = True
        Bucket(first, "b").put("a", b"1")
        lab.away = False
        second = Objects(lab.store, local=local)
        assert second.bucket("b").put("a", b"2").version == 2
        assert second.pending() == []

    def test_a_new_bucket(self, lab: Away, local: Store) -> None:
        objects = Objects(lab.store, local=local)
        lab.away = True
        objects.bucket("new").put("a", b"x")
        assert set(objects.buckets()) == {"new"}
        with pytest.raises(Unreachable):
            objects.bucket("unknown", create=False)
        lab.away = False
        objects.settle()
        assert read(Objects(lab.store).bucket("new", create=False), "a") == b"x"

    def test_without_a_local_store_it_fails(self, lab: Away) -> None:
        items = Objects(lab.store).bucket("b")
        lab.away = True
        with pytest.raises(Unreachable):
            items.put("a", b"x")

    def test_a_transaction_needs_the_store(self, lab: Away, local: Store) -> None:
        objects = Objects(lab.store, local=local)
        items = objects.bucket("b")
        lab.away = True
        with pytest.raises(Unreachable), objects.transaction():
            items.put("a", b"x")
        assert objects.pending() == []

    def test_cut_short_at_any_operation_and_sent_again(self) -> None:
        """The store is away for three operations from the n-th on, so that nobody knows what became of the first, in a
        put or in sending: each version is there once."""
        for number in itertools.count(1):
            lab, here = Forgetful("lab"), MemoryStore("here")
            objects = Objects(lab, local=here)
            items = objects.bucket("b")
            items.put("a", b"1")
            calls = itertools.count(1)

            def fail(operation: str, key: str, calls: Iterator[int] = calls, number: int = number) -> None:
                if number <= next(calls) < number + 3:
                    raise StoreTimeout("no answer")

            lab.before = lab.after = fail
            items.put("a", BIG)
            objects.settle()
            lab.before = lab.after = None
            objects.settle()
            others = Objects(lab).bucket("b")
            assert [read(others, "a", stats.version) for stats in others.versions("a")] == [b"1", BIG]
            if next(calls) < number:
                break

    def test_what_is_refused_holds_back_its_item_only(self, local: Store) -> None:
        class Picky(MemoryStore):
            away = False

            def _begin(self, operation: str, key: str = "", *, changes: bool = False) -> None:
                if self.away:
                    raise Unreachable("away")
                if changes and "/bad/" in key:
                    raise Denied("not this one")
                super()._begin(operation, key, changes=changes)

        store = Picky("lab")
        objects = Objects(store, local=local)
        items = objects.bucket("b")
        store.away = True
        for name in ("bad", "good", "bad"):
            items.put(name, name.encode())
        store.away = False
        settled = objects.settle()
        assert (settled.sent, settled.left) == (1, 2)
        assert settled.problems == ("b/bad: put: not this one",)
        assert items.put("other", b"x").waiting is False
        assert read(Objects(store).bucket("b"), "good") == b"good"
        with pytest.raises(NotFound):
            Objects(store).bucket("b").get("bad")
        assert read(items, "bad") == b"bad"


class TestSeveralStores:
    def test_the_first_says_which_versions_there_are(self) -> None:
        home, replica = Away("home"), Away("replica")
        Objects(replica.store).bucket("b").put("only there", b"x")
        Objects(replica.store).bucket("b").put("both", b"old")
        objects = Objects([home.store, replica.store])
        items = objects.bucket("b")
        items.put("both", b"new")
        assert (read(items, "both"), read(items, "only there")) == (b"new", b"x")
        assert set(items.keys()) == {"both", "only there"}
        home.away = True
        assert read(items, "both") == b"old"
        assert "home: no connection" in items.stats("both").stale
        found = items.find()
        assert {stats.name for stats in found} == {"both", "only there"}
        assert found.stale
        home.away = False
        items.remove("both")
        with pytest.raises(NotFound):
            items.get("both")
        assert set(items.keys()) == {"only there"}

    def test_a_missing_item_is_only_missing_when_all_say_so(self) -> None:
        home, replica = Away("home"), Away("replica")
        items = Objects([home.store, replica.store]).bucket("b")
        replica.away = True
        with pytest.raises(Unreachable):
            items.get("a")
        replica.away = False
        with pytest.raises(NotFound):
            items.get("a")

    def test_bytes_come_from_the_nearest(self) -> None:
        content = Content()
        Objects(MemoryStore(objects=content)).bucket("b").put("a", BIG)
        home, copy = Away("home", content), Away("copy", content)
        items = Objects([home.store, copy.store]).bucket("b")
        with items.get("a") as item:
            item.read(10)
            home.away = True
            assert item.read() == BIG[10:]
        assert any("%data" in key for operation, key in copy.asked)

    def test_removed_at_home_stays_removed(self, local: Store) -> None:
        home = Away("home")
        objects = Objects(home.store, local=local)
        items = objects.bucket("b")
        items.put("a", b"x")
        assert read(items, "a") == b"x"
        items.remove("a")
        home.away = True
        with pytest.raises(NotFound):
            items.get("a")


class Calculating(MemoryStore):
    """What it has is made when it is asked for."""

    def info(self) -> Info:
        return Info(broker="calculating", calculates=True, read_only=True)


class TestCalculated:
    @pytest.fixture
    def items(self, lab: Away) -> Bucket:
        calculated = Calculating("make")
        calculated.write("b/results/x%20y", BIG)
        return Objects([calculated, lab.store]).bucket("b")

    def test_comes_last(self, items: Bucket) -> None:
        with items.get("results/x y") as item:
            assert item.read() == BIG
            assert item.version == 0
        items.put("results/x y", b"kept")
        assert read(items, "results/x y") == b"kept"
        with pytest.raises(NotFound):
            items.get("results/none")
        with pytest.raises(NotFound):
            items.get("results/x y", 7)
        assert list(items.keys()) == ["results/x y"]

    def test_can_be_kept(self, items: Bucket) -> None:
        with items.get("results/x y") as item:
            assert items.put("results/x y", item, item.metadata).version == 1
        assert read(items, "results/x y") == BIG

    def test_when_no_store_answers(self, items: Bucket, lab: Away) -> None:
        lab.away = True
        with items.get("results/x y") as item:
            assert item.read() == BIG
            assert "no connection" in item.stats.stale


def test_the_queue_is_a_sentence_when_it_is_damaged(local: Store, lab: Away) -> None:
    objects = Objects(lab.store, local=local)
    local.write(f"{form.ROOT}%queue/{0:020d}-x", b"{}")
    with pytest.raises(Exception, match="no format this version"):
        objects.pending()


@pytest.mark.parametrize("mode", ["refuse", "silent", "busy"])
def test_a_real_server_that_goes_away_and_comes_back(seaweed: Seaweed, tmp_path: Path, mode: str) -> None:
    with FaultProxy(seaweed.port) as proxy:
        url = f"s3://{seaweed.bucket}/t-{os.urandom(6).hex()}?endpoint={proxy.endpoint}&region={seaweed.region}"
        store = open_store({"url": url, **seaweed.options(), "deadline_s": 1.0}, "lab")
        objects = Objects(store, local=open_store(f"file://{tmp_path}/here"))
        items = objects.bucket("b")
        items.put("a", BIG, {"n": 1})
        assert read(items, "a") == BIG
        proxy.set(mode)
        began = time.monotonic()
        assert read(items, "a") == BIG
        assert items.stats("a").stale
        assert items.put("a", b"second").waiting
        items.update_metadata("a", {"m": 2})
        found = items.find()
        assert [(stats.name, stats.version) for stats in found] == [("a", 2)]
        assert found.stale
        assert time.monotonic() - began < 15
        assert objects.settle().left == 2
        proxy.set("pass")
        assert objects.settle().sent == 2
        again = Objects(store).bucket("b")
        assert [(read(again, "a", stats.version), stats.metadata) for stats in again.versions("a")] == [
            (BIG, {"n": 1}),
            (b"second", {"m": 2}),
        ]
        store.disconnect()
