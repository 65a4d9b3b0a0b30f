"""What the steps of an SFTP store are made of: several requests at a time, and what the server's attributes mean.

Used by `files.py`, `names.py` and `store.py`. Coroutines for the one asyncio thread.
"""

import asyncio
import contextlib
import stat as modes
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import asyncssh

from vfs.stores.protocol import Stat

T = TypeVar("T")

IN_FLIGHT = 16  # requests of one transfer at a time; more were not faster


def is_file(attributes: asyncssh.SFTPAttrs) -> bool:
    """Whether it is a regular file."""
    if attributes.permissions is not None and modes.S_IFMT(attributes.permissions):
        return modes.S_ISREG(attributes.permissions)
    return attributes.type == asyncssh.FILEXFER_TYPE_REGULAR


def is_directory(attributes: asyncssh.SFTPAttrs) -> bool:
    """Whether it is a directory; a link to one is none."""
    if attributes.permissions is not None and modes.S_IFMT(attributes.permissions):
        return modes.S_ISDIR(attributes.permissions)
    return attributes.type == asyncssh.FILEXFER_TYPE_DIRECTORY


def described(key: str, attributes: asyncssh.SFTPAttrs) -> Stat:
    """An object as the server's attributes tell it."""
    return stat_of(key, attributes.size or 0, attributes.mtime or 0)


def stat_of(key: str, size: int, mtime: int) -> Stat:
    return Stat(key, size, f"{mtime:x}-{size:x}", mtime * 10**9, None)


async def all_of(*work: Awaitable[T]) -> list[T]:
    """The results of all; the first failure ends the others."""
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


async def in_flight(step: Callable[[int], Awaitable[None]], offsets: range) -> None:
    """All steps, in order, `IN_FLIGHT` at a time."""
    todo = iter(offsets)

    async def some() -> None:
        for offset in todo:
            await step(offset)

    await all_of(*(some() for _ in range(min(IN_FLIGHT, len(offsets)))))


_pending: set["asyncio.Task[None]"] = set()


def later(work: Any) -> None:
    """Let it happen without waiting: closing and clearing up. Failures are nobody's business."""

    async def quietly() -> None:
        with contextlib.suppress(asyncssh.Error, OSError, ValueError, TimeoutError):
            async with asyncio.timeout(60):
                await work

    task = asyncio.ensure_future(quietly())
    _pending.add(task)
    task.add_done_callback(_pending.discard)
