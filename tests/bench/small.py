"""Works on many small files: read cold, unpacked, cloned, evicted.

Used by `__main__`.
"""

import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tests.bench.samples import Work, clock
from tests.bench.systems import Files

if TYPE_CHECKING:
    from tests.bench.__main__ import Bench

SIZE = 2048  # bytes
GROUPS = 200

READ = Work(
    "cold: small files of 2 kB, tar c | wc -c",
    "files/s",
    "more",
    "opendal",
    0.4,
    also=(("rclone", 3.0), ("juicefs", 3.0)),
)
UNPACK = Work("tar x of small files, each close durable", "files/s", "more", "juicefs", 1 / 3)
CLONE = Work("git clone", "s", "less", "juicefs", 1 / 3)
SYNCS = Work("syncs of files and directories in tar x", "syncs a file", "less", "runfs")
EVICT = Work("evict small files, proof in the journal", "files/s", "more", "native", 0.5)


def groups(count: int) -> list[str]:
    """The records that the small files are spread over."""
    return [f"small-{number:03}" for number in range(min(GROUPS, max(count // 50, 1)))]


def _files(bench: "Bench", group: str, count: int) -> Files:
    place = bench.place / "small" / group
    if not place.exists():
        place.mkdir(parents=True)
        for number in range(count):
            (place / f"{number:03}.bin").write_bytes(os.urandom(SIZE))
    return {path.name: path for path in sorted(place.iterdir())}


def read(bench: "Bench", number: int) -> None:
    """Every one of many small files that are only in S3, once, as tar reads them. A record of runfs has some more (what
    machinable keeps of a run), which tar reads as well and which count."""
    names = groups(bench.count)
    each = bench.count // len(names)
    total = each * len(names)
    systems = [system for system in bench.mounts() if system.name != "s3fs"]
    if not bench.once("small"):
        for group in names:
            files = _files(bench, group, each)
            bench.wire.put(group, files)
            for system in systems:
                for name, source in files.items():
                    (system.directory(group) / name).write_bytes(source.read_bytes())
        for system in systems:
            system.settle()
    keys = [f"{group}/{name}" for group in names for name in _files(bench, group, each)]
    with clock() as took:
        bench.wire.each(bench.wire.operator.read, keys, 64)
    bench.add(READ, bench.wire.name, total / took[0])
    for system in systems:
        places = [str(system.directory(group)) for group in names]
        count = _count(places)
        system.cool()
        with clock() as took:
            _tar(places, total)
        bench.add(READ, system.name, count / took[0])


def _count(places: list[str]) -> int:
    """The files below some directories."""
    return sum(len(files) for place in places for _path, _directories, files in os.walk(place))


def _tar(places: list[str], count: int) -> None:
    command = 'tar c -- "$@" 2>/dev/null | wc -c'
    done = subprocess.run(["bash", "-c", command, "tar", *places], capture_output=True, text=True, check=True)
    if int(done.stdout) < count * SIZE:
        raise SystemExit(f"tar read {done.stdout} bytes of {count} files")


def unpack(bench: "Bench", number: int) -> None:
    """Many small files written one after the other by tar, and a repository cloned."""
    archive, repository = _archive(bench), _repository(bench)
    for system in bench.resident():
        if system.name == "runfs, plain":
            continue
        target = system.directory("unpacked") / f"round-{number}"
        target.mkdir()
        with clock() as took:
            subprocess.run(["tar", "x", "-f", str(archive), "-C", str(target)], check=True)
            if system.name == "rclone":  # its close promises nothing; what was written last is sent last
                last = range(bench.count - 16, bench.count)
                system.settle("unpacked", {f"round-{number}/{each:05}.bin": SIZE for each in last})
        bench.add(UNPACK, system.name, bench.count / took[0])
        with clock() as took:
            subprocess.run(
                ["git", "clone", "-q", str(repository), str(target / "clone")], check=True, capture_output=True
            )
        bench.add(CLONE, system.name, took[0])
        system.settle()
    if number == 0:
        _count_syncs(bench, archive)


def _count_syncs(bench: "Bench", archive: Path) -> None:
    """Syncs by the daemon for each file of an archive; slowed down by being counted, so it is not timed."""
    if shutil.which("strace") is None:
        return
    target, counted = bench.runfs.directory("unpacked") / "counted", bench.place / "syncs"
    target.mkdir()
    command = ["strace", "-f", "-qq", "-e", "trace=fsync,fdatasync,sync_file_range,syncfs", "-o", str(counted)]
    tracer = subprocess.Popen([*command, "-p", str(bench.runfs.mounted.pid)], stderr=subprocess.DEVNULL)
    try:
        time.sleep(1.0)  # until it is attached
        subprocess.run(["tar", "x", "-f", str(archive), "-C", str(target)], check=True)
    finally:
        tracer.terminate()
        tracer.wait()
    syncs = sum("sync" in line and "resumed" not in line for line in counted.read_text().splitlines())
    bench.add(SYNCS, "runfs", syncs / bench.count)


def _archive(bench: "Bench") -> Path:
    path = bench.place / "small.tar"
    if not path.exists():
        source = bench.place / "to-pack"
        source.mkdir()
        for number in range(bench.count):
            (source / f"{number:05}.bin").write_bytes(os.urandom(SIZE))
        subprocess.run(["tar", "c", "-f", str(path), "-C", str(source), "."], check=True)
    return path


def _repository(bench: "Bench") -> Path:
    """A repository of some hundred files, made here: what is cloned must not depend on where this runs."""
    path = bench.place / "repository"
    if not path.exists():
        path.mkdir()
        for number in range(300):
            (path / f"module{number % 10}").mkdir(exist_ok=True)
            (path / f"module{number % 10}" / f"{number:03}.py").write_text("value = 1\n" * (number + 1))
        git = ["git", "-c", "user.name=bench", "-c", "user.email=bench@localhost", "-C", str(path)]
        for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
            subprocess.run([*git, *command], check=True)
    return path


def evict(bench: "Bench", number: int) -> None:
    """Evict records of small files whose proof is in the journal, those that machinable keeps among them; the same with
    bare leases, stats and unlinks."""
    names = groups(bench.count)
    each = bench.count // len(names)
    native, runfs = bench.system("native"), bench.system("runfs")
    for group in names:
        native.put(group, _files(bench, group, each))
        for name, source in _files(bench, group, each).items():
            path = runfs.directory(group) / name
            if path.exists():
                path.read_bytes()
            else:
                path.write_bytes(source.read_bytes())
    runfs.settle()
    bench.runfs.runfs("verify", *(bench.runfs.records[group] for group in names))
    bench.runfs.runfs("hydrate", "--restore", *(bench.runfs.records[group] for group in names))
    with clock() as took:
        for group in names:
            _leave_bare(native.directory(group))
    bench.add(EVICT, "native", each * len(names) / took[0])
    count = _count([str(runfs.directory(group)) for group in names])
    with clock() as took:
        bench.runfs.runfs("evict", *(bench.runfs.records[group] for group in names))
    bench.add(EVICT, "runfs", count / took[0])


def _leave_bare(directory: Path) -> None:
    """What an eviction cannot do without: a lease, a look and an unlink a file; a sync a directory."""
    import fcntl

    place = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for name in os.listdir(place):
            fd = os.open(name, os.O_RDONLY, dir_fd=place)
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
            os.fstat(fd)
            os.unlink(name, dir_fd=place)
            os.close(fd)
        os.fsync(place)
    finally:
        os.close(place)
