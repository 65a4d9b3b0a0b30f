"""Secrets are planted in every way to configure one, and all that runfs prints, logs and writes is searched for them.

The servers are as bad as can be: they answer each request with an error whose text repeats what came with it, headers
and decoded passwords included. Log level debug. Searched: output of commands, the daemon's log, state, cache and
runtime directories, command lines of all processes meanwhile; errors with their tracebacks and causes.
"""

import base64
import contextlib
import json
import os
import socketserver
import threading
import traceback
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from daemon.cli import main
from daemon.config import load
from tests.mounting import Mounted
from tests.projects import Project
from vfs.index import Index
from vfs.stores import open_store

# What a user's own environment holds, the daemon has too, and what it starts. Nothing from the configuration joins it.
FROM_ENVIRONMENT = ("s3 key id, environment", "s3 secret, environment", "s3 token, environment", "sftp password")
STATUSES = [400, 401, 403, 404, 500]


class _Echo(BaseHTTPRequestHandler):
    """An error for everything, with all that came: as it came, and decoded."""

    protocol_version = "HTTP/1.1"

    def _answer(self) -> None:
        length = self.headers.get("Content-Length")
        if length:
            self.rfile.read(int(length))
        given = self.headers.get("Authorization", "")
        decoded = ""
        if given.lower().startswith("basic "):
            decoded = base64.b64decode(given.split(" ")[1]).decode(errors="replace")
        heard = f"{self.path} {given} {decoded} {' '.join(f'{k}: {v}' for k, v in self.headers.items())}"
        text = heard.replace("<", "").replace("&", ";")
        body = (
            f"<?xml version='1.0'?><Error><Code>Echo {text}</Code><Message>you sent {text}</Message></Error>".encode()
        )
        self.send_response(self.server_status, f"no {decoded}"[:200])
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Echo", given[:500])
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    @property
    def server_status(self) -> int:
        return int(getattr(self.server, "status", 500))

    def __getattr__(self, name: str) -> Callable[[], None]:
        if name.startswith("do_"):
            return self._answer
        raise AttributeError(name)

    def log_message(self, *_args: Any) -> None:
        pass


class _EchoFtp(socketserver.StreamRequestHandler):
    """Refuses each login, saying what the password was."""

    def handle(self) -> None:
        self.wfile.write(b"220 welcome\r\n")
        for line in self.rfile:
            if line.upper().startswith(b"PASS"):
                self.wfile.write(b"530 login incorrect: " + line.strip() + b" is wrong\r\n")
            elif line.upper().startswith(b"USER"):
                self.wfile.write(b"331 password for " + line.strip() + b"\r\n")
            elif line.upper().startswith(b"QUIT"):
                self.wfile.write(b"221 bye\r\n")
                return
            else:
                self.wfile.write(b"500 what: " + line.strip() + b"\r\n")


@contextlib.contextmanager
def served(server: socketserver.BaseServer) -> Iterator[int]:
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield int(server.server_address[1])  # type: ignore[index]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@dataclass
class Canaries:
    """Words that must appear nowhere, and in no dress."""

    words: dict[str, str] = field(default_factory=dict)
    pairs: list[tuple[str, str]] = field(default_factory=list)

    def new(self, where: str) -> str:
        word = f"cnry{len(self.words):02d}{os.urandom(6).hex()}/+x"  # what percent-encoding and base64 change
        self.words[where] = word
        return word

    def found_in(self, data: bytes) -> list[str]:
        found = []
        for where, word in self.words.items():
            plain = word.encode()
            core = word.split("/")[0].encode()
            dresses = [core, urllib.parse.quote(word, safe="").encode(), base64.b64encode(plain)[:-4]]
            dresses += [
                base64.b64encode(f"{user}:{word}".encode())[:-4] for user, secret in self.pairs if secret == word
            ]
            if any(dress in data for dress in dresses):
                found.append(where)
        return found


def test_the_search_finds_them() -> None:
    canaries = Canaries()
    word = canaries.new("x")
    canaries.pairs.append(("me", word))
    for dress in (word, urllib.parse.quote(word, safe=""), base64.b64encode(f"me:{word}".encode()).decode()):
        assert canaries.found_in(b"... " + dress.encode() + b" ...") == ["x"]
    assert canaries.found_in(b"nothing") == []


@dataclass
class Planted:
    """A configuration file and an environment full of secrets."""

    canaries: Canaries
    file: Path
    environment: dict[str, str]


