"""A record's files and their digests: the manifest, as it is kept here and in a store.

Used by push (build, publish, merge), evict (what a home must hold), hydrate (what a content consists of).
Pure: nothing here touches a disk or a network. This module owns the format of `.runfs/<uuid>/manifest.json`:

    {"format": 1, "uuid": ..., "generation": n, "rows": [index rows], "files": [file...],
     "owners": [{"host": text, "project": path, "directory": path}...] (left out when there are none),
     "published_ns": when, by the publisher's clock, "notes": text (left out when empty), "interim": true (left out when
     false): published while the record was being written}
    file: {"path": text | {"base64": text}, "kind": "file"|"directory"|"symlink"|"other", "mode": int, "mtime_ns": int,
           "size": bytes, "digest": hex blake3, "key": object, "chunks": base64 of 32-byte blake3 digests, one for
           each MiB (left out when there is one chunk: it is the digest), "target": text | {"base64"},
           "same": index of the file this one is a hard link to, "uid", "gid",
           "attributes": {extended attribute: base64}} (a name that is not UTF-8: "=" and its base64)
"""

import base64
import binascii
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from operator import attrgetter
from typing import Any

from blake3 import blake3

from vfs.errors import ManifestError

FORMAT = 1
# Small enough that a random read brings little (100 reads bring 1 % of 10 GiB), large enough that 10 GiB
# needs 320 kB of digests. Neighbouring chunks travel together.
CHUNK = 1 << 20
DIGEST = 32
KINDS = ("file", "directory", "symlink", "other")
NOTES_MOST = 16384  # characters of a version's notes
ATTRIBUTES_MOST = 65536  # bytes of names and values of one file's extended attributes
NUMBER_MOST = 2**62  # there must be numbers after it
OURS = "user.runfs."  # extended attributes that this machine's runfs keeps for itself: of no record, in no manifest
SET_ID = 0o6000  # set-user-id and set-group-id
_SHOWN = 100  # characters of somebody's words in a message

_REMEMBERED_MOST = 256 << 10  # bytes of a manifest; it takes some ten times as much when it is parsed


@dataclass(frozen=True, slots=True)
class File:
    """One path of a record. `size` in bytes, times in ns since the epoch, `digest` is blake3 of the content."""

    path: bytes
    kind: str
    mode: int
    mtime_ns: int
    size: int = 0
    digest: bytes = b""
    key: str = ""
    target: bytes = b""
    uid: int = 0
    gid: int = 0
    same: bytes = b""
    attributes: tuple[tuple[str, bytes], ...] = ()


@dataclass(frozen=True, slots=True)
class Content:
    """What one digest stands for: its size in bytes and the blake3 of each MiB, concatenated."""

    digest: bytes
    size: int
    chunks: bytes

    def chunk(self, number: int) -> bytes:
        return self.chunks[number * DIGEST : (number + 1) * DIGEST]

    @property
    def count(self) -> int:
        return chunk_count(self.size)


@dataclass(frozen=True, slots=True)
class Owner:
    """Who has published a record: a host, its project, and the directory that it has the record in."""

    host: str
    project: bytes
    directory: bytes


@dataclass(frozen=True, slots=True)
class Manifest:
    """A record as one home holds it. `files` are ordered by path; `contents` by digest. `generation` is the number of
    the version: it grows with each manifest that is published. `interim`: it was published while somebody wrote."""

    uuid: str
    generation: int
    files: tuple[File, ...]
    contents: Mapping[bytes, Content] = field(default_factory=dict)
    rows: tuple[Mapping[str, Any], ...] = ()
    published_ns: int = 0
    notes: str = ""
    interim: bool = False
    owners: tuple[Owner, ...] = ()

    @property
    def size(self) -> int:
        """Bytes of all contents, each counted once."""
        return sum({f.digest: f.size for f in self.files if f.kind == "file"}.values())

    def by_path(self) -> dict[bytes, File]:
        return {file.path: file for file in self.files}


def chunk_count(size: int) -> int:
    return (size + CHUNK - 1) // CHUNK


