"""The manifest: round trip, refusal of what is malformed or lies, and the merge of what two hosts did."""

import base64
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from vfs.errors import ManifestError
from vfs.manifest import CHUNK, Content, File, Manifest, digest_of, dump, merge, parse, same_tree

NAMES = st.binary(min_size=1, max_size=6).filter(lambda name: not {0, 47} & set(name) and name not in (b".", b".."))
CONTENTS = {
    content.digest: content
    for content in (
        digest_of(lambda offset, length, data=data: data[offset : offset + length], len(data))  # type: ignore[misc]
        for data in (b"", b"one", b"two", b"three", bytes(CHUNK), bytes(CHUNK + 1), b"x" * (2 * CHUNK))
    )
}
DIGESTS = sorted(CONTENTS)


@st.composite
def trees(draw: st.DrawFn, names: st.SearchStrategy[bytes] = NAMES) -> dict[bytes, File]:
    """Files of a record by path: directories first made, then filled, some names linked twice."""
    found: dict[bytes, File] = {}
    directories = [b""]
    for _ in range(draw(st.integers(0, 7))):
        above = draw(st.sampled_from(directories))
        path = (above + b"/" if above else b"") + draw(names)
        if path in found:
            continue
        kind = draw(st.sampled_from(["file", "file", "directory", "symlink"]))
        file = File(path, kind, draw(st.integers(0, 0o7777)), draw(st.integers(0, 3)), uid=draw(st.integers(0, 1)))
        if kind == "directory":
            directories.append(path)
        elif kind == "symlink":
            file = replace(file, target=draw(st.sampled_from([b"a", b"../x\xff"])))
        else:
            digest = draw(st.sampled_from(DIGESTS))
            first = draw(st.sampled_from([b"", *(f.path for f in found.values() if f.digest == digest and not f.same)]))
            named = [("user.note", b"\x00\xff"), ("user.\udcff \udcfe", b""), ("user.μ", b"x" * 2000)]
            attributes = tuple(sorted(draw(st.lists(st.sampled_from(named), unique=True))))
            file = replace(
                file, digest=digest, size=CONTENTS[digest].size, key=f"k{len(found)}", same=first, attributes=attributes
            )
        found[path] = file
    return found


def manifest(tree: dict[bytes, File], generation: int = 1) -> Manifest:
    files = tuple(tree[path] for path in sorted(tree))
    return Manifest("recordAAAA01", generation, files, {f.digest: CONTENTS[f.digest] for f in files if f.digest}, ())


@given(trees())
def test_round_trip(tree: dict[bytes, File]) -> None:
    before = replace(manifest(tree), rows=({"uuid": "recordAAAA01", "label": "b\u00e9"},))
    after = parse(dump(before), "recordAAAA01")
    assert after == before
    assert dump(after) == dump(before)


def test_size_counts_each_content_once() -> None:
    digest = next(d for d in DIGESTS if CONTENTS[d].size == 3)
    file = File(b"a", "file", 0o644, 0, 3, digest, "k")
    assert manifest({b"a": file, b"b": replace(file, path=b"b")}).size == 3


def test_digest_of_a_source_that_ends_early() -> None:
    with pytest.raises(EOFError):
        digest_of(lambda offset, length: b"x" * (length - 1), 10)


def body(**over: Any) -> dict[str, Any]:
    """A good manifest as JSON holds it: a directory, a file of two chunks, its hard link, a symlink."""
    content = CONTENTS[next(d for d in DIGESTS if CONTENTS[d].size == CHUNK + 1)]
    common = {"mode": 0o644, "mtime_ns": 1, "uid": 0, "gid": 0}
    chunks = base64.b64encode(content.chunks).decode()
    file = {
        **common,
        "kind": "file",
        "size": content.size,
        "digest": content.digest.hex(),
        "key": "k",
        "chunks": chunks,
    }
    files = [
        {**common, "path": "d", "kind": "directory"},
        {**file, "path": "d/f"},
        {**file, "path": "d/g", "same": 1},
        {**common, "path": "l", "kind": "symlink", "target": "d/f"},
    ]
    return {"format": 1, "uuid": "recordAAAA01", "generation": 3, "rows": [], "files": files, **over}


