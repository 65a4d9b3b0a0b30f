"""Records that come in at the root of the mount: watch their directories, have them indexed when they are quiet.

One trio task, started by `daemon.upkeep`. It decides when; `vfs.incoming` decides whether, in a worker thread.
"""

import logging
import os
import time

import pyfuse3
import trio

from vfs import incoming
from vfs.errors import RunfsError
from vfs.filesystem import FileSystem
from vfs.session import Session
from vfs.tree import FileNode
from vfs.units import Unit

log = logging.getLogger(__name__)
_LOOK_S = 1.0
_QUIET_S = 2.0  # without a change and with nothing open: who copies a record goes from file to file faster


class Arrivals:
    """The task. A clash is told once, in the session's warnings, for as long as it lasts."""

    def __init__(self, session: Session, files: FileSystem) -> None:
        self._session = session
        self._core = session.core
        self._tree = files.tree
        self._told: dict[bytes, str] = {}

    async def run(self) -> None:
        if self._session.settings.read_only:
            return
        while True:
            await trio.sleep(_LOOK_S)
            for name, directory in list(self._tree.incoming.items()):
                try:
                    await self._look(name, directory)
                except (RunfsError, OSError) as error:
                    log.warning("%s is not indexed now: %s", os.fsdecode(name), error)
            for name in self._told.keys() - self._tree.incoming.keys():
                self._tell(name, None)

    async def _look(self, name: bytes, directory: bytes) -> None:
        unit = self._unit(name, directory)
        if unit.handles or time.monotonic() - unit.changed_at < _QUIET_S:
            return
        found = await trio.to_thread.run_sync(incoming.take, self._core, os.fsdecode(name), directory)
        self._tell(name, found.clash)
        if found.uuid is not None:
            self._arrived(name, unit, found.uuid)

    def _unit(self, name: bytes, directory: bytes) -> Unit:
        node = self._tree.root.children.get(name)
        if isinstance(node, FileNode):
            return node.unit
        return self._core.units.adopt(os.fsdecode(name), directory, incoming=True)

    def _arrived(self, name: bytes, unit: Unit, uuid: str) -> None:
        """It is a record of the index from here on; its first name goes on leading to it while this mount lasts."""
        self._core.units.rename(unit, uuid)
        self._core.units.mark_dirty(unit, "arrived through the mount")
        self._core.journal.drop_incoming(os.fsdecode(name))
        self._tree.arrive(name, uuid.encode())
        pyfuse3.invalidate_entry_async(self._tree.root.ino, name, ignore_enoent=True)
        log.info("%s is record %s now", os.fsdecode(name), uuid)

    def _tell(self, name: bytes, sentence: str | None) -> None:
        before = self._told.get(name)
        if before == sentence:
            return
        if before is not None:
            del self._told[name]
            self._session.warnings.remove(before)
        if sentence is not None:
            self._told[name] = sentence
            self._session.warnings.append(sentence)
            log.warning("%s", sentence)