def digest_of(read: Callable[[int, int], bytes], size: int) -> Content:
    """Digest `size` bytes given by `read(offset, length)`, whole and by chunk.

    Raises WrongBytes never, EOFError when the source ends early (it was truncated meanwhile).
    """
    whole = blake3()
    chunks = bytearray()
    for offset in range(0, size, CHUNK):
        data = read(offset, min(CHUNK, size - offset))
        if len(data) != min(CHUNK, size - offset):
            raise EOFError(f"ended at {offset + len(data)} of {size} bytes")
        whole.update(data)
        chunks += blake3(data).digest()
    return Content(whole.digest(), size, bytes(chunks))


def _text(value: bytes) -> str | dict[str, str]:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(value).decode("ascii")}


def _bytes(value: Any, what: str) -> bytes:
    if isinstance(value, str):
        return value.encode("utf-8", "surrogatepass")
    if isinstance(value, dict) and isinstance(value.get("base64"), str):
        return base64.b64decode(value["base64"], validate=True)
    raise ManifestError(f"{what} is neither text nor base64")


def dump(manifest: Manifest) -> bytes:
    """The manifest as it is published: canonical JSON, so that equal manifests are equal bytes."""
    positions = {file.path: n for n, file in enumerate(manifest.files)}
    body: dict[str, Any] = {
        "format": FORMAT,
        "uuid": manifest.uuid,
        "generation": manifest.generation,
        "rows": list(manifest.rows),
        "files": [_dump_file(file, manifest.contents, positions) for file in manifest.files],
    }
    said = {"published_ns": manifest.published_ns, "notes": manifest.notes, "interim": manifest.interim}
    body |= {name: value for name, value in said.items() if value}
    if manifest.owners:
        body["owners"] = [
            {"host": each.host, "project": _text(each.project), "directory": _text(each.directory)}
            for each in manifest.owners
        ]
    return json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode("utf-8")


def _dump_file(file: File, contents: Mapping[bytes, Content], positions: Mapping[bytes, int]) -> dict[str, Any]:
    out: dict[str, Any] = {
        "path": _text(file.path),
        "kind": file.kind,
        "mode": file.mode,
        "mtime_ns": file.mtime_ns,
        "uid": file.uid,
        "gid": file.gid,
    }
    if file.attributes:
        out["attributes"] = {
            _attribute_key(name): base64.b64encode(value).decode("ascii") for name, value in file.attributes
        }
    if file.kind == "file":
        out |= {"size": file.size, "digest": file.digest.hex(), "key": file.key}
        if file.size > CHUNK:
            out["chunks"] = base64.b64encode(contents[file.digest].chunks).decode("ascii")
        if file.same:
            out["same"] = positions[file.same]
    elif file.kind == "symlink":
        out["target"] = _text(file.target)
    return out


def parse(data: bytes, uuid: str | None = None) -> Manifest:
    """Read a published manifest. Anything it says is checked: it may come from a store that lies.

    Raises ManifestError naming what is wrong.
    """
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"the manifest is not JSON: {error}") from error
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise ManifestError("the manifest has no format this version of runfs knows; upgrade runfs")
    if uuid is not None and body.get("uuid") != uuid:
        raise ManifestError(f"the manifest is of record {body.get('uuid')!r:.{_SHOWN}}, not of {uuid}")
    try:
        return _parse_body(body)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, binascii.Error) as error:
        raise ManifestError(f"the manifest contradicts itself: {error!r:.{_SHOWN}}") from error


def parse_ours(data: bytes, uuid: str) -> Manifest:
    """The same of a manifest that our own journal keeps. Small ones are remembered for a moment: one move of a record
    asks several times."""
    return _remembered(data, uuid) if len(data) <= _REMEMBERED_MOST else parse(data, uuid)


@lru_cache(maxsize=8)
def _remembered(data: bytes, uuid: str) -> Manifest:
    return parse(data, uuid)


