"""Two hosts and one record: removals that arrive, changes against removals, both versions kept, listed and settled."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.core.doing import Worker, trace
from tests.core.making import FILES, UUID, Place, contents, hooked, unit_of
from vfs.errors import Refused, Unreachable, UsageError
from vfs.session import Session
from vfs.trust.conflicts import unsettled


class Nobody:
    cancelled = False

    def __call__(self, event: dict[str, Any], /) -> None:
        return None


@pytest.fixture(params=["hooked", "file evicted"])
def hosts(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Place, Place]:
    """The same record on two hosts with one store, pushed by both; `evicted`: on the second it is evicted."""
    url = f"hooked://{tmp_path}" if request.param == "hooked" else (tmp_path / "store").as_uri()
    one, two = Place(tmp_path / "one", {"lab": url}), Place(tmp_path / "two", {"lab": url})
    for host in (one, two):
        host.record()
        with host.session() as session:
            settled(session)
            if host is two and "evicted" in request.param:
                session.evictor.evict(unit_of(session))
    with one.session() as session:  # the times that the other host's files have
        learn(session)
    return one, two


@pytest.fixture
def sessions(hosts: tuple[Place, Place]) -> Iterator[tuple[Session, Session]]:
    with hosts[0].session() as first, hosts[1].session() as second:
        yield first, second


def settled(session: Session) -> None:
    for _ in range(4):
        outcome = session.pusher.push(unit_of(session))
        assert not outcome.failed, outcome.failed
        if outcome.clean:
            return
    raise AssertionError("it never comes to rest")


def learn(session: Session) -> None:
    """What a mounted host does when it notices another's manifest."""
    session.core.journal.doubt_home(UUID, "lab")
    session.core.units.mark_dirty(unit_of(session), "another host changed it in lab")
    settled(session)


def base(session: Session) -> Path:
    return Path(os.fsdecode(unit_of(session).base))


def names(session: Session) -> set[str]:
    return {os.fsdecode(path) for path in contents(base(session))}


def conflicts(session: Session, **args: Any) -> dict[str, Any]:
    return session.run("conflicts", args, Nobody())


# --- removals ------------------------------------------------------------------------------------------------------


def test_what_one_host_removed_goes_on_the_other(sessions: tuple[Session, Session]) -> None:
    first, second = sessions
    (base(first) / "weights.npy").unlink()
    for path in ("notes/by step/0.txt", "notes/model.bin"):
        (base(first) / path).unlink()
    (base(first) / "notes/by step").rmdir()
    (base(first) / "notes").rmdir()
    settled(first)
    learn(second)
    assert "weights.npy" not in names(second)
    assert not (base(second) / "notes").exists()
    (base(second) / "more").write_bytes(b"m")
    second.core.units.mark_dirty(unit_of(second), "test")
    settled(second)
    learn(first)
    assert "weights.npy" not in names(first), "it came back"
    assert names(first) == names(second)
    assert unsettled(first.core) == unsettled(second.core) == []


def test_a_removal_against_a_change_keeps_the_change_and_says_so(sessions: tuple[Session, Session]) -> None:
    first, second = sessions
    (base(first) / "metrics.json").unlink()
    settled(first)
    (base(second) / "metrics.json").write_bytes(b"changed here")
    learn(second)
    learn(first)
    for session in sessions:
        assert (base(session) / "metrics.json").exists()
    there = conflicts(second)["conflicts"]
    assert [(each["path"], each["ours"]["path"], each["theirs"]) for each in there] == [
        ("metrics.json", "metrics.json", None)
    ]
    assert conflicts(second)["exit"] == 1
    done = conflicts(second, uuids=[UUID], keep="theirs")
    assert (len(done["settled"]), done["exit"]) == (1, 0)
    learn(first)
    for session in sessions:
        assert not (base(session) / "metrics.json").exists()
    assert conflicts(second) == {"conflicts": [], "exit": 0}


