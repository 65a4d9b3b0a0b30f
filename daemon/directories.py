"""The XDG places of runfs and the variables that override them. Light: the command line loads it before anything else.

RUNFS_STATE_DIR, RUNFS_CACHE_DIR, RUNFS_RUNTIME_DIR and RUNFS_CONFIG win over the platform's places. Nothing here
blocks. Directories are made by `vfs.private`.

The place of the control sockets depends on XDG_RUNTIME_DIR, which is there in a login's shell and not in a cron job,
and on a configuration file; a command may see another one than the daemon did. So a daemon also leaves word in its
state directory, and who looks for one looks there and in all places that could be meant (`meeting_places`).
"""

import os
from collections.abc import Mapping
from pathlib import Path


def environment_directories(environ: Mapping[str, str]) -> dict[str, Path]:
    """state_dir, cache_dir and runtime_dir, absolute."""
    return {key: _place(environ, f"RUNFS_{key.upper()}", key) for key in ("state_dir", "cache_dir", "runtime_dir")}


def runtime_dir(environ: Mapping[str, str]) -> Path:
    """Where the control sockets of this user's mounts are."""
    return _place(environ, "RUNFS_RUNTIME_DIR", "runtime_dir")


def meeting_places(environ: Mapping[str, str]) -> tuple[Path, ...]:
    """Every directory where a daemon of this user may have its socket, the one that `runtime_dir` gives first. None but
    that one where RUNFS_RUNTIME_DIR names it."""
    first = runtime_dir(environ)
    if environ.get("RUNFS_RUNTIME_DIR"):
        return (first,)
    uid = os.geteuid()
    given = [Path(environ["XDG_RUNTIME_DIR"]) / "runfs"] if environ.get("XDG_RUNTIME_DIR") else []
    usual = [Path("/run/runfs")] if uid == 0 else []
    usual += [Path(f"/run/user/{uid}/runfs"), Path(f"/tmp/runfs-{uid}")]
    return tuple(dict.fromkeys([first, *given, *usual]))


def state_dir(environ: Mapping[str, str]) -> Path:
    """Where this user's journals are, one directory an index."""
    return _place(environ, "RUNFS_STATE_DIR", "state_dir")


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