def _parse_body(body: dict[str, Any]) -> Manifest:
    raw = body["files"]
    contents: dict[bytes, Content] = {}
    if not isinstance(raw, list):
        raise ManifestError("its files are not a list")
    files = [_parse_file(item, contents) for item in raw]
    first = [(file, "same" in item) for file, item in zip(files, raw, strict=True)]
    for position, item in enumerate(raw):
        if "same" in item:
            files[position] = replace(files[position], same=_first_of(first, position, _whole(item, "same")))
    check_tree(files)
    rows = tuple(row for row in body.get("rows", ()) if isinstance(row, dict))
    notes = body.get("notes", "")
    if not isinstance(notes, str) or len(notes) > NOTES_MOST:
        raise ManifestError("its notes are no text")
    published_ns = _whole({"published_ns": 0, **body}, "published_ns")
    interim = body.get("interim") is True
    generation = _whole(body, "generation", 0, NUMBER_MOST)
    owners = tuple(map(_parse_owner, body.get("owners", ())))
    return Manifest(str(body["uuid"]), generation, tuple(files), contents, rows, published_ns, notes, interim, owners)


def _parse_owner(item: dict[str, Any]) -> Owner:
    owner = Owner(item["host"], _bytes(item["project"], "a project"), _bytes(item["directory"], "a directory"))
    if not isinstance(owner.host, str) or b"\0" in owner.project + owner.directory:
        raise ManifestError("an owner is not what it should be")
    return owner


def _whole(item: Mapping[str, Any], name: str, least: int = 0, most: int = 2**63 - 1) -> int:
    """A whole number that the disk and SQLite can hold."""
    value = item[name]
    if type(value) is not int or not least <= value <= most:
        raise ManifestError(f"{name} is {value!r:.40}, not a whole number that can be")
    return value


def _first_of(files: list[tuple[File, bool]], position: int, same: int) -> bytes:
    other, itself_a_link = files[same]
    if itself_a_link or other.kind != "file" or other.digest != files[position][0].digest:
        raise ManifestError("a hard link names a file with other content")
    return other.path


def _parse_file(item: dict[str, Any], contents: dict[bytes, Content]) -> File:
    path = _bytes(item["path"], "a path")
    kind = item["kind"]
    if kind not in KINDS:
        raise ManifestError(f"unknown kind {kind!r:.{_SHOWN}}")
    mode, mtime_ns = _whole(item, "mode") & 0o7777, _whole(item, "mtime_ns", -(2**63))
    uid = _whole(item, "uid", 0, 2**32 - 2) if "uid" in item else 0
    gid = _whole(item, "gid", 0, 2**32 - 2) if "gid" in item else 0
    attributes = _attributes(item["attributes"]) if "attributes" in item else ()
    if kind == "symlink":
        target = _bytes(item["target"], "a link's target")
        if not 0 < len(target) < 4096 or b"\0" in target:
            raise ManifestError(f"{path!r:.{_SHOWN}}: not a target a link can have")
        return File(path, kind, mode, mtime_ns, 0, b"", "", target, uid, gid, b"", attributes)
    if kind != "file":
        return File(path, kind, mode, mtime_ns, 0, b"", "", b"", uid, gid, b"", attributes)
    size, digest = _whole(item, "size"), bytes.fromhex(item["digest"])
    chunks = base64.b64decode(item["chunks"], validate=True) if "chunks" in item else (digest if size else b"")
    if len(digest) != DIGEST or len(chunks) != chunk_count(size) * DIGEST or (0 < size <= CHUNK and chunks != digest):
        raise ManifestError(f"{path!r:.{_SHOWN}}: its digests do not fit its size")
    if not isinstance(item["key"], str) or not item["key"].isprintable():
        raise ManifestError(f"{path!r:.{_SHOWN}}: its object's name is no text")
    content = Content(digest, size, chunks)
    if contents.setdefault(digest, content) != content:
        raise ManifestError(f"{path!r:.{_SHOWN}}: one digest stands for two contents")
    return File(path, kind, mode, mtime_ns, size, digest, item["key"], b"", uid, gid, b"", attributes)


def belongs_to_record(name: str) -> bool:
    """Whether an extended attribute is one that a record's file can have: of the namespace `user.`, and not ours."""
    return name.startswith("user.") and name != "user." and not name.startswith(OURS)


def _attribute_key(name: str) -> str:
    raw = name.encode("utf-8", "surrogateescape")
    return name if raw.decode("utf-8", "replace") == name else "=" + base64.b64encode(raw).decode("ascii")