def test_a_change_against_a_removal_comes_back_and_says_so(sessions: tuple[Session, Session]) -> None:
    first, second = sessions
    (base(first) / "metrics.json").write_bytes(b"changed there")
    settled(first)
    (base(second) / "metrics.json").unlink()
    learn(second)
    found = conflicts(second)["conflicts"]
    assert [(each["path"], each["ours"], each["theirs"]["path"]) for each in found] == [
        ("metrics.json", None, "metrics.json")
    ]
    second.evictor.hydrate(unit_of(second))
    assert (base(second) / "metrics.json").read_bytes() == b"changed there"
    assert conflicts(second, uuids=[UUID], keep="ours")["exit"] == 0
    assert "metrics.json" not in names(second)
    learn(first)
    assert "metrics.json" not in names(first)


def test_what_is_in_use_here_is_not_taken_away(sessions: tuple[Session, Session]) -> None:
    first, second = sessions
    (base(first) / "metrics.json").unlink()
    settled(first)
    with open(base(second) / "metrics.json", "ab") as log:
        learn(second)
        assert (base(second) / "metrics.json").exists()
        log.write(b" and on")
    settled(second)
    assert (base(second) / "metrics.json").read_bytes() == FILES[b"metrics.json"] + b" and on"
    assert [clash.path for clash in unsettled(second.core)] == [b"metrics.json"]


def test_who_reads_a_removed_file_goes_on(sessions: tuple[Session, Session]) -> None:
    first, second = sessions
    (base(first) / "metrics.json").unlink()
    settled(first)
    with open(base(second) / "metrics.json", "rb") as reader:
        learn(second)
        assert not (base(second) / "metrics.json").exists()
        assert reader.read() == FILES[b"metrics.json"]


def test_a_record_that_was_emptied_elsewhere_is_not_emptied_here(sessions: tuple[Session, Session]) -> None:
    """No host of ours removes `id.json`: a manifest that says so is not believed."""
    first, second = sessions
    for path in list(base(first).rglob("*")):
        if path.is_file():
            path.unlink()
    settled(first)
    before = names(second)
    learn(second)
    assert names(second) == before


def test_killed_while_a_file_loses_its_name(tmp_path: Path) -> None:
    stores = {"lab": (tmp_path / "store").as_uri()}
    one, two = Place(tmp_path / "one", stores), Place(tmp_path / "two", stores)
    for host in (one, two):
        host.record()
        with host.session() as session:
            settled(session)
    with one.session() as session:
        (one.directory() / "weights.npy").unlink()
        (one.directory() / "metrics.json").unlink()
        settled(session)
    with two.session() as session:
        session.core.journal.doubt_home(UUID, "lab")
    worker = Worker(two.settings(), [("push", UUID)], tmp_path, "take.unnamed=kill")
    assert worker.killed()
    with two.session() as session:
        learn(session)
        assert {"weights.npy", "metrics.json"}.isdisjoint(names(session))
        assert sorted(os.listdir(two.directory().parent)) == [UUID]


# --- both changed --------------------------------------------------------------------------------------------------


@pytest.fixture
def clashing(sessions: tuple[Session, Session]) -> tuple[Session, Session]:
    """Both hosts changed `metrics.json`; the second merged, and both know of it."""
    first, second = sessions
    (base(first) / "metrics.json").write_bytes(b"of the first")
    (base(second) / "metrics.json").write_bytes(b"of the second")
    settled(first)
    learn(second)
    learn(first)
    return sessions


def test_both_versions_are_named_on_both_hosts(clashing: tuple[Session, Session]) -> None:
    for session, own in zip(clashing, (b"of the first", b"of the second"), strict=True):
        session.evictor.hydrate(unit_of(session))
        (found,) = conflicts(session, uuids=[UUID])["conflicts"]
        assert found["path"] == "metrics.json"
        assert (base(session) / found["ours"]["path"]).read_bytes() == own
        assert (base(session) / found["theirs"]["path"]).read_bytes() != own
        assert found["kind"] == "changed on both"


