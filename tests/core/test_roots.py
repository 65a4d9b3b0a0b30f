"""The listing of the root is kept in memory: what appears, disappears, moves or changes is seen in time all the same.

On the file operations directly; `Kernel` does what the daemon does for a listing, and counts as the kernel does.
"""

import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import apsw
import pytest

from tests.core.making import NESTED, UUID, Place, write_record
from vfs import roots
from vfs.filesystem import Caller, FileSystem
from vfs.index_marks import Marks
from vfs.roots import Row
from vfs.session import Session
from vfs.tree import ROOT, FileNode

OTHER = "recordBBBB02"


class Kernel:
    """The file operations of a session whose index is followed, and what the kernel knows of inodes."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.files = FileSystem(session.core)
        self.files.index_changed()
        self.known: dict[int, int] = {}

    def entries(self, fit: int = 1000) -> dict[bytes, Row]:
        """A whole listing of the root in answers of `fit` entries; each name once."""
        files, found = self.files, dict[bytes, Row]()
        listing, position = files.opendir(ROOT), 0
        while True:
            files.rewind(listing, position)
            while (work := files.before_readdir(listing, position)) is not None:
                work()
            taken = 0
            for after, values in files.root_entries(listing, position):
                if taken == fit:
                    break
                row = Row(*values)
                assert row.name not in found, "listed twice"
                found[row.name] = row
                self.known[row.ino] = self.known.get(row.ino, 0) + 1
                taken, position = taken + 1, after
            if not taken:
                files.closedir(listing)
                return found

    def names(self) -> set[bytes]:
        return set(self.entries())

    def look_up(self, name: bytes) -> int:
        found = self.files.lookup(ROOT, name)
        self.known[found.ino] = self.known.get(found.ino, 0) + 1
        return found.ino

    def forget(self) -> None:
        for ino, count in self.known.items():
            self.files.forget(ino, count)
        self.known.clear()

    def inside(self, ino: int) -> set[bytes]:
        return {name for name, _attributes, _position in self.files.readdir(self.files.opendir(ino), 0)}

    def poll(self) -> None:
        """As the daemon does four times a second."""
        if self.session.core.index.changed() is not None:
            self.files.index_changed()


@pytest.fixture
def place(tmp_path: Path) -> Place:
    made = Place(tmp_path)
    made.record()
    made.record(OTHER, {b"a": b"1"})
    return made


@pytest.fixture
def kernel(place: Place) -> Iterator[Kernel]:
    with place.session() as session:
        yield Kernel(session)


def sql(place: Place, statement: str, *values: object) -> None:
    """What another program does to the index."""
    connection = apsw.Connection(str(place.index))
    connection.execute(statement, values)
    connection.close()


def told(place: Place, uuid: str = UUID) -> tuple[int, ...]:
    """What a listing should say of a record's directory."""
    found = os.stat(place.directory(uuid))
    return (
        found.st_mode,
        found.st_nlink,
        found.st_uid,
        found.st_gid,
        found.st_size,
        found.st_blocks,
        found.st_mtime_ns,
    )


def said(row: Row) -> tuple[int, ...]:
    return (row.mode, row.nlink, row.uid, row.gid, row.size, row.blocks, row.mtime_ns)


def test_a_listing_says_what_a_look_up_says(kernel: Kernel, place: Place) -> None:
    found = kernel.entries()
    assert set(found) == {UUID.encode(), OTHER.encode()}
    assert said(found[UUID.encode()]) == told(place)
    assert found[UUID.encode()].ino == kernel.look_up(UUID.encode())
    assert kernel.entries(fit=1) == found


def test_a_record_appears_and_disappears(kernel: Kernel, place: Place) -> None:
    assert kernel.names() == {UUID.encode(), OTHER.encode()}
    place.record("recordAAAA05", {b"x": b""})
    kernel.poll()
    assert kernel.names() == {UUID.encode(), OTHER.encode(), b"recordAAAA05"}
    sql(place, 'DELETE FROM "index" WHERE record_id = ?', OTHER)
    kernel.poll()
    assert kernel.names() == {UUID.encode(), b"recordAAAA05"}
    with pytest.raises(FileNotFoundError):
        kernel.look_up(OTHER.encode())