def planted(place: Path, http: int, ftp: int) -> Planted:
    canaries = Canaries()
    new = canaries.new
    url = f"http://127.0.0.1:{http}"

    def paired(user: str, where: str) -> str:
        word = new(where)
        canaries.pairs.append((user, word))
        return word

    stores = {
        "s3file": (f"s3://bucket/a?endpoint={url}&region=us-east-1", {
            "access_key_id": new("s3 key id, file"), "secret_access_key": new("s3 secret, file"),
            "session_token": new("s3 token, file"),
        }),
        "s3env": (f"s3://bucket/b?endpoint={url}&region=us-east-1", {}),
        "dav": (f"webdav+{url}/dav", {"username": "me", "password": paired("me", "webdav password")}),
        "davtoken": (f"webdav+{url}/dav2", {"token": new("webdav token")}),
        "web": (f"{url}/web", {"username": "me", "password": paired("me", "http password")}),
        "webtoken": (f"{url}/web2", {"token": new("http token")}),
        "ftp": (f"ftp://127.0.0.1:{ftp}/d", {"user": "me", "password": paired("me", "ftp password")}),
        "azure": (f"azblob://box/p?endpoint={url}", {
            "account_name": "me", "account_key": base64.b64encode(new("azure key").encode()).decode(),
        }),
        "fs": ("fsspec+memory://x", {"password": new("fsspec password"), "api_key": new("fsspec api key")}),
    }  # fmt: skip
    lines = ["deadline_s = 2", 'log_level = "debug"', "[push]", "quiet_s = 0.1"]
    for name, (address, options) in stores.items():
        lines += [f"[stores.{name}]", f"url = {json.dumps(address)}", f"[stores.{name}.options]"]
        lines += [f"{key} = {json.dumps(value)}" for key, value in options.items()]
    place.mkdir(exist_ok=True)
    file = place / "config.toml"
    file.write_text("\n".join(lines))
    file.chmod(0o600)
    environment = {
        "AWS_ACCESS_KEY_ID": new("s3 key id, environment"),
        "AWS_SECRET_ACCESS_KEY": new("s3 secret, environment"),
        "AWS_SESSION_TOKEN": new("s3 token, environment"),
        "RUNFS_SFTP_PASSWORD": new("sftp password"),
    }
    return Planted(canaries, file, environment)


class Watching(threading.Thread):
    """Collects, while commands run, what /proc tells of every process: its command line, which everybody sees, and its
    environment, which children inherit."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.over = threading.Event()
        self.seen: dict[str, set[bytes]] = {"cmdline": set(), "environ": set()}

    def run(self) -> None:
        while not self.over.wait(0.1):
            for entry in Path("/proc").glob("[0-9]*"):
                for name, seen in self.seen.items():
                    with contextlib.suppress(OSError):
                        seen.add((entry / name).read_bytes())

    def end(self) -> tuple[bytes, bytes]:
        self.over.set()
        self.join()
        return b"\n".join(self.seen["cmdline"]), b"\n".join(self.seen["environ"])


@contextlib.contextmanager
def echoing(status: int) -> Iterator[tuple[int, int]]:
    """The ports of a web server and an FTP server that repeat what they are told."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Echo)
    server.status = status  # type: ignore[attr-defined]
    ftp_server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), _EchoFtp)
    ftp_server.daemon_threads = True
    with served(server) as http, served(ftp_server) as ftp:
        yield http, ftp


@pytest.mark.parametrize("status", STATUSES)
def test_errors_have_no_secret_nor_have_their_causes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    """A traceback in the log shows what an error came from, too."""
    caplog.set_level("DEBUG")
    said: dict[str, str] = {}
    with echoing(status) as (http, ftp):
        plan = planted(tmp_path / "config", http, ftp)
        for name, value in plan.environment.items():
            monkeypatch.setenv(name, value)
        loaded = load({"index": tmp_path / "index"}, config=plan.file, cwd=tmp_path).settings()
        said["settings"] = f"{loaded!r} {loaded.shown()!r}"
        for settings in loaded.stores:
            store = open_store(settings.url, settings.name, {"deadline_s": 2.0, **settings.options})
            said[f"{settings.name} itself"] = f"{store!r} {vars(store)!r}" if settings.name == "s3file" else repr(store)
            calls: dict[str, Callable[[], object]] = {
                "stat": partial(store.stat, "u/x", deadline=0.7),
                "read": partial(store.read, "u/x", deadline=0.7),
                "write": partial(store.write, "u/x", b"x", deadline=0.7),
                "list": lambda store=store: list(store.list("u/", deadline=0.7)),  # type: ignore[misc]
                "delete": partial(store.delete, "u/x", deadline=0.7),
            }
            for name, call in calls.items():
                try:
                    call()
                except Exception as error:
                    said[f"{settings.name} {name}"] = "".join(traceback.format_exception(error))
            store.disconnect()
    assert len(said) > 30, "the stores were asked, and failed"
    leaks = {where: found for where, text in said.items() if (found := plan.canaries.found_in(text.encode()))}
    assert not leaks, {where: said[where] for where in leaks}
    assert not plan.canaries.found_in(caplog.text.encode())


