"""Records on a real mount that many tests share: each test takes its own record, resident or evicted, and beside it a
plain directory with the same content to compare with.

Used through the fixtures of conftest.py. `Shared.take` blocks while it pushes and evicts (some 0.1 s).
"""

import hashlib
import json
import os
import random
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from daemon import client
from tests import projects
from tests.mounting import Mounted
from tests.projects import Project
from vfs import places
from vfs.errors import Refused
from vfs.index import Index

MIB = 1024 * 1024
KEEP_SMALL = 64 * 1024
BIG = 6 * MIB + 17  # bytes of big.bin: six whole chunks and a short one
COMMAND_LIMIT_S = 60.0
QUIET_LIMIT_S = 15.0
STATES = ("resident", "evicted")

Tree = dict[bytes, tuple[Any, ...]]
_template: list[Project] = []


def big_bytes() -> bytes:
    """The content of big.bin."""
    return random.Random(7).randbytes(BIG)


def fill(directory: Path) -> None:
    """What every record of these tests holds besides machinable's own files."""
    (directory / "small.txt").write_text("one\ntwo\nthree\n")
    (directory / "empty").touch()
    (directory / "big.bin").write_bytes(big_bytes())
    (directory / "chunk.bin").write_bytes(random.Random(8).randbytes(MIB))
    lines = (f"{number} the quick brown fox {'needle' if number == 4000 else ''}\n" for number in range(5000))
    (directory / "log.txt").write_text("".join(lines))
    (directory / "sub" / "deeper dir").mkdir(parents=True)
    (directory / "sub" / "deeper dir" / "leaf.bin").write_bytes(bytes(range(256)) * 400)
    (directory / "sub" / "tool.sh").write_text("#!/bin/sh\necho ran\n")
    (directory / "sub" / "tool.sh").chmod(0o755)
    (directory / "link").symlink_to("sub/tool.sh")
    os.link(directory / "chunk.bin", directory / "sub" / "second name.bin")
    (directory / "private").write_bytes(b"p" * (KEEP_SMALL + 1))
    (directory / "private").chmod(0o600)
    os.utime(directory / "big.bin", ns=(1_500_000_000_123_456_789, 1_600_000_000_987_654_321))


def tree(directory: Path, *, times: bool = False) -> Tree:
    """All that a directory holds: kind, mode, links and content (a digest) by path; modification times if asked."""
    found: Tree = {}
    for base, names, files in os.walk(os.fsencode(directory)):
        for name in names + files:
            path = os.path.join(base, name)
            status = os.lstat(path)
            kind = stat.S_IFMT(status.st_mode)
            seen: tuple[Any, ...] = (kind, stat.S_IMODE(status.st_mode))
            if kind == stat.S_IFREG:
                seen += (status.st_nlink, status.st_size, digest(path))
            elif kind == stat.S_IFLNK:
                seen += (os.readlink(path),)
            found[os.path.relpath(path, os.fsencode(directory))] = (*seen, status.st_mtime_ns) if times else seen
    return found


def differences(here: Tree, plain: Tree) -> list[str]:
    """What two trees do not have in common, one line a path: what the first holds, and the second."""
    paths = sorted(path for path in here.keys() | plain.keys() if here.get(path) != plain.get(path))
    return [f"{os.fsdecode(path)}: {here.get(path)} is not {plain.get(path)}" for path in paths]