def test_the_good_one_is_good() -> None:
    assert [f.path for f in parse(json.dumps(body()).encode(), "recordAAAA01").files] == [b"d", b"d/f", b"d/g", b"l"]


def changed(number: int, **over: Any) -> dict[str, Any]:
    good = body()
    good["files"][number] = {**good["files"][number], **over}
    return good


def without(number: int, name: str) -> dict[str, Any]:
    good = body()
    del good["files"][number][name]
    return good


SMALL = {"size": 3, "digest": blake3(b"one").hexdigest()}
LIES: dict[str, Any] = {
    "no object": [],
    "another format": body(format=2),
    "another record": body(uuid="recordBBBB02"),
    "files are no list": body(files={"a": 1}),
    "files are text": body(files="ab"),
    "a file is no object": body(files=[3]),
    "generation is text": body(generation="3"),
    "generation is huge": body(generation=2**70),
    "path leads out": changed(1, path="../f"),
    "path is absolute": changed(1, path="/etc/passwd"),
    "path has a dot": changed(1, path="d/./f"),
    "path is empty": changed(1, path=""),
    "path has NUL": changed(1, path="d/\0"),
    "path is a number": changed(1, path=3),
    "path is bad base64": changed(1, path={"base64": "!"}),
    "name too long": changed(1, path="d/" + "x" * 256),
    "path twice": changed(3, path="d"),
    "parent missing": changed(1, path="e/f"),
    "parent is a file": changed(3, path="d/f/l"),
    "unknown kind": changed(1, kind="device"),
    "kind is a list": changed(1, kind=[]),
    "negative size": changed(1, size=-1),
    "size is infinite": changed(1, size=float("inf")),
    "size is a fraction": changed(1, size=CHUNK + 1.5),
    "size is true": changed(1, size=True),
    "size is another": changed(1, size=CHUNK * 3),
    "digest is short": changed(1, digest="00"),
    "digest is no hex": changed(1, digest="zz" * 32),
    "digest missing": without(1, "digest"),
    "chunks missing": without(1, "chunks"),
    "one chunk too few": changed(1, chunks=base64.b64encode(bytes(32)).decode()),
    "the one chunk is not the content": changed(1, **SMALL, chunks=base64.b64encode(bytes(32)).decode()),
    "one digest, two contents": changed(2, size=CHUNK * 2),
    "one digest, other chunks": changed(2, chunks=base64.b64encode(bytes(64)).decode()),
    "key is a number": changed(1, key=3),
    "key missing": without(1, "key"),
    "link to itself": changed(2, same=2),
    "link to another content": changed(2, **SMALL, chunks=base64.b64encode(blake3(b"one").digest()).decode()),
    "link to a directory": changed(2, same=0),
    "link to nothing": changed(2, same=9),
    "link from the end": changed(2, same=-3),
    "links in a circle": changed(1, same=2),
    "mtime is infinite": changed(1, mtime_ns=float("inf")),
    "mtime is huge": changed(1, mtime_ns=10**30),
    "mode is text": changed(1, mode="644"),
    "uid is negative": changed(1, uid=-1),
    "uid is huge": changed(1, uid=2**40),
    "target has NUL": changed(3, target="a\0b"),
    "target is empty": changed(3, target=""),
    "target missing": without(3, "target"),
    "attribute outside user.": changed(1, attributes={"security.capability": ""}),
    "attribute without a name": changed(1, attributes={"user.": ""}),
    "attribute with NUL": changed(1, attributes={"user.a\0b": ""}),
    "attribute with a long name": changed(1, attributes={"user." + "n" * 251: ""}),
    "attributes without end": changed(1, attributes={"user.a": base64.b64encode(bytes(65_536)).decode()}),
    "attributes are a list": changed(1, attributes=["user.a"]),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_lies_are_refused(lie: Any) -> None:
    with pytest.raises(ManifestError):
        parse(json.dumps(lie).encode(), "recordAAAA01")


@pytest.mark.parametrize("data", [b"", b"\xff", b"{", b"[" * 100_000, b'{"format": 1e999}', b"null"])
def test_what_is_not_a_manifest_is_refused(data: bytes) -> None:
    with pytest.raises(ManifestError):
        parse(data)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.data(), JSON)
