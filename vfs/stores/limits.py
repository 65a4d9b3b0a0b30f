"""How long a store call may take: the configured limits, and one call's budget of time.

Used by every store. Nothing here blocks.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vfs.errors import ConfigError

DEADLINE_S = 30.0
LEAST_THROUGHPUT = 64 * 1024  # bytes per second; slower than this is as good as hanging
WINDOW_S = 10.0  # over which the least throughput is judged


class Stalled(Exception):
    """Our own limit ended an attempt."""


@dataclass(frozen=True, slots=True)
class Budget:
    """The time one call has. `total_s` for messages; `end` on the monotonic clock."""

    total_s: float
    end: float

    def left(self) -> float:
        """Seconds left; never negative."""
        return max(0.0, self.end - time.monotonic())


@dataclass(frozen=True, slots=True)
class Limits:
    """A store's limits: seconds, bytes per second, seconds."""

    deadline_s: float = DEADLINE_S
    least_throughput: float = LEAST_THROUGHPUT
    window_s: float = WINDOW_S

    def budget(self, deadline: float | None, size: int = 0) -> Budget:
        """The budget of a call that moves `size` bytes; an explicit `deadline` (seconds, total) wins."""
        total = self.deadline_s + size / self.least_throughput if deadline is None else deadline
        return Budget(total, time.monotonic() + total)

    def slowest(self, size: int) -> float:
        """Seconds that moving `size` bytes takes at the least throughput, after one window to get going."""
        return self.window_s + size / self.least_throughput


class Watch:
    """The limits of one attempt at a read, looked at after each piece."""

    def __init__(self, limits: Limits, budget: Budget) -> None:
        self._budget = budget
        self._window_s = limits.window_s
        self._least = limits.least_throughput * limits.window_s
        self._end = time.monotonic() + limits.window_s
        self._came = 0

    def left(self) -> float:
        """Seconds left of the budget; never negative."""
        return self._budget.left()

    def came(self, count: int) -> None:
        """So many bytes came. Raises Stalled when the budget is used up, or the window brought too little."""
        self._came += count
        now = time.monotonic()
        if self._came >= self._least:
            self._end, self._came = now + self._window_s, 0
        if now > self._budget.end:
            raise Stalled(f"no end within {self._budget.total_s:g} s")
        if now > self._end:
            raise Stalled(f"less than {self._least:.0f} bytes came in {self._window_s:g} s")

    def told(self, call: Callable[[int], None], done: int) -> None:
        """Tell a reader what is there; the time it takes to deal with the bytes is not the store's."""
        began = time.monotonic()
        call(done)
        self._end += time.monotonic() - began


def read_limits(config: Mapping[str, Any]) -> Limits:
    """The limits in a store's configuration (`deadline_s`, `least_throughput`, `window_s`). Raises
    ConfigError."""
    return Limits(
        _positive(config, "deadline_s", DEADLINE_S),
        _positive(config, "least_throughput", LEAST_THROUGHPUT),
        _positive(config, "window_s", WINDOW_S),
    )


def _positive(config: Mapping[str, Any], key: str, default: float) -> float:
    given = config.get(key)
    if given is None:
        return default
    try:
        number = float(given)
    except (TypeError, ValueError):
        number = 0.0
    if not 0 < number < float("inf"):
        raise ConfigError(f"{key} = {given!r}: give a number greater than 0")
    return number
