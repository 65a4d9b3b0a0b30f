"""Installing the systemd units and the fstab helper, with the path of this runfs in them.

Used by `runfs systemd install`. The files are those of the `systemd` directory, which is installed with the package.
Writes local files only; starts nothing.
"""

import os
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from vfs.errors import UsageError

SYSTEM_UNITS = Path("/etc/systemd/system")
HELPER = Path("/sbin/mount.runfs")
_COMMAND = re.compile(r"^(Exec\w+=[-+!:@]*)\S*/runfs(?= )", re.MULTILINE)


def install(*, user: bool, mountpoint: Path | None, dry_run: bool, root: Path = Path("/")) -> dict[str, Any]:
    """Write the files below `root` (or only say which). Gives `files` (path, content, mode) and `next` steps."""
    command = runfs_command()
    unit = "runfs-user@.service" if user else "runfs@.service"
    target = _user_units() if user else root / SYSTEM_UNITS.relative_to("/")
    files = [_entry(target / unit, _with_command(source_of(unit), command), 0o644)]
    if not user:
        helper = source_of("mount.runfs").replace("\nprogram=runfs\n", f"\nprogram={shlex.quote(command[0])}\n")
        files.append(_entry(root / HELPER.relative_to("/"), helper, 0o755))
    if not dry_run:
        for entry in files:
            _write(Path(entry["path"]), entry["content"], int(entry["mode"], 8))
    return {"files": files, "next": _next_steps(unit, mountpoint, user=user), "dry_run": dry_run, "exit": 0}


def source_of(name: str) -> str:
    """The text of a file as it is in the package or in a checkout. Raises UsageError when it is in neither."""
    package = Path(__file__).resolve().parent
    places = (package / "systemd", package.parent / "systemd", Path(sys.prefix) / "share" / "runfs" / "systemd")
    for place in places:
        if (place / name).is_file():
            return (place / name).read_text(encoding="utf-8")
    raise UsageError(f"{name} is not in this installation ({', '.join(map(str, places))}); install runfs again")


def runfs_command() -> list[str]:
    """How this runfs is called: its script beside the interpreter, else what is on the PATH, else the module."""
    script = Path(sys.executable).parent / "runfs"
    if os.access(script, os.X_OK):
        return [str(script)]
    found = shutil.which("runfs")
    return [os.path.abspath(found)] if found else [sys.executable, "-m", "daemon.cli"]


def _with_command(unit: str, command: list[str]) -> str:
    # In a unit a percent sign begins a specifier (systemd.unit(5)).
    text = " ".join(f'"{part}"' if " " in part else part for part in command).replace("%", "%%")
    return _COMMAND.sub(lambda match: match[1] + text, unit)


def _user_units() -> Path:
    configured = os.environ.get("XDG_CONFIG_HOME")
    return (Path(configured) if configured else Path.home() / ".config") / "systemd" / "user"


def _entry(path: Path, content: str, mode: int) -> dict[str, Any]:
    return {"path": str(path), "content": content, "mode": f"{mode:o}"}


def _write(path: Path, content: str, mode: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.new")
    partial.write_text(content, encoding="utf-8")
    partial.chmod(mode)
    partial.replace(path)


def _next_steps(unit: str, mountpoint: Path | None, *, user: bool) -> list[str]:
    name = escaped(mountpoint) if mountpoint is not None else "NAME"
    instance = unit.replace("@", f"@{name}")
    call = "systemctl --user" if user else "systemctl"
    file = f"~/.config/runfs/{name}.toml" if user else f"/etc/runfs/{name}.toml"
    naming = [] if mountpoint is not None else ["NAME is what systemd-escape -p MOUNTPOINT prints"]
    return [
        *naming,
        f"write {file} (project = ..., [stores.NAME] url = ...; check it with runfs config check --config {file})",
        f"{call} daemon-reload",
        f"{call} enable --now {shlex.quote(instance)}",
    ]


def escaped(path: Path) -> str:
    """The instance name of a path, as `systemd-escape -p` gives it (systemd.unit(5), "String Escaping")."""
    parts = [part for part in os.path.abspath(path).split("/") if part]
    if not parts:
        return "-"
    return "-".join(_escaped_part(part, first=number == 0) for number, part in enumerate(parts))


def _escaped_part(part: str, *, first: bool) -> str:
    return "".join(
        chr(byte) if re.match(rb"[A-Za-z0-9:_.]", bytes([byte])) and not (first and position == 0 and byte == 0x2E)
        else f"\\x{byte:02x}"
        for position, byte in enumerate(os.fsencode(part))
    )  # fmt: skip
