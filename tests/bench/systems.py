"""The systems that are measured side by side: the native file system, the wire, runfs, rclone mount, JuiceFS, s3fs.

Used by the works (`data.py`, `small.py`, `metadata.py`). Each mounts the same SeaweedFS server in a process of its own
and is used through its mountpoint only. `cool` makes everything cold: no byte of what is in the store is left on this
disk or in this machine's memory. Starting and cooling block for seconds; they are never inside what is timed.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from tests import projects
from tests.mounted.records import clone
from tests.mounting import Mounted
from tests.mounts import fuse_mounts, is_fuse_mount, unmount
from tests.servers import Seaweed, find_program
from vfs.errors import NotFound
from vfs.stores import open_store

PIECE = 8 << 20
START_LIMIT_S = 60.0
STOP_LIMIT_S = 120.0
FLIGHTS = 8

T = TypeVar("T")
Files = dict[str, Path]  # name within a group (a record) -> a local file with the content


def drop_caches() -> None:
    """Forget the page cache, where this process may."""
    os.sync()
    with contextlib.suppress(OSError):
        Path("/proc/sys/vm/drop_caches").write_text("3\n")


class System(ABC):
    """One system. `groups` of files are records in runfs and directories elsewhere."""

    name: str

    @abstractmethod
    def directory(self, group: str) -> Path:
        """Where the files of a group are seen."""

    @abstractmethod
    def put(self, group: str, files: Files) -> None:
        """Have these files there, safe in the store."""

    def settle(self, group: str = "", sizes: Mapping[str, int] | None = None) -> None:
        """Return when everything written so far is safe in the store, among it files of a group of these sizes."""
        return

    @abstractmethod
    def cool(self) -> None:
        """Make everything cold."""

    def stop(self) -> None:
        """End what was started."""
        return


class Native(System):
    """A directory of the local file system: the reference for what is here."""

    name = "native"

    def __init__(self, place: Path) -> None:
        self._root = place / "native"
        self._root.mkdir()

    def directory(self, group: str) -> Path:
        (self._root / group).mkdir(parents=True, exist_ok=True)
        return self._root / group

    def put(self, group: str, files: Files) -> None:
        for name, source in files.items():
            shutil.copyfile(source, self.directory(group) / name)

    def cool(self) -> None:
        drop_caches()


class Wire:
    """The store itself, without any file system: the reference for what is away. This is opendal, bare, in the ways
    that were the fastest here: runfs's own store layer would measure ourselves."""

    name = "opendal"

    def __init__(self, server: Seaweed) -> None:
        import opendal

        options = {"bucket": server.bucket, "endpoint": server.endpoint, "region": server.region, "root": "/wire"}
        self.operator = opendal.Operator("s3", **options, **server.options())
        self.pool = ThreadPoolExecutor(64)

    def put(self, group: str, files: Files) -> None:
        self.each(lambda item: self.upload(f"{group}/{item[0]}", item[1]), files.items(), 16)

    def upload(self, key: str, source: Path) -> None:
        """One object; a large one in parts, eight at a time."""
        size = source.stat().st_size
        if size <= PIECE:
            self.operator.write(key, source.read_bytes())
            return
        target = self.operator.open(key, "wb", chunk=PIECE, concurrent=FLIGHTS)
        with target, open(source, "rb", buffering=0) as file:
            while piece := file.read(PIECE):
                target.write(piece)

    def download(self, key: str, size: int) -> None:
        """One object into memory, in eight ranges at a time; nothing is kept of it."""

        def one(offset: int) -> int:
            return len(self.operator.read(key, offset=offset, size=min(PIECE, size - offset)))

        with ThreadPoolExecutor(FLIGHTS) as pool:
            if sum(pool.map(one, range(0, size, PIECE))) != size:
                raise SystemExit(f"{key} is not {size} bytes long")

    def each(self, call: Callable[[T], object], items: Iterable[T], at_once: int) -> None:
        """Call for each item, so many at a time."""
        with ThreadPoolExecutor(at_once) as pool:
            for _ in pool.map(call, items):
                pass

    def stop(self) -> None:
        self.pool.shutdown()


