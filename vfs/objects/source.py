"""What is put into a bucket: bytes, a file or a stream, as an upload's source, digested on its way.

Used by `objects.py`. Blocks on the disk, and on the stream that is read. Memory stays bounded: a stream that cannot
say how long it is goes through a temporary file.
"""

import errno
import io
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from blake3 import blake3

from vfs import manifest
from vfs.errors import Full, StoreError, UsageError
from vfs.manifest import Content

BUFFER = 1 << 20  # bytes read from a stream at a time, unless told

Given = bytes | bytearray | memoryview | os.PathLike[str] | IO[bytes] | io.BufferedIOBase | io.RawIOBase


class Source:
    """`size` bytes from `start` on in a seekable stream, for any number of uploads one after the other."""

    def __init__(self, stream: Any, start: int, size: int, buffer_size: int) -> None:
        self.size = size
        self._stream = stream
        self._start = start
        self._buffer_size = buffer_size

    def read(self, offset: int, length: int) -> bytes:
        """These bytes, fewer where the stream ends."""
        self._stream.seek(self._start + offset)
        pieces = bytearray()
        while len(pieces) < length:
            piece = self._stream.read(min(self._buffer_size, length - len(pieces)))
            if not piece:
                break
            pieces += piece
        return bytes(pieces)


class Digesting:
    """Reads a source and digests it on the way, whatever the order that a store asks in (it may ask twice for a
    piece, or go on where an earlier upload was)."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._whole = blake3()
        self._chunk = blake3()
        self._chunks = bytearray()
        self._position = 0

    def read(self, offset: int, length: int) -> bytes:
        data = self._source.read(offset, length)
        if offset <= self._position < offset + len(data):
            self._take(data[self._position - offset :])
        return data

    def content(self) -> Content:
        """The digests of all of it. Raises StoreError when it became shorter meanwhile."""
        self._catch_up()
        if self._position < self._source.size:
            raise StoreError(
                f"what is put ended at {self._position} of {self._source.size} bytes: it changed; put it again"
            )
        if self._position % manifest.CHUNK:
            self._end_chunk()
        return Content(self._whole.digest(), self._source.size, bytes(self._chunks))

    def _catch_up(self) -> None:
        """Digest what nobody asked for in order."""
        while data := self._source.read(self._position, min(manifest.CHUNK, self._source.size - self._position)):
            self._take(data)

    def _take(self, data: bytes) -> None:
        self._whole.update(data)
        view = memoryview(data)
        while view:
            left = manifest.CHUNK - self._position % manifest.CHUNK
            piece, view = view[:left], view[left:]
            self._chunk.update(piece)
            self._position += len(piece)
            if len(piece) == left:
                self._end_chunk()

    def _end_chunk(self) -> None:
        self._chunks += self._chunk.digest()
        self._chunk = blake3()


@contextmanager
def opened(given: Given, buffer_size: int) -> Iterator[Source]:
    """What was given, as a source. A stream is taken from where it stands, and left open. Raises UsageError for
    anything else, OSError for a file that cannot be read, Full when there is no room for a stream of unknown length."""
    if buffer_size < 1:
        raise UsageError(f"buffer_size = {buffer_size}: give a number of bytes, at least 1")
    if isinstance(given, bytes | bytearray | memoryview):
        with io.BytesIO(given) as stream:
            yield Source(stream, 0, stream.getbuffer().nbytes, buffer_size)
    elif isinstance(given, os.PathLike):
        with Path(given).open("rb") as stream:
            yield Source(stream, 0, os.fstat(stream.fileno()).st_size, buffer_size)
    elif hasattr(given, "read"):
        with _of_stream(given, buffer_size) as source:
            yield source
    else:
        raise UsageError(f"{type(given).__name__} cannot be put: give bytes, a pathlib.Path or an open binary file")


@contextmanager
def _of_stream(stream: Any, buffer_size: int) -> Iterator[Source]:
    if _seekable(stream):
        start = stream.tell()
        end = stream.seek(0, os.SEEK_END)
        stream.seek(start)
        yield Source(stream, start, max(0, end - start), buffer_size)
        return
    with tempfile.TemporaryFile() as spool:
        size = _spool(stream, spool, buffer_size)
        yield Source(spool, 0, size, buffer_size)


def _seekable(stream: Any) -> bool:
    """Also whether it gives bytes: a stream of text is refused before anything is read from it."""
    if isinstance(stream, io.TextIOBase):
        raise UsageError("a stream of text cannot be put: open the file in binary mode")
    seekable = getattr(stream, "seekable", None)
    return bool(seekable is not None and seekable())


def _spool(stream: Any, spool: IO[bytes], buffer_size: int) -> int:
    size = 0
    while piece := stream.read(buffer_size):
        if not isinstance(piece, bytes | bytearray | memoryview):
            raise UsageError(f"the stream gives {type(piece).__name__}, not bytes: open it in binary mode")
        try:
            spool.write(piece)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise Full(f"{tempfile.gettempdir()} has no room for a stream of unknown length; set TMPDIR") from error
            raise
        size += len(piece)
    return size
