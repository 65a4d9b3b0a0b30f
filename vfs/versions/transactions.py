"""Transactions on a record: its pushes wait, and it can go back to what it was. Used by the commands and by push.

What it goes back to is kept in the homes, not here: a transaction begins with the record pushed and proven there, as
for an eviction, and the journal keeps the manifest. A copy on this disk would cost as much room as the record has, on
the machines that use runfs because they have too little; and what other programs write straight into the working
directory is covered as well, which a copy at the first change through the mount would not do. The price: no
transaction begins while no home can be reached, and rolling back brings what was changed from a home (where the
record is resident, and does not hold it under another name).

    open           pushes and evictions wait; whatever happens to the files, others see the record as it was
    committing     nothing waits any more, there is no way back; the next push publishes everything, with the notes
    rolling back   files are going back; a crash leaves this, and it is carried on from wherever it was
    (no row)       it is over

What a kill leaves at each step: before the row is written, no transaction. Begun: open. `committing` written:
committed, though not published yet; after the publish, the next push finds nothing to do and removes the row.
`rolling back` written: the next mount, or `runfs transaction rollback`, goes on; making files what they are to be
again changes nothing."""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from vfs import faults
from vfs.core import Core
from vfs.errors import Refused, RunfsError, UsageError, in_words
from vfs.events import TransactionBegan, TransactionEnded
from vfs.living import live_record
from vfs.manifest import NOTES_MOST, Manifest, parse
from vfs.units import Unit
from vfs.versions import history
from vfs.versions.journal import Transaction

if TYPE_CHECKING:
    from vfs.evict import Evictor
    from vfs.push import Outcome, Pusher
    from vfs.versions.reverting import Reverter

log = logging.getLogger(__name__)

_PASSES = 3  # over a record that somebody goes on changing
OPEN, COMMITTING, ROLLING_BACK = "open", "committing", "rolling back"


def why_held(transaction: Transaction) -> str:
    """Why pushes of a record wait, and what to do."""
    uuid, since = transaction.uuid, time.strftime("%Y-%m-%d %H:%M", time.localtime(transaction.began_ns / 1e9))
    if transaction.state == ROLLING_BACK:
        return f"a rollback was interrupted; `runfs transaction rollback {uuid}` goes on with it"
    return (
        f"a transaction is open since {since}; runfs transaction commit {uuid} publishes it, "
        f"runfs transaction rollback {uuid} undoes it"
    )


def end_commit(core: Core, transaction: Transaction) -> None:
    """Every home has what was committed."""
    core.journal.end_transaction(transaction.uuid)
    core.transactions.pop(transaction.uuid, None)
    core.events.publish(TransactionEnded(transaction.uuid, True))


@dataclass(frozen=True, slots=True)
class Ended:
    """How a transaction ended: paths that went back, and bytes that had to be brought for it; or the push."""

    paths: int = 0
    bytes: int = 0
    outcome: "Outcome | None" = None


