"""Stores that go wrong, and what may be in one: each failure has a sentence and an exit code, nothing is lost or
written outside, and no secret is shown. On real mounts; remote stores are SeaweedFS, behind a proxy that misbehaves.
"""

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults import FaultProxy
from tests.mounted.records import ask, evict, tree, until
from tests.mounted.trouble import empty_project, lines, resize, small_disk
from tests.mounting import Mounted
from tests.projects import Project
from tests.servers import Seaweed
from vfs.stores import open_store

pytestmark = pytest.mark.mounted
MIB = 1 << 20
MANUAL = ("-o", "push.auto=false,deadline_s=2")
Make = Callable[..., Project]
Mount = Callable[..., Mounted]


@pytest.fixture
def prefix() -> str:
    return "t-" + os.urandom(6).hex()


@pytest.fixture
def small(make_project: Make) -> Project:
    return make_project(runs=2, size=300_000, report=False)


@pytest.fixture
def before(small: Project) -> dict[str, Any]:
    return {uuid: tree(small.directory(uuid)) for uuid in small.runs}


def said_of(mounted: Mounted, *arguments: str, code: int) -> str:
    return "\n".join(lines(mounted.runfs(*arguments), code))


# --- stores that do not answer ------------------------------------------------------------------------------------


@pytest.fixture
def proxy(seaweed: Seaweed) -> Iterator[FaultProxy]:
    with FaultProxy(seaweed.port) as between:
        yield between


@pytest.mark.parametrize(
    ("mode", "words", "errors"),
    [
        ("refuse", ["no connection to", "is it running, and the network up?"], (errno.EHOSTUNREACH, errno.EIO)),
        ("silent", ["runfs stores tries it"], (errno.ETIMEDOUT, errno.EIO)),
    ],
)
def test_store_that_does_not_answer(
    seaweed: Seaweed,
    proxy: FaultProxy,
    mount: Mount,
    small: Project,
    before: dict[str, Any],
    prefix: str,
    mode: str,
    words: list[str],
    errors: tuple[int, ...],
) -> None:
    one, two = small.runs
    proxy.set(mode)
    url = f"lab=s3://{seaweed.bucket}/{prefix}?endpoint={proxy.endpoint}&region={seaweed.region}"
    mounted = mount(small, stores=[url], options=MANUAL, environment=seaweed.environment())
    assert {one, two} <= set(os.listdir(mounted.path))
    assert tree(mounted.path / one) == before[one]
    with (mounted.path / one / "notes" / "new.txt").open("w") as file:
        file.write("written with no store")
    before[one] = tree(small.directory(one))
    for command in ("push", "evict"):
        began = time.monotonic()
        said = said_of(mounted, command, one, code=1)
        assert time.monotonic() - began < 20
        assert said.startswith(f"{one}: not {command}ed"), said
        assert all(text in said for text in ["lab", *words]), said
    assert not small.directory(one).is_symlink()
    assert said_of(mounted, "safe", one, code=1).startswith("not yet: ")
    assert any("lab" in line and "not reachable" in line for line in lines(mounted.runfs("stores"), 1))
    proxy.set("pass")
    evict(mounted, one)
    assert small.directory(one).is_symlink()
    proxy.set(mode)
    began = time.monotonic()
    assert [path.stat().st_size for path in sorted((mounted.path / one).iterdir())]
    assert (mounted.path / one / "notes" / "new.txt").read_text() == "written with no store"
    assert time.monotonic() - began < 1
    with pytest.raises(OSError, match=r".") as caught:
        (mounted.path / one / "weights.npy").read_bytes()
    assert caught.value.errno in errors
    assert "weights.npy" in mounted.log()
    proxy.set("pass")
    assert tree(mounted.path / one) == before[one]
    assert said_of(mounted, "safe", one, code=0).startswith("safe")


def readable(path: Path) -> bool:
    """A reader may still meet a flight that began before."""
    try:
        return path.read_bytes() is not None
    except OSError:
        return False


