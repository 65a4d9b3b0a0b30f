"""What is brought ahead: the small files of the record that was touched, and those of the next ones for a walk."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.core.making import Place, unit_of, until
from vfs.ahead import AHEAD
from vfs.cache import read_header
from vfs.session import Session
from vfs.settings import CacheSettings

UUIDS = [f"record{number:06}" for number in range(8)]  # in the order of the root's listing
RESIDENT = UUIDS[5]
SMALL = b"notes.txt"


@pytest.fixture
def session(tmp_path: Path) -> Iterator[Session]:
    """Eight records, all but one evicted."""
    place = Place(tmp_path / "host", {"lab": f"hooked://{tmp_path}/lab"}, {"cache": CacheSettings(keep_small=0)})
    for uuid in UUIDS:
        place.record(uuid, files={SMALL: uuid.encode() * 100})
    with place.session() as session:
        for uuid in UUIDS:
            if uuid != RESIDENT:
                session.evictor.evict(unit_of(session, uuid))
        yield session


def is_here(session: Session, uuid: str) -> bool:
    return read_header(unit_of(session, uuid).base + b"/" + SMALL) is None


def here(session: Session) -> list[str]:
    session.core.settle()
    return [uuid for uuid in UUIDS if is_here(session, uuid)]


def touch(session: Session, uuid: str) -> None:
    session.hydrator.ahead.touched(unit_of(session, uuid))
    until(lambda: is_here(session, uuid))


def test_one_touch_brings_that_record_only(session: Session) -> None:
    touch(session, UUIDS[2])
    assert here(session) == [UUIDS[2], RESIDENT]


def test_touches_here_and_there_are_no_walk(session: Session) -> None:
    for uuid in (UUIDS[0], UUIDS[2], UUIDS[1], UUIDS[6]):
        touch(session, uuid)
    assert here(session) == [UUIDS[0], UUIDS[1], UUIDS[2], RESIDENT, UUIDS[6]]


def test_a_walk_gets_the_next_records_and_goes_on_as_it_comes_there(session: Session) -> None:
    assert AHEAD == 2
    touch(session, UUIDS[0])
    touch(session, UUIDS[1])
    until(lambda: is_here(session, UUIDS[3]))
    assert here(session) == [*UUIDS[:4], RESIDENT]
    session.hydrator.ahead.opened(unit_of(session, UUIDS[2]))  # all of it is here: no read waits in it
    until(lambda: is_here(session, UUIDS[4]))
    assert here(session) == [*UUIDS[:5], RESIDENT]
    session.hydrator.ahead.opened(unit_of(session, UUIDS[4]))
    until(lambda: is_here(session, UUIDS[6]))
    assert here(session) == UUIDS[:7], "the resident one between them is nothing to bring"


def test_opening_files_of_other_records_brings_nothing(session: Session) -> None:
    touch(session, UUIDS[0])
    session.hydrator.ahead.opened(unit_of(session, UUIDS[1]))
    session.hydrator.ahead.opened(unit_of(session, UUIDS[6]))
    assert here(session) == [UUIDS[0], RESIDENT]


def test_what_was_evicted_again_comes_again(session: Session) -> None:
    """Also within the time for which nobody looks again at a record that was brought."""
    for _time in range(2):
        touch(session, UUIDS[0])
        touch(session, UUIDS[1])
        until(lambda: {UUIDS[2], UUIDS[3]} <= set(here(session)))
        for uuid in UUIDS[:4]:
            session.evictor.evict(unit_of(session, uuid))
        assert here(session) == [RESIDENT]
