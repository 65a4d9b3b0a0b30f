"""runfs beside the native file system, the bare store and its peers: `make bench` (QUICK=1: a few minutes).

Each round does every work once on every system, in the same order, on the same machine and the same SeaweedFS server,
so that figures of a round can be compared. Not a test: nothing here fails because something is slow.
"""

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.bench import data, metadata, report, small
from tests.bench.samples import Samples, Work
from tests.bench.systems import PEERS, PIECE, Native, Runfs, System, Wire, has
from tests.servers import Seaweed, seaweedfs
from vfs.where import parse_size

WORKS: dict[str, Callable[["Bench", int], None]] = {
    "resident": data.resident,
    "cold": data.cold,
    "limited": data.cold_limited,
    "random": data.random_cold,
    "safe": data.safe,
    "small": small.read,
    "unpack": small.unpack,
    "evict": small.evict,
    "listings": metadata.listings,
    "million": metadata.million,
    "growth": metadata.growth,
}
OUTSIDE = "RUNFS_BENCH_OUTSIDE"  # the network namespace that we left for one of our own
QUICK = ("resident", "cold", "random", "safe", "small", "unpack", "evict", "listings")


class Bench:
    """One run: the server, the systems, what is measured. Systems are started when a work first asks for them."""

    def __init__(self, place: Path, server: Seaweed, given: argparse.Namespace) -> None:
        self.place = place
        self.server = server
        self.peers = [name for name in given.peers.split(",") if name and has(name)]
        quick = given.quick
        self.size = parse_size(given.size or ("128MiB" if quick else "1GiB")) // PIECE * PIECE
        self.large = parse_size(given.large or ("256MiB" if quick else "10GiB")) // PIECE * PIECE
        self.count = 1000 if quick else 10_000
        self.records = 10_000 if quick else 100_000
        self.index = 100_000 if quick else 1_000_000
        self.growth = (1000, 10_000) if quick else (1000, 10_000, 100_000, 1_000_000)
        self.files = (10, 1000) if quick else (10, 1000, 100_000)
        self.samples = Samples()
        self.curves: report.Growth = {}
        self.wire = Wire(server)
        self._systems: dict[str, System] = {}
        self._kept: dict[str, metadata.Large] = {}
        self._done: set[str] = set()
        self._groups = ["resident", "cold", "large", "safe", "unpacked", "growth", *small.groups(self.count)]

    def system(self, name: str) -> System:
        if name not in self._systems:
            self._systems[name] = self._make(name)
        return self._systems[name]

    def _make(self, name: str) -> System:
        if name == "native":
            return Native(self.place)
        if name.startswith("runfs"):
            return Runfs(self.place, self.server, self._groups, passthrough=name == "runfs")
        return PEERS[name](self.place, self.server)

    @property
    def runfs(self) -> Runfs:
        found = self.system("runfs")
        assert isinstance(found, Runfs)
        return found

    def resident(self) -> list[System]:
        """Those compared on what is here."""
        names = ["native", "runfs", "runfs, plain", *(peer for peer in self.peers if peer != "s3fs")]
        return [self.system(name) for name in names]

    def mounts(self) -> list[System]:
        """Those compared on what is away."""
        return [self.system(name) for name in ("runfs", *self.peers)]

    def kept(self, name: str, make: Callable[[Path], metadata.Large]) -> metadata.Large:
        if name not in self._kept:
            self._kept[name] = make(self.place / name)
        return self._kept[name]

    def add(self, work: Work, system: str, value: float) -> None:
        self.samples.add(work, system, value)
        print(f"  {work.name:<55} {system:<13} {value:>14,.2f} {work.unit}", file=sys.stderr, flush=True)

    def grown(self, over: str, what: str, count: int, value: float) -> None:
        self.curves.setdefault((over, what), []).append((count, value))
        print(f"  {what}, {count:,} {over}: {value:.2f} ms", file=sys.stderr, flush=True)

    def once(self, name: str) -> bool:
        """Whether this was done before; it counts as done from now on."""
        before = name in self._done
        self._done.add(name)
        return before

    def content(self, size: int) -> Path:
        """A file of so many bytes that do not repeat within a piece."""
        path = self.place / f"content-{size}"
        if not path.exists():
            piece = os.urandom(PIECE)
            with path.open("wb") as file:
                for number in range(size // PIECE):
                    file.write(piece[number + 1 :] + piece[: number + 1])
        return path

    @contextlib.contextmanager
    def limited(self, rate: int) -> Iterator[None]:
        """What the S3 server answers is limited to so many bytes a second, by the kernel. What its parts say to each
        other goes over loopback too, and is not. Never outside a network namespace of our own: others use loopback."""
        if not _is_alone():
            raise OSError("a limit needs a network namespace of its own (root, unshare)")
        for words in (
            "qdisc add dev lo root handle 1: htb",
            f"class add dev lo parent 1: classid 1:1 htb rate {rate * 8}bit burst 4mb quantum 200000",
            f"filter add dev lo parent 1: protocol ip prio 1 u32 match ip sport {self.server.port} 0xffff flowid 1:1",
        ):
            subprocess.run(["tc", *words.split()], check=True, capture_output=True)
        try:
            yield
        finally:
            subprocess.run(["tc", "qdisc", "del", "dev", "lo", "root"], check=True, capture_output=True)

    def stop(self) -> None:
        for large in self._kept.values():
            large.mounted.stop()
        for system in self._systems.values():
            system.stop()
        self.wire.stop()


def _is_alone() -> bool:
    """Whether this process was started in a network of its own."""
    outside = os.environ.get(OUTSIDE)
    return outside is not None and outside != os.readlink("/proc/self/ns/net")


def _go_alone() -> None:
    """Start again in a network namespace with nothing but loopback, where we may."""
    if _is_alone():
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    elif OUTSIDE not in os.environ and shutil.which("unshare") and os.geteuid() == 0:
        environment = {**os.environ, OUTSIDE: os.readlink("/proc/self/ns/net")}
        os.execvpe("unshare", ["unshare", "--net", sys.executable, "-m", "tests.bench", *sys.argv[1:]], environment)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, one round")
    parser.add_argument("--only", default="", help=f"comma-separated: {', '.join(WORKS)}")
    parser.add_argument("--peers", default="rclone,juicefs,s3fs", help="which of them, if installed")
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--size", default="", help="of large files")
    parser.add_argument("--large", default="", help="of the largest file")
    parser.add_argument("--out", type=Path, default=Path("build/bench"), help="where table, plot and kept line go")
    given = parser.parse_args()
    rounds = given.rounds or (1 if given.quick else 3)
    chosen = [name for name in given.only.split(",") if name] or list(QUICK if given.quick else WORKS)
    if "limited" in chosen:
        _go_alone()
    given.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="runfs-bench-") as name, seaweedfs(Path(name) / "weed") as server:
        bench = Bench(Path(name), server, given)
        try:
            _run(bench, chosen, rounds)
        finally:
            bench.stop()
    _report(bench, given.out, rounds, chosen)


def _run(bench: Bench, chosen: list[str], rounds: int) -> None:
    for number in range(rounds):
        for name in chosen:
            began = time.monotonic()
            print(f"round {number + 1}, {name}", file=sys.stderr, flush=True)
            try:
                WORKS[name](bench, number)
            except (OSError, subprocess.SubprocessError) as error:  # a peer that fails is left out, and said so
                print(f"  {name} was not finished: {error}", file=sys.stderr, flush=True)
            print(f"  {name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)


def _report(bench: Bench, out: Path, rounds: int, chosen: list[str]) -> None:
    text = report.table(bench.samples, rounds)
    kept = out / "runs.jsonl"
    slower = report.slower(kept, bench.samples)
    report.keep(kept, bench.samples, rounds=rounds, works=chosen, size=bench.size)
    (out / "table.md").write_text(text + "\n")
    print(text)
    for line in slower:
        print(f"slower than before: {line}")
    if report.plot(out / "bench.png", bench.samples, bench.curves):
        print(f"plot: {out / 'bench.png'}")


if __name__ == "__main__":
    main()
