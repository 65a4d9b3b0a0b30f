"""`/.versions/<uuid>/<n>/...` in the mount: earlier versions, read-only. A part of the tree, used by `vfs/access.py`
and what builds on it, on their one thread.

Names and attributes come from manifests that the journal has; no store is asked before somebody reads. A file that is
opened is a placeholder in the cache, named by its content, so versions share what they have in common; its bytes come
as those of an evicted file do: checked, one flight however many readers. The directory is emptied when a mount starts
and kept below `versions.cache` bytes; nothing in it is the only copy of anything.
"""

import logging
import os
import stat
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from vfs import cache, shadow
from vfs.core import Core, quietly_remove
from vfs.errors import RunfsError
from vfs.fstypes import Attributes
from vfs.manifest import File, Manifest
from vfs.residency import State
from vfs.tree import FileNode, Node, Tree
from vfs.units import Unit
from vfs.versions import history

log = logging.getLogger(__name__)

VERSIONS = b".versions"
_TIMEOUT_S = 300.0  # the kernel may keep what it was told of a version's files: they do not change
_FILES_MOST = 10_000  # placeholders; each takes an inode of the cache's file system
_TRIM_S = 10.0


@dataclass(slots=True, eq=False)
class PastDirectory(Node):
    """`/.versions` (no `uuid`), or the directory of one record's versions."""

    uuid: str = ""


@dataclass(slots=True)
class Version:
    """One version as a tree: what each directory holds, made when somebody first looks into it."""

    uuid: str
    number: int
    store: str
    at_ns: int
    unit: Unit
    manifest: Manifest | None = None
    files: dict[bytes, File] = field(default_factory=dict)
    names: dict[bytes, list[bytes]] = field(default_factory=dict)

    def load(self, core: Core) -> None:
        """Read its manifest from the journal. Raises FileNotFoundError when it was pruned meanwhile, ManifestError."""
        if self.manifest is not None:
            return
        found = history.known_manifest(core, self.uuid, self.number, self.store)
        if found is None:
            raise FileNotFoundError(2, "this version was pruned")
        for file in found.files:
            directory, _slash, name = file.path.rpartition(b"/")
            self.names.setdefault(directory, []).append(name)
        self.files, self.manifest = found.by_path(), found


@dataclass(slots=True, eq=False, kw_only=True)
class PastFile(FileNode):
    """A file or directory of a version; without `file` its root."""

    version: Version
    file: File | None = None


