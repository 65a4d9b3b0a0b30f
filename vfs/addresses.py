"""Addresses that records are imported from, and what is remembered of them: `url+`, `file+` and `link+`.

    url+https://host/record.tar.gz[#sha256=HEX]    an archive of records from a web server
    url+s3://bucket/prefix (any store's URL)       records that a store holds
    file+/path (a directory or an archive)         copied
    link+/path                                     used where it is: nothing is copied, and nothing of it is moved

Used by `vfs.imports`. What an address gave is pinned in the journal when it is brought (sha256 of an archive, digest
of a directory's files, the manifests of a store), and it is not brought again: an archive stays in the cache, and when
it has to be fetched once more it must be the very same. Blocks on the network and the local disk.
"""

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from blake3 import blake3

from vfs import archives
from vfs.errors import UsageError, WrongBytes
from vfs.journal import Journal
from vfs.manifest import digest_of
from vfs.scan import open_file, reader, walk
from vfs.settings import Settings, StoreSettings

KINDS = ("url", "file", "link")
_NOTE = "imports"  # the journal's note that holds all pins, as JSON
_PLACE = ".imports"  # below the cache's place


@dataclass(frozen=True, slots=True)
class Address:
    """Where records come from. `kind`: one of `KINDS`; `place`: a URL or an absolute path; `sha256`: what an archive is
    to have, '' for what it has when it is first brought."""

    kind: str
    place: str
    sha256: str = ""

    @property
    def key(self) -> str:
        """What is remembered of it is found by this."""
        return blake3(f"{self.kind}+{self.place}".encode("utf-8", "surrogateescape")).hexdigest(16)

    @property
    def shown(self) -> str:
        """The address as it may be printed and kept: a query may hold a signature."""
        return f"{self.kind}+{self.place.split('?')[0] if self.is_web else self.place}"

    @property
    def is_web(self) -> bool:
        return self.kind == "url" and self.place.lower().startswith(("http://", "https://"))

    @property
    def is_archive(self) -> bool:
        """A web address that does not end with a slash is one file; a path by its name."""
        if self.is_web:
            return not urlsplit(self.place).path.endswith("/")
        return self.kind == "file" and archives.is_archive(self.place) and not os.path.isdir(self.place)


def parse_address(text: str) -> Address | None:
    """The address that was typed; None for a plain directory or store URL. Raises UsageError saying what is wrong."""
    kind, plus, rest = text.partition("+")
    if not plus or not re.fullmatch(r"[a-z]+", kind):
        return None
    if kind not in KINDS:
        if "://" in rest:
            return None  # a store's scheme with a plus in it
        raise UsageError(f"{text!r:.200}: {kind}+ is no kind of address; there are url+URL, file+PATH and link+PATH")
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        raise UsageError(f"{text!r:.200}: not an address; half a character is in it") from None
    place, _hash, pin = rest.partition("#") if kind == "url" else (rest, "", "")
    if kind == "url":
        _check_url(text, place)
    elif not place.startswith("/"):
        raise UsageError(f"{text!r:.200}: name an absolute path, as in {kind}+/data/records")
    found = Address(kind, place, _pin(text, pin))
    if found.sha256 and not found.is_archive:
        raise UsageError(f"{text!r:.200}: a sha256 can pin an archive only, and this is a store")
    return found


def _check_url(text: str, place: str) -> None:
    try:
        StoreSettings(name="source", url=place)
    except ValueError:
        scheme, marks, _rest = place.partition("://")
        shown = f"url+{scheme}://..." if marks else text  # what comes after may be a password
        raise UsageError(
            f"{shown!r:.200}: not an address; write url+https://host/record.tar.gz, or url+ and a store's URL, without "
            "credentials in it"
        ) from None


def _pin(text: str, pin: str) -> str:
    if not pin:
        return ""
    match = re.fullmatch(r"sha256=([0-9a-fA-F]{64})", pin)
    if match is None:
        shown = text.partition("#")[0]
        raise UsageError(f"{shown!r:.300}: what follows the # is no pin; a pin is #sha256= and 64 hexadecimal digits")
    return match[1].lower()


@dataclass(frozen=True, slots=True)
class Pin:
    """What an address gave: `digest` names it (`sha256=...` of an archive, `blake3=...` of a directory or of a store's
    manifests), `uuids` are the root records in it. `directory`: where a linked record is."""

    address: str
    digest: str
    uuids: tuple[str, ...] = ()
    size: int = 0
    etag: str | None = None
    at_ns: int = field(default_factory=time.time_ns)
    directory: str = ""


