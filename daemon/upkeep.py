"""What the daemon does by itself: push what is dirty, notice what others changed, keep space free.

Trio tasks that decide when, and call `vfs` in worker threads. Nothing here may end the mount: an error is logged, and
the next round tries again.
"""

import heapq
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pyfuse3
import trio

from daemon.arrivals import Arrivals
from daemon.news import News
from vfs import actions, policy, report
from vfs.errors import RunfsError, in_words
from vfs.filesystem import FileSystem
from vfs.index_marks import Marks
from vfs.residency import State
from vfs.scan import differs
from vfs.session import Session
from vfs.tree import FileNode, Inode, Link
from vfs.units import Unit
from vfs.versions import past, transactions
from vfs.watch import Kind, Watcher

log = logging.getLogger(__name__)
_POLL_S = 0.25  # other processes' changes are seen within a second
_PUSHES = 2  # units pushed at a time; each pushes its files in parallel
_RETRY_FIRST_S = 2.0
_RETRY_MOST_S = 300.0
_SPACE_S = 10.0
_LOOK_BATCH = 200
_LOOK_EVERY_S = 300.0
_LOOK_REST = 20  # times as long as the look took: it costs at most a twentieth of a core
_WATCHED_MOST = 2000  # records; their directories take about 1 KiB of kernel memory each
_SAVE_USE_S = 60.0
_RECHECKED_MOST = 5000  # names at the root: 20 us each
_COMPARE_REST = 10  # times as long as comparing took: a large index is not compared all the time
# Threads of their own: one that waits for a page may wait for a read, which must find a thread itself.
_INVALIDATING = trio.CapacityLimiter(16)
_stale: set[Inode] = set()  # of which the kernel is to be told, once for all that happened to them until then


class _Quiet:
    """Progress nobody follows."""

    cancelled = False

    def __call__(self, event: dict[str, Any], /) -> None:
        return None