def test_directory_store_whose_disk_is_not_there(mount: Mount, small: Project, tmp_path: Path) -> None:
    """A path that cannot be made, and one that was a store and is empty now."""
    one, two = small.runs
    mounted = mount(small, stores=[f"lab=file://{tmp_path}/none/here/store"], options=MANUAL)
    said = said_of(mounted, "push", one, code=1)
    assert f"{tmp_path}/none/here/store cannot be opened" in said
    assert "is the disk mounted?" in said
    mounted.stop()
    mounted = mount(small, "again", stores=[f"attic=file://{tmp_path}/store"], options=MANUAL)
    content = (mounted.path / one / "weights.npy").read_bytes()
    evict(mounted, one)
    (tmp_path / "store").rename(tmp_path / "away")
    (tmp_path / "store").mkdir()
    for command in ("push", "evict"):
        said = said_of(mounted, command, two, code=1)
        assert "was a store" in said
        assert "is the disk mounted?" in said
    with pytest.raises(OSError, match=r"Input/output error|No route to host"):
        (mounted.path / one / "weights.npy").read_bytes()
    assert os.listdir(tmp_path / "store") == []
    (tmp_path / "store").rmdir()
    (tmp_path / "away").rename(tmp_path / "store")
    until(lambda: readable(mounted.path / one / "weights.npy"), "the bytes come from the store that is there again")
    assert (mounted.path / one / "weights.npy").read_bytes() == content


def test_store_that_is_full(mount: Mount, make_project: Make, tmp_path: Path) -> None:
    project = make_project(runs=1, size=9 * MIB, report=False)
    (one,) = project.runs
    before = tree(project.directory(one))
    with small_disk(tmp_path / "disk", "6m") as disk:
        mounted = mount(project, stores=[f"lab=file://{disk}/store"], options=MANUAL)
        for command in ("push", "evict"):
            said = said_of(mounted, command, one, code=1)
            assert "No space left" in said
            assert "make room there or use another store" in said
        assert "not yet" in said_of(mounted, "safe", one, code=1)
        assert tree(project.directory(one)) == before
        assert not list(disk.rglob("manifest.json"))
        resize(disk, "40m")
        evict(mounted, one)
        assert project.directory(one).is_symlink()
        assert tree(mounted.path / one) == before
        mounted.stop()


# --- credentials --------------------------------------------------------------------------------------------------

SECRET = "Zq7-not-the-right-secret-8Kx"


def everything_shown(mounted: Mounted, places: Path, *config: str) -> dict[str, str]:
    """All that somebody else could see of a mount: answers, log, process list, state."""
    shown = {}
    for arguments in (
        ["status", "--json"], ["stores", "--json"], ["doctor"], ["push", "--json"],
        ["config", "show", "--json", *config], ["config", "show", *config],
    ):  # fmt: skip
        done = mounted.runfs(*arguments)
        shown[" ".join(arguments)] = done.stdout + done.stderr
    shown["log"] = mounted.log()
    shown["process list"] = Path(f"/proc/{mounted.pid}/cmdline").read_text()
    for directory in ("s", "r", "c"):
        for path in (places / directory).rglob("*"):
            if path.is_file() and not path.is_socket():
                shown[str(path)] = path.read_bytes().decode("latin-1")
    return shown


@pytest.mark.parametrize("given", ["unknown key", "configuration"])
def test_wrong_credentials(
    seaweed: Seaweed, mount: Mount, small: Project, before: dict[str, Any], prefix: str, tmp_path: Path, given: str
) -> None:
    one, _two = small.runs
    key = "NOSUCHKEY" if given == "unknown key" else seaweed.access_key
    url = f"s3://{seaweed.bucket}/{prefix}?endpoint={seaweed.endpoint}&region={seaweed.region}"
    file = tmp_path / "runfs.toml"
    options = f"access_key_id = '{key}'\nsecret_access_key = '{SECRET}'\n"
    file.write_text(f"[stores.lab]\nurl = '{url}'\n[stores.lab.options]\n{options}")
    file.chmod(0o600)
    if given == "configuration":
        mounted = mount(small, options=[*MANUAL, "--config", str(file)])
    else:
        environment = {"AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": SECRET}
        mounted = mount(small, stores=[f"lab={url}"], options=MANUAL, environment=environment)
    assert tree(mounted.path / one) == before[one]
    for command in ("push", "evict"):
        said = said_of(mounted, command, one, code=1)
        assert "refused (" in said
        assert "check the credentials (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)" in said, said
    assert said_of(mounted, "safe", one, code=1).startswith("not yet: ")
    assert not small.directory(one).is_symlink()
    shown = everything_shown(mounted, tmp_path, "--config", str(file), "--project", str(small.path))
    assert "refused" in shown["push --json"]
    assert not [where for where, text in shown.items() if SECRET in text]


