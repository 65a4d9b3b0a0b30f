"""Whether a unit is being written: by a live run of it, or of one nested in it. Used by push, evict and the version
commands. Reads the index and the markers in the record's directory, wherever that is; never a store."""

import os
import time
from contextlib import suppress

from vfs.core import Core
from vfs.errors import DamagedRecord
from vfs.format import is_live
from vfs.units import Unit


def records_in(core: Core, unit: Unit) -> list[tuple[str, bytes]]:
    """The records of a unit with their paths in it; its root record first, with b""."""
    records = [(unit.uuid, b"")]
    root = core.index.get(unit.uuid)
    for nested in core.index.nested(unit.uuid) if root else ():
        with suppress(DamagedRecord):
            assert root is not None
            records.append((nested.uuid, core.units.relative(root, nested)))
    return records


def live_record(core: Core, unit: Unit) -> str | None:
    """The uuid of the unit or a nested record whose run is live. Raises DamagedRecord, OSError."""
    for uuid, path in records_in(core, unit):
        if is_live(os.path.join(unit.base, path) if path else unit.base, time.time()):
            return uuid
    return None
