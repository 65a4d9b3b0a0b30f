"""The store on an FTP server: configuration, TLS, leftovers, and servers that lie. The contract runs on it, too."""

import contextlib
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rclone import rclone
from tests.stores.conftest import MakeStore
from vfs.errors import ConfigError, Denied, RunfsError, StoreError
from vfs.stores import open_store, validate

CONTENT = b"0123456789"


class Liar:
    """An FTP server of a few lines: it lists, describes and sends whatever a test says."""

    def __init__(
        self, listing: bytes = b"", size: int = 10, content: bytes = CONTENT, end: bytes = b"226 Done"
    ) -> None:
        self.listing, self.size, self.content, self.end = listing, size, content, end
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for each in self._threads:
            each.join(5)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self._threads.append(threading.Thread(target=self._serve, args=(connection,)))
                self._threads[-1].start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection, connection.makefile("rb") as lines:
            connection.sendall(b"220 Hello\r\n")
            data = socket.create_server(("127.0.0.1", 0))
            with data:
                for line in lines:
                    command = line.split()[0].upper()
                    connection.sendall(self._answer(command, data.getsockname()[1]) + b"\r\n")
                    if command in (b"MLSD", b"RETR"):
                        with data.accept()[0] as channel:
                            channel.sendall(self.listing if command == b"MLSD" else self.content)
                        connection.sendall(self.end + b"\r\n")

    def _answer(self, command: bytes, port: int) -> bytes:
        return {
            b"USER": b"331 Password",
            b"PASS": b"230 Welcome",
            b"PASV": b"227 Here (127,0,0,1,%d,%d)" % divmod(port, 256),
            b"MLSD": b"150 Coming",
            b"RETR": b"150 Coming",
            b"REST": b"350 There",
            b"MLST": b"250-Start\r\n Type=file;Size=%d;Modify=20260101000000; a\r\n250 End" % self.size,
        }.get(command, b"200 Fine")


@pytest.fixture
def liar(request: pytest.FixtureRequest) -> Iterator[Liar]:
    made = Liar(**getattr(request, "param", {}))
    yield made
    made.close()


class TestLies:
    def test_names_that_lead_elsewhere(self, liar: Liar) -> None:
        names = ["..", ".", "../x", "/etc/passwd", "a/b", " a", "good"]
        liar.listing = b"".join(b"Type=file;Size=5; %s\r\n" % name.encode() for name in names)
        liar.listing += b"Type=dir; ..\r\nType=cdir; .\r\nType=OS.unix=slink;Size=5; link\r\nType=dir; ../up\r\n"
        store = open_store({"url": f"ftp://127.0.0.1:{liar.port}/base"})
        assert [stat.key for stat in store.list()] == ["good"]
        assert store.problems
        store.disconnect()

    @pytest.mark.parametrize("listing", [b"\xff\xfe\r\n", b"Type=file; a\r\n", b"Type=file;Size=-5; a\r\n"])
    def test_listings_that_are_none(self, liar: Liar, listing: bytes) -> None:
        liar.listing = listing
        store = open_store({"url": f"ftp://127.0.0.1:{liar.port}/base", "deadline_s": 2})
        with contextlib.suppress(RunfsError):
            assert list(store.list()) == []
        store.disconnect()

    @pytest.mark.parametrize("liar", [{"size": 20}, {"end": b"426 Broken"}, {"size": 5}], indirect=True)
    def test_a_body_of_another_length(self, liar: Liar) -> None:
        store = open_store({"url": f"ftp://127.0.0.1:{liar.port}/base", "deadline_s": 2})
        with pytest.raises(StoreError):
            store.read("a")
        store.disconnect()


class TestLeftovers:
    def test_temporary_files_are_not_listed_and_are_swept(self, ftp_stores: MakeStore) -> None:
        store = ftp_stores()
        store.write("u/a", b"x")
        store.write(".runfs/tmp-0123456789abcdef", b"left by a crash")
        store.write(".runfs/other", b"stays")
        assert {stat.key for stat in store.list()} == {"u/a", ".runfs/other"}
        assert store.sweep() == 0
        assert store.sweep(0) == 1
        assert {stat.key for stat in store.list()} == {"u/a", ".runfs/other"}

    def test_an_empty_directory_is_not_in_the_way(self, ftp_stores: MakeStore) -> None:
        store = ftp_stores()
        store.write("u/a/b", b"x")
        store.delete("u/a/b")
        assert store.write("u/a", b"y").size == 1
        assert store.write("v/c", b"z").size == 1


class TestConfiguration:
    @pytest.mark.parametrize(
        ("config", "named"),
        [
            ({"url": "ftp:///directory"}, "HOST"),
            ({"url": "ftp://user:password@host/"}, "password"),
            ({"url": "ftp://host/a/../b"}, "directory"),
            ({"url": "ftp://host/", "pasword": "x"}, "password"),
        ],
    )
    def test_mistakes_are_named(self, config: dict[str, str], named: str) -> None:
        with pytest.raises(ConfigError, match=named):
            validate(config)

    def test_warnings(self) -> None:
        assert len(validate({"url": "ftp://host/directory"})) == 2
        assert len(validate({"url": "ftps://host/directory"})) == 1
        assert len(validate({"url": "ftp://host/directory", "tls": True})) == 1


def test_a_server_without_tls(tmp_path: Path) -> None:
    with rclone("ftp", tmp_path / "ftp") as server:
        store = open_store({"url": f"ftp://127.0.0.1:{server.port}/base", "tls": True, **server.credentials()})
        with pytest.raises(StoreError, match="has no TLS"):
            store.read("u/a")
        store.disconnect()


def test_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A certificate has to be known, and the data encrypted, too."""
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    make += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(make, check=True, capture_output=True)
    with rclone("ftp", tmp_path / "ftp", f"--cert={certificate}", f"--key={key}") as server:
        store = open_store({"url": f"ftps://127.0.0.1:{server.port}/base", **server.credentials()})
        with pytest.raises(Denied, match="certificate"):
            store.write("u/a", CONTENT)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        with pytest.raises(StoreError, match="does not encrypt data"):  # rclone's would go over the wire as it is
            store.write("u/a", CONTENT)
        assert list((tmp_path / "ftp").iterdir()) == []
        store.disconnect()
