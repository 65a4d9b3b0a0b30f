"""A store on an FTP server: `ftp://host/directory`, with `tls = true` encrypted, or `ftps://` (TLS on its own port).

Used through `open_store`. Blocks its caller, at most for the call's deadline and a moment (`ftp_session.py`). The
standard library's client: opendal's gave other bytes than those asked for when a range did not begin at 0, showed its
temporary files as objects, and knew times to the minute only.

Bytes go to a temporary file in `.runfs/`, which gets its name when it is whole; so nobody sees half an object, and what
interrupted uploads leave is in one place. FTP has no conditions: they are looked at before (a store for a single
writer). The server must have MLSD and MLST (RFC 3659), as nearly all do.
"""

import contextlib
import ftplib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from vfs.errors import ConfigError, Conflict, NotFound, StoreError
from vfs.stores import checksums, keys, urls
from vfs.stores.base import BaseBroker, BaseStore, Source, is_wanted, take_piece
from vfs.stores.ftp_session import Account, Data, Session, Sessions
from vfs.stores.limits import Budget, Limits, read_limits
from vfs.stores.protocol import Info, Stat

AREA = ".runfs/"
TEMPORARY = AREA + "tmp-"
CLEANUP_S = 3.0  # for removing what a failed upload left; `sweep` gets what stays
_OPTIONS = frozenset({"user", "password", "tls", "read_only"})
_PORTS = {"no": 21, "explicit": 21, "implicit": 990}

Facts = Mapping[str, str]
Lines = list[str]
Names = list[tuple[str, Facts]]


