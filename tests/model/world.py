"""Where the model's operations happen: a mount, its disk, its store, another host; and a plain directory beside it.

`World(place, kind, seaweed)` as a context manager. `kind` is "file" (the store is a directory on a disk of its own,
which fills up) or "s3" (a real server behind a proxy that misbehaves). Project, state and cache are on a small disk of
their own, so root is needed. Blocks wherever the mount does; `Actor` bounds each call.
"""

import contextlib
import os
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests import projects
from tests.faults import FaultProxy, http_answer
from tests.model.actor import Actor
from tests.model.disks import Filler, ext4_disk
from tests.mounted.records import ask, clone
from tests.mounting import Mounted
from tests.mounts import fuse_mounts, unmount
from tests.projects import Project
from tests.servers import Seaweed
from vfs.claims import own_rows
from vfs.index import Index
from vfs.manifest import parse
from vfs.session import Session
from vfs.settings import CacheSettings, Settings, StoreSettings
from vfs.wire import read_manifest

MIB = 1 << 20
RECORDS = 40
DEADLINE_S = 1.0
CALL_LIMIT_S = 20.0  # for a call that brings a few MiB, each with its deadline, on a busy machine
SETTLE_S = 20.0
OPTIONS = (
    f"deadline_s={DEADLINE_S:g}", "least_throughput=1MiB", "push.quiet_s=0.2", "push.every_s=2", "cache.high=none",
)  # fmt: skip


def fill(directory: Path) -> None:
    """What each record holds when an example begins: several chunks, a hole, small and middling files."""
    noise = random.Random(5)
    (directory / "f").write_bytes(noise.randbytes(2 * MIB + 17))
    (directory / "g").write_bytes(noise.randbytes(70_000))
    (directory / "h").write_bytes(b"small\n")
    (directory / "d" / "e").mkdir(parents=True)
    with (directory / "d" / "f").open("wb") as file:
        file.write(b"begins")
        file.seek(MIB + 200_000)
        file.write(b"ends")
    (directory / "l").symlink_to("f")


