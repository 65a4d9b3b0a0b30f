"""One open index with everything around it: what the daemon serves and what commands run in without one.

`Session.open` blocks on local disks; `run` blocks as long as its command does, so the daemon calls it in worker
threads. Results are dicts that JSON can hold: the command line renders them, scripts read them.
"""

import logging
import os
import resource
import threading
from collections.abc import Callable
from typing import Any, Protocol

from vfs import actions, doctor, imports, reindexing, report
from vfs.core import Core, nature_of
from vfs.errors import ConfigError, UsageError
from vfs.evict import Evictor
from vfs.hydrate import Hydrator
from vfs.index import Index
from vfs.journal import Journal
from vfs.private import private_directory, private_files
from vfs.push import Pusher
from vfs.reserve import Reserve
from vfs.serving import Claim
from vfs.settings import Settings
from vfs.stores import validate
from vfs.trust import conflicts, moved, verifying
from vfs.units import point
from vfs.versions import actions as version_actions
from vfs.versions.reverting import Reverter
from vfs.versions.transactions import Transactions

log = logging.getLogger(__name__)
_TELL_S = 1.0


class Progress(Protocol):
    """What a running command tells; `cancelled` when nobody listens any more."""

    @property
    def cancelled(self) -> bool: ...

    def __call__(self, event: dict[str, Any], /) -> None: ...


