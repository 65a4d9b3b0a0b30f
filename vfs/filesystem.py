"""The file operations, one method each, in core types. Used by `daemon/operations.py`, and directly in tests.

Every method is called on one thread and is short: it asks the index, the journal and the local disk, never a store.
What needs bytes from a store raises `Needs`; the caller brings them and calls again. What must wait for the disk
(`sync_plan`) is returned as a value for a worker thread. Errors are OSError and RunfsError; both carry an errno.
"""

import errno
import os
from collections.abc import Iterator

from vfs.errors import RunfsError
from vfs.fstypes import Attributes, Caller, Change, Handle, Listing, Needs
from vfs.index import Record
from vfs.names import Names
from vfs.openfiles import OpenFiles
from vfs.tree import FileNode, Inode, Node, View
from vfs.versions.past import PastDirectory, PastFile

__all__ = ["Attributes", "Caller", "Change", "FileSystem", "Handle", "Listing", "Needs"]

_PAGE = 1000


class FileSystem(Names, OpenFiles):
    """The mounted tree."""

    def opendir(self, ino: int) -> Listing:
        return Listing(self.tree.get(ino))

    def readdir(self, listing: Listing, start: int) -> Iterator[tuple[bytes, Attributes, int]]:
        """Entries from position `start` on, each with the position after it. Counts no lookup: see `seen`."""
        for name, position, listed in self._names(listing, start):
            try:
                attributes = self._find(listing.node, name, listed)
            except (OSError, RunfsError):
                continue  # vanished, or damaged: doctor tells; it must not hide the others
            yield name, attributes, position

    def seen(self, ino: int) -> None:
        """The kernel took an entry of a listing: it knows the node."""
        self.tree.nodes[Inode(ino)].lookups += 1

    def unseen(self, ino: int) -> None:
        """An entry did not fit into the answer: the node goes, unless the kernel knows it already."""
        node = self.tree.nodes.get(Inode(ino))
        if node is not None and node.lookups == 0:
            self.tree.forget(ino, 0)

    def _names(self, listing: Listing, start: int) -> Iterator[tuple[bytes, int, Record | None]]:
        if listing.node is self.tree.root:
            yield from self._root_names(listing, start)
            return
        if listing.names is None or start == 0:
            listing.names = self._list(listing.node)
        for position in range(start, len(listing.names)):
            yield listing.names[position], position + 1, None

    def _list(self, node: Node) -> list[bytes]:
        if isinstance(node, View):
            return list(self.tree.list_view(node))
        if isinstance(node, PastDirectory | PastFile):
            return list(self.past.names(node))
        if not isinstance(node, FileNode):
            raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        with self._directory(node) as fd:
            return [os.fsencode(name) for name in os.listdir(f"/proc/self/fd/{fd}")]

    def _root_names(self, listing: Listing, start: int) -> Iterator[tuple[bytes, int, Record | None]]:
        """Incoming names, then pages of the index; only where each page began is kept, so that listing a million
        records costs no memory."""
        if listing.names is None or start == 0:
            known = self._core.index
            listing.names = [name for name in self.tree.incoming if known.get(os.fsdecode(name)) is None]
        for position in range(start, len(listing.names)):
            yield listing.names[position], position + 1, None
        incoming = len(listing.names)
        position = max(start - incoming, 0)
        while self._turn(listing, position // _PAGE):
            rest = listing.page[position % _PAGE :]
            for record in rest:
                position += 1
                yield record.uuid.encode(), position + incoming, record
            if len(listing.page) < _PAGE:
                return

    def _turn(self, listing: Listing, number: int) -> bool:
        """Have page `number` of the root in the listing; False when there is none."""
        if number >= len(listing.pages):
            return False
        if number != listing.page_number:
            listing.page = records = self.tree.list_root(listing.pages[number], _PAGE)
            listing.page_number = number
            if len(records) == _PAGE and number + 1 == len(listing.pages):
                listing.pages.append(records[-1].uuid)
        return True
