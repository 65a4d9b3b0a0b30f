"""Placeholders and partial files, against a plain file, in random sequences, with the process ending anywhere.

The reference has two versions of every byte: what the last save made durable, and what was written since. After an end
without a save each byte may show one or the other, but never a hole, never something older.
"""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.core.making import noise
from vfs import cache
from vfs.cache import CacheError, Header, Partial, read_header, write_header
from vfs.errors import NoReplica
from vfs.manifest import CHUNK

SIZE = 3 * CHUNK + 777
OLD = 1_700_000_000_000_000_000


def placeholder(directory: Path, size: int = SIZE, mode: int = 0o644, name: bytes = b"file") -> int:
    """An open new placeholder of `noise(size)`."""
    top = os.open(directory, os.O_PATH)
    try:
        fd = cache.make_placeholder(top, name, blake3(noise(size)).digest(), size, mode)
    finally:
        os.close(top)
    os.utime(fd, ns=(OLD, OLD))
    return fd


@pytest.fixture
def partial(tmp_path: Path) -> Iterator[Partial]:
    fd = placeholder(tmp_path)
    header = read_header(fd)
    assert header is not None
    made = Partial(fd, header)
    yield made
    os.close(made.fd)


def chunk(number: int, content: bytes | None = None) -> bytes:
    return (content or noise(SIZE))[number * CHUNK : (number + 1) * CHUNK]


def reopened(partial: Partial) -> Partial | None:
    """The same file as the next process finds it; None when all of it is here."""
    header = read_header(partial.fd)
    return None if header is None else Partial(os.dup(partial.fd), header)


# --- the attribute -------------------------------------------------------------------------------------------------


def test_a_placeholder_is_exact_and_empty(tmp_path: Path) -> None:
    fd = placeholder(tmp_path, mode=0o640)
    status = os.fstat(fd)
    header = read_header(fd)
    os.close(fd)
    assert (status.st_size, status.st_mode & 0o7777, status.st_mtime_ns) == (SIZE, 0o640, OLD)
    assert header == Header(blake3(noise(SIZE)).digest(), SIZE)
    assert header == read_header(os.fsencode(tmp_path / "file"))
    assert header.local_bytes == 0


def test_an_empty_placeholder_is_an_ordinary_file(tmp_path: Path) -> None:
    fd = placeholder(tmp_path, 0)
    assert read_header(fd) is None
    os.close(fd)


def test_header_round_trip(tmp_path: Path) -> None:
    fd = placeholder(tmp_path)
    header = Header(bytes(range(32)), SIZE, True, ((0, 1), (2, 4)))
    write_header(fd, header)
    assert read_header(fd) == header
    assert header.local_bytes == CHUNK + CHUNK + 777
    os.close(fd)


def test_a_damaged_attribute_is_no_whole_file(tmp_path: Path) -> None:
    fd = placeholder(tmp_path)
    os.setxattr(fd, cache.ATTRIBUTE, b"junk")
    with pytest.raises(CacheError):
        read_header(fd)
    os.close(fd)


def test_a_records_own_attributes_leave_less_room_for_runs(tmp_path: Path) -> None:
    """Runs that do not fit are brought again; the shortest go first."""
    runs = ((0, 90), *((100 + 2 * n, 101 + 2 * n) for n in range(300)))
    fd = placeholder(tmp_path)
    os.setxattr(fd, "user.note", bytes(2_000))  # of ext4's 4 KiB
    write_header(fd, Header(bytes(32), 1000 * CHUNK, False, runs))
    header = read_header(fd)
    assert header is not None
    assert header.runs[0] == (0, 90)
    assert set(header.runs) <= set(runs)
    assert len(header.runs) > 50
    assert os.getxattr(fd, "user.note") == bytes(2_000)
    os.close(fd)


