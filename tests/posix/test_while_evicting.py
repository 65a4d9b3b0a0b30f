"""SQLite, git and rsync work on a record while another process pushes, evicts and hydrates it in a loop; they end with
what they end with on the native file system. The loop counts, so that nothing passes because nothing was evicted."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.mounted.records import Record, Shared, ask, differences, python, run, tree
from tests.mounted.test_tools import needs
from tests.mounting import ROOT
from tests.posix.places import Arena, fill
from vfs import places

pytestmark = pytest.mark.mounted
WORK_S = 5  # of each workload
# Prints how often each command went well. Evicting says no while the record is in use: that is what it is for.
LOOP = """
import json, sys, time
from collections import Counter
from pathlib import Path
from daemon import client
socket, uuid, done = Path(sys.argv[1]), sys.argv[2], Counter()
print("begun", flush=True)
import threading
over = threading.Event()
threading.Thread(target=lambda: (sys.stdin.readline(), over.set()), daemon=True).start()
while not over.is_set():
    for command, more in (("evict", {}), ("hydrate", {}), ("evict", {}), ("hydrate", {"restore": True}), ("evict", {})):
        answer = client.ask(socket, command, {"uuids": [uuid], **more}, silence_s=60.0)
        done[command + "".join(more)] += answer is not None and answer["exit"] == 0
        time.sleep(0.02)
print(json.dumps(done))
"""
SQLITE = """
import sqlite3, sys, time
mode, seconds = sys.argv[1], float(sys.argv[2])
end, turn = time.monotonic() + seconds, 0
while time.monotonic() < end or turn < 8:
    db = sqlite3.connect("data.db", timeout=30, isolation_level=None)
    assert db.execute(f"PRAGMA journal_mode={mode}").fetchone()[0] == mode
    db.execute("CREATE TABLE IF NOT EXISTS t (turn, number, filler)")
    for part in range(3):
        db.execute("BEGIN IMMEDIATE")
        count = db.execute("SELECT count(*) FROM t").fetchone()[0]
        assert count == turn * 60 + part * 20, (count, turn, part)
        db.executemany("INSERT INTO t VALUES (?,?,?)", ((turn, count + n, "x" * 300) for n in range(20)))
        db.execute("COMMIT")
    db.execute("BEGIN")
    db.execute("DELETE FROM t")
    db.execute("ROLLBACK")
    db.close()
    turn += 1
    time.sleep(0.3)  # nobody has it open: it can be evicted
db = sqlite3.connect("data.db")
print(db.execute("PRAGMA integrity_check").fetchone()[0])
numbers = [row[0] for row in db.execute("SELECT number FROM t ORDER BY number")]
print(numbers == list(range(turn * 60)))
"""
GIT = """
export GIT_CONFIG_GLOBAL=/dev/null GIT_CONFIG_NOSYSTEM=1
export GIT_AUTHOR_NAME=t GIT_AUTHOR_EMAIL=t@example.org GIT_COMMITTER_NAME=t GIT_COMMITTER_EMAIL=t@example.org
export GIT_AUTHOR_DATE=2024-01-01T00:00:00Z GIT_COMMITTER_DATE=2024-01-01T00:00:00Z
git init -q -b main repo; cd repo
for turn in 1 2 3 4; do
    mkdir -p dir$turn; seq $turn 9000 > dir$turn/numbers; seq 20000 > large; echo $turn >> large
    sleep 0.2
    git add -A; git commit -qm "turn $turn"; git status --porcelain
done
git clone -q . ../clone; git -C ../clone fsck --strict 2>&1 | grep -v '^notice' || true
git gc -q --prune=now; sleep 0.3; git fsck --strict 2>&1 | grep -v '^notice' || true
git -C ../clone checkout -q HEAD~2; git -C ../clone status --porcelain
git rev-parse HEAD; git log --format=%s; sha256sum large dir*/numbers
"""
RSYNC = """
for turn in 1 2 3; do
    rsync -aH --checksum --delete "$SOURCE/" copy/
    echo "turn $turn" >> "copy/grows"; sleep 0.3
    rsync -aH --checksum copy/ "second copy/"
    rsync -aH --checksum --dry-run --itemize-changes copy/ "second copy/"
