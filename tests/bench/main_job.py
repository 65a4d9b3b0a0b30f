"""The main job in figures: cold read, warm read, write and push of one large file, against opendal and cp.

    make bench            (or: .venv/bin/python -m tests.bench.main_job --size 1GiB --rounds 3)

Each round does every piece of work once, in the same order, on the same machine and the same SeaweedFS server (S3 on
loopback), so that figures of a round can be compared; the table has the medians and ratios. Not a test: nothing
here fails because something is slow.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.servers import Seaweed, seaweedfs
from vfs.stores import open_store
from vfs.where import parse_size

PIECE = 8 << 20
RUN = """
import sys
from pydantic import BaseModel
from machinable import Interface, get
class Big(Interface):
    class Config(BaseModel):
        n: int = 1
    def __call__(self):
        self.save_file("metrics.json", {"n": self.config.n})
sys.modules["big"] = sys.modules[__name__]
"""


class Bench:
    """One project with one record, one mount, one server."""

    def __init__(self, place: Path, server: Seaweed, size: int) -> None:
        self.place, self.size, self.server = place, size, server
        self.project, self.mount = place / "project", place / "mnt"
        self.project.mkdir()
        self.mount.mkdir()
        keys = {"AWS_ACCESS_KEY_ID": server.access_key, "AWS_SECRET_ACCESS_KEY": server.secret_key}
        os.environ.update(keys)
        names = {"RUNFS_STATE_DIR": "state", "RUNFS_CACHE_DIR": "cache", "RUNFS_RUNTIME_DIR": "run"}
        self.environ = {**os.environ, **{name: str(place / value) for name, value in names.items()}}
        self.data = os.urandom(PIECE)

    def python(self, *args: str) -> str:
        done = subprocess.run(
            [sys.executable, *args], cwd=self.project, env=self.environ, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"{' '.join(args)} failed:\n{done.stdout}{done.stderr}")
        return done.stdout

    def runfs(self, *args: str) -> str:
        return self.python("-m", "daemon.cli", *args)

    def prepare(self) -> str:
        """A real record; its uuid."""
        (self.project / "big.py").write_text(RUN.replace('sys.modules["big"] = sys.modules[__name__]\n', ""))
        code = "from machinable import get; r = get('big').launch(); print(r.uuid)"
        return self.python("-c", code).split()[-1]

    def fill(self, path: Path) -> None:
        with open(path, "wb") as file:
            for number in range(self.size // PIECE):
                file.write(self.data[number + 1 :] + self.data[: number + 1])

    def read(self, path: Path) -> float:
        began = time.monotonic()
        with open(path, "rb", buffering=0) as file:
            total = 0
            while data := file.read(1 << 20):
                total += len(data)
        assert total == self.size
        return time.monotonic() - began

    def round(self, uuid: str, number: int) -> dict[str, float]:
        """Seconds for each piece of work."""
        took: dict[str, float] = {}
        self.data = os.urandom(PIECE)  # what the store holds already would not be uploaded again
        record, plain = self.mount / uuid, self.place / "plain.bin"
        target = record / f"big-{number}.bin"

        def timed(name: str, call: Callable[[], object]) -> None:
            began = time.monotonic()
            call()
            took[name] = time.monotonic() - began

        timed("write: native file system, fsync", lambda: (self.fill(plain), os.sync()))
        timed("write and close: runfs", lambda: self.fill(target))
        timed("push: runfs (until it is in S3)", lambda: self.runfs("push", uuid))
        took["write and push: runfs"] = took["write and close: runfs"] + took["push: runfs (until it is in S3)"]
        store = open_store(self.server.url, "bare")
        timed("upload: opendal", lambda: store.upload(f"bare-{number}", self._source(plain), self.size))
        self.runfs("evict", uuid)
        with ThreadPoolExecutor(8) as pool:
            timed(
                "download: opendal, 8 ranges at a time, to nowhere",
                lambda: list(pool.map(lambda o: store.read(f"bare-{number}", o, PIECE), range(0, self.size, PIECE))),
            )
            timed("download: opendal, 8 ranges at a time, to a file", lambda: self._download(store, pool, number))
        took["cold read: runfs"] = self.read(target)
        took["warm read: runfs"] = min(self.read(target) for _ in range(3))
        took["warm read: native file system"] = min(self.read(plain) for _ in range(3))
        timed("cp of a warm file: runfs", lambda: subprocess.run(["cp", target, self.place / "copy"], check=True))
        timed(
            "cp of a warm file: native file system",
            lambda: subprocess.run(["cp", plain, self.place / "copy"], check=True),
        )
        target.unlink()
        store.delete(f"bare-{number}")
        store.close()
        return took

    def _source(self, path: Path) -> Callable[[int, int], bytes]:
        fd = os.open(path, os.O_RDONLY)
        return lambda offset, length: os.pread(fd, length, offset)

    def _download(self, store: object, pool: ThreadPoolExecutor, number: int) -> None:
        fd = os.open(self.place / "download", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

        def one(offset: int) -> None:
            os.pwrite(fd, store.read(f"bare-{number}", offset, PIECE), offset)  # type: ignore[attr-defined]

        list(pool.map(one, range(0, self.size, PIECE)))
        os.close(fd)


RATIOS = (
    ("cold read: runfs", "download: opendal, 8 ranges at a time, to a file"),
    ("cold read: runfs", "download: opendal, 8 ranges at a time, to nowhere"),
    ("warm read: runfs", "warm read: native file system"),
    ("cp of a warm file: runfs", "cp of a warm file: native file system"),
    ("push: runfs (until it is in S3)", "upload: opendal"),
    ("write and close: runfs", "write: native file system, fsync"),
)


def report(size: int, rounds: list[dict[str, float]]) -> str:
    """The table: medians in MB/s, then ratios of speeds, each the median over the rounds."""
    lines = [f"{platform.system()} {platform.release()}, Python {platform.python_version()}, {os.cpu_count()} cores"]
    lines += [f"{size / 2**20:.0f} MiB, {len(rounds)} rounds, medians", ""]
    for name in rounds[0]:
        lines.append(f"{name:<52} {size / statistics.median(r[name] for r in rounds) / 1e6:>8,.0f} MB/s")
    lines.append("")
    for ours, theirs in RATIOS:
        ratio = statistics.median(r[theirs] / r[ours] for r in rounds)
        lines.append(f"{ratio:>5.2f} of the speed of '{theirs}': {ours}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="1GiB")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    size = parse_size(given.size) // PIECE * PIECE
    with tempfile.TemporaryDirectory(prefix="runfs-bench-") as name, seaweedfs(Path(name)) as server:
        bench = Bench(Path(name), server, size)
        uuid = bench.prepare()
        bench.runfs("mount", str(bench.mount), "--store", f"s3={server.url}", "-o", "push.auto=false")
        try:
            rounds = [bench.round(uuid, number) for number in range(given.rounds)]
        finally:
            bench.runfs("umount", str(bench.mount))
    print(report(size, rounds))


if __name__ == "__main__":
    main()
