"""Ranges of remote objects, read into the caller's own memory: the path that hydrate's bytes take.

Used by `remote.py`. Blocks its caller, at most for the budget and a moment. It uses opendal's synchronous files, in
the caller's thread: half the processor time of handing every piece over from an event loop, and no copy. They cannot be
cancelled, so what bounds a read is:

- each step (a connection, the next piece) has a limit of its own inside opendal, never more than what is left;
- after each piece the budget is looked at, and whether the last window brought the least throughput.

Temporary faults are tried again like those of every other call (`remote_calls.py`).
"""

import itertools
import time

import opendal
from opendal.layers import TimeoutLayer

from vfs.errors import Unreachable
from vfs.stores.limits import Budget, Limits
from vfs.stores.protocol import Arrived
from vfs.stores.remote_calls import ATTEMPT_ERRORS, ATTEMPTS, FIRST_PAUSE_S, Calls, Stalled, is_beyond_the_end
from vfs.stores.remote_config import Target

TOLD = (
    1 << 20
)  # bytes after which a reader is told what is there; what was just copied is still in the processor's cache
_STEPS_S = (3.0, 1.0, 0.3)  # limits of a step, beside the window: the longest that fits into what is left is taken


class Reads:
    """The ranged reads of one store. Any thread may use it."""

    def __init__(self, target: Target, limits: Limits, calls: Calls) -> None:
        self._name = target.name
        self._limits = limits
        self._calls = calls
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
                return self._attempt(key, start, view, budget, arrived)
            except ATTEMPT_ERRORS as error:
                failure = self._calls.explained(error, "read", key)
                if not failure.temporary or number >= ATTEMPTS or pause >= budget.left():
                    raise failure from None  # opendal's text has URLs and signatures in it
            time.sleep(pause)
            pause *= 3
        raise AssertionError("unreachable")

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


class Watch:
    """The limits of one attempt, looked at after each piece."""

    def __init__(self, limits: Limits, budget: Budget) -> None:
        self._budget = budget
        self._window_s = limits.window_s
        self._least = limits.least_throughput * limits.window_s
        self._end = time.monotonic() + limits.window_s
        self._came = 0

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

    def told(self, arrived: Arrived, done: int) -> None:
        """Tell the reader; the time it takes to deal with the bytes is not the store's."""
        began = time.monotonic()
        arrived(done)
        self._end += time.monotonic() - began
