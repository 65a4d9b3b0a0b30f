"""Paths in quarantine and pushes: a path that got another name because its bytes are damaged was not removed by
anybody, so what is published goes on saying where it should be. Used by push."""

from dataclasses import replace

from vfs.core import Core
from vfs.journal import Known
from vfs.manifest import File, parse
from vfs.scan import Scan
from vfs.units import Unit


def with_quarantined(core: Core, unit: Unit, found: Scan) -> tuple[Scan, frozenset[bytes]]:
    """What a scan found, with the paths in quarantine as they were published, and the digests that no home is to be
    given. A path that somebody has made again is out of quarantine."""
    rows = core.journal.quarantined(unit.uuid)
    if not rows:
        return found, frozenset()
    here = {file.path: file for file in found.files}
    added: list[Known] = []
    for row in rows:
        present = here.get(row.path)
        here_again = row.kept and not unit.evicted  # of an evicted record its placeholder is there all the time
        if present is not None and (here_again or present.digest != row.digest):
            core.journal.release(unit.uuid, row.path)
            if present.digest == row.digest:  # somebody has brought it: the homes get it again
                for home in core.homes:
                    core.journal.forget_replica(row.digest, home.name, unit.uuid)
                    core.journal.doubt_home(unit.uuid, home.name)
        elif present is None and row.kept:
            file = _published(core, unit, row.path)
            if file is not None:
                added.append(Known(replace(file, same=b""), 0, 0))
        elif present is None:
            core.journal.release(unit.uuid, row.path)  # removed for good, by somebody who may
    known = tuple(sorted((*found.known, *added), key=lambda item: item.file.path))
    held = frozenset(row.digest for row in core.journal.quarantined(unit.uuid))
    return replace(found, known=known), held


def _published(core: Core, unit: Unit, path: bytes) -> File | None:
    for row in core.journal.homes(unit.uuid):
        file = parse(row.manifest, unit.uuid).by_path().get(path)
        if file is not None:
            return file
    return None
