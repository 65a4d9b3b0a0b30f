"""The checksums that stores keep, computed on our side, so that they can be compared.

Used by the stores while they send, and by whoever proves a replica. Nothing here blocks beyond hashing.

S3 (and what speaks it) keeps as ETag the MD5 of an object sent in one piece, and for one sent in parts the
MD5 of the parts' MD5s, with `-` and the number of parts
(https://docs.aws.amazon.com/AmazonS3/latest/userguide/checking-object-integrity.html). With some kinds of
encryption it is something else, so: equal proves, different proves nothing.
"""

import hashlib
import re

PART = 8 * 1024 * 1024  # bytes; one part in flight, four at a time
MAX_PARTS = 10_000  # S3's limit

MD5 = "md5"
MD5_PARTS = "md5-parts"
_ETAG = re.compile(r'"?([0-9a-f]{32})(?:-([1-9][0-9]*))?"?', re.IGNORECASE)


def part_size(size: int) -> int:
    """The size of the parts in which we send an object of `size` bytes: 8 MiB, more only above 80 GB."""
    mebibyte = 1024 * 1024
    least = -(-size // MAX_PARTS)
    return max(PART, -(-least // mebibyte) * mebibyte)


def part_count(size: int) -> int:
    """In how many parts we send an object of `size` bytes; 1 is one plain request."""
    return max(1, -(-size // part_size(size)))


def from_etag(etag: str | None, size: int) -> tuple[str, str] | None:
    """The checksum an S3 ETag stands for, or None when it is not one that we could compute."""
    found = _ETAG.fullmatch(etag) if etag else None
    if found is None:
        return None
    digest, parts = found[1].lower(), found[2]
    if parts is None:
        return (MD5, digest)
    return (MD5_PARTS, f"{digest}-{parts}") if int(parts) == part_count(size) > 1 else None


class Checksum:
    """Computes both kinds over bytes given in order: `update` as often as needed, then `matches` or
    `whole`/`parts`."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._part_size = part_size(size)
        self._whole = hashlib.md5(usedforsecurity=False)
        self._part = hashlib.md5(usedforsecurity=False)
        self._filled = 0
        self._digests: list[bytes] = []

    @classmethod
    def of(cls, data: bytes) -> "Checksum":
        """That of an object with this content."""
        made = cls(len(data))
        made.update(data)
        return made

    def update(self, data: bytes | memoryview) -> None:
        """Take the next bytes."""
        view = memoryview(data)
        if part_count(self._size) == 1:
            self._whole.update(view)
            return
        while view:
            piece = view[: self._part_size - self._filled]
            self._part.update(piece)
            self._filled += len(piece)
            view = view[len(piece) :]
            if self._filled == self._part_size:
                self._end_part()

    def _end_part(self) -> None:
        self._digests.append(self._part.digest())
        self._part = hashlib.md5(usedforsecurity=False)
        self._filled = 0

    def value(self) -> tuple[str, str]:
        """The checksum that a store which got these bytes from us reports."""
        if part_count(self._size) == 1:
            return (MD5, self._whole.hexdigest())
        digests = [*self._digests, self._part.digest()] if self._filled else self._digests
        return (MD5_PARTS, f"{hashlib.md5(b''.join(digests), usedforsecurity=False).hexdigest()}-{len(digests)}")
