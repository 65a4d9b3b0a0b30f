"""machinable's record directory, format v1: names, header, run status. The one module that knows this layout.

Used by the index (ingest), by eviction (is a run live?) and by the tree (is this an incoming record?). It only
reads. It blocks on the local disk and on nothing else: links are never followed, special files never opened
for real, and no file over 16 MiB is read, so a foreign directory cannot stall or fill the process.

The format's source is machinable 5.1 (its `format.py`, `execution.py` and the documents they name)::

    <record>/.machinable              empty marker (older ones hold the uuid): "a record is here"
             id.json                  header, never changes: format, uuid, kind, identity_key, predicate_key, parent
             model.json               everything else the index copies
             updated_at               when an official write last touched the record
             {dispatched,started,heartbeat,finished,resumed}_at    how a run stands
             related/metadata.jsonl   edges to other records, one JSON object a line, only ever appended to
"""

import errno
import json
import os
import re
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta, timezone
from enum import StrEnum
from typing import Any

from vfs.errors import DamagedRecord

FORMAT_VERSION = 1
MARKER = ".machinable"
HEADER = "id.json"
MODEL = "model.json"
UPDATED_AT = "updated_at"
EDGES = "related/metadata.jsonl"
STATUS_MARKERS = ("dispatched_at", "started_at", "heartbeat_at", "finished_at", "resumed_at")

# A real header is 200 bytes and a large model some 100 kB; what is far beyond is not ours to hold in memory.
LARGEST = 16 * 2**20
# machinable beats every 15 s and calls a run dead after six missed beats.
HEARTBEAT_WINDOW_S = 90.0

Location = str | bytes | os.PathLike[str] | os.PathLike[bytes]

_SAFE_UUID = re.compile(r"[A-Za-z0-9_-]{1,64}\Z")


def is_safe_uuid(uuid: object) -> bool:
    """Whether `uuid` can be a name in the mount: 1 to 64 of `[A-Za-z0-9_-]`, so never `.`, `..`, `.by` or a path."""
    return isinstance(uuid, str) and _SAFE_UUID.match(uuid) is not None


@dataclass(frozen=True, slots=True)
class Header:
    """What `id.json` says. `parent` is the uuid of the record this one belongs to, if any."""

    uuid: str
    kind: str
    identity_key: str
    predicate_key: str
    parent: str | None
    format: int = FORMAT_VERSION


class Status(StrEnum):
    """How a run stands; the words are those of machinable's conformance corpus."""

    NONE = "none"  # never dispatched: not a run, or one that is only prepared
    PENDING = "pending"  # handed to a scheduler, not started
    LIVE = "live"  # a fresh heartbeat and not finished
    DIED = "died"  # started, no fresh heartbeat, not finished: machinable's `is_incomplete`
    FINISHED = "finished"


# ---------------------------------------------------------------------------------------------- bounded reading


@contextmanager
def opened(directory: Location) -> Iterator[int]:
    """The descriptor of a directory that is really there. A link in its place is refused: its files are elsewhere.

    Raises DamagedRecord (link, not a directory, unreadable) and FileNotFoundError.
    """
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as error:
        link = error.errno == errno.ELOOP or (error.errno == errno.ENOTDIR and os.path.islink(directory))
        reason = "is a link, its files are elsewhere" if link else _reason(error)
        raise DamagedRecord(f"{_shown(directory)}: {reason}") from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def read_bytes(descriptor: int, name: str, shown: str) -> bytes | None:
    """A file's bytes by its name relative to an open directory; None when there is none.

    Raises DamagedRecord when it is a link (or below one), not a plain file, over 16 MiB, or unreadable.
    """
    folder, _, leaf = name.rpartition("/")
    if folder:
        try:
            below = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=descriptor)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise DamagedRecord(f"{shown}: {folder}: {_reason(error)}") from error
        try:
            return read_bytes(below, leaf, f"{shown}/{folder}")
        finally:
            os.close(below)
    try:
        # O_NONBLOCK: opening a FIFO somebody left there must not wait for its writer.
        file = os.open(leaf, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=descriptor)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DamagedRecord(f"{shown}/{leaf}: {_reason(error)}") from error
    try:
        return _read_all(file, f"{shown}/{leaf}")
    finally:
        os.close(file)


