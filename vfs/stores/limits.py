"""How long a store call may take: the configured limits, and one call's budget of time.

Used by every store. Nothing here blocks.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vfs.errors import ConfigError

DEADLINE_S = 30.0
LEAST_THROUGHPUT = 64 * 1024  # bytes per second; slower than this is as good as hanging
WINDOW_S = 10.0  # over which the least throughput is judged


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
