"""JSON that stores and records hold: manifests, headers, models, edges, items, control requests."""

import base64
import json
import os
import resource
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daemon.protocol import decode_request, encode, error_from
from tests.core.making import write_record
from tests.fuzz.hostile import WORST, documents, dumped, spoiled, values
from vfs import index, ingest, manifest
from vfs.errors import DamagedRecord, ManifestError, RunfsError, UsageError
from vfs.format import marker_time, parse_header, run_status
from vfs.manifest import CHUNK, Content, File, Manifest
from vfs.objects import format as objects

fuzz = settings.get_profile("fuzz")
MOST_MEMORY = 700 << 20  # bytes more than before, for an input of ten million

_chunks = bytes(range(32)) * 2
_big = Content(bytes(32), CHUNK + 1, _chunks)
SOUND = json.loads(
    manifest.dump(
        Manifest(
            "recordAAAA01",
            3,
            (
                File(b"a", "file", 0o644, 1, 0, bytes(31) + b"\1", "recordAAAA01/a"),
                File(b"big", "file", 0o644, 1, _big.size, _big.digest, "k", attributes=(("user.x", b"1"),)),
                File(b"d", "directory", 0o755, 1),
                File(b"d/l", "symlink", 0o777, 1, target=b"../a"),
                File(b"d/same", "file", 0o644, 1, _big.size, _big.digest, "k", same=b"big"),
                File(b"\xff", "other", 0o644, 1),
            ),
            {_big.digest: _big},
            ({"record_id": "recordAAAA01", "label": None},),
            5,
            "notes",
        )
    )
)
HEADER = {
    "format": 1,
    "uuid": "recordAAAA01",
    "kind": "Interface",
    "identity_key": "i",
    "predicate_key": "p",
    "parent": None,
}
MODEL = {
    "uuid": "recordAAAA01", "kind": "Execution", "module": "m", "version": ["~v", {"a": 1}], "predicate": {"a": 1},
    "config": {"lr": 0.1, "_default_": {}, "_version_": [], "_update_": {}}, "inherits": ["x"], "context": [1],
    "created_at_ns": 5, "created_by": "me", "label": None, "seed": 4, "nickname": "n", "resources": {"cpu": 1},
}  # fmt: skip
EDGES = [{"name": "uses", "uuid": "recordAAAA01", "related_uuid": "b"}]
ITEM = {
    "format": 1, "bucket": "b", "name": "n", "next": 3,
    "versions": [{"number": 1, "id": "0" * 32, "size": 3, "created_ns": 4, "digest": "00" * 32, "chunks": "",
                  "metadata": {}}],
    "pending": [{"transaction": "t", "kind": "remove", "ids": ["0" * 32]}],
}  # fmt: skip


def short(error: RunfsError) -> None:
    """A message is for people, and goes into logs: it repeats no megabytes."""
    assert len(str(error)) < 2000


def test_the_sound_ones_are_sound(tmp_path: Path) -> None:
    """Else nothing below is tried but the first check."""
    assert manifest.parse(dumped(SOUND), "recordAAAA01").generation == 3
    assert parse_header(dumped(HEADER)).uuid == "recordAAAA01"
    assert objects.parse(dumped(ITEM)).next == 3
    entry = _entry(tmp_path, dumped(HEADER), dumped(MODEL), dumped(EDGES[0]))
    assert entry is not None
    assert entry.edges
    assert not entry.problems


@fuzz
@given(documents(SOUND))
def test_manifest(data: bytes) -> None:
    try:
        found = manifest.parse(data, "recordAAAA01")
    except ManifestError as error:
        short(error)
        return
    for file in found.files:
        assert not os.path.isabs(file.path)
        assert b".." not in file.path.split(b"/")
        assert not any(name.startswith("user.runfs.") for name, _value in file.attributes)
        assert manifest.foreign(file).mode & 0o6000 == 0 or file.kind in ("directory", "symlink")
    again = manifest.parse(manifest.dump(found), "recordAAAA01")
    assert manifest.same_tree(found, again)


@fuzz
@given(spoiled(SOUND), spoiled(SOUND), st.booleans())
def test_merge(ours: Any, theirs: Any, based: bool) -> None:
    """Two manifests that parse can be merged, and what results parses: it will be published."""
    try:
        one, two = (manifest.parse(dumped(each), "recordAAAA01") for each in (ours, theirs))
    except ManifestError:
        return
    base = manifest.parse(dumped(SOUND)) if based else None
    manifest.parse(manifest.dump(manifest.merge(base, one, two).manifest))


@fuzz
@given(documents(HEADER))
def test_header(data: bytes) -> None:
    try:
        found = parse_header(data)
    except DamagedRecord:
        return
    assert "/" not in found.uuid
    assert found.uuid not in ("", ".", "..")


