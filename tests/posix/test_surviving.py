"""Modes, owners, times, links and extended attributes are the same after a push, an eviction and a hydration, and on
another host that has only the store; on every kind of store that is opened by a URL."""

import os
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest

from tests.core.making import Place, contents, noise, unit_of
from tests.core.test_reindexing import Progress
from tests.stores.conftest import KINDS
from tests.stores.kinds import Maker
from vfs.settings import StoreSettings

EVERY = [kind for kind in KINDS if kind not in ("mounted", "first", "globus", "http")]  # no URLs; read-only
OLD_NS = 1_600_000_000_123_456_789
NAME = b"user." + b"\xff\xfe odd"


def fill(root: Path) -> None:
    large, small = noise(1_200_017, 6), b"small"
    odd = os.path.join(os.fsencode(root), b"\xff\xfe " + b"n" * 250)
    (root / "sub" / "empty").mkdir(parents=True)
    for name, content, mode in (
        ("large", large, 0o640),
        ("small", small, 0o4711),
        ("sub/other", large[:99_999], 0o444),
    ):
        (root / name).write_bytes(content)
        (root / name).chmod(mode)
        os.setxattr(root / name, "user.note", name.encode() + b"\0\xff")
    with open(odd, "wb") as file:
        file.write(large[:70_001])
    os.setxattr(root / "large", NAME, b"")
    os.setxattr(root / "large", "user.much", noise(1_500))
    os.setxattr(root / "sub", "user.of a directory", b"kept too")
    os.link(root / "large", root / "sub" / "second")
    os.link(root / "small", root / "sub" / "again")
    (root / "sym").symlink_to("sub/other")
    (root / "dangling").symlink_to(b"\xff nowhere".decode("utf-8", "surrogateescape"))
    os.mkfifo(root / "pipe", 0o620)
    (root / "sub" / "empty").chmod(0o2750)
    if os.geteuid() == 0:
        for name in ("sub/other", "sym", "sub/empty"):
            os.chown(root / name, 65_533, 65_532, follow_symlinks=False)
    for number, name in enumerate(("large", "small", "sub/other", "sym", "sub/empty", "sub")):
        at = -7 if name == "small" else OLD_NS + number
        os.utime(root / name, ns=(at, at), follow_symlinks=False)


def described(root: bytes | Path) -> dict[bytes, tuple[Any, ...]]:
    """All that is known of each path, but its bytes; files with several names are told by the first of these."""
    found: dict[bytes, tuple[Any, ...]] = {}
    first: dict[int, bytes] = {}
    base = os.fsencode(root)
    for top, names, files in os.walk(base):
        names.sort()
        for name in sorted(names + files):
            path = os.path.join(top, name)
            status, shown = os.lstat(path), os.path.relpath(path, base)
            facts: tuple[Any, ...] = (oct(status.st_mode), status.st_uid, status.st_gid, status.st_mtime_ns)
            if stat.S_ISREG(status.st_mode):
                facts += (status.st_size, status.st_nlink, first.setdefault(status.st_ino, shown))
            if stat.S_ISLNK(status.st_mode):
                facts += (os.readlink(path),)
            else:
                kept = (each for each in sorted(os.listxattr(path)) if not each.startswith("user.runfs."))
                facts += tuple((each, os.getxattr(path, each)) for each in kept)
            found[shown] = facts
    return found


@pytest.mark.parametrize("kind", EVERY)
def test_everything_about_a_file_survives(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    maker: Maker = request.getfixturevalue(KINDS[kind])
    stores = (StoreSettings(name="lab", url=maker.url, options=maker.options),)
    place = Place(tmp_path / "host")
    root = place.record(files={})
    fill(root)
    before, bytes_before = described(root), contents(root)
    with place.session(stores=stores, deadline_s=30.0) as session:
        unit = unit_of(session)
        session.evictor.evict(unit)
        assert described(unit.shadow) == before
        session.evictor.hydrate(unit)
        assert described(unit.shadow) == before
        assert contents(unit.shadow) == bytes_before
        session.evictor.evict(unit)
        session.evictor.restore(unit)
        assert described(root) == before
        assert contents(root) == bytes_before
    shutil.rmtree(place.root)
    other = Place(tmp_path / "other host")
    with other.session(stores=stores, deadline_s=30.0) as session:
        assert session.run("reindex", {"stores": True}, Progress())["exit"] == 0
        unit = unit_of(session)
        assert unit.evicted
        assert elsewhere(described(unit.shadow)) == elsewhere(before)
        session.evictor.hydrate(unit)
        assert contents(unit.shadow) == bytes_before


def elsewhere(found: dict[bytes, tuple[Any, ...]]) -> dict[bytes, tuple[Any, ...]]:
    """What is not the same elsewhere: FIFOs stay on their machine, and another host gets one in its place, of its own
    time; and a store's word makes no file a set-id one."""
    other = {b"pipe": found[b"pipe"][:1]}
    for path in (b"small", b"sub/again"):
        other[path] = (oct(int(found[path][0], 8) & ~0o6000), *found[path][1:])
    return found | other