def test_any_one_value_changed_is_refused_or_harmless(data: st.DataObject, value: Any) -> None:
    """Whatever stands in whichever place: a ManifestError, or a manifest that keeps its own rules."""
    lie = body()
    place: Any = data.draw(st.sampled_from([lie, *lie["files"]]))
    place[data.draw(st.sampled_from(sorted(place)))] = value
    try:
        parsed = parse(json.dumps(lie).encode())
    except ManifestError:
        return
    again = parse(dump(parsed))
    assert same_tree(again, parsed)
    for file in parsed.files:
        if file.kind == "file":
            content = parsed.contents[file.digest]
            assert content.size == file.size
            assert len(content.chunks) == 32 * content.count


@given(st.integers(0, 400), st.binary(min_size=1, max_size=3))
def test_damaged_bytes_never_surprise(position: int, junk: bytes) -> None:
    data = json.dumps(body()).encode()
    position %= len(data)
    with suppress(ManifestError):
        assert parse(data[:position] + junk + data[position + len(junk) :]).files is not None


# --- merge ---------------------------------------------------------------------------------------------------------

FEW = st.sampled_from([b"a", b"b", b"c", b"n" * 255])


@st.composite
def histories(draw: st.DrawFn) -> tuple[Manifest | None, Manifest, Manifest]:
    """A base and what two hosts made of it."""
    base = draw(trees(FEW))
    sides = []
    for generation in (2, 3):
        fresh, removed = draw(trees(FEW)), draw(st.sets(st.sampled_from([*sorted(base), b"-"])))
        side: dict[bytes, File] = {}
        for path, file in sorted({**base, **fresh}.items()):
            above = path.rpartition(b"/")[0]
            if (path in removed and path not in fresh) or (
                above and getattr(side.get(above), "kind", "") != "directory"
            ):
                continue
            side[path] = file
        for path, file in side.items():
            first = side.get(file.same)
            if file.same and (first is None or first.digest != file.digest or first.same):
                side[path] = replace(file, same=b"")
        sides.append(manifest(side, generation))
    return (manifest(base) if draw(st.booleans()) else None), sides[0], sides[1]


def told(file: File) -> tuple[Any, ...]:
    """What of a file must not be lost."""
    return (file.kind, file.digest, file.target)


@given(histories())
@settings(max_examples=200)
def test_merge_loses_nothing_of_either_side(history: tuple[Manifest | None, Manifest, Manifest]) -> None:
    base, ours, theirs = history
    before = {file.path: told(file) for file in base.files} if base else {}
    merged = merge(base, ours, theirs)
    result = merged.manifest.by_path()
    parse(dump(merged.manifest))  # it can be published, and read by whoever reads it
    for file in ours.files:
        if before.get(file.path) != told(file):
            assert told(result[file.path]) == told(file), "ours stays under its own name"
    there = {told(file) for file in result.values()}
    for file in theirs.files:
        if before.get(file.path) != told(file) and file.kind != "directory":
            assert told(file) in there, "theirs is somewhere"
            at_its_name = result.get(file.path)
            assert (at_its_name is not None and told(at_its_name) == told(file)) or merged.clashes
    for digest in {file.digest for file in merged.manifest.files if file.digest}:
        assert digest in merged.manifest.contents


@given(histories())
def test_merge_says_what_must_appear_here(history: tuple[Manifest | None, Manifest, Manifest]) -> None:
    base, ours, theirs = history
    merged = merge(base, ours, theirs)
    mine, result = ours.by_path(), merged.manifest.by_path()
    taken = {file.path for file in merged.taken}
    for path, file in result.items():
        if path not in mine:
            assert path in taken or file.kind == "directory"
    for _path, second in merged.clashes:
        assert second not in mine
        assert second in result


