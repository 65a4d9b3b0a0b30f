"""Transactions on a record: what waits, what commit publishes, what rollback brings back, and what a kill leaves."""

import os
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.core.doing import Worker, held, trace
from tests.core.making import FILES, UUID, Place, contents, hooked, noise, unit_of
from tests.core.test_versions import embellish, kept, mess_up, push, run, tree, version_in
from vfs.core import manifest_key
from vfs.errors import NoReplica, Refused, Unreachable, UsageError
from vfs.events import Event, ObjectDeleted, ObjectSet, TransactionBegan, TransactionEnded
from vfs.journal import _MIGRATIONS
from vfs.manifest import CHUNK, Manifest, parse
from vfs.session import Session


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "host", {"lab": f"hooked://{tmp_path}"})


@pytest.fixture
def session(place: Place) -> Iterator[Session]:
    embellish(place.record())
    with place.session() as session:
        yield session


def transaction(session: Session, what: str, **more: Any) -> dict[str, Any]:
    return run(session, "transaction", what=what, uuid=UUID, **more)


def present(session: Session) -> Manifest:
    return parse(hooked(session).raw(manifest_key(UUID)), UUID)


# --- begin ---------------------------------------------------------------------------------------------------------


def test_pushes_wait_and_say_why(session: Session, place: Place) -> None:
    transaction(session, "begin", notes="cleaning")
    before = present(session)
    mess_up(place.directory())
    session.core.units.mark_dirty(unit_of(session), "test")
    with pytest.raises(Refused, match=rf"a transaction is open since .*runfs transaction commit {UUID}"):
        session.pusher.push(unit_of(session))
    result = run(session, "push", uuids=[UUID])
    assert "a transaction is open" in result["failed"][0]["reason"]
    assert present(session) == before
    (said,) = run(session, "status")["transactions"]
    assert (said["uuid"], said["state"], said["notes"]) == (UUID, "open", "cleaning")


def test_nothing_else_happens_to_it_meanwhile(session: Session, place: Place) -> None:
    push(session)
    mess_up(place.directory())
    push(session)
    transaction(session, "begin")
    stays = session.evictor.stays(unit_of(session))
    assert stays is not None
    assert stays.reason == "in a transaction"
    with pytest.raises(Refused, match="in a transaction"):
        session.evictor.evict(unit_of(session))
    with pytest.raises(Refused, match="transaction is open"):
        run(session, "versions restore", uuid=UUID, number=1)
    assert "transaction" in run(session, "versions prune", uuids=[UUID], keep=0)["failed"][0]["reason"]
    safe = run(session, "safe", uuids=[UUID])
    assert not safe["safe"]
    assert "transaction is open" in safe["unsafe"][0]["reason"]
    with pytest.raises(Refused, match="transaction is open"):
        transaction(session, "begin")


def test_it_begins_with_every_byte_proven_to_be_in_a_home(session: Session, place: Place) -> None:
    write_later = place.directory() / "weights.npy"
    write_later.write_bytes(noise(CHUNK, 5))
    transaction(session, "begin")
    assert {file.digest for file in present(session).files if file.digest} <= {
        digest
        for digest, replica in session.core.journal.replicas_of(UUID, "lab").items()
        if replica.proven_ns and replica.how
    }


def test_no_transaction_without_what_it_can_go_back_to(session: Session, place: Place) -> None:
    def away(operation: str, key: str) -> None:
        raise Unreachable("no route")

    hooked(session).hook = away
    with pytest.raises(Refused, match=r"no transaction begun.*no route"):
        transaction(session, "begin")
    assert session.core.transactions == session.core.journal.transactions() == {}


def test_a_store_that_lost_bytes_is_found_out_at_the_begin(session: Session, place: Place) -> None:
    push(session)
    session.core.journal.doubt_replicas(UUID, "lab")
    key = present(session).by_path()[b"weights.npy"].key
    hooked(session).put(key, b"rotten")
    transaction(session, "begin")
    key = present(session).by_path()[b"weights.npy"].key
    assert hooked(session).raw(key) == FILES[b"weights.npy"], "it was pushed again"


def test_what_cannot_begin(session: Session, place: Place) -> None:
    (place.directory() / "finished_at").unlink()
    (place.directory() / "heartbeat_at").write_text(time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()))
    with pytest.raises(Refused, match="live"):
        transaction(session, "begin")
    (place.directory() / "heartbeat_at").unlink()
    unit = unit_of(session)
    unit.writers = 1
    with pytest.raises(Refused, match="open for writing"):
        transaction(session, "begin")
    unit.writers = 0
    with pytest.raises(UsageError, match="longer than"):
        transaction(session, "begin", notes="x" * 100_000)
    with pytest.raises(Refused, match="no transaction is open"):
        transaction(session, "commit")
    with pytest.raises(Refused, match="no transaction is open"):
        transaction(session, "rollback")


