"""Works on large files: resident reads and writes, cold reads, and a write until it is safe.

Used by `__main__`. Each work is a function of the bench (`Bench`) that adds one sample for each system.
"""

import mmap
import os
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tests.bench.samples import Work, clock
from tests.bench.systems import PIECE, System, drop_caches

if TYPE_CHECKING:
    from tests.bench.__main__ import Bench

MIB = 1 << 20
SMALL = 4096
RANDOM_COUNT = 20_000
PLACES = 100
TURNS = 5

RESIDENT_READ = Work("resident: sequential read, 1 MiB", "MB/s", "more", "native", 0.9)
RESIDENT_RANDOM = Work("resident: random read, 4 KiB", "1/s", "more", "native", 0.85)
RESIDENT_MMAP = Work("resident: mmap, each page touched", "MB/s", "more", "native", 0.85)
RESIDENT_WRITE = Work("resident: sequential write, 1 MiB", "MB/s", "more", "native", 0.85)
RESIDENT_RANDOM_WRITE = Work("resident: random write, 4 KiB", "1/s", "more", "native", 0.85)
FIRST_READ = Work(
    "resident: first sequential read, no passthrough",
    "MB/s",
    "more",
    "juicefs",
    2.0,
    "runfs, plain",
    (("rclone", 2.0),),
)
COLD_READ = Work(
    "cold: sequential read from S3", "MB/s", "more", "opendal", 0.7, also=(("juicefs", 1.0), ("rclone", 1.0))
)
COLD_LIMITED = Work(
    "cold: the same through 500 MB/s", "MB/s", "more", "opendal", 0.9, also=(("juicefs", 1.0), ("rclone", 1.0))
)
FIRST_BYTE = Work("cold: first byte", "ms", "less", "opendal", 1 / 3)
COLD_RANDOM = Work("cold: 100 random reads, 4 KiB", "ms", "less", "opendal", 1 / 1.3)
SAFE = Work("write, close, safe in S3", "MB/s", "more", "opendal", 0.8)


def read_through(path: Path, size: int) -> float:
    """Seconds to read a file from start to end in pieces of 1 MiB, into the same memory."""
    buffer = bytearray(MIB)
    done = 0
    with clock() as took, open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            done += count
    if done != size:
        raise SystemExit(f"{path} gave {done} of {size} bytes")
    return took[0]


