"""One asyncio thread for all remote stores of the process.

Used by `remote.py`. opendal's `AsyncOperator` needs a running loop; cancelling one of its calls closes the
socket at once, which its synchronous calls cannot do. The loop's thread must never block: whatever reads
files or hashes runs in the caller's thread. `run` blocks its caller until the coroutine has ended, at most
for the limit and a margin.
"""

import asyncio
import atexit
import os
import threading
import time
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")

MARGIN_S = 2.0  # how much later than the loop's own limit the caller gives up, should the loop itself be stuck


class EventLoop:
    """A loop in a daemon thread. Any thread but its own may call `run`."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="runfs-stores", daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T], limit_s: float) -> T:
        """The coroutine's result. Raises what it raises, and TimeoutError after `limit_s` seconds; a caller
        that is interrupted, or gives up, cancels the coroutine."""
        future: Future[T] = asyncio.run_coroutine_threadsafe(_limited(coroutine, limit_s), self._loop)
        try:
            return future.result(limit_s + MARGIN_S)
        except BaseException:
            future.cancel()
            raise

    def stop(self) -> None:
        """Cancel what still runs and end the thread."""
        if not self._loop.is_running():
            return
        asyncio.run_coroutine_threadsafe(_cancel_others(), self._loop).result(MARGIN_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(MARGIN_S)
        if not self._thread.is_alive():
            self._loop.close()


async def _limited(coroutine: Coroutine[Any, Any, T], limit_s: float) -> T:
    async with asyncio.timeout(limit_s):
        return await coroutine


async def _cancel_others() -> None:
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


_SETTLE_S = 0.05  # opendal's threads drop what they hold of Python just after they answered

_lock = threading.Lock()
_current: tuple[int, EventLoop] | None = None


def event_loop() -> EventLoop:
    """The process's loop, started when first asked for. A forked child gets its own."""
    global _current
    with _lock:
        if _current is None or _current[0] != os.getpid():
            _current = (os.getpid(), EventLoop())
        return _current[1]


@atexit.register
def _stop() -> None:
    # Without this a completion that arrives while the interpreter shuts down aborts the process.
    if _current is not None and _current[0] == os.getpid():
        _current[1].stop()
        time.sleep(_SETTLE_S)  # frees the interpreter for the engine's threads
