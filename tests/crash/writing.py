"""A writer that keeps a journal of what was acknowledged, outside of the mount; and what must be there by it.

As a program: `python writing.py JOURNAL SEED DIRECTORY...` changes files in these directories until one of its calls
fails. Before each change it writes a line `begin`, and when `fsync` or `close` has returned a line `done`. What a
change does follows from its number and the seed alone, so that `acknowledged` can make the same in memory.
"""

import json
import os
import random
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

BLOCK = 4096
BLOCKS = 400  # of base.bin: more than one chunk of 1 MiB
Files = dict[str, bytes]


def base_bytes() -> bytes:
    """The content of base.bin before anything is written."""
    return random.Random(11).randbytes(BLOCK * BLOCKS)


def fill(directory: Path) -> None:
    """What a directory holds before the writer comes."""
    (directory / "base.bin").write_bytes(base_bytes())
    (directory / "log").write_bytes(b"")
    (directory / "target").write_bytes(b"first")
    (directory / "sub").mkdir()


def started() -> Files:
    return {"base.bin": base_bytes(), "log": b"", "target": b"first"}


def piece(number: int, size: int) -> bytes:
    return (number.to_bytes(4, "little") * (size // 4 + 1))[:size]


@dataclass(frozen=True, slots=True)
class Change:
    """One change of one directory. `apply` makes it in memory, `do` for real."""

    number: int
    what: str

    @classmethod
    def numbered(cls, number: int, seed: int) -> "Change":
        what = random.Random(seed * 1_000_003 + number).choice(("new", "close", "block", "append", "replace", "unlink"))
        return cls(number, what)

    def size(self) -> int:
        return 1 + self.number * 997 % 150_000

    def apply(self, files: Files) -> None:
        number = self.number
        if self.what in ("new", "close"):
            files[f"sub/w{number}"] = piece(number, self.size())
        elif self.what == "block":
            offset = number % BLOCKS * BLOCK
            base = files["base.bin"]
            files["base.bin"] = base[:offset] + piece(number, BLOCK) + base[offset + BLOCK :]
        elif self.what == "append":
            files["log"] += piece(number, 100)
        elif self.what == "replace":
            files["target"] = piece(number, self.size())
        else:
            files.pop(f"sub/w{number - 7}", None)

    def do(self, directory: str) -> None:
        number = self.number
        if self.what in ("new", "close"):
            write(f"{directory}/sub/w{number}", piece(number, self.size()), sync=self.what == "new")
        elif self.what == "block":
            change(f"{directory}/base.bin", os.O_WRONLY, piece(number, BLOCK), number % BLOCKS * BLOCK)
        elif self.what == "append":
            change(f"{directory}/log", os.O_WRONLY | os.O_APPEND, piece(number, 100), None)
        elif self.what == "replace":
            write(f"{directory}/new", piece(number, self.size()), sync=True)
            os.rename(f"{directory}/new", f"{directory}/target")
            sync_directory(directory)
        elif os.path.exists(f"{directory}/sub/w{number - 7}"):
            os.unlink(f"{directory}/sub/w{number - 7}")
            sync_directory(f"{directory}/sub")


def write(path: str, data: bytes, *, sync: bool) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        for start in range(0, len(data), 50_000):
            os.write(fd, data[start : start + 50_000])
        if sync:
            os.fsync(fd)
    finally:
        os.close(fd)


def change(path: str, flags: int, data: bytes, offset: int | None) -> None:
    fd = os.open(path, flags)
    try:
        os.write(fd, data) if offset is None else os.pwrite(fd, data, offset)
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_directory(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def tell(told: int, what: str, number: int, directory: str) -> None:
    """One line of the journal; with how long the file POSITION_IN is at this moment, where that is asked for."""
    recorded = os.environ.get("POSITION_IN")
    position = f" {os.stat(recorded).st_size}" if recorded else ""
    os.write(told, f"{json.dumps([what, number, directory])}{position}\n".encode())


def main(journal: str, seed: int, directories: list[str]) -> None:
    told = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    number = seed * 100_000  # so that each run of it has names of its own
    try:
        while True:
            for directory in directories:
                number += 1
                tell(told, "begin", number, directory)
                Change.numbered(number, seed).do(directory)
                tell(told, "done", number, directory)
    except OSError as error:
        tell(told, "failed", number, os.strerror(error.errno or 0))
        sys.exit(3)


# --- what must be there -----------------------------------------------------------------------------------------------


@dataclass
class Acknowledged:
    """What a directory must hold: `files`; and the change that had begun and may have happened or not, in part."""

    files: Files = field(default_factory=started)
    begun: Change | None = None
    count: int = 0

    def settle(self, directory: Path) -> None:
        """Take what is there now for what the change under way did."""
        change, self.begun = self.begun, None
        if change is None:
            return
        for name in list(self._touched(change)):
            path = directory / name
            if path.exists():
                self.files[name] = path.read_bytes()
            else:
                self.files.pop(name, None)
        (directory / "new").unlink(missing_ok=True)

    @staticmethod
    def _touched(change: Change) -> Iterable[str]:
        names = {"new": "sub/w{0}", "close": "sub/w{0}", "block": "base.bin", "append": "log", "replace": "target"}
        return [names[change.what].format(change.number)] if change.what in names else [f"sub/w{change.number - 7}"]

    def wrong(self, directory: Path) -> str:
        """What is missing or other than it was acknowledged; '' when all is there."""
        after = dict(self.files)
        if self.begun is not None:
            self.begun.apply(after)
        there = {
            path.relative_to(directory).as_posix(): path.read_bytes()
            for path in [directory / "base.bin", directory / "log", directory / "target", *directory.glob("sub/w*")]
            if path.exists()
        }
        for name in sorted(self.files.keys() | after.keys() | there.keys()):
            got, before, then = there.get(name), self.files.get(name), after.get(name)
            if got not in (before, then) and not self._half(name, got, before, then):
                return f"{directory}/{name}: {_shown(got)}; acknowledged was {_shown(before)}, under way {_shown(then)}"
        return ""

    def _half(self, name: str, got: bytes | None, before: bytes | None, then: bytes | None) -> bool:
        """Whether this is what a change that was under way may leave: part of a new file, part of an append. What
        replaces a file, and one aligned block, is there whole or not at all."""
        if self.begun is None or self.begun.what not in ("new", "close", "append") or got is None or then is None:
            return False
        known = before or b""
        # Bytes that had not reached the disk may be zeros in a file that had already grown.
        return before != then and len(got) <= len(then) and got.startswith(known) and _grown(got, then)


def _grown(got: bytes, then: bytes) -> bool:
    return all(
        got[at : at + BLOCK] in (then[at : min(at + BLOCK, len(got))], bytes(len(got[at : at + BLOCK])))
        for at in range(0, len(got), BLOCK)
    )


def _shown(content: bytes | None) -> str:
    return "nothing" if content is None else f"{len(content)} bytes beginning with {content[:8].hex()}"


def acknowledged(
    lines: Iterable[str], seed: int, known: dict[str, Acknowledged] | None = None
) -> dict[str, Acknowledged]:
    """What a journal says of each directory, on top of what was known before."""
    found = known if known is not None else {}
    for line in lines:
        what, number, directory = json.loads(line)
        if what == "failed":
            continue
        at = found.setdefault(directory, Acknowledged())
        change = Change.numbered(number, seed)
        if what == "begin":
            at.begun = change
        else:
            at.begun = None
            at.count += 1
            change.apply(at.files)
    return found


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