def test_no_credentials_and_some_that_may_not_write(
    seaweed: Seaweed, mount: Mount, small: Project, prefix: str, tmp_path: Path
) -> None:
    one, _two = small.runs
    url = f"lab=s3://{seaweed.bucket}/{prefix}?endpoint={seaweed.endpoint}&region={seaweed.region}"
    mounted = mount(small, stores=[url], options=MANUAL)
    assert "AWS_ACCESS_KEY_ID" in said_of(mounted, "push", one, code=1)
    mounted.stop()
    reader = {"AWS_ACCESS_KEY_ID": seaweed.reader_key, "AWS_SECRET_ACCESS_KEY": seaweed.reader_secret}
    mounted = mount(small, "again", stores=[url], options=MANUAL, environment=reader)
    said = said_of(mounted, "push", one, code=1)
    assert "refused (AccessDenied); these credentials may not do that" in said
    assert said_of(mounted, "evict", one, code=1).startswith(f"{one}: not evicted")
    assert seaweed.reader_secret not in mounted.log()


# --- manifests ----------------------------------------------------------------------------------------------------


def published(store: Path, uuid: str) -> Path:
    return store / ".runfs" / uuid / "manifest.json"


def changed(change: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    def apply(body: bytes) -> bytes:
        value = json.loads(body)
        change(value)
        return json.dumps(value).encode()

    return apply


def _first_file(body: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = next(file for file in body["files"] if file["kind"] == "file")
    return found


BAD: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "garbage": (lambda _body: b"\x00\xffnonsense", "is not JSON"),
    "cut": (lambda body: body[: len(body) // 2], "is not JSON"),
    "list": (lambda _body: b"[1, 2]", "no format this version of runfs knows"),
    "newer": (changed(lambda body: body.update(format=99)), "upgrade runfs"),
    "another": (changed(lambda body: body.update(uuid="anotherrecord")), "is of record 'anotherrecord'"),
    "outside": (changed(lambda body: _first_file(body).update(path="../../../outside")), "not a plain relative path"),
    "absolute": (changed(lambda body: _first_file(body).update(path="/etc/passwd")), "not a plain relative path"),
    "twice": (changed(lambda body: body["files"].append(body["files"][-1])), "appears twice"),
    "key": (changed(lambda body: _first_file(body).update(key="x\nhidden")), "its object's name is no text"),
    "size": (changed(lambda body: _first_file(body).update(size=-1)), "size is -1"),
}


def test_manifests_that_cannot_be(mount: Mount, small: Project, before: dict[str, Any], tmp_path: Path) -> None:
    """Of a record that is here: neither merged nor overwritten, and nothing is dropped on their word."""
    one, two = small.runs
    store = tmp_path / "store"
    mounted = mount(small, stores=[f"lab={store.as_uri()}"], options=MANUAL)
    mounted.json("push")
    good = published(store, one).read_bytes()
    for harm, (change, says) in BAD.items():
        bad = change(good)
        published(store, one).write_bytes(bad)
        told = ask(mounted, "evict", uuids=[one])
        assert (told["exit"], told["evicted"]) == (1, []), harm
        (small.directory(one) / "more.txt").write_text(harm)
        told = ask(mounted, "push")
        assert told["exit"] == 1
        assert [(each["uuid"], each["store"]) for each in told["failed"]] == [(one, "lab")], harm
        assert says in told["failed"][0]["reason"], harm
        told = ask(mounted, "verify", uuids=[one])
        assert says in told["bad"][0]["reason"], harm
        told = ask(mounted, "reindex", **{"from": [store.as_uri()]})
        assert [says in each["reason"] for each in told["damaged"]] == [True], harm
        told = ask(mounted, "import", source=store.as_uri(), dry_run=True)
        assert [each for each in told["failed"] if says in each["reason"]], harm
        assert published(store, one).read_bytes() == bad
        assert not small.directory(one).is_symlink()
        (small.directory(one) / "more.txt").unlink()
    said = said_of(mounted, "reindex", "--from", store.as_uri(), code=1)
    assert f"{store.as_uri()}/.runfs/{one}/manifest.json: size is -1" in said
    assert not list(tmp_path.rglob("outside"))
    assert tree(small.directory(one)) == before[one]
    assert tree(mounted.path / two) == before[two]


def test_manifest_that_names_objects_that_are_not_there(
    mount: Mount, small: Project, before: dict[str, Any], tmp_path: Path
) -> None:
    one, two = small.runs
    store = tmp_path / "store"
    mounted = mount(small, stores=[f"lab={store.as_uri()}"], options=["-o", "push.auto=false,proof.max_age=0"])
    mounted.json("push")
    evict(mounted, two)
    for uuid in (one, two):
        (store / uuid / "weights.npy").unlink()
    said = said_of(mounted, "evict", one, code=1)
    assert said.startswith(f"{one}: not evicted: 0 of 1 copies are proven (lab: ")
    assert "weights.npy: there is no such object" in said
    assert not small.directory(one).is_symlink()
    mounted.json("push")  # it is here: it is brought again
    assert (store / one / "weights.npy").exists() or list((store / ".runfs" / one).rglob("data/*"))
    evict(mounted, one)
    assert tree(mounted.path / one) == before[one]
    with pytest.raises(OSError, match=r"Input/output error"):
        (mounted.path / two / "weights.npy").read_bytes()
    assert "there is no such object" in mounted.log()
    assert (mounted.path / two / "metrics.json").read_bytes()
    said = said_of(mounted, "verify", two, code=1)
    assert "weights.npy" in said
    assert f"{two}: not evicted" in said_of(mounted, "evict", two, code=1)


# --- places and keys that a store makes up ------------------------------------------------------------------------


def row_of(body: dict[str, Any], uuid: str) -> dict[str, Any]:
    found: dict[str, Any] = next(row for row in body["rows"] if row["record_id"] == uuid)
    return found


@pytest.mark.parametrize("command", ["reindex", "import"])
def test_rows_with_places_of_the_stores_choice(mount: Mount, small: Project, tmp_path: Path, command: str) -> None:
    """A row may not make the mount show, or push, a directory of this machine; nor get a link made there."""
    one, two = small.runs
    private, store = tmp_path / "private", tmp_path / "store"
    (private / "keys").mkdir(parents=True)
    (private / "keys" / "id_rsa").write_text("a private key")
    with Mounted(small, tmp_path / "mnt", stores=[store.as_uri()], options=MANUAL) as mounted:
        content = (mounted.path / one / "weights.npy").read_bytes()
        mounted.json("push")

    def lie(body: dict[str, Any]) -> None:
        row_of(body, one).update(storage_uri=f"{private.as_uri()}/run/here", local_uri=None)
        stranger = {**row_of(body, one), "record_id": "stranger", "parent_id": None, "relations": []}
        body["rows"].append({**stranger, "storage_uri": f"{private.as_uri()}/keys"})
        nested = {**stranger, "record_id": "nestedone", "parent_id": one}
        body["rows"].append({**nested, "storage_uri": f"{private.as_uri()}/keys"})
        body["rows"].append({**nested, "record_id": "../evil", "storage_uri": f"{private.as_uri()}/keys"})

    published(store, one).write_bytes(changed(lie)(published(store, one).read_bytes()))
    shutil.rmtree(small.path)
    other = empty_project(tmp_path / "other")
    seen = sorted(private.rglob("*"))
    mounted = mount(other, "theirs", stores=[store.as_uri()], options=["-o", "push.quiet_s=0"])
    mounted.runfs(*([command, "--from", store.as_uri()] if command == "reindex" else [command, store.as_uri()]))
    assert (mounted.path / one / "weights.npy").read_bytes() == content
    assert {one, two} <= set(os.listdir(mounted.path))
    for name in ("stranger", "nestedone", "evil"):
        assert not (mounted.path / name).exists()
    assert other.directory(one).is_relative_to(other.path)
    mounted.runfs("push")
    assert sorted(private.rglob("*")) == seen
    assert not [path for path in store.rglob("*") if path.is_file() and b"private key" in path.read_bytes()]


KEYS = [
    "../../etc/passwd",
    "{uuid}/../x",
    "/etc/passwd",
    "{uuid}//y",
    "{uuid}/a",
    "{uuid}/a/b",
    "{uuid}/./z",
    "../{uuid}/id.json",
    "{uuid}/.",
]


def test_keys_that_lead_outside(mount: Mount, small: Project, before: dict[str, Any], tmp_path: Path) -> None:
    """Put where a directory store keeps keys that cannot be paths, in a record that another tool uploaded."""
    one, two = small.runs
    store = tmp_path / "store"
    with Mounted(small, tmp_path / "mnt", stores=[store.as_uri()], options=MANUAL) as mounted:
        mounted.json("push")
    shutil.rmtree(small.path)
    published(store, one).unlink()  # one is plain objects now; two has its manifest
    hidden = store / ".runfs.alt"
    hidden.mkdir()
    for key in KEYS:
        (hidden / key.format(uuid=one).replace("/", "+")).write_text("planted")
    other = empty_project(tmp_path / "other")
    outside = sorted(path for path in tmp_path.rglob("*") if not path.is_relative_to(other.path))
    mounted = mount(other, "theirs", stores=[f"lab={store.as_uri()}"], options=MANUAL)
    done = mounted.json("import", store.as_uri(), exit_code=1)
    assert done["imported"] == [two]
    (failed,) = done["failed"]
    assert failed["source"] == one
    assert f"{one}/a" in failed["reason"]
    assert "a file and a directory at once; remove or rename one of the two" in failed["reason"]
    assert not list(other.path.rglob(".runfs-import*"))
    (hidden / f"{one}+a+b").unlink()
    done = mounted.json("import", store.as_uri(), exit_code=None)
    assert one in done["imported"], done
    found = {path: seen[-1] for path, seen in tree(mounted.path / one).items() if isinstance(seen[-1], str)}
    wanted = {path: seen[-1] for path, seen in before[one].items() if isinstance(seen[-1], str)}
    assert found == wanted | {b"a": hashlib.sha256(b"planted").hexdigest()}
    assert tree(mounted.path / two) == before[two]
    new = {path for path in tmp_path.rglob("*") if not path.is_relative_to(other.path)} - set(outside)
    places = [tmp_path / name for name in ("s", "c", "r", "theirs", "theirs.log", "store")]
    assert not [path for path in new if not any(path.is_relative_to(place) for place in places)]


def test_manifest_whose_objects_have_names_that_cannot_be(mount: Mount, small: Project, tmp_path: Path) -> None:
    one, _two = small.runs
    store = tmp_path / "store"
    with Mounted(small, tmp_path / "mnt", stores=[store.as_uri()], options=MANUAL) as mounted:
        mounted.json("push")
    lies = {
        "weights.npy": "../../../etc/passwd",
        "metrics.json": "/etc/passwd",
        "model.json": "",
        "notes/by step/0.txt": "a//b",
        "notes/by step/1.txt": ".runfs-store",
        "notes/by step/2.txt": f".runfs/{one}/../../../../etc/passwd",
    }

    def lie(body: dict[str, Any]) -> None:
        for file in body["files"]:
            file.update({"key": lies[file["path"]]} if file["path"] in lies else {})

    published(store, one).write_bytes(changed(lie)(published(store, one).read_bytes()))
    shutil.rmtree(small.path)
    other = empty_project(tmp_path / "other")
    mounted = mount(other, "theirs", stores=[f"lab={store.as_uri()}"], options=MANUAL)
    mounted.json("reindex", "--from", store.as_uri(), exit_code=None)
    assert (mounted.path / one / "id.json").read_bytes()
    for path in lies:
        with pytest.raises(OSError, match=r"Input/output error"):
            (mounted.path / one / path).read_bytes()
    assert "weights.npy" in said_of(mounted, "verify", one, code=1)
    assert f"{one}: not hydrated: " in said_of(mounted, "hydrate", one, code=1)
    assert "Traceback" not in mounted.log()
    assert "root:" not in mounted.log()


# --- names --------------------------------------------------------------------------------------------------------

NAMES = [
    b"\xff\xfe not utf-8 \x80",
    "é composed".encode(),
    "é decomposed".encode(),
    b"line\nbreak\r\ttab",
    b"back\\slash",
    b"percent%2Fslash",
    b"percent%2fslash",
    b"trailing",
    b"trailing ",
    b" trailing",
    b"trailing.",
    b"...",
    b"-rf *",
    b"'\"$(touch owned)`",
    b"CON",
    b"case",
    b"CASE",
    b"+=&?#@:;,",
    b"%_",
    b"%-" + b"a" * 64,
    b".runfs",
    b".by",
    b"n" * 255,
    b"\xff" * 255,
    b" " * 255,
    b"d/" + b"e" * 255,
    b"d /" + b"e" * 255,
    b".runfs-x/%2E%2E",
    b"/".join([b"deep directory"] * 60 + [b"leaf"]),
    b"/".join([b"\xe2\x82\xac" * 80] * 12 + [b"leaf"]),
]


@pytest.mark.parametrize("kind", ["file", "s3"])
def test_names_come_back_byte_for_byte(
    request: pytest.FixtureRequest, mount: Mount, make_project: Make, prefix: str, tmp_path: Path, kind: str
) -> None:
    project = make_project(runs=1, size=1000, report=False)
    (one,) = project.runs
    for number, name in enumerate(NAMES):
        path = os.path.join(os.fsencode(project.directory(one)), name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(b"%d " % number * 30_000)
    os.symlink(b"\xff" * 300 + b"/../nowhere", os.path.join(os.fsencode(project.directory(one)), b"link \xff"))
    before = tree(project.directory(one), times=True)
    assert len(before) > len(NAMES)
    if kind == "file":
        url, environment = (tmp_path / "store").as_uri(), {}
    else:
        seaweed: Seaweed = request.getfixturevalue("seaweed")
        url = f"s3://{seaweed.bucket}/{prefix}?endpoint={seaweed.endpoint}&region={seaweed.region}"
        environment = seaweed.environment()
    mounted = mount(project, stores=[f"lab={url}"], environment=environment, options=["-o", "push.auto=false"])
    evict(mounted, one)
    assert project.directory(one).is_symlink()
    assert tree(mounted.path / one, times=True) == before
    mounted.json("hydrate", "--restore", one)
    assert not project.directory(one).is_symlink()
    assert tree(project.directory(one), times=True) == before
    assert mounted.json("verify", "--deep", one)["bad"] == []
    assert not list(tmp_path.rglob("owned"))
    if kind == "file":
        with_manifest = open_store(url)
        assert len(list(with_manifest.list(f"{one}/"))) >= len(NAMES)
        with_manifest.disconnect()


@pytest.mark.parametrize("length", [3600, 4000, 5000])
def test_paths_longer_than_the_system_takes(mount: Mount, make_project: Make, tmp_path: Path, length: int) -> None:
    """With the directory before it such a path is too long for a system call: evicted whole, or refused, never half."""
    project = make_project(runs=1, size=300_000, report=False)
    (one,) = project.runs
    parts = [b"d" * 199] * (length // 200)
    here = os.open(project.directory(one), os.O_PATH)
    for part in parts:
        os.mkdir(part, dir_fd=here)
        below = os.open(part, os.O_PATH, dir_fd=here)
        os.close(here)
        here = below
    name = b"f" * (length - 200 * len(parts) or 1)
    with open(os.open(name, os.O_WRONLY | os.O_CREAT, 0o644, dir_fd=here), "wb") as file:
        file.write(b"deep" * 50_000)
    os.close(here)
    before = set(everything(project.directory(one)))
    mounted = mount(project, stores=[f"lab={(tmp_path / 'store').as_uri()}"], options=MANUAL)
    done = mounted.runfs("evict", one)
    said = done.stdout + done.stderr
    assert "Traceback" not in said
    assert "unexpected" not in said
    assert done.returncode == int(length >= 4000), said
    if length < 4096:
        assert set(everything(mounted.path / one)) == before
    if done.returncode:
        assert f"{one}: not evicted: " in said
        assert "too long" in said
        assert not project.directory(one).is_symlink()
        assert (mounted.path / one / "metrics.json").read_bytes()
    else:
        mounted.json("hydrate", "--restore", one)
    assert not list((project.path / "storage").glob("*/.runfs-*"))
    assert set(everything(project.directory(one))) == before
    assert "Traceback" not in mounted.log()


def everything(directory: Path) -> Iterator[tuple[bytes, int, bytes]]:
    """Every file below a directory however deep: path, size and content."""

    def below(fd: int, path: bytes) -> Iterator[tuple[bytes, int, bytes]]:
        try:
            for name in sorted(os.listdir(fd)):
                raw = os.fsencode(name)
                try:
                    child = os.open(raw, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)
                except NotADirectoryError:
                    with open(os.open(raw, os.O_RDONLY, dir_fd=fd), "rb") as file:
                        content = file.read()
                        yield path + raw, len(content), content
                    continue
                yield from below(child, path + raw + b"/")
        finally:
            os.close(fd)

    yield from below(os.open(directory, os.O_RDONLY | os.O_DIRECTORY), b"")