class Past:
    """The tree below `/.versions`, and the cache of what was read in it."""

    def __init__(self, core: Core, tree: Tree) -> None:
        self._core = core
        self._tree = tree
        self._place = os.fsencode(core.settings.cache_place / ".versions")
        self._owner = (os.getuid(), os.getgid())
        self._started_ns = time.time_ns()
        self._trimmed = 0.0
        shadow.remove(self._place)

    # --- names and attributes ----------------------------------------------------------------------------------

    def top(self) -> Node:
        """`/.versions` itself."""
        root = self._tree.root
        return root.children.get(VERSIONS) or self._added(PastDirectory(self._tree.number(VERSIONS), root, VERSIONS))

    def _added(self, node: Node) -> Node:
        self._tree.add(node)
        return node

    def find(self, parent: Node, name: bytes) -> Node:
        """The node of a name. Raises FileNotFoundError, NotADirectoryError, ManifestError."""
        if isinstance(parent, PastFile):
            return self._child(parent, name)
        assert isinstance(parent, PastDirectory)
        if parent.uuid:
            return self._version(parent, name)
        uuid = name.decode("ascii", "replace")
        if not history.known_numbers(self._core, uuid):
            raise FileNotFoundError(2, "no version of such a record is known here; see runfs versions")
        made = PastDirectory(self._tree.number(VERSIONS, name), parent, name, uuid=uuid)
        return parent.children.get(name) or self._added(made)

    def _version(self, parent: PastDirectory, name: bytes) -> Node:
        known = history.known_numbers(self._core, parent.uuid)
        text = name.decode("ascii", "replace")
        number = int(text) if text.isdigit() and text == str(int(text)) else -1
        if number not in known:
            self._tree.detach(parent, name)
            raise FileNotFoundError(2, "no such version is known here; see runfs versions")
        store, at_ns = known[number]
        present = parent.children.get(name)
        if isinstance(present, PastFile) and (present.version.store, present.version.at_ns) == (store, at_ns):
            return present
        self._tree.detach(parent, name)
        unit = Unit(f"{parent.uuid}@{number}", self._place, self._place + b"/none", None)
        unit.state = State.EVICTED
        version = Version(parent.uuid, number, store, at_ns, unit)
        number_ = self._tree.number(VERSIONS, parent.name, name)
        return self._added(PastFile(number_, parent, name, unit=unit, version=version))

    def _child(self, parent: PastFile, name: bytes) -> Node:
        version = parent.version
        version.load(self._core)
        path = parent.path
        file = version.files.get(path + b"/" + name if path else name)
        if file is None:
            raise FileNotFoundError(2, "not in this version", name)
        present = parent.children.get(name)
        if present is not None:
            return present
        number = self._tree.number(VERSIONS, version.unit.uuid.encode(), file.path)
        return self._added(PastFile(number, parent, name, unit=version.unit, version=version, file=file))

    def names(self, node: Node) -> Iterator[bytes]:
        """What a directory holds."""
        if isinstance(node, PastFile):
            node.version.load(self._core)
            if node.file is not None and node.file.kind != "directory":
                raise NotADirectoryError(20, "not a directory")
            yield from node.version.names.get(node.path, ())
        elif isinstance(node, PastDirectory) and node.uuid:
            yield from (b"%d" % number for number in sorted(history.known_numbers(self._core, node.uuid)))
        else:
            yield from (uuid.encode() for uuid in self._core.journal.versioned())

    def attributes(self, node: Node) -> Attributes:
        """What the kernel is told."""
        if not isinstance(node, PastFile):
            return self._directory(node, self._started_ns)
        file = node.file
        if file is None:
            return self._directory(node, node.version.at_ns)
        kind = {"file": stat.S_IFREG, "directory": stat.S_IFDIR, "symlink": stat.S_IFLNK}.get(file.kind, stat.S_IFIFO)
        size = len(file.target) if file.kind == "symlink" else file.size
        links, times = 2 if file.kind == "directory" else 1, (file.mtime_ns, file.mtime_ns, node.version.at_ns)
        blocks = -(-file.size // 512)
        ids = (node.ino, kind | file.mode, links, file.uid, file.gid)
        return Attributes(*ids, size, blocks, 0, *times, _TIMEOUT_S, _TIMEOUT_S)

    def _directory(self, node: Node, at_ns: int) -> Attributes:
        return Attributes(node.ino, stat.S_IFDIR | 0o755, 2, *self._owner, 0, 0, 0, at_ns, at_ns, at_ns, 0.0, 1.0)

    def attribute(self, node: PastFile, name: bytes) -> bytes | None:
        """An extended attribute of the record's, if it has it."""
        found = dict(node.file.attributes) if node.file is not None else {}
        return found.get(os.fsdecode(name))

    # --- contents ----------------------------------------------------------------------------------------------

    def open(self, node: PastFile) -> int:
        """A descriptor of the placeholder of a file's content, for reading. Raises OSError, JournalError."""
        file, manifest = node.file, node.version.manifest
        if file is None or file.kind != "file" or manifest is None:
            raise IsADirectoryError(21, "a directory")
        self._know(file, manifest, node.version.store)
        name = file.digest.hex().encode()
        for _try in range(3):  # it may be trimmed in this very moment
            with suppress(FileNotFoundError):
                fd = os.open(os.path.join(self._place, name), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
                if os.fstat(fd).st_size == file.size:
                    return fd
                os.close(fd)
                quietly_remove(os.path.join(self._place, name))
            self._make(name, file)
        raise FileNotFoundError(2, "the cache is being emptied; try again")

    def _know(self, file: File, manifest: Manifest, store: str) -> None:
        """Have in the journal what a flight needs: what the content consists of and where it is."""
        if self._core.content(file.digest) is None:
            self._core.journal.add_contents([manifest.contents[file.digest]])
        if not any(replica.uuid == manifest.uuid for replica in self._core.journal.replicas(file.digest)):
            history.note_replicas(self._core, store, manifest)

    def _make(self, name: bytes, file: File) -> None:
        self._trim_sometimes()
        os.makedirs(self._place, 0o700, exist_ok=True)
        directory = os.open(self._place, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            quietly_remove(os.path.join(self._place, b"new"))
            os.close(cache.make_placeholder(directory, b"new", file.digest, file.size, 0o600))
            os.rename(b"new", name, src_dir_fd=directory, dst_dir_fd=directory)
        finally:
            os.close(directory)

    def _trim_sometimes(self) -> None:
        if time.monotonic() - self._trimmed > _TRIM_S:
            self._trimmed = time.monotonic()
            self._core.behind(lambda: self.trim(self._core.settings.versions.cache))

    def trim(self, most: int) -> None:
        """Remove what was read longest ago, until no more than `most` bytes are left. What is open stays readable."""
        found: list[tuple[int, int, bytes]] = []
        with suppress(FileNotFoundError), os.scandir(self._place) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    found.append((max(status.st_atime_ns, status.st_ctime_ns), status.st_blocks * 512, entry.path))
        total, count = sum(size for _at, size, _path in found), len(found)
        for _at, size, path in sorted(found):
            if total <= most and count <= _FILES_MOST:
                return
            quietly_remove(path)
            total, count = total - size, count - 1


def trim_all(core: Core) -> None:
    """Give back all that reading earlier versions has taken on this disk."""
    place = os.fsencode(core.settings.cache_place / ".versions")
    with suppress(FileNotFoundError, RunfsError), os.scandir(place) as entries:
        for entry in entries:
            quietly_remove(entry.path)
