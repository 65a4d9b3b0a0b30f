"""What is being moved right now, for `status` and progress bars: kept from the events. Thread-safe, in memory only."""

import threading
import time
from dataclasses import dataclass, field
from typing import Any

from vfs.events import Ended, Event, Events, Started, Stepped


@dataclass(slots=True)
class Move:
    """One transfer under way. `done` in bytes."""

    event: Started
    done: int = 0
    began: float = field(default_factory=time.monotonic)

    def shown(self) -> dict[str, Any]:
        size = self.event.size
        rate = self.done / max(time.monotonic() - self.began, 1e-3)
        left = (size - self.done) / rate if rate > 0 else None
        return {
            "what": self.event.what,
            "uuid": self.event.about.get("uuid", ""),
            "path": self.event.name,
            "store": self.event.about.get("store", ""),
            "done": self.done,
            "size": size,
            "rate": rate,
            "left_s": left,
        }


class Moves:
    """The transfers under way, and how fast pushes have been lately (bytes a second)."""

    def __init__(self, events: Events) -> None:
        self._lock = threading.Lock()
        self._now: dict[int, Move] = {}
        self.push_rate = 0.0
        self.close = events.subscribe(self._take, Started, Stepped, Ended)

    def _take(self, event: Event) -> None:
        with self._lock:
            if isinstance(event, Started):
                self._now[event.id] = Move(event)
            elif isinstance(event, Stepped) and event.id in self._now:
                self._now[event.id].done = event.done
            elif isinstance(event, Ended):
                self._now.pop(event.id, None)

    def measured(self, size: int, seconds: float) -> None:
        """Take a finished push into the rate that `safe` predicts with. Small ones say little and are left out."""
        if size > 1 << 20 and seconds > 0:
            rate = size / seconds
            self.push_rate = rate if not self.push_rate else 0.7 * self.push_rate + 0.3 * rate

    def now(self) -> dict[int, dict[str, Any]]:
        """What is under way, by the ids of its events."""
        with self._lock:
            moves = dict(self._now)
        return {number: move.shown() for number, move in moves.items()}

    def shown(self) -> list[dict[str, Any]]:
        return list(self.now().values())