def _attributes(item: Mapping[str, str]) -> tuple[tuple[str, bytes], ...]:
    """A file's extended attributes, without those that are ours."""
    found, size = {}, 0
    for key, value in item.items():
        raw = base64.b64decode(key[1:], validate=True) if key.startswith("=") else key.encode("utf-8")
        name = raw.decode("utf-8", "surrogateescape")
        if name.startswith(OURS):
            continue  # says where bytes are: a store that could set it would have holes read as bytes
        if not belongs_to_record(name) or b"\0" in raw or len(raw) > 255:
            raise ManifestError(f"{name!r:.80} is no extended attribute that a record's file can have")
        found[name] = base64.b64decode(value, validate=True)
        size += len(raw) + len(found[name])
    if size > ATTRIBUTES_MOST:
        raise ManifestError(f"a file's extended attributes are more than {ATTRIBUTES_MOST:,} bytes")
    return tuple(sorted(found.items()))


def foreign(file: File) -> File:
    """A file as it is taken from somebody else's word: never one that runs with the rights of its owner or group. (On a
    directory the bit means that new files get its group.)"""
    return replace(file, mode=file.mode & ~SET_ID) if file.kind in ("file", "other") else file


def check_tree(files: Iterable[File]) -> None:
    """Every path is relative and plain, appears once, and lies in directories of the manifest."""
    seen: dict[bytes, str] = {}
    for file in files:
        parts = file.path.split(b"/")
        if not all(part not in (b"", b".", b"..") and b"\0" not in part and len(part) <= 255 for part in parts):
            raise ManifestError(f"{file.path!r:.{_SHOWN}} is not a plain relative path")
        if file.path in seen:
            raise ManifestError(f"{file.path!r:.{_SHOWN}} appears twice")
        seen[file.path] = file.kind
    for path in seen:
        parent = path.rpartition(b"/")[0]
        if parent and seen.get(parent) != "directory":
            raise ManifestError(f"{path!r:.{_SHOWN}} lies in something that is not a directory")


def same_tree(one: Manifest, other: Manifest) -> bool:
    """Whether two manifests describe the same files; object keys and generations may differ."""
    return len(one.files) == len(other.files) and all(map(_same_file, one.files, other.files))


def _same_file(one: File, other: File) -> bool:
    return _BUT_KEY(one) == _BUT_KEY(other)


_BUT_KEY = attrgetter(*(each.name for each in fields(File) if each.name != "key"))


@dataclass(frozen=True, slots=True)
class Merge:
    """A merge of ours onto theirs: the result, what came from them, and what clashed (kept under a second name).
    `removed`: files of ours that they removed and that we had not changed. `kept`: paths that stay although one side
    removed them, since the other changed them; each with whether it was they who removed it."""

    manifest: Manifest
    taken: tuple[File, ...]
    clashes: tuple[tuple[bytes, bytes], ...]
    removed: tuple[File, ...] = ()
    kept: tuple[tuple[bytes, bool], ...] = ()


def merge(base: Manifest | None, ours: Manifest, theirs: Manifest) -> Merge:
    """Merge what two hosts did to one record since `base`. Nothing of either is lost.

    A path changed on one side only takes that side. A path whose content changed on both sides keeps ours under its
    name and theirs under `<path>.conflict-<digest>`; so does one that is a directory on one side and not on the other.
    A path one side removed is gone if the other side did not change it, and is kept if it did.
    """
    work = _Merging(base.by_path() if base else {}, ours.by_path(), theirs.by_path())
    for path in sorted(work.other):
        work.bring(work.other[path])
    result = work.result
    for path in list(result):
        if path in work.mine and path not in work.other and _equal(work.mine[path], work.before.get(path)):
            del result[path]
    _keep_parents(result, work.mine, work.other)
    files = tuple(_linked(result[path], result) for path in sorted(result))
    contents = {**theirs.contents, **ours.contents}
    generation = max(ours.generation, theirs.generation) + 1
    rows = ours.rows or theirs.rows
    owners = (*ours.owners, *(each for each in theirs.owners if each not in ours.owners))
    merged = replace(ours, generation=generation, files=files, contents=contents, rows=rows, owners=owners)
    removed = tuple(file for path, file in work.mine.items() if path not in result)
    return Merge(merged, tuple(work.taken), tuple(work.clashes), removed, tuple(work.kept()))