@given(histories())
def test_merge_keeps_one_sides_work_as_it_is(history: tuple[Manifest | None, Manifest, Manifest]) -> None:
    base, ours, _theirs = history
    if base is not None:
        assert same_tree(merge(base, ours, base).manifest, ours)
        assert not merge(base, ours, base).taken
    assert same_tree(merge(base, ours, ours).manifest, ours)
    assert not merge(base, ours, ours).clashes


def one(path: bytes, data: bytes, mtime: int = 0, **over: Any) -> File:
    digest = blake3(data).digest()
    CONTENTS.setdefault(digest, Content(digest, len(data), digest if data else b""))
    return replace(File(path, "file", 0o644, mtime, len(data), digest, "k"), **over)


def tree_of(*files: File) -> Manifest:
    return manifest({file.path: file for file in files})


def test_both_changed_a_file() -> None:
    merged = merge(tree_of(one(b"a", b"one")), tree_of(one(b"a", b"two")), tree_of(one(b"a", b"three")))
    second = b"a.conflict-" + blake3(b"three").hexdigest()[:8].encode()
    assert merged.clashes == ((b"a", second),)
    assert {f.path: f.digest for f in merged.manifest.files} == {
        b"a": blake3(b"two").digest(),
        second: blake3(b"three").digest(),
    }


def test_one_removed_what_the_other_changed() -> None:
    base, empty, new = tree_of(one(b"a", b"one")), tree_of(), tree_of(one(b"a", b"two"))
    assert same_tree(merge(base, empty, new).manifest, new)
    assert same_tree(merge(base, new, empty).manifest, new)


def test_other_times_of_the_same_content_are_no_clash() -> None:
    """Two hosts that copied a record each with its own times, and a user of its own."""
    ours, theirs = tree_of(one(b"a", b"one", 1)), tree_of(one(b"a", b"one", 2, uid=7))
    merged = merge(None, ours, theirs)
    assert not merged.clashes
    assert same_tree(merged.manifest, ours)


@pytest.mark.parametrize("swap", [False, True])
def test_a_directory_here_and_a_file_there(swap: bool) -> None:
    directory = tree_of(File(b"d", "directory", 0o755, 0), one(b"d/x", b"two"))
    file = tree_of(one(b"d", b"three"))
    ours, theirs = (file, directory) if swap else (directory, file)
    merged = merge(None, ours, theirs)
    parse(dump(merged.manifest))
    assert {f.digest for f in merged.manifest.files if f.digest} == {blake3(b"two").digest(), blake3(b"three").digest()}
    assert all(merged.manifest.by_path()[f.path] == f for f in ours.files)


def test_a_clash_of_the_longest_name_has_a_name_that_can_be() -> None:
    name = b"n" * 255
    merged = merge(None, tree_of(one(name, b"one")), tree_of(one(name, b"two")))
    assert len(parse(dump(merged.manifest)).files) == 2


def test_a_clash_does_not_take_a_name_that_is_in_use() -> None:
    second = b"a.conflict-" + blake3(b"two").hexdigest()[:8].encode()
    ours = tree_of(one(b"a", b"one"), one(second, b"three"))
    merged = merge(None, ours, tree_of(one(b"a", b"two")))
    assert {f.digest for f in merged.manifest.files} == {blake3(d).digest() for d in (b"one", b"two", b"three")}


CASES: dict[str, Callable[[], tuple[Manifest, Manifest]]] = {
    "theirs broke the link": lambda: (
        tree_of(one(b"a", b"one"), one(b"b", b"one", same=b"a")),
        tree_of(one(b"a", b"two"), one(b"b", b"one")),
    ),
    "theirs linked what clashes": lambda: (
        tree_of(one(b"a", b"three")),
        tree_of(one(b"a", b"two"), one(b"b", b"two", same=b"a")),
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_hard_links_after_a_merge_are_true(case: Callable[[], tuple[Manifest, Manifest]]) -> None:
    ours, theirs = case()
    base = tree_of(one(b"a", b"one"), one(b"b", b"one", same=b"a"))
    parse(dump(merge(base, ours, theirs).manifest))