class _SourceFailed(Exception):
    """What the source of an upload raised, on its way to the caller."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


_SIZE_DIGITS = 19  # 2**63 has so many


class FtpStore(BaseStore):
    """A directory of an FTP server. Made by `Broker.open`."""

    def __init__(
        self, name: str, url: str, account: Account, root: str, *, read_only: bool = False, limits: Limits | None = None
    ) -> None:
        super().__init__(name, url, read_only=read_only, limits=limits)
        self._configured = account
        self._root = root
        self._made: set[str] = set()  # directories that were there
        self._sessions = Sessions(self.name, account, self._limits)

    def info(self) -> Info:
        return Info(broker="ftp", server_move=True, sweeps=True, exact_versions=False, read_only=self._read_only)

    def connect(self, credentials: Mapping[str, str] | None = None) -> None:
        if not self.connected and not credentials:
            self._open(self._configured)
        super().connect(credentials)

    def disconnect(self) -> None:
        super().disconnect()
        self._sessions.close()

    def _use(self, credentials: Mapping[str, str]) -> None:
        wrong = sorted(credentials.keys() - {"user", "password"})
        if wrong:
            raise ConfigError(f"{self.name}: {wrong[0]}: not a credential of an ftp store; user and password are")
        before = self._configured
        user, password = credentials.get("user", before.user), credentials.get("password", before.password)
        self._open(replace(before, user=user, password=password))

    def _open(self, account: Account) -> None:
        self._sessions.close()
        self._sessions = Sessions(self.name, account, self._limits)

    def stat(self, key: str, *, deadline: float | None = None) -> Stat:
        self._begin("stat", keys.check_readable(key))
        return self._sessions.run("stat", key, lambda each: self._stat(each, key), self._limits.budget(deadline))

    def read(self, key: str, start: int = 0, length: int | None = None, *, deadline: float | None = None) -> bytes:
        self._begin("read", keys.check_readable(key))
        self._check_range(key, start, length)
        budget = self._limits.budget(deadline, length or 0)
        if length is None and deadline is None:  # how long it may take depends on how much it is
            size = self._sessions.run("read", key, lambda each: self._stat(each, key).size, budget)
            budget = self._limits.budget(None, max(0, size - start))
        return self._sessions.run("read", key, lambda each: self._read(each, key, start, length), budget)

    def upload(
        self,
        key: str,
        source: Source,
        size: int,
        *,
        if_absent: bool = False,
        if_version: str | None = None,
        progress: Callable[[int], None] | None = None,
        deadline: float | None = None,
    ) -> Stat:
        self._begin("upload", keys.check_writable(key), changes=True)
        budget = self._limits.budget(deadline, size)
        temporary = TEMPORARY + os.urandom(8).hex()

        def prepare(session: Session) -> None:  # a look before the work; what counts is seen again after it
            self._check_target(session, key, if_absent, if_version)
            self._make_parents(session, temporary)

        def send(session: Session) -> Stat:
            with session.transfer(f"STOR {self._place(temporary)}") as data:
                self._send(data, key, source, size, progress)
            self._check_size(session, temporary, size)
            self._check_target(session, key, if_absent, if_version)
            return self._rename(session, temporary, key)

        self._sessions.run("upload", key, prepare, budget)
        try:
            return self._sessions.run("upload", key, send, budget, attempts=1)
        except BaseException as error:
            self._forget(temporary)
            if isinstance(error, NotFound):
                why = "the object, or the directory it belongs in, was removed meanwhile; try again"
                raise Conflict(f"{self.name}: upload {key}: {why}") from None
            raise error.error if isinstance(error, _SourceFailed) else error from None

    def list(self, prefix: str = "", *, recursive: bool = True, deadline: float | None = None) -> Iterator[Stat]:
        self._begin("list", prefix)
        self._check_prefix(prefix)
        waiting = [prefix[: prefix.rfind("/") + 1]]
        while waiting:
            here = waiting.pop()
            for name, facts in self._names(here, self._limits.budget(deadline)):
                key, kind = here + name, facts.get("type", "").lower()
                if kind == "dir" and recursive and (f"{key}/".startswith(prefix) or prefix.startswith(f"{key}/")):
                    waiting.append(f"{key}/")
                elif kind == "file" and is_wanted(key, prefix, recursive) and not key.startswith(TEMPORARY):
                    yield described(key, facts)

    def delete(self, key: str, *, deadline: float | None = None) -> None:
        keys.check_readable(key)
        self._begin("delete", key, changes=True)

        def remove(session: Session) -> None:
            if _kind(self._facts(session, key)) == "file":
                session.ftp.voidcmd(f"DELE {self._place(key)}")

        self._sessions.run("delete", key, remove, self._limits.budget(deadline))

    def copy(self, source: str, target: str, *, if_absent: bool = False, deadline: float | None = None) -> Stat:
        self._begin("copy", keys.check_writable(target), changes=True)
        return super().copy(keys.check_readable(source), target, if_absent=if_absent, deadline=deadline)

    def move(self, source: str, target: str, *, if_absent: bool = False, deadline: float | None = None) -> Stat:
        keys.check_readable(source)
        self._begin("move", keys.check_writable(target), changes=True)

        def change(session: Session) -> Stat:
            found = self._stat(session, source)
            if source == target:
                return found
            self._check_target(session, target, if_absent, None)
            return self._rename(session, source, target)

        return self._sessions.run("move", source, change, self._limits.budget(deadline), attempts=1)

    def sweep(self, older_than_s: float = 86400.0, *, deadline: float | None = None) -> int:
        self._begin("sweep", changes=True)
        swept = 0
        for name, facts in self._names(AREA, self._limits.budget(deadline)):
            modified = _modified_ns(facts)
            stale = modified is not None and time.time() - modified / 1e9 >= older_than_s
            if stale and (AREA + name).startswith(TEMPORARY):
                self.delete(AREA + name, deadline=deadline)
                swept += 1
        return swept

    # With a connection
    # ----------------------------------------------------------------------------------------------------------

    def _place(self, key: str) -> str:
        return f"{self._root}/{key}".rstrip("/") or "/"

    def _facts(self, session: Session, key: str) -> Facts | None:
        """What the server says about a name; None where there is nothing."""
        try:
            answer = session.ftp.sendcmd(f"MLST {self._place(key)}")
        except ftplib.error_perm as error:
            if str(error).startswith("550"):
                return None
            raise
        lines = answer.splitlines()
        if len(lines) < 2:
            raise StoreError(f"{self.name}: the server's answer to MLST has no facts in it: it cannot be used")
        return parsed(lines[1].strip())[1]

    def _stat(self, session: Session, key: str) -> Stat:
        facts = self._facts(session, key)
        if facts is None or _kind(facts) != "file":
            raise NotFound(f"{self.name}: stat {key}: there is no such object")
        return described(key, facts)

    def _read(self, session: Session, key: str, start: int, length: int | None) -> bytes:
        """The bytes asked for. Where they end early, the size the server tells has to agree."""
        if length == 0:
            return b""
        try:
            with session.transfer(f"RETR {self._place(key)}", start, length) as data:
                received = data.receive(length)
        except ftplib.error_perm:  # so do some answer when it starts beyond the end
            if start < self._stat(session, key).size:
                raise
            return b""
        if len(received) != length:
            size = self._stat(session, key).size
            if start + len(received) != size and (received or start < size):
                short = StoreError(f"{self.name}: read {key}: the server sent fewer bytes than it has")
                short.temporary = True
                raise short
        return received

    def _send(self, data: Data, key: str, source: Source, size: int, progress: Callable[[int], None] | None) -> None:
        for offset in range(0, size, checksums.PART):
            length = min(checksums.PART, size - offset)
            try:
                piece = take_piece(self.name, key, source, offset, length)
            except BaseException as error:
                raise _SourceFailed(error) from None
            data.rest()
            data.send(piece)
            if progress is not None:
                progress(offset + length)

    def _check_size(self, session: Session, temporary: str, size: int) -> None:
        kept = self._stat(session, temporary).size
        if kept != size:
            raise StoreError(f"{self.name}: the server kept {kept} of the {size} bytes sent to it; is its disk full?")

    def _check_target(self, session: Session, key: str, if_absent: bool, if_version: str | None) -> None:
        """Raises Conflict when the name cannot be had, or a condition does not hold."""
        facts = self._facts(session, key)
        if _kind(facts) == "dir":
            self._remove_directory(session, key)
            facts = None
        present = None if facts is None else described(key, facts).version
        if (if_absent and present is not None) or (if_version is not None and present != if_version):
            raise Conflict(f"{self.name}: write {key}: it is there already, or was changed meanwhile")

    def _remove_directory(self, session: Session, key: str) -> None:
        try:
            session.ftp.voidcmd(f"RMD {self._place(key)}")
        except ftplib.error_perm:  # it is not empty
            raise Conflict(
                f"{self.name}: {key}: there are objects below that name, and none can be beside them; use another"
            ) from None
        self._made.clear()

    def _make_parents(self, session: Session, key: str) -> None:
        parts = self._place(key).split("/")[1:-1]
        for number in range(1, len(parts) + 1):
            directory = "/" + "/".join(parts[:number])
            if directory in self._made:
                continue
            self._make(session, key, directory)
            self._made.add(directory)

    def _make(self, session: Session, key: str, directory: str) -> None:
        with contextlib.suppress(ftplib.error_perm):  # it is there, or it cannot be made: looked at next
            session.ftp.voidcmd(f"MKD {directory}")
            return
        try:
            answer = session.ftp.sendcmd(f"MLST {directory}")
        except ftplib.error_perm:
            return  # some let nobody look at what is above their home; the upload will tell
        if _kind(parsed(answer.splitlines()[1].strip())[1]) == "file":
            raise Conflict(f"{self.name}: {key}: an object is where its directory has to be; use another name")

    def _rename(self, session: Session, source: str, target: str) -> Stat:
        """Give a file another name, replacing what has it."""
        self._make_parents(session, target)
        try:
            session.ftp.rename(self._place(source), self._place(target))
        except ftplib.error_perm:  # a directory was removed meanwhile, or this server does not replace
            self._made.clear()
            self._make_parents(session, target)
            if _kind(self._facts(session, target)) == "file":
                session.ftp.voidcmd(f"DELE {self._place(target)}")
            session.ftp.rename(self._place(source), self._place(target))
        return self._stat(session, target)

    def _forget(self, temporary: str) -> None:
        with contextlib.suppress(StoreError):  # the first error is the one to report
            self.delete(temporary, deadline=CLEANUP_S)

    def _names(self, here: str, budget: Budget) -> Names:
        """What is in a directory, under names that can be asked for; nothing where there is none."""

        def ask(session: Session) -> Lines:
            lines: Lines = []
            session.busy = True
            try:
                session.ftp.retrlines(f"MLSD {self._place(here)}", lines.append)
            except ftplib.error_perm:
                if self._facts(session, here) is not None:
                    raise
            session.busy = False
            return lines

        found = []
        for line in self._sessions.run("list", here, ask, budget):
            name, facts = parsed(line)
            if _kind(facts) in ("cdir", "pdir") or name in (".", ".."):
                continue
            reason = "has a slash in it" if "/" in name else keys.why_not_readable(here + name)
            if reason is None:
                found.append((name, facts))
            else:
                self._note_problem(here + name, reason)
        return found


def parsed(line: str) -> tuple[str, Facts]:
    """One line of MLSD or MLST: the name and the facts, as RFC 3659 has them (`Fact=Value;Fact=Value; name`)."""
    facts, _, name = line.partition(" ")
    pairs = (each.partition("=") for each in facts.split(";") if each)
    return name, {fact.lower(): value for fact, _, value in pairs}


def _kind(facts: Facts | None) -> str:
    return "" if facts is None else facts.get("type", "").lower()


def described(key: str, facts: Facts) -> Stat:
    size = facts.get("size", "")
    if not size.isascii() or not size.isdigit() or len(size) > _SIZE_DIGITS:
        raise StoreError(f"{key}: the server does not tell its size; it cannot be used as a store")
    version = "-".join(filter(None, (facts.get("modify"), facts.get("unique"), size)))
    return Stat(key, int(size), version, _modified_ns(facts), None)


def _modified_ns(facts: Facts) -> int | None:
    text = facts.get("modify", "")
    try:
        when = datetime.strptime(text[:14], "%Y%m%d%H%M%S").replace(tzinfo=UTC)
    except ValueError:
        return None
    return int(when.timestamp()) * 10**9


class Broker(BaseBroker):
    """`ftp://host[:port]/directory`, `ftps://...`. Options: `user` (anonymous), `password`, `tls` (ask an `ftp://`
    server for it), `read_only`."""

    schemes = ("ftps",)

    def validate(self, config: Mapping[str, Any]) -> list[str]:
        location = urls.split(config)
        urls.refuse_unknown(config, location, _OPTIONS)
        read_limits(config)
        if not location.host or location.host.startswith(":"):
            raise ConfigError(f"url = {location.url!r}: give ftp://HOST/DIRECTORY")
        reason = keys.why_not_readable(location.path) if location.path else None
        if reason is not None:
            raise ConfigError(f"url {location.url}: the directory {location.path!r} {reason}")
        found = [f"{location.url}: FTP has no conditional writes: push to it from one machine only"]
        host = location.host.rsplit(":", 1)[0]
        if _tls(config, location) == "no" and not host.startswith(("127.", "localhost")):
            found.append(f"{location.url}: FTP is not encrypted, the password neither; use tls = true or ftps://")
        return found

    def open(self, config: Mapping[str, Any]) -> FtpStore:
        self.validate(config)
        location = urls.split(config)
        host, _, port = location.host.partition(":")
        user = str(urls.option(config, location, "user") or "anonymous")
        password = str(config.get("password") or "")
        tls = _tls(config, location)
        account = Account(host, int(port or _PORTS[tls]), user, password, tls)
        root = f"/{location.path}" if location.path else ""
        name = str(config.get("name") or location.host)
        read_only = urls.truth(config, location, "read_only")
        return FtpStore(name, location.url, account, root, read_only=read_only, limits=read_limits(config))


def _tls(config: Mapping[str, Any], location: urls.Location) -> str:
    if location.scheme == "ftps":
        return "implicit"
    return "explicit" if urls.truth(config, location, "tls") else "no"
