"""Several stores as one, the first that has an object. The contract suite runs on it too; here is what is its own."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from vfs.errors import Conflict, Denied, NotFound, StoreTimeout, Unreachable
from vfs.stores import Stat, open_store
from vfs.stores.first import FirstStore
from vfs.stores.health import Health
from vfs.stores.memory import MemoryStore


@pytest.fixture
def near() -> MemoryStore:
    store = MemoryStore("near")
    store.write("u/near", b"near")
    store.write("u/both", b"both")
    return store


@pytest.fixture
def far() -> MemoryStore:
    store = MemoryStore("far")
    store.write("u/far", b"far")
    store.write("u/both", b"both")
    return store


def broken(operation: str, key: str) -> None:
    raise Unreachable("no connection")


def recorder(calls: list[str], name: str, sleep_s: float = 0.0) -> Callable[[str, str], None]:
    def before(operation: str, key: str) -> None:
        calls.append(name)
        time.sleep(sleep_s)

    return before


class TestReading:
    def test_from_whichever_has_it(self, near: MemoryStore, far: MemoryStore) -> None:
        store = FirstStore([near, far])
        assert (store.read("u/near"), store.read("u/far", 1), store.stat("u/far").size) == (b"near", b"ar", 3)
        assert sorted(stat.key for stat in store.list("u/")) == ["u/both", "u/far", "u/near"]
        with pytest.raises(NotFound, match="there is no u/none"):
            store.read("u/none")
        assert store.problems == []

    @pytest.mark.parametrize("gone", [0, 1])
    def test_one_that_cannot_be_reached_is_passed_over_and_noted(
        self, near: MemoryStore, far: MemoryStore, gone: int
    ) -> None:
        parts = [near, far]
        parts[gone].before = broken
        store = FirstStore(parts)
        for _ in range(3):
            assert store.read("u/both") == b"both"
        assert {stat.key for stat in store.list()} == {"u/both", ("u/far", "u/near")[gone]}
        assert store.problems == [f"{parts[gone].name} was passed over: no connection"]

    def test_what_nobody_reachable_has_is_not_called_missing(self, near: MemoryStore, far: MemoryStore) -> None:
        far.before = broken
        store = FirstStore([near, far])
        for call in (lambda: store.read("u/far"), lambda: store.stat("u/none")):
            with pytest.raises(Unreachable, match=r"no store that answers has it; no connection"):
                call()
        far.before = None
        assert store.read("u/far") == b"far"
        with pytest.raises(NotFound):
            store.stat("u/none")

    def test_a_refusal_does_not_say_that_it_is_missing_either(self, near: MemoryStore, far: MemoryStore) -> None:
        def denied(operation: str, key: str) -> None:
            raise Denied("far: credentials are wrong")

        far.before = denied
        with pytest.raises(Unreachable, match="credentials are wrong"):
            FirstStore([near, far]).read("u/far")

    def test_no_store_answers(self, near: MemoryStore, far: MemoryStore) -> None:
        near.before = far.before = broken
        with pytest.raises(Unreachable):
            list(FirstStore([near, far]).list())

    def test_none_at_all(self) -> None:
        store = FirstStore([])
        assert list(store.list()) == []
        with pytest.raises(NotFound):
            store.stat("u/a")
        with pytest.raises(Denied):
            store.write("u/a", b"x")

    def test_a_local_file_of_any_of_them(self, near: MemoryStore, tmp_path: Path) -> None:
        disk = open_store(f"file://{tmp_path}/disk")
        disk.write("u/near", b"near")
        store = FirstStore([near, disk])
        path = store.local_path("u/near")
        assert path is not None
        assert path.read_bytes() == b"near"
        assert store.local_path("u/both") is None


class TestOrder:
    def test_the_one_written_to_then_healthy_then_near_then_as_given(self) -> None:
        calls: list[str] = []
        parts = [MemoryStore(name) for name in ("slow-first", "far", "near", "sick")]
        for store, sleep_s in zip(parts, (0.12, 0.12, 0.0, 0.0), strict=True):
            store.before = recorder(calls, store.name, sleep_s)
        whole = FirstStore(parts)
        with pytest.raises(NotFound):
            whole.stat("u/a")
        assert calls == ["slow-first", "far", "near", "sick"]
        whole.health[3].error, whole.health[3].failed_at = "it failed", time.monotonic()
        calls.clear()
        with pytest.raises(NotFound):
            whole.stat("u/a")
        assert calls == ["slow-first", "near", "far", "sick"]
        calls.clear()
        readers = FirstStore(parts, read_only=True)
        for _ in range(2):
            with pytest.raises(NotFound):
                readers.stat("u/a")
        assert (set(calls[4:6]), set(calls[6:])) == ({"near", "sick"}, {"slow-first", "far"})

    def test_one_that_failed_is_asked_last_until_it_answers(self, near: MemoryStore, far: MemoryStore) -> None:
        calls: list[str] = []
        store = FirstStore([MemoryStore("empty"), near, far])
        near.before = broken
        store.read("u/both")
        near.before, far.before = recorder(calls, "near"), recorder(calls, "far")
        store.read("u/both")
        assert calls == ["far"]
        assert store.read("u/near") == b"near"
        assert store.health[1].healthy

    def test_a_deadline_is_shared_among_those_still_to_be_asked(self) -> None:
        given: list[float | None] = []

        class Silent(MemoryStore):
            def stat(self, key: str, *, deadline: float | None = None) -> Stat:
                given.append(deadline)
                time.sleep(deadline or 0)
                raise StoreTimeout("silent")

        with pytest.raises(Unreachable):
            FirstStore([Silent("1"), Silent("2"), Silent("3")], read_only=True).stat("u/a", deadline=0.6)
        shares = [share or 0.0 for share in given]
        assert len(shares) == 3
        assert max(shares) <= 0.2  # a machine that is busy leaves less, never more
        assert shares[0] > 0.1

    def test_health(self) -> None:
        health = Health()
        assert (health.healthy, health.rank) == (True, (False, 0))
        with pytest.raises(StoreTimeout), health.watched():
            raise StoreTimeout("slow")
        assert not health.healthy
        assert health.error == "slow"

        def answer() -> None:
            time.sleep(0.002)
            raise NotFound("it answered")

        with pytest.raises(NotFound), health.watched():
            answer()
        assert health.healthy
        assert health.latency_s is not None
        assert health.latency_s >= 0.002
        assert health.rank[1] >= 2


class TestChanging:
    def test_goes_to_the_first_and_conditions_count_for_all(self, near: MemoryStore, far: MemoryStore) -> None:
        store = FirstStore([near, far])
        store.write("u/new", b"new", if_absent=True)
        assert near.read("u/new") == b"new"
        assert {stat.key for stat in far.list()} == {"u/far", "u/both"}
        with pytest.raises(Conflict):
            store.write("u/far", b"x", if_absent=True)
        store.write("u/far", b"replaced", if_version=store.stat("u/far").version)
        assert store.read("u/far") == b"replaced"
        with pytest.raises(Denied, match="only far has it"):
            FirstStore([MemoryStore("empty"), far]).delete("u/far")

    def test_what_it_wrote_is_what_it_reads_however_near_the_others_are(
        self, near: MemoryStore, far: MemoryStore
    ) -> None:
        far.before = recorder([], "far", 0.01)
        store = FirstStore([far, near])
        for number in range(3):
            store.write("u/both", b"%d" % number)
            assert store.read("u/both") == b"%d" % number

    def test_a_condition_that_cannot_be_looked_at_is_not_taken_to_hold(
        self, near: MemoryStore, far: MemoryStore
    ) -> None:
        far.before = broken
        store = FirstStore([near, far])
        with pytest.raises(Unreachable):
            store.write("u/new", b"x", if_absent=True)
        store.write("u/new", b"x")
        assert near.read("u/new") == b"x"

    def test_read_only(self, near: MemoryStore, far: MemoryStore) -> None:
        for store in (FirstStore([near, far], read_only=True), FirstStore([MemoryStore("ro", read_only=True), near])):
            assert store.info().read_only
            for change in (
                lambda store=store: store.write("u/a", b"x"),
                lambda store=store: store.delete("u/near"),
                lambda store=store: store.copy("u/near", "u/b"),
                lambda store=store: store.move("u/near", "u/b"),
                lambda store=store: store.sweep(),
            ):
                with pytest.raises(Denied, match="read-only"):
                    change()

    def test_check_says_which_one_does_not_answer(self, near: MemoryStore, far: MemoryStore) -> None:
        store = FirstStore([near, far], name="both")
        assert store.check().problems == []
        far.before = broken
        assert "no connection" in store.check().problems[0]

    def test_all_are_disconnected(self, near: MemoryStore, far: MemoryStore) -> None:
        store = FirstStore([near, far])
        store.disconnect()
        assert (store.connected, near.connected, far.connected) == (False, False, False)
        store.connect()
        assert store.read("u/far") == b"far"
