"""Names to nodes: the root by uuid, nested records as links, the `.by` views, and the files of units.

Used by `vfs/filesystem.py` on one thread. A node exists while the kernel knows its inode number. Looking up may ask the
index (SQLite) and the local disk, never a store.
"""

import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NewType, Protocol

from vfs.errors import DamagedRecord, IndexUnavailable, UnknownRecord
from vfs.index import Index, Record
from vfs.numbers import Numbers, number_of
from vfs.units import Unit, Units
from vfs.views import Views, decode_value, encode_value, is_directory

Inode = NewType("Inode", int)
ROOT = Inode(1)
BY = b".by"


@dataclass(slots=True, eq=False)
class Node:
    """What an inode number stands for. `lookups` is the kernel's count; `parent` and `name` are one of its names."""

    ino: Inode
    parent: "Node | None"
    name: bytes
    lookups: int = 0
    children: dict[bytes, "Node"] = field(default_factory=dict)
    checked: int = 0  # of a name at the root or in a view: the tree's `generation` when the index said so


@dataclass(slots=True, eq=False)
class Link(Node):
    """A symlink of ours: a nested record, or an entry of a view."""

    target: bytes = b""
    mtime_ns: int = 0


@dataclass(slots=True, eq=False)
class View(Node):
    """A directory of `.by`; `place` are the decoded names below it."""

    place: tuple[str, ...] = ()
    found: dict[bytes, int | None] = field(default_factory=dict)  # what `Tree.ask` was told, for the lookup after it


class Names(Protocol):
    """What the tree knows of a listing's entries that are no nodes yet."""

    def name_of(self, ino: int) -> bytes | None: ...

    def forgotten(self, ino: int) -> None: ...


class Opened(Protocol):
    """What the tree knows of an open handle."""

    passed: bool  # the kernel uses the file behind it by itself

    @property
    def writable(self) -> bool: ...


@dataclass(slots=True, eq=False, kw_only=True)
class FileNode(Node):
    """A file or directory of a unit. `key` is (device, inode) where it was last seen, at the unit's `epoch`; `others`
    its further hard links; `handles` its open handles; `stamp` what its content was when the kernel cached it;
    `unsynced`: it was written to since it was synced, `touched`: its attributes were changed;
    `renumber` is false where another node of the file would get another number; `gone` what it was when its last name
    went while nobody had it open."""

    unit: Unit
    key: tuple[int, int] = (0, 0)
    epoch: int = -1
    others: frozenset[tuple[Node, bytes]] = frozenset()  # values, not containers: a listing makes many nodes
    handles: tuple[Opened, ...] = ()
    stamp: tuple[int, int, int] | None = None
    unsynced: bool = False
    touched: bool = False
    renumber: bool = True
    gone: os.stat_result | None = None

    @property
    def path(self) -> bytes:
        """Path below the unit's root; b"" is the root itself. Raises FileNotFoundError once it has no name left."""
        parts: list[bytes] = []
        node: Node = self
        while isinstance(node, FileNode) and isinstance(node.parent, FileNode):
            parts.append(node.name)
            node = node.parent
        if node.parent is None:
            raise FileNotFoundError(2, "removed")
        return b"/".join(reversed(parts))

    @property
    def removed(self) -> bool:
        """Whether its last name is gone."""
        return self.gone is not None and (self.gone.st_nlink <= 1 or stat.S_ISDIR(self.gone.st_mode))

    @property
    def named(self) -> bool:
        node: Node = self
        while isinstance(node, FileNode):
            if node.parent is None:
                return False
            node = node.parent
        return True


