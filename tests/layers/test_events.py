"""The hub: who hears what, in which order, and that no subscriber disturbs the work."""

import logging
import threading

import pytest

from vfs.errors import Conflict, Denied, NotFound
from vfs.events import (
    Ended,
    Event,
    Events,
    ObjectDeleted,
    ObjectSet,
    Started,
    Stepped,
    TransactionBegan,
    TransactionEnded,
)
from vfs.moves import Moves
from vfs.stores import Store
from vfs.stores.memory import MemoryStore
from vfs.stores.observed import ObservedStore


@pytest.fixture
def events() -> Events:
    return Events()


@pytest.fixture
def heard(events: Events) -> list[Event]:
    found: list[Event] = []
    events.subscribe(found.append)
    return found


class TestHub:
    def test_everybody_hears_the_classes_asked_for_until_the_subscription_ends(
        self, events: Events, heard: list[Event]
    ) -> None:
        sets: list[Event] = []
        end = events.subscribe(sets.append, ObjectSet)
        made, gone = ObjectSet("lab", "u/a"), ObjectDeleted("lab", "u/a")
        events.publish(made)
        events.publish(gone)
        end()
        end()
        events.publish(made)
        assert sets == [made]
        assert heard == [made, gone, made]

    def test_one_that_raises_is_logged_once_and_disturbs_nobody(
        self, events: Events, caplog: pytest.LogCaptureFixture
    ) -> None:
        found: list[Event] = []

        def broken(event: Event) -> None:
            raise ValueError("no room on the screen")

        events.subscribe(broken)
        events.subscribe(found.append)
        for _ in range(3):
            events.publish(ObjectSet("lab", "u/a"))
        assert len(found) == 3
        errors = [record for record in caplog.records if record.levelno == logging.ERROR]
        assert len(errors) == 1
        assert "u/a" in errors[0].getMessage()
        assert errors[0].exc_info is not None
        assert "no room" in str(errors[0].exc_info[1])

    def test_a_subscriber_may_end_itself_and_publish_more(self, events: Events, heard: list[Event]) -> None:
        def once(event: Event) -> None:
            end()
            events.publish(ObjectDeleted("lab", "u/b"))

        end = events.subscribe(once, ObjectSet)
        events.publish(ObjectSet("lab", "u/a"))
        events.publish(ObjectSet("lab", "u/a"))
        assert heard.count(ObjectDeleted("lab", "u/b")) == 1

    def test_from_many_threads_nothing_is_lost(self, events: Events, heard: list[Event]) -> None:
        def work(number: int) -> None:
            for step in range(200):
                end = events.subscribe(lambda event: None, Ended)
                events.publish(Stepped(number, step))
                end()

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(heard) == 1600
        for number in range(8):
            steps = [event.done for event in heard if isinstance(event, Stepped) and event.id == number]
            assert steps == list(range(200))


class TestProgress:
    def test_start_steps_end(self, events: Events, heard: list[Event]) -> None:
        with events.progress("push", "a.bin", 10, uuid="u1", store="lab") as step:
            step(4)
            step(10)
        first = heard[0]
        assert isinstance(first, Started)
        assert (first.what, first.name, first.size, first.about) == (
            "push",
            "a.bin",
            10,
            {"uuid": "u1", "store": "lab"},
        )
        assert heard[1:] == [Stepped(first.id, 4), Stepped(first.id, 10), Ended(first.id, None)]

    def test_a_failure_ends_it_in_words_and_goes_on(self, events: Events, heard: list[Event]) -> None:
        with pytest.raises(FileNotFoundError), events.progress("push", "a.bin", 10):
            raise FileNotFoundError(2, "No such file or directory", "a.bin")
        assert isinstance(heard[-1], Ended)
        assert heard[-1].error == "No such file or directory: a.bin"

    def test_each_has_its_own_number(self, events: Events, heard: list[Event]) -> None:
        with events.progress("push", "a", 1), events.progress("push", "a", 1), Events().progress("push", "b", 1):
            pass
        started = [event.id for event in heard if isinstance(event, Started)]
        assert len(set(started)) == 2

    def test_status_shows_what_is_under_way(self, events: Events) -> None:
        moves = Moves(events)
        with events.progress("push", "a.bin", 10, uuid="u1", store="lab") as step:
            step(5)
            shown = moves.shown()
            assert [(move["path"], move["uuid"], move["done"]) for move in shown] == [("a.bin", "u1", 5)]
            assert shown[0]["rate"] > 0
            assert shown[0]["left_s"] is not None
        assert moves.shown() == []
        moves.close()
        with events.progress("push", "a.bin", 10):
            assert moves.shown() == []


