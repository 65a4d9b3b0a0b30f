"""The tools people use, on a resident and on an evicted record, compared with the same on a plain directory."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import in_ci
from tests.mounted.records import BIG, KEEP_SMALL, MIB, Record, Shared, python, run, tree

pytestmark = pytest.mark.mounted


def needs(program: str) -> None:
    if shutil.which(program) is None:
        if in_ci():
            pytest.fail(f"{program} is not installed", pytrace=False)
        pytest.skip(f"{program} is not installed")


class TestCopying:
    def test_cp_out_and_in(self, record: Record, tmp_path: Path) -> None:
        run(f"cp -a . {tmp_path}/out", record.path)
        assert tree(tmp_path / "out", times=True) == tree(record.plain, times=True)
        record.both("cp -a sub copied; cp -a big.bin copied/; cp --sparse=always big.bin sparse.bin")
        record.check()

    def test_cp_of_holes(self, record: Record) -> None:
        """A file with holes, written and copied on the mount, keeps its content."""
        record.both(
            "truncate -s 5M holes; printf end >> holes; printf middle | dd of=holes bs=1 seek=2500000 conv=notrunc "
            "status=none; cp --sparse=always holes always; cp --sparse=never holes never; cmp always never"
        )
        record.check()

    def test_rsync_copies_nothing_the_second_time(self, record: Record, tmp_path: Path) -> None:
        needs("rsync")
        command = "rsync -aHc --out-format=%n"
        first = run(f"{command} ./ {tmp_path}/out/", record.path).stdout
        assert "big.bin" in first
        assert tree(tmp_path / "out") == tree(record.plain)
        assert run(f"{command} ./ {tmp_path}/out/", record.path).stdout == ""
        run(f"{command} --exclude id.json {record.plain}/ {record.path}/inside/", tmp_path)
        assert run(f"{command} --exclude id.json {record.plain}/ {record.path}/inside/", tmp_path).stdout == ""
        by_time = "rsync -aH --out-format=%n"
        assert run(f"{by_time} --exclude id.json {record.plain}/ {record.path}/inside/", tmp_path).stdout == ""

    def test_tar(self, record: Record, tmp_path: Path) -> None:
        """tar looks at each file before and after reading it: bytes that come back must not look like a change."""
        out = tmp_path / "out"
        out.mkdir()
        done = run(f"tar cf - . | tar xf - -C {out}", record.path)
        assert done.stderr == ""
        assert tree(out, times=False) == tree(record.plain, times=False)
        record.both("tar cf all.tar --sort=name sub big.bin && mkdir un && tar xf all.tar -C un && rm all.tar")
        record.check()

    def test_mv_within_and_between_records(self, shared: Shared, record: Record) -> None:
        record.both("mv big.bin sub/moved.bin; mv sub sub2; mv -T sub2 'sub again'; mv log.txt link")
        record.check()
        other = shared.take("resident" if record.state == "evicted" else "evicted")
        for here, there in ((record.path, other.path), (record.plain, other.plain)):
            run(f"mv 'sub again/deeper dir' {there}/taken; mv -f private sub\\ again/moved.bin {there}/", here)
        record.check()
        other.check()


class TestLooking:
    def test_find_and_du(self, record: Record) -> None:
        listed = r"find . -type f -printf '%P %m %s %T@ %n\n' -o -type l -printf '%P %l\n' | sort"
        record.both(listed)
        record.both("find . -type f -size +1M | sort; find . -newermt 2020-09-01 ! -newermt 2020-10-01")
        record.both("du --apparent-size -b big.bin sub/tool.sh; ls -la --time-style=full-iso big.bin sub/tool.sh link")

    def test_du_tells_what_is_here(self, evicted: Record) -> None:
        """Blocks are those on this disk: an evicted file takes (nearly) none."""
        used = run("du -k big.bin", evicted.path).stdout.split()[0]
        assert int(used) < 64
        assert evicted.local_bytes("big.bin") == 0

    def test_grep_brings_back_what_it_reads_only(self, evicted: Record) -> None:
        assert run("grep -rl --include='*.txt' needle .", evicted.path).stdout == "./log.txt\n"
        assert evicted.local_bytes("log.txt") > 0  # it is larger than what is kept, and had to be read
        assert evicted.local_bytes("big.bin") == 0  # others up to 1 MiB may come along with it

    def test_grep_over_what_is_kept_small_brings_nothing(self, shared: Shared) -> None:
        records = [shared.take("evicted") for _ in range(2)]
        names = [str(record.path) for record in records]
        found = run(f"grep -rl --include='small.txt' --include='*.json' three {' '.join(names)}", shared.place).stdout
        assert sorted(found.splitlines()) == sorted(f"{name}/small.txt" for name in names)
        for record in records:
            large = [path for path in record.plain.rglob("*") if path.is_file() and path.stat().st_size > KEEP_SMALL]
            assert len(large) >= 5
            assert {record.local_bytes(str(path.relative_to(record.plain))) for path in large} == {0}

    def test_grep_everything(self, record: Record) -> None:
        record.both("grep -rc o . | sort; grep -c needle log.txt; tail -c 100 big.bin | md5sum")

    def test_head_brings_one_chunk(self, evicted: Record) -> None:
        run("head -c 100 big.bin > /dev/null", evicted.path)
        assert 0 < evicted.local_bytes("big.bin") <= 4 * MIB  # what the kernel reads ahead, not the file


class TestWriting:
    def test_dd(self, record: Record) -> None:
        record.both(
            "dd if=/dev/zero of=big.bin bs=1000 count=3 seek=1500 conv=notrunc status=none;"
            "dd if=small.txt of=log.txt oflag=append conv=notrunc status=none;"
            "dd if=small.txt of=chunk.bin status=none;"
            "dd if=/dev/zero of=new.bin bs=64k count=20 conv=fsync status=none;"
            "dd if=big.bin of=part.bin bs=1M skip=3 count=2 status=none;"
            "printf x >> empty; : > private"
        )
        record.check()

    def test_editors(self, record: Record) -> None:
        """sed -i and the like: a new file takes the old one's name."""
        record.both("sed -i s/quick/slow/ log.txt; sort -o small.txt small.txt; patch --version > /dev/null || true")
        record.both("cp big.bin big.bin.new && mv big.bin.new big.bin; ln -sfn big.bin link")
        record.both("install -m 640 small.txt installed")
        record.check()

    def test_git(self, record: Record, tmp_path: Path) -> None:
        needs("git")
        environment = {
            "GIT_CONFIG_GLOBAL": "/dev/null",
            "GIT_CONFIG_NOSYSTEM": "1",
            **{f"GIT_{who}_{what}": "t@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
            **{f"GIT_{who}_DATE": "2024-01-01T00:00:00Z" for who in ("AUTHOR", "COMMITTER")},
        }
        record.both("git init -q . && git add -A . && git commit -qm first && git rev-parse HEAD^{tree}", **environment)
        assert record.both("git status --porcelain", **environment).stdout == ""
        record.both("echo more >> small.txt && git commit -qam second", **environment)
        record.both("git checkout -q HEAD~1 && git checkout -q -", **environment)
        record.both("git gc -q && git fsck --no-dangling 2>&1 && git status --porcelain", **environment)
        run(f"git clone -q {record.path} {tmp_path}/clone", tmp_path, **environment)
        assert run("git log --format=%s", tmp_path / "clone", **environment).stdout == "second\nfirst\n"
        record.evict()
        assert run("git status --porcelain && git fsck --no-dangling 2>&1", record.path, **environment).stdout == ""


SQLITE_MAKE = """
import sqlite3, sys
db = sqlite3.connect("data.db", timeout=30)
print(db.execute(f"PRAGMA journal_mode={sys.argv[1]}").fetchone()[0])
db.execute("CREATE TABLE t (who, number, filler)")
db.executemany("INSERT INTO t VALUES (?,?,?)", (("made", n, "x" * 500) for n in range(4000)))
db.commit()
if sys.argv[1] == "wal":
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
db.close()
"""
SQLITE_WRITE = """
import sqlite3, sys
db = sqlite3.connect("data.db", timeout=30, isolation_level=None)
for number in range(25):
    db.execute("BEGIN IMMEDIATE")
    seen = db.execute("SELECT count(*) FROM t WHERE who != 'made'").fetchone()[0]
    db.execute("INSERT INTO t VALUES (?,?,?)", (sys.argv[1], seen, "y" * 200))
    db.execute("COMMIT")
db.close()
"""
SQLITE_READ = """
import sqlite3
db = sqlite3.connect("data.db", timeout=30)
print(db.execute("PRAGMA integrity_check").fetchone()[0])
print(db.execute("SELECT count(*) FROM t").fetchone()[0])
print([row[0] for row in db.execute("SELECT number FROM t WHERE who != 'made' ORDER BY number")] == list(range(50)))
db.close()
"""


class TestDatabases:
    @pytest.mark.parametrize("mode", ["wal", "delete"])
    @pytest.mark.parametrize("state", ["resident", "evicted"])
    def test_sqlite_from_two_processes(self, shared: Shared, state: str, mode: str) -> None:
        """Each transaction counts what is there: a lock or a page that one process sees late would show."""

        def make(directory: Path) -> None:
            assert python(SQLITE_MAKE, directory, mode) == f"{mode}\n"

        record = shared.take(state, make)
        writers = [
            subprocess.Popen([sys.executable, "-c", SQLITE_WRITE, name], cwd=record.path, stderr=subprocess.PIPE)
            for name in ("first", "second")
        ]
        for each in writers:
            _, said = each.communicate(timeout=60)
            assert each.returncode == 0, said.decode()
        expected = "ok\n4050\nTrue\n"
        assert python(SQLITE_READ, record.path) == expected
        record.evict()
        assert python(SQLITE_READ, record.path) == expected


MEMMAP = """
import sys
import numpy as np
for mode in ("r", "c"):
    numbers = np.memmap("big.bin", dtype=np.uint8, mode=mode)
    print(len(numbers), int(numbers[0]), int(numbers[-1]), int(numbers[3_000_000:3_000_100].sum()))
    del numbers
numbers = np.memmap("big.bin", dtype=np.uint8, mode="r+")
numbers[10] = 1
numbers[2_000_000:2_000_500] = 2
numbers[-1] = 3
numbers.flush()
numbers[5_000_000] = 4
print(int(numbers.sum(dtype=np.int64)))
del numbers
made = np.memmap("made.bin", dtype=np.int32, mode="w+", shape=(1000, 500))
made[:] = np.arange(500)
del made
np.save("array.npy", np.arange(100_000))
print(int(np.load("array.npy", mmap_mode="r")[-1]))
"""
MAP_AND_APPEND = """
import mmap, os
fd = os.open("big.bin", os.O_RDWR)
mapped = mmap.mmap(fd, 0)
log = os.open("big.bin", os.O_WRONLY | os.O_APPEND)
os.write(log, b"appended 1\\n")
for position in (0, 5000, 4_000_000):
    mapped[position:position + 4] = b"MMAP"
mapped.flush()
os.write(log, b"appended 2\\n")
mapped[1_000_000:1_000_004] = b"LAST"
mapped.close()
os.close(fd)
os.write(log, b"appended 3\\n")
os.close(log)
print(os.stat("big.bin").st_size)
"""


class TestMaps:
    def test_numpy_memmap(self, record: Record) -> None:
        assert python(MEMMAP, record.path) == python(MEMMAP, record.plain)
        record.check()

    def test_memmap_reads_what_it_touches(self, evicted: Record) -> None:
        python("import numpy as np; print(np.memmap('big.bin', dtype=np.uint8, mode='r')[5_500_000])", evicted.path)
        assert 0 < evicted.local_bytes("big.bin") < BIG - 2 * MIB

    def test_shared_writes_survive_the_close(self, record: Record) -> None:
        """Pages dirtied through a map are written after the file is closed; they must reach the store all the same."""
        code = (
            "import mmap, os; fd = os.open('big.bin', os.O_RDWR); m = mmap.mmap(fd, 0); os.close(fd)\n"
            "m[100:110] = b'0123456789'; m[6_000_000:6_000_003] = b'abc'; m.close()"
        )
        for place in (record.path, record.plain):
            python(code, place)
        record.check()

    def test_a_map_and_an_appender(self, record: Record) -> None:
        """The kernel writes a map's pages through any handle, also one that was opened for appending."""
        assert python(MAP_AND_APPEND, record.path) == python(MAP_AND_APPEND, record.plain)
        record.check()


def test_a_program_runs_from_a_record(record: Record) -> None:
    shutil.copy("/bin/true", record.working / "prog") if record.state == "resident" else None
    record.both("./sub/tool.sh; ./link")
    if record.state == "resident":
        assert os.access(record.path / "prog", os.X_OK)
        run("./prog", record.path)