def digest(path: str | bytes | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def run(script: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A shell script in a directory; every command of it must succeed."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=cwd,
        env={**os.environ, "LC_ALL": "C", "HOME": "/nonexistent", **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=COMMAND_LIMIT_S,
    )
    assert done.returncode == 0, f"{script!r} in {cwd} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
    return done


def python(code: str, cwd: Path, *arguments: str) -> str:
    """Python code in a process of its own (a page fault that waits would hold this one's lock); what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=COMMAND_LIMIT_S,
    )
    assert done.returncode == 0, f"the code in {cwd} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
    return done.stdout


def until(condition: Callable[[], bool], what: str, limit_s: float = QUIET_LIMIT_S) -> None:
    """Wait for something to come true."""
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, f"not within {limit_s:.0f} s: {what}"
        time.sleep(0.02)


def ask(mounted: Mounted, command: str, **args: Any) -> dict[str, Any]:
    """A command's result from the daemon of a mount, without starting a process for it."""
    runtime = Path(mounted.environment["RUNFS_RUNTIME_DIR"])
    answer = client.ask(places.socket_of(runtime, mounted.path), command, args, silence_s=COMMAND_LIMIT_S)
    assert answer is not None, "no daemon listens"
    return answer


def evict(mounted: Mounted, *uuids: str) -> None:
    """Evict records, as soon as nothing has them open any more (the kernel tells a close a moment later)."""

    answers: list[dict[str, Any]] = []

    def gone() -> bool:
        answers.append(ask(mounted, "evict", uuids=list(uuids)))
        return bool(answers[-1]["exit"] == 0)

    try:
        until(gone, f"{uuids} evicted", 5.0)
    except AssertionError:
        raise Refused(f"not evicted: {answers[-1]}") from None


@dataclass(frozen=True, slots=True)
class Record:
    """One record of a test. `path` is it in the mount, `working` where machinable has it, `plain` a copy to compare."""

    mounted: Mounted
    uuid: str
    path: Path
    working: Path
    plain: Path
    state: str

    def both(self, script: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a script in the plain copy and in the record; it must say the same in both. What it said."""
        plain = run(script, self.plain, **environment)
        mounted = run(script, self.path, **environment)
        assert (mounted.stdout, mounted.stderr) == (plain.stdout, plain.stderr)
        return mounted

    def status(self, name: str = "") -> Mapping[str, Any]:
        """What runfs says of the record or a file in it."""
        answer = ask(self.mounted, "status", paths=[str(self.path / name) if name else self.uuid])
        found: Mapping[str, Any] = answer["paths"][0]
        return found

    def local_bytes(self, name: str) -> int:
        return int(self.status(name)["local_bytes"])

    def evict(self) -> None:
        evict(self.mounted, self.uuid)

    def same(self) -> None:
        """The record and the plain directory hold the same."""
        assert not (different := differences(tree(self.path), tree(self.plain))), f"{self.uuid}: {different}"

    def check(self) -> None:
        """They hold the same now, and again after an eviction: then every byte comes from the store."""
        self.same()
        self.evict()
        assert self.working.is_symlink()
        self.same()


class Shared:
    """One mount and its store for a module of tests; `take` gives a record nobody used before."""

    def __init__(self, place: Path, records: int, options: tuple[str, ...] = ()) -> None:
        self.place = place
        self.store = place / "store"
        if not _template:  # made once in a session: running even a small run takes a second
            _template.append(projects.create(place / "template", [{"size": 1000}], report=False))
        self.project: Project = projects.copy(_template[0], place / "project")
        self._free = clone(self.project, records)
        environment = {f"RUNFS_{name}_DIR": str(place / short) for name, short in PLACES}
        environment["XDG_CONFIG_HOME"] = str(place / "config")
        self.mounted = Mounted(
            self.project, place / "mnt", stores=[self.store.as_uri()], options=options, environment=environment
        )

    def take(self, state: str, make: Callable[[Path], object] = fill) -> Record:
        """A record filled by `make`, resident or evicted, and its plain copy."""
        assert self._free, "this module needs more records: say so where its Shared is made"
        uuid = self._free.pop()
        working = self.project.directory(uuid)
        make(working)
        plain = self.place / "plain" / uuid
        shutil.copytree(working, plain, symlinks=True, copy_function=_copy_linked(working, plain))
        if state == "evicted":
            evict(self.mounted, uuid)
        return Record(self.mounted, uuid, self.mounted.path / uuid, working, plain, state)


def clone(project: Project, count: int) -> list[str]:
    """So many copies of the project's one run and its execution, as runs of their own; their uuids. A tenth of the
    time that running them takes."""
    source = project.directory(project.runs[0])
    headers = [json.loads(path.read_text()) for path in sorted(source.rglob("id.json"))]
    uuids, targets = [], []
    for number in range(count):
        new = {header["uuid"]: f"{number:04}{header['uuid'][4:]}" for header in headers}
        new |= {header["identity_key"]: f"{number:04x}{header['identity_key'][4:]}" for header in headers}
        target = project.path / "storage" / new[headers[0]["identity_key"]] / "run"
        shutil.copytree(source, target)
        for path in target.rglob("*.json"):
            text = path.read_text()
            for one, other in new.items():
                text = text.replace(one, other)
            path.write_text(text)
        uuids.append(new[project.runs[0]])
        targets.append(str(target))
    index = Index.open(project.index)
    try:
        done = index.reindex(targets)
    finally:
        index.close()
    assert not done.damaged, done.damaged
    return uuids


PLACES = (("STATE", "s"), ("CACHE", "c"), ("RUNTIME", "r"))


def _copy_linked(source: Path, target: Path) -> Callable[[str, str], str]:
    """Copies files and keeps which of them are hard links to each other."""
    first: dict[tuple[int, int], str] = {}

    def copy(one: str, other: str) -> str:
        status = os.lstat(one)
        known = first.setdefault((status.st_dev, status.st_ino), other)
        if known != other:
            os.link(known, other)
            return other
        return shutil.copy2(one, other)

    return copy
