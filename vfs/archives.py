"""Archives of records (tar): bring one from a web server, and unpack one. Used by `vfs.addresses`.

Blocks on the network within a deadline (it grows with what has arrived, as long as that is at least the least
throughput) and on the local disk. Nothing from an archive is executed, and nothing of it is written outside the
directory it is unpacked into: names, links and sizes in it are somebody's word.
"""

import errno
import hashlib
import os
import stat
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import IO, Any

from vfs.errors import DamagedRecord, Denied, Full, NotFound, StoreError, StoreTimeout, Unreachable, in_words

ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
_PIECE = 1 << 18
_SPARE = 64 << 20  # bytes of the disk that an archive never takes
MOST_MEMBERS = 1_000_000  # names an archive may have; unpacked bytes are bounded by the disk


@dataclass(frozen=True, slots=True)
class Limits:
    """How long a transfer may take: seconds of silence, and the bytes a second below which it is given up."""

    deadline_s: float
    least_throughput: int


@dataclass(frozen=True, slots=True)
class Brought:
    """What was brought: its sha256, its size in bytes, and the server's ETag if it gave one."""

    sha256: str
    size: int
    etag: str | None = None


def is_archive(path: str) -> bool:
    """Whether a path or URL path is named like an archive that can be unpacked."""
    return path.lower().endswith(ENDINGS)


