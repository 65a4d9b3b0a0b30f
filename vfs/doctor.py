"""The commands that try things for real: doctor and stores. May wait for stores, each within its deadline."""

import os
import platform
import pwd
import shutil
import stat
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from vfs import cache, mountinfo, policy
from vfs.core import Home
from vfs.errors import RunfsError
from vfs.format import read_header
from vfs.stores.checking import try_store
from vfs.versions.transactions import why_held

if TYPE_CHECKING:
    from vfs.session import Progress, Session

Finding = dict[str, Any]
_MOST_RECORDS = 50  # damaged records named; the rest is counted
_FORGOTTEN_S = 86400.0  # a transaction that is open for longer was probably forgotten
_SKEW_S = 300.0  # S3 refuses requests with a clock further off than 15 minutes


def stores(session: "Session", args: dict[str, Any], progress: "Progress") -> dict[str, Any]:
    """Try each home: reachable, readable, writable, how fast, and what it can do."""
    with ThreadPoolExecutor(8) as pool:
        tried = list(pool.map(_try, session.core.stores))
    return {"stores": tried, "exit": int(any(not store["ok"] for store in tried))}


def _try(home: Home) -> dict[str, Any]:
    return try_store(home.name, home.url, home.settings.options, opened=home.store)


def doctor(session: "Session", args: dict[str, Any], progress: "Progress") -> dict[str, Any]:
    """Look for what is wrong, and say what to do."""
    looks = (_places, _index, _records, _stores, _mounts, _passthrough)
    checks = [*_machine(), *(finding for look in looks for finding in look(session))]
    return {"checks": checks, "exit": int(any(check["ok"] is False for check in checks))}


def _finding(name: str, ok: bool | None, message: str, advice: str = "") -> Finding:
    return {"name": name, "ok": ok, "message": message, "advice": advice}


def _machine() -> Iterator[Finding]:
    release = platform.release()
    yield _finding("kernel", sys.platform == "linux", f"{platform.system()} {release}", "runfs needs Linux")
    device = os.access("/dev/fuse", os.R_OK | os.W_OK)
    yield _finding(
        "fuse",
        device,
        "/dev/fuse can be opened" if device else "/dev/fuse is missing or not ours to open",
        "load it (modprobe fuse); in a container, start it with --device /dev/fuse --cap-add SYS_ADMIN",
    )
    yield _helper()
    yield _finding("privileges", None if os.geteuid() else True, f"running as uid {os.geteuid()}", "nothing to do")


def _helper() -> Finding:
    """What mounts for those who are not root: set-uid, and it mounts only for users that the system knows."""
    helper = shutil.which("fusermount3")
    if helper is None:
        return _finding("fusermount3", os.geteuid() == 0, "not found", "install it: apt-get install fuse3")
    if os.geteuid() and not os.stat(helper).st_mode & stat.S_ISUID:
        return _finding("fusermount3", False, f"{helper} is not set-uid", f"as root: chmod u+s {helper}")
    try:
        pwd.getpwuid(os.geteuid())
    except KeyError:
        if os.geteuid():
            message = f"{helper} mounts only for users with a name, and uid {os.geteuid()} has none"
            return _finding("fusermount3", False, message, "make an account for it (useradd), or run as another user")
    return _finding("fusermount3", True, helper)


def _places(session: "Session") -> Iterator[Finding]:
    settings = session.settings
    for name, path in (("state", settings.state), ("cache", settings.cache_place)):
        private = path.stat().st_mode & 0o077 == 0
        yield _finding(name, private, f"{path}" + ("" if private else " can be read by others"), f"chmod 700 {path}")
    attributes = cache.supports_attributes(os.fsencode(settings.cache_place))
    yield _finding(
        "cache attributes",
        attributes,
        "the cache's file system keeps user attributes" if attributes else "the cache's file system keeps none",
        "set cache.directory to a directory on ext4, xfs, btrfs or zfs: without them nothing can be evicted",
    )
    free = policy.free_bytes(settings.cache_place)
    yield _finding(
        "space",
        free > 1 << 30,
        f"{free / 1e9:,.1f} GB free for the cache in {settings.cache_place}",
        "free some: runfs evict --until-free 10G",
    )


