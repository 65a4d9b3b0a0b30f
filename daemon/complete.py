"""What the shell offers when somebody presses Tab: uuids from the index, mountpoints of running daemons.

Used by the command line's parameters. Reads the index of the current directory or of the mount that is named; never a
store. A failure offers nothing: a message would be written into the line somebody is typing.
"""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from daemon import mounts
from vfs import places

LIMIT = 200  # offers; more help nobody, and each costs the shell time
BUSY_S = 0.2  # a shell does not wait for a locked index


def uuids(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """Uuids that start with what is typed, each with its kind and label."""
    with contextlib.suppress(Exception):  # see the module's description
        index = _index(ctx.params)
        return _matching(index, incomplete) if index is not None else []
    return []


def mountpoints(incomplete: str) -> list[str]:
    """The mountpoints of announced daemons."""
    with contextlib.suppress(Exception):  # see the module's description
        known = [entry.mountpoint for entry in mounts.running_anywhere(os.environ)]
        return [mountpoint for mountpoint in known if mountpoint.startswith(incomplete)]
    return []


def _matching(index: Path, incomplete: str) -> list[tuple[str, str]]:
    from vfs.index import Index

    with contextlib.closing(Index.open(index, busy_timeout_s=BUSY_S)) as opened:
        exact = opened.get(incomplete) if incomplete else None
        records = [*([exact] if exact else []), *opened.page(after=incomplete, limit=LIMIT)]
    found = [record for record in records if record.uuid.startswith(incomplete)]
    return [(record.uuid, " ".join(filter(None, (record.kind, record.label)))) for record in found]


def _index(given: Mapping[str, Any]) -> Path | None:
    if given.get("index"):
        return Path(given["index"])
    if given.get("project"):
        return Path(given["project"]) / places.INDEX_NAME
    named = given.get("mount") or os.environ.get("RUNFS_MOUNT")
    announced = mounts.running_anywhere(os.environ)
    if named:
        path = str(mounts.real_mountpoint(named))
        return next((Path(entry.index) for entry in announced if entry.mountpoint == path), None)
    if os.environ.get("MACHINABLE_INDEX"):
        return Path(os.environ["MACHINABLE_INDEX"].removeprefix("sqlite:///")).expanduser()
    return places.find_index(Path.cwd()) or next((Path(entry.index) for entry in announced), None)
