"""Whose record it is: a mark in each manifest of the hosts and projects that have published it, and where they have it.

Used by push, which leaves the mark; `vfs/claims.py` reads it. Touches the local disk only.
"""

import functools
import os
import socket
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from blake3 import blake3

from vfs.core import Core
from vfs.manifest import Manifest, Owner
from vfs.units import Unit

_MOST = 8  # owners in a manifest, the latest first


@functools.cache
def this_host() -> str:
    """A name of this machine that tells nothing of it."""
    try:
        machine = Path("/etc/machine-id").read_bytes()
    except OSError:
        machine = b""
    return blake3(machine + b"\0" + os.fsencode(socket.gethostname())).hexdigest(8)


def own(core: Core, unit: Unit) -> Owner:
    """The mark of this project for a unit."""
    return Owner(this_host(), os.fsencode(core.settings.project_dir), unit.directory)


def joined(first: Owner | None, *others: Iterable[Owner]) -> tuple[Owner, ...]:
    """Owners without repetition, `first` first."""
    found = [first] if first is not None else []
    for owner in (each for group in others for each in group):
        if all((owner.host, owner.project) != (each.host, each.project) for each in found):
            found.append(owner)
    return tuple(found[:_MOST])


def marked(core: Core, unit: Unit, ours: Manifest, previous: Manifest | None) -> Manifest:
    """A manifest with our mark beside those that the one before it has."""
    return replace(ours, owners=joined(own(core, unit), previous.owners if previous else ()))
