"""The reference model: random operations on two records of a mount and on a plain directory, compared after each one.

`machine(world)` makes the state machine for a world. What may differ while something is out of order is said in one
place, `Model.allowed`; everything else must be the same, errnos included. An operation that a fault refused must have
changed nothing; it is then not made in the plain directory either.

Names, types, modes, links, sizes and times are compared after every operation, which brings nothing back. Contents are
compared where an operation reads, when `look` is drawn, and at the end: as they are, and once more with every byte from
the store.
"""

import errno
import os
import random
import shutil
import time
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.model.actor import Error
from tests.model.world import MIB, World
from tests.mounted.records import until

NAMES = (b"f", b"g", b"h", b"d", b"d/f", b"d/g", b"d/e", b"d/e/f", b"l", b"n\xff w")
OFFSETS = (0, 1, 4095, 70_000, MIB - 3, MIB, 2 * MIB, 2 * MIB + 17, 3 * MIB + 5)
SIZES = (0, 1, 4096, 70_000, MIB + 1)
FLAGS = (0, os.O_CREAT, os.O_CREAT | os.O_EXCL, os.O_TRUNC, os.O_CREAT | os.O_TRUNC, os.O_APPEND | os.O_CREAT)
MODES = (0o644, 0o600, 0o755, 0o4711, 0o000, 0o2775)
FAULTS = {"file": ("down", "full"), "s3": ("down", "silent", "slow", "full", "busy", "wrong")}
AWAY = frozenset({errno.EIO, errno.ETIMEDOUT, errno.EHOSTUNREACH})
GRACE_S = 12.0  # in which what was under way to a store that is there again may still fail
WIDE_NS = 5 * 10**9

PATHS = st.tuples(st.integers(0, 1), st.sampled_from(NAMES))
FILES = st.tuples(st.integers(0, 1), st.sampled_from((b"f", b"f", b"g", b"h", b"d/f", b"d/f", b"d/g", b"l")))
RECORD = st.integers(0, 1)
SEED = st.integers(0, 255)
TIMES = st.sampled_from((0, 1, 1_500_000_000_123_456_789, 1_600_000_000_987_654_321))


