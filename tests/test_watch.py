"""`vfs.watch`: what other processes do in a watched directory is told, completely, and nothing else is."""

import os
import resource
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vfs.watch import Kind, Watcher, default_limit

LIMIT_S = 5.0
Event = tuple[str, bytes, Kind]


class Listener:
    """Keeps what it was told, and waits for it."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._changed = threading.Condition()

    def __call__(self, uuid: str, path: bytes, kind: Kind) -> None:
        with self._changed:
            self.events.append((uuid, path, kind))
            self._changed.notify_all()

    def wait(self, event: Event) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: event in self.events, LIMIT_S), f"{event} not in {self.events}"

    def paths(self) -> set[bytes]:
        return {path for _, path, _ in self.events}


MakeWatcher = Callable[..., tuple[Watcher, Listener]]


@pytest.fixture
def make() -> Iterator[MakeWatcher]:
    watchers: list[Watcher] = []

    def start(**options: Any) -> tuple[Watcher, Listener]:
        listener = Listener()
        watchers.append(Watcher(listener, **options))
        return watchers[-1], listener

    yield start
    for each in watchers:
        each.close()


def directory(path: Path) -> bytes:
    path.mkdir(parents=True, exist_ok=True)
    return os.fsencode(path)


def test_write_create_remove_and_rename_are_told(make: MakeWatcher, tmp_path: Path) -> None:
    watcher, told = make()
    root = tmp_path / "a"
    root.mkdir()
    (root / "old").write_text("1")
    assert watcher.watch("A", directory(root))
    (root / "old").write_text("2")
    told.wait(("A", b"old", Kind.CHANGED))
    (root / "new").write_text("3")
    told.wait(("A", b"new", Kind.CREATED))
    (root / "new").rename(root / "newer")
    told.wait(("A", b"new", Kind.REMOVED))
    told.wait(("A", b"newer", Kind.CREATED))
    (root / "old").unlink()
    told.wait(("A", b"old", Kind.REMOVED))


def test_times_and_mode_are_changes(make: MakeWatcher, tmp_path: Path) -> None:
    watcher, told = make()
    (tmp_path / "f").touch()
    watcher.watch("A", directory(tmp_path))
    os.utime(tmp_path / "f", (1, 1))
    told.wait(("A", b"f", Kind.CHANGED))


def test_names_that_are_not_utf8_come_as_bytes(make: MakeWatcher, tmp_path: Path) -> None:
    watcher, told = make()
    watcher.watch("A", directory(tmp_path))
    (Path(os.fsdecode(directory(tmp_path) + b"/\xff\xfe x"))).touch()
    told.wait(("A", b"\xff\xfe x", Kind.CREATED))


def test_many_writes_to_one_file_are_told_a_few_times(make: MakeWatcher, tmp_path: Path) -> None:
    watcher, told = make(coalesce_s=0.2)
    (tmp_path / "log").touch()
    watcher.watch("A", directory(tmp_path))
    began = time.monotonic()
    with (tmp_path / "log").open("a") as log:
        for _ in range(500):
            log.write("x")
            log.flush()
    bursts = (time.monotonic() - began) / 0.2 + 2
    told.wait(("A", b"log", Kind.CHANGED))
    time.sleep(0.3)
    assert len(told.events) <= bursts


def test_existing_and_new_directories_are_watched(make: MakeWatcher, tmp_path: Path) -> None:
    watcher, told = make()
    (tmp_path / "r" / "deep" / "er").mkdir(parents=True)
    watcher.watch("A", directory(tmp_path / "r"))
    assert watcher.count() == 3
    (tmp_path / "r" / "deep" / "er" / "f").touch()
    told.wait(("A", b"deep/er/f", Kind.CREATED))
    (tmp_path / "r" / "later").mkdir()
    told.wait(("A", b"later", Kind.CREATED))
    (tmp_path / "r" / "later" / "g").touch()
    told.wait(("A", b"later/g", Kind.CREATED))


def test_content_of_a_directory_that_came_with_content_is_told(make: MakeWatcher, tmp_path: Path) -> None:
    watcher, told = make()
    (tmp_path / "outside" / "sub").mkdir(parents=True)
    (tmp_path / "outside" / "sub" / "f").touch()
    watcher.watch("A", directory(tmp_path / "r"))
    (tmp_path / "outside").rename(tmp_path / "r" / "in")
    told.wait(("A", b"in/sub/f", Kind.CREATED))
    assert {b"in", b"in/sub"} <= told.paths()
    (tmp_path / "r" / "in" / "sub" / "f").write_text("x")
    told.wait(("A", b"in/sub/f", Kind.CHANGED))


def test_a_directory_made_and_filled_at_once_is_told_completely(make: MakeWatcher, tmp_path: Path) -> None:
    watcher, told = make()
    watcher.watch("A", directory(tmp_path / "r"))
    expected = set()
    for number in range(20):
        place = tmp_path / "r" / f"d{number}" / "x" / "y"
        place.mkdir(parents=True)
        (place / "f").touch()
        expected.add(f"d{number}/x/y/f".encode())
    for path in expected:
        told.wait(("A", path, Kind.CREATED))


def test_a_directory_that_left_is_not_watched_any_more(make: MakeWatcher, tmp_path: Path) -> None:
    watcher, told = make()
    (tmp_path / "r" / "sub" / "sub").mkdir(parents=True)
    watcher.watch("A", directory(tmp_path / "r"))
    (tmp_path / "r" / "sub").rename(tmp_path / "gone")
    told.wait(("A", b"sub", Kind.REMOVED))
    assert watcher.count() == 1
    (tmp_path / "gone" / "sub" / "f").touch()
    (tmp_path / "r" / "end").touch()
    told.wait(("A", b"end", Kind.CREATED))
    assert b"sub/sub/f" not in told.paths()


def test_a_directory_renamed_inside_is_told_under_its_new_name(make: MakeWatcher, tmp_path: Path) -> None:
    watcher, told = make()
    (tmp_path / "r" / "one").mkdir(parents=True)
    (tmp_path / "r" / "one" / "f").touch()
    watcher.watch("A", directory(tmp_path / "r"))
    (tmp_path / "r" / "one").rename(tmp_path / "r" / "two")
    told.wait(("A", b"two/f", Kind.CREATED))
    (tmp_path / "r" / "two" / "f").write_text("x")
    told.wait(("A", b"two/f", Kind.CHANGED))


def test_symlinks_are_names_only(make: MakeWatcher, tmp_path: Path) -> None:
    watcher, told = make()
    directory(tmp_path / "elsewhere")
    directory(tmp_path / "r")
    (tmp_path / "r" / "before").symlink_to(tmp_path / "elsewhere")
    assert watcher.watch("A", directory(tmp_path / "r"))
    (tmp_path / "r" / "after").symlink_to(tmp_path / "elsewhere")
    told.wait(("A", b"after", Kind.CREATED))
    (tmp_path / "elsewhere" / "f").touch()
    (tmp_path / "r" / "end").touch()
    told.wait(("A", b"end", Kind.CREATED))
    assert not {b"before/f", b"after/f"} & told.paths()
    assert watcher.count() == 1


def test_a_record_that_is_a_symlink_or_missing_is_not_watched(make: MakeWatcher, tmp_path: Path) -> None:
    watcher, _ = make()
    directory(tmp_path / "r")
    (tmp_path / "link").symlink_to(tmp_path / "r")
    assert not watcher.watch("A", os.fsencode(tmp_path / "link"))
    assert not watcher.watch("B", os.fsencode(tmp_path / "nothing"))
    assert not watcher.watching("A")
    assert watcher.count() == 0


@pytest.mark.parametrize("how", ["renamed", "removed"])
def test_a_record_whose_directory_goes_is_told_and_let_go(make: MakeWatcher, tmp_path: Path, how: str) -> None:
    watcher, told = make()
    root = tmp_path / "r"
    watcher.watch("A", directory(root))
    root.rename(tmp_path / "moved") if how == "renamed" else shutil.rmtree(root)
    told.wait(("A", b"", Kind.REMOVED))
    assert not watcher.watching("A")
    assert watcher.watch("A", directory(root))  # a new one in its place
    (root / "f").touch()
    told.wait(("A", b"f", Kind.CREATED))


def test_nothing_is_told_after_unwatch(make: MakeWatcher, tmp_path: Path) -> None:
    watcher, told = make(coalesce_s=0.2)
    watcher.watch("A", directory(tmp_path / "a"))
    watcher.watch("B", directory(tmp_path / "b"))
    (tmp_path / "a" / "f").touch()
    (tmp_path / "b" / "f").touch()
    time.sleep(0.05)
    watcher.unwatch("A")
    watcher.unwatch("A")  # asking twice is no error
    (tmp_path / "a" / "g").touch()
    told.wait(("B", b"f", Kind.CREATED))
    time.sleep(0.3)
    assert {uuid for uuid, _, _ in told.events} == {"B"}
    assert not watcher.watching("A")


def test_the_record_not_asked_for_the_longest_is_let_go_and_told(make: MakeWatcher, tmp_path: Path) -> None:
    watcher, told = make(limit=3)
    for name in "ABC":
        assert watcher.watch(name, directory(tmp_path / name))
    assert watcher.watch("A", directory(tmp_path / "A"))  # asked for again: B is now the oldest
    assert watcher.watch("D", directory(tmp_path / "D"))
    told.wait(("B", b"", Kind.ANYTHING))
    assert [name for name in "ABCD" if watcher.watching(name)] == ["A", "C", "D"]
    assert watcher.count() == 3


def test_a_record_too_large_for_the_limit_is_not_half_watched(make: MakeWatcher, tmp_path: Path) -> None:
    watcher, told = make(limit=3)
    for number in range(5):
        directory(tmp_path / "big" / str(number))
    assert not watcher.watch("BIG", directory(tmp_path / "big"))
    assert watcher.count() == 0
    watcher.watch("A", directory(tmp_path / "a"))
    for number in range(5):
        directory(tmp_path / "a" / str(number))
    told.wait(("A", b"", Kind.ANYTHING))
    assert not watcher.watching("A")
    assert watcher.count() == 0


def test_after_lost_events_every_record_is_told_and_watched_again(make: MakeWatcher, tmp_path: Path) -> None:
    """A real overflow: the thread is held in a callback while more happens than the kernel's queue takes."""
    queue = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    if queue > 100_000:
        pytest.skip(f"this kernel queues {queue} events; filling that takes too long")
    held, release = threading.Event(), threading.Event()
    told = Listener()

    def slow(uuid: str, path: bytes, kind: Kind) -> None:
        held.set()
        release.wait(60)
        told(uuid, path, kind)

    watcher = Watcher(slow)
    try:
        watcher.watch("A", directory(tmp_path / "a"))
        watcher.watch("B", directory(tmp_path / "b"))
        (tmp_path / "a" / "first").touch()
        assert held.wait(LIMIT_S)
        one, two = tmp_path / "a" / "one", tmp_path / "a" / "two"
        one.touch()
        for _ in range(queue // 4 + 100):  # four events each; in turn, so the kernel does not merge them
            one.rename(two)
            two.rename(one)
        directory(tmp_path / "a" / "unseen")
        release.set()
        told.wait(("A", b"", Kind.ANYTHING))
        told.wait(("B", b"", Kind.ANYTHING))
        (tmp_path / "a" / "unseen" / "f").touch()
        told.wait(("A", b"unseen/f", Kind.CREATED))
    finally:
        release.set()
        watcher.close()


def test_a_burst_of_very_many_paths_is_told_as_anything(
    make: MakeWatcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vfs.watch.MOST_PENDING", 50)
    watcher, told = make(coalesce_s=0.3)
    watcher.watch("A", directory(tmp_path))
    for number in range(60):
        (tmp_path / str(number)).touch()
    told.wait(("A", b"", Kind.ANYTHING))


def test_a_listener_that_fails_is_logged_and_hears_the_next(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, make: MakeWatcher
) -> None:
    told = Listener()

    def listener(uuid: str, path: bytes, kind: Kind) -> None:
        told(uuid, path, kind)
        if path == b"bad":
            raise ValueError("no")

    watcher = Watcher(listener)
    try:
        watcher.watch("A", directory(tmp_path))
        (tmp_path / "bad").touch()
        told.wait(("A", b"bad", Kind.CREATED))
        (tmp_path / "good").touch()
        told.wait(("A", b"good", Kind.CREATED))
        assert "a listener failed on created of b'bad' in A" in caplog.text
    finally:
        watcher.close()


def test_close_is_prompt_and_leaves_nothing_open(tmp_path: Path) -> None:
    before = set(os.listdir("/proc/self/fd"))
    watcher = Watcher(Listener())
    watcher.watch("A", directory(tmp_path))
    began = time.monotonic()
    watcher.close()
    watcher.close()
    assert time.monotonic() - began < 1.0
    assert set(os.listdir("/proc/self/fd")) == before
    assert not watcher.watch("A", directory(tmp_path))


def test_an_idle_watcher_sleeps(make: MakeWatcher, tmp_path: Path) -> None:
    watcher, told = make(limit=1)
    watcher.watch("A", directory(tmp_path / "a"))
    watcher.watch("B", directory(tmp_path / "b"))
    told.wait(("A", b"", Kind.ANYTHING))
    time.sleep(0.1)
    began = resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw
    time.sleep(0.5)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw - began < 20  # a thread that polls: a hundred


def test_the_limit_leaves_watches_to_others() -> None:
    assert 1 <= default_limit() <= int(Path("/proc/sys/fs/inotify/max_user_watches").read_text()) / 2


def test_a_hushed_directory_tells_no_writes_but_closes_and_what_may_have_been_missed(
    make: MakeWatcher, tmp_path: Path
) -> None:
    watcher, told = make()
    root = tmp_path / "a"
    (root / "d").mkdir(parents=True)
    with open(root / "d" / "log", "wb", buffering=0) as log, open(root / "top", "wb", buffering=0) as top:
        assert watcher.watch("A", directory(root))
        watcher.hush("A", b"d")
        watcher.hush("A", b"d")
        watcher.unhush("A", b"d")
        log.write(b"1")
        top.write(b"1")
        told.wait(("A", b"top", Kind.CHANGED))  # beside it, writes are told
        (root / "d" / "new").write_text("2")
        told.wait(("A", b"d/new", Kind.CREATED))
        assert b"d/log" not in told.paths()
        watcher.unhush("A", b"d")
        told.wait(("A", b"d", Kind.ANYTHING))
        log.write(b"2")
        told.wait(("A", b"d/log", Kind.CHANGED))
        watcher.hush("A", b"d")
    told.wait(("A", b"d/log", Kind.CHANGED))  # closed


def test_a_directory_may_be_hushed_before_it_is_watched(make: MakeWatcher, tmp_path: Path) -> None:
    watcher, told = make()
    watcher.hush("A", b"")
    with open(tmp_path / "log", "wb", buffering=0) as log:
        assert watcher.watch("A", directory(tmp_path))
        log.write(b"1")
        (tmp_path / "new").write_text("2")
        told.wait(("A", b"new", Kind.CREATED))
        assert told.paths() == {b"new"}
        watcher.unhush("A", b"")
        told.wait(("A", b"", Kind.ANYTHING))
