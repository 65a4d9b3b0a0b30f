"""Where runfs keeps what belongs to an index or a mount: path rules only, no environment and no disk except realpath.

Used by the settings, the daemon (to make these places) and the command line (to find a running daemon without
loading anything heavy). `short_id` and the file names are a contract between daemon and command line.

    <state_dir>/<id of the index>/            the journal, the daemon's log, the remembered stores, mount.json
    <cache_dir>/<id of the index>/            runfs's own local bytes
    <runtime_dir>/<id of the mountpoint>.sock the control socket of a running mount
    <runtime_dir>/<id of the mountpoint>.json who serves it: pid, mountpoint, index, started_at
"""

import os
from pathlib import Path

from blake3 import blake3

INDEX_NAME = ".machinable.sqlite"


def short_id(path: str | os.PathLike[str]) -> str:
    """16 hex digits (64 bits) of the blake3 of a path's bytes: short, since a socket's path has 107 bytes at most."""
    return blake3(os.fsencode(path)).hexdigest(length=8)


def index_id(index: str | os.PathLike[str]) -> str:
    """The id of an index: of its real path, so that links to it mean the same state."""
    return short_id(os.path.realpath(index))


def state_of(state_dir: Path, index: str | os.PathLike[str]) -> Path:
    """The directory that holds the journal and log of one index."""
    return state_dir / index_id(index)


def cache_of(cache_dir: Path, index: str | os.PathLike[str]) -> Path:
    """The directory that holds runfs's own local bytes of one index."""
    return cache_dir / index_id(index)


def socket_of(runtime_dir: Path, mountpoint: str | os.PathLike[str]) -> Path:
    """The control socket of a mount. `mountpoint` must be real already (see daemon.mounts.real_mountpoint):
    resolving it here could wait for the very daemon that is asked for."""
    return runtime_dir / f"{short_id(mountpoint)}.sock"


def info_of(runtime_dir: Path, mountpoint: str | os.PathLike[str]) -> Path:
    """The file that says who serves a mount; same rule as `socket_of`."""
    return runtime_dir / f"{short_id(mountpoint)}.json"


def pointer_of(state: Path) -> Path:
    """In the state directory of an index: who serves it, and where his socket is. For commands that see another runtime
    directory than the daemon did."""
    return state / "mount.json"


def log_of(state_dir: Path, index: str | os.PathLike[str]) -> Path:
    """The log of a daemon that runs in the background."""
    return state_of(state_dir, index) / "daemon.log"


def stores_of(state_dir: Path, index: str | os.PathLike[str]) -> Path:
    """The store URLs the last mount used, for the next mount and commands in between. Never holds a secret."""
    return state_of(state_dir, index) / "stores.json"


def find_index(start: Path) -> Path | None:
    """The index of the project `start` is in: the first `.machinable.sqlite` in it or above it."""
    # isfile, since a directory that cannot be asked (a mount whose daemon is gone) is one to pass over.
    return next((p / INDEX_NAME for p in (start, *start.parents) if os.path.isfile(p / INDEX_NAME)), None)
