"""What would be evicted: rules in, a plan out, oldest use first, each with the reason why it stays."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.core.making import NESTED, OLD_NS, Place, hooked, noise, unit_of, write_record
from vfs import policy
from vfs.errors import UnknownRecord, UsageError
from vfs.policy import Rules, free_bytes, plan, roots, wanted_free
from vfs.session import Session
from vfs.settings import CacheSettings, limit_of

SMALL, LARGE, THIRD = "recordAAAA01", "recordBBBB02", "recordCCCC03"


@pytest.fixture
def place(tmp_path: Path) -> Place:
    place = Place(tmp_path / "host", {"lab": f"hooked://{tmp_path}"})
    place.record(SMALL, {b"a": b"one"})
    place.record(LARGE, {b"a": noise(500_000)})
    inner = place.record(THIRD, {b"a": noise(100_000)}) / "executions" / NESTED
    write_record(inner, NESTED, {}, parent=THIRD)
    place.ingest(inner)
    return place


@pytest.fixture
def session(place: Place) -> Iterator[Session]:
    with place.session() as session:
        for uuid in (SMALL, LARGE, THIRD):
            session.pusher.push(unit_of(session, uuid))
        session.core.journal.set_used({SMALL: 3 * 10**9 + OLD_NS, LARGE: 1 * 10**9 + OLD_NS, THIRD: 2 * 10**9 + OLD_NS})
        yield session


def chosen(session: Session, **args: Any) -> list[str]:
    return [candidate.unit.uuid for candidate in plan(session.core, session.evictor, Rules.of(args))]


def test_roots_are_not_nested(session: Session) -> None:
    assert [record.uuid for record in roots(session.core)] == [SMALL, LARGE, THIRD]


def test_oldest_use_first(session: Session) -> None:
    assert chosen(session) == [LARGE, THIRD, SMALL]
    unit = unit_of(session, LARGE)
    unit.used_ns = time.time_ns()
    assert chosen(session) == [THIRD, SMALL, LARGE]


def test_named_ones_and_what_they_are_nested_in(session: Session) -> None:
    assert chosen(session, uuids=[NESTED, THIRD, SMALL]) == [THIRD, SMALL]
    with pytest.raises(UnknownRecord):
        chosen(session, uuids=["nothing"])


def test_named_ones_ignore_the_other_rules(session: Session) -> None:
    assert chosen(session, uuids=[SMALL], older_than=10**12) == [SMALL]


WHERE: list[tuple[str, list[str]]] = [
    ("size>200k", [LARGE]),
    ("size<200k", [THIRD, SMALL]),
    ("module=mymodel", [LARGE, THIRD, SMALL]),
    ("module=other*", []),
    ("config.lr=0.1", [LARGE, THIRD, SMALL]),
    ("config.lr>0.5", []),
    ("config.nothing=1", []),
    ("kind=Execution", []),
    ("status=finished", [LARGE, THIRD, SMALL]),
    ("age>30d and size>50k", [LARGE, THIRD]),
]


def test_where(session: Session) -> None:
    for where, expected in WHERE:
        assert chosen(session, where=where) == expected, where


def test_a_bad_condition_is_told(session: Session) -> None:
    with pytest.raises(UsageError):
        chosen(session, where="colour=red")


def test_older_than(session: Session) -> None:
    day = 86400.0
    age = time.time() - OLD_NS / 1e9
    assert chosen(session, older_than=age - day) == [LARGE, THIRD, SMALL]
    assert chosen(session, older_than=age + day) == []
    session.core.journal.set_used({LARGE: time.time_ns()})
    assert chosen(session, older_than=day) == [THIRD, SMALL]


def test_each_says_why_it_stays(session: Session) -> None:
    session.core.journal.pin(SMALL, True)
    reasons = {c.unit.uuid: c.stays and c.stays.reason for c in plan(session.core, session.evictor, Rules())}
    assert reasons == {SMALL: "pinned", LARGE: None, THIRD: None}


def test_a_record_whose_place_is_elsewhere_does_not_hold_the_others(session: Session, place: Place) -> None:
    session.core.index.ingest(str(place.directory(SMALL)), at="s3://elsewhere/x")
    session.core.journal.drop_unit(SMALL)
    assert set(chosen(session)) >= {LARGE, THIRD}


def test_what_is_evicted_already_is_left_out_until_something_came_back(session: Session) -> None:
    unit = unit_of(session, LARGE)
    session.evictor.evict(unit)
    assert chosen(session) == [THIRD, SMALL]
    assert not policy.holds_more(session.core, unit)
    session.evictor.hydrate(unit)
    assert policy.holds_more(session.core, unit)
    assert set(chosen(session)) == {LARGE, THIRD, SMALL}
    assert chosen(session, uuids=[LARGE]) == [LARGE]


def test_planning_changes_nothing(session: Session, place: Place) -> None:
    before = hooked(session).names(), session.core.journal.receipts()
    hooked(session).done.clear()
    plan(session.core, session.evictor, Rules())
    assert hooked(session).done == [], "no store is asked"
    assert (hooked(session).names(), session.core.journal.receipts()) == before
    assert not place.directory(LARGE).is_symlink()


@pytest.mark.parametrize(("mark", "expected"), [("90%", 900), ("12.5%", 125), (300, 300), (None, None)])
def test_limit_of(mark: str | int | None, expected: int | None) -> None:
    assert limit_of(mark, 1000) == expected


def test_wanted_free(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.statvfs(place.root)
    block = real.f_frsize

    def disk(available: int) -> None:
        values = list(real)
        values[2], values[3], values[4] = 1000, available, available  # of 1000 blocks
        monkeypatch.setattr(os, "statvfs", lambda _path: os.statvfs_result(values))

    with place.session(cache=CacheSettings(high="90%", low="80%")) as session:
        disk(150)
        assert wanted_free(session.core) is None
        assert free_bytes(place.root) == 150 * block
        disk(50)
        assert wanted_free(session.core) == pytest.approx(200 * block, abs=block)
    with place.session(cache=CacheSettings(high=None, low=None)) as session:
        assert wanted_free(session.core) is None
