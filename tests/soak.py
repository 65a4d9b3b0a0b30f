"""Readers, writers, evictions and faults together for many minutes: `make soak MINUTES=30`.

Everything is on a real mount with a real S3 server behind a proxy that misbehaves now and then. Each worker owns a
record and checks what it reads. In between, with nothing going on and everything evicted, the daemon is measured:
resident memory, descriptors, threads, inodes and lookups that it keeps, rows of its journal. Ends with exit code 1 when
bytes were wrong, a call took longer than it may, or what is kept has grown from the first measurement to the last.

    python -m tests.soak MINUTES [SEED]
"""

import contextlib
import errno
import os
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.crash.writing import Acknowledged, Change, fill
from tests.faults import FaultProxy, http_answer
from tests.mounted.records import Record, Shared, ask
from tests.mounts import unmount_under
from tests.servers import seaweedfs

WORKERS = 4
READERS = 2
DEADLINE_S = 4.0
CALL_LIMIT_S = 40.0  # a call may meet each of several deadlines, on a machine that does other things too
FAULTS = ("pass", "pass", "pass", "delay", "refuse", "silent", "cut", "busy", "say", "wrong", "dribble")
ROUND_S = 45.0
AWAY = {errno.EIO, errno.ETIMEDOUT, errno.EHOSTUNREACH}
# How much more than at the first measurement may be kept at the last: allocators keep what they had, tables have steps.
GROWTH = {"memory_mb": 24, "descriptors": 4, "threads": 6, "inodes": 8, "lookups": 30, "handles": 0, "listings": 0}