class Pins:
    """The pins of one index, in its journal."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def _all(self) -> dict[str, dict[str, Any]]:
        found = json.loads(self._journal.note(_NOTE) or "{}")
        return found if isinstance(found, dict) else {}

    def get(self, address: Address) -> Pin | None:
        """What the address gave before."""
        found = self._all().get(address.key)
        return _pin_of(found) if found else None

    def set(self, address: Address, pin: Pin) -> None:
        """Remember, durably."""
        self._journal.set_note(_NOTE, json.dumps({**self._all(), address.key: asdict(pin)}))

    def linked(self) -> list[Pin]:
        """Those of records that are used where they are."""
        return [_pin_of(each) for each in self._all().values() if each.get("directory")]


def _pin_of(kept: Mapping[str, Any]) -> Pin:
    return Pin(**{**kept, "uuids": tuple(kept["uuids"])})


def digest_of_directory(directory: Path) -> str:
    """A digest of all names and contents below a directory, the same for the same files wherever they are."""
    whole = blake3()
    for seen in walk(os.fsencode(directory)):
        content = seen.target
        if seen.kind == "file":
            fd = open_file(os.fsencode(directory), seen.path, os.O_RDONLY)
            try:
                content = digest_of(reader(fd), seen.status.st_size).digest
            except EOFError:
                raise WrongBytes(f"{directory}: it changes while it is read; import it when nobody writes") from None
            finally:
                os.close(fd)
        whole.update(b"%d:%s%s:%d:%s" % (len(seen.path), seen.path, seen.kind.encode(), len(content), content))
    return f"blake3={whole.hexdigest()}"


def digest_of_manifests(bodies: Iterable[bytes]) -> str:
    """A digest of what a store said its records are, in whatever order it named them."""
    return "blake3=" + blake3(b"".join(sorted(blake3(body).digest() for body in bodies))).hexdigest()


@contextmanager
def unpacked(
    address: Address, pin: Pin | None, settings: Settings, told: Callable[[int, int | None], None]
) -> Iterator[tuple[Path, Pin]]:
    """An archive's content in a directory that is gone afterwards, and the pin. It is fetched only when it is not in
    the cache. Raises WrongBytes when it is not what was pinned, StoreError, DamagedRecord, Full, OSError."""
    place = settings.cache_place / _PLACE
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    kept = place / address.key
    expected = address.sha256 or (pin.digest.removeprefix("sha256=") if pin else "")
    file = kept if address.is_web else Path(address.place)
    brought = _brought(address, kept, expected, settings, told) if address.is_web else archives.sha256_of(file)
    if expected and brought.sha256 != expected:
        if address.is_web:
            kept.unlink(missing_ok=True)
        raise WrongBytes(
            f"{address.shown}: its sha256 is {brought.sha256}, not {expected} as pinned; nothing was imported"
        )
    made = place / f"{address.key}.{os.urandom(6).hex()}"
    try:
        archives.unpack(file, made, address.shown)
        etag = brought.etag or (pin.etag if pin else None)
        yield made, Pin(address.shown, f"sha256={brought.sha256}", size=brought.size, etag=etag)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _brought(
    address: Address, kept: Path, expected: str, settings: Settings, told: Callable[[int, int | None], None]
) -> archives.Brought:
    """The archive in the cache, fetched if it is not there or is not what is expected."""
    if kept.exists():
        here = archives.sha256_of(kept)
        if not expected or here.sha256 == expected:
            return here
        kept.unlink()
    partial = kept.with_name(f"{kept.name}.part-{os.urandom(6).hex()}")
    try:
        limits = archives.Limits(settings.deadline_s, settings.least_throughput)
        done = archives.bring(address.place, address.shown, partial, limits, told)
        os.replace(partial, kept)
    finally:
        partial.unlink(missing_ok=True)
    return done


def is_cached(address: Address, settings: Settings) -> bool:
    """Whether an archive is here already."""
    return not address.is_web or (settings.cache_place / _PLACE / address.key).exists()


def with_uuids(pin: Pin, uuids: Iterable[str]) -> Pin:
    """The pin, with the records that were found in it."""
    return replace(pin, uuids=tuple(sorted(set(uuids))))
