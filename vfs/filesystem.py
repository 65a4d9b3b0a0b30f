"""The file operations, one method each, in core types. Used by `daemon/operations.py`, and directly in tests.

Every method is called on one thread and is short: it asks the index, the journal and the local disk, never a store.
What needs bytes from a store raises `Needs`; the caller brings them and calls again. What must wait for the disk
(`sync_plan`) is returned as a value for a worker thread. Errors are OSError and RunfsError; both carry an errno.
"""

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial

from vfs.attributes import ExtendedAttributes
from vfs.errors import RunfsError
from vfs.fstypes import Attributes, Caller, Change, Handle, Listing, Needs
from vfs.names import Names
from vfs.openfiles import OpenFiles
from vfs.roots import Page, Values, link_mark
from vfs.tree import FileNode, Inode, Link, Node, View
from vfs.versions.past import PastDirectory, PastFile

__all__ = ["Attributes", "Caller", "Change", "FileSystem", "Handle", "Listing", "Needs"]

# Positions in a listing of the root: below _PAGES incoming names, then _SPAN for each page.
_PAGES = _SPAN = 1 << 20


class FileSystem(Names, OpenFiles, ExtendedAttributes):
    """The mounted tree."""

    def opendir(self, ino: int) -> Listing:
        return Listing(self.tree.get(ino))

    def closedir(self, listing: Listing) -> None:
        if listing.held:
            self.roots.again()

    def index_changed(self) -> None:
        """What the index says of names is asked for anew."""
        self.tree.generation += 1
        self.roots.turn()

    def close(self) -> None:
        """Nothing is listed any more."""
        self.roots.close()

    def dots(self, listing: Listing) -> Iterator[tuple[bytes, Attributes]]:
        """The entries before all others. Only number and kind are right, which is all that the kernel takes; it counts
        no lookup of them."""
        node = listing.node
        for name, meant in ((b".", node), (b"..", node.parent or node)):
            yield name, self._made_up(meant, stat.S_IFDIR, 0, 0)

    def rewind(self, listing: Listing, start: int) -> None:
        """A reader is at a position now; at 0 it reads anew."""
        if start == 0:
            listing.names, listing.pages, listing.held = None, [""], {}

    def readdir(self, listing: Listing, start: int) -> Iterator[tuple[bytes, Attributes, int]]:
        """Entries from position `start` on, each with the position after it. Counts no lookup: see `seen`. `rewind`,
        and what `before_readdir` gives, come first. Of the root, `root_entries` are quicker."""
        if listing.node is self.tree.root:
            for position, row in self._root_rows(listing, start):
                with suppress(OSError, RunfsError):
                    yield row[0], self._find(listing.node, row[0]), position
            return
        names = listing.names if listing.names is not None else self._list(listing.node)
        listing.names = names
        for position in range(start, len(names)):
            name, changed_ns = names[position]
            try:
                attributes = self._listed(listing.node, name, changed_ns)
            except (OSError, RunfsError):
                continue  # vanished, or damaged: doctor tells; it must not hide the others
            yield name, attributes, position + 1

    def _listed(self, node: Node, name: bytes, changed_ns: int | None) -> Attributes:
        if isinstance(node, View) and changed_ns is not None:
            return self.attributes_of(self.tree.listed_in_view(node, name, changed_ns))
        return self._find(node, name)

    def seen(self, ino: int) -> None:
        """The kernel took an entry of a listing: it knows the node."""
        self.tree.nodes[Inode(ino)].lookups += 1

    def unseen(self, ino: int) -> None:
        """An entry did not fit into the answer: the node goes, unless the kernel knows it already."""
        node = self.tree.nodes.get(Inode(ino))
        if node is not None and node.lookups == 0:
            self.tree.forget(ino, 0)

    def _list(self, node: Node) -> list[tuple[bytes, int | None]]:
        if isinstance(node, View):
            return list(self.tree.list_view(node))
        if isinstance(node, PastDirectory | PastFile):
            return [(name, None) for name in self.past.names(node)]
        if not isinstance(node, FileNode):
            raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        with self._directory(node) as fd:
            return [(os.fsencode(name), None) for name in os.listdir(f"/proc/self/fd/{fd}")]

    # --- what a worker thread does first -----------------------------------------------------------------------

    def before_lookup(self, parent: int, name: bytes) -> Callable[[], None] | None:
        """What is to be done in a worker thread before `lookup`: a question about a view may scan the index."""
        node = self.tree.get(parent)
        return self.tree.ask(node, name) if isinstance(node, View) else None

    def before_readdir(self, listing: Listing, start: int) -> Callable[[], None] | None:
        """What is to be done in a worker thread before `readdir` or `root_entries`; after it, ask again."""
        if isinstance(listing.node, View):
            return partial(self._list_view, listing) if listing.names is None else None
        if listing.node is not self.tree.root:
            return None
        number, index = _place(start)
        while (work := self._turn(listing, number)) is None:
            if number not in listing.held or index < len(listing.held[number]):
                return None  # the end, or an entry
            number, index = number + 1, 0
        return work

    def _list_view(self, listing: Listing) -> None:
        listing.names = self._list(listing.node)

    # --- the root ----------------------------------------------------------------------------------------------

    def is_root(self, listing: Listing) -> bool:
        return listing.node is self.tree.root

    def root_entries(self, listing: Listing, start: int) -> Iterator[tuple[int, Values]]:
        """Entries of the root from a position on, each with the position after it. To go on after one says that the
        kernel took it. What a page tells of becomes a node only when somebody uses it."""
        children, nodes, told = self.tree.root.children, self.tree.nodes, self.tree.told
        for position, row in self._root_rows(listing, start):
            name, ino, link = row[0], row[1], row[2]
            if link >= 0 and name not in children and ino not in nodes:
                yield position, row
                told[ino] = told.get(ino, 0) + 1
                continue
            try:
                known = self._as_node(row)
            except (OSError, RunfsError):
                continue
            try:
                yield position, known
            except GeneratorExit:
                self.unseen(known[1])
                raise
            self.seen(known[1])

    def _as_node(self, row: Values) -> Values:
        """A row for a name that has a node, or must have one."""
        name, link = row[0], row[2]
        node = self.tree.root.children.get(name)
        same = link == 0 if isinstance(node, FileNode) else isinstance(node, Link) and link_mark(node.target) == link
        if node is not None and same:
            return (name, node.ino, *row[2:])
        a = self._find(self.tree.root, name)
        times = (a.atime_ns, a.mtime_ns, a.ctime_ns)
        return (name, a.ino, 0, a.mode, a.nlink, a.uid, a.gid, a.size, a.blocks, *times)

    def _root_rows(self, listing: Listing, start: int) -> Iterator[tuple[int, Values]]:
        """Incoming names, whose attributes are to be asked for, then pages; only where each page began is kept. Ends
        where a page has to be made first, but not before it has given something."""
        number, index = _place(start)
        position = start
        if start < _PAGES:
            for name in self._incoming_names(listing)[start:]:
                position += 1
                yield position, (name, 0, -1, 0, 0, 0, 0, 0, 0, 0, 0, 0)
        while True:
            work = self._turn(listing, number)
            if work is not None and position != start:
                return
            if work is not None:
                work()
                self._turn(listing, number)
            if number not in listing.held:
                return
            position = _PAGES + number * _SPAN + index
            for row in listing.held[number].since(index):
                position += 1
                yield position, row
            number, index = number + 1, 0

    def _incoming_names(self, listing: Listing) -> list[bytes]:
        if listing.names is None:
            known = self._core.index
            incoming = [name for name in self.tree.incoming if known.get(os.fsdecode(name)) is None]
            listing.names = [(name, None) for name in incoming]
        return [name for name, _ in listing.names]

    def _turn(self, listing: Listing, number: int) -> Callable[[], None] | None:
        """Have page `number` of the root in the listing, if there is one; what makes it, if that is to be done."""
        if number >= len(listing.pages) or number in listing.held:
            return None
        page = self.roots.page(listing.pages[number])
        if page is None:
            return partial(self._make, listing, number)
        self._take(listing, number, page)
        return None

    def _make(self, listing: Listing, number: int) -> None:
        self._take(listing, number, self.roots.make(listing.pages[number]))

    @staticmethod
    def _take(listing: Listing, number: int, page: Page) -> None:
        listing.held = {each: held for each, held in listing.held.items() if abs(each - number) == 1} | {number: page}
        if page.last is not None and number + 1 == len(listing.pages):
            listing.pages.append(page.last)


def _place(position: int) -> tuple[int, int]:
    """Number of the page, and of the entry in it, at a position of the root's listing."""
    return divmod(max(position - _PAGES, 0), _SPAN)
