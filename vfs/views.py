"""What the `.by` views hold: values and records, as questions to the index.

Used by `vfs/tree.py`. A `place` is the decoded names below `.by`. Any thread; most questions scan the index, so that a
handler asks them in a worker thread.
"""

from collections.abc import Iterator
from functools import partial
from urllib.parse import unquote_to_bytes

from vfs.errors import UsageError
from vfs.index import Index, Record
from vfs.index_search import date_bounds
from vfs.units import Units

VIEWS = ("label", "module", "kind", "status", "created_by", "date", "config")
_PAGE = 1000
_RECORDS = 20_000  # a page of a view's records: each scans the index


def is_directory(place: tuple[str, ...]) -> bool:
    """Whether a place is a directory of a view, and no record's link."""
    return len(place) <= (3 if place[0] == "config" else 2)


class Views:
    """The views of one index."""

    def __init__(self, index: Index, units: Units) -> None:
        self._index = index
        self._units = units

    def names(self, place: tuple[str, ...]) -> Iterator[tuple[bytes, int]]:
        """The names in a directory, with the time of the record in ns (0 for a value). Scans."""
        if not place:
            yield from ((name.encode(), 0) for name in VIEWS)
        elif is_directory((*place, "")):
            yield from ((encode_value(value), 0) for value in self._values(place) if value)
        else:
            after = ""
            while records := self._records(place, after, _RECORDS):
                yield from ((record.uuid.encode(), record.updated_at_ns) for record in records)
                after = records[-1].uuid

    def changed(self, directory: tuple[str, ...], name: str) -> int | None:
        """When the record of a name changed, in ns (0 for a value); None: it is not there. Scans for a value."""
        if is_directory((*directory, name)):
            return 0 if self._exists((*directory, name)) else None
        found = self._records(directory, uuid=name, limit=1)
        return found[0].updated_at_ns if found else None

    def _exists(self, place: tuple[str, ...]) -> bool:
        if len(place) == 1:
            return place[0] in VIEWS
        if place[0] == "config" and len(place) == 2:
            return place[1] in self._index.config_paths()
        return bool(self._records(place, limit=1))

    def _values(self, place: tuple[str, ...]) -> Iterator[str]:
        if place == ("config",):
            yield from self._index.config_paths()
            return
        after = ""
        while True:
            if place[0] == "config":
                values = self._index.config_values(place[1], after, _PAGE)
            else:
                values = self._index.values(place[0], after, _PAGE)
            yield from values
            if len(values) < _PAGE:
                return
            after = values[-1]

    def _records(
        self, place: tuple[str, ...], after: str = "", limit: int = _PAGE, uuid: str | None = None
    ) -> list[Record]:
        view, value = place[0], place[-1]
        search = partial(self._index.search, after=after, limit=limit, uuid=uuid)
        if view == "config":
            return search(config=[(place[1], "is", value)])
        if view == "date":
            try:
                first, end = date_bounds(value)
            except UsageError:
                return []
            return search(created_after_ns=first, created_before_ns=end)
        if view == "status" and value not in self._index.values("status"):
            return []
        return search(**{view: value}, status_of=self._units.run_status_of)  # type: ignore[arg-type]


def encode_value(value: str) -> bytes:
    """A value as a file name: `/`, `%`, NUL and line breaks are percent-encoded, and `.` and `..`."""
    raw = value.encode("utf-8", "surrogateescape")
    if raw in (b".", b".."):
        return raw.replace(b".", b"%2E")
    return b"".join(b"%%%02X" % byte if byte < 32 or byte in b"/%" else bytes((byte,)) for byte in raw)


def decode_value(name: bytes) -> str:
    """The inverse of `encode_value`."""
    return unquote_to_bytes(name).decode("utf-8", "surrogateescape")
