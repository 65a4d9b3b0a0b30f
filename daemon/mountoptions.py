"""`-o` options of `runfs mount`, as mount(8), fstab and people write them. Pure functions.

Used by the command line. An option is one of runfs's own (`store=URL`, `index=FILE`, any setting as `cache.high=80%`),
one that mount(8) keeps for itself (ignored), or one of the kernel's and FUSE's (handed on). A comma inside a value is
written `\\,`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from daemon.configfile import NOT_IN_FILE, known_keys
from vfs.errors import UsageError

# For mount(8), systemd-fstab-generator and the boot process: they mean nothing to a file system.
_IGNORED = (
    *("rw", "defaults", "auto", "noauto", "fail", "nofail", "_netdev"),
    *("user", "nouser", "users", "owner", "group"),
)
_IGNORED_PREFIXES = ("x-", "X-", "comment=", "uhelper=", "helper=")
# libfuse and the kernel take these (mount.fuse3(8), mount(8)).
_FUSE = (
    *("nosuid", "suid", "nodev", "dev", "noexec", "exec", "noatime", "atime", "nodiratime", "diratime", "relatime"),
    *("sync", "async", "dirsync", "default_permissions", "auto_unmount", "allow_root", "nosymfollow"),
)
_FUSE_VALUED = ("max_read", "blksize", "context", "fscontext", "defcontext", "rootcontext")
_OWN_FLAGS = {"ro": "read_only", "read_only": "read_only", "allow_other": "allow_other", "xattr": "xattr"}
_OWN_NAMES = ("store", "index", "project", "config", "foreground")


@dataclass(slots=True)
class MountOptions:
    """What `-o` asks for. `settings`: dotted key -> value."""

    settings: dict[str, Any] = field(default_factory=dict)
    stores: list[str] = field(default_factory=list)
    config: str | None = None
    foreground: bool = False
    fuse: list[str] = field(default_factory=list)


def parse_options(given: Sequence[str]) -> MountOptions:
    """Every `-o` of a command line, in order. Raises UsageError naming the option and the nearest one known."""
    parsed = MountOptions()
    for text in given:
        for option in re.split(r"(?<!\\),", text):
            if option.strip():
                _take(option.strip().replace("\\,", ","), parsed)
    return parsed


def _take(option: str, parsed: MountOptions) -> None:
    name, has_value, value = option.partition("=")
    if option in _IGNORED or option.startswith(_IGNORED_PREFIXES):
        return
    if option in _FUSE or (has_value and name in _FUSE_VALUED):
        parsed.fuse.append(option)
    elif not has_value and option in _OWN_FLAGS:
        parsed.settings[_OWN_FLAGS[option]] = True
    elif option == "foreground":
        parsed.foreground = True
    elif name in _known_names() and name != "foreground":
        if not value:
            raise UsageError(f"-o {name} needs a value: -o {name}=VALUE")
        _set(name, value, parsed)
    else:
        raise UsageError(_unknown(name))


def _set(name: str, value: str, parsed: MountOptions) -> None:
    if name == "store":
        parsed.stores.append(value)
    elif name == "config":
        parsed.config = value
    else:
        parsed.settings[name] = value


def _known_names() -> tuple[str, ...]:
    settings = (key for key in known_keys() if key not in (*NOT_IN_FILE, "stores"))
    return (*_OWN_NAMES, *settings)


def _unknown(name: str) -> str:
    near = get_close_matches(name, (*_known_names(), *_OWN_FLAGS, *_FUSE, *_FUSE_VALUED), n=1)
    hint = f"did you mean {near[0]!r}?" if near else "see runfs mount --help"
    return f"-o: unknown option {name!r}; {hint}"