def _entry(place: Path, header: bytes, model: bytes, edges: bytes, stamp: bytes = b"") -> ingest.Entry | None:
    record = place / "record"
    if not record.exists():
        write_record(record, "recordAAAA01", {b"related/x": b""})
    (record / "id.json").write_bytes(header)
    (record / "model.json").write_bytes(model)
    (record / "related" / "metadata.jsonl").write_bytes(edges)
    (record / "updated_at").write_bytes(stamp)
    (record / "heartbeat_at").write_bytes(stamp)
    return ingest.read_entry(record)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@fuzz
@given(
    header=st.one_of(st.just(dumped(HEADER)), documents(HEADER)),
    model=documents(MODEL),
    edges=st.lists(documents(EDGES[0]), max_size=3).map(b"\n".join),
    stamp=st.one_of(st.binary(max_size=40), st.text(alphabet="0123456789-:TZ+. \n", max_size=40).map(str.encode)),
)
def test_record_directory(place: Path, header: bytes, model: bytes, edges: bytes, stamp: bytes) -> None:
    """What can be read can be indexed too."""
    try:
        entry = _entry(place, header, model, edges, stamp)
    except DamagedRecord:
        return
    run_status(place / "record")
    marker_time(stamp, "resumed_at")
    if entry is None:
        return
    with index.Index.open(place / f"{os.urandom(6).hex()}.sqlite", create=True) as opened:
        done = opened.reindex([str(place / "record")])
        assert done.ingested or done.damaged
        for record in opened.page():
            opened.rows([record.uuid])


@fuzz
@given(documents(ITEM))
def test_item_records(data: bytes) -> None:
    for parse in (objects.parse, objects.parse_items, lambda raw: objects.parse_bucket(raw, "k")):
        try:
            parse(data)
        except RunfsError as error:
            short(error)


@fuzz
@given(documents({"command": "status", "args": {"uuids": ["a"], "timeout": 3}}))
def test_control_request(data: bytes) -> None:
    try:
        request = decode_request(data)
    except UsageError:
        return
    encode({"result": request.args})


@fuzz
@given(st.dictionaries(st.sampled_from(["type", "message", "exit"]), values))
def test_answer(message: dict[str, Any]) -> None:
    """A daemon of another version, or what somebody listens in its place."""
    assert isinstance(error_from(message), RunfsError)


@pytest.mark.parametrize("name", WORST)
@pytest.mark.parametrize("parser", ["manifest", "header", "model", "edges", "item", "request"])
def test_the_worst(tmp_path: Path, name: str, parser: str) -> None:
    data = WORST[name]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    calls: dict[str, Any] = {
        "manifest": lambda: manifest.parse(data, "recordAAAA01"),
        "header": lambda: parse_header(data),
        "model": lambda: _entry(tmp_path, dumped(HEADER), data, b""),
        "edges": lambda: _entry(tmp_path, dumped(HEADER), dumped(MODEL), data),
        "item": lambda: objects.parse(data),
        "request": lambda: decode_request(data),
    }
    try:
        calls[parser]()
    except RunfsError as error:
        short(error)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before < MOST_MEMORY


# --- what was found, by name ---------------------------------------------------------------------------------------


def spoil(**changes: Any) -> bytes:
    """A sound manifest with parts of its first file exchanged."""
    body = json.loads(dumped(SOUND))
    body["files"][0].update(changes)
    return dumped(body)


@pytest.mark.parametrize(
    "data",
    [
        spoil(mode=True),
        spoil(mtime_ns=2**63),
        spoil(size=-1),
        spoil(size=1.0),
        spoil(kind=["file"]),
        spoil(kind={}),
        spoil(digest=5),
        spoil(digest="zz" * 32),
        spoil(key="\ud800"),
        spoil(path={"base64": "\ud800"}),
        spoil(path="\ud800\udfff" * 100),
        spoil(attributes=[]),
        spoil(attributes={"user.runfs.content": "AAAA"}),
        spoil(attributes={"user.x": 5}),
        spoil(same=-1),
        spoil(same=10**30),
    ],
)
def test_manifests_that_were_tried_by_hand(data: bytes) -> None:
    try:
        found = manifest.parse(data)
    except ManifestError:
        return
    assert manifest.parse(manifest.dump(found)) == found


def test_a_chunk_list_that_is_no_base64() -> None:
    body = json.loads(dumped(SOUND))
    body["files"][1]["chunks"] = base64.b64encode(_chunks).decode() + "!"
    with pytest.raises(ManifestError):
        manifest.parse(dumped(body))