def test_a_change_at_the_moment_of_the_begin(session: Session, place: Place) -> None:
    unit = unit_of(session)
    sequence = session.core.sequence
    session.core.sequence = lambda of: sequence(of) - 1  # type: ignore[method-assign]
    with pytest.raises(Refused, match="changed just now"):
        session.transactions.begin(unit)
    session.core.sequence = sequence  # type: ignore[method-assign]
    assert session.core.transactions == {}


def test_it_is_still_open_in_the_next_process(place: Place) -> None:
    place.record()
    with place.session() as session:
        transaction(session, "begin", notes="long work")
    (place.directory() / "added").write_bytes(b"a")
    with place.session() as session:
        with pytest.raises(Refused, match="a transaction is open"):
            session.pusher.push(unit_of(session))
        transaction(session, "commit")
        assert present(session).notes == "long work"


# --- commit --------------------------------------------------------------------------------------------------------


def test_commit_publishes_one_version_with_its_notes(session: Session, place: Place) -> None:
    push(session)
    first = contents(place.directory())
    transaction(session, "begin", notes="at first")
    for number in range(5):
        (place.directory() / f"step {number}").write_bytes(b"%d" % number)
    mess_up(place.directory())
    result = transaction(session, "commit", notes="cleaned")
    assert (result["exit"], result["version"]) == (0, 2)
    assert (present(session).generation, present(session).notes) == (2, "cleaned")
    assert kept(hooked(session)) == {1}
    assert version_in(hooked(session), 1) == first
    assert session.core.transactions == session.core.journal.transactions() == {}
    (place.directory() / "afterwards").write_bytes(b"x")
    push(session)
    assert present(session).notes == ""


def test_commit_of_nothing_publishes_nothing(session: Session) -> None:
    transaction(session, "begin")
    before = present(session)
    result = transaction(session, "commit", notes="nothing")
    assert (result["exit"], result["version"]) == (0, None)
    assert present(session) == before
    assert session.core.journal.transactions() == {}


def test_a_commit_that_the_store_cannot_take_is_done_later(session: Session, place: Place) -> None:
    transaction(session, "begin", notes="kept")
    (place.directory() / "added").write_bytes(b"a")

    def away(operation: str, key: str) -> None:
        raise Unreachable("no route")

    hooked(session).hook = away
    result = transaction(session, "commit")
    assert result["exit"] == 1
    assert "no route" in result["failed"][0]["reason"]
    assert session.core.journal.transactions()[UUID].state == "committing"
    with pytest.raises(Refused, match="committed already"):
        transaction(session, "rollback")
    hooked(session).hook = lambda _operation, _key: None
    push(session)
    assert (present(session).notes, present(session).by_path()[b"added"].size) == ("kept", 1)
    assert session.core.journal.transactions() == {}


def test_two_stores_get_the_notes_once_each(tmp_path: Path) -> None:
    place = Place(tmp_path / "host", {"lab": f"hooked://{tmp_path}/lab", "disk": f"hooked://{tmp_path}/disk"})
    place.record()

    def away(operation: str, key: str) -> None:
        raise Unreachable("no route")

    with place.session() as session:
        transaction(session, "begin", notes="both")
        (place.directory() / "added").write_bytes(b"a")
        hooked(session, "disk").hook = away
        transaction(session, "commit")
        (place.directory() / "added").write_bytes(b"again")
        hooked(session, "disk").hook = lambda _operation, _key: None
        push(session)
        notes = {name: parse(hooked(session, name).raw(manifest_key(UUID))).notes for name in ("lab", "disk")}
    assert notes == {"lab": "", "disk": "both"}


# --- rollback ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("evicted", [False, True])
def test_rollback_brings_everything_back(session: Session, place: Place, evicted: bool) -> None:
    directory, unit = place.directory(), unit_of(session)
    before = tree(directory)
    if evicted:
        session.evictor.evict(unit)
    transaction(session, "begin")
    if evicted:
        session.evictor.hydrate(unit)
    generation = present(session).generation
    mess_up(Path(os.fsdecode(unit.base)))
    result = transaction(session, "rollback")
    assert result["exit"] == 0
    if evicted:
        session.evictor.hydrate(unit)
    assert tree(unit.base) == before
    assert push(session).clean
    assert present(session).generation == generation, "nothing is published: nothing has changed"
    if evicted:
        session.evictor.restore(unit)
        assert tree(directory) == before
    assert not list(directory.parent.glob(".runfs*"))
    assert session.core.journal.transactions() == {}


