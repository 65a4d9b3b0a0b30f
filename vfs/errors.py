"""The exception tree of runfs. Everyone raises from here; the daemon and the command line map it in one place.

    RunfsError                    errno EIO, exit 1
    ├── UsageError                EINVAL, exit 2: asked for something that cannot be
    │   ├── ConfigError           the configuration, a flag or a store URL; names the key
    │   ├── MountpointError       the mountpoint is busy, not empty, stale or missing
    │   └── IndexUnavailable      the index as a whole cannot be used
    │       ├── IndexMissing
    │       ├── IndexVersion
    │       ├── IndexLocked
    │       └── IndexCorrupt
    ├── UnknownRecord             ENOENT: no such uuid in the index
    ├── DamagedRecord             EIO: a record directory that does not hold what format v1 says
    ├── ManifestError             EIO: a manifest that does not parse or contradicts itself
    ├── WrongBytes                EIO: bytes that do not have the digest they should
    ├── NoReplica                 EIO: no store could give the bytes
    ├── Refused                   EBUSY: it would break a promise; says what to do instead
    ├── Full                      ENOSPC: this disk
    ├── JournalError              EIO: runfs's own state cannot be read or written
    │   └── JournalLocked         exit 2: another daemon holds it
    └── StoreError                EIO: a store said no
        ├── NotFound              ENOENT: no such key
        ├── Conflict              EEXIST: a condition (absent, same version) did not hold
        ├── Denied                EACCES: credentials are missing, wrong or not enough
        ├── StoreFull             ENOSPC: the store takes no more
        ├── StoreTimeout          ETIMEDOUT: the deadline passed, or less than the least throughput arrived
        └── Unreachable           EHOSTUNREACH: no connection

Each message is a sentence a user can act on, without credentials in it.
"""

import errno
import os


def in_words(error: BaseException) -> str:
    """An error as people read it: what the system says comes without Python's `[Errno n]`."""
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    where = f": {os.fsdecode(error.filename)}" if isinstance(error.filename, str | bytes) else ""
    return error.strerror + where


class RunfsError(Exception):
    """Any failure that runfs explains. `errno` is what the mount answers, `exit_code` what a command ends with."""

    errno: int = errno.EIO
    exit_code: int = 1


class UsageError(RunfsError):
    errno = errno.EINVAL
    exit_code = 2


class ConfigError(UsageError):
    """A configuration value, flag or store URL is wrong; the message names the key and the fix."""


class MountpointError(UsageError):
    """The mountpoint cannot be used as it is."""


class IndexUnavailable(UsageError):
    """The index as a whole cannot be used."""

    errno = errno.EIO


class IndexMissing(IndexUnavailable):
    errno = errno.ENOENT


class IndexVersion(IndexUnavailable):
    """The index has a schema version this runfs does not know."""


class IndexLocked(IndexUnavailable):
    errno = errno.EBUSY


class IndexCorrupt(IndexUnavailable):
    """SQLite says the index is not a database or is malformed."""


class UnknownRecord(RunfsError):
    errno = errno.ENOENT


class DamagedRecord(RunfsError):
    """A record directory does not hold what format v1 says."""


class ManifestError(RunfsError):
    """A manifest does not parse, or contradicts itself."""


class WrongBytes(RunfsError):
    """Bytes do not have the digest they should have; they were not shown to anyone."""


class NoReplica(RunfsError):
    """No store could give the bytes in time."""


class Refused(RunfsError):
    """Doing it would break a promise. The message says why, and what to do instead."""

    errno = errno.EBUSY


class Full(RunfsError):
    errno = errno.ENOSPC


class JournalError(RunfsError):
    """runfs's own state cannot be read or written."""


class JournalLocked(JournalError):
    """Another process holds the state directory; the message names it."""

    errno = errno.EBUSY
    exit_code = 2


class StoreError(RunfsError):
    """A store refused or failed. `temporary` says whether trying again later can help."""

    temporary: bool = False


class NotFound(StoreError):
    errno = errno.ENOENT


class Conflict(StoreError):
    """A write's condition (absent, same version) did not hold."""

    errno = errno.EEXIST


class Denied(StoreError):
    errno = errno.EACCES


class StoreFull(StoreError):
    errno = errno.ENOSPC
    temporary = True


class StoreTimeout(StoreError):
    errno = errno.ETIMEDOUT
    temporary = True


class Unreachable(StoreError):
    errno = errno.EHOSTUNREACH
    temporary = True