class Upkeep:
    """The tasks of one mount that nobody asked for."""

    def __init__(self, session: Session, files: FileSystem) -> None:
        self._session = session
        self._core = session.core
        self._files = files
        self._token = trio.lowlevel.current_trio_token()
        self._limit = trio.CapacityLimiter(_PUSHES)
        self.expire_name: Callable[[int, bytes], None] = lambda _parent, _name: None  # set by the mount
        self._busy: set[str] = set()
        self._retry: dict[str, tuple[float, float]] = {}
        self._draining = False
        self._marks = Marks(self._core.index)
        self._rebuilt = False
        self._marked = trio.Event()
        self._compare_wanted = trio.Event()
        files.index_changed()  # they are followed from here on
        self._watcher = Watcher(self._changed_outside, limit=None)
        self._core.units.moved.append(self._moved)
        self._core.content_changed.append(self._content_changed)

    def start(self, nursery: trio.Nursery) -> None:
        nursery.start_soon(self._push_loop, nursery)
        nursery.start_soon(self._index_loop)
        nursery.start_soon(self._compare_loop)
        nursery.start_soon(self._look_loop)
        nursery.start_soon(self._space_loop)
        nursery.start_soon(self._use_loop)
        nursery.start_soon(Arrivals(self._session, self._files).run)
        nursery.start_soon(News(self._session).run)

    def close(self) -> None:
        self._watcher.close()
        self._save_use()

    def hush(self, unit: Unit, directory: bytes) -> Callable[[], None]:
        """Hear of no writes in a directory of a unit until what this gives is called: they are our own."""
        self._watcher.hush(unit.uuid, directory)
        return lambda: self._watcher.unhush(unit.uuid, directory)

    # --- what moved or changed: tell the kernel ----------------------------------------------------------------

    def _moved(self, unit: Unit) -> None:
        """The files of a unit moved (any thread). Of one that was evicted the kernel kept much, of another nothing but
        what its own directory is."""
        kept = unit.state is State.RESIDENT
        self._token.run_sync_soon(self._invalidate if kept else self._invalidate_top, unit)

    def _content_changed(self, unit: Unit) -> None:
        """Bytes of a unit went (any thread): the kernel asks anew what it kept of its files."""
        self._token.run_sync_soon(self._invalidate, unit)

    def _changed_outside(self, uuid: str, path: bytes, kind: Kind) -> None:
        """A watched working directory changed (watcher's thread)."""
        self._token.run_sync_soon(self._noticed, uuid, path)

    def _noticed(self, uuid: str, path: bytes) -> None:
        self._files.roots.touch(uuid)
        unit = self._core.units.held(uuid)
        if unit is None or unit.evicted:
            return
        self.mark(unit, "changed in its directory")
        if b"/" not in path:  # of what lies below the kernel keeps nothing
            self._invalidate_top(unit)

    def mark(self, unit: Unit, why: str) -> None:
        """A unit changed behind our back."""
        try:
            self._core.units.mark_dirty(unit, why)
        except RunfsError as error:
            log.error("%s", error)

    def _invalidate_top(self, unit: Unit) -> None:
        """Have the kernel ask anew for a unit's own directory."""
        for node in self._files.tree.of_unit(unit, deep=False):
            pyfuse3_later(node.ino)

    def _invalidate(self, unit: Unit) -> None:
        """Have the kernel ask anew for everything of a unit."""
        for node in self._files.tree.of_unit(unit):
            pyfuse3_later(node.ino)
            for name in node.children:
                self.expire_name(node.ino, name)

    # --- push --------------------------------------------------------------------------------------------------

    async def _push_loop(self, nursery: trio.Nursery) -> None:
        while True:
            if self._session.settings.push.auto and self._core.homes and not self._draining:
                for unit in self._due():
                    self._busy.add(unit.uuid)
                    nursery.start_soon(self._push, unit)
            await trio.sleep(_POLL_S)

    def _due(self) -> list[Unit]:
        """Dirty units that are quiet, or have been dirty for long enough; not those whose last try just failed."""
        now, settings = time.monotonic(), self._session.settings.push
        due = []
        for unit in self._core.units.dirty():
            held = self._core.transactions.get(unit.uuid)
            if held is not None and held.state == transactions.OPEN:
                continue
            if unit.uuid in self._busy or self._retry.get(unit.uuid, (0.0, 0.0))[0] > now:
                continue
            quiet = now - unit.changed_at >= settings.quiet_s and not unit.writers and not self._live(unit)
            if quiet or now - unit.first_change >= settings.every_s:
                due.append(unit)
        return due[: 4 * _PUSHES]

    def _live(self, unit: Unit) -> bool:
        """A live run is never quiet: heartbeats and logs are pushed every so often, together."""
        try:
            return self._session.evictor.live(unit) is not None
        except (RunfsError, OSError):
            return False

    async def _push(self, unit: Unit) -> None:
        try:
            await trio.to_thread.run_sync(self._push_now, unit, limiter=self._limit)
        finally:
            self._busy.discard(unit.uuid)

    def _push_now(self, unit: Unit) -> None:
        try:
            self._session.transactions.resume(unit)
            outcome = self._session.pusher.push(unit)
            error = outcome.failed[0][1] if outcome.failed else None
        except (RunfsError, OSError) as problem:
            error = problem if isinstance(problem, RunfsError) else RunfsError(f"{unit.uuid}: {in_words(problem)}")
        except Exception:
            log.exception("pushing %s failed unexpectedly; please report this", unit.uuid)
            error = RunfsError("an unexpected error; see the log")
        if error is None:
            self._retry.pop(unit.uuid, None)
            unit.first_change = time.monotonic() if unit.dirty else 0.0
            return
        delay = min(self._retry.get(unit.uuid, (0.0, _RETRY_FIRST_S / 2))[1] * 2, _RETRY_MOST_S)
        self._retry[unit.uuid] = (time.monotonic() + delay, delay)
        log.warning("%s is not pushed, again in %.0f s: %s", unit.uuid, delay, error)
        try:
            self._core.journal.postpone(unit.uuid, str(error), delay)
        except RunfsError as problem:
            log.error("%s", problem)

    async def drain(self, seconds: float, tell: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """Push everything dirty, for at most so many seconds. What is left stays in the journal."""
        self._draining = True
        failed: list[dict[str, Any]] = []
        with trio.move_on_after(seconds):
            if self._core.homes:
                async with trio.open_nursery() as nursery:
                    for unit in self._core.units.dirty():
                        nursery.start_soon(self._drain_one, unit, failed, tell)
        left = self._core.units.dirty()
        errors = {row.uuid: row.error for row in self._core.journal.dirty()}
        told = {each["uuid"] for each in failed}
        failed += [
            {"uuid": u.uuid, "reason": errors[u.uuid]} for u in left if errors.get(u.uuid) and u.uuid not in told
        ]
        pending = {"records": len(left), **await trio.to_thread.run_sync(report.changed_size, self._core, left)}
        return {"pending": pending, "failed": failed, "exit": int(bool(left))}

    def resume(self) -> None:
        """The mount stays after all: go on pushing."""
        self._draining = False

    async def _drain_one(
        self, unit: Unit, failed: list[dict[str, Any]], tell: Callable[[dict[str, Any]], None]
    ) -> None:
        def push() -> None:
            try:
                outcome = self._session.pusher.push(unit)
                failed.extend({"uuid": unit.uuid, "reason": str(error)} for _name, error in outcome.failed)
            except (RunfsError, OSError) as error:
                failed.append({"uuid": unit.uuid, "reason": in_words(error)})
            tell({"what": "push", "uuid": unit.uuid})

        await trio.to_thread.run_sync(push, abandon_on_cancel=True, limiter=self._limit)

    # --- the index ---------------------------------------------------------------------------------------------

    async def _index_loop(self) -> None:
        said = ""
        while True:
            await trio.sleep(_POLL_S)
            try:
                change = await trio.to_thread.run_sync(self._core.index.changed)
                if change is not None:  # first: whoever asks from here on is told what the index says now
                    self._files.index_changed()
                self._rebuilt = self._rebuilt or (change is not None and change.rebuilt)
                if self._rebuilt:  # again until it worked
                    await trio.to_thread.run_sync(self._session.put_rows_back)
                    self._rebuilt = False
                if change is not None:
                    self._compare_wanted.set()
                    await self._recheck_names()
                said = ""
            except RunfsError as error:
                if str(error) != said:  # it may last: a rebuild, a missing file
                    said = str(error)
                    log.warning("the index cannot be read just now: %s", error)

    async def _recheck_names(self) -> None:
        """Have the kernel forget names at the root that the index now says otherwise of. Of very many it does so by
        itself soon enough (AT_ROOT), all but those of evicted records."""
        known = list(self._files.tree.root.children.items())
        if len(known) > _RECHECKED_MOST:
            known = [(name, node) for name, node in known if isinstance(node, FileNode) and node.unit.evicted]
        for count, (name, node) in enumerate(known):
            if isinstance(node, (FileNode, Link)) and not self._files.tree.still(node, name):
                forget_name(self._files.tree.root.ino, name)
            if count % 500 == 499:
                await trio.lowlevel.checkpoint()

    async def _compare_loop(self) -> None:
        """Find records whose row changed: machinable bumps `updated_at` with each official change."""
        while not self._marked.is_set():
            try:
                await trio.to_thread.run_sync(self._marks.take)
                self._marked.set()
            except RunfsError as error:
                log.debug("the index is looked at again later: %s", error)
                await trio.sleep(_POLL_S)
        while True:
            await self._compare_wanted.wait()
            self._compare_wanted = trio.Event()
            began = time.monotonic()
            try:
                await trio.to_thread.run_sync(self._compare_marks)
            except RunfsError as error:
                log.debug("the index is compared again later: %s", error)
                self._compare_wanted.set()
            await trio.sleep(max(_POLL_S, _COMPARE_REST * (time.monotonic() - began)))

    def _compare_marks(self) -> None:
        for uuid in self._marks.changed():
            self._keep_rows(uuid)
            self._token.run_sync_soon(self._row_changed, uuid)

    def _keep_rows(self, uuid: str) -> None:
        """Rows of an evicted record are kept as they are now, not at the next push: the index may be rebuilt first."""
        with suppress(RunfsError):
            unit, _path = self._core.units.place(uuid)
            if unit.evicted:
                self._session.pusher.rows(unit)

    def _row_changed(self, uuid: str) -> None:
        try:
            unit, _path = self._core.units.place(uuid)
        except RunfsError:
            return
        self.mark(unit, "its row in the index changed")
        self._watch(unit)

    def _watch(self, unit: Unit) -> None:
        if not unit.evicted:
            try:
                self._watcher.watch(unit.uuid, unit.directory)
            except OSError as error:
                log.debug("%s is not watched: %s", unit.uuid, error)

    # --- the look over everything ------------------------------------------------------------------------------

    async def _look_loop(self) -> None:
        """What changed while nobody watched, at start and now and then: a save into an old run changes no row, since
        machinable writes `updated_at` through to its index only in a `with Index()` block."""
        await self._marked.wait()
        while True:
            began = time.monotonic()
            await trio.to_thread.run_sync(self._look, abandon_on_cancel=True)
            await trio.sleep(max(_LOOK_EVERY_S, _LOOK_REST * (time.monotonic() - began)))

    def _look(self) -> None:
        """Mark what is not as it was pushed; a record that was never pushed counts as changed. The records that were
        changed last are watched from here on."""
        if not self._core.homes:
            return
        marks: list[Unit] = []
        newest = heapq.nlargest(_WATCHED_MOST, policy.roots(self._core), key=lambda record: record.updated_at_ns)
        watch = {record.uuid for record in newest}
        for record in policy.roots(self._core):
            if self._session.stopping.is_set():
                return
            try:
                unit = self._core.units.get(record.uuid)
                if self._session.evictor.reclaim(unit):
                    continue
                if unit.uuid in watch:  # first, so that nothing is missed between
                    self._watch(unit)
                if not unit.dirty and self._changed(unit):
                    marks.append(unit)
            except (RunfsError, OSError) as error:
                log.debug("%s is left out: %s", record.uuid, error)
            if len(marks) >= _LOOK_BATCH:
                self._mark_all(marks)
        self._mark_all(marks)

    def _changed(self, unit: Unit) -> bool:
        held = {home.store for home in self._core.journal.homes(unit.uuid)}
        if any(home.name not in held for home in self._core.homes):
            return True
        return bool(differs(unit.base, self._core.journal.known(unit.uuid), shadow=unit.evicted))

    def _mark_all(self, units: list[Unit]) -> None:
        for unit in units:
            self.mark(unit, "found changed")
        units.clear()

    # --- space and use -----------------------------------------------------------------------------------------

    async def _space_loop(self) -> None:
        while True:
            await trio.sleep(_SPACE_S)
            wanted = policy.wanted_free(self._core)
            if wanted is not None and self._core.homes:
                await trio.to_thread.run_sync(self._make_room, wanted, abandon_on_cancel=True)

    def _make_room(self, wanted: int) -> None:
        past.trim_all(self._core)
        try:
            rules = policy.Rules(until_free=wanted)
            candidates = policy.plan(self._core, self._session.evictor, rules)
            done = actions.evict_candidates(self._session, candidates, rules, _Quiet())
        except (RunfsError, OSError) as error:
            log.warning("no room could be made: %s", error)
            return
        if done["evicted"]:
            log.info("the disk was nearly full: evicted %d records, %d bytes", len(done["evicted"]), done["bytes"])

    async def _use_loop(self) -> None:
        """Watch what is in use, and remember when it was."""
        since_saved = 0.0
        while True:
            await trio.sleep(1.0)
            recent = time.time_ns() - int(2e9)
            for unit in self._core.units.live():
                if unit.used_ns > recent and not unit.evicted and not self._watcher.watching(unit.uuid):
                    await trio.to_thread.run_sync(self._watch_used, unit)
            since_saved += 1.0
            if since_saved >= _SAVE_USE_S:
                since_saved = 0.0
                await trio.to_thread.run_sync(self._save_use)

    def _watch_used(self, unit: Unit) -> None:
        self._watch(unit)
        with suppress(RunfsError, OSError):  # a damaged record: whoever uses it is told
            if not unit.dirty and self._changed(unit):
                self.mark(unit, "found changed")

    def _save_use(self) -> None:
        used = {unit.uuid: unit.used_ns for unit in self._core.units.live() if unit.used_ns}
        if used:
            self._core.journal.set_used(used)


def pyfuse3_later(ino: Inode) -> None:
    """Have the kernel forget attributes of an inode, from a thread: it may wait for a handler of ours."""
    if ino not in _stale:
        _stale.add(ino)
        trio.lowlevel.spawn_system_task(_invalidate_inode, ino)


async def _invalidate_inode(ino: Inode) -> None:
    _stale.discard(ino)
    try:
        await trio.to_thread.run_sync(pyfuse3.invalidate_inode, ino, True, limiter=_INVALIDATING)
    except OSError:
        return  # the kernel does not know it any more


def forget_name(parent: Inode, name: bytes) -> None:
    """Have the kernel look a name up again."""
    pyfuse3.invalidate_entry_async(parent, name, ignore_enoent=True)