def test_rollback_refuses_while_somebody_writes(session: Session, place: Place) -> None:
    transaction(session, "begin")
    with (place.directory() / "metrics.json").open("ab") as file:
        file.write(b"more")
        file.flush()
        with pytest.raises(Refused, match="open for writing"):
            transaction(session, "rollback")
        assert session.core.transactions[UUID].state == "open"
    transaction(session, "rollback")
    assert (place.directory() / "metrics.json").read_bytes() == FILES[b"metrics.json"]


def test_a_rollback_whose_bytes_do_not_come_is_carried_on(session: Session, place: Place) -> None:
    before = tree(place.directory())
    transaction(session, "begin")
    mess_up(place.directory())
    after = tree(place.directory())

    def away(operation: str, key: str) -> None:
        raise Unreachable("no route")

    hooked(session).hook = away
    with pytest.raises(NoReplica, match="no route"):
        transaction(session, "rollback")
    assert tree(place.directory()) == after, "nothing was touched"
    with pytest.raises(Refused, match="rollback was interrupted"):
        session.pusher.push(unit_of(session))
    hooked(session).hook = lambda _operation, _key: None
    assert session.transactions.resume(unit_of(session))
    assert tree(place.directory()) == before
    assert not session.transactions.resume(unit_of(session))
    assert push(session).clean


def test_what_others_published_meanwhile_is_merged(tmp_path: Path) -> None:
    stores = {"lab": f"hooked://{tmp_path}"}
    one, two = Place(tmp_path / "one", stores), Place(tmp_path / "two", stores)
    for place in (one, two):
        place.record()
    with one.session() as first, two.session() as second:
        push(first)
        push(second)
        transaction(first, "begin")
        (one.directory() / "from one").write_bytes(b"1")
        (two.directory() / "from two").write_bytes(b"2")
        push(second)
        transaction(first, "commit", notes="ours")
        assert present(first).notes == "ours"
        assert {b"from one", b"from two"} <= present(first).by_path().keys()


def test_events(session: Session, place: Place) -> None:
    told: list[Event] = []
    session.core.events.subscribe(told.append, TransactionBegan, TransactionEnded)
    transaction(session, "begin", notes="n")
    transaction(session, "rollback")
    transaction(session, "begin")
    transaction(session, "commit")
    assert told == [
        TransactionBegan(UUID, "n"),
        TransactionEnded(UUID, False),
        TransactionBegan(UUID, ""),
        TransactionEnded(UUID, True),
    ]


def test_what_a_commit_sets_is_told_after_its_end(tmp_path: Path) -> None:
    """Also where one of the stores takes it at the second push only."""
    place = Place(tmp_path / "host", {name: f"hooked://{tmp_path}/{name}" for name in ("one", "two")})
    place.record()
    told: list[Event] = []
    with place.session() as session:
        transaction(session, "begin")
        (place.directory() / "metrics.json").write_bytes(b"new")
        session.core.events.subscribe(told.append, TransactionEnded, ObjectSet, ObjectDeleted)

        def away(operation: str, key: str) -> None:
            raise Unreachable("it is away")

        hooked(session, "two").hook = away
        assert transaction(session, "commit")["exit"] == 1
        assert told == []
        hooked(session, "two").hook = lambda _operation, _key: None
        assert push(session).clean
    assert told[0] == TransactionEnded(UUID, True)
    changed = told[1:]
    assert not [event for event in changed if isinstance(event, TransactionEnded)]
    assert {(event.store, event.key) for event in changed if isinstance(event, ObjectSet)} >= {
        (f"{tmp_path}/one", manifest_key(UUID)),
        (f"{tmp_path}/two", manifest_key(UUID)),
    }


# --- crashes -------------------------------------------------------------------------------------------------------


def changed(place: Place) -> None:
    (place.directory() / "metrics.json").write_bytes(b"changed")
    (place.directory() / "weights.npy").unlink()
    (place.directory() / "added").write_bytes(b"a")
    os.utime(place.directory() / "empty", ns=(5, 7))


def test_killed_at_every_point_of_a_begin(tmp_path: Path) -> None:
    points: list[str] = []
    for number in range(20):
        place = Place(tmp_path / str(number))
        place.record()
        if not points:
            points = [*dict.fromkeys(trace(place.settings(), "begin", UUID, tmp_path))]
            assert {"transaction.kept", "transaction.begun"} <= set(points)
            continue
        if number > len(points):
            break
        assert Worker(place.settings(), [("begin", UUID)], tmp_path, f"{points[number - 1]}=kill").killed()
        with place.session() as session:
            begun = UUID in session.core.transactions
            assert begun == (points[number - 1] == "transaction.begun"), points[number - 1]
            before = tree(place.directory())
            if not begun:
                transaction(session, "begin")
            changed(place)
            transaction(session, "rollback")
            assert tree(place.directory()) == before


