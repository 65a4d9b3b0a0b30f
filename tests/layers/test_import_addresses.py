"""`url+`, `file+` and `link+`: brought once, pinned, never executed, and nothing outside what is ours is written."""

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.core.making import FILES, NESTED, UUID, Place, contents, write_record
from vfs.addresses import Address, Pins, parse_address
from vfs.archives import unpack
from vfs.errors import DamagedRecord, Denied, NotFound, StoreTimeout, Unreachable, UsageError, WrongBytes
from vfs.records import Records
from vfs.session import Session
from vfs.stores import open_store

OTHER = "recordBBBB02"
Answer = Callable[[BaseHTTPRequestHandler], None]


class Progress:
    cancelled = False

    def __call__(self, event: dict[str, Any], /) -> None:
        pass


class Web:
    """A web server whose pages a test sets; `asked` counts what was asked for."""

    def __init__(self) -> None:
        self.pages: dict[str, bytes | Answer] = {}
        self.asked: list[str] = []
        web = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                web.asked.append(self.path)
                page = web.pages.get(self.path.split("?")[0])
                if callable(page):
                    page(self)
                    return
                self.send_response(404 if page is None else 200)
                self.send_header("Content-Length", str(len(page or b"")))
                self.send_header("ETag", '"the-etag"')
                self.end_headers()
                self.wfile.write(page or b"")

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()


@pytest.fixture
def web() -> Iterator[Web]:
    web = Web()
    yield web
    web.server.shutdown()
    web.server.server_close()


@pytest.fixture
def session(tmp_path: Path) -> Iterator[Session]:
    with Place(tmp_path / "host").session() as session:
        yield session


def run(session: Session, source: str, **more: Any) -> dict[str, Any]:
    return session.run("import", {"source": source, **more}, Progress())


def record(directory: Path, uuid: str = UUID) -> Path:
    write_record(directory, uuid, FILES)
    if uuid == UUID:
        write_record(directory / "x" / "run1", NESTED, {b"output.log": b"said\n"}, parent=uuid)
    return directory


def archive(directory: Path, mode: str = "w:gz") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as tar:  # type: ignore[call-overload]
        tar.add(directory, directory.name)
    return out.getvalue()


