"""The scrub: every byte of every record, here and in each home, against what was digested; `runfs verify --deep`.

Used by the command `verify`, in a worker thread of the daemon or in the command line's process. Reads run side by side
within a record; records follow each other in the order of their uuids. How far it has come is in the journal, so a kill
costs at most what was read since `_SAVE_S` ago: the next scrub of the same records goes on there. Decides first
(`mending.plan`), acts only with `repair`, and looks again, under the record's lock, before it does.
"""

import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from blake3 import blake3

from vfs import faults
from vfs.core import Home
from vfs.errors import RunfsError, in_words
from vfs.journal import Known, Replica
from vfs.manifest import Content, parse
from vfs.trust import mending
from vfs.trust.checking import Pace, Said, Stopped, Verdict, Word, in_store, manifest_in, on_disk
from vfs.trust.journal import Fault, Scrub
from vfs.units import Unit

if TYPE_CHECKING:
    from vfs.session import Progress, Session

log = logging.getLogger(__name__)

_AT_ONCE = 8  # contents read at a time; each takes 8 MiB of memory at most
_AWAY = 3  # records; a store that did not answer for so many is not asked for the others
_SAVE_S = 1.0  # how often the journal hears how far we are
_TELL_S = 0.5
REPAIRED, QUARANTINED = "repaired", "quarantined"


@dataclass(frozen=True, slots=True)
class Look:
    """One content of a unit, everywhere: the paths that have it, and what each place was found to have."""

    content: Content
    items: tuple[Known, ...]
    here: Mapping[bytes, Verdict]
    there: Mapping[str, Verdict]
    proofs: tuple[Replica, ...] = ()

    @property
    def path(self) -> bytes:
        return self.items[0].file.path


