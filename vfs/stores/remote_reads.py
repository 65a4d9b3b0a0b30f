"""Ranges of remote objects, read into the caller's own memory: the path that hydrate's bytes take.

Used by `remote.py`. Blocks its caller, at most for the budget and a moment. The first try goes straight to the socket
where that can be (`s3_reads.py`). All others use opendal's synchronous files, in the caller's thread: half the
processor time of handing every piece over from an event loop, and no copy. They cannot be cancelled, so what bounds a
read is:

- each step (a connection, the next piece) has a limit of its own inside opendal, never more than what is left;
- after each piece the budget is looked at, and whether the last window brought the least throughput.

Temporary faults are tried again like those of every other call (`remote_calls.py`).
"""

import itertools
import time

import opendal
from opendal.layers import TimeoutLayer

from vfs.errors import Unreachable
from vfs.stores.limits import Budget, Limits, Stalled, Watch
from vfs.stores.protocol import Arrived
from vfs.stores.remote_calls import ATTEMPT_ERRORS, ATTEMPTS, FIRST_PAUSE_S, Calls, is_beyond_the_end
from vfs.stores.remote_config import Target
from vfs.stores.s3_reads import TOLD, ranges

_STEPS_S = (3.0, 1.0, 0.3)  # limits of a step, beside the window: the longest that fits into what is left is taken


class Reads:
    """The ranged reads of one store. Any thread may use it."""

    def __init__(self, target: Target, limits: Limits, calls: Calls) -> None:
        self._name = target.name
        self._limits = limits
        self._calls = calls
        self._ranges = ranges(target, limits)
        bare = opendal.Operator(target.scheme, **target.options)
        steps = sorted({limits.window_s, *(step for step in _STEPS_S if step < limits.window_s)}, reverse=True)
        self._operators = [(step, bare.layer(TimeoutLayer(step, step))) for step in steps]

    def read_into(self, key: str, start: int, view: memoryview, budget: Budget, arrived: Arrived | None = None) -> int:
        """Fill `view` with the object's bytes from `start` on; fewer only where the object ends. The bytes read.
        `arrived` must not raise: it would look like a fault of the store."""
        pause = FIRST_PAUSE_S
        for number in itertools.count(1):
            if self._calls.closed:
                raise Unreachable(f"{self._name}: read {key}: the store was closed")
            try:
                if number == 1 and self._straight(key, start, view, budget, arrived):
                    return len(view)
                return self._attempt(key, start, view, budget, arrived)
            except ATTEMPT_ERRORS as error:
                failure = self._calls.explained(error, "read", key)
                if not failure.temporary or number >= ATTEMPTS or pause >= budget.left():
                    raise failure from None  # opendal's text has URLs and signatures in it
            time.sleep(pause)
            pause *= 3
        raise AssertionError("unreachable")

    def close(self) -> None:
        """Close the connections that are kept."""
        if self._ranges is not None:
            self._ranges.close()

    def _straight(self, key: str, start: int, view: memoryview, budget: Budget, arrived: Arrived | None) -> bool:
        return self._ranges is not None and self._ranges.fill(key, start, view, Watch(self._limits, budget), arrived)

    def _attempt(self, key: str, start: int, view: memoryview, budget: Budget, arrived: Arrived | None) -> int:
        try:
            return self._fill(key, start, view, budget, arrived)
        except OSError as error:
            if not is_beyond_the_end(error):
                raise
            size = self._calls.size(key, budget)
            if start + len(view) <= size:
                raise  # the object is long enough: the answer was cut
        return self._fill(key, start, view[: size - start], budget, arrived) if start < size else 0

    def _fill(self, key: str, start: int, view: memoryview, budget: Budget, arrived: Arrived | None) -> int:
        watch = Watch(self._limits, budget)
        done = 0
        with self._operator(budget).open(key, "rb", offset=start, size=len(view)) as file:
            while done < len(view):
                count = file.readinto(view[done : (done // TOLD + 1) * TOLD])
                if not count:
                    raise OSError("Unexpected (temporary) at read => reader got too little data")
                done += count
                watch.came(count)
                if arrived is not None and done % TOLD == 0:
                    watch.told(arrived, done)
        return done

    def _operator(self, budget: Budget) -> opendal.Operator:
        """The operator whose steps end in what is left; the quickest when nothing is."""
        left = budget.left()
        for step, operator in self._operators:
            if step <= left:
                return operator
        if not left:
            raise Stalled(f"no end within {budget.total_s:g} s")
        return self._operators[-1][1]