def test_too_many_runs_are_forgotten_not_invented(tmp_path: Path) -> None:
    runs = tuple((2 * n, 2 * n + 1) for n in range(500))
    fd = placeholder(tmp_path)
    write_header(fd, Header(bytes(32), 1000 * CHUNK, False, runs))
    header = read_header(fd)
    assert header is not None
    assert set(header.runs) < set(runs)
    with pytest.raises(CacheError):  # a chunk that was changed must not be forgotten
        write_header(fd, Header(bytes(32), 1000 * CHUNK, True, runs))
    os.close(fd)


def test_a_change_that_cannot_be_marked_is_not_made(tmp_path: Path) -> None:
    """A file whose attribute says "unchanged" after it was written to would never be pushed."""
    fd = placeholder(tmp_path, 1)
    os.ftruncate(fd, 1000 * CHUNK)
    many = Partial(fd, Header(bytes(32), 1000 * CHUNK, False, tuple((2 * n, 2 * n + 1) for n in range(500))))
    for _ in range(2):  # the second try must be refused like the first
        with pytest.raises(CacheError):
            many.write(fd, b"new", 0)
    assert os.pread(fd, 3, 0) == bytes(3)
    os.close(fd)


def test_drop_makes_it_a_placeholder_again(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(noise(SIZE))
    fd = os.open(tmp_path / "file", os.O_RDWR)
    os.utime(fd, ns=(OLD, OLD))
    freed = cache.drop(fd, blake3(noise(SIZE)).digest(), SIZE)
    header, status = read_header(fd), os.fstat(fd)
    os.close(fd)
    assert header == Header(blake3(noise(SIZE)).digest(), SIZE)
    assert (status.st_size, status.st_mtime_ns) == (SIZE, OLD)
    assert freed >= 3 * CHUNK
    assert cache.supports_attributes(os.fsencode(tmp_path))


def test_open_writable_where_the_mode_forbids_it(tmp_path: Path) -> None:
    fd = placeholder(tmp_path, mode=0o444)
    own = cache.open_writable(fd)
    assert os.pwrite(own, b"x", 0) == 1
    assert os.fstat(fd).st_mode & 0o777 == 0o444
    os.close(own)
    os.close(fd)


# --- which chunks are here -----------------------------------------------------------------------------------------


def test_missing_and_needed(partial: Partial) -> None:
    assert partial.missing(0, SIZE) == [0, 1, 2, 3]
    assert partial.missing(CHUNK - 1, 2) == [0, 1]
    assert partial.missing(SIZE, 10) == [3]
    assert partial.missing(4 * CHUNK, 10) == []
    assert partial.missing(5, 0) == []
    assert partial.needed_for_write(0, CHUNK) == []
    assert partial.needed_for_write(0, CHUNK + 1) == [1]
    assert partial.needed_for_write(3 * CHUNK, 777) == []  # the last chunk, all of it
    assert partial.needed_for_write(SIZE, 1) == [3]
    assert partial.needed_for_truncate(CHUNK) == []
    assert partial.needed_for_truncate(CHUNK + 1) == [1]
    assert partial.needed_for_truncate(0) == []
    assert partial.needed_for_truncate(SIZE + 1) == []


def test_filling_shows_in_the_attribute_after_the_save_only(partial: Partial) -> None:
    partial.fill(1, chunk(1))
    header = read_header(partial.fd)
    assert header is not None
    assert header.runs == ()  # the bytes may not be on the disk yet
    assert partial.unsaved
    partial.save()
    header = read_header(partial.fd)
    assert header is not None
    assert header.runs == ((1, 2),)
    assert not partial.unsaved
    assert os.fstat(partial.fd).st_mtime_ns == OLD, "what arrives is no change"
    assert partial.local_bytes == CHUNK


def test_a_complete_file_is_an_ordinary_file(partial: Partial) -> None:
    for number in range(4):
        partial.fill(number, chunk(number))
    assert partial.complete
    partial.save()
    assert read_header(partial.fd) is None
    assert os.pread(partial.fd, SIZE, 0) == noise(SIZE)


def test_a_chunk_that_was_written_is_not_filled(partial: Partial) -> None:
    partial.write(partial.fd, b"n" * CHUNK, CHUNK)
    partial.fill(1, chunk(1))
    assert os.pread(partial.fd, CHUNK, CHUNK) == b"n" * CHUNK


def test_the_first_change_does_not_call_unsaved_chunks_local(partial: Partial) -> None:
    """Only a save has synced them: after a power cut they could be holes."""
    partial.fill(0, chunk(0))
    partial.write(partial.fd, b"new", 10)
    header = read_header(partial.fd)
    assert header is not None
    assert (header.changed, header.runs) == (True, ())


def test_a_file_that_was_complete_when_the_process_ended_becomes_ordinary(partial: Partial) -> None:
    """Else its change could never be pushed: it would be a placeholder that lacks nothing."""
    for number in range(4):
        partial.fill(number, chunk(number))
    partial.save()
    partial.write(partial.fd, b"new", 0)
    again = reopened(partial)
    assert again is not None
    assert again.complete
    again.close()
    assert read_header(partial.fd) is None
    assert os.pread(partial.fd, SIZE, 0) == b"new" + noise(SIZE)[3:]


@pytest.mark.parametrize("size", [0, CHUNK, 2 * CHUNK])
def test_what_was_cut_off_stays_so_after_the_process_ended(partial: Partial, size: int) -> None:
    """Cut, extended, ended without a save: zeros, not the bytes from before the cut."""
    partial.truncate(size, partial.fd)
    partial.truncate(SIZE, partial.fd)
    again = reopened(partial)
    missing = again.missing(0, SIZE) if again else []
    if again:
        os.close(again.fd)
    assert missing == list(range(size // CHUNK))


def test_a_cut_that_was_not_noted_yet_is_seen_by_the_size(partial: Partial) -> None:
    write_header(partial.fd, Header(partial.digest, SIZE, True))
    os.ftruncate(partial.fd, CHUNK)  # and here the process ended
    again = reopened(partial)
    assert again is not None
    assert again.missing(0, SIZE) == [0]
    os.close(again.fd)


def test_a_cut_inside_a_chunk_stays_cut_after_the_process_ended(partial: Partial) -> None:
    write_header(partial.fd, Header(partial.digest, SIZE, True))
    os.ftruncate(partial.fd, 1)  # and here the process ended
    again = reopened(partial)
    assert again is not None
    for number in again.missing(0, SIZE):
        again.fill(number, chunk(number))
    assert os.fstat(again.fd).st_size == 1, "bytes that come back must not make a file longer"
    os.close(again.fd)


def test_waiting_for_a_chunk(partial: Partial) -> None:
    told: list[object] = []
    assert partial.when_here(2, told.append)
    assert partial.when_here(3, told.append)
    partial.fill(2, chunk(2))
    partial.arrived([2], None)
    assert told == [None]
    error = NoReplica("nobody has it")
    partial.arrived([3], error)
    assert told == [None, error]
    assert not partial.when_here(2, told.append)
    assert partial.when_here(3, told.append)


def test_a_disk_that_fills_up_in_a_write_tears_no_chunk(partial: Partial, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, data[: CHUNK + 10], offset))
    assert partial.write(partial.fd, b"n" * (2 * CHUNK), 0) == CHUNK
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, data[:10], offset))
    with pytest.raises(OSError, match="space"):
        partial.write(partial.fd, b"n" * CHUNK, 2 * CHUNK)
    assert partial.missing(0, SIZE) == [1, 2, 3]