def members(*found: tuple[tarfile.TarInfo, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for info, content in found:
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def member(
    name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = ""
) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mode = kind, link, 0o4755
    return info, content


def forget_rows(session: Session) -> None:
    """As machinable does when its schema changes, in a process of its own: two SQLite libraries in one are no good."""
    code = "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]); c.execute('DELETE FROM \"index\"'); c.commit()"
    subprocess.run([sys.executable, "-c", code, session.settings.index], check=True, timeout=30)


def directory_of(session: Session, uuid: str = UUID) -> Path:
    found = session.core.index.get(uuid)
    assert found is not None
    assert found.directory is not None
    return Path(os.fsdecode(found.directory))


class TestAddresses:
    @pytest.mark.parametrize("text", ["/data/records", "s3://bucket/x", "webdav+https://host/x", "file:///x", "/a+b/c"])
    def test_what_is_none(self, text: str) -> None:
        assert parse_address(text) is None

    def test_what_is_one(self) -> None:
        pin = "a" * 64
        assert parse_address(f"url+https://host/x.tar#sha256={pin}") == Address("url", "https://host/x.tar", pin)
        assert parse_address("file+/data/x") == Address("file", "/data/x")
        assert parse_address("link+/data/x#1") == Address("link", "/data/x#1")
        assert parse_address("url+s3://bucket/x") == Address("url", "s3://bucket/x")

    @pytest.mark.parametrize(
        ("text", "why"),
        [
            ("git+/repository", "git\\+ is no kind of address; there are url\\+URL, file\\+PATH and link\\+PATH"),
            ("url+nothing", "not an address"),
            ("url+https://user:secret@host/x.tar", "without credentials in it"),
            ("url+https://host/x.tar?token=secret", "without credentials in it"),
            ("url+https://host/x.tar#md5=12", "a pin is #sha256= and 64 hexadecimal digits"),
            ("url+s3://bucket/x#sha256=" + "a" * 64, "can pin an archive only"),
            ("file+relative", "name an absolute path"),
            ("link+", "name an absolute path"),
        ],
    )
    def test_bad_ones(self, text: str, why: str) -> None:
        with pytest.raises(UsageError, match=why) as raised:
            parse_address(text)
        assert "secret" not in str(raised.value)


class TestArchivesFromTheWeb:
    def test_brought_once_and_pinned(self, session: Session, web: Web, tmp_path: Path) -> None:
        made = record(tmp_path / "made")
        web.pages["/r.tar.gz"] = archive(made)
        digest = "sha256=" + hashlib.sha256(archive_of(web)).hexdigest()
        source = f"url+{web.url}/r.tar.gz"
        planned = run(session, source, dry_run=True)
        assert (planned["imported"], web.asked) == ([], [])
        done = run(session, source)
        assert (done["imported"], done["failed"], done["exit"]) == (
            [UUID, NESTED] if NESTED in done["imported"] else [UUID],
            [],
            0,
        )
        assert done["pin"]["digest"] == digest
        assert done["pin"]["etag"] == '"the-etag"'
        assert contents(directory_of(session)) == contents(made)
        web.pages["/r.tar.gz"] = b"something else by now"
        again = run(session, source)
        assert (again["imported"], again["exit"], again["pin"]["digest"]) == ([], 0, digest)
        assert UUID in again["already"]
        assert web.asked == ["/r.tar.gz"], "it was asked for once"
        receipts = session.core.journal.receipts(UUID)
        assert [(each["what"], each["digest"]) for each in receipts if each["what"] == "import"] == [("import", digest)]
        assert [path.name for path in (session.settings.cache_place / ".imports").iterdir()] == [parsed(source).key]

    def test_a_record_that_is_gone_comes_from_the_cache(self, session: Session, web: Web, tmp_path: Path) -> None:
        web.pages["/r.tar.gz"] = archive(record(tmp_path / "made"))
        source = f"url+{web.url}/r.tar.gz"
        run(session, source)
        forget_rows(session)
        assert run(session, source)["imported"]
        assert web.asked == ["/r.tar.gz"]

    def test_fetched_once_more_it_must_be_the_same(self, session: Session, web: Web, tmp_path: Path) -> None:
        web.pages["/r.tar.gz"] = archive(record(tmp_path / "made"))
        source = f"url+{web.url}/r.tar.gz"
        run(session, source)
        forget_rows(session)
        (session.settings.cache_place / ".imports" / parsed(source).key).unlink()
        web.pages["/r.tar.gz"] = archive(record(tmp_path / "2" / "made"))
        with pytest.raises(WrongBytes, match=r"its sha256 is [0-9a-f]{64}, not [0-9a-f]{64} as pinned; nothing was"):
            run(session, source)

    def test_a_wrong_pin(self, session: Session, web: Web, tmp_path: Path) -> None:
        web.pages["/r.tar"] = archive(record(tmp_path / "made"), "w")
        source = f"url+{web.url}/r.tar"
        with pytest.raises(WrongBytes, match="as pinned; nothing was imported"):
            run(session, f"{source}#sha256={'0' * 64}")
        assert session.core.index.get(UUID) is None
        assert os.listdir(session.settings.cache_place / ".imports") == []
        right = hashlib.sha256(archive_of(web, "/r.tar")).hexdigest()
        assert run(session, f"{source}#sha256={right.upper()}")["imported"]
        with pytest.raises(UsageError, match="was pinned to sha256="):
            run(session, f"{source}#sha256={'0' * 64}")

    def test_what_servers_do(self, session: Session, web: Web, tmp_path: Path) -> None:
        def status(code: int) -> Answer:
            return lambda handler: (handler.send_response(code), handler.end_headers())[0]

        def cut(handler: BaseHTTPRequestHandler) -> None:
            handler.send_response(200)
            handler.send_header("Content-Length", "1000")
            handler.end_headers()
            handler.wfile.write(b"x" * 10)

        def elsewhere(handler: BaseHTTPRequestHandler) -> None:
            handler.send_response(302)
            handler.send_header("Location", "file:///etc/passwd")
            handler.end_headers()

        cases: list[tuple[Answer, type[Exception], str]] = [
            (status(404), NotFound, "there is nothing .HTTP 404."),
            (status(403), Denied, "the server refuses .HTTP 403."),
            (status(500), Exception, "the server failed .HTTP 500."),
            (cut, Unreachable, "broke off"),
            (elsewhere, Denied, "which is not followed"),
        ]
        for number, (answer, kind, why) in enumerate(cases):
            web.pages[f"/{number}.tar"] = answer
            with pytest.raises(kind, match=why) as raised:
                run(session, f"url+{web.url}/{number}.tar?Expires=1")
            assert "Expires" not in str(raised.value), "a query may be a signature"
        with pytest.raises(Unreachable, match="refused"):
            run(session, "url+http://127.0.0.1:9/x.tar")
        assert os.listdir(session.settings.cache_place / ".imports") == []

    @pytest.mark.parametrize("kind", ["silent", "dribbling"])
    def test_a_server_that_gives_nothing(self, tmp_path: Path, web: Web, kind: str) -> None:
        over = threading.Event()

        def slowly(handler: BaseHTTPRequestHandler) -> None:
            handler.send_response(200)
            handler.end_headers()
            while not over.wait(30 if kind == "silent" else 0.02):
                handler.wfile.write(b"x")

        web.pages["/r.tar"] = slowly
        began = time.monotonic()
        with Place(tmp_path / "slow", over={"deadline_s": 0.5}).session() as session:
            with pytest.raises(StoreTimeout):
                run(session, f"url+{web.url}/r.tar")
            over.set()
        assert time.monotonic() - began < 10

    def test_no_archive_and_no_record(self, session: Session, web: Web, tmp_path: Path) -> None:
        web.pages["/page"] = b"<html>not found, but politely</html>"
        with pytest.raises(DamagedRecord, match="is no tar archive that can be read"):
            run(session, f"url+{web.url}/page")
        (tmp_path / "empty").mkdir()
        web.pages["/none.tar"] = archive(tmp_path / "empty", "w")
        done = run(session, f"url+{web.url}/none.tar")
        assert done["exit"] == 1
        assert "no record" in done["failed"][0]["reason"]
        assert "pin" not in done
        assert done["failed"][0]["source"] == f"url+{web.url}/none.tar"


def archive_of(web: Web, page: str = "/r.tar.gz") -> bytes:
    found = web.pages[page]
    assert isinstance(found, bytes)
    return found


def parsed(text: str) -> Address:
    found = parse_address(text)
    assert found is not None
    return found


class TestUnpacking:
    @pytest.mark.parametrize(
        ("bad", "why"),
        [
            ([member("../outside", b"x")], "leads out of the archive"),
            ([member("/tmp/outside", b"x")], "leads out of the archive"),
            ([member("a/../../outside", b"x")], "leads out of the archive"),
            ([member("link", kind=tarfile.SYMTYPE, link="/etc")], "the link 'link' leads out"),
            ([member("d/link", kind=tarfile.SYMTYPE, link="../../x")], "the link 'd/link' leads out"),
            (
                [member("d", kind=tarfile.DIRTYPE), member("l", kind=tarfile.SYMTYPE, link="d"), member("l/f", b"x")],
                "lies behind a link",
            ),
            ([member("device", kind=tarfile.CHRTYPE)], "is a device or a pipe"),
            ([member("pipe", kind=tarfile.FIFOTYPE)], "is a device or a pipe"),
            ([member("hard", kind=tarfile.LNKTYPE, link="/etc/passwd")], "is a link to nothing"),
            ([member("twice", b"1"), member("twice", b"2")], "contradicts itself"),
            ([member("f", b"1"), member("f/below", b"2")], "contradicts itself"),
        ],
    )
    def test_bad_members(self, tmp_path: Path, bad: list[tuple[tarfile.TarInfo, bytes]], why: str) -> None:
        (tmp_path / "bad.tar").write_bytes(members(member("good", b"x"), *bad))
        with pytest.raises(DamagedRecord, match=why):
            unpack(tmp_path / "bad.tar", tmp_path / "to", "bad.tar")
        assert set(os.listdir(tmp_path)) == {"bad.tar", "to"}
        assert not Path("/tmp/outside").exists()

    def test_good_members(self, tmp_path: Path) -> None:
        good = [
            member("./d/file", b"content"),
            member("d/link", kind=tarfile.SYMTYPE, link="../d/file"),
            member("d/again", kind=tarfile.LNKTYPE, link="./d/file"),
        ]
        (tmp_path / "good.tar").write_bytes(members(*good))
        unpack(tmp_path / "good.tar", tmp_path / "to", "good.tar")
        assert (tmp_path / "to/d/file").read_bytes() == (tmp_path / "to/d/again").read_bytes() == b"content"
        assert os.readlink(tmp_path / "to/d/link") == "../d/file"
        assert (tmp_path / "to/d/file").stat().st_mode & 0o7777 == 0o755, "no set-id bits"

    def test_a_bomb_does_not_fill_the_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "bomb.tar").write_bytes(members(member("zeros", bytes(3 << 20))))
        room = os.statvfs(tmp_path)
        left = (66 << 20) // room.f_frsize

        def statvfs(path: object) -> os.statvfs_result:
            used = sum(each.stat().st_size for each in tmp_path.rglob("zeros")) // room.f_frsize
            return os.statvfs_result((*room[:4], left - used, *room[5:]))

        monkeypatch.setattr(os, "statvfs", statvfs)
        with pytest.raises(Exception, match="no space in"):
            unpack(tmp_path / "bomb.tar", tmp_path / "to", "bomb.tar")

    def test_too_many_members(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("vfs.archives.MOST_MEMBERS", 2)
        (tmp_path / "many.tar").write_bytes(members(*(member(str(n)) for n in range(3))))
        with pytest.raises(DamagedRecord, match="more than 2 members"):
            unpack(tmp_path / "many.tar", tmp_path / "to", "many.tar")


class TestPlacesHere:
    def test_a_directory_is_copied(self, session: Session, tmp_path: Path) -> None:
        made = record(tmp_path / "made")
        done = run(session, f"file+{made}")
        assert UUID in done["imported"]
        assert done["pin"]["digest"].startswith("blake3=")
        assert directory_of(session) != made
        assert contents(directory_of(session)) == contents(made)
        assert run(session, f"file+{made}")["exit"] == 0

    def test_an_archive_is_unpacked(self, session: Session, tmp_path: Path) -> None:
        made = record(tmp_path / "made")
        (tmp_path / "r.tar.xz").write_bytes(archive(made, "w:xz"))
        done = run(session, f"file+{tmp_path}/r.tar.xz")
        assert done["pin"]["digest"] == "sha256=" + hashlib.sha256((tmp_path / "r.tar.xz").read_bytes()).hexdigest()
        assert contents(directory_of(session)) == contents(made)
        assert os.listdir(session.settings.cache_place / ".imports") == [], "a file here is not kept twice"

    def test_a_link_copies_nothing(self, session: Session, tmp_path: Path) -> None:
        made = record(tmp_path / "made")
        before = contents(made)
        done = run(session, f"link+{made}", dry_run=True)
        assert session.core.index.get(UUID) is None
        done = run(session, f"link+{made}")
        assert (done["imported"], done["linked"]) == ([UUID], str(made))
        assert directory_of(session) == made
        assert session.core.journal.pins() == {UUID}
        assert [pin.directory for pin in Pins(session.core.journal).linked()] == [str(made)]
        assert run(session, f"link+{made}")["already"] == [UUID]
        session.run("push", {}, Progress())
        assert Records(open_store(f"file://{tmp_path}/host/store")).contains(UUID), "it is pushed as any other"
        evicted = session.run("evict", {"all": True}, Progress())
        assert evicted["evicted"] == [], "and its directory is never moved unless the user unpins it"
        assert contents(made) == before
        forget_rows(session)
        assert UUID in session.put_rows_back(), "machinable rebuilt the index, and a walk of the storage finds no link"
        assert directory_of(session) == made

    @pytest.mark.parametrize("key", ["../../../outside", "/outside", "..", ".", "a/b", "", ".runfs"])
    def test_keys_that_lead_outside(self, session: Session, tmp_path: Path, key: str) -> None:
        """An imported record's keys are somebody's word: they make no path."""
        made = record(tmp_path / "made")
        header = json.loads((made / "id.json").read_text())
        where = str(tmp_path / "absolute") if key == "/outside" else key
        (made / "id.json").write_text(json.dumps({**header, "identity_key": where, "predicate_key": where}))
        run(session, f"file+{made}")
        assert directory_of(session) == tmp_path / "host" / "project" / "storage" / UUID
        assert set(os.listdir(tmp_path)) == {"host", "made"}

    def test_what_is_not_there(self, session: Session, tmp_path: Path) -> None:
        for kind in ("file", "link"):
            with pytest.raises(UsageError, match="there is no such directory"):
                run(session, f"{kind}+{tmp_path}/nowhere")
        with pytest.raises(UsageError, match="there is no such file"):
            run(session, f"file+{tmp_path}/nowhere.tar.gz")
        (tmp_path / "plain").mkdir()
        with pytest.raises(DamagedRecord, match=r"has no id.json"):
            run(session, f"link+{tmp_path}/plain")
        with pytest.raises(UsageError, match=r"what should be imported\?"):
            run(session, "")

    def test_an_archive_that_is_named_without_its_kind(self, session: Session, tmp_path: Path) -> None:
        record(tmp_path / "made")
        packed = tmp_path / "r.tar.gz"
        packed.write_bytes(archive(tmp_path / "made"))
        (failed,) = run(session, str(packed))["failed"]
        assert f"import it as file+{packed}" in failed["reason"]
        with pytest.raises(UsageError, match=r"import it as url\+https://host/r.tar.gz$"):
            run(session, "https://host/r.tar.gz?X-Signature=secret")

    def test_a_directory_that_is_not_there(self, session: Session, tmp_path: Path) -> None:
        (failed,) = run(session, f"{tmp_path}/nowhere")["failed"]
        assert failed["reason"] == "there is no such directory"
        (tmp_path / "file").touch()
        (failed,) = run(session, f"{tmp_path}/file")["failed"]
        assert failed["reason"] == "it is no directory"


class TestStores:
    def test_one_that_is_not_there_is_not_made(self, session: Session, tmp_path: Path) -> None:
        with pytest.raises(Unreachable, match="cannot be opened"):
            run(session, f"file://{tmp_path}/nowhere")
        assert not (tmp_path / "nowhere").exists()

    def test_one_without_records(self, session: Session, tmp_path: Path) -> None:
        (tmp_path / "theirs").mkdir()
        done = run(session, f"file://{tmp_path}/theirs")
        assert (done["exit"], done["failed"][0]["reason"]) == (1, "no record is there")
        assert os.listdir(tmp_path / "theirs") == []

    def test_a_secret_in_the_url_is_not_repeated(self, session: Session) -> None:
        for url in ("webdav+https://ann:verySecret@host/x", "s3://bucket?secret_access_key=verySecret"):
            with pytest.raises(UsageError, match="credentials") as raised:
                run(session, url)
            assert "verySecret" not in str(raised.value)

    def test_a_store_is_pinned_by_its_manifests(self, session: Session, tmp_path: Path) -> None:
        url = f"file://{tmp_path}/theirs"
        records = Records(open_store(url))
        records.commit(record(tmp_path / "made"))
        records.commit(record(tmp_path / "other", OTHER))
        done = run(session, f"url+{url}")
        assert set(done["imported"]) == {UUID, OTHER}
        assert done["pin"]["digest"].startswith("blake3=")
        again = run(session, f"url+{url}")
        assert (set(again["already"]), again["exit"]) == ({UUID, OTHER}, 0)
        assert contents(directory_of(session)) == contents(tmp_path / "made")
