"""The command `verify`: what the homes hold, by their sizes or, with `deep`, byte by byte on both sides.

`(session, args, progress) -> result`, run in a worker thread of the daemon or in the command line's process.
"""

import os
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from vfs.actions import each_of, named_units
from vfs.core import Home, manifest_key
from vfs.errors import ManifestError, NotFound, RunfsError, StoreError
from vfs.manifest import Manifest, parse
from vfs.trust.journal import Fault
from vfs.trust.scrub import QUARANTINED, REPAIRED, Scrubber, name_of
from vfs.units import Unit

if TYPE_CHECKING:
    from vfs.session import Progress, Session


def verify(session: "Session", args: dict[str, Any], progress: "Progress") -> dict[str, Any]:
    """Check that the homes hold what was pushed: manifests and sizes. With `deep` every byte, also of what is here;
    with `repair` what is wrong is made right from a place that has it right. `rate`: bytes read a second at most."""
    if args.get("deep") or args.get("repair"):
        return _deep(session, args, progress)
    bad: list[dict[str, Any]] = []
    totals = {"checked": 0, "bytes": 0}

    def one(unit: Unit) -> None:
        for home in session.core.homes:
            row = session.core.journal.home(unit.uuid, home.name)
            if row is None:
                bad.append({"uuid": unit.uuid, "path": "", "store": home.name, "reason": "it was not pushed there yet"})
                continue
            for path, reason in _check(session, unit, home, parse(row.manifest), totals):
                bad.append({"uuid": unit.uuid, "path": path, "store": home.name, "reason": reason})
        progress({"what": "verify", "uuid": unit.uuid, "done": totals["checked"]})

    each_of(named_units(session, args), one, progress)
    return {**totals, "bad": bad, "exit": int(bool(bad))}


def _check(
    session: "Session", unit: Unit, home: Home, manifest: Manifest, totals: dict[str, int]
) -> Iterator[tuple[str, str]]:
    try:
        published = home.store().read(manifest_key(unit.uuid))
        if parse(published, unit.uuid).generation != manifest.generation:
            yield "", "another host published a newer version; runfs push merges it"
    except (StoreError, ManifestError) as error:
        yield "", str(error)
    replicas = session.core.journal.replicas_of(unit.uuid, home.name)
    for digest, file in {file.digest: file for file in manifest.files if file.kind == "file"}.items():
        totals["checked"] += 1
        totals["bytes"] += file.size
        replica = replicas.get(digest)
        try:
            if replica is None or session.core.content(digest) is None:
                yield os.fsdecode(file.path), "the journal does not know its copy; runfs push"
            elif home.store().stat(replica.key).size != file.size:
                yield os.fsdecode(file.path), "its copy has another size; runfs verify --repair mends it"
        except NotFound:
            yield os.fsdecode(file.path), f"its copy {file.key} is gone; runfs verify --repair {unit.uuid} mends it"
        except RunfsError as error:
            yield os.fsdecode(file.path), str(error)


def _deep(session: "Session", args: dict[str, Any], progress: "Progress") -> dict[str, Any]:
    repair = bool(args.get("repair")) and not args.get("dry_run")
    units = sorted(named_units(session, args), key=lambda unit: unit.uuid)
    rate = float(args["rate"]) if args.get("rate") else None
    scrubber = Scrubber(session, progress, units, repair=repair, rate=rate)
    what = name_of(args.get("uuids") or (), repair=repair)
    before = None if args.get("restart") else session.core.journal.scrub(what)
    began_ns = before.began_ns if before else time.time_ns()
    found = scrubber.run(what, restart=bool(args.get("restart")))
    bad = [_shown(fault) for fault in found]
    resumed = before is not None and scrubber.state.began_ns == began_ns
    left = [fault for fault in found if fault.outcome != REPAIRED]
    return {
        "checked": scrubber.state.checked,
        "bytes": scrubber.state.bytes,
        "bad": bad,
        "repaired": sum(fault.outcome == REPAIRED for fault in found),
        "quarantined": sum(fault.outcome == QUARANTINED for fault in found),
        "repair": repair,
        "resumed": began_ns / 1e9 if resumed else None,
        "stopped": scrubber.stopped,
        "exit": int(bool(left) or scrubber.stopped),
    }


def _shown(fault: Fault) -> dict[str, Any]:
    return {
        "uuid": fault.uuid,
        "path": os.fsdecode(fault.path),
        "store": fault.store,
        "reason": fault.reason,
        "outcome": fault.outcome or None,
    }
