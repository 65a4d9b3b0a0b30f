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
from vfs.stores.remote_calls import ATTEMPT_ERRORS, ATTEMPTS, FIRST_PAUSE_S, Calls, Stalled, is_beyond_the_end
from vfs.stores.remote_config import Target

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

    def read_into(self, key: str, start: int, view: memoryview, budget: Budget) -> int:
        """Fill `view` with the object's bytes from `start` on; fewer only where the object ends. The bytes read."""
        pause = FIRST_PAUSE_S
        for number in itertools.count(1):
            if self._calls.closed:
                raise Unreachable(f"{self._name}: read {key}: the store was closed")
            try:
                return self._attempt(key, start, view, budget)
            except ATTEMPT_ERRORS as error:
                failure = self._calls.explained(error, "read", key)
                if not failure.temporary or number >= ATTEMPTS or pause >= budget.left():
                    raise failure from None  # opendal's text has URLs and signatures in it
            time.sleep(pause)
            pause *= 3
        raise AssertionError("unreachable")

    def _attempt(self, key: str, start: int, view: memoryview, budget: Budget) -> int:
        try:
            return self._fill(key, start, view, budget)
        except OSError as error:
            if not is_beyond_the_end(error):
                raise
            size = self._calls.size(key, budget)
            if start + len(view) <= size:
                raise  # the object is long enough: the answer was cut
        return self._fill(key, start, view[: size - start], budget) if start < size else 0

    def _fill(self, key: str, start: int, view: memoryview, budget: Budget) -> int:
        least = self._limits.least_throughput * self._limits.window_s
        window_end, in_window, done = time.monotonic() + self._limits.window_s, 0, 0
        with self._operator(budget).open(key, "rb", offset=start, size=len(view)) as file:
            while done < len(view):
                count = file.readinto(view[done:])
                if not count:
                    raise OSError("Unexpected (temporary) at read => reader got too little data")
                done += count
                in_window += count
                now = time.monotonic()
                if in_window >= least:
                    window_end, in_window = now + self._limits.window_s, 0
                if now > budget.end:
                    raise Stalled(f"no end within {budget.total_s:g} s")
                if now > window_end:
                    raise Stalled(f"less than {least:.0f} bytes came in {self._limits.window_s:g} s")
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
