"""How a store has been doing lately: whether it could be asked, and how near it is.

Used for each home of an index and for the stores in a `FirstStore`, to ask healthy and near ones first. Nothing here
blocks.
"""

import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from vfs.errors import Conflict, NotFound, StoreError

UNWELL_S = 30.0  # how long a store that failed is asked last
_NEAREST_S = 1e-4  # a store in memory; latencies are told apart by factors of four, as less changes by the moment
_FACTOR = 4.0
_CALLS = 8  # some move a lot of bytes, which says little of how near the store is


class Health:
    """`error`: the last call's temporary failure in words, None when it succeeded; `failed_at`: then, on the monotonic
    clock."""

    def __init__(self) -> None:
        self.error: str | None = None
        self.failed_at = 0.0
        self._seconds: deque[float] = deque(maxlen=_CALLS)

    @property
    def latency_s(self) -> float | None:
        """What the quickest of the last calls took, in seconds; None before there was one."""
        return min(list(self._seconds), default=None)

    @contextmanager
    def watched(self, *, measured: bool = True) -> Iterator[None]:
        """Take the outcome of what is done inside into the health; `measured`: its time too."""
        began = time.monotonic()
        try:
            yield
        except (NotFound, Conflict):  # it was asked, and answered
            self._answered(began, measured)
            raise
        except StoreError as error:
            if error.temporary:
                self.error, self.failed_at = str(error), time.monotonic()
            raise
        self._answered(began, measured)

    def _answered(self, began: float, measured: bool) -> None:
        self.error = None
        if measured:
            self._seconds.append(time.monotonic() - began)

    @property
    def healthy(self) -> bool:
        """Whether it did not fail within the last half minute, or succeeded since."""
        return self.error is None or time.monotonic() - self.failed_at > UNWELL_S

    @property
    def rank(self) -> tuple[bool, int]:
        """What to sort by: healthy ones first, then near ones; one that was never measured counts as near."""
        steps = math.log(max(self.latency_s or 0.0, _NEAREST_S) / _NEAREST_S, _FACTOR)
        return (not self.healthy, int(steps))
