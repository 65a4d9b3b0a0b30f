"""Transactions over items: all of their changes are visible to everybody, or none is, whatever happens to whoever."""

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.layers.test_objects import BIG, open_kind, read
from vfs.errors import NotFound, Refused, Unreachable, UsageError
from vfs.events import Ended, Events, ObjectDeleted, ObjectSet, Started, Stepped, TransactionBegan, TransactionEnded
from vfs.objects import Bucket, Objects
from vfs.objects import format as form
from vfs.objects import transaction as objects_transaction
from vfs.objects.shelf import Shelf
from vfs.stores import Stat, Store, open_store
from vfs.stores.memory import MemoryStore
from vfs.stores.memory import Objects as Content


@pytest.fixture(params=["memory", "file", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    opened = open_kind(request, request.param, tmp_path)
    yield opened
    opened.disconnect()


def state(objects: Objects, bucket: str = "b") -> dict[str, list[tuple[bytes, dict[str, Any]]]]:
    """All that can be seen of a bucket."""
    items = objects.bucket(bucket)
    return {
        name: [(read(items, name, stats.version), stats.metadata) for stats in items.versions(name)]
        for name in items.keys()  # noqa: SIM118
    }


BEFORE: dict[str, list[tuple[bytes, dict[str, Any]]]] = {"a": [(b"a1", {})], "b": [(b"b1", {"n": 1})], "c": [(b"", {})]}
AFTER: dict[str, list[tuple[bytes, dict[str, Any]]]] = {
    "a": [(b"a1", {}), (b"a2", {"x": 1})],
    "b": [(b"b1", {"n": 2})],
    "d": [(b"a2", {"x": 1})],
}


def fill(objects: Objects) -> None:
    items = objects.bucket("b")
    items.put("a", b"a1")
    items.put("b", b"b1", {"n": 1})
    items.put("c", b"")


def change(items: Bucket) -> None:
    """From BEFORE to AFTER."""
    items.put("a", b"a2", {"x": 1})
    items.update_metadata("b", {"n": 2})
    items.remove("c")
    items.copy("a", "d")


def leftovers(store: Store) -> list[str]:
    """What is pending or marked in a store."""
    records = [form.parse(store.read(stat.key)) for stat in store.list() if stat.key.endswith(form.ITEM)]
    marks = [stat.key for stat in store.list() if "%transactions" in stat.key]
    return [record.name for record in records if record.pending] + marks


class TestOnEveryStore:
    def test_all_at_its_end(self, store: Store) -> None:
        ours, others = Objects(store), Objects(store)
        fill(ours)
        with ours.transaction("notes") as transaction:
            change(ours.bucket("b"))
            assert state(ours) == AFTER
            assert state(others) == BEFORE
            assert transaction.notes == "notes"
        assert state(others) == state(ours) == AFTER
        assert leftovers(store) == []

    def test_none_when_it_raises(self, store: Store) -> None:
        ours = Objects(store)
        fill(ours)
        with pytest.raises(ZeroDivisionError), ours.transaction():  # noqa: PT012
            change(ours.bucket("b"))
            raise ZeroDivisionError
        assert state(ours) == state(Objects(store)) == BEFORE
        assert leftovers(store) == []
        assert len([stat for stat in store.list() if "%data" in stat.key]) == 3
        assert ours.bucket("b").put("a", b"later").version == 3  # a number that was given away is not used again


class TestBesideOthers:
    def test_other_threads_are_not_in_it(self) -> None:
        objects = Objects(MemoryStore())
        items = objects.bucket("b")
        with pytest.raises(ZeroDivisionError), objects.transaction():  # noqa: PT012
            items.put("mine", b"")
            thread = threading.Thread(target=items.put, args=("theirs", b""))
            thread.start()
            thread.join()
            raise ZeroDivisionError
        assert list(items.keys()) == ["theirs"]

    def test_versions_of_others_stay(self) -> None:
        store = MemoryStore()
        ours, others = Objects(store), Objects(store).bucket("b")
        items = ours.bucket("b")
        others.put("a", b"1")
        with ours.transaction():
            assert items.put("a", b"2 ours").version == 2
            assert others.put("a", b"3 theirs").version == 3
            assert [stats.version for stats in others.versions("a")] == [1, 3]
            assert [stats.version for stats in items.versions("a")] == [1, 2, 3]
        assert [read(others, "a", stats.version) for stats in others.versions("a")] == [b"1", b"2 ours", b"3 theirs"]

    def test_a_removal_takes_what_it_saw(self) -> None:
        store = MemoryStore()
        ours, others = Objects(store), Objects(store).bucket("b")
        others.put("a", b"1")
        with ours.transaction():
            ours.bucket("b").remove("a")
            others.put("a", b"2")
            with pytest.raises(NotFound):
                ours.bucket("b").get("a", 1)
        assert [read(others, "a", stats.version) for stats in others.versions("a")] == [b"2"]

    def test_a_bucket_is_not_removed_in_one(self) -> None:
        objects = Objects(MemoryStore())
        objects.bucket("b")
        with objects.transaction(), pytest.raises(UsageError, match="inside a transaction"):
            objects.remove("b")

    def test_one_at_a_time(self) -> None:
        objects = Objects(MemoryStore())
        with objects.transaction(), pytest.raises(UsageError, match="under way"), objects.transaction():
            pass
        with objects.transaction():
            pass

    def test_one_that_ends_and_is_cleaned_up_between_two_looks(self) -> None:
        """The reader has the record from before the commit, and then finds no trace of the transaction."""
        content = Content()
        fill(Objects(MemoryStore(objects=content)))
        writer, transaction = Shelf(MemoryStore(objects=content)), form.new_id()
        change = form.Change("remove", transaction, ids=(writer.view(form.item_prefix("b", "a")).versions[0].id,))
        writer.change("b", "a", lambda record: change, transaction)
        looks = []

        def end(operation: str, key: str) -> None:
            if operation == "read" and key.startswith(form.TRANSACTIONS):
                looks.append(key)
                if len(looks) == 1:
                    writer.decide(transaction, True, "", [("b", "a")])
                    writer.finish(transaction)

        reader = Objects(MemoryStore(objects=content, before=end)).bucket("b")
        with pytest.raises(NotFound):
            reader.get("a")
        assert looks

    @pytest.mark.parametrize("kind", ["memory", "file"])
    def test_a_reader_at_any_moment_sees_all_or_none(
        self, kind: str, request: pytest.FixtureRequest, tmp_path: Path
    ) -> None:
        """A reader that reads `a`, then `b`: never a new `a` and an old `b` (what is committed stays committed)."""
        store = open_kind(request, kind, tmp_path)
        ours, others = Objects(store), Objects(store).bucket("b")
        items = ours.bucket("b")
        items.put("a", b"0")
        items.put("b", b"0")
        wrong: list[tuple[int, int]] = []
        over = threading.Event()

        def watch() -> None:
            while not over.is_set():
                first = int(others.stats("a").metadata.get("n", 0))
                second = int(others.stats("b").metadata.get("n", 0))
                if second < first:
                    wrong.append((first, second))

        threads = [threading.Thread(target=watch) for _ in range(2)]
        for thread in threads:
            thread.start()
        for number in range(1, 30):
            with ours.transaction():
                items.update_metadata("a", {"n": number})
                items.update_metadata("b", {"n": number})
        over.set()
        for thread in threads:
            thread.join()
        assert wrong == []


class TestEvents:
    def test_the_end_comes_before_what_it_held(self) -> None:
        seen: list[Any] = []
        events = Events()
        objects = Objects(MemoryStore("lab"), events=events)
        fill(objects)
        events.subscribe(seen.append)
        with objects.transaction("why"):
            change(objects.bucket("b"))
        moved = [event for event in seen if isinstance(event, Started | Stepped | Ended)]
        told = [event for event in seen if event not in moved]
        assert moved
        assert told == [
            TransactionBegan(told[0].id, "why"),
            TransactionEnded(told[0].id, True),
            ObjectSet("lab", "b/a"),
            ObjectSet("lab", "b/b"),
            ObjectDeleted("lab", "b/c"),
            ObjectSet("lab", "b/d"),
        ]

    def test_nothing_of_one_that_was_rolled_back(self) -> None:
        seen: list[Any] = []
        events = Events()
        events.subscribe(seen.append, TransactionBegan, TransactionEnded, ObjectSet, ObjectDeleted)
        objects = Objects(MemoryStore("lab"), events=events)
        items = objects.bucket("b")
        with pytest.raises(ZeroDivisionError), objects.transaction():  # noqa: PT012
            items.put("a", b"")
            raise ZeroDivisionError
        assert seen == [TransactionBegan(seen[0].id, ""), TransactionEnded(seen[0].id, False)]


class TestCutShort:
    def test_a_store_that_goes_away_at_any_operation(self) -> None:
        """From the n-th operation on every one fails: what others see is all of it or nothing, before and after a
        sweep; and the one who committed was told right."""
        outcomes = set()
        for number in itertools.count(1):
            content = Content()
            fill(Objects(MemoryStore(objects=content)))
            calls = itertools.count(1)

            def fail(operation: str, key: str, calls: Iterator[int] = calls, number: int = number) -> None:
                if next(calls) >= number:
                    raise Unreachable("gone")

            broken = Objects(MemoryStore(objects=content, before=fail))
            try:
                with broken.transaction():
                    change(Bucket(broken, "b"))
                told = True
            except Unreachable:
                told = False
            after = state(Objects(MemoryStore(objects=content)))
            assert after in (BEFORE, AFTER)
            assert not told or after == AFTER
            swept = MemoryStore(objects=content)
            Objects(swept).sweep(older_than_s=0, abandoned_s=0)
            assert state(Objects(swept)) == after
            assert [left for left in leftovers(swept) if not left.startswith(form.TRANSACTIONS)] == []
            assert len([stat for stat in swept.list() if "%data" in stat.key]) == sum(map(len, after.values()))
            outcomes.add((told, after == AFTER))
            if next(calls) < number:
                break
        assert outcomes >= {(False, False), (True, True)}

    def test_the_answer_to_the_commit_is_lost(self) -> None:
        class Forgetful(MemoryStore):
            lose = False

            def write(self, key: str, data: bytes, **more: Any) -> Stat:
                stat = super().write(key, data, **more)
                if self.lose and key.startswith(form.TRANSACTIONS):
                    self.lose = False
                    raise Unreachable("lost the answer")
                return stat

        store = Forgetful()
        objects = Objects(store)
        fill(objects)
        store.lose = True
        with objects.transaction():
            change(objects.bucket("b"))
        assert state(objects) == AFTER

    def test_one_that_is_abandoned_is_swept_and_cannot_commit(self) -> None:
        store = MemoryStore()
        ours, others = Objects(store), Objects(store)
        fill(ours)
        with pytest.raises(Refused, match="abandoned"), ours.transaction():  # noqa: PT012
            change(ours.bucket("b"))
            others.sweep(older_than_s=0)
            assert leftovers(store) == ["a", "b", "c", "d"]  # a young one is left alone
            others.sweep(older_than_s=0, abandoned_s=0)
            assert state(others) == BEFORE
        assert state(others) == BEFORE

    def test_one_that_takes_too_long(self, monkeypatch: pytest.MonkeyPatch) -> None:
        objects = Objects(MemoryStore())
        fill(objects)
        monkeypatch.setattr(objects_transaction, "LIMIT_S", 0.0)
        with pytest.raises(Refused, match="rolled back"), objects.transaction():
            change(objects.bucket("b"))
        assert state(objects) == BEFORE

    def test_committed_by_a_process_that_died_before_it_cleaned_up(self) -> None:
        content = Content()
        store = MemoryStore(objects=content)
        fill(Objects(store))

        def fail(operation: str, key: str) -> None:
            if committed() and operation != "read":
                raise Unreachable("gone")

        def committed() -> bool:
            return any(key.startswith(form.TRANSACTIONS) for key in content.content)

        broken = Objects(MemoryStore(objects=content, before=fail))
        with broken.transaction():
            change(Bucket(broken, "b"))
        assert len(leftovers(store)) == 5
        objects = Objects(store)
        assert state(objects) == AFTER
        objects.bucket("b").put("a", b"a3")  # the next writer puts it in its place
        assert len(leftovers(store)) == 4
        assert Objects(store).sweep() == 1
        assert leftovers(store) == []
        assert state(objects) == {**AFTER, "a": [*AFTER["a"], (b"a3", {})]}


CHILD = """
import sys
from tests.layers.test_objects_transactions import change
from vfs.objects import Objects
from vfs.stores import open_store
objects = Objects(open_store(sys.argv[1]))
with objects.transaction():
    change(objects.bucket("b"))
"""


class TestKilled:
    @pytest.mark.parametrize(
        ("fault", "expected"),
        [
            ("objects.record#1", BEFORE),
            ("objects.recorded#1", BEFORE),
            ("objects.recorded#3", BEFORE),
            ("objects.commit", BEFORE),
            ("objects.committed", AFTER),
            ("objects.settled#2", AFTER),
        ],
    )
    def test_at_a_step(self, tmp_path: Path, fault: str, expected: dict[str, Any]) -> None:
        url = f"file://{tmp_path}/store"
        fill(Objects(open_store(url)))
        environment = {**os.environ, "RUNFS_FAULT": f"{fault}=kill", "PYTHONPATH": os.getcwd()}
        child = subprocess.run([sys.executable, "-c", CHILD, url], env=environment, capture_output=True, timeout=60)
        assert child.returncode == -signal.SIGKILL, child.stderr.decode()
        objects = Objects(open_store(url))
        assert state(objects) == expected
        time.sleep(0.01)
        objects.sweep(older_than_s=0, abandoned_s=0)
        assert state(objects) == expected
        assert [left for left in leftovers(open_store(url)) if "%" not in left] == []
        with objects.transaction():
            objects.bucket("b").put("a", BIG)
        assert read(objects.bucket("b"), "a") == BIG