@pytest.mark.mounted
def test_no_secret_comes_out(make_project: Callable[..., Project], tmp_path: Path) -> None:
    status = 403
    project = make_project(runs=1, size=20_000, report=False)
    said: list[tuple[str, bytes]] = []
    watching = Watching()
    with echoing(status) as (http, ftp):
        plan = planted(tmp_path / "config", http, ftp)
        watching.start()
        mounted = Mounted(project, tmp_path / "mnt", options=["--config", str(plan.file)], environment=plan.environment)
        try:
            mounted.start()
            for command in (
                ["stores"], ["push", project.runs[0]], ["safe"], ["status", "--json"], ["doctor"],
                ["config", "show", "--config", str(plan.file)], ["config", "check", "--config", str(plan.file)],
            ):  # fmt: skip
                done = mounted.runfs(*command)
                said.append((" ".join(command), (done.stdout + done.stderr).encode()))
            assert any(b"webdav" in output or b"dav" in output for _command, output in said)
            mounted.umount(0.5)  # nothing can be drained
        finally:
            mounted.stop()
        said.append(("the log", mounted.log().encode()))
    lines, environments = watching.end()
    said.append(("command lines", lines))
    for top in ("s", "c", "r"):
        for path in (tmp_path / top).rglob("*"):
            if path.is_file():
                said.append((str(path), path.read_bytes()))
    leaks = {where: found for where, data in said if (found := plan.canaries.found_in(data))}
    assert not leaks
    handed_on = plan.canaries.found_in(environments)
    assert set(handed_on) <= {where for where in plan.canaries.words if where in FROM_ENVIRONMENT}
    assert any(str(status).encode() in data or b"refused" in data for _where, data in said)


WRONG_URLS = [
    "s3://{0}:{1}@bucket/x",
    "https://me:{0}@host/x",
    "sftp://me:{0}@host/x",
    "s3://bucket/x?secret_access_key={0}",
    "s3://bucket/x?session_token={0}",
    "webdav+http://host/x?password={0}",
    "https://host/x?token={0}",
    "https://host/x?api_key={0}",
    "https://host/x?X-Amz-Signature={0}",
    "azblob://box/x?sas_token={0}",
    "ftp://host/x?passwd={0}",
    "https://host:{0}/x",
    "s3://[{0}/x",
    "fsspec+memory://x?password={0}",
    "s3://bucket/x#{0}",
    "command://x?auth={0}",
]


@pytest.mark.parametrize("url", WRONG_URLS)
@pytest.mark.parametrize("way", ["flag", "environment", "file", "remembered"])
def test_a_url_with_a_secret_is_refused_without_repeating_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, url: str, way: str
) -> None:
    canaries = Canaries()
    given = url.format(canaries.new("one"), canaries.new("two"))
    (tmp_path / "p").mkdir()
    Index.open(tmp_path / "p" / ".machinable.sqlite", create=True).close()
    arguments = ["stores", "--project", str(tmp_path / "p")]
    if way == "flag":
        arguments += ["--store", given]
    elif way == "environment":
        monkeypatch.setenv("RUNFS_STORE", given)
    elif way == "file":
        (tmp_path / "c.toml").write_text(f"[stores.lab]\nurl = {json.dumps(given)}\n")
        arguments += ["--config", str(tmp_path / "c.toml")]
    else:
        arguments = ["import", f"url+{given}", "--project", str(tmp_path / "p")]
    assert main(arguments) != 0
    said = capfd.readouterr()
    written = b"".join(path.read_bytes() for path in (tmp_path / "s").rglob("*") if path.is_file())
    assert not canaries.found_in((said.out + said.err).encode() + written)