class Transactions:
    """Begins and ends transactions. Each call blocks on disks and stores."""

    def __init__(self, core: Core, pusher: "Pusher", evictor: "Evictor", reverter: "Reverter") -> None:
        self._core = core
        self._pusher = pusher
        self._evictor = evictor
        self._reverter = reverter

    def begin(self, unit: Unit, notes: str = "") -> Transaction:
        """Push and prove the record as it is now, and let its pushes wait from here on. Raises Refused, UsageError,
        StoreError: then nothing has begun."""
        if len(notes) > NOTES_MOST:
            raise UsageError(f"the notes are longer than {NOTES_MOST:,} characters")
        with unit.moving:
            self._refuse(unit)
            for _try in range(_PASSES):  # what another host did may come with the push
                sequence = self._core.sequence(unit)
                manifest, numbers = self._kept(unit)
                if unit.sequence == sequence:
                    break
            begun = Transaction(unit.uuid, OPEN, notes, time.time_ns(), numbers)
            faults.point("transaction.kept")
            self._core.commit(lambda: self._open(unit, begun, manifest, sequence))
            faults.point("transaction.begun")
        self._core.events.publish(TransactionBegan(unit.uuid, notes))
        return begun

    def _refuse(self, unit: Unit) -> None:
        if (present := self._core.transactions.get(unit.uuid)) is not None:
            raise Refused(f"{unit.uuid}: {why_held(present)}")
        if not self._core.homes:
            raise Refused(
                f"{unit.uuid}: no store is configured, and what it can go back to is kept in one: name one with "
                "--store URL or in the configuration"
            )
        if (live := live_record(self._core, unit)) is not None:
            raise Refused(f"{unit.uuid}: no transaction begun: {live} is live; wait until the run has finished")
        if unit.writers:
            raise Refused(f"{unit.uuid}: no transaction begun: a file of it is open for writing; close it")

    def _kept(self, unit: Unit) -> tuple[Manifest, dict[str, int]]:
        """The record's manifest now, every byte of it proven to be in the homes, and their versions."""
        try:
            proof = self._proven(unit)
        except Refused:
            if not unit.dirty:
                raise
            proof = self._proven(unit)  # another host had changed it: now that is merged
        rows = {row.store: row for row in self._core.journal.homes(unit.uuid)}
        proven = next(rows[store] for store in proof)
        return parse(proven.manifest, unit.uuid), {store: row.generation for store, row in rows.items()}

    def _proven(self, unit: Unit) -> Mapping[str, Any]:
        outcome = self._pusher.push(unit)
        if outcome.unsettled:
            raise Refused(f"{unit.uuid}: no transaction begun: a file of it is being written to; try again")
        if len(outcome.pushed) < self._core.settings.min_copies:
            name, error = outcome.failed[0]
            raise Refused(f"{unit.uuid}: no transaction begun: {name} does not hold what it is now: {error}")
        try:
            return self._evictor.prove(unit, self._core.journal.known(unit.uuid))
        except Refused as error:
            raise Refused(str(error).replace("not evicted", "no transaction begun")) from None

    def _open(self, unit: Unit, begun: Transaction, manifest: Manifest, sequence: int) -> None:
        if unit.writers or unit.sequence != sequence:
            raise Refused(f"{unit.uuid}: no transaction begun: it changed just now; try again")
        self._core.journal.begin_transaction(begun, manifest)
        self._core.transactions[unit.uuid] = begun

    def _held(self, unit: Unit, *states: str) -> Transaction:
        found = self._core.transactions.get(unit.uuid)
        if found is None:
            raise Refused(f"{unit.uuid}: no transaction is open; runfs transaction begin {unit.uuid}")
        if found.state not in states:
            over = "it is committed already" if found.state == COMMITTING else why_held(found)
            raise Refused(f"{unit.uuid}: {over}")
        return found

    def _enter(self, transaction: Transaction, state: str, notes: str) -> Transaction:
        self._core.journal.enter_transaction(transaction.uuid, state, notes)
        changed = self._core.transactions[transaction.uuid] = replace(transaction, state=state, notes=notes)
        return changed

    def commit(self, unit: Unit, notes: str | None = None) -> Ended:
        """Publish all that changed as one version, with the notes. Raises Refused; a store that cannot take it is in
        the outcome: it is committed all the same, and pushed as soon as that works."""
        if notes is not None and len(notes) > NOTES_MOST:
            raise UsageError(f"the notes are longer than {NOTES_MOST:,} characters")
        with unit.moving:
            found = self._held(unit, OPEN, COMMITTING)
            self._core.units.mark_dirty(unit, "a transaction was committed")
            if found.state == OPEN:
                self._enter(found, COMMITTING, found.notes if notes is None else notes)
            faults.point("transaction.committing")
            outcome = self._pusher.push(unit)
            faults.point("transaction.published")
            return Ended(outcome=outcome)

    def rollback(self, unit: Unit) -> Ended:
        """Make files, modes, times and names what they were at the begin. Raises Refused while a file that would go
        back is open for writing, NoReplica, Full: then it is carried on by calling this again."""
        with unit.moving:
            found = self._held(unit, OPEN, ROLLING_BACK)
            before = self._core.journal.before_transaction(unit.uuid)
            if before is None:
                raise RunfsError(f"{unit.uuid}: the journal has lost what the transaction began with")
            if found.state == OPEN and (live := live_record(self._core, unit)) is not None:
                raise Refused(f"{unit.uuid}: not rolled back: {live} is live; end it first")
            planned = self._reverter.plan(unit, before)
            self._reverter.refuse_open(unit, planned)
            for store in found.numbers:
                history.note_replicas(self._core, store, self._published(unit, store) or before)
            self._core.units.mark_dirty(unit, "a transaction was rolled back")
            self._enter(found, ROLLING_BACK, found.notes)
            faults.point("transaction.rolling")
            paths, brought = planned.count, 0
            for _pass in range(_PASSES):
                brought += self._reverter.apply(unit, planned)
                planned = self._reverter.plan(unit, before)
                if not planned.count:
                    break
            else:
                raise Refused(f"{unit.uuid}: not rolled back yet: somebody goes on changing it; end that, and again")
            faults.point("transaction.reverted")
            self._core.journal.end_transaction(unit.uuid)
            self._core.transactions.pop(unit.uuid, None)
        self._core.events.publish(TransactionEnded(unit.uuid, False))
        return Ended(paths, brought)

    def _published(self, unit: Unit, store: str) -> Manifest | None:
        row = self._core.journal.home(unit.uuid, store)
        return parse(row.manifest, unit.uuid) if row is not None else None

    def resume(self, unit: Unit) -> bool:
        """Go on with a rollback that was interrupted; False where there is none."""
        found = self._core.transactions.get(unit.uuid)
        if found is None or found.state != ROLLING_BACK:
            return False
        self.rollback(unit)
        log.warning("%s: an interrupted rollback was finished", unit.uuid)
        return True


def shown(core: Core) -> list[dict[str, Any]]:
    """Every transaction that is not over, for `status`."""
    return [
        {"uuid": each.uuid, "state": each.state, "notes": each.notes, "since": each.began_ns / 1e9}
        for each in core.transactions.values()
    ]


def resume_all(core: Core, transactions: Transactions) -> list[str]:
    """Go on with every interrupted rollback; a sentence for each that cannot be finished now."""
    said = []
    for uuid, each in list(core.transactions.items()):
        if each.state == ROLLING_BACK:
            try:
                transactions.resume(core.units.get(uuid))
            except (RunfsError, OSError) as error:
                said.append(f"{uuid}: a rollback is not finished: {in_words(error)}")
    return said