def bytes_of(size: int, seed: int) -> bytes:
    """Content that differs with its seed and within itself."""
    return random.Random(seed).randbytes(4096)[: min(size, 4096)] * (size // 4096) + bytes([seed]) * (size % 4096)


class Model(RuleBasedStateMachine):
    """One example: two fresh records, evicted or not, and what happens to them."""

    world: World  # set by `machine`

    def __init__(self) -> None:
        super().__init__()
        self.fault = "up"
        self.recovered = 0.0
        self.open: dict[int, bytes] = {}
        self.uuids: list[str] = []

    @property
    def full(self) -> bool:
        return self.world.filler.filled

    # --- making one call on both sides ---------------------------------------------------------------------------

    @property
    def allowed(self) -> frozenset[int]:
        """Errors that something that is out of order explains."""
        found: frozenset[int] = AWAY if self.fault != "up" else frozenset()
        return found | {errno.ENOSPC} if self.full else found

    def path(self, at: tuple[int, bytes]) -> bytes:
        return self.uuids[at[0]].encode() + b"/" + at[1]

    def both(self, name: str, *arguments: Any, also: frozenset[int] = frozenset()) -> Any:
        """Make a call on the mount, and on the plain directory unless a fault refused it. What the mount gave."""
        got = self.world.here.call(name, *arguments)
        end = self.recovered + GRACE_S
        while isinstance(got, Error) and got.errno in AWAY and self.fault == "up" and time.monotonic() < end:
            time.sleep(0.05)
            got = self.world.here.call(name, *arguments)
        if isinstance(got, Error) and got.errno in self.allowed | also:
            return got
        if name == "pwrite" and isinstance(got, int) and got < len(arguments[1]):
            assert self.full, f"{name} wrote {got} of {len(arguments[1])} bytes"
            arguments = (arguments[0], arguments[1][:got], arguments[2])
        want = self.world.there.call(name, *arguments)
        assert got == want, f"{name}{arguments!r:.200}: {got} is not {want}"
        return got

    @invariant()
    def same(self) -> None:
        if self.uuids:
            assert not (said := self.difference()), said

    def difference(self) -> str:
        """How the two sides differ in what can be told without reading; '' when they do not."""
        for uuid in self.uuids:
            here, there = (actor.call("tree", uuid.encode()) for actor in (self.world.here, self.world.there))
            if isinstance(here, Error):
                return f"{uuid} cannot be listed: {here}"
            for path in sorted(here.keys() | there.keys()):
                one, other = here.get(path), there.get(path)
                if one is None or other is None or one[:-1] != other[:-1] or not alike(one[-1], other[-1]):
                    return f"{uuid}/{os.fsdecode(path)}: {one} is not {other}"
        return ""

    def contents(self) -> str:
        """How the two sides differ in what files hold."""
        for uuid in self.uuids:
            here, there = (actor.call("digests", uuid.encode()) for actor in (self.world.here, self.world.there))
            if isinstance(here, Error):
                return f"{uuid} cannot be read: {here}"
            for path in sorted(here.keys() | there.keys()):
                if here.get(path) != there.get(path):
                    return f"{uuid}/{os.fsdecode(path)}: other bytes"
        return ""

    @property
    def well(self) -> bool:
        return self.fault == "up" and not self.full

    # --- beginning and end ---------------------------------------------------------------------------------------

    @initialize(evicted=st.tuples(st.booleans(), st.booleans()))
    def begin(self, evicted: tuple[bool, bool]) -> None:
        self.uuids = self.world.take()
        self.world.settled(self.difference, "the fresh records")
        for uuid, wanted in zip(self.uuids, evicted, strict=True):
            if wanted:
                self._evict(uuid)

    def teardown(self) -> None:
        if not self.uuids:
            return
        try:
            self._mend()
            self._close_all()
            self.world.settled(self.contents, "at the end")
            for uuid in self.uuids:
                self._evict(uuid)
            assert not (said := self.difference() or self.contents()), f"from the store: {said}"
            for uuid in self.uuids:
                self._evict(uuid)  # what came back goes again: the disk is small
        finally:
            for uuid in self.uuids:
                shutil.rmtree(self.world.plain / uuid, ignore_errors=True)
        log = self.world.mounted.log()
        assert "please report this" not in log, log[-3000:]
        assert "Traceback" not in log, log[-3000:]

    def _mend(self) -> None:
        if self.full:
            self.space()
        if self.fault != "up":
            self.store_up()

    def _close_all(self) -> None:
        for slot in list(self.open):
            self.both("close", slot)
            del self.open[slot]

    def _evict(self, uuid: str) -> None:
        answers = []

        def gone() -> bool:
            answers.append(self.world.command("evict", uuids=[uuid]))
            return bool(answers[-1]["exit"] == 0)

        try:
            until(gone, "evicted", 15)
        except AssertionError:
            raise AssertionError(f"not evicted: {answers[-1]}") from None
        directory = self.world.project.directory(uuid)
        assert directory.is_symlink(), (directory, answers[-1], self.world.project.rows()[uuid])

    # --- files ---------------------------------------------------------------------------------------------------

    @rule(at=PATHS, offset=st.sampled_from(OFFSETS), size=st.sampled_from(SIZES), flags=st.sampled_from(FLAGS),
          seed=SEED, sync=st.sampled_from(("", "fsync", "fdatasync")))  # fmt: skip
    def write(self, at: tuple[int, bytes], offset: int, size: int, flags: int, seed: int, sync: str) -> None:
        if self.both("open", 0, self.path(at), os.O_WRONLY | flags, 0o644) is None:
            data = bytes_of(size, seed)
            self.both("append", 0, data) if flags & os.O_APPEND else self.both("pwrite", 0, data, offset)
            if sync:
                self.both(sync, 0)
            self.both("close", 0)

    @rule(at=FILES, size=st.sampled_from(OFFSETS))
    def truncate(self, at: tuple[int, bytes], size: int) -> None:
        self.both("truncate", self.path(at), size)

    @rule(at=FILES, offset=st.sampled_from(OFFSETS), size=st.sampled_from(SIZES))
    def read(self, at: tuple[int, bytes], offset: int, size: int) -> None:
        self.both("read", self.path(at), size, offset)

    @precondition(lambda self: self.well)
    @rule(at=FILES, offset=st.sampled_from(OFFSETS), size=st.sampled_from(SIZES))
    def read_map(self, at: tuple[int, bytes], offset: int, size: int) -> None:
        self.both("mmap_read", self.path(at), offset, size)

    @precondition(lambda self: self.well)
    @rule(at=FILES, offset=st.sampled_from(OFFSETS), seed=SEED)
    def write_map(self, at: tuple[int, bytes], offset: int, seed: int) -> None:
        self.both("mmap_write", self.path(at), offset, bytes_of(5000, seed))

    @rule(slot=st.integers(1, 3), at=PATHS, flags=st.sampled_from(FLAGS), way=st.sampled_from((os.O_RDONLY, os.O_RDWR)))
    def open_file(self, slot: int, at: tuple[int, bytes], flags: int, way: int) -> None:
        if slot not in self.open and self.both("open", slot, self.path(at), flags | way, 0o640) is None:
            self.open[slot] = self.path(at)

    @precondition(lambda self: self.open)
    @rule(data=st.data(), what=st.sampled_from(("pread", "pwrite", "ftruncate", "fsync", "fstat", "close")),
          offset=st.sampled_from(OFFSETS), size=st.sampled_from(SIZES), seed=SEED)  # fmt: skip
    def use_file(self, data: st.DataObject, what: str, offset: int, size: int, seed: int) -> None:
        slot = data.draw(st.sampled_from(sorted(self.open)))
        arguments: dict[str, tuple[Any, ...]] = {
            "pread": (size, offset), "pwrite": (bytes_of(size, seed), offset), "ftruncate": (offset,),
        }  # fmt: skip
        if what == "close":
            del self.open[slot]
        self.both(what, slot, *arguments.get(what, ()))

    # --- names ---------------------------------------------------------------------------------------------------

    @rule(one=PATHS, other=PATHS)
    def rename(self, one: tuple[int, bytes], other: tuple[int, bytes]) -> None:
        self.both("rename", self.path(one), self.path(other), also=across(one, other))

    @rule(one=PATHS, other=PATHS)
    def link(self, one: tuple[int, bytes], other: tuple[int, bytes]) -> None:
        self.both("link", self.path(one), self.path(other), also=across(one, other))

    @rule(at=PATHS, to=st.sampled_from((b"f", b"d", b"../elsewhere", b"g")))
    def symlink(self, at: tuple[int, bytes], to: bytes) -> None:
        self.both("symlink", to, self.path(at))

    @rule(at=PATHS, what=st.sampled_from(("unlink", "rmdir", "mkdir")))
    def entry(self, at: tuple[int, bytes], what: str) -> None:
        self.both(what, self.path(at))

    @rule(at=PATHS, mode=st.sampled_from(MODES))
    def chmod(self, at: tuple[int, bytes], mode: int) -> None:
        self.both("chmod", self.path(at), mode)

    @rule(at=PATHS, mtime=TIMES)
    def utime(self, at: tuple[int, bytes], mtime: int) -> None:
        self.both("utime", self.path(at), (mtime, mtime))

    # --- runfs ---------------------------------------------------------------------------------------------------

    @rule(which=RECORD)
    def evict(self, which: int) -> None:
        if self.well and not self.open:
            self._evict(self.uuids[which])
        else:
            self.world.command("evict", uuids=[self.uuids[which]])

    @rule(which=RECORD, restore=st.booleans())
    def hydrate(self, which: int, restore: bool) -> None:
        done = self.world.command("hydrate", uuids=[self.uuids[which]], restore=restore)
        settled = time.monotonic() > self.recovered + GRACE_S
        assert done["exit"] == 0 or not self.well or not settled or self.open, done

    @rule()
    def push(self) -> None:
        done = self.world.command("push", uuids=self.uuids)
        settled = time.monotonic() > self.recovered + GRACE_S
        assert done["exit"] == 0 or not self.well or not settled or self.open, done

    @rule()
    def look(self) -> None:
        said = self.contents()
        if said and self.well:
            self.world.settled(self.contents, "contents")

    @rule()
    def kill(self) -> None:
        self.open.clear()
        self.world.kill()

    @rule(what=st.sampled_from(("evict", "push", "hydrate", "restore")), after=st.sampled_from((0, 5, 20, 50, 100)))
    def kill_during(self, what: str, after: int) -> None:
        """kill -9 so many ms after a command began."""
        self.open.clear()
        self.world.leave()
        more = {"restore": True} if what == "restore" else {}
        running = self.world.background("hydrate" if more else what, uuids=self.uuids, **more)
        time.sleep(after / 1000)
        self.world.kill()
        running.join(30)
        assert not running.is_alive()

    @rule()
    def remount(self) -> None:
        self._close_all()
        self.world.remount()

    @rule(stores=st.booleans())
    def reindex(self, stores: bool) -> None:
        self.world.command("reindex", stores=stores and self.fault == "up")

    @precondition(lambda self: not self.full)
    @rule()
    def rebuild(self) -> None:
        """machinable has another schema: it drops its tables and fills them from the directories."""
        self.world.project.run(REBUILD)
        self.world.settled(self.difference, "after machinable rebuilt its index")

    # --- what goes wrong -----------------------------------------------------------------------------------------

    @precondition(lambda self: self.fault == "up")
    @rule(data=st.data())
    def store_fault(self, data: st.DataObject) -> None:
        self.fault = data.draw(st.sampled_from(FAULTS[self.world.kind]))
        self.world.store(self.fault)

    @precondition(lambda self: self.fault != "up")
    @rule()
    def store_up(self) -> None:
        self.world.store("up")
        self.fault = "up"
        self.recovered = time.monotonic()

    @precondition(lambda self: not self.full)
    @rule(leave=st.sampled_from((0, 100_000, 3 * MIB)))
    def no_space(self, leave: int) -> None:
        """The disk of the records, the cache and the state is full but for so many bytes."""
        self.world.filler.fill(leave)

    @precondition(lambda self: self.full)
    @rule()
    def space(self) -> None:
        self.world.filler.free()
        self.recovered = time.monotonic()

    @precondition(lambda self: self.well)
    @rule(which=RECORD, name=st.sampled_from((b"f", b"h", b"theirs")), seed=SEED)
    def other_host(self, which: int, name: bytes, seed: int) -> None:
        """Another machine changes a file of what we pushed; our next push takes it."""
        self._close_all()
        uuid = self.uuids[which]
        plain = os.path.join(os.fsencode(self.world.plain / uuid), name)
        if os.path.isdir(plain) or os.path.islink(plain):
            return
        self._settle_push()
        with self.world.other_host(uuid) as (directory, push):
            path = os.path.join(os.fsencode(directory), name)
            for each in (path, plain):
                if os.path.exists(each):
                    with open(each, "r+b") as file:
                        file.write(bytes_of(3000, seed))
                else:
                    with open(each, "wb") as file:
                        file.write(bytes_of(100_000, seed))
            status = os.stat(path)
            os.utime(plain, ns=(status.st_atime_ns, status.st_mtime_ns))
            push()
        self._touch(which)
        self._settle_push()
        self.world.settled(lambda: self.difference() or self.contents(), "after another host's change")

    def _touch(self, which: int) -> None:
        """A change of ours, so that there is something to push."""
        assert self.both("open", 0, self.path((which, b"ours")), os.O_WRONLY | os.O_CREAT, 0o644) is None
        self.both("pwrite", 0, os.urandom(20), 0)
        self.both("close", 0)

    def _settle_push(self) -> None:
        until(lambda: self.world.command("push", uuids=self.uuids)["exit"] == 0, "pushed", 20)

    @precondition(lambda self: self.well)
    @rule(at=FILES, how=st.sampled_from(("write", "replace", "unlink")), seed=SEED,
          during=st.sampled_from(("nothing", "push", "evict")), after=st.sampled_from((0, 2, 10, 30)))  # fmt: skip
    def behind(self, at: tuple[int, bytes], how: str, seed: int, during: str, after: int) -> None:
        """A program writes straight into the working directory, perhaps while it is pushed or evicted."""
        self._close_all()
        running = None
        if during != "nothing":
            running = self.world.background(during, uuids=[self.uuids[at[0]]])
            time.sleep(after / 1000)
        working = os.fsencode(self.world.project.directory(self.uuids[at[0]]))
        self._behind(os.path.join(working, at[1]), self.path(at), how, seed)
        if running is not None:
            running.join(60)
            assert not running.is_alive()
        self.world.settled(self.difference, f"{how} during {during}")
        self.world.settled(self.contents, f"{how} during {during}")

    def _behind(self, path: bytes, plain: bytes, how: str, seed: int) -> None:
        sides = ((self.world.behind, path), (self.world.there, plain))
        if how == "unlink":
            answers = [actor.call("unlink", name) for actor, name in sides]
        elif how == "write":
            answers = [actor.call("open", 9, name, os.O_WRONLY | os.O_CREAT, 0o644) for actor, name in sides]
            if answers == [None, None]:
                for actor, _name in sides:
                    assert actor.call("pwrite", 9, bytes_of(5000, seed), 1000) == 5000
                    assert actor.call("close", 9) is None
        else:
            answers = [self._replace(actor, name, seed) for actor, name in sides]
        assert answers[0] == answers[1], (how, path, answers)

    @staticmethod
    def _replace(actor: Any, name: bytes, seed: int) -> Any:
        made = actor.call("open", 9, name + b".new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        if made is not None:
            return made
        actor.call("pwrite", 9, bytes_of(90_000, seed), 0)
        actor.call("close", 9)
        answer = actor.call("rename", name + b".new", name)
        if isinstance(answer, Error):
            actor.call("unlink", name + b".new")
        return answer


REBUILD = """
import sqlite3
connection = sqlite3.connect(".machinable.sqlite", timeout=20)
connection.execute("PRAGMA user_version = 10")
connection.commit()
connection.close()
from machinable import Index
from machinable.api.models import FindRequest
Index.get().find(FindRequest())
"""


def alike(mtime: int, plain: int) -> bool:
    """Whether a time is what it should be: exactly, where somebody set it; about, where it came from the clock."""
    recent = time.time_ns() - 3600 * 10**9
    return mtime == plain if plain < recent else abs(mtime - plain) < WIDE_NS


def across(one: tuple[int, bytes], other: tuple[int, bytes]) -> frozenset[int]:
    """Between records there are neither links nor, when one is evicted, renames."""
    return frozenset({errno.EXDEV}) if one[0] != other[0] else frozenset()


def machine(world: World) -> type[Model]:
    """The state machine for a world."""
    return type("Model", (Model,), {"world": world})
