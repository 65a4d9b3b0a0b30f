"""Trying a store for real, the same way for every type: what `doctor` and `mount` report.

Used by the stores' `check()`. Blocks for a few calls of the store, each at most its deadline.
"""

import os
import time

from vfs.errors import Conflict, RunfsError
from vfs.stores.protocol import Check, Store

SKEW_LIMIT_S = 60.0  # S3 refuses requests at 15 minutes; people notice wrong dates at a minute
PROBE_PREFIX = ".runfs/probe-"


def check_store(store: Store, prefix: str = PROBE_PREFIX) -> Check:
    """List, write, stat, read back, write again on condition, remove; the probe's key starts with `prefix`. Failures
    become sentences in `problems`."""
    result = Check()
    key = prefix + os.urandom(8).hex()
    began = time.monotonic()
    try:
        next(iter(store.list(prefix)), None)
        result.reachable = result.readable = True
        result.latency_s = time.monotonic() - began
        if store.info().read_only:
            result.problems.append(f"{store.name} is read-only: nothing can be pushed to it")
        else:
            _probe(store, key, result)
    except RunfsError as error:
        result.problems.append(str(error))
    return result


def _probe(store: Store, key: str, result: Check) -> None:
    content = b"runfs probe " + key.encode()
    before = time.time()
    written = store.write(key, content, if_absent=True)
    after = time.time()
    try:
        result.writable = True
        if written.modified_ns is not None:
            result.clock_skew_s = _skew(written.modified_ns / 1e9, before, after)
        if store.read(key) != content:
            result.readable = False
            result.problems.append(f"{store.name} gave back other bytes than were written: do not use it")
        _probe_condition(store, key, content, result)
    finally:
        store.delete(key)
    if result.clock_skew_s is not None and abs(result.clock_skew_s) > SKEW_LIMIT_S:
        result.problems.append(f"{store.name}'s clock differs from ours by {result.clock_skew_s:.0f} s: set the clock")


def _probe_condition(store: Store, key: str, content: bytes, result: Check) -> None:
    try:
        store.write(key, content + b" again", if_absent=True)
    except Conflict:
        result.conditional = True
        return
    result.conditional = False
    result.problems.append(f"{store.name} ignores conditions on writes: use it from one machine only")


def _skew(modified: float, before: float, after: float) -> float:
    """Difference of clocks; 0 while the store's time lies inside the call (its time may be in whole
    seconds)."""
    if before - 1.0 <= modified <= after + 1.0:
        return 0.0
    return modified - (before + after) / 2