def test_killed_at_every_point_of_a_commit(tmp_path: Path) -> None:
    """It is open still, or committed: then one version is published, with its notes."""
    points: list[str] = []
    for number in range(20):
        place = Place(tmp_path / str(number))
        place.record()
        with place.session() as session:
            before = tree(place.directory())
            transaction(session, "begin", notes="all of it")
            changed(place)
        if not points:
            points = [*dict.fromkeys(trace(place.settings(), "commit", UUID, tmp_path))]
            assert {"transaction.committing", "push.published", "transaction.published"} <= set(points)
            continue
        if number > len(points):
            break
        assert Worker(place.settings(), [("commit", UUID)], tmp_path, f"{points[number - 1]}=kill").killed()
        with place.session() as session:
            after = tree(place.directory())
            assert after != before
            state = session.core.transactions.get(UUID)
            assert state is None or state.state == "committing"
            assert push(session).clean
            manifest = parse((place.store / manifest_key(UUID)).read_bytes(), UUID)
            assert (manifest.generation, manifest.notes) == (2, "all of it"), points[number - 1]
            assert session.core.journal.transactions() == {}
            assert tree(place.directory()) == after


def test_killed_at_every_point_of_a_rollback(tmp_path: Path) -> None:
    points: list[str] = []
    for number in range(40):
        place = Place(tmp_path / str(number))
        embellish(place.record())
        with place.session() as session:
            before = tree(place.directory())
            transaction(session, "begin")
            mess_up(place.directory())
        if not points:
            points = [*dict.fromkeys(trace(place.settings(), "rollback", UUID, tmp_path))]
            assert {"transaction.rolling", "revert.made", "revert.synced", "transaction.reverted"} <= set(points)
            points += ["revert.made#2", "revert.removed#2", "revert.made#4"]
            continue
        if number > len(points):
            break
        assert Worker(place.settings(), [("rollback", UUID)], tmp_path, f"{points[number - 1]}=kill").killed()
        with place.session() as session:
            assert session.core.transactions[UUID].state in ("open", "rolling back")
            generation = parse((place.store / manifest_key(UUID)).read_bytes()).generation
            transaction(session, "rollback")
            assert tree(place.directory()) == before, points[number - 1]
            assert push(session).clean
            assert parse((place.store / manifest_key(UUID)).read_bytes()).generation == generation
            assert not list(place.directory().parent.glob(".runfs*"))


def test_a_write_during_a_rollback_stops_it(tmp_path: Path) -> None:
    """What is written at the last moment is neither lost silently nor mixed in: the rollback says so."""
    place = Place(tmp_path / "host")
    place.record()
    with place.session() as session:
        before = tree(place.directory())
        transaction(session, "begin")
    changed(place)
    with held(place.settings(), "rollback", UUID, tmp_path, "revert.prepared") as worker:
        (place.directory() / "metrics.json").write_bytes(b"at the last moment")
    assert "changed just now" in worker.said()[0]
    assert (place.directory() / "metrics.json").read_bytes() == b"at the last moment"
    with place.session() as session:
        assert session.core.transactions[UUID].state == "rolling back"
        transaction(session, "rollback")
    assert tree(place.directory()) == before


def test_doctor_tells_of_a_forgotten_one(session: Session) -> None:
    transaction(session, "begin")
    (fresh,) = [each for each in run(session, "doctor")["checks"] if each["name"] == "transaction"]
    held = session.core.transactions[UUID]
    session.core.transactions[UUID] = replace(held, began_ns=held.began_ns - int(2 * 86400e9))
    (old,) = [each for each in run(session, "doctor")["checks"] if each["name"] == "transaction"]
    assert (fresh["ok"], old["ok"]) == (True, None)
    assert f"runfs transaction rollback {UUID}" in old["message"]


def test_a_journal_from_before_there_were_transactions(place: Place) -> None:
    place.record()
    state = place.settings().state
    state.mkdir(parents=True, mode=0o700)
    with sqlite3.connect(state / "journal.sqlite") as db:
        db.executescript(_MIGRATIONS[0] + ";PRAGMA user_version=1")
    db.close()
    with place.session() as session:
        transaction(session, "begin")
        (place.directory() / "added").write_bytes(b"a")
        transaction(session, "commit")
        assert kept(hooked(session)) == {1}
