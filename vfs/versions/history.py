"""What is known here of a record's versions: the journal's part of it, and bringing it up to date from a store.

Used by the version commands, by pruning and by `/.versions` in the mount. `learn` and `manifest_of` ask stores; the
rest asks the journal only."""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vfs.core import Core, Home
from vfs.errors import ManifestError, NotFound, Refused, RunfsError, UsageError
from vfs.journal import Replica
from vfs.manifest import Manifest, parse
from vfs.versions import kept as versions
from vfs.wire import their_manifest

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class History:
    """The versions that a store has of a record. `earlier`: number -> when it was published (ns); `damaged`: number ->
    why it cannot be read. Manifests are loaded one by one: a hundred of a large record would fill the memory."""

    store: str
    present: Manifest
    earlier: Mapping[int, int]
    damaged: Mapping[int, str]
    load_earlier: Callable[[int], Manifest]

    def load(self, number: int) -> Manifest:
        """One version's manifest. Raises NotFound, ManifestError, StoreError."""
        return self.present if number == self.present.generation else self.load_earlier(number)

    def all(self) -> Iterator[Manifest]:
        """Every version that can be read, oldest first."""
        for number in sorted({*self.earlier, self.present.generation}):
            yield self.load(number)


def learn(core: Core, home: Home, uuid: str) -> History | None:
    """Ask a store for its versions of a record and remember them; None when it has no manifest of it. Raises
    StoreError, ManifestError when the present one is damaged."""
    present = their_manifest(home, uuid)
    if present is None:
        return None
    known = {row.number: row.at_ns for row in core.journal.versions(uuid, home.name)}
    there = set(known)
    if home.store().info().lists:
        there = set(versions.numbers(home, uuid))
        core.journal.forget_versions(uuid, home.name, known.keys() - there)
    earlier: dict[int, int] = {}
    damaged: dict[int, str] = {}
    for number in sorted(there - {present.generation}):
        try:
            if number not in known:
                found = versions.read(home, uuid, number)
                remember(core, home, found)
                known[number] = found.published_ns
            earlier[number] = known[number]
        except (ManifestError, NotFound) as error:
            damaged[number] = str(error)

    def load(number: int) -> Manifest:
        return core.journal.version(uuid, home.name, number) or versions.read(home, uuid, number)

    return History(home.name, present, earlier, damaged, load)


def remember(core: Core, home: Home, manifest: Manifest) -> None:
    """Take a version of another host into the journal: what its contents are, and where they are."""
    core.journal.add_contents(manifest.contents.values())
    note_replicas(core, home.name, manifest)
    core.journal.add_version(home.name, manifest)


def note_replicas(core: Core, store: str, manifest: Manifest) -> None:
    """Where a version's contents are; what is known better than by its word stays."""
    have = core.journal.replicas_of(manifest.uuid, store)
    core.journal.set_replicas(
        Replica(file.digest, store, manifest.uuid, file.key, 0, "")
        for file in manifest.files
        if file.kind == "file" and file.digest not in have
    )


def known_numbers(core: Core, uuid: str) -> dict[int, tuple[str, int]]:
    """The versions that can be looked at without asking a store: number -> store and when it was published (ns). The
    first configured store goes first where several have one of this number."""
    found: dict[int, tuple[str, int]] = {}
    for home in core.homes:
        for row in core.journal.versions(uuid, home.name):
            if row.here:
                found.setdefault(row.number, (home.name, row.at_ns))
        present = core.journal.generations(uuid, home.name)
        if present is not None:
            found.setdefault(present[0], (home.name, present[1]))
    return found


def known_manifest(core: Core, uuid: str, number: int, store: str) -> Manifest | None:
    """A version from the journal alone."""
    present = core.journal.home(uuid, store)
    if present is not None and present.generation == number:
        return parse(present.manifest, uuid)
    return core.journal.version(uuid, store, number)


def manifest_of(core: Core, uuid: str, number: int, store: str | None = None) -> tuple[Manifest, Home]:
    """A version wherever it is, from the first store that has it. Raises UsageError, Refused naming those that are
    away."""
    away: list[str] = []
    for home in core.homes if store is None else [core.home(store)]:
        found = known_manifest(core, uuid, number, home.name)
        try:
            if found is None:
                history = learn(core, home, uuid)
                there = history is not None and (number in history.earlier or number == history.present.generation)
                found = history.load(number) if history is not None and there else None
        except RunfsError as error:
            away.append(f"{home.name}: {error}")
            continue
        if found is not None:
            note_replicas(core, home.name, found)
            return found, home
    if away:
        raise Refused(f"{uuid}: version {number} is not known here, and {'; '.join(away)}")
    raise UsageError(f"{uuid} has no version {number}; `runfs versions {uuid}` lists those it has")


def remembered(core: Core, store: str, uuid: str) -> list[dict[str, Any]]:
    """The same as `shown` from the journal alone, as far as it knows."""
    rows = core.journal.versions(uuid, store)
    out: list[dict[str, Any]] = [
        {
            "number": row.number,
            "at": row.at_ns / 1e9 or None,
            "files": row.files,
            "bytes": row.bytes,
            "changed_bytes": None,
            "notes": row.notes,
            "store": store,
            "present": False,
            "interim": False,
        }
        for row in rows
    ]
    home = core.journal.home(uuid, store)
    if home is not None:
        alone = History(store, parse(home.manifest, uuid), {}, {}, lambda _number: parse(home.manifest, uuid))
        out += [{**each, "changed_bytes": None} for each in shown(alone)]
    return out


def shown(history: History) -> list[dict[str, Any]]:
    """Each version for people and scripts, newest first. `changed_bytes`: of contents the one before did not have."""
    out: list[dict[str, Any]] = []
    had: set[bytes] = set()
    for manifest in history.all():
        sizes = {file.digest: file.size for file in manifest.files if file.kind == "file"}
        out.append(
            {
                "number": manifest.generation,
                "at": manifest.published_ns / 1e9 or None,
                "files": sum(file.kind == "file" for file in manifest.files),
                "bytes": manifest.size,
                "changed_bytes": sum(size for digest, size in sizes.items() if digest not in had),
                "notes": manifest.notes,
                "store": history.store,
                "present": manifest.generation == history.present.generation,
                "interim": manifest.interim,
            }
        )
        had = set(sizes)
    for number, reason in history.damaged.items():
        out.append({"number": number, "store": history.store, "present": False, "error": reason})
    return sorted(out, key=lambda each: -int(each["number"]))
