"""Directories and files that are this user's alone: state, cache, and where the control socket is.

Used by the session and the daemon at their start. Who can write into one of these has power over records, and who can
read them sees what records hold; so what is not as it was made is refused, never quietly mended: somebody may have been
there. Local disk only.
"""

import os
import stat
from pathlib import Path

from vfs.errors import ConfigError

_OTHERS = 0o077
_STICKY = stat.S_ISVTX


def private_directory(path: Path, setting: str) -> Path:
    """Make `path` (0700), or check that it is a directory of this user's that nobody else may enter, in one where
    nobody else may exchange it. `setting` names what moves it elsewhere.

    Raises ConfigError, saying how to mend it.
    """
    try:
        for missing in reversed([each for each in (path, *path.parents) if not os.path.lexists(each)]):
            missing.mkdir(mode=0o700, exist_ok=True)
        found, above = path.lstat(), path.parent.stat()
    except OSError as error:
        raise ConfigError(f"{path}: the directory cannot be made: {error.strerror}; set {setting}") from error
    mine = os.geteuid()
    if not stat.S_ISDIR(found.st_mode):
        raise ConfigError(f"{path}: is not a directory (a link is not followed here); set {setting} to one that is")
    if found.st_uid != mine:
        raise ConfigError(
            f"{path}: belongs to uid {found.st_uid}, and this is uid {mine}; run as that user, or give it back with: "
            f"chown -R {mine} {path}, or set {setting}"
        )
    if found.st_mode & _OTHERS:
        raise ConfigError(
            f"{path}: is open to others (mode {stat.S_IMODE(found.st_mode):04o}); look whether something in it is not "
            f"yours, then run: chmod 700 {path}"
        )
    if above.st_uid not in (mine, 0) or (above.st_mode & stat.S_IWOTH and not above.st_mode & _STICKY):
        raise ConfigError(
            f"{path.parent}: others can exchange what is in it (uid {above.st_uid}, mode "
            f"{stat.S_IMODE(above.st_mode):04o}); run: chmod o-w {path.parent}, or set {setting}"
        )
    return path


def private_files(directory: Path) -> None:
    """Check that the files right in a private directory are this user's (a daemon started with sudo leaves its own),
    and close them to others: nobody else could have reached them. Raises ConfigError, OSError."""
    with os.scandir(directory) as entries:
        for entry in entries:
            _check_file(Path(entry.path), entry.stat(follow_symlinks=False))


def _check_file(path: Path, status: os.stat_result) -> None:
    if status.st_uid != os.geteuid():
        raise ConfigError(
            f"{path}: belongs to uid {status.st_uid}, as after a start with sudo; run as that user, or give it back "
            f"with: chown -R {os.geteuid()} {path.parent}"
        )
    if stat.S_ISREG(status.st_mode) and status.st_mode & _OTHERS:
        path.chmod(0o600)


def private_opener(path: str, flags: int) -> int:
    """For `open(..., opener=private_opener)`: what it makes is 0600, and a link in the last place is not followed."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