@dataclass
class Told:
    """What happened. `wrong` fails the run."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    longest: tuple[float, str] = (0.0, "")
    lock: threading.Lock = field(default_factory=threading.Lock)

    @contextlib.contextmanager
    def call(self, name: str) -> Iterator[None]:
        """Count and time one call; what a fault explains is counted too."""
        began = time.monotonic()
        try:
            yield
            what = name
        except OSError as error:
            what = f"{name} {errno.errorcode.get(error.errno or 0, '?')}"
            if error.errno not in AWAY:
                self.wrong.append(f"{name}: {error}")
        except Exception as error:
            what = f"{name} {type(error).__name__}"
            self.wrong.append(f"{name}: {error!r}")
        with self.lock:
            self.counts[what] += 1
            self.longest = max(self.longest, (time.monotonic() - began, name))


class Soak:
    """One run. `shared` is the mount."""

    def __init__(self, place: Path, seed: int) -> None:
        self.place = place
        self.seed = seed
        self.told = Told()
        self.paused = threading.Event()
        self.samples: list[dict[str, float]] = []
        self.luck = random.Random(seed)

    def run(self, minutes: float) -> int:
        with seaweedfs(self.place / "seaweed") as server, FaultProxy(server.port) as proxy:
            shared = Shared(self.place, WORKERS + READERS + 1, self.options())
            shared.mounted.environment |= server.environment()
            url = f"s3://{server.bucket}/soak?endpoint={proxy.endpoint}&region={server.region}"
            command = shared.mounted.command
            command[command.index("--store") + 1] = url
            with shared.mounted:
                try:
                    self.work(shared, proxy, time.monotonic() + minutes * 60)
                finally:
                    self.say(shared)
        return int(bool(self.told.wrong))

    @staticmethod
    def options() -> tuple[str, ...]:
        given = (f"deadline_s={DEADLINE_S:g}", "least_throughput=1MiB", "push.quiet_s=0.5", "push.every_s=5")
        return tuple(word for option in (*given, "cache.high=none") for word in ("-o", option))

    def work(self, shared: Shared, proxy: FaultProxy, end: float) -> None:
        records = [shared.take("resident", fill) for _ in range(WORKERS)]
        stable = [shared.take("evicted") for _ in range(READERS)]
        known = [Acknowledged() for _ in records]
        turn = 0
        while True:
            jobs: list[Callable[[threading.Event], None]] = [
                *(self.writer(*pair, turn * WORKERS + n) for n, pair in enumerate(zip(records, known, strict=True))),
                *(self.reader(record) for record in stable),
                self.manager(shared, [*records, *stable]),
                self.breaker(proxy),
            ]
            self.round(jobs)
            proxy.set("pass")
            self.settle(shared, records, known, stable)
            self.measure(shared)
            turn += 1
            if time.monotonic() > end and turn > 2:
                break
        self.judge()

    def round(self, jobs: list[Callable[[threading.Event], None]]) -> None:
        over = threading.Event()
        threads = [threading.Thread(target=self.guarded, args=(job, over)) for job in jobs]
        for thread in threads:
            thread.start()
        over.wait(ROUND_S)
        over.set()
        for thread in threads:
            thread.join(4 * CALL_LIMIT_S)
            if thread.is_alive():
                raise SystemExit("a worker hangs in the mount")

    def guarded(self, job: Callable[[threading.Event], None], over: threading.Event) -> None:
        try:
            job(over)
        except Exception as error:
            self.told.wrong.append(f"a worker ended: {error!r}")

    # --- who works -----------------------------------------------------------------------------------------------

    def writer(self, record: Record, known: Acknowledged, turn: int) -> Callable[[threading.Event], None]:
        """Changes files of a record of its own; a change that a fault refused may have happened in part."""

        def job(over: threading.Event) -> None:
            number = 1_000_000 + turn * 10_000
            while not over.wait(0.01):
                number += 1
                known.begun = Change.numbered(number, self.seed)
                failed = True
                with self.told.call(f"write {known.begun.what}"):
                    known.begun.do(str(record.path))
                    failed = False
                if failed:
                    self.look(record, known, over)
                else:
                    known.begun.apply(known.files)
                    known.begun = None

        return job

    def look(self, record: Record, known: Acknowledged, over: threading.Event) -> None:
        """Take what is there for what the refused change did, as soon as it can be read."""
        while not over.wait(0.2):
            with contextlib.suppress(OSError):
                known.settle(record.path)
                return

    def reader(self, record: Record) -> Callable[[threading.Event], None]:
        luck = random.Random(self.luck.random())
        names = [path.relative_to(record.plain) for path in sorted(record.plain.rglob("*")) if path.is_file()]

        def job(over: threading.Event) -> None:
            while not over.wait(0.01):
                name = luck.choice(names)
                with self.told.call("read"), (record.path / name).open("rb") as file:
                    at = luck.randrange(1 + (record.plain / name).stat().st_size)
                    file.seek(at)
                    got = file.read(300_000)
                    with (record.plain / name).open("rb") as plain:
                        plain.seek(at)
                        if got != plain.read(300_000):
                            self.told.wrong.append(f"{record.path / name} at {at}: wrong bytes")
                with self.told.call("list"):
                    os.listdir(record.path)

        return job

    def manager(self, shared: Shared, records: list[Record]) -> Callable[[threading.Event], None]:
        luck = random.Random(self.luck.random())

        def job(over: threading.Event) -> None:
            while not over.wait(luck.random()):
                uuid = luck.choice(records).uuid
                command, more = luck.choice(
                    [("evict", {}), ("evict", {}), ("push", {}), ("hydrate", {}), ("hydrate", {"restore": True})]
                )
                done = ask(shared.mounted, command, uuids=[uuid], **more)
                self.told.counts[f"{command} {'done' if done['exit'] == 0 else 'refused'}"] += 1
                ask(shared.mounted, "status")

        return job

    def breaker(self, proxy: FaultProxy) -> Callable[[threading.Event], None]:
        luck = random.Random(self.luck.random())
        proxy.saying, proxy.share = http_answer("500 Internal Server Error", "InternalError"), 0.5
        proxy.rate, proxy.cut_after, proxy.delay_s = 1.0, 100_000, 0.05

        def job(over: threading.Event) -> None:
            while not over.wait(0.5 + 3 * luck.random()):
                mode = luck.choice(FAULTS)
                self.told.counts[f"fault {mode}"] += 1
                proxy.set(mode)

        return job

    # --- in between ----------------------------------------------------------------------------------------------

    def settle(self, shared: Shared, records: list[Record], known: list[Acknowledged], stable: list[Record]) -> None:
        """Nothing goes on: all is what it should be, is pushed, and is evicted."""
        end = time.monotonic() + 90
        while time.monotonic() < end:
            with contextlib.suppress(OSError):
                for record, each in zip(records, known, strict=True):
                    if said := each.wrong(record.path):
                        self.told.wrong.append(said)
                    each.settle(record.path)
                    self.shrink(record, each)
                for record in stable:
                    record.same()
                break
            time.sleep(0.5)
        else:
            self.told.wrong.append("the store is there again, and records still cannot be read")
        refused = ""
        for record in [*records, *stable]:
            while (done := ask(shared.mounted, "evict", uuids=[record.uuid]))["exit"] and time.monotonic() < end:
                time.sleep(0.5)
            refused = refused or (f"{done['stay']}" if done["exit"] else "")
        if refused:
            self.told.wrong.append(f"not evicted when all is quiet: {refused}")

    @staticmethod
    def shrink(record: Record, known: Acknowledged) -> None:
        """As few and small files as at the start: what grows with them would be measured otherwise."""
        for name in [name for name in known.files if name.startswith("sub/")]:
            (record.path / name).unlink()
            del known.files[name]
        (record.path / "log").write_bytes(b"")
        known.files["log"] = b""

    def measure(self, shared: Shared) -> None:
        """What the daemon keeps. The kernel is asked to forget names first."""
        with contextlib.suppress(OSError):
            Path("/proc/sys/vm/drop_caches").write_text("2")
        time.sleep(3)
        pid = shared.mounted.pid
        status = dict(
            line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line
        )
        said = ask(shared.mounted, "status")["kept"]
        sample = {
            "memory_mb": int(status["VmRSS"].split()[0]) / 1024,
            "descriptors": len(os.listdir(f"/proc/{pid}/fd")),
            "threads": int(status["Threads"]),
            **{name: float(value) for name, value in said.items() if name in GROWTH},
        }
        self.samples.append(sample)
        print("  ".join(f"{name} {value:,.0f}" for name, value in sample.items()), flush=True)

    def judge(self) -> None:
        """The most of the first half, but for the very first measurement, and the least of the last two: what leaks
        goes on growing, what an allocator holds back comes and goes."""
        early, late = self.samples[1 : max(2, len(self.samples) // 2)], self.samples[-2:]
        first = {name: max(sample[name] for sample in early) for name in GROWTH}
        last = {name: min(sample[name] for sample in late) for name in GROWTH}
        for name, more in GROWTH.items():
            if last[name] > first[name] + more:
                self.told.wrong.append(f"{name} grew from {first[name]:,.0f} to {last[name]:,.0f}")
        if self.told.longest[0] > CALL_LIMIT_S:
            self.told.wrong.append(f"{self.told.longest[1]} took {self.told.longest[0]:.1f} s")

    def say(self, shared: Shared) -> None:
        log = shared.mounted.log()
        if "Traceback" in log or "please report this" in log:
            self.told.wrong.append("the log has something that nobody expected")
            (Path(tempfile.gettempdir()) / "runfs-soak.log").write_text(log)
        for name, count in sorted(self.told.counts.items()):
            print(f"{count:8,}  {name}")
        print(f"the longest call: {self.told.longest[1]}, {self.told.longest[0]:.1f} s")
        for each in self.told.wrong[:20]:
            print(f"WRONG: {each:.500}")
        print("failed" if self.told.wrong else "nothing was lost, wrong, late or left over")


def main(minutes: float, seed: int) -> int:
    place = Path(tempfile.mkdtemp(prefix="runfs-soak-"))
    try:
        return Soak(place, seed).run(minutes)
    finally:
        unmount_under(place)
        shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else int(time.time())))