def _index(session: "Session") -> Iterator[Finding]:
    index = session.core.index
    problems = list(index.problems())
    yield _finding("index", True, f"{session.settings.index}: {index.count():,} records")
    for problem in problems[:_MOST_RECORDS]:
        yield _finding("index row", False, problem, "mend or remove the row; the others are not affected")
    if len(problems) > _MOST_RECORDS:
        yield _finding("index row", False, f"and {len(problems) - _MOST_RECORDS:,} more", "see runfs doctor --json")


def _records(session: "Session") -> Iterator[Finding]:
    found = 0
    for uuid, reason, advice in _damaged(session):
        found += 1
        if found <= _MOST_RECORDS:
            yield _finding("record", False, f"{uuid}: {reason}", advice)
    if found > _MOST_RECORDS:
        yield _finding("record", False, f"and {found - _MOST_RECORDS:,} more records", "see above")
    for row in session.core.journal.quarantined():
        path = os.fsdecode(row.path)
        yield _finding("damage", False, f"{row.uuid}: {path}: {row.reason}", f"runfs verify --repair {row.uuid}")
    for warning in session.warnings:
        yield _finding("recovery", None, warning)
    for uuid, held in session.core.transactions.items():
        day = time.time_ns() - held.began_ns > _FORGOTTEN_S * 1e9
        yield _finding("transaction", None if day else True, f"{uuid}: {why_held(held)}", "end it: its pushes wait")


def _damaged(session: "Session") -> Iterator[tuple[str, str, str]]:
    core = session.core
    for record in policy.roots(core):
        try:
            unit = core.units.get(record.uuid)
            os.close(unit.open_base())
            if unit.evicted and cache.read_header(os.path.join(unit.base, b"id.json")) is not None:
                continue  # its bytes are in a store, as after a reindex: `verify` looks at them there
            header = read_header(unit.base)
            if header.uuid != record.uuid:
                yield record.uuid, f"its directory holds record {header.uuid}", "runfs reindex, or move it back"
        except RunfsError as error:
            held = [home.store for home in core.journal.homes(record.uuid)]
            advice = f"{held[0]} holds it: runfs hydrate --restore {record.uuid}" if held else "no store holds it"
            yield record.uuid, str(error).removeprefix(f"{record.uuid}: "), advice


def _stores(session: "Session") -> Iterator[Finding]:
    if not session.core.homes:
        yield _finding("stores", None, "none is configured: nothing can be pushed or evicted", "mount with --store URL")
    for home in session.core.stores:
        tried = _try(home)
        check = tried["check"]
        problems = "; ".join(check.get("problems") or [])
        message = f"{home.url}: " + (problems or "reachable, readable, writable")
        yield _finding(f"store {home.name}", tried["ok"], message, "runfs stores tells more")
        skew = check.get("clock_skew_s")
        if skew is not None and abs(skew) > _SKEW_S:
            yield _finding("clock", False, f"{home.name}: its clock is {skew:+,.0f} s off ours", "set this clock")


def _mounts(session: "Session") -> Iterator[Finding]:
    for mountpoint in mountinfo.runfs_mounts(os.geteuid()):  # those that this user can take away
        if session.settings.mountpoint is not None and mountpoint == str(session.settings.mountpoint):
            yield _finding("mount", True, f"{mountpoint} is served by process {os.getpid()}")
            continue
        alive = mountinfo.is_served(mountpoint)
        yield _finding(
            "mount",
            None if alive else False,
            f"{mountpoint}" + (" is another mount of runfs" if alive else ": its daemon is gone"),
            "" if alive else f"runfs umount {mountpoint}",
        )


def _passthrough(session: "Session") -> Iterator[Finding]:
    if session.settings.mountpoint is not None:
        state = session.passthrough()
        advice = "it needs Linux 6.9 or later and a daemon with CAP_SYS_ADMIN; without it all works, at less speed"
        wanted = state == "on" or session.settings.passthrough == "off"
        yield _finding("passthrough", True if wanted else None, state, "" if wanted else advice)
