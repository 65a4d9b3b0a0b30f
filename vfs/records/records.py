"""Records in stores: what machinable asks of a storage, on any store, with no mount and no index.

Used as a library (`Records([open_store(url)])`), by `runfs records ...`, and through that by the machinable `Storage`
in `vfs/machinable_storage.py`. Every call blocks on the stores (each request within its deadline) and the local disk.
Thread-safe; a second process or host may do the same at the same time, also the daemon: the form is that of
`vfs/wire.py`, with the manifest as the one commit point.

The unit is a root record with everything nested in it (its executions): committing a nested record commits the whole,
and a nested uuid can be asked for wherever a uuid is taken. With several stores, what is written goes to each that
takes writes, and what is read comes from the first that gives it right.
"""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from vfs import wire
from vfs.errors import DamagedRecord, Full, NoReplica, Refused, RunfsError, StoreError, UnknownRecord, UsageError
from vfs.format import HEADER
from vfs.records import retrieve
from vfs.records.local import Finder, checked, finder, read, related, uuids_in
from vfs.records.stored import Entry, Located, commit_to, delete_from, entry, header, is_for_reading, locate
from vfs.stores.protocol import Store
from vfs.wire import Kept, Plain

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Committed:
    """What a commit did: for each store the files and bytes that were uploaded (0 and 0: it had everything), and under
    which second names another host's versions are kept. `unsettled`: paths that were being written to; their last whole
    content is in the store, so commit again when the run has ended."""

    uuid: str
    stores: Mapping[str, tuple[int, int]]
    clashes: tuple[tuple[bytes, bytes], ...] = ()
    unsettled: tuple[bytes, ...] = ()


@dataclass(slots=True)
class Transferred:
    """Records that were brought or committed, in order, and those that could not be, with the reason."""

    done: list[str] = field(default_factory=list)
    directories: list[Path] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


