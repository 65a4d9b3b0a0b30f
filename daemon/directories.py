"""The XDG places of runfs and the variables that override them. Light: the command line loads it before anything else.

RUNFS_STATE_DIR, RUNFS_CACHE_DIR, RUNFS_RUNTIME_DIR and RUNFS_CONFIG win over the platform's places. Nothing here
blocks; directories are made by `private_directory` only.
"""

import os
import stat
from collections.abc import Mapping
from pathlib import Path

from vfs.errors import ConfigError


def environment_directories(environ: Mapping[str, str]) -> dict[str, Path]:
    """state_dir, cache_dir and runtime_dir, absolute."""
    return {key: _place(environ, f"RUNFS_{key.upper()}", key) for key in ("state_dir", "cache_dir", "runtime_dir")}


def runtime_dir(environ: Mapping[str, str]) -> Path:
    """Where the control sockets of this user's mounts are."""
    return _place(environ, "RUNFS_RUNTIME_DIR", "runtime_dir")


def config_file(environ: Mapping[str, str]) -> Path:
    """The configuration file that is read when no other is named."""
    if environ.get("RUNFS_CONFIG"):
        return Path(environ["RUNFS_CONFIG"]).expanduser().absolute()
    import platformdirs

    return Path(platformdirs.user_config_dir("runfs")) / "config.toml"


def _place(environ: Mapping[str, str], variable: str, key: str) -> Path:
    if environ.get(variable):
        return Path(environ[variable]).expanduser().absolute()
    if key == "runtime_dir":
        return _run_place(environ)
    import platformdirs  # 25 ms, not needed where the variables are set

    places = {"state_dir": platformdirs.user_state_dir, "cache_dir": platformdirs.user_cache_dir}
    return Path(places[key]("runfs"))


def _run_place(environ: Mapping[str, str]) -> Path:
    """platformdirs would warn and share a directory where XDG_RUNTIME_DIR is not set (cron, ssh, system units)."""
    uid = os.geteuid()
    given = environ.get("XDG_RUNTIME_DIR")
    if given and not (uid == 0 and given == "/run/user/0"):
        return Path(given) / "runfs"
    if uid == 0:
        return Path("/run/runfs")  # one place for root's shells and the system unit, whose XDG_RUNTIME_DIR differs
    session = Path(f"/run/user/{uid}")
    return session / "runfs" if session.is_dir() else Path(f"/tmp/runfs-{uid}")


def private_directory(path: Path) -> Path:
    """Make `path` (0700) or check that it is ours and closed to others, since a socket in it gives power over records.

    Raises ConfigError, saying what to do, when it is somebody else's, a link, or cannot be made.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        raise ConfigError(f"{path}: the directory cannot be made: {error.strerror}; set RUNFS_RUNTIME_DIR") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise ConfigError(f"{path}: is not a directory of this user; set RUNFS_RUNTIME_DIR to one that is")
    if stat.S_IMODE(found.st_mode) & 0o077:
        path.chmod(0o700)
    return path
