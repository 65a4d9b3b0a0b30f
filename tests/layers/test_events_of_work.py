"""The events of pushes and hydrations, and the lines that the command line's bars are drawn from."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from daemon.terminal import Reporter
from tests.core.making import UUID, Place, hooked, noise
from vfs.core import manifest_key, plain_key
from vfs.events import Ended, Event, ObjectSet, Started, Stepped
from vfs.session import Session

SIZE = 9 * 1024 * 1024


@pytest.fixture
def session(tmp_path: Path) -> Iterator[Session]:
    place = Place(tmp_path / "host", {"lab": f"hooked://{tmp_path}/lab"})
    place.record(files={b"big": noise(SIZE), b"bigger": noise(SIZE, 2)})
    with place.session() as session:
        yield session


class Lines:
    """What a command tells; the first line about a transfer opens `told`."""

    def __init__(self) -> None:
        self.cancelled = False
        self.lines: list[dict[str, Any]] = []
        self.told = threading.Event()

    def __call__(self, event: dict[str, Any], /) -> None:
        self.lines.append(event)
        if event.get("path"):
            self.told.set()


def test_a_push_and_a_hydration_from_start_to_end(session: Session) -> None:
    heard: list[Event] = []
    session.core.events.subscribe(heard.append)
    session.run("evict", {"uuids": [UUID]}, Lines())
    started = [event for event in heard if isinstance(event, Started)]
    assert [(each.what, each.name, each.size) for each in started] == [
        ("push", name, SIZE) for name in ("big", "bigger")
    ]
    assert started[0].about == {"uuid": UUID, "store": "lab"}
    steps = [event.done for event in heard if isinstance(event, Stepped) and event.id == started[0].id]
    assert steps == sorted(steps)
    assert steps[-1] == SIZE
    assert Ended(started[0].id, None) in heard
    sets = {event.key for event in heard if isinstance(event, ObjectSet)}
    assert {plain_key(UUID, b"big"), manifest_key(UUID)} <= sets
    heard.clear()
    session.run("hydrate", {"uuids": [UUID]}, Lines())
    brought = [event for event in heard if isinstance(event, Started) and event.what == "hydrate"]
    assert sum(event.size for event in brought if event.name == "big") == SIZE
    assert {event.id for event in brought} == {event.id for event in heard if isinstance(event, Ended)}
    assert session.core.moves.shown() == []


def test_a_push_that_fails_ends_with_its_reason(session: Session) -> None:
    heard: list[Event] = []
    session.core.events.subscribe(heard.append, Ended)

    def broken(operation: str, key: str) -> None:
        if operation == "upload":
            raise OSError(5, "Input/output error")

    hooked(session).hook = broken
    session.run("push", {"uuids": [UUID]}, Lines())
    assert {event.error for event in heard if isinstance(event, Ended)} == {"Input/output error"}


def test_the_bars_get_a_line_a_second_and_one_when_it_is_over(session: Session) -> None:
    """A transfer that ends between two lines must not leave its bar on the screen."""
    lines = Lines()

    def slow(operation: str, key: str) -> None:
        if operation == "upload" and not lines.told.is_set():
            lines.told.wait(10)
        elif operation == "upload":
            time.sleep(1.5)

    hooked(session).hook = slow
    session.run("push", {"uuids": [UUID]}, lines)
    moving = [line for line in lines.lines if line.get("path")]
    first = moving[0]["path"]
    assert (moving[0]["what"], moving[0]["store"], moving[0]["size"]) == ("push", "lab", SIZE)
    assert [line.get("over") for line in moving if line["path"] == first][-1] is True
    assert {line["path"] for line in moving} == {"big", "bigger"}


def test_what_is_over_has_no_bar(capsys: pytest.CaptureFixture[str]) -> None:
    move = {"what": "push", "uuid": "a", "path": "half.bin", "store": "lab", "done": 1, "size": 2}
    with Reporter(shown=True) as reporter:
        reporter({**move, "over": True})  # never heard of
        reporter(move)
        assert len(reporter._tasks) == 1
        reporter({**move, "over": True})
        assert len(reporter._tasks) == 0
    assert capsys.readouterr().out == ""