class TestTransactions:
    def test_what_it_held_is_told_after_its_end(self, events: Events, heard: list[Event]) -> None:
        with events.transaction("t1", "new weights") as inside:
            inside.publish(ObjectSet("lab", "u/a"))
            with inside.progress("push", "u/a", 3) as step:
                step(3)
            inside.publish(ObjectDeleted("lab", "u/b"))
            assert [type(event) for event in heard] == [TransactionBegan, Started, Stepped, Ended]
        assert heard[0] == TransactionBegan("t1", "new weights")
        assert heard[4:] == [TransactionEnded("t1", True), ObjectSet("lab", "u/a"), ObjectDeleted("lab", "u/b")]

    def test_one_that_outlives_a_block_holds_its_own(self, events: Events, heard: list[Event]) -> None:
        with events.holding(lambda event: event.key.startswith("u/")) as held:
            for event in (ObjectSet("s", "u/a"), ObjectSet("s", "v/a"), ObjectDeleted("s", "u/b")):
                events.publish(event)
            assert heard == [ObjectSet("s", "v/a")]
        assert held == [ObjectSet("s", "u/a"), ObjectDeleted("s", "u/b")]
        events.publish(ObjectSet("s", "u/c"))
        assert heard[1:] == [ObjectSet("s", "u/c")]

    def test_rolled_back_nothing_of_it_is_told(self, events: Events, heard: list[Event]) -> None:
        def fail(inside: Events) -> None:
            inside.publish(ObjectSet("lab", "u/a"))
            raise Conflict("changed meanwhile")

        with pytest.raises(Conflict), events.transaction("t1") as inside:
            fail(inside)
        assert heard == [TransactionBegan("t1", ""), TransactionEnded("t1", False)]


class TestObservedStore:
    def test_it_is_a_store(self, events: Events) -> None:
        assert isinstance(ObservedStore(MemoryStore("lab"), events), Store)

    def test_each_change_that_succeeded_is_told(self, events: Events, heard: list[Event]) -> None:
        store = ObservedStore(MemoryStore("lab"), events)
        store.write("u/a", b"1")
        store.upload("u/b", lambda offset, length: b"22", 2)
        store.copy("u/b", "u/c")
        store.move("u/c", "u/d")
        store.move("u/d", "u/d")
        store.delete("u/a")
        assert heard == [
            ObjectSet("lab", "u/a"),
            ObjectSet("lab", "u/b"),
            ObjectSet("lab", "u/c"),
            ObjectSet("lab", "u/d"),
            ObjectDeleted("lab", "u/c"),
            ObjectDeleted("lab", "u/a"),
        ]
        assert {stat.key for stat in store.list()} == {"u/b", "u/d"}
        assert store.read("u/d") == b"22"

    def test_what_failed_and_what_only_reads_is_not(self, events: Events, heard: list[Event]) -> None:
        inside = MemoryStore("lab")
        inside.write("u/a", b"1")
        store = ObservedStore(inside, events)
        with pytest.raises(Conflict):
            store.write("u/a", b"2", if_absent=True)
        with pytest.raises(NotFound):
            store.move("u/none", "u/b")
        readonly = ObservedStore(MemoryStore("ro", read_only=True), events)
        with pytest.raises(Denied):
            readonly.delete("u/a")
        assert (store.read("u/a"), store.stat("u/a").size, len(list(store.list()))) == (b"1", 1, 1)
        assert heard == []