def scattered(size: int, count: int, seed: int) -> list[int]:
    """So many offsets in a file, each a multiple of 4 KiB; the same for the same seed."""
    chance = random.Random(seed)
    return [chance.randrange(size // SMALL) * SMALL for _ in range(count)]


def read_random(path: Path, size: int, count: int, seed: int) -> float:
    """Seconds for so many reads of 4 KiB."""
    places = scattered(size, count, seed)
    buffers = [bytearray(SMALL)]
    fd = os.open(path, os.O_RDONLY)
    try:
        with clock() as took:
            for place in places:
                os.preadv(fd, buffers, place)
    finally:
        os.close(fd)
    return took[0]


def touch(path: Path, size: int) -> float:
    """Seconds to touch each page of a mapping."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ) as mapped, clock() as took:
        if len(mapped[::SMALL]) != size // SMALL:
            raise SystemExit("the mapping is short")
    return took[0]


def write_through(path: Path, data: bytes, size: int) -> float:
    """Seconds to write over a file from start to end, without its close."""
    with open(path, "r+b", buffering=0) as file, clock() as took:
        for _ in range(size // len(data)):
            file.write(data)
    return took[0]


def write_random(path: Path, size: int, count: int, seed: int) -> float:
    places = scattered(size, count, seed)
    data = os.urandom(SMALL)
    fd = os.open(path, os.O_RDWR)
    try:
        with clock() as took:
            for place in places:
                os.pwrite(fd, data, place)
    finally:
        os.close(fd)
    return took[0]


def _first_read(system: System, path: Path, size: int) -> float:
    """Seconds to read a file whose bytes the system has here, in memory, and the kernel not yet for the mount."""
    if system.name != "native":  # there it would be the only copy in memory
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return read_through(path, size)


def resident(bench: "Bench", number: int) -> None:
    """Everything on a file whose bytes are here and in the page cache. Each figure is taken on all systems within a
    second or two, and several times, as a busy machine changes from one moment to the next; peers that are far slower
    have their turn once."""
    size = bench.size
    paths = {system: system.directory("resident") / "big" for system in bench.resident()}
    for system, path in paths.items():
        if not path.exists():
            system.put("resident", {"big": bench.content(size)})
        read_through(path, size)  # now it is in the page cache, as far as the system keeps it
    figures: list[tuple[Work, float, Callable[[System, Path, int], float]]] = [
        (FIRST_READ, size / 1e6, lambda system, path, _turn: _first_read(system, path, size)),
        (RESIDENT_READ, size / 1e6, lambda _system, path, _turn: read_through(path, size)),
        (RESIDENT_RANDOM, RANDOM_COUNT, lambda _system, path, turn: read_random(path, size, RANDOM_COUNT, turn)),
        (RESIDENT_MMAP, size / 1e6, lambda _system, path, _turn: touch(path, size)),
        (RESIDENT_WRITE, size / 1e6, lambda _system, path, _turn: write_through(path, os.urandom(MIB), size)),
        (RESIDENT_RANDOM_WRITE, RANDOM_COUNT, lambda _s, path, turn: write_random(path, size, RANDOM_COUNT, turn)),
    ]
    for work, amount, measure in figures:
        for turn in range(TURNS):
            for system, path in paths.items():
                ours = system.name in ("native", "runfs", "runfs, plain")
                if ours or (turn == 0 and work not in (RESIDENT_WRITE, RESIDENT_RANDOM_WRITE)):  # they send it away
                    bench.add(work, system.name, amount / measure(system, path, turn))


def cold(bench: "Bench", number: int) -> None:
    """A file that is only in S3, read from start to end."""
    _cold(bench, COLD_READ)


def cold_limited(bench: "Bench", number: int) -> None:
    """The same through a network of 500 MB/s."""
    with bench.limited(500_000_000):
        _cold(bench, COLD_LIMITED)


def _cold(bench: "Bench", work: Work) -> None:
    size = bench.size
    source = bench.content(size)
    if not bench.once("cold"):
        bench.wire.put("cold", {"big": source})
        for system in bench.mounts():
            system.put("cold", {"big": source})
    drop_caches()
    with clock() as took:
        bench.wire.download("cold/big", size)
    bench.add(work, bench.wire.name, size / took[0] / 1e6)
    for system in bench.mounts():
        system.cool()
        bench.add(work, system.name, size / read_through(system.directory("cold") / "big", size) / 1e6)


def random_cold(bench: "Bench", number: int) -> None:
    """The first byte, and 4 KiB at a hundred random places, of a large file that is only in S3."""
    size = bench.large
    systems = [system for system in bench.mounts() if system.name in ("runfs", "juicefs", "rclone")]
    if not bench.once("large"):
        source = bench.content(size)
        bench.wire.put("large", {"big": source})
        for system in systems:
            system.put("large", {"big": source})
    places = scattered(size, PLACES, number)

    def bare(place: int) -> int:
        return len(bench.wire.operator.read("large/big", offset=place, size=SMALL))

    with clock() as took:
        bare(0)
    bench.add(FIRST_BYTE, bench.wire.name, took[0] * 1e3)
    bench.add(COLD_RANDOM, bench.wire.name, _at_once(bare, places) * 1e3)
    for system in systems:
        system.cool()
        path = system.directory("large") / "big"
        fd = os.open(path, os.O_RDONLY)
        try:
            with clock() as took:
                os.pread(fd, 1, 0)
            bench.add(FIRST_BYTE, system.name, took[0] * 1e3)
            bench.add(COLD_RANDOM, system.name, _at_once(partial(_read_at, fd), places) * 1e3)
        finally:
            os.close(fd)


def _read_at(fd: int, place: int) -> int:
    return len(os.pread(fd, SMALL, place))


def _at_once(call: Callable[[int], int], places: list[int]) -> float:
    with ThreadPoolExecutor(8) as pool, clock() as took:
        if sum(pool.map(call, places)) != SMALL * len(places):
            raise SystemExit("a read was short")
    return took[0]


def safe(bench: "Bench", number: int) -> None:
    """A file written, closed, and safe in S3."""
    size = bench.size
    data = os.urandom(PIECE)
    source = bench.place / "fresh"
    _write(source, data, size)
    with clock() as took:
        bench.wire.upload(f"safe-{number}", source)
    bench.add(SAFE, bench.wire.name, size / took[0] / 1e6)
    bench.wire.operator.delete(f"safe-{number}")
    for system in bench.mounts():
        path = system.directory("safe") / "fresh"
        with clock() as took:
            _write(path, data, size)
            system.settle("safe", {"fresh": size})
        bench.add(SAFE, system.name, size / took[0] / 1e6)
        path.unlink()
        _forget(system)
    source.unlink()


def _write(path: Path, data: bytes, size: int) -> None:
    with open(path, "wb", buffering=0) as file:
        for number in range(size // len(data)):
            file.write(data[number + 1 :] + data[: number + 1])


def _forget(system: System) -> None:
    """What a deleted file leaves to be done is not the next system's burden."""
    system.settle()
