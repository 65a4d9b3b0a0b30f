"""Partial files used by several threads at once: what waits for what, and what must not wait.

The disk is made slow where it matters by holding one system call until the test lets it go.
"""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.core.making import noise
from tests.core.test_cache import OLD, SIZE, chunk, placeholder
from vfs.cache import Partial, read_header
from vfs.manifest import CHUNK

LIMIT_S = 20.0


class Held:
    """A system call that stops at its first use: `reached` tells that it did, `go` lets it on."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call
        self.reached = threading.Event()
        self.go = threading.Event()

    def __call__(self, *args: Any) -> Any:
        first, _ = not self.reached.is_set(), self.reached.set()
        if first and not self.go.wait(LIMIT_S):
            raise AssertionError("held for too long")
        return self._call(*args)


@pytest.fixture
def partial(tmp_path: Path) -> Iterator[Partial]:
    fd = placeholder(tmp_path)
    header = read_header(fd)
    assert header is not None
    made = Partial(fd, header)
    yield made
    os.close(made.fd)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as made:
        yield made


def hold(monkeypatch: pytest.MonkeyPatch, name: str) -> Held:
    held = Held(getattr(os, name))
    monkeypatch.setattr(os, name, held)
    return held


def test_readers_go_on_while_bytes_are_copied_in(
    partial: Partial, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = hold(monkeypatch, "pwrite")
    filling = pool.submit(partial.fill, 0, chunk(0) + chunk(1))
    assert held.reached.wait(LIMIT_S)
    assert pool.submit(partial.missing, 0, SIZE).result(LIMIT_S) == [0, 1, 2, 3], "not here before it is all written"
    held.go.set()
    filling.result(LIMIT_S)
    assert partial.missing(0, SIZE) == [2, 3]
    assert os.pread(partial.fd, 2 * CHUNK, 0) == noise(SIZE)[: 2 * CHUNK]
    assert os.fstat(partial.fd).st_mtime_ns == OLD


def test_a_write_comes_after_the_bytes_that_are_just_copied_in(
    partial: Partial, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = hold(monkeypatch, "pwrite")
    filling = pool.submit(partial.fill, 1, chunk(1))
    assert held.reached.wait(LIMIT_S)
    writing = pool.submit(partial.write, partial.fd, b"n" * CHUNK, CHUNK)
    with pytest.raises(TimeoutError):
        writing.result(0.2)
    held.go.set()
    assert writing.result(LIMIT_S) == CHUNK
    filling.result(LIMIT_S)
    assert os.pread(partial.fd, CHUNK, CHUNK) == b"n" * CHUNK


def test_a_cut_comes_after_the_bytes_that_are_just_copied_in(
    partial: Partial, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = hold(monkeypatch, "pwrite")
    filling = pool.submit(partial.fill, 2, chunk(2))
    assert held.reached.wait(LIMIT_S)
    cutting = pool.submit(partial.truncate, 2 * CHUNK, partial.fd)
    with pytest.raises(TimeoutError):
        cutting.result(0.2)
    held.go.set()
    cutting.result(LIMIT_S)
    filling.result(LIMIT_S)
    assert os.fstat(partial.fd).st_size == 2 * CHUNK


def test_two_fills_of_one_chunk_write_it_once(
    partial: Partial, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = hold(monkeypatch, "pwrite")
    filling = pool.submit(partial.fill, 1, chunk(1))
    assert held.reached.wait(LIMIT_S)
    partial.fill(0, chunk(0) + b"\0" * CHUNK + chunk(2))  # what the other one is writing is left to it
    assert partial.missing(0, SIZE) == [1, 3]
    held.go.set()
    filling.result(LIMIT_S)
    assert os.pread(partial.fd, 3 * CHUNK, 0) == noise(SIZE)[: 3 * CHUNK]


def test_a_disk_that_fails_leaves_nothing_called_local(partial: Partial, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match="No space"):
            partial.fill(0, chunk(0))
    assert partial.missing(0, SIZE) == [0, 1, 2, 3]
    partial.fill(0, chunk(0))  # and it can be tried again
    assert partial.missing(0, SIZE) == [1, 2, 3]


def test_readers_go_on_while_the_disk_syncs(
    partial: Partial, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial.fill(0, chunk(0))
    held = hold(monkeypatch, "fdatasync")
    saving = pool.submit(partial.save)
    assert held.reached.wait(LIMIT_S)
    pool.submit(partial.fill, 1, chunk(1)).result(LIMIT_S)
    held.go.set()
    saving.result(LIMIT_S)
    header = read_header(partial.fd)
    assert header is not None
    assert header.runs == ((0, 1),), "what came during the sync may not be on the disk"
    assert partial.unsaved
    partial.save()
    header = read_header(partial.fd)
    assert header is not None
    assert header.runs == ((0, 2),)


def test_a_cut_during_a_sync_is_not_forgotten(
    partial: Partial, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial.fill(0, chunk(0))
    held = hold(monkeypatch, "fdatasync")
    saving = pool.submit(partial.save)
    assert held.reached.wait(LIMIT_S)
    partial.truncate(CHUNK, partial.fd)
    held.go.set()
    saving.result(LIMIT_S)
    header = read_header(partial.fd)
    assert header is None, "all that is left of it is here: bringing what was cut off would show old bytes"


def test_a_change_during_a_sync_is_saved_by_the_next_one(
    partial: Partial, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial.fill(0, chunk(0))
    held = hold(monkeypatch, "fdatasync")
    saving = pool.submit(partial.save)
    assert held.reached.wait(LIMIT_S)
    partial.write(partial.fd, b"n" * CHUNK, 2 * CHUNK)
    held.go.set()
    saving.result(LIMIT_S)
    assert partial.unsaved
    header = read_header(partial.fd)
    assert header is not None
    assert (header.changed, header.runs) == (True, ((0, 1),))
    partial.save()
    header = read_header(partial.fd)
    assert header is not None
    assert (header.changed, header.runs) == (True, ((0, 1), (2, 3)))