class Runfs(System):
    """A real machinable project; each group is one of its records, made before anything is timed."""

    def __init__(self, place: Path, server: Seaweed, groups: Sequence[str], *, passthrough: bool = True) -> None:
        self.name = "runfs" if passthrough else "runfs, plain"
        place = place / ("runfs" if passthrough else "plain")
        self.project = projects.create(place / "project", [{"size": 1000}], report=False)
        self.records = dict(zip(groups, clone(self.project, len(groups)), strict=True))
        environment = {f"RUNFS_{name}_DIR": str(place / name[0].lower()) for name in ("STATE", "CACHE", "RUNTIME")}
        environment |= {"XDG_CONFIG_HOME": str(place / "config"), **server.environment()}
        url = server.url.replace("?", f"/{place.name}?", 1)
        settings = ("push.auto=false", "cache.keep_small=0", f"passthrough={'auto' if passthrough else 'off'}")
        self.mounted = Mounted(
            self.project,
            place / "mnt",
            stores=[f"lab={url}"],
            options=[word for setting in settings for word in ("-o", setting)],
            environment=environment,
        )
        self.mounted.start()
        self.runfs("push")

    def runfs(self, *arguments: str) -> str:
        done = self.mounted.runfs(*arguments)
        if done.returncode:
            raise SystemExit(f"runfs {' '.join(arguments)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done.stdout

    def directory(self, group: str) -> Path:
        return self.mounted.path / self.records[group]

    def put(self, group: str, files: Files) -> None:
        for name, source in files.items():
            shutil.copyfile(source, self.directory(group) / name)
        self.runfs("push", self.records[group])

    def settle(self, group: str = "", sizes: Mapping[str, int] | None = None) -> None:
        self.runfs("push")

    def cool(self) -> None:
        self.runfs("evict", *self.records.values())
        drop_caches()

    def stop(self) -> None:
        self.mounted.stop()


class Mount(System):
    """Another file system over the same server: a program in the foreground, with a cache directory of its own."""

    def __init__(self, place: Path, server: Seaweed) -> None:
        self.place = place / self.name
        self.path = self.place / "mnt"
        self.cache = self.place / "cache"
        self.server = server
        self.process: subprocess.Popen[bytes] | None = None
        for each in (self.path, self.cache):
            each.mkdir(parents=True)
        self.prepare()
        self.start()

    def prepare(self) -> None:
        """What is done once, before the first mount."""

    @abstractmethod
    def command(self) -> list[str]:
        """The program that mounts in the foreground."""

    def environment(self) -> dict[str, str]:
        return {**os.environ, **self.server.environment()}

    def start(self) -> None:
        with (self.place / "log").open("ab") as log:
            self.process = subprocess.Popen(
                self.command(), env=self.environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        end = time.monotonic() + START_LIMIT_S
        while not is_fuse_mount(self.path):
            if self.process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"{self.name} did not mount:\n{(self.place / 'log').read_text()[-2000:]}")
            time.sleep(0.05)

    def end(self) -> None:
        """Unmount, and wait until the program is gone: it sends what it holds back first."""
        process, self.process = self.process, None
        if process is None:
            return
        subprocess.run(["fusermount3", "-u", str(self.path)], check=False, capture_output=True)
        try:
            process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for stale in fuse_mounts():
            if stale.path == self.path:
                unmount(stale)

    def directory(self, group: str) -> Path:
        (self.path / group).mkdir(exist_ok=True)
        return self.path / group

    def put(self, group: str, files: Files) -> None:
        for name, source in files.items():
            shutil.copyfile(source, self.directory(group) / name)
        self.settle(group, {name: source.stat().st_size for name, source in files.items()})

    def cool(self) -> None:
        self.end()
        shutil.rmtree(self.cache)
        self.cache.mkdir()
        drop_caches()
        self.start()

    def stop(self) -> None:
        self.end()


class Rclone(Mount):
    """`rclone mount --vfs-cache-mode full`: what people use today."""

    name = "rclone"

    def command(self) -> list[str]:
        remote = f":s3,provider=SeaweedFS,env_auth,endpoint='{self.server.endpoint}':{self.server.bucket}/rclone"
        options = ["--vfs-cache-mode", "full", "--vfs-write-back", "0s", "--cache-dir", str(self.cache)]
        options += ["--config", "/dev/null", "--dir-cache-time", "1h", "--rc", "--rc-addr", f"unix://{self.socket}"]
        return [find_program("rclone"), "mount", remote, str(self.path), *options, "--rc-no-auth"]

    @property
    def socket(self) -> Path:
        return self.place / "rc"

    def settle(self, group: str = "", sizes: Mapping[str, int] | None = None) -> None:
        """Wait until its queue of uploads is empty. That alone says nothing: with a write-back of 0 s it uploads after
        a close without any queue, and the object is there much later. So the store itself is asked, too."""
        for name, size in (sizes or {}).items():
            while self._stored(f"rclone/{group}/{name}") != size:
                time.sleep(0.02)
        ask = [find_program("rclone"), "rc", "--unix-socket", str(self.socket), "vfs/stats"]
        while True:
            answer = subprocess.run(ask, capture_output=True, text=True, check=True).stdout
            if '"uploadsInProgress": 0' in answer and '"uploadsQueued": 0' in answer:
                return
            time.sleep(0.02)

    def _stored(self, key: str) -> int | None:
        """The bytes of an object, None while there is none."""
        try:
            return self._store.stat(key).size
        except NotFound:
            return None

    def prepare(self) -> None:
        self._store = open_store(self.server.url, "rclone", self.server.options())

    def stop(self) -> None:
        super().stop()
        self._store.disconnect()


class JuiceFS(Mount):
    """JuiceFS with its metadata in SQLite and without its write-back: close returns when the store has the bytes."""

    name = "juicefs"

    def prepare(self) -> None:
        bucket = f"{self.server.endpoint}/{self.server.bucket}"
        keys = ["--access-key", self.server.access_key, "--secret-key", self.server.secret_key]
        command = [find_program("juicefs"), "format", "--storage", "s3", "--bucket", bucket, *keys, "--trash-days", "0"]
        subprocess.run([*command, self.meta, "bench"], check=True, capture_output=True)

    @property
    def meta(self) -> str:
        return f"sqlite3://{self.place}/meta.db"

    def command(self) -> list[str]:
        options = ["--cache-dir", str(self.cache), "--no-usage-report", "--log", str(self.place / "juicefs.log")]
        return [find_program("juicefs"), "mount", *options, self.meta, str(self.path)]


class S3fs(Mount):
    """s3fs-fuse: the oldest of them. It has no cache unless told so."""

    name = "s3fs"

    def command(self) -> list[str]:
        options = [f"url={self.server.endpoint}", "use_path_request_style", f"use_cache={self.cache}"]
        options += [f"passwd_file={self.place / 'password'}", "parallel_count=8"]
        return [
            find_program("s3fs"),
            f"{self.server.bucket}:/s3fs",
            str(self.path),
            "-f",
            *(f"-o{each}" for each in options),
        ]

    def prepare(self) -> None:
        password = self.place / "password"
        password.write_text(f"{self.server.access_key}:{self.server.secret_key}\n")
        password.chmod(0o600)
        store = open_store(self.server.url, "s3fs", self.server.options())
        store.write("s3fs/.runfs-bench", b"")  # it mounts a prefix only where there is one
        store.disconnect()


PEERS: dict[str, type[Mount]] = {each.name: each for each in (Rclone, JuiceFS, S3fs)}


def has(name: str) -> bool:
    """Whether a peer's program is installed."""
    try:
        find_program(name)
    except FileNotFoundError:
        return False
    return sys.platform == "linux"
