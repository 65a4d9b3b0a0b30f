"""Which buckets and items are meant: by name and by metadata; and the listings that tell how good they are.

Used by `objects.py`. A `Listing` blocks for the stores while it is iterated.
"""

import fnmatch
import os
import re
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from typing import Any, Generic, TypeVar

from vfs.errors import UsageError

T = TypeVar("T", covariant=True)


def text_of(value: object, what: str = "a name") -> str:
    """The text form of a name or a filter: of text itself, a Path, an Enum's value, a UUID, a number, ... Raises
    UsageError for bytes, which have none, and for None."""
    if isinstance(value, str):
        return str(value.value) if isinstance(value, Enum) else value
    if isinstance(value, Enum):
        return text_of(value.value, what)
    if value is None or isinstance(value, bytes | bytearray | memoryview):
        raise UsageError(f"{what} is {type(value).__name__}: give text, or something that has a text form")
    if isinstance(value, os.PathLike):
        return os.fspath(value) if isinstance(os.fspath(value), str) else text_of(os.fspath(value), what)
    return str(value)


def by_name(filter: object) -> Callable[[str], bool]:
    """Whether a name is meant.

    None: each. A compiled regular expression: where it is found in the name (`search`). Text with `*`, `?` or `[` in
    it: where the whole name matches it as a file pattern, upper and lower case apart (`*` matches `/` too). Other
    text: where it is part of the name. Anything else: where its text form is part of the name, letter by letter.
    """
    if filter is None:
        return lambda name: True
    if isinstance(filter, re.Pattern):
        if isinstance(filter.pattern, bytes):
            raise UsageError("the filter is a regular expression of bytes: names are text")
        return lambda name: filter.search(name) is not None
    text = text_of(filter, "the filter")
    if type(filter) is str and any(mark in text for mark in "*?["):
        return lambda name: fnmatch.fnmatchcase(name, text)
    return lambda name: text in name


def by_metadata(wanted: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], bool]:
    """Whether metadata is meant: each name that is asked for is there, and its value is equal; or a text that a
    compiled regular expression is found in; or one that is the text form of a Path, Enum or UUID."""

    def is_meant(metadata: Mapping[str, Any]) -> bool:
        return all(name in metadata and _equal(value, metadata[name]) for name, value in wanted.items())

    return is_meant


def _equal(wanted: Any, value: Any) -> bool:
    if isinstance(wanted, re.Pattern):
        return isinstance(value, str) and wanted.search(value) is not None
    if isinstance(wanted, bool) or isinstance(value, bool):  # 1 is not true
        return wanted is value
    if isinstance(wanted, tuple):
        wanted = list(wanted)
    if wanted is None or isinstance(wanted, int | float | list | dict) or type(wanted) is str:
        return bool(wanted == value)
    return bool(text_of(wanted, "the value asked for") == value)


class Listing(Iterator[T], Generic[T]):
    """The names or items of a listing, one after the other; the stores are asked as it goes.

    `stale`: it is (so far) not what the stores have now; `reason` says why ("" when it is). `problems`: what was
    left out, each one sentence. `close` ends it early.
    """

    def __init__(self, entries: Callable[["Listing[T]"], Iterator[T]]) -> None:
        self.reason = ""
        self.problems: list[str] = []
        self._entries = entries(self)

    @property
    def stale(self) -> bool:
        """Whether a store could not be asked: there may be more, or newer."""
        return bool(self.reason)

    def __iter__(self) -> "Listing[T]":
        return self

    def __next__(self) -> T:
        return next(self._entries)

    def close(self) -> None:
        """Ask nothing more. Calling it again does nothing."""
        close = getattr(self._entries, "close", None)
        if close is not None:
            close()