done
rsync -aH --checksum --delete "$SOURCE/" copy/
rsync -aHi --checksum --dry-run "$SOURCE/" copy/
"""


@contextmanager
def moved_about(shared: Shared, record: Record) -> Iterator[dict[str, int]]:
    """Another process evicts and hydrates the record until the block ends; then, how often it could."""
    socket = places.socket_of(Path(shared.mounted.environment["RUNFS_RUNTIME_DIR"]), shared.mounted.path)
    done: dict[str, int] = {}
    with subprocess.Popen(
        [sys.executable, "-c", LOOP, str(socket), record.uuid],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "begun\n"
            yield done
        finally:
            said, errors = process.communicate("over\n", timeout=120)
        assert process.returncode == 0, errors
        done |= json.loads(said)


def beside(arena: Arena, work: Callable[[Path], str]) -> Record:
    """Do the work natively, and in a record that is moved about; both say the same and leave the same."""
    record = arena.record("evicted", _with_something)
    expected = work(record.plain)
    with moved_about(arena.shared, record) as done:
        assert work(record.path) == expected
    assert done["evict"] >= 2, f"next to nothing was evicted meanwhile: {done}"
    return record


def _with_something(directory: Path) -> None:
    for number in range(6):
        (directory / f"file {number}").write_bytes(os.urandom(80_000 + number))
    os.link(directory / "file 1", directory / "again")
    (directory / "sym").symlink_to("file 2")


WORKING = """
import os, sys
os.chdir("sub")
for line in sys.stdin:
    print(os.getcwd(), os.listdir("."), os.stat("leaf").st_size, len(open("leaf", "rb").read()), flush=True)
"""


def test_a_working_directory_stays_one(arena: Arena) -> None:
    """Also when the record moves from under the process that works in it."""
    record = arena.record("resident", lambda directory: fill(directory / "one"))
    place = record.path / "one"
    size = (place / "sub" / "leaf").stat().st_size
    command = [sys.executable, "-S", "-c", WORKING]
    with subprocess.Popen(command, cwd=place, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for step in ("evict", "hydrate", "evict", "restore", "evict"):
            if step == "evict":
                record.evict()
            else:
                done = ask(arena.shared.mounted, "hydrate", uuids=[record.uuid], restore=step == "restore")
                assert done["exit"] == 0, done
            process.stdin.write("go\n")
            process.stdin.flush()
            assert process.stdout.readline() == f"{place}/sub ['leaf'] {size} {size}\n", step


@pytest.mark.parametrize("mode", ["delete", "wal"])
def test_sqlite(arena: Arena, mode: str) -> None:
    record = beside(arena, lambda at: python(SQLITE, at, mode, "0" if "plain" in str(at) else str(WORK_S)))
    record.evict()
    check = "import sqlite3; print(sqlite3.connect('data.db').execute('PRAGMA integrity_check').fetchone()[0])"
    assert python(check, record.path) == "ok\n"


def test_git(arena: Arena) -> None:
    needs("git")
    record = beside(arena, lambda at: run(GIT, at).stdout)
    record.evict()
    assert run("git -C repo fsck --strict 2>&1 | grep -v '^notice' || true", record.path).stdout == ""


def test_rsync(arena: Arena, tmp_path: Path) -> None:
    needs("rsync")
    source = tmp_path / "source"
    source.mkdir()
    _with_something(source)
    (source / "sub").mkdir(mode=0o750)
    for number in range(40):
        (source / "sub" / f"{number}").write_bytes(os.urandom(5_000 * (number % 20)))
    record = beside(arena, lambda at: run(RSYNC, at, SOURCE=str(source)).stdout)
    record.evict()
    assert not differences(tree(record.path / "copy", times=True), tree(source, times=True))
    assert not differences(tree(record.path), tree(record.plain))
