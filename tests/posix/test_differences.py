"""What differs from a local file system is listed in vfs/SEMANTICS.md; each number there has tests that show it, named
here, and there is none that the list has not."""

import ast
import fcntl
import os
import re
from pathlib import Path

import pytest

from tests.mounted.test_semantics import opened
from tests.posix.places import Arena, fill

TESTS = Path(__file__).parent.parent
LIST = TESTS.parent / "vfs" / "SEMANTICS.md"
HEADING = "## What differs from a local file system"
# The number of a difference, how it begins, and the tests of it: file and function.
SHOWN: dict[int, tuple[str, tuple[str, ...]]] = {
    1: ("`rename` between records", ("posix/test_names.py test_between_records",)),
    2: ("Hard links only inside", ("mounted/test_semantics.py test_no_link_between_records",)),
    3: (
        "`rmdir` and `rename` of a record",
        (
            "mounted/test_semantics.py test_what_is_refused",
            "mounted/test_semantics.py test_the_header_is_read_only",
        ),
    ),
    4: (
        "A read of bytes that are away",
        (
            "mounted/test_faults.py test_a_read_ends_others_go_on_and_it_comes_back",
            "mounted/test_faults.py test_sigkill_frees_a_reader_at_once",
            "mounted/test_faults.py test_nobody_sees_them_and_status_explains",
        ),
    ),
    5: ("A write that covers part", ("mounted/test_faults.py test_writes_that_must_wait_end_at_the_deadline",)),
    6: ("`open` of a file that is being evicted", ("posix/test_while_evicting.py test_sqlite",)),
    7: ("The ctime of an evicted file stays", ("posix/test_differences.py test_the_ctime_when_bytes_come_back",)),
    8: ("FIFOs, sockets and device nodes", ("posix/test_surviving.py test_everything_about_a_file_survives",)),
    9: ("`fallocate` is not supported", ("posix/test_files.py test_fallocate",)),
    10: (
        "Extended attributes exist only",
        (
            "posix/test_xattr.py test_without_the_option",
            "posix/test_xattr.py test_other_namespaces",
            "posix/test_xattr.py test_ours",
            "posix/test_xattr.py test_they_are_bounded",
        ),
    ),
    11: ("What another program writes straight", ("posix/test_differences.py test_writes_behind_the_mount",)),
    12: ("Locks (`flock`, `fcntl`)", ("posix/test_differences.py test_locks_behind_the_mount",)),
    13: (
        "Inode numbers stay",
        ("posix/test_names.py test_renamed", "mounted/test_semantics.py test_numbers_and_content_after_a_remount"),
    ),
    14: ("`atime` is that", ("posix/test_differences.py test_atime",)),
    15: ("What the index says of a name", ("mounted/test_scale.py test_changes_are_noticed",)),
    16: ("Set-user-id and set-group-id bits", ("posix/test_owners.py test_writing",)),
    17: (
        "There is no `O_TMPFILE`",
        (
            "posix/test_files.py test_what_only_the_native_file_system_has",
            "posix/test_files.py test_holes_are_told_natively_only",
            "posix/test_names.py test_devices",
        ),
    ),
    18: (
        "A path longer than a system call",
        (
            "posix/test_names.py test_paths_longer_than_a_call_takes",
            "mounted/test_bad_store.py test_paths_longer_than_the_system_takes",
        ),
    ),
}


def listed() -> dict[int, str]:
    """The numbered differences of the document."""
    text = LIST.read_text().partition(HEADING)[2].partition("\n## ")[0]
    return {int(number): words for number, words in re.findall(r"^(\d+)\. (.+)$", text, re.MULTILINE)}


def test_the_list_is_numbered() -> None:
    assert list(listed()) == list(range(1, len(listed()) + 1))
    assert len(listed()) >= 16


def test_each_difference_is_shown_by_a_test() -> None:
    found = listed()
    assert set(found) == set(SHOWN)
    for number, (words, _tests) in SHOWN.items():
        assert found[number].startswith(words), f"{number} says something else now; do its tests show it?"


@pytest.mark.parametrize("named", sorted({each for _words, tests in SHOWN.values() for each in tests}))
def test_those_tests_are_there(named: str) -> None:
    file, function = named.split(" ")
    nodes = ast.walk(ast.parse((TESTS / file).read_text()))
    assert any(isinstance(node, ast.FunctionDef) and node.name == function for node in nodes)


@pytest.mark.mounted
def test_the_ctime_when_bytes_come_back(arena: Arena) -> None:
    data = arena.take("evicted").path / "data"
    before = data.stat()
    assert len(data.read_bytes()) == before.st_size
    after = data.stat()
    assert (after.st_ctime_ns, after.st_mtime_ns) == (before.st_ctime_ns, before.st_mtime_ns)


@pytest.mark.mounted
def test_writes_behind_the_mount(arena: Arena) -> None:
    record = arena.record("resident", lambda directory: fill(directory / "one"))
    seen, behind = record.path / "one", record.working / "one"
    assert seen.joinpath("small").read_bytes() == b"one\ntwo\n"
    for content in (b"longer than it was before", b"short", b"the same length", b"as it was then:"):
        (behind / "small").write_bytes(content)
        assert (seen / "small").stat().st_size == len(content)
        assert (seen / "small").read_bytes() == content
    (behind / "new").mkdir()
    (behind / "small").rename(behind / "new" / "moved")
    assert os.listdir(seen / "new") == ["moved"]
    assert not (seen / "small").exists()


@pytest.mark.mounted
def test_locks_behind_the_mount(arena: Arena) -> None:
    record = arena.record("resident", lambda directory: fill(directory / "one"))
    seen, behind = record.path / "one" / "data", record.working / "one" / "data"
    with opened(seen, os.O_RDWR) as fd, opened(behind, os.O_RDWR) as other:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.mounted
def test_atime(arena: Arena) -> None:
    record = arena.record("resident", lambda directory: fill(directory / "one"))
    seen, behind = record.path / "one" / "data", record.working / "one" / "data"
    os.utime(seen, ns=(1_000_000_000, 2_000_000_000))
    seen.read_bytes()
    assert seen.stat().st_atime_ns == behind.stat().st_atime_ns