class Records:
    """machinable's storage verbs on stores. `stores`: one or several; each keeps a whole copy."""

    def __init__(self, stores: Store | Iterable[Store]) -> None:
        opened = [stores] if isinstance(stores, Store) else list(stores)
        self._kept: list[Kept] = [Plain(store) for store in opened]
        self.damaged: list[tuple[str, str]] = []  # what `walk` and `search` had to leave out: object, reason

    # --- who and where -----------------------------------------------------------------------------------------

    @property
    def id(self) -> str:
        """The names of the stores, as one word."""
        return "+".join(kept.name for kept in self._kept) or "none"

    def root(self) -> str:
        """The URL of the first store. Raises Refused when there is none."""
        return self._all()[0].store().url

    def home_uri(self, uuid: str) -> str:
        """Where a record belongs: its place in the first store, as a URL. Raises UsageError, Refused."""
        parts = urlsplit(self.root())
        return parts._replace(path=f"{parts.path.rstrip('/')}/{checked(uuid)}").geturl()

    def _all(self) -> list[Kept]:
        if not self._kept:
            raise Refused("no store is configured: name one with --store URL, or in the configuration")
        return self._kept

    def _writable(self) -> list[Kept]:
        able = [kept for kept in self._all() if not is_for_reading(kept.store())]
        if not able:
            raise Refused(f"{self.id}: no store takes writes; name one that does with --store URL")
        return able

    # --- in --------------------------------------------------------------------------------------------------------

    def commit(self, directory: str | os.PathLike[str]) -> Committed:
        """Bring a record's directory, or the record around a nested one, to every store that takes writes.

        Files that a store has and the directory has not stay in the store; a file that both have is taken from here,
        and what was there is kept as an earlier version. Raises DamagedRecord (no record), Refused (an evicted record,
        no store), StoreError after all stores were tried, OSError.
        """
        stores = self._writable()
        local = read(directory)
        done: dict[str, tuple[int, int]] = {}
        clashes: tuple[tuple[bytes, bytes], ...] = ()
        errors: dict[str, RunfsError] = {}
        for kept in stores:
            try:
                files, size, found = commit_to(kept, local)
            except RunfsError as error:
                errors[kept.name] = error
                continue
            done[kept.name] = (files, size)
            clashes += found
        if errors:
            raise _together(f"{local.uuid} is not committed to", errors)
        return Committed(local.uuid, done, clashes, local.unsettled)

    update = commit

    def push(self, directory: str | os.PathLike[str], uuid: str) -> str:
        """Commit a directory that holds record `uuid`, or lies in it; its place in the first store. Raises as `commit`;
        UsageError when the directory holds another record."""
        own = uuids_in(Path(directory))
        if checked(uuid) not in own:
            raise DamagedRecord(f"{os.fspath(directory)} holds {', '.join(own) or 'no record'}, not {uuid}")
        return self.home_uri(self.commit(directory).uuid)

    def upload(self, directory: str | os.PathLike[str], related_: int = 1, find: Finder | None = None) -> Transferred:
        """Commit a record and those it is related to: 0 none, 1 those its edges name, 2 theirs too, and so on.

        `find(uuid)` tells where a related record is (default: it is looked for beside the record, in the directory
        that holds its identity's); one that is nowhere here is named in `failed`. Raises as `commit` for the record
        itself.
        """
        result = Transferred()
        find = find or finder([Path(directory).absolute().parent.parent])
        waiting = [(Path(directory), 0)]
        seen: set[str] = set()
        while waiting:
            place, depth = waiting.pop(0)
            try:
                done = self.commit(place)
            except RunfsError as error:
                if depth == 0:
                    raise
                result.failed[str(place)] = str(error)
                continue
            result.done.append(done.uuid)
            result.directories.append(place)
            seen.add(done.uuid)
            if (depth >= 1 and related_ < 2) or related_ < 1:
                continue
            for uuid in related(place):
                if uuid not in seen:
                    seen.add(uuid)
                    _go_to(uuid, find(uuid), depth, waiting, result)
        return result

    # --- out -------------------------------------------------------------------------------------------------------

    def contains(self, uuid: str, root: str | None = None) -> bool:
        """Whether a store has a record. `root`: the uuid of the record that it is nested in, where that is known: else
        a nested one is looked for in every manifest. Raises StoreError when one could not be asked and none has it."""
        return self._first(lambda kept: locate(kept, checked(uuid), root)) is not None

    def retrieve(self, uuid: str, directory: str | os.PathLike[str], root: str | None = None) -> bool:
        """Make a directory hold a record, whole and checked; False when no store has it. See `retrieve.retrieve` for a
        directory that is there already. Raises Refused, Full; NoReplica when the stores that have it fail."""
        return self.fetch(uuid, directory, root) is not None

    def fetch(self, uuid: str, directory: str | os.PathLike[str], root: str | None = None) -> str | None:
        """As `retrieve`; the name of the store that gave it."""
        errors: dict[str, RunfsError] = {}
        for kept in self._all():
            try:
                found = locate(kept, checked(uuid), root)
                if found is not None:
                    retrieve.retrieve(kept, found.manifest, directory, found.within)
                    return kept.name
            except (Refused, Full, UsageError):
                raise  # about this machine: another store would not help
            except RunfsError as error:
                log.warning("%s: %s: %s", uuid, kept.name, error)
                errors[kept.name] = error
        if errors:
            raise NoReplica(f"{uuid} cannot be retrieved: {_words(errors)}")
        return None

    def pull(self, uuid: str, into: str | os.PathLike[str]) -> Path | None:
        """Retrieve a record; the directory, None when no store has it. Raises as `retrieve`."""
        return Path(os.path.abspath(into)) if self.retrieve(uuid, into) else None

    def ensure_materialized(self, uuid: str, directory: str | os.PathLike[str]) -> Path:
        """The directory with the record in it, brought only if it is not there. Raises UnknownRecord when no store has
        it, else as `retrieve`."""
        if uuid not in uuids_in(Path(directory)) and not self.retrieve(uuid, directory):
            raise UnknownRecord(f"{uuid} is in none of {self.id}")
        return Path(directory)

    def download(self, uuid: str, destination: str | os.PathLike[str], related_: int = 1) -> Transferred:
        """Retrieve a record into `destination`/<uuid>, and those it is related to (0, 1 or 2, as for `upload`) beside
        it. One that cannot be had is named in `failed`. Raises as `retrieve` for the record itself; UnknownRecord when
        no store has it."""
        result = Transferred()
        waiting, seen = [(checked(uuid), 0)], {uuid}
        while waiting:
            at, depth = waiting.pop(0)
            target = Path(destination) / at
            try:
                self._bring(at, target)
            except RunfsError as error:
                if depth == 0:
                    raise
                result.failed[at] = str(error)
                continue
            result.done.append(at)
            result.directories.append(target)
            if related_ >= 1 and (depth == 0 or related_ >= 2):
                fresh = [each for each in related(target) if each not in seen]
                seen.update(fresh)
                waiting += [(each, depth + 1) for each in fresh]
        return result

    def _bring(self, uuid: str, directory: Path) -> None:
        """Retrieve, or raise UnknownRecord."""
        if not self.retrieve(uuid, directory):
            raise UnknownRecord(f"{uuid} is in none of {self.id}; `runfs records walk` lists what is there")

    # --- what is there -----------------------------------------------------------------------------------------------

    def walk(self) -> Iterator[Entry]:
        """Every root record in the stores, each once; those without a manifest too. What cannot be used is in
        `damaged`. Raises StoreError when a listing fails."""
        seen: set[str] = set()
        for kept in self._all():
            store = kept.store()
            if not store.info().lists:
                continue
            for found in wire.manifests(store, lambda key, reason: self.damaged.append((key, reason))):
                if found.manifest.uuid not in seen:
                    seen.add(found.manifest.uuid)
                    yield entry(kept, found.manifest)
            for uuid, stats in wire.plain_records(store).items():
                if uuid not in seen:
                    seen.add(uuid)
                    yield Entry(uuid, kept.name, len(stats), sum(stat.size for stat in stats), True)

    def search(self, identity_key: str, predicate_key: str | None = None) -> list[str]:
        """The uuids of records with these keys, nested ones too, the newest first."""
        found: dict[str, int] = {}
        for each in self.walk():
            for row in each.rows or self._plain_rows(each):
                same = predicate_key is None or row.get("predicate_key") == predicate_key
                if row.get("identity_key") == identity_key and same:
                    found.setdefault(str(row.get("record_id")), int(row.get("created_at_ns") or 0))
        return sorted(found, key=lambda uuid: (-found[uuid], uuid))

    def _plain_rows(self, plain: Entry) -> tuple[Mapping[str, Any], ...]:
        """What the header of a record says that has no rows in a store."""
        kept = next(each for each in self._kept if each.name == plain.store)
        try:
            found = header(kept, plain.uuid)
        except (StoreError, DamagedRecord) as error:
            self.damaged.append((f"{plain.uuid}/{HEADER}", str(error)))
            return ()
        keys = {"identity_key": found.identity_key, "predicate_key": found.predicate_key}
        return ({"record_id": found.uuid, **keys},)

    def _first(self, ask: Callable[[Kept], Located | None]) -> Located | None:
        errors: dict[str, RunfsError] = {}
        for kept in self._all():
            try:
                found = ask(kept)
            except RunfsError as error:
                errors[kept.name] = error
                continue
            if found is not None:
                return found
        if errors:
            raise _together("not known: could not ask", errors)
        return None

    # --- away --------------------------------------------------------------------------------------------------------

    def delete(self, uuid: str) -> bool:
        """Remove a root record, its earlier versions too, from every store that takes writes; False when none had it.

        The manifest goes first, so that nobody sees half a record; what a crash leaves is removed by the next call.
        No other record is touched. Raises Refused for a nested record; StoreError.
        """
        gone = False
        for kept in self._writable():
            found = locate(kept, checked(uuid), None)
            if found is not None and found.within:
                raise Refused(f"{uuid} is nested in {found.manifest.uuid}, which is one thing in a store; delete that")
            gone |= delete_from(kept, uuid)
        return gone


def _go_to(uuid: str, place: Path | None, depth: int, waiting: list[tuple[Path, int]], result: Transferred) -> None:
    if place is None:
        result.failed[uuid] = "it is related, but not on this machine"
    else:
        waiting.append((place, depth + 1))


def _words(errors: Mapping[str, RunfsError]) -> str:
    """Why each of several stores could not."""
    return "; ".join(f"{name}: {error}" for name, error in errors.items())


def _together(what: str, errors: Mapping[str, RunfsError]) -> RunfsError:
    """One error for those of several stores: of their class when they agree."""
    kinds = {type(error) for error in errors.values()}
    kind = kinds.pop() if len(kinds) == 1 else StoreError
    return kind(f"{what} {_words(errors)}")


def fetch(stores: Iterable[Store], uuid: str, directory: str | os.PathLike[str]) -> bool:
    """Retrieve a record from whichever store has it. Raises as `Records.retrieve`."""
    return Records(stores).retrieve(uuid, directory)