def test_a_known_node_is_asked_for_again_after_a_change_of_the_index(kernel: Kernel, place: Place) -> None:
    kernel.look_up(OTHER.encode())
    sql(place, 'DELETE FROM "index" WHERE record_id = ?', OTHER)
    kernel.poll()
    with pytest.raises(FileNotFoundError):
        kernel.look_up(OTHER.encode())


def test_a_hidden_record_leaves_the_listing_and_can_be_entered(kernel: Kernel, place: Place) -> None:
    row = kernel.entries()[OTHER.encode()]
    sql(place, 'UPDATE "index" SET hidden = 1 WHERE record_id = ?', OTHER)
    kernel.poll()
    assert kernel.names() == {UUID.encode()}
    assert b"a" in kernel.inside(row.ino), "who was in it goes on"
    assert kernel.look_up(OTHER.encode()) == row.ino


def test_a_record_is_found_under_its_new_name(kernel: Kernel, place: Place) -> None:
    kernel.entries()
    sql(place, 'UPDATE "index" SET record_id = ? WHERE record_id = ?', "renamed00001", OTHER)
    kernel.poll()
    assert kernel.names() == {UUID.encode(), b"renamed00001"}


def test_a_record_that_lies_elsewhere_now(kernel: Kernel, place: Place) -> None:
    kernel.entries()
    moved = place.project / "elsewhere"
    os.rename(place.directory(OTHER), moved)
    os.utime(moved, ns=(1, 2))
    sql(place, 'UPDATE "index" SET storage_uri = ?, local_uri = NULL WHERE record_id = ?', moved.as_uri(), OTHER)
    kernel.poll()
    assert kernel.entries()[OTHER.encode()].mtime_ns == 2


def test_an_evicted_record_is_listed_as_it_is_in_its_shadow(kernel: Kernel, place: Place) -> None:
    before = kernel.entries()[UUID.encode()]
    kernel.session.run("evict", {"uuids": [UUID]}, _Quiet())
    assert place.directory().is_symlink()
    after = kernel.entries()[UUID.encode()]
    assert (after.ino, after.mode, after.mtime_ns) == (before.ino, before.mode, before.mtime_ns)
    assert kernel.inside(after.ino) >= {b"metrics.json", b"weights.npy"}
    kernel.session.run("hydrate", {"uuids": [UUID], "restore": True}, _Quiet())
    assert said(kernel.entries()[UUID.encode()]) == told(place)


class _Quiet:
    cancelled = False

    def __call__(self, event: dict[str, object], /) -> None:
        return None


def test_a_file_added_behind_the_mount(kernel: Kernel, place: Place) -> None:
    row = kernel.entries()[UUID.encode()]
    (place.directory() / "added").mkdir()
    assert b"added" in kernel.inside(row.ino)
    assert kernel.files.getattr(row.ino).nlink == row.nlink + 1
    assert said(kernel.entries()[UUID.encode()]) == told(place), "older than what was told of it meanwhile"


def test_a_look_up_of_what_was_listed_looks_anew(kernel: Kernel, place: Place) -> None:
    row = kernel.entries()[UUID.encode()]
    (place.directory() / "added").mkdir()
    found = kernel.files.lookup(ROOT, UUID.encode())
    assert (found.ino, found.nlink, found.mtime_ns) == (row.ino, row.nlink + 1, told(place)[-1])
    assert kernel.files.tree.root.children == {}, "asking again makes no node"