def _read_all(file: int, shown: str) -> bytes:
    status = os.fstat(file)
    if not stat.S_ISREG(status.st_mode):
        raise DamagedRecord(f"{shown}: is not a plain file")
    parts: list[bytes] = []
    left = LARGEST + 1
    while left > 0 and (part := os.read(file, min(left, 2**20))):
        parts.append(part)
        left -= len(part)
    if left <= 0:
        raise DamagedRecord(f"{shown}: is over {LARGEST >> 20} MiB, too large for what it should be")
    return b"".join(parts)


def parse_json(data: bytes, shown: str) -> Any:
    """The JSON value in `data`. Raises DamagedRecord with the place of the fault."""
    try:
        return json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DamagedRecord(f"{shown}: is not UTF-8 text (byte {error.start})") from error
    except RecursionError as error:
        raise DamagedRecord(f"{shown}: is nested too deeply") from error
    except ValueError as error:
        raise DamagedRecord(f"{shown}: is not JSON ({error})") from error


def _reason(error: OSError) -> str:
    if error.errno == errno.ELOOP:
        return "is a link, which is not followed"
    if error.errno == errno.ENOTDIR:
        return "is not a directory"
    return f"cannot be read: {os.strerror(error.errno or errno.EIO)}"


def _shown(directory: Location) -> str:
    return os.fsdecode(directory)


# ------------------------------------------------------------------------------------------------------- header


def is_record_directory(directory: Location) -> bool:
    """Whether the directory holds the marker as a plain file. What is missing, a link or unreadable is not one."""
    try:
        with opened(directory) as descriptor:
            return has_marker(descriptor)
    except (FileNotFoundError, DamagedRecord):
        return False