class Scrubber:
    """One scrub of a session's records. `units` in the order of their uuids."""

    def __init__(
        self, session: "Session", progress: "Progress", units: Sequence[Unit], *, repair: bool, rate: float | None
    ) -> None:
        self._session = session
        self._core = session.core
        self._progress = progress
        self._units = units
        self._repair = repair
        self._pace = Pace(rate, lambda: progress.cancelled or session.stopping.is_set())
        self._pool = ThreadPoolExecutor(_AT_ONCE, "scrub")
        self._saved = self._told = self._began = time.monotonic()
        sizes = self._core.journal.sizes()
        self._total = sum(sizes.get(unit.uuid, (0, 0))[0] for unit in units)
        self._total_bytes = sum(sizes.get(unit.uuid, (0, 0))[1] for unit in units) * (1 + len(self._core.homes))
        self._mute: set[str] = set()  # stores that did not answer for this record
        self._away: dict[str, int] = {}  # for how many records in a row a store did not answer
        self.state = Scrub("", 0)
        self.stopped = False

    def run(self, what: str, *, restart: bool) -> list[Fault]:
        """Scrub, going on where an earlier one of the same records stopped; all that both have found. `what` names
        these records."""
        self.state = self._begin(what, restart)
        try:
            for unit in self._units:
                if unit.uuid >= self.state.uuid:
                    self._one(unit, self.state.path if unit.uuid == self.state.uuid else b"")
        except Stopped:
            self.stopped = True
            if self._repair:  # what was found in this record is not mended yet
                self.state = replace(self.state, path=b"")
            self._save()
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)
        found = self._core.journal.faults(what)
        if not self.stopped:
            self._core.journal.end_scrub(what)
        return found

    def _begin(self, what: str, restart: bool) -> Scrub:
        journal, now = self._core.journal, time.time_ns()
        before = journal.scrub(what)
        too_old = before is not None and now - before.seen_ns > self._core.settings.proof.max_age * 1e9
        if before is not None and not restart and not too_old:
            return before
        journal.end_scrub(what)
        begun = Scrub(what, now, now)
        journal.set_scrub(begun)
        return begun

    def _save(self) -> None:
        self._core.journal.set_scrub(replace(self.state, seen_ns=time.time_ns()))
        self._saved = time.monotonic()
        faults.point("scrub.saved")

    def _note(self, unit: Unit, path: bytes, store: str, reason: str, outcome: str = "") -> None:
        self._core.journal.add_fault(self.state.what, Fault(unit.uuid, path, store, reason, outcome))

    # --- one record --------------------------------------------------------------------------------------------

    def _one(self, unit: Unit, after: bytes) -> None:
        try:
            homes = self._homes(unit)
            self._mute.clear()
            if not after:
                self._in_quarantine(unit)
                self._manifests(unit, homes)
            again: list[Look] = []
            for look in self._pool.map(lambda each: self._look(unit, homes, *each), self._contents(unit, after)):
                self._core.journal.set_replicas(look.proofs)
                self._unasked(unit, look)
                if mending.plan(look.here, look.there) != mending.Plan():
                    again.append(look)
                    self._found(unit, look)
                self._step(unit, look)  # last: what counts as looked at is not looked at again
            for look in again if self._repair else ():
                self._mend(unit, homes, look)
            if self._repair:
                self._come_back(unit, homes)
        except (RunfsError, OSError) as error:
            self._note(unit, b"", "", in_words(error))
        self.state = replace(self.state, uuid=unit.uuid + "\0", path=b"")  # after it, before any other
        if time.monotonic() - self._saved > _SAVE_S:
            self._save()

    def _homes(self, unit: Unit) -> list[Home]:
        held = {row.store for row in self._core.journal.homes(unit.uuid)}
        return [home for home in self._core.homes if home.name in held]

    def _in_quarantine(self, unit: Unit) -> None:
        for row in self._core.journal.quarantined(unit.uuid):
            self._note(unit, row.path, "", row.reason, QUARANTINED)

    def _contents(self, unit: Unit, after: bytes) -> Iterator[tuple[Content, tuple[Known, ...]]]:
        """Each content of a unit with its files, in the order of the first of their paths."""
        found: dict[bytes, list[Known]] = {}
        for item in self._core.journal.known(unit.uuid).values():
            if item.file.kind == "file" and not item.file.same and item.file.digest:
                found.setdefault(item.file.digest, []).append(item)
        for digest, items in found.items():
            content = self._core.journal.content(digest)
            if content is not None and (not after or items[0].file.path > after):
                yield content, tuple(items)

    def _look(self, unit: Unit, homes: Sequence[Home], content: Content, items: tuple[Known, ...]) -> Look:
        here = {
            item.file.path: on_disk(self._core, unit, item, content, self._pace) if item.inode else Verdict(Word.OTHER)
            for item in items
        }
        if unit.evicted:
            here = {path: Verdict(Word.PART) if each.word is Word.OTHER else each for path, each in here.items()}
        there: dict[str, Verdict] = {}
        proofs: list[Replica] = []
        for home in homes:
            replica = self._core.journal.replicas_of(unit.uuid, home.name).get(content.digest)
            if replica is None:
                there[home.name] = Verdict(Word.GONE, "it has no copy that the journal knows of")
                continue
            if home.name in self._mute or self._away.get(home.name, 0) >= _AWAY:
                there[home.name] = Verdict(Word.UNKNOWN, "it was not asked any more: it did not answer")
                continue
            there[home.name] = in_store(home, replica, content, self._pace)
            if there[home.name].word is Word.UNKNOWN:
                self._mute.add(home.name)
            if there[home.name].word is Word.GOOD:
                proofs.append(replace(replica, proven_ns=time.time_ns(), how="read back"))
        if any(verdict.word is not Word.GOOD for verdict in there.values()):
            there |= self._in_sources(content)
        return Look(content, items, here, there, tuple(proofs))

    def _in_sources(self, content: Content) -> dict[str, Verdict]:
        """Read-only stores may help out; what they lack is not to be brought to them."""
        replicas = {each.store: each for each in self._core.journal.replicas(content.digest)}
        asked = [home for home in self._core.sources if home.name in replicas and not home.calculates]
        found = {home.name: in_store(home, replicas[home.name], content, self._pace) for home in asked}
        return {name: verdict for name, verdict in found.items() if verdict.word in (Word.GOOD, Word.UNKNOWN)}

    def _unasked(self, unit: Unit, look: Look) -> None:
        for store, verdict in look.there.items():
            if verdict.word is Word.UNKNOWN:
                self._note(unit, look.path, store, verdict.reason)

    def _step(self, unit: Unit, look: Look) -> None:
        read, self._pace.bytes = self._pace.bytes, 0
        state = self.state
        # Contents are taken up in order, so what comes before this path has been looked at.
        self.state = replace(state, uuid=unit.uuid, path=look.path, checked=state.checked + 1, bytes=state.bytes + read)
        now = time.monotonic()
        if now - self._saved > _SAVE_S and not self._repair:  # with repair, a record is looked at whole
            self._save()
        if now - self._told > _TELL_S:
            self._told = now
            rate = self.state.bytes / max(now - self._began, 0.001)
            left = max(self._total_bytes - self.state.bytes, 0) / rate if rate else None
            self._progress(
                {
                    "what": "verify", "uuid": unit.uuid, "done": self.state.checked, "size": self._total,
                    "rate": rate, "left_s": left,
                }
            )  # fmt: skip

    def _found(self, unit: Unit, look: Look) -> None:
        """Note what is wrong with one content, and what could be done."""
        planned = mending.plan(look.here, look.there)
        advice = _advice(planned)
        for path in planned.bring:
            self._note(unit, path, "", look.here[path].reason + advice)
        for store in planned.push:
            self._note(unit, look.path, store, look.there[store].reason + advice)

    # --- repair ------------------------------------------------------------------------------------------------

    def _mend(self, unit: Unit, homes: Sequence[Home], before: Look) -> None:
        """Look again, under the unit's lock, and make right what still is wrong."""
        with unit.moving:
            look = self._look(unit, homes, before.content, before.items)
            planned = mending.plan(look.here, look.there)
            for path, verdict in before.here.items():
                if path not in planned.bring and verdict.word in (Word.BAD, Word.GONE):
                    self._note(unit, path, "", verdict.reason, REPAIRED if look.here[path].word is Word.GOOD else "")
            if planned.lost:
                self._lost(unit, look, planned)
            elif not planned.wait and self._bring(unit, look, planned):
                self._push(unit, look, planned, homes)

    def _bring(self, unit: Unit, look: Look, planned: mending.Plan) -> bool:
        """Mend what is here; False when something stays wrong: what is pushed then could be it."""
        whole = True
        for item in look.items:
            path = item.file.path
            if path not in planned.bring:
                continue
            reason = look.here[path].reason
            try:
                said = mending.mend_here(self._core, self._session.hydrator, unit, item, look.content, planned)
                self._note(unit, path, "", "; ".join(filter(None, (reason, said))), REPAIRED)
            except (RunfsError, OSError) as error:
                self._note(unit, path, "", f"{reason}; not mended: {in_words(error)}")
                whole = False
        if planned.bring:
            self._session.pusher.scan(unit)
        return whole

    def _push(self, unit: Unit, look: Look, planned: mending.Plan, homes: Sequence[Home]) -> None:
        if not planned.push:
            return
        for store in planned.push:
            mending.forget_there(self._core, unit, store, look.content.digest)
        outcome = self._session.pusher.push(unit)
        errors = {name: str(error) for name, error in outcome.failed}
        for home in homes:
            if home.name not in planned.push:
                continue
            reason = look.there[home.name].reason
            replica = self._core.journal.replicas_of(unit.uuid, home.name).get(look.content.digest)
            verdict = in_store(home, replica, look.content, self._pace) if replica else Verdict(Word.GONE)
            if verdict.word is Word.GOOD:
                self._note(unit, look.path, home.name, reason, REPAIRED)
            else:
                why = errors.get(home.name) or verdict.reason or "it did not take it"
                self._note(unit, look.path, home.name, f"{reason}; not mended: {why}")

    def _lost(self, unit: Unit, look: Look, planned: mending.Plan) -> None:
        reasons = [f"{store}: {look.there[store].reason}" for store in planned.push]
        for item in look.items:
            path = item.file.path
            verdict = look.here[path]
            why = "; ".join(filter(None, (verdict.reason and f"here: {verdict.reason}", *reasons)))
            try:
                said = mending.quarantine(
                    self._core, unit, item, look.content, why, self._pace, damaged=path in planned.bring
                )
                outcome = QUARANTINED
            except (RunfsError, OSError) as error:
                said, outcome = f"not put in quarantine: {in_words(error)}", ""
            self._note(unit, path, "", f"{why}; {said}", outcome)
        for store in planned.push:
            self._note(unit, look.path, store, look.there[store].reason, QUARANTINED)

    def _come_back(self, unit: Unit, homes: Sequence[Home]) -> None:
        """What was in quarantine and has a right copy again."""
        for row in self._core.journal.quarantined(unit.uuid):
            content = self._core.journal.content(row.digest)
            replicas = {each.store: each for each in self._core.journal.replicas(row.digest)}
            if content is None:
                continue
            for home in homes:
                replica = replicas.get(home.name)
                if replica is None or in_store(home, replica, content, self._pace).word is not Word.GOOD:
                    continue
                manifest = self._core.journal.home(unit.uuid, home.name)
                file = parse(manifest.manifest, unit.uuid).by_path().get(row.path) if manifest else None
                with unit.moving:
                    mending.bring_back(self._core, self._session.hydrator, unit, row, file)
                self._note(unit, row.path, "", f"{home.name} has it: back from quarantine", REPAIRED)
                break

    # --- manifests ---------------------------------------------------------------------------------------------

    def _manifests(self, unit: Unit, homes: Sequence[Home]) -> None:
        """Compare each home's manifest with the one that was published."""
        push = []
        for home in self._core.homes:
            row = self._core.journal.home(unit.uuid, home.name)
            if row is None or home not in homes:
                self._note(unit, b"", home.name, f"it was not pushed there yet; runfs push {unit.uuid}")
                continue
            if self._away.get(home.name, 0) >= _AWAY:
                self._note(unit, b"", home.name, "it was not asked any more: it did not answer")
                continue
            found = manifest_in(home, unit.uuid, row.manifest)
            self._away[home.name] = self._away.get(home.name, 0) + 1 if found.said is Said.UNKNOWN else 0
            if found.said is Said.UNKNOWN:
                self._mute.add(home.name)
            if found.said is Said.SAME:
                continue
            self._note(unit, b"", home.name, found.reason)
            if not self._repair or found.said is Said.UNKNOWN:
                continue
            if found.said is Said.WRONG:
                with unit.moving:
                    said = mending.put_back(self._core, home, unit.uuid, found)
                self._note(unit, b"", home.name, f"{found.reason}; {said}", REPAIRED)
            else:
                self._core.units.mark_dirty(unit, f"{home.name}: {found.reason}")
                self._core.journal.doubt_home(unit.uuid, home.name)
                push.append((home, found.reason))
        outcome = self._session.pusher.push(unit) if push else None
        failed = {name: str(error) for name, error in outcome.failed} if outcome else {}
        for home, reason in push:
            ok = home.name not in failed
            self._note(unit, b"", home.name, reason if ok else f"{reason}; {failed[home.name]}", REPAIRED if ok else "")


def _advice(planned: mending.Plan) -> str:
    if planned.lost:
        return "; no right copy is left"
    if planned.wait:
        return "; whether there is a right copy is not known: a place could not be asked"
    return f"; {planned.source} has it" if planned.source else f"; {os.fsdecode(planned.path)} here has it"


def name_of(uuids: Sequence[str], *, repair: bool) -> str:
    """What a scrub of these records is called in the journal."""
    chosen = blake3("\n".join(sorted(uuids)).encode()).hexdigest(8) if uuids else "*"
    return f"{chosen} repair" if repair else chosen
