"""What is mounted: the kernel's table, and the daemons that announce themselves in the runtime directory.

Used by the command line (to find the daemon a command means) and by `daemon.mount` (to announce itself). Reads
/proc and small files; never asks a file system that might not answer, so nothing here waits for a daemon.
"""

import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from daemon.directories import meeting_places, state_dir
from vfs import places
from vfs.private import private_directory, private_opener

_OCTAL = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of /proc/self/mountinfo (proc(5))."""

    mountpoint: str
    kind: str
    source: str
    options: tuple[str, ...]

    @property
    def is_runfs(self) -> bool:
        return self.kind == "fuse.runfs" or (self.kind.startswith("fuse") and self.source.startswith("runfs"))

    @property
    def uid(self) -> int | None:
        """Whose daemon serves it, as FUSE tells."""
        return next((int(o.removeprefix("user_id=")) for o in self.options if o.startswith("user_id=")), None)


@dataclass(frozen=True, slots=True)
class Running:
    """One announced daemon. It may be gone: only its socket tells."""

    pid: int
    mountpoint: str
    index: str
    started_at: float
    socket: Path


def mount_table() -> list[Mount]:
    """All mounts this process sees, the topmost last."""
    text = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
    return [mount for mount in map(parse_line, text.splitlines()) if mount is not None]


def parse_line(line: str) -> Mount | None:
    """One line of mountinfo; None when it is none."""
    before, separator, after = line.partition(" - ")
    front, back = before.split(" "), after.split(" ")
    if not separator or len(front) < 6 or len(back) < 3:
        return None
    return Mount(_plain(front[4]), back[0], _plain(back[1]), (*front[5].split(","), *back[2].split(",")))


def _plain(text: str) -> str:
    r"""Undo the kernel's escapes (space is \040), which stand for bytes."""
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), text)


def real_mountpoint(path: str | os.PathLike[str], table: list[Mount] | None = None) -> Path:
    """The real path of a mountpoint, without asking the mounted file system itself (it may hang or be gone)."""
    absolute = Path(os.path.abspath(Path(path).expanduser()))
    known = {mount.mountpoint for mount in (mount_table() if table is None else table)}
    if str(absolute) in known:
        return absolute
    inside_parent = Path(os.path.realpath(absolute.parent)) / absolute.name
    return inside_parent if str(inside_parent) in known else Path(os.path.realpath(absolute))


def mounted_at(path: Path, table: list[Mount] | None = None) -> Mount | None:
    """What is mounted on exactly this real path (the topmost), or None."""
    found = [m for m in (mount_table() if table is None else table) if m.mountpoint == str(path)]
    return found[-1] if found else None


def mount_around(path: Path, table: list[Mount] | None = None) -> Mount | None:
    """The mount a path lies in; by its name only."""
    mounts = mount_table() if table is None else table
    around = [m for m in mounts if path == Path(m.mountpoint) or Path(m.mountpoint) in path.parents]
    return max(around, key=lambda m: len(m.mountpoint), default=None)


def running(runtime_dir: Path) -> list[Running]:
    """Every announced daemon, oldest first. A file that does not parse is passed over: it is no daemon of ours."""
    found = [entry for entry in map(_announced, sorted(runtime_dir.glob("*.json"))) if entry is not None]
    return sorted(found, key=lambda entry: entry.started_at)


def running_anywhere(environ: Mapping[str, str]) -> list[Running]:
    """Every announced daemon of this user's, wherever its socket is, oldest first."""
    found: dict[Path, Running] = {}
    for place in meeting_places(environ):
        if _is_mine(place):
            found |= {entry.socket: entry for entry in running(place)}
    for pointer in state_dir(environ).glob("*/mount.json"):
        entry = _announced(pointer) if _is_mine(pointer) else None
        if entry is not None:
            found.setdefault(entry.socket, entry)
    return sorted(found.values(), key=lambda entry: entry.started_at)


def runtime_of(environ: Mapping[str, str], mountpoint: Path) -> Path:
    """The directory with the socket of this real mountpoint's daemon; where none announced itself, the one where it
    would be."""
    known = [entry for entry in running_anywhere(environ) if entry.mountpoint == str(mountpoint)]
    latest = max(known, key=lambda entry: (Path(f"/proc/{entry.pid}").exists(), entry.started_at), default=None)
    return latest.socket.parent if latest is not None else meeting_places(environ)[0]


def _is_mine(path: Path) -> bool:
    """Whether a directory or file was made by this user: anybody can make one in /tmp."""
    try:
        return path.lstat().st_uid == os.geteuid()
    except OSError:
        return False


def announced_at(runtime_dir: Path, mountpoint: Path) -> Running | None:
    """Who announced itself for this real mountpoint, alive or not."""
    return _announced(places.info_of(runtime_dir, mountpoint))


def _announced(path: Path) -> Running | None:
    try:
        data = json.loads(path.read_text())
        return Running(
            pid=int(data["pid"]),
            mountpoint=str(data["mountpoint"]),
            index=str(data["index"]),
            started_at=float(data["started_at"]),
            socket=Path(data["socket"]) if "socket" in data else path.with_suffix(".sock"),
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


@contextmanager
def announced(runtime_dir: Path, mountpoint: Path, index: Path, state: Path | None = None) -> Iterator[Path]:
    """For the daemon: its file in the runtime directory, and one in the state directory `state`, while the body runs.
    Gives the path of its socket. Raises ConfigError for a runtime directory that is not this user's alone."""
    private_directory(runtime_dir, "RUNFS_RUNTIME_DIR")
    socket = places.socket_of(runtime_dir, mountpoint)
    data = {
        "pid": os.getpid(),
        "mountpoint": str(mountpoint),
        "index": os.path.realpath(index),
        "started_at": time.time(),
        "socket": str(socket.absolute()),
    }
    targets = [places.info_of(runtime_dir, mountpoint), *([places.pointer_of(state)] if state is not None else [])]
    for target in targets:
        partial = target.with_suffix(f".{os.getpid()}")
        with open(partial, "w", opener=private_opener) as file:
            file.write(json.dumps(data))
        partial.replace(target)
    try:
        yield socket
    finally:
        for target in targets:
            entry = _announced(target)
            if entry is not None and entry.pid == os.getpid():
                target.unlink(missing_ok=True)