def sha256_of(path: Path) -> Brought:
    """Digest a file here. Raises OSError."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while data := file.read(_PIECE):
            digest.update(data)
            size += len(data)
    return Brought(digest.hexdigest(), size)


# --- bring -----------------------------------------------------------------------------------------------------------


def bring(url: str, shown: str, target: Path, limits: Limits, told: Callable[[int, int | None], None]) -> Brought:
    """Bring what an http(s) URL gives into a new file, synced. `shown` stands for the URL in messages; `told` gets
    bytes so far and the size, if the server said it. Raises StoreError (which kind says why), Full."""
    request = urllib.request.Request(url, headers={"User-Agent": "runfs", "Accept-Encoding": "identity"})
    try:
        with urllib.request.build_opener(_Redirects()).open(request, timeout=limits.deadline_s) as response:
            return _take(response, shown, target, limits, told)
    except urllib.error.HTTPError as error:
        error.close()
        raise _refused(error.code, shown) from None
    except TimeoutError as error:
        raise StoreTimeout(f"{shown}: nothing came for {limits.deadline_s:.0f} s; try again") from error
    except urllib.error.URLError as error:
        if isinstance(error.reason, TimeoutError):
            raise StoreTimeout(f"{shown}: no answer within {limits.deadline_s:.0f} s; try again") from error
        why = in_words(error.reason) if isinstance(error.reason, OSError) else error.reason
        raise Unreachable(f"{shown}: no connection ({why}); is the address right, and the network up?") from error
    except (HTTPException, ConnectionError) as error:
        raise Unreachable(f"{shown}: the connection broke off ({error}); try again") from error


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows to http and https only: nothing on this machine is ever read for a server."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if not newurl.lower().startswith(("http://", "https://")):
            raise Denied(f"the server leads to {newurl.split(':')[0]}:, which is not followed; nothing was imported")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _refused(code: int, shown: str) -> StoreError:
    if 300 <= code < 400:
        return Denied(f"{shown}: the server leads to what is neither http nor https, which is not followed")
    if code in (404, 410):
        return NotFound(f"{shown}: there is nothing (HTTP {code}); check the address")
    if code in (401, 403):
        return Denied(f"{shown}: the server refuses (HTTP {code}); it wants credentials, which an address cannot have")
    return StoreError(f"{shown}: the server failed (HTTP {code}); try again later")


def _take(response: Any, shown: str, target: Path, limits: Limits, told: Callable[[int, int | None], None]) -> Brought:
    said = response.headers.get("Content-Length")
    size = int(said) if said is not None and said.isdigit() else None
    began, digest, done = time.monotonic(), hashlib.sha256(), 0
    with target.open("xb") as out:
        while data := response.read1(_PIECE):
            _room(target, len(data))
            digest.update(data)
            out.write(data)
            done += len(data)
            told(done, size)
            if time.monotonic() - began > limits.deadline_s + done / max(1, limits.least_throughput):
                raise StoreTimeout(f"{shown}: less than {limits.least_throughput:,} bytes a second came; try again")
        out.flush()
        os.fsync(out.fileno())
    if size is not None and done != size:
        raise Unreachable(f"{shown}: the connection broke off after {done:,} of {size:,} bytes; try again")
    return Brought(digest.hexdigest(), done, response.headers.get("ETag"))


def _room(target: Path, size: int) -> None:
    room = os.statvfs(target.parent)
    if room.f_bavail * room.f_frsize < size + _SPARE:
        raise Full(f"no space in {target.parent} for {target.name}; free some with: runfs evict --until-free SIZE")


# --- unpack ----------------------------------------------------------------------------------------------------------


def unpack(archive: Path, directory: Path, shown: str) -> None:
    """Unpack a tar archive into a new directory: files, directories, and links that stay inside.

    Modes are kept without set-id bits, owners are not. Raises DamagedRecord (no archive, or a member that leads out of
    the directory, is a device, or appears twice), Full, OSError.
    """
    directory.mkdir(mode=0o700)
    try:
        with tarfile.open(archive, "r:*") as tar:
            for number, member in enumerate(tar):
                if number >= MOST_MEMBERS:
                    raise DamagedRecord(f"{shown} has more than {MOST_MEMBERS:,} members, which is refused")
                _unpack_one(tar, member, directory, shown)
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise DamagedRecord(f"{shown} is no tar archive that can be read ({error}); nothing was imported") from error
    except OSError as error:
        odd = error.errno in (None, errno.ENAMETOOLONG, errno.ELOOP)
        if odd or isinstance(error, FileExistsError | NotADirectoryError | IsADirectoryError):
            raise DamagedRecord(f"{shown} contradicts itself ({error}); nothing was imported") from error
        raise


def _unpack_one(tar: tarfile.TarFile, member: tarfile.TarInfo, directory: Path, shown: str) -> None:
    name = member.name.removeprefix("./").rstrip("/")
    if name in ("", "."):
        return
    _check_name(name, shown)
    target = directory / name
    if os.path.realpath(target.parent) != os.path.join(os.path.realpath(directory), *Path(name).parts[:-1]):
        raise DamagedRecord(f"{shown}: {name!r:.200} lies behind a link, which is refused; nothing was imported")
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if member.isdir():
        target.mkdir(exist_ok=True)
    elif member.issym():
        _check_link(name, member.linkname, shown)
        target.symlink_to(member.linkname)
    elif member.isreg() or member.islnk():
        _write(tar, member, target, shown)
    else:
        raise DamagedRecord(f"{shown}: {name!r:.200} is a device or a pipe, which is refused; nothing was imported")


def _check_name(name: str, shown: str) -> None:
    parts = name.split("/")
    if name.startswith("/") or "\0" in name or any(part in ("", ".", "..") for part in parts):
        raise DamagedRecord(f"{shown}: {name!r:.200} leads out of the archive, which is refused; nothing was imported")


def _check_link(name: str, target: str, shown: str) -> None:
    inside = os.path.normpath(os.path.join("/x", os.path.dirname(name), target))
    if target.startswith("/") or not (inside + "/").startswith("/x/") or inside == "/x" or not target:
        raise DamagedRecord(
            f"{shown}: the link {name!r:.200} leads out of the archive, which is refused; nothing was imported"
        )


def _write(tar: tarfile.TarFile, member: tarfile.TarInfo, target: Path, shown: str) -> None:
    """One file; a hard link becomes a copy of what it names."""
    source: IO[bytes] | None
    try:
        source = tar.extractfile(member)
    except KeyError as error:
        raise DamagedRecord(f"{shown}: {member.name!r:.200} is a link to nothing; nothing was imported") from error
    if source is None:
        raise DamagedRecord(f"{shown}: {member.name!r:.200} is no file; nothing was imported")
    fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with source, os.fdopen(fd, "wb") as out:
        try:
            while data := source.read(1 << 20):
                _room(target, len(data))
                out.write(data)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise Full(f"no space for what {shown} holds; free some with: runfs evict --until-free SIZE") from error
            raise
        os.fchmod(fd, stat.S_IMODE(member.mode) & 0o777 | 0o600)
    os.utime(target, (member.mtime, member.mtime))