def test_what_nobody_saw_change_is_listed_as_it_is_after_a_while(
    kernel: Kernel, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = kernel.entries()
    os.chmod(place.directory(), 0o700)
    shutil.rmtree(place.directory(OTHER))
    assert kernel.entries() == before, "nobody told"
    monkeypatch.setattr(roots, "LOOKED_S", 0.0)
    assert set(after := kernel.entries()) == {UUID.encode()}
    assert stat.S_IMODE(after[UUID.encode()].mode) == 0o700


def test_what_was_listed_is_looked_at_again_behind_it(kernel: Kernel, place: Place) -> None:
    kernel.entries()
    roots_of = kernel.files.roots
    os.chmod(place.directory(), 0o700)
    roots_of.make("", seconds=0.0)
    assert stat.S_IMODE(kernel.entries()[UUID.encode()].mode) == 0o700


def test_a_change_through_the_mount_is_listed_at_once(kernel: Kernel, place: Place) -> None:
    row = kernel.entries()[UUID.encode()]
    kernel.files.mkdir(row.ino, b"made", 0o755, Caller(os.getuid(), os.getgid()))
    assert said(kernel.entries()[UUID.encode()]) == told(place)


def test_nested_records_are_links_however_deep(kernel: Kernel, place: Place) -> None:
    kernel.entries()
    write_record(place.directory() / "run", NESTED, {}, parent=UUID)
    write_record(place.directory() / "run" / "deep", "deeperCCCC01", {}, parent=NESTED)
    place.ingest(place.directory() / "run")
    place.ingest(place.directory() / "run" / "deep")
    kernel.poll()
    found = kernel.entries()
    for name, target in ((NESTED, b"/run"), ("deeperCCCC01", b"/run/deep")):
        row = found[name.encode()]
        assert stat.S_ISLNK(row.mode)
        assert kernel.files.readlink(row.ino) == UUID.encode() + target
        assert kernel.look_up(name.encode()) == row.ino
    assert kernel.files.tree.root.children == {}


def test_the_kernel_forgets_and_nothing_is_left(kernel: Kernel) -> None:
    kernel.entries()
    kernel.entries()
    ino = kernel.look_up(UUID.encode())
    node = kernel.files.tree.get(ino)
    assert isinstance(node, FileNode)
    assert node.lookups == 3
    kernel.entries(fit=1)
    kernel.forget()
    assert kernel.files.tree.told == {}
    assert set(kernel.files.tree.nodes) == {ROOT}
    with pytest.raises(KeyError):
        kernel.files.getattr(ino)


def test_a_listing_meets_each_record_once_while_others_come_and_go(kernel: Kernel, place: Place) -> None:
    stays = fill(place, range(0, 2 * roots.PAGE, 2))
    kernel.poll()
    files, position, found = kernel.files, 0, list[bytes]()
    listing, more = files.opendir(ROOT), True
    while more:
        while (work := files.before_readdir(listing, position)) is not None:
            work()
        more = False
        for step, (after, values) in enumerate(files.root_entries(listing, position)):
            if step == 100:  # it did not fit
                break
            more, position = True, after
            found.append(values[0])
        at = int(found[-1][1:]) if found[-1].startswith(b"m") else 0
        fill(place, [max(at - 9, 1), at + 1])  # before what is being listed, and beside it
        kernel.poll()
    assert len(found) == len(set(found))
    assert stays <= set(found)
    assert stays <= kernel.names()


def test_a_page_that_grows_is_cut(kernel: Kernel, place: Place) -> None:
    some = fill(place, range(0, 10 * roots.PAGE, 10))
    kernel.poll()
    assert kernel.names() >= some
    some |= fill(place, [number for number in range(5000) if number % 10])
    kernel.poll()
    assert kernel.names() >= some
    assert kernel.names() == some | {UUID.encode(), OTHER.encode()}


def fill(place: Place, numbers: "range | list[int]") -> set[bytes]:
    """Records that are rows and empty directories."""
    names = [f"m{number:011}" for number in numbers]
    columns = "record_id, kind, identity_key, predicate_json, predicate_key, storage_uri, created_at_ns, updated_at_ns"
    connection = apsw.Connection(str(place.index))
    connection.set_busy_timeout(5000)
    with connection:
        connection.executemany(
            f'INSERT OR IGNORE INTO "index" ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)',
            [(name, "Interface", "i", "{}", "p", f"file://{place.directory(name)}", 1, 1) for name in names],
        )
    connection.close()
    for name in names:
        place.directory(name).mkdir(parents=True, exist_ok=True)
    return {name.encode() for name in names}


# --- which rows changed --------------------------------------------------------------------------------------------


def test_rows_that_changed_are_told_once(kernel: Kernel, place: Place) -> None:
    fill(place, range(5000))
    marks = Marks(kernel.session.core.index)
    marks.take()
    assert list(marks.changed()) == []
    sql(place, 'UPDATE "index" SET updated_at_ns = 7 WHERE record_id = ?', "m00000002500")
    sql(place, 'UPDATE "index" SET private_json = \'{"a": 1}\' WHERE record_id = ?', "m00000004999")
    sql(place, 'UPDATE "index" SET hidden = 1 WHERE record_id = ?', "m00000000000")
    assert list(marks.changed()) == ["m00000000000", "m00000002500", "m00000004999"]
    assert list(marks.changed()) == []
    sql(place, 'UPDATE "index" SET updated_at_ns = 1 WHERE record_id = ?', "m00000002500")
    assert list(marks.changed()) == ["m00000002500"], "back to what it was is a change, too"


def test_rows_that_come_back_as_they_were_did_not_change(kernel: Kernel, place: Place) -> None:
    fill(place, range(0, 10_000, 2))
    marks = Marks(kernel.session.core.index)
    marks.take()
    sql(place, "CREATE TABLE kept AS SELECT * FROM \"index\" WHERE record_id > 'm00000001'")
    sql(place, "DELETE FROM \"index\" WHERE record_id > 'm00000001'")
    fill(place, range(1, 3000, 2))
    assert len(list(marks.changed())) == 1500
    sql(place, 'INSERT OR IGNORE INTO "index" SELECT * FROM kept')
    assert list(marks.changed()) == []
    assert list(marks.changed()) == []


def test_new_rows_are_told(kernel: Kernel, place: Place) -> None:
    fill(place, range(0, 9000, 3))
    marks = Marks(kernel.session.core.index)
    marks.take()
    more = fill(place, range(1, 9000, 3))
    assert {uuid.encode() for uuid in marks.changed()} == more
    assert list(marks.changed()) == []


# --- views ---------------------------------------------------------------------------------------------------------


def view(kernel: Kernel, *names: bytes) -> int:
    """The inode of a directory in `.by`, looked up as the daemon does: the index is asked beforehand."""
    found = kernel.files.lookup(ROOT, b".by")
    for name in names:
        work = kernel.files.before_lookup(found.ino, name)
        if work is not None:
            work()
        found = kernel.files.lookup(found.ino, name)
    return found.ino


def test_a_view_is_listed_with_few_questions(kernel: Kernel, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    names = fill(place, range(200))
    kernel.poll()
    ino = view(kernel, b"kind", b"Interface")
    index, asked = kernel.session.core.index, list[dict[str, object]]()
    search = index.search

    def counted(**given: object) -> object:
        asked.append(given)
        return search(**given)  # type: ignore[arg-type]

    monkeypatch.setattr(index, "search", counted)
    assert kernel.inside(ino) >= names
    assert len(asked) < 5, "one scan a page, none for each entry"
    link = kernel.files.lookup(ino, b"m00000000007")
    assert kernel.files.readlink(link.ino) == b"../../../m00000000007"


def test_a_view_follows_the_index(kernel: Kernel, place: Place) -> None:
    sql(place, "UPDATE \"index\" SET label = 'one' WHERE record_id = ?", OTHER)
    kernel.poll()
    ino = view(kernel, b"label", b"one")
    assert kernel.inside(ino) == {OTHER.encode()}
    sql(place, "UPDATE \"index\" SET label = 'two' WHERE record_id = ?", OTHER)
    kernel.poll()
    assert kernel.inside(ino) == set()
    with pytest.raises(FileNotFoundError):
        view(kernel, b"label", b"one", OTHER.encode())
    assert view(kernel, b"label", b"two", OTHER.encode())
    with pytest.raises(FileNotFoundError):
        view(kernel, b"label", b"one")