class Session:
    """The parts of runfs around one index. Close it, or use `contextlib.closing`."""

    def __init__(self, settings: Settings, index: Index, journal: Journal) -> None:
        self.settings = settings
        self.core = Core(settings, index, journal)
        self.hydrator = Hydrator(self.core)
        self.pusher = Pusher(self.core, self.hydrator)
        self.evictor = Evictor(self.core, self.pusher, self.hydrator)
        self.reverter = Reverter(self.core, self.pusher, self.hydrator)
        self.transactions = Transactions(self.core, self.pusher, self.evictor, self.reverter)
        self.warnings: list[str] = []
        self.waiting: Callable[[], list[dict[str, Any]]] = list  # the daemon knows who waits
        self.passthrough: Callable[[], str] = lambda: "off: not mounted"  # the daemon knows
        self.kept: Callable[[], dict[str, int]] = dict  # inodes, lookups and handles: the daemon knows
        self.stopping = threading.Event()
        self._claim: Claim | None = None
        self.reserve = Reserve(settings.state)

    @classmethod
    def open(cls, settings: Settings, *, role: str = "command") -> "Session":
        """Open an index and runfs's state of it, and finish what a crash interrupted.

        Raises ConfigError for a store that cannot be (a mount with it would only fail later; nothing is asked yet),
        IndexUnavailable, JournalLocked (another process serves this index), JournalError. ConfigError also where state
        or cache are not this user's alone.
        """
        _enough_homes(settings)
        warnings = [
            sentence
            for store in (settings.stores if role == "daemon" else ())
            for sentence in validate(store.url, store.name, store.options)
        ]
        index = Index.open(settings.index, create=settings.create_index)
        try:
            private_directory(settings.state, "RUNFS_STATE_DIR")
            private_directory(settings.cache_place, "RUNFS_CACHE_DIR, or cache.directory")
            private_files(settings.state)
            journal = Journal(settings.state)
        except BaseException:
            index.close()
            raise
        journal.holder(f"process {os.getpid()} ({role}{f' of {settings.mountpoint}' if settings.mountpoint else ''})")
        try:
            claim = Claim(settings.index.parent)
        except BaseException:
            journal.close()
            index.close()
            raise
        _raise_descriptors()
        session = cls(settings, index, journal)
        session._claim = claim
        session.warnings += warnings
        try:
            with session.reserve.released():
                session._start(role)
        except BaseException:
            session.close()
            raise
        return session

    def _start(self, role: str) -> None:
        if self.settings.mountpoint is not None:
            if self.core.journal.note("mountpoint") != str(self.settings.mountpoint):  # a full disk takes no write
                self.core.journal.set_note("mountpoint", str(self.settings.mountpoint))
            if not self.settings.read_only:
                point(self.core.link, os.fsencode(self.settings.mountpoint))
        for sentence in self.evictor.recover():
            log.warning("%s", sentence)
            if role == "daemon":
                self.warnings.append(sentence)
        moved.remember(self.core.journal, self.settings.index)
        self.warnings += [*self.core.units.load_dirty(), *self._out_of_reach(), *moved.warnings(self.settings)]
        self.put_rows_back()

    def _out_of_reach(self) -> list[str]:
        """What evicted records need and is not configured: nobody should learn it from a failed read."""
        found = self.core.journal.without_home(home.name for home in self.core.stores)
        if not found:
            return []
        count = f"{len(found)} evicted records are" if len(found) > 1 else f"the evicted record {found[0][0]} is"
        names = sorted({store for _uuid, store in found})
        return [
            f"{count} only in {' or '.join(names)}, which is not configured: what is not in the cache cannot be read. "
            f"Mount with --store {names[0]}=URL, or add [stores.{names[0]}] to the configuration"
        ]

    def put_rows_back(self) -> list[str]:
        """Give evicted records back to an index that machinable dropped and rebuilt; the uuids put back."""
        return reindexing.put_rows_back(self.core)

    def close(self) -> None:
        """Stop what runs and let go of everything. What was not pushed stays in the journal."""
        self.stopping.set()
        self.hydrator.close()
        self.pusher.close()
        self.evictor.close()
        self.core.close()
        if self._claim is not None:
            self._claim.release()

    def run(self, command: str, args: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """Run one command of `COMMANDS`. Raises RunfsError; UsageError for an unknown command."""
        call = COMMANDS.get(command)
        if call is None:
            raise UsageError(f"no command {command!r}; there are {', '.join(sorted(COMMANDS))}")
        over = threading.Event()
        ticker = threading.Thread(target=self._tell_moves, args=(progress, over), name="progress", daemon=True)
        ticker.start()
        try:
            return call(self, args, progress)
        finally:
            over.set()
            ticker.join()

    def _tell_moves(self, progress: Progress, over: threading.Event) -> None:
        """While a command works, tell every second what is being moved, and of what was told that it is over."""
        told: dict[int, dict[str, Any]] = {}
        while not over.wait(_TELL_S):
            now = self.core.moves.now()
            for number in [number for number in told if number not in now]:
                progress({**told.pop(number), "over": True})
            told |= now
            for move in now.values():
                progress(move)


Command = Callable[[Session, dict[str, Any], Progress], dict[str, Any]]

COMMANDS: dict[str, Command] = {
    "status": report.status,
    "ls": report.ls,
    "safe": report.safe,
    "receipts": report.receipts,
    "evict": actions.evict,
    "hydrate": actions.hydrate,
    "pin": actions.pin,
    "unpin": actions.unpin,
    "push": actions.push,
    "verify": verifying.verify,
    "conflicts": conflicts.conflicts,
    "reindex": reindexing.reindex,
    "import": imports.import_,
    "stores": doctor.stores,
    "doctor": doctor.doctor,
    "versions": version_actions.versions,
    "versions restore": version_actions.restore,
    "versions prune": version_actions.prune,
    "transaction": version_actions.transaction,
}


def _enough_homes(settings: Settings) -> None:
    """What is read-only or calculated is no copy: `min_copies` must be possible with the others."""
    homes = [store.name for store in settings.stores if not nature_of(store).read_only]
    if homes and settings.min_copies > len(homes):
        raise ConfigError(
            f"min_copies is {settings.min_copies} but only {len(homes)} of the stores can be pushed to "
            f"({', '.join(homes)}): add a store that can be written to, or lower min_copies"
        )


def _raise_descriptors() -> None:
    """Allow as many open files as the system lets us: leases and handles take one each."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
