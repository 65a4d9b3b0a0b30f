"""Whether another host has published a newer manifest of a record. Used by the daemon for records in use.

Blocks on the homes: one `stat` each within its deadline, and a `read` where that says something new.
"""

import time
from dataclasses import replace

from vfs.core import Core, Home
from vfs.errors import NotFound, RunfsError
from vfs.units import Unit
from vfs.wire import manifest_key


def notice(core: Core, unit: Unit) -> bool:
    """Look for a newer manifest in each healthy home; True, and the unit is dirty, where there is one: its next push
    merges. What was looked at within `notice_s` seconds is not looked at again. A store that cannot be asked is left
    for later."""
    if unit.uuid in core.transactions:
        return False  # its pushes wait
    found = [home for home in core.homes if home.healthy and _is_newer(core, unit, home)]
    for home in found:
        core.journal.doubt_home(unit.uuid, home.name)
        core.units.mark_dirty(unit, f"another host changed it in {home.name}")
    return bool(found)


def _is_newer(core: Core, unit: Unit, home: Home) -> bool:
    row = core.journal.home(unit.uuid, home.name)
    if row is None or not row.version or time.time_ns() - row.proven_ns < core.settings.notice_s * 1e9:
        return False  # not there, to be merged already, or looked at just now
    store, key = home.store(), manifest_key(unit.uuid)
    try:
        with home.watched():
            version = store.stat(key).version or ""
            if version == row.version and store.info().exact_versions:
                return False
            body = store.read(key)
    except NotFound:
        return False  # an eviction, or a scrub, looks at what else it has lost
    except RunfsError:
        return False
    if body != row.manifest:
        return True
    core.journal.set_home(replace(row, version=version))
    return False
