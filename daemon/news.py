"""What other hosts did to records that are in use here: looked for behind the back of whoever uses them.

A trio task that looks once a second which records were used just now, and has at most `_A_SECOND` of them compared with
their homes, by one thread, each at most once in `notice_s` seconds. No open or read ever waits for it.
"""

import logging
import time
from collections import OrderedDict

import trio

from vfs.errors import RunfsError, in_words
from vfs.session import Session
from vfs.trust.noticing import notice
from vfs.units import Unit

log = logging.getLogger(__name__)
_A_SECOND = 4  # records; a walk over all of them costs the stores no more
_JUST_NOW_NS = int(2e9)
_KEPT = 100_000  # records of which the time of the last look is known


class News:
    """The task, and when which record was looked at last."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._core = session.core
        self._looked: OrderedDict[str, float] = OrderedDict()
        self._limit = trio.CapacityLimiter(1)

    async def run(self) -> None:
        """Until cancelled."""
        every = self._session.settings.notice_s
        while every and self._core.homes:
            await trio.sleep(min(1.0, every))
            for unit in self._due(every):
                await trio.to_thread.run_sync(self._look, unit, limiter=self._limit, abandon_on_cancel=True)

    def _due(self, every: float) -> list[Unit]:
        recent, now = time.time_ns() - _JUST_NOW_NS, time.monotonic()
        due = []
        for unit in self._core.units.live():
            if unit.used_ns > recent and now - self._looked.get(unit.uuid, -every) >= every:
                due.append(unit)
                self._looked[unit.uuid] = now
                self._looked.move_to_end(unit.uuid)
                if len(due) >= _A_SECOND:
                    break
        while len(self._looked) > _KEPT:
            self._looked.popitem(last=False)
        return due

    def _look(self, unit: Unit) -> None:
        try:
            if notice(self._core, unit):
                log.info("%s: another host changed it; that is merged", unit.uuid)
        except (RunfsError, OSError) as error:
            log.debug("%s: whether another host changed it is not known: %s", unit.uuid, in_words(error))
