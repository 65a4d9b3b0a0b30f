"""What was measured: samples, and the rows of the table made of them.

Used by the works, which give samples, and by `report.py`. Pure.
"""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Work:
    """One row of the table. `unit`: what a sample's value is; `better`: which way; `reach`: what runfs (`who`) is to
    reach, a ratio to `against` (the larger is the better one, for times too: their time divided by ours); `also`: the
    same for other systems; `most`: a value that is not to be passed, in the unit."""

    name: str
    unit: str
    better: str  # 'more' | 'less'
    against: str
    reach: float | None = None
    who: str = "runfs"
    also: tuple[tuple[str, float], ...] = ()
    most: float | None = None

    def reaches(self) -> list[tuple[str, float | None]]:
        """Whom it is compared with, and the ratio that is to be reached."""
        own = [] if self.against == self.who else [(self.against, self.reach)]
        return [*own, *self.also]


@dataclass(slots=True)
class Samples:
    """Values by work, system and round. Those of one round were measured one right after the other."""

    values: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    works: dict[str, Work] = field(default_factory=dict)

    def add(self, work: Work, system: str, value: float) -> None:
        self.works.setdefault(work.name, work)
        self.values.setdefault((work.name, system), []).append(value)

    def median(self, work: str, system: str) -> float | None:
        found = self.values.get((work, system))
        return statistics.median(found) if found else None

    def systems(self) -> list[str]:
        return list(dict.fromkeys(system for _work, system in self.values))

    def ratio(self, name: str, who: str, against: str) -> float | None:
        """The median over the rounds of how much better `who` was than `against` in the same round."""
        ours, theirs = self.values.get((name, who)), self.values.get((name, against))
        if not ours or not theirs:
            return None
        more = self.works[name].better == "more"
        return statistics.median(a / b if more else b / a for a, b in zip(ours, theirs, strict=False))


@contextmanager
def clock() -> Iterator[list[float]]:
    """Seconds that the block takes, in a list of one."""
    took = [0.0]
    began = time.perf_counter()
    try:
        yield took
    finally:
        took[0] = time.perf_counter() - began