class _Merging:
    """A merge under way: starts as ours, and takes in what they changed, file by file, parents first."""

    def __init__(self, before: dict[bytes, File], mine: dict[bytes, File], other: dict[bytes, File]) -> None:
        self.before, self.mine, self.other = before, mine, other
        self.result = dict(mine)
        self.taken: list[File] = []
        self.clashes: list[tuple[bytes, bytes]] = []
        self._moved: dict[bytes, bytes] = {}  # their directories that got a second name

    def bring(self, file: File) -> None:
        path = file.path
        mine, before = self.mine.get(path), self.before.get(path)
        if _equal(file, mine) or _equal(file, before):
            return
        place = self._place(path)
        here = self.result.get(place)
        if here is not None and here.kind == file.kind == "directory":
            if place == path and _equal(here, before):
                self._take(file)
        elif here is None or (place == path and here.kind != "directory" != file.kind and _equal(here, before)):
            self._take(replace(file, path=place))
        elif not _same_content(file, here):
            second = self._second(path, file)
            if file.kind == "directory":
                self._moved[path] = second
            self._take(replace(file, path=second, same=b""))

    def kept(self) -> Iterator[tuple[bytes, bool]]:
        """Paths that one side removed and the other changed; True where they removed it."""
        for path, before in self.before.items():
            mine, other = self.mine.get(path), self.other.get(path)
            left = mine or other
            one_left = left is not None and (mine is None or other is None)
            if left is not None and one_left and left.kind != "directory" and not _equal(left, before):
                yield path, other is None

    def _take(self, file: File) -> None:
        self.result[file.path] = file
        self.taken.append(file)

    def _place(self, path: bytes) -> bytes:
        """Where a path of theirs goes: below the second name of a directory that is no directory here."""
        place = b""
        for count in range(1, path.count(b"/") + 1):
            above = b"/".join(path.split(b"/")[:count])
            name = above.rpartition(b"/")[2]
            place = self._moved.get(above) or (place + b"/" + name if place else name)
            here = self.result.get(place)
            if here is None or here.kind != "directory":
                directory = self.other[above]
                if here is not None:
                    place = self._moved[above] = self._second(above, directory)
                self._take(replace(directory, path=place))
        name = path.rpartition(b"/")[2]
        return place + b"/" + name if place else name

    def _second(self, path: bytes, file: File) -> bytes:
        """A name nobody has, for their version of a path."""
        directory, slash, name = path.rpartition(b"/")
        mark = b".conflict-" + (file.digest.hex()[:8].encode() or b"theirs")
        second, number = directory + slash + name[: 255 - len(mark)] + mark, 1
        while second in self.result or second in self.other:
            number += 1
            ending = mark + b"-%d" % number
            second = directory + slash + name[: 255 - len(ending)] + ending
        self.clashes.append((path, second))
        return second


def _same_content(one: File, other: File) -> bool:
    """Whether two files differ in nothing but times, mode and the like: no reason to keep both."""
    return (one.kind, one.digest, one.target) == (other.kind, other.digest, other.target)


def _linked(file: File, files: Mapping[bytes, File]) -> File:
    """The file without its hard link, where the first name is no longer the same file."""
    first = files.get(file.same) if file.same else None
    whole = first is not None and not first.same and first.digest == file.digest
    return file if whole or not file.same else replace(file, same=b"")


def _keep_parents(result: dict[bytes, File], mine: Mapping[bytes, File], other: Mapping[bytes, File]) -> None:
    for path in list(result):
        while parent := path.rpartition(b"/")[0]:
            if parent not in result:
                result[parent] = mine.get(parent) or other[parent]
            path = parent


def _equal(one: File, other: File | None) -> bool:
    if other is None:
        return False
    if one.kind == other.kind == "directory":
        return (one.mode, one.attributes) == (other.mode, other.attributes)
    return replace(one, key="", same=b"") == replace(other, key="", same=b"")