class Tree:
    """All nodes the kernel knows."""

    def __init__(self, index: Index, units: Units) -> None:
        self._index = index
        self._units = units
        self._views = Views(index, units)
        self.root = Node(ROOT, None, b"", lookups=1)
        self.nodes: dict[Inode, Node] = {ROOT: self.root}
        self._numbers = Numbers(self.nodes)
        self._linked: dict[tuple[int, int], FileNode] = {}  # files with several names, by (device, inode)
        self.incoming: dict[bytes, bytes] = {}  # name at the root -> real directory
        # Grows when the index changed: names at the root and in views are asked for anew. 0: nobody follows its
        # changes, so names at the root are asked for each time.
        self.generation = 0
        self.told: dict[int, int] = {}  # lookups of entries of the root that a listing told of and nobody used yet
        self.names: Names | None = None
        self._arrived: dict[bytes, bytes] = {}  # first name of an incoming record -> its uuid

    def get(self, ino: int) -> Node:
        """The node of an inode number that the kernel knows. Raises KeyError; as `at_root` for one that a listing of
        the root told of."""
        node = self.nodes.get(Inode(ino))
        return node if node is not None else self._told(ino)

    def _told(self, ino: int) -> Node:
        name = self.names.name_of(ino) if self.names is not None and ino in self.told else None
        if name is None:
            raise KeyError(ino)
        node = self.at_root(name)
        if node.ino != ino:
            raise KeyError(ino)
        return node

    def number(self, *parts: bytes) -> Inode:
        """An inode number: the same one for the same name after a remount, unless it is taken."""
        return Inode(self._numbers.free(number_of(*parts)))

    def add(self, node: Node) -> None:
        self.nodes[node.ino] = node
        if node.parent is not None:
            node.parent.children[node.name] = node

    def kept(self) -> tuple[int, int]:
        """How many inodes are known, and the sum of the kernel's lookups of them."""
        nodes = list(self.nodes.values())
        return len(nodes), sum(node.lookups for node in nodes)

    def forget(self, ino: int, count: int) -> Node | None:
        """The kernel dropped `count` references; gives the node when that was the last."""
        node = self.nodes.get(Inode(ino))
        if node is None:
            self._untold(ino, count)
            return None
        if node is self.root:
            return None
        node.lookups -= count
        if node.lookups > 0:
            return None
        del self.nodes[node.ino]
        if node.parent is not None and node.parent.children.get(node.name) is node:
            del node.parent.children[node.name]
        if isinstance(node, FileNode):
            for parent, name in node.others:
                if parent.children.get(name) is node:
                    del parent.children[name]
            if self._linked.get(node.key) is node:
                del self._linked[node.key]
            if isinstance(node.parent, FileNode) and not node.renumber:
                self._numbers.keep(node.key, node.ino)
        return node

    def _untold(self, ino: int, count: int) -> None:
        left = self.told.get(ino, 0) - count
        if left > 0:
            self.told[ino] = left
        elif self.told.pop(ino, None) is not None and self.names is not None:
            self.names.forgotten(ino)

    # --- the root ----------------------------------------------------------------------------------------------

    def at_root(self, name: bytes) -> Node:
        """The node of a name at the root, made if need be. Raises FileNotFoundError, DamagedRecord."""
        present = self.root.children.get(name)
        if present is not None and self.generation and present.checked == self.generation:
            return present
        if present is not None and self.still(present, name):
            present.checked = self.generation
            return present
        if present is not None:
            self.detach(self.root, name)
        node = self._make_at_root(name)
        node.checked = self.generation
        self.add(node)
        node.lookups += self.told.pop(node.ino, 0)
        return node

    def still(self, node: Node, name: bytes) -> bool:
        """Whether the index still says of this name what it said when the node was made."""
        if isinstance(node, View) or name in self.incoming:
            return True
        if name in self._arrived:
            return isinstance(node, Link) and node.target == self._arrived[name]
        record = self._record(name)
        if record is None:
            return isinstance(node, FileNode) and node.unit.evicted
        target = self._nested_target(record)
        return node.target == target if isinstance(node, Link) else target is None

    def _record(self, name: bytes) -> Record | None:
        try:
            record = self._index.get(name.decode("ascii"))
        except UnicodeDecodeError:
            return None
        except IndexUnavailable:
            if self._evicted(name) is None:
                raise
            return None
        return None if record is None or record.kind == "Project" else record

    def _evicted(self, name: bytes) -> Unit | None:
        """The evicted record of this name. It can be entered also while the index has no row of it: machinable drops
        its tables to rebuild them, and whoever loaded the record before goes on reading and writing."""
        uuid = name.decode("ascii", "replace")
        return self._units.get(uuid) if self._units.is_evicted(uuid) else None

    def _make_at_root(self, name: bytes) -> Node:
        if name == BY:
            return View(self.number(BY), self.root, BY)
        record = self._record(name)
        if record is None:
            if name in self.incoming:
                unit = self._units.adopt(name.decode(), self.incoming[name], incoming=True)
                return self.file_node(self.root, name, unit)
            if name in self._arrived:  # whoever still copies into it by its first name goes on
                return Link(self.number(b"link", name), self.root, name, target=self._arrived[name])
            if (evicted := self._evicted(name)) is not None:
                return self.file_node(self.root, name, evicted)
            raise FileNotFoundError(2, "no such record", name)
        target = self._nested_target(record)
        if target is not None:
            return Link(self.number(b"link", name), self.root, name, target=target, mtime_ns=record.updated_at_ns)
        try:
            return self.file_node(self.root, name, self._units.get(record.uuid, record))
        except UnknownRecord:
            raise FileNotFoundError(2, "no such record", name) from None

    def arrive(self, name: bytes, uuid: bytes) -> None:
        """An incoming directory is record `uuid` now; its nodes and their numbers stay."""
        del self.incoming[name]
        if name != uuid:
            self._arrived[name] = uuid
            if name in self.root.children:
                self.move(self.root, name, self.root, uuid)

    def _nested_target(self, record: Record) -> bytes | None:
        if record.parent_id is None:
            return None
        root = self._index.root_of(record.uuid)
        if root is None or root.uuid == record.uuid:
            return None
        try:
            return root.uuid.encode() + b"/" + self._units.relative(root, record)
        except DamagedRecord:
            return None  # it lies elsewhere: a place of its own

    def deep_target(self, uuid: str) -> bytes | None:
        """Target of the link of a nested record, however deep; None: it has a place of its own. Any thread."""
        record = self._index.get(uuid)
        return None if record is None else self._nested_target(record)

    # --- files -------------------------------------------------------------------------------------------------

    def file_node(self, parent: Node, name: bytes, unit: Unit) -> FileNode:
        if isinstance(parent, FileNode):
            natural = number_of(b"%d" % parent.ino, name)  # the directory's number stays when it is renamed
        else:
            natural = number_of(unit.uuid.encode(), b"", name)
        number = self._numbers.free(natural)
        return FileNode(Inode(number), parent, name, unit=unit, renumber=number == natural)

    def child(self, parent: FileNode, name: bytes, status: os.stat_result) -> FileNode:
        """The node of a file just seen in `parent`: the one the kernel knows if it is still the same file."""
        key, unit = (status.st_dev, status.st_ino), parent.unit
        node = parent.children.get(name)
        if isinstance(node, FileNode):
            moved = node.epoch != unit.epoch and not any(handle.passed for handle in node.handles)
            if node.key == key or moved:
                self._seen(node, key, status)
                return node
            self.detach(parent, name)  # replaced by another program: another file
        if (linked := self._other_name(key, unit, status)) is not None:
            self.attach(linked, parent, name)
            return linked
        node = self.file_node(parent, name, unit)
        if (kept := self._numbers.kept(key)) is not None:
            node.ino, node.renumber = Inode(kept), False
        elif status.st_nlink > 1 and not stat.S_ISDIR(status.st_mode):
            # By the file, not the name: the kernel may forget the first name before it asks for the second.
            node.ino = self.number(unit.uuid.encode(), b"", b"%d %d" % key)
        self._seen(node, key, status)
        self.add(node)
        return node

    def _other_name(self, key: tuple[int, int], unit: Unit, status: os.stat_result) -> FileNode | None:
        """The node of a file that is known by another name of it. What the table has of other places of the unit does
        not count: inode numbers are used again."""
        linked = self._linked.get(key)
        if linked is None or (linked.key, linked.unit, linked.epoch) != (key, unit, unit.epoch):
            return None
        # With one link left: the name we knew was the other one, and was removed through us.
        same = status.st_nlink > 1 or (linked.gone is not None and not linked.removed)
        return linked if same else None

    def _seen(self, node: FileNode, key: tuple[int, int], status: os.stat_result) -> None:
        node.key, node.epoch = key, node.unit.epoch
        if status.st_nlink > 1 and not stat.S_ISDIR(status.st_mode):
            self._linked[key] = node

    def attach(self, node: FileNode, parent: Node, name: bytes) -> None:
        """Give a node a further name."""
        if node.parent is None:
            node.parent, node.name = parent, name
        elif (node.parent, node.name) != (parent, name):
            node.others |= {(parent, name)}
        node.gone = None
        parent.children[name] = node

    def detach(self, parent: Node, name: bytes) -> Node | None:
        """Take a name away; the node stays as long as the kernel knows it."""
        node = parent.children.pop(name, None)
        if isinstance(node, FileNode):
            node.others -= {(parent, name)}
            if node.parent is parent and node.name == name:
                node.parent, node.name = next(iter(node.others), (None, name))
                node.others -= {(node.parent, node.name)}
        elif node is not None:
            node.parent = None
        return node

    def move(self, parent: Node, name: bytes, new_parent: Node, new_name: bytes) -> None:
        """A rename: what was at the new name loses it."""
        if (parent, name) == (new_parent, new_name):
            return
        self.detach(new_parent, new_name)
        self._put(self.detach(parent, name), new_parent, new_name)

    def swap(self, parent: Node, name: bytes, new_parent: Node, new_name: bytes) -> None:
        """A rename with RENAME_EXCHANGE."""
        one, other = self.detach(parent, name), self.detach(new_parent, new_name)
        self._put(one, new_parent, new_name)
        self._put(other, parent, name)

    def _put(self, node: Node | None, parent: Node, name: bytes) -> None:
        if isinstance(node, FileNode):
            if isinstance(parent, FileNode) and parent.unit is not node.unit:
                self._change_unit(node, parent.unit)
            self.attach(node, parent, name)
            node.renumber = False

    def _change_unit(self, node: FileNode, unit: Unit) -> None:
        writers = sum(handle.writable for handle in node.handles)
        for each, sign in ((node.unit, -1), (unit, 1)):
            each.handles += sign * len(node.handles)
            each.writers += sign * writers
        node.unit, node.epoch = unit, unit.epoch
        for child in node.children.values():
            if isinstance(child, FileNode):
                self._change_unit(child, unit)

    def of_unit(self, unit: Unit, path: bytes = b"", *, deep: bool = True) -> list[FileNode]:
        """Nodes of a unit that the kernel knows: the one at `path` and, if `deep`, all below it."""
        top = self.root.children.get(unit.uuid.encode())
        for name in path.split(b"/") if path else ():
            top = top.children.get(name) if top is not None else None
        found: list[FileNode] = []
        queue = [top] if isinstance(top, FileNode) else []
        if not deep:
            return [node for node in queue if isinstance(node, FileNode)]
        while queue:
            node = queue.pop()
            found.append(node)
            queue += [child for child in node.children.values() if isinstance(child, FileNode)]
        return found

    # --- views -------------------------------------------------------------------------------------------------

    def in_view(self, view: View, name: bytes) -> Node:
        """The node of a name in a view. Raises FileNotFoundError."""
        present = view.children.get(name)
        if present is not None and present.checked == self.generation:
            return present
        try:
            node = self._make_in_view(view, name, present)
        except FileNotFoundError:
            self.detach(view, name)
            raise
        node.checked = self.generation
        return node

    def ask(self, view: View, name: bytes) -> Callable[[], None] | None:
        """What asks the index about a name in a view, for `in_view`; it may scan. None: no need."""
        present = view.children.get(name)
        if present is not None and present.checked == self.generation:
            return None

        def ask() -> None:
            view.found[name] = self._views.changed(view.place, decode_value(name))

        return ask

    def _make_in_view(self, view: View, name: bytes, present: Node | None) -> Node:
        """The node of a name, if the index has it: the one that is `present`, or a new one."""
        changed_ns = view.found.pop(name) if name in view.found else self._views.changed(view.place, decode_value(name))
        if changed_ns is None:
            raise FileNotFoundError(2, "the index has no such value or record", name)
        if present is not None:
            return present
        node = self._new_in_view(view, name, changed_ns)
        self.add(node)
        return node

    def listed_in_view(self, view: View, name: bytes, changed_ns: int) -> Node:
        """The node of a name that the index has just listed."""
        node = view.children.get(name)
        if node is None:
            node = self._new_in_view(view, name, changed_ns)
            self.add(node)
        node.checked = self.generation
        return node

    def _new_in_view(self, view: View, name: bytes, changed_ns: int) -> Node:
        place = (*view.place, decode_value(name))
        number = self.number(BY, *(encode_value(part) for part in place))
        if is_directory(place):
            return View(number, view, name, place=place)
        return Link(number, view, name, target=b"../" * len(place) + name, mtime_ns=changed_ns)

    def list_view(self, view: View) -> Iterator[tuple[bytes, int]]:
        """The names in a view, with the time of the record in ns. Scans; any thread."""
        return self._views.names(view.place)