# --- random sequences ----------------------------------------------------------------------------------------------


class Reference(RuleBasedStateMachine):
    """A partial file and a plain one, changed alike."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp())
        self.partial: Partial | None = None

    @initialize(size=st.sampled_from([1, CHUNK - 1, CHUNK, CHUNK + 1, SIZE]))
    def start(self, size: int) -> None:
        self.base = noise(size)
        self.now = bytearray(self.base)  # what a reader must see
        self.durable = bytes(self.base)  # as of the last save
        self.fd = placeholder(self.directory, size)
        self._open()

    def _open(self) -> None:
        header = read_header(self.fd)
        self.partial = None if header is None else Partial(os.dup(self.fd), header)

    def _bring(self, numbers: list[int]) -> None:
        assert self.partial is not None
        for number in numbers:
            self.partial.fill(number, self.base[number * CHUNK : (number + 1) * CHUNK])

    @rule(number=st.integers(0, 3))
    def fill(self, number: int) -> None:
        if self.partial is not None and number * CHUNK < len(self.base):
            self._bring([number])

    @rule(
        offset=st.integers(0, SIZE + CHUNK),
        length=st.sampled_from([1, 1000, CHUNK, 2 * CHUNK + 5]),
        seed=st.integers(0, 3),
    )
    def write(self, offset: int, length: int, seed: int) -> None:
        offset = offset if seed else offset // CHUNK * CHUNK
        data = noise(length, 100 + seed)
        if self.partial is None:
            os.pwrite(self.fd, data, offset)
        else:
            self._bring(self.partial.needed_for_write(offset, length))
            assert self.partial.write(self.fd, data, offset) == length
        if len(self.now) < offset:
            self.now += bytes(offset - len(self.now))
        self.now[offset : offset + length] = data

    @rule(size=st.sampled_from([0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, SIZE, SIZE + 1, SIZE + CHUNK]))
    def truncate(self, size: int) -> None:
        if self.partial is None:
            os.ftruncate(self.fd, size)
        else:
            self._bring(self.partial.needed_for_truncate(size))
            self.partial.truncate(size, self.fd)
        self.now = self.now[:size] + bytearray(max(0, size - len(self.now)))

    @rule()
    def save(self) -> None:
        if self.partial is not None:
            self.partial.save()
        self.durable = bytes(self.now)

    @rule()
    def close_and_open(self) -> None:
        if self.partial is not None:
            self.partial.close()
        self.durable = bytes(self.now)
        self._open()

    @rule()
    def end_and_open(self) -> None:
        """kill -9: the page cache keeps what was written, but nobody saved the attribute."""
        if self.partial is not None:
            os.close(self.partial.fd)
        self._open()
        seen = self._seen()
        assert len(seen) == len(self.now), "the size is in the inode, which no end of a process takes back"
        before = self.durable + bytes(max(0, len(seen) - len(self.durable)))
        part, new, old = (np.frombuffer(data, np.uint8) for data in (seen, bytes(self.now), before[: len(seen)]))
        wrong = np.flatnonzero((part != new) & (part != old))
        assert not wrong.size, f"byte {wrong[0]} is neither what was written nor what was saved"
        self.now = bytearray(seen)

    def _seen(self) -> bytes:
        """All of it as a reader gets it, with what is missing brought first."""
        size = os.fstat(self.fd).st_size
        if self.partial is not None:
            self._bring(self.partial.missing(0, size))
        return os.pread(self.fd, size, 0)

    @precondition(lambda self: self.partial is not None)
    @rule(offset=st.integers(0, SIZE), length=st.integers(1, CHUNK))
    def read(self, offset: int, length: int) -> None:
        assert self.partial is not None
        self._bring(self.partial.missing(offset, length))
        assert os.pread(self.fd, length, offset) == bytes(self.now[offset : offset + length])

    @invariant()
    def what_is_here_is_right(self) -> None:
        if not hasattr(self, "fd"):
            return
        assert os.fstat(self.fd).st_size == len(self.now)
        for number in range(4):
            end = min((number + 1) * CHUNK, len(self.now))
            if number * CHUNK < end and not (self.partial and self.partial.missing(number * CHUNK, 1)):
                spot = bytes(self.now[number * CHUNK : end])
                assert os.pread(self.fd, len(spot), number * CHUNK) == spot

    def teardown(self) -> None:
        if self.partial is not None:
            os.close(self.partial.fd)
        if hasattr(self, "fd"):
            os.close(self.fd)
            os.unlink(self.directory / "file")
        self.directory.rmdir()


Reference.TestCase.settings = settings(max_examples=50, stateful_step_count=15, deadline=None)
TestReference = Reference.TestCase