@pytest.mark.parametrize("keep", ["ours", "theirs", "both"])
@pytest.mark.parametrize("who", [0, 1])
def test_settling(clashing: tuple[Session, Session], keep: str, who: int) -> None:
    session, other = clashing[who], clashing[1 - who]
    wanted = {0: b"of the first", 1: b"of the second"}[who if keep == "ours" else 1 - who]
    planned = conflicts(session, uuids=[UUID], keep=keep, dry_run=True)
    before = contents(base(session))
    assert (len(planned["settled"]), planned["exit"]) == (1, 0)
    assert contents(base(session)) == before
    done = conflicts(session, uuids=[UUID], paths=["metrics.json"], keep=keep)
    assert (done["failed"], done["exit"]) == ([], 0)
    settled(session)
    learn(other)
    for each in (session, other):
        each.evictor.hydrate(unit_of(each))
        found = {path: data for path, data in contents(base(each)).items() if path.startswith(b"metrics.json")}
        if keep == "both":
            assert sorted(found.values()) == [b"of the first", b"of the second"]
        else:
            assert found == {b"metrics.json": wanted}
    assert conflicts(session)["conflicts"] == []
    assert (conflicts(other)["conflicts"] == []) is (keep != "both")


def test_what_is_given_up_is_an_earlier_version(clashing: tuple[Session, Session]) -> None:
    session = clashing[0]
    conflicts(session, uuids=[UUID], keep="theirs")
    settled(session)
    versions = session.run("versions", {"uuids": [UUID]}, Nobody())["records"][0]["versions"]
    seen = set()
    for number in [each["number"] for each in versions]:
        manifest = session.core.journal.version(UUID, "lab", number)
        seen |= {file.digest for file in manifest.files} if manifest else set()
    from blake3 import blake3

    assert blake3(b"of the first").digest() in seen


def test_settling_needs_the_store(clashing: tuple[Session, Session], request: pytest.FixtureRequest) -> None:
    if "hooked" not in request.node.name:
        pytest.skip("a store that can be taken away")
    session = clashing[0]
    (base(session) / "new").write_bytes(b"not pushed")
    session.core.units.mark_dirty(unit_of(session), "test")
    before = contents(base(session))

    def away(operation: str, key: str) -> None:
        raise Unreachable("no route")

    hooked(session).hook = away
    with pytest.raises(Refused, match="must be in the stores first"):
        conflicts(session, uuids=[UUID], keep="theirs")
    assert contents(base(session)) == before
    assert len(conflicts(session)["conflicts"]) == 1


def test_settling_leaves_what_is_in_use(clashing: tuple[Session, Session]) -> None:
    session = clashing[1]
    (found,) = conflicts(session)["conflicts"]
    before = contents(base(session))
    with open(base(session) / found["theirs"]["path"], "r+b"):
        done = conflicts(session, uuids=[UUID], keep="ours")
    assert done["exit"] == 1
    assert contents(base(session)) == before
    assert conflicts(session, uuids=[UUID], keep="ours")["exit"] == 0


def test_wrong_usage(clashing: tuple[Session, Session]) -> None:
    with pytest.raises(UsageError):
        conflicts(clashing[0], keep="ours")
    with pytest.raises(Refused, match="is in no conflict"):
        conflicts(clashing[0], uuids=[UUID], paths=["weights.npy"], keep="ours")


def test_a_host_that_lost_its_journal_finds_them_by_name(clashing: tuple[Session, Session]) -> None:
    session = clashing[1]
    for clash in session.core.journal.clashes():
        session.core.journal.settle(clash, both=False)
    assert [each["path"] for each in conflicts(session)["conflicts"]] == ["metrics.json"]


def test_settled_by_hand(clashing: tuple[Session, Session]) -> None:
    session = clashing[1]
    (found,) = conflicts(session)["conflicts"]
    (base(session) / found["theirs"]["path"]).unlink()
    session.core.units.mark_dirty(unit_of(session), "test")
    settled(session)
    assert conflicts(session)["conflicts"] == []


def test_points_of_a_settling(tmp_path: Path) -> None:
    """A push that brings a removal passes the point at which a test kills it."""
    stores = {"lab": (tmp_path / "store").as_uri()}
    one, two = Place(tmp_path / "one", stores), Place(tmp_path / "two", stores)
    for host in (one, two):
        host.record()
        with host.session() as session:
            settled(session)
    with one.session() as session:
        (one.directory() / "weights.npy").unlink()
        settled(session)
    with two.session() as session:
        session.core.journal.doubt_home(UUID, "lab")
    assert "take.unnamed" in trace(two.settings(), "push", UUID, tmp_path)
