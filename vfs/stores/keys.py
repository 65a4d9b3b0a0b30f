"""Keys: how a record's path becomes the name of an object, and which names a store accepts.

Used by whoever stores records (`encode`, `decode`, `name_of`) and by every store (`check_readable`,
`check_writable`). Nothing here blocks. This module owns the format:

- Each byte outside `[A-Za-z0-9._/-]` becomes `%XX` (upper case hexadecimal), so also `%` itself.
- A part `.` becomes `%2E`, `..` becomes `%2E%2E`, an empty part becomes `%_` (which no byte becomes).
- A first part that starts with `.runfs` becomes `%2Erunfs...`: that name is ours (`.runfs/<uuid>/...`).
- A path whose key would be over 900 bytes, or have a part over 255, becomes `<first part>/%-<blake3 of the path>`
  (`%-<blake3>` when the first part is longer than 64); such a key cannot be decoded, the manifest has the name. S3
  allows 1024 bytes with the prefix in it; SeaweedFS and everything that keeps objects as files allow 255 a part.

Different paths have different keys, also after what engines do to names (they strip spaces at the ends, fold
`//` and `\\`, replace bytes that are not UTF-8), because none of that can occur in a key.
"""

import re

from blake3 import blake3

from vfs.errors import UsageError

MAX_KEY = 900
MAX_PART = 255
MAX_FIRST_PART = 64  # a uuid has 12 to 36 characters: it stays readable before a hash
RESERVED = ".runfs"

_SAFE = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-")
_BYTES = tuple(chr(byte) if byte in _SAFE else f"%{byte:02X}" for byte in range(256))
_EMPTY = "%_"
_HASH = "%-"
_PART = re.compile(r"(?:[A-Za-z0-9._-]|%[0-9A-F]{2})+")
_WRITABLE = re.compile(r"[A-Za-z0-9._%-]+(?:/[A-Za-z0-9._%-]+)*")
_LONGEST = 1024  # S3's limit, and a bound for messages


def encode(path: bytes) -> str:
    """The key of a record's path. Total and injective over all byte strings."""
    parts = [_encode_part(part) for part in path.split(b"/")]
    if parts[0].startswith(RESERVED):
        parts[0] = "%2E" + parts[0][1:]
    key = "/".join(parts)
    if len(key) <= MAX_KEY and max(map(len, parts)) <= MAX_PART:
        return key
    hashed = _HASH + blake3(path).hexdigest()
    return f"{parts[0]}/{hashed}" if len(parts) > 1 and len(parts[0]) <= MAX_FIRST_PART else hashed


def decode(key: str) -> bytes:
    """The path whose key this is. Raises ValueError for a hashed key and for anything `encode` does not
    make."""
    path = b"/".join(_decode_part(part) for part in key.split("/"))
    if encode(path) != key:
        raise ValueError(f"not a key of a path: {key[:80]!r}")
    return path


def is_hashed(key: str) -> bool:
    """Whether this is a key that stands for a longer path."""
    return key.rsplit("/", 1)[-1].startswith(_HASH)


def name_of(key: str) -> bytes:
    """The path an object stands for where no manifest says it: decoded when we made the key, else as another
    tool wrote it."""
    try:
        return decode(key)
    except ValueError:
        return key.encode("utf-8", "surrogateescape")


def check_writable(key: str) -> str:
    """The key, if it may be made: safe alphabet, no empty, `.` or `..` part. Raises UsageError."""
    if len(key) > _LONGEST or not _WRITABLE.fullmatch(key) or why_not_readable(key) is not None:
        raise UsageError(f"not a key that can be stored: {key[:80]!r}; encode paths with vfs.stores.keys.encode")
    return key


def why_not_readable(key: str) -> str | None:
    """Why an object with this name (it may be another tool's) cannot be asked for exactly; None when it
    can."""
    if not key or len(key) > 4 * _LONGEST:
        return "is empty" if not key else "is too long"
    first = key.split("/", 1)[0]
    if first.startswith(RESERVED) and first != RESERVED:
        return "has a reserved first part"
    if any(part in ("", ".", "..") for part in key.split("/")):
        return "has an empty, '.' or '..' part"
    if key != key.strip():
        return "has white space at an end, which engines drop"
    if "\0" in key or "\ufffd" in key:
        return "has a character that engines do not keep"
    try:
        key.encode()
    except UnicodeEncodeError:
        return "is not UTF-8"
    return None


def check_readable(key: str) -> str:
    """The key, if it can be asked for exactly. Raises UsageError."""
    reason = why_not_readable(key)
    if reason is not None:
        raise UsageError(f"not a key: {key[:80]!r} {reason}")
    return key


def _encode_part(part: bytes) -> str:
    if not part:
        return _EMPTY
    if part in (b".", b".."):
        return "%2E" * len(part)
    return "".join(map(_BYTES.__getitem__, part))


def _decode_part(part: str) -> bytes:
    if part == _EMPTY:
        return b""
    if not _PART.fullmatch(part):
        raise ValueError(f"not a part of a key: {part[:80]!r}")
    return re.sub(rb"%([0-9A-F]{2})", lambda found: bytes([int(found[1], 16)]), part.encode())