class World:
    """One mount. `take()` gives the uuids of two fresh records and the directory with plain copies of them."""

    def __init__(self, place: Path, kind: str, seaweed: Seaweed | None) -> None:
        self.place = place
        self.kind = kind
        self._seaweed = seaweed
        self._stack = contextlib.ExitStack()
        self.hosts = 0

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self._make(stack)
            self._stack = stack.pop_all()
        return self

    def _make(self, stack: contextlib.ExitStack) -> None:
        disk = stack.enter_context(ext4_disk(self.place / "disk", 1024))
        self.project: Project = projects.create(disk / "project", [{"size": 1000}], report=False)
        self.free = clone(self.project, RECORDS)
        self.filler = Filler(disk)
        environment = {"RUNFS_RUNTIME_DIR": str(self.place / "r"), "XDG_CONFIG_HOME": str(self.place / "config")}
        environment |= {"RUNFS_STATE_DIR": str(disk / "s"), "RUNFS_CACHE_DIR": str(disk / "c")}
        self.proxy: FaultProxy | None = None
        if self.kind == "s3":
            assert self._seaweed is not None
            self.proxy = stack.enter_context(FaultProxy(self._seaweed.port))
            environment |= self._seaweed.environment()
            name = f"{self._seaweed.bucket}/{os.urandom(6).hex()}"
            self.url = f"s3://{name}?endpoint={self.proxy.endpoint}&region={self._seaweed.region}"
            self.straight = f"s3://{name}?endpoint={self._seaweed.endpoint}&region={self._seaweed.region}"
        else:
            shelf = stack.enter_context(ext4_disk(self.place / "shelf", 1024))
            self.shelf, self.shelf_filler = shelf / "store", Filler(shelf)
            self.url = self.straight = self.shelf.as_uri()
        options = [word for option in OPTIONS for word in ("-o", option)]
        self.mounted = Mounted(
            self.project, self.place / "mnt", stores=[f"lab={self.url}"], options=options, environment=environment
        )
        stack.enter_context(self.mounted)
        self.plain = self.place / "plain"
        self.plain.mkdir()
        self.here = Actor(self.mounted.path, CALL_LIMIT_S)
        stack.callback(self.here.stop)
        self.there = Actor(self.plain, CALL_LIMIT_S)
        stack.callback(self.there.stop)
        self.behind = Actor(Path("/"), CALL_LIMIT_S)
        stack.callback(self.behind.stop)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, where)

    def take(self) -> list[str]:
        """Two records that nothing was done with."""
        uuids = [self.free.pop(), self.free.pop()]
        for uuid in uuids:
            working = self.project.directory(uuid)
            fill(working)
            shutil.copytree(working, self.plain / uuid, symlinks=True)
            os.utime(self.plain / uuid, ns=(working.stat().st_atime_ns, working.stat().st_mtime_ns))
        return uuids

    # --- the daemon ----------------------------------------------------------------------------------------------

    def command(self, name: str, **arguments: Any) -> dict[str, Any]:
        """Ask the daemon for a command."""
        return ask(self.mounted, name, **arguments)

    def background(self, name: str, **arguments: Any) -> threading.Thread:
        """Ask for a command and do not wait; the daemon may be killed meanwhile."""

        def run() -> None:
            with contextlib.suppress(Exception):
                ask(self.mounted, name, **arguments)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        return thread

    def leave(self) -> None:
        for actor in (self.here, self.there):
            actor.call("leave")

    def kill(self) -> None:
        """kill -9, and mount again."""
        self.mounted.kill(unmount_stale=False)
        self.leave()
        for mount in fuse_mounts():
            if mount.path == self.mounted.path:
                unmount(mount)
        self.start()

    def remount(self) -> None:
        self.leave()
        done = self.mounted.umount(5)
        if self.mounted.process is not None and self.mounted.process.poll() is None:  # what is left, and said so
            assert "in use" not in done.stdout + done.stderr, done
            self.mounted.process.wait(30)
        self.start()

    def start(self) -> None:
        try:
            self.mounted.start()
        except AssertionError as error:  # with nothing free, mending may be impossible
            if not self.filler.filled or "free some" not in str(error):
                raise
            self.filler.free()
            self.mounted.start()
        for actor in (self.here, self.there):
            assert actor.call("enter", str(actor.directory)) is None

    # --- the store -----------------------------------------------------------------------------------------------

    def store(self, fault: str) -> None:
        """Let the store be "up", "down", "silent", "slow", "full", "busy" or "wrong"; a directory knows up, down and
        full only."""
        if self.proxy is not None:
            self.proxy.saying = http_answer("507 Insufficient Storage", "InsufficientStorage")
            self.proxy.methods = (b"PUT", b"POST")
            self.proxy.delay_s = 0.05
            modes = {"up": "pass", "down": "refuse", "silent": "silent", "slow": "delay", "full": "say"}
            self.proxy.set(modes.get(fault, fault))
            return
        away = self.shelf.with_name("away")
        if fault != "up" and fault != "full" and self.shelf.exists():
            self.shelf.rename(away)
        elif fault in ("up", "full") and away.exists():
            away.rename(self.shelf)
        self.shelf_filler.fill() if fault == "full" else self.shelf_filler.free()

    # --- another host --------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def other_host(self, uuid: str) -> Iterator[tuple[Path, Callable[[], None]]]:
        """The record in its own directory on another machine that knows only the store, and a call that pushes it."""
        self.hosts += 1
        root = self.place / f"host{self.hosts}"
        (root / "project" / "storage").mkdir(parents=True)
        Index.open(root / "project" / ".machinable.sqlite", create=True).close()
        options: dict[str, str | int | float | bool] = {}
        if self._seaweed is not None:
            options = dict(self._seaweed.options())
        session = Session.open(
            Settings(
                index=root / "project" / ".machinable.sqlite",
                stores=(StoreSettings(name="lab", url=self.straight, options=options),),
                state_dir=root / "s",
                cache_dir=root / "c",
                runtime_dir=root / "r",
                mountpoint=root / "mnt",
                cache=CacheSettings(high=None, low=None),
            )
        )
        try:
            self._adopt(session, uuid, os.fsencode(root / "project" / "storage" / uuid))
            unit = session.core.units.get(uuid)
            session.evictor.hydrate(unit)
            session.evictor.restore(unit)

            def push() -> None:
                pushed = session.pusher.push(unit)
                assert not pushed.failed, pushed.failed

            yield Path(os.fsdecode(unit.base)), push
        finally:
            session.close()
            shutil.rmtree(root)

    @staticmethod
    def _adopt(session: Session, uuid: str, directory: bytes) -> None:
        """What `runfs reindex --store` does for one record. Another machine would not see our directory and choose its
        own: here that has to be said."""
        home = session.core.stores[0]
        body, version = read_manifest(home, uuid)
        assert body is not None
        manifest = parse(body, uuid)
        manifest = replace(manifest, rows=tuple(own_rows(manifest.rows, uuid, directory)))
        session.core.index.put_back({**row} for row in manifest.rows)
        session.evictor.adopt(manifest, home, version or "", body, directory)

    # --- comparing -----------------------------------------------------------------------------------------------

    def settled(self, condition: Callable[[], str], what: str) -> None:
        """Wait until a comparison finds no difference; fails with the last one."""
        end = time.monotonic() + SETTLE_S
        while said := condition():
            assert time.monotonic() < end, f"{what}: {said}"
            time.sleep(0.05)
