"""What is asked for when a reader goes on through a file: whole flights, whatever order the kernel asks in."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.core.making import UUID, Place, unit_of
from vfs import cache
from vfs.cache import Partial, read_header
from vfs.filesystem import FileSystem, Handle, Needs
from vfs.hydrate import FLIGHT
from vfs.manifest import CHUNK
from vfs.session import Session

CHUNKS = 96
BEHIND = 6  # reads that still wait while the kernel asks for later bytes


@pytest.fixture
def session(tmp_path: Path) -> Iterator[Session]:
    place = Place(tmp_path / "host", {"lab": f"file://{tmp_path}/lab"})
    place.record()
    with place.session() as session:
        session.evictor.evict(unit_of(session))
        yield session


class Reader:
    """The kernel, reading a file of which nothing is here; the store is slow. `asked`: the groups of neighbours that
    were asked for together."""

    def __init__(self, session: Session, place: Path) -> None:
        self.files = FileSystem(session.core)
        record = self.files.lookup(self.files.tree.root.ino, UUID.encode())
        directory = os.open(place, os.O_RDONLY)
        try:
            fd = cache.make_placeholder(directory, b"large", bytes(32), CHUNKS * CHUNK, 0o600)
        finally:
            os.close(directory)
        header = read_header(fd)
        assert header is not None
        self.partial = Partial(fd, header)
        self.partial.users = 1
        self.handle = Handle(self.files.tree.get(record.ino), fd, os.O_RDONLY, self.partial)  # type: ignore[arg-type]
        self.core = session.core
        self.asked: list[list[int]] = []
        self._known: set[int] = set()

    def read(self, number: int, *, again: bool = False) -> None:
        """One chunk asked for; it need not be here."""
        try:
            self.files.have(self.handle, number * CHUNK, CHUNK, again=again)
        except Needs as needs:
            self._ask(needs.numbers)
            self._ask(needs.ahead)
            self.core.release(needs.partial)
        else:
            self._ask(self.files.ahead(self.handle, number * CHUNK, CHUNK))

    def _ask(self, numbers: list[int]) -> None:
        for number in numbers:
            if number in self._known:
                continue
            self._known.add(number)
            if self.asked and self.asked[-1][-1] + 1 == number and number % FLIGHT:
                self.asked[-1].append(number)
            else:
                self.asked.append([number])

    def close(self) -> None:
        os.close(self.partial.fd)


@pytest.fixture
def reader(session: Session, tmp_path: Path) -> Iterator[Reader]:
    made = Reader(session, tmp_path)
    yield made
    made.close()


def test_a_reader_that_goes_on_is_met_by_whole_flights(reader: Reader) -> None:
    """The kernel keeps several reads under way and tells of them in any order; each that had to wait asks again."""
    waiting: list[int] = []
    for first in range(0, CHUNKS, 2):
        for number in (first + 1, first):
            reader.read(number)
            waiting.append(number)
        while len(waiting) > BEHIND:
            number = waiting.pop(0)
            reader.partial.fill(number, bytes(CHUNK))
            reader.read(number, again=True)
    assert sorted(number for group in reader.asked for number in group) == list(range(CHUNKS)), "each chunk once"
    steady = [group for group in reader.asked if group[0] >= 2 * FLIGHT]
    assert [len(group) for group in steady] == [FLIGHT] * (CHUNKS // FLIGHT - 2)


def test_a_reader_that_jumps_gets_what_it_asks_for(reader: Reader) -> None:
    for number in (50, 3, 90, 20, 70):
        reader.read(number)
    assert reader.asked == [[50], [3], [90], [20], [70]]
