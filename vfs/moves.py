"""What is being moved right now, for `status` and progress bars. Thread-safe, in memory only."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Move:
    """One transfer under way. `done` and `size` in bytes."""

    what: str
    uuid: str
    path: str
    store: str
    size: int
    done: int = 0
    started: float = field(default_factory=time.monotonic)

    def step(self, done: int) -> None:
        self.done = done

    def shown(self) -> dict[str, Any]:
        rate = self.done / max(time.monotonic() - self.started, 1e-3)
        left = (self.size - self.done) / rate if rate > 0 else None
        return {
            "what": self.what,
            "uuid": self.uuid,
            "path": self.path,
            "store": self.store,
            "done": self.done,
            "size": self.size,
            "rate": rate,
            "left_s": left,
        }


class Moves:
    """The transfers under way, and how fast pushes have been lately (bytes a second)."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._now: dict[int, Move] = {}
        self.push_rate = 0.0

    @contextmanager
    def move(self, what: str, uuid: str, path: bytes, store: str, size: int) -> Iterator[Move]:
        move = Move(what, uuid, path.decode("utf-8", "replace"), store, size)
        with self._lock:
            self._now[id(move)] = move
        try:
            yield move
        finally:
            with self._lock:
                del self._now[id(move)]

    def measured(self, size: int, seconds: float) -> None:
        """Take a finished push into the rate that `safe` predicts with. Small ones say little and are left out."""
        if size > 1 << 20 and seconds > 0:
            rate = size / seconds
            self.push_rate = rate if not self.push_rate else 0.7 * self.push_rate + 0.3 * rate

    def shown(self) -> list[dict[str, Any]]:
        with self._lock:
            moves = list(self._now.values())
        return [move.shown() for move in moves]