def has_marker(descriptor: int) -> bool:
    """Whether an open directory holds the marker as a plain file."""
    try:
        return stat.S_ISREG(os.stat(MARKER, dir_fd=descriptor, follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return False


def read_header(directory: Location) -> Header:
    """The header in `id.json`.

    Raises DamagedRecord, with the reason, when the directory or the file is missing, is a link, does not parse,
    lacks a key, names a format we do not know, or has a uuid that cannot be a file name.
    """
    shown = _shown(directory)
    try:
        with opened(directory) as descriptor:
            return header_in(descriptor, shown)
    except FileNotFoundError as error:
        raise DamagedRecord(f"{shown}: there is no such directory") from error


def header_in(descriptor: int, shown: str) -> Header:
    """As `read_header`, of an open directory; `shown` names it in messages."""
    data = read_bytes(descriptor, HEADER, shown)
    if data is None:
        raise DamagedRecord(f"{shown}: has no {HEADER}; if it is an old store, run: machinable migrate")
    return parse_header(data, f"{shown}/{HEADER}")


def parse_header(data: bytes, shown: str = HEADER) -> Header:
    """The header in the bytes of an `id.json`; `shown` names it in messages. Raises DamagedRecord."""
    value = parse_json(data, shown)
    if not isinstance(value, dict):
        raise DamagedRecord(f"{shown}: is not an object")
    # Absent means 1: machinable's own reader does not ask for the number.
    version = value.get("format", FORMAT_VERSION)
    if version != FORMAT_VERSION:
        raise DamagedRecord(f"{shown}: has format {version!r}; this runfs knows format {FORMAT_VERSION}")
    for key in ("uuid", "identity_key", "predicate_key"):
        if not isinstance(value.get(key), str):
            raise DamagedRecord(f"{shown}: has no {key}")
    if not is_safe_uuid(value["uuid"]):
        raise DamagedRecord(f"{shown}: its uuid {value['uuid']!r} cannot be a file name")
    parent = value.get("parent")
    if parent is not None and not isinstance(parent, str):
        raise DamagedRecord(f"{shown}: its parent {parent!r} is not a uuid")
    kind = value.get("kind", "Interface")
    if not isinstance(kind, str):
        raise DamagedRecord(f"{shown}: its kind {kind!r} is not a word")
    return Header(value["uuid"], kind, value["identity_key"], value["predicate_key"], parent)


# ------------------------------------------------------------------------------------------------------- status


def heartbeat_window() -> float:
    """How old, in seconds, a heartbeat may be for its run to be live.

    `MACHINABLE_HEARTBEAT_WINDOW` widens it, as for machinable, so that both always agree on what is live.
    """
    try:
        window = float(os.environ.get("MACHINABLE_HEARTBEAT_WINDOW", HEARTBEAT_WINDOW_S))
    except ValueError:
        return HEARTBEAT_WINDOW_S
    return window if window > 0 else HEARTBEAT_WINDOW_S


def run_status(
    source: Location | Mapping[str, bytes], now: float | None = None, *, window: float | None = None
) -> Status:
    """How the run in a directory stands, or the run whose marker files are given as name -> content.

    `now` is in seconds since 1970 (default: the clock), `window` in seconds (default: `heartbeat_window()`).
    A directory that is not there has no status. Raises DamagedRecord when a marker cannot be read or the
    directory is a link: guessing "not live" there could drop bytes that are being written.
    """
    markers = source if isinstance(source, Mapping) else _read_markers(source)
    when = {name: marker_time(markers[name], name) for name in STATUS_MARKERS if name in markers}
    if when.get("finished_at") is not None:
        return Status.FINISHED
    beat = when.get("heartbeat_at")
    age_limit = heartbeat_window() if window is None else window
    # A beat from the future is a clock that runs ahead: a false "live" costs less than a false "died".
    if beat is not None and (time.time() if now is None else now) - beat.timestamp() < age_limit:
        return Status.LIVE
    if when.get("started_at") is not None:
        return Status.DIED
    return Status.PENDING if when.get("dispatched_at") is not None else Status.NONE


def is_live(source: Location | Mapping[str, bytes], now: float | None = None, *, window: float | None = None) -> bool:
    """Whether the run has a fresh heartbeat and no end. Arguments and errors as for `run_status`."""
    return run_status(source, now, window=window) is Status.LIVE


def _read_markers(directory: Location) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    try:
        with opened(directory) as descriptor:
            for name in STATUS_MARKERS:
                data = read_bytes(descriptor, name, _shown(directory))
                if data is not None:
                    found[name] = data
    except FileNotFoundError:
        return {}
    return found


def marker_time(content: bytes, name: str = UPDATED_AT) -> datetime | None:
    """The time in a marker file; None when it holds none. `resumed_at` has one line a resumption: the last counts."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        return None
    if name == "resumed_at":
        text = text.strip("\n").split("\n")[-1]
    return parse_time(text.strip())


def updated_at_ns(content: bytes) -> int | None:
    """`updated_at` in nanoseconds since 1970, through a float exactly as machinable does it (microseconds at best)."""
    when = marker_time(content)
    return None if when is None else int(when.timestamp() * 1e9)


_TIME = re.compile(
    r"(?P<year>\d{4})"
    r"(?:-(?P<ordinal>\d{3})|-(?P<month>\d{1,2})(?:-(?P<day>\d{1,2}))?|(?P<month2>\d\d)(?P<day2>\d\d))?"
    r"(?:[T ](?P<hour>\d\d)(?::?(?P<minute>\d\d)(?::?(?P<second>\d\d)(?:[.,](?P<fraction>\d+))?)?)?"
    r"(?P<zone>Z|[+-]\d\d(?::?\d\d)?)?)?\Z",
    re.ASCII,
)


def parse_time(text: str) -> datetime | None:
    """An ISO 8601 time as machinable's clock library reads it, UTC where no zone is given; None if it is none.

    Calendar dates (also shortened or compact) and ordinal ones. Digits past the microsecond are rounded.
    """
    match = _TIME.match(text)
    if match is None:
        return None
    try:
        return _datetime(match.groupdict())
    except (ValueError, OverflowError):
        return None


def _datetime(part: dict[str, str | None]) -> datetime:
    year = int(part["year"] or 0)
    if part["ordinal"] is not None:
        day = datetime.strptime(f"{year:04} {part['ordinal']}", "%Y %j").date()
    else:
        day = date(year, int(part["month"] or part["month2"] or 1), int(part["day"] or part["day2"] or 1))
    hour, minute, second = (int(part[name] or 0) for name in ("hour", "minute", "second"))
    carry = _microseconds(part["fraction"])
    if hour == 24:  # midnight at the end of the day
        if minute or second or carry:
            raise ValueError("24:00 is the end of the day")
        hour, carry = 0, timedelta(days=1)
    return datetime(day.year, day.month, day.day, hour, minute, second, tzinfo=_zone(part["zone"])) + carry


def _microseconds(fraction: str | None) -> timedelta:
    digits = (fraction or "").ljust(7, "0")
    seventh, value = int(digits[6]), int(digits[:6])
    # Half rounds to even, as the library that wrote it does.
    up = value % 2 if seventh == 5 else int(seventh > 5)
    return timedelta(microseconds=value + up)


def _zone(text: str | None) -> timezone:
    if text is None or text == "Z":
        return UTC
    sign = -1 if text[0] == "-" else 1
    return timezone(sign * timedelta(hours=int(text[1:3]), minutes=int(text[3:].lstrip(":") or 0)))
