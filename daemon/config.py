"""Configuration: flags, environment and a TOML file become one `vfs.settings.Settings`.

Used by the command line and nothing else. Reads the configuration file and looks for the index; never a network.
Precedence: flags, environment, file, what the last mount used (its file and stores), defaults.

    index = "/data/study/.machinable.sqlite"     # or: project = "/data/study"
    min_copies = 1
    on_close = "journal"
    [cache]
    keep_small = "64KiB"
    high = "90%"
    [stores.lab]
    url = "s3://lab/study?endpoint=https://s3.lab.example"
    [stores.lab.options]
    secret_access_key = "..."

In the environment a key is RUNFS_ and its name in capitals, a dot written as two underscores: RUNFS_CACHE__HIGH=80%.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from daemon.configfile import NOT_IN_FILE, PATHS, absolute, known_keys, read_file, readable_secret, unknown_key
from daemon.directories import config_file, environment_directories
from daemon.storeurls import named_stores
from vfs import places
from vfs.errors import ConfigError, IndexMissing
from vfs.private import private_directory, private_opener
from vfs.settings import Settings, is_secret

# Variables that are about a command, not a setting.
_OWN_VARIABLES = (
    *("RUNFS_CONFIG", "RUNFS_MOUNT", "RUNFS_DEBUG", "RUNFS_STORE", "RUNFS_COMMAND"),
    *("RUNFS_SFTP_PASSWORD", "RUNFS_SFTP_PASSPHRASE"),
)


@dataclass(frozen=True, slots=True)
class Loaded:
    """The merged configuration before it is checked: dotted key -> value, and where each came from."""

    values: dict[str, Any]
    origins: dict[str, str]
    file: Path
    file_found: bool
    warnings: tuple[str, ...] = ()

    def settings(self) -> Settings:
        """Checked settings. Raises ConfigError naming the key, where it was set and the fix; IndexMissing."""
        if "index" not in self.values:
            raise IndexMissing(no_index_message())
        try:
            return Settings.model_validate(_nested(self.values))
        except ValidationError as error:
            raise ConfigError(self._explain(error)) from None  # pydantic's text may quote a secret

    def _explain(self, error: ValidationError) -> str:
        first = error.errors(include_url=False)[0]
        key, shown = self._place(first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        origin = next((self.origins[k] for k in (key, key.split(".")[0]) if k in self.origins), None)
        if first["type"] == "extra_forbidden":
            return f"{origin or self.file}: {unknown_key(shown)}"
        where = f" (from {origin})" if origin else ""
        given = first["input"]
        # A URL or an option may hold the very secret it is refused for.
        private = is_secret(shown) or shown.endswith(".url") or ".options." in shown
        quoted = f"{given!r}: " if isinstance(given, (str, int, float)) and not private else ""
        unsaid = quoted if str(given) not in message else ""
        return f"{shown}{where}: {unsaid}{message}" if shown else message

    def _place(self, location: tuple[int | str, ...]) -> tuple[str, str]:
        """The dotted key of a pydantic location, and the same with a store's name instead of its number."""
        parts = [str(part) for part in location]
        if len(parts) > 1 and parts[0] == "stores" and parts[1].isdigit():
            name = self.values["stores"][int(parts[1])].get("name", parts[1])
            return "stores", ".".join(["stores", name, *parts[2:]])
        return ".".join(parts), ".".join(parts)


@dataclass(slots=True)
class _Layers:
    """Collects settings from the weakest source to the strongest; the last one set wins."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def put(self, key: str, value: Any, origin: str) -> None:
        self.values[key] = value
        self.origins[key] = origin


def load(
    flags: Mapping[str, Any] | None = None,
    *,
    config: Path | None = None,
    environ: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    remembered: bool = False,
) -> Loaded:
    """Read and merge every source.

    `flags`: dotted key -> value, leaving out what was not given; `stores` is a list of URLs or names of stores in
    the file. `config`: the file named by --config. `remembered`: fall back to the last mount's file and stores.
    Raises ConfigError when a file cannot be read or has an unknown key. Nothing else is checked yet.
    """
    flags, environ, cwd = flags or {}, os.environ if environ is None else environ, cwd or Path.cwd()
    layers = _Layers()
    for key, place in environment_directories(environ).items():
        layers.put(key, place, "default")
    found = find_index(flags, environ, cwd)
    last = _last_mount(flags, environ, layers, found, cwd) if remembered else {}
    file, named = _config_path(config, environ, last)
    file_found = _put_file(layers, file, required=named)
    configured: list[dict[str, Any]] = layers.values.get("stores", [])
    _put_environment(layers, environ, cwd)
    for key, value in flags.items():
        layers.put(key, value, "--" + key.replace("_", "-"))
    _put_index(layers, found, flags, environ, cwd)
    _put_stores(layers, flags, environ, configured, last)
    return Loaded(layers.values, layers.origins, file, file_found, tuple(layers.warnings))


def _put_file(layers: _Layers, file: Path, *, required: bool) -> bool:
    rows = read_file(file, required=required)
    for key, value in rows or ():
        layers.put(key, value, str(file))
    warning = readable_secret(file, layers.values.get("stores", ())) if rows else None
    layers.warnings += [warning] if warning else []
    return rows is not None


def _config_path(config: Path | None, environ: Mapping[str, str], last: Mapping[str, Any]) -> tuple[Path, bool]:
    """The file to read and whether somebody named it (so that it must exist)."""
    if config is not None:
        return config.expanduser(), True
    if environ.get("RUNFS_CONFIG"):
        return Path(environ["RUNFS_CONFIG"]).expanduser(), True
    if last.get("config") and Path(last["config"]).is_file():
        return Path(last["config"]), False
    return config_file(environ), False


# -- the environment -----------------------------------------------------------------------------------------------


def _put_environment(layers: _Layers, environ: Mapping[str, str], cwd: Path) -> None:
    variables = {variable_of(key): key for key in known_keys() if key not in (*NOT_IN_FILE, "stores")}
    for name in sorted(environ):
        key = variables.get(name)
        if not environ[name]:
            continue
        if key is not None:
            layers.put(key, absolute(environ[name], cwd) if key in PATHS else environ[name], name)
        elif name.startswith("RUNFS_") and name not in _OWN_VARIABLES:
            near = get_close_matches(name, (*variables, *_OWN_VARIABLES), n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            layers.warnings.append(f"{name} is set in the environment but means nothing to runfs{hint}")


def variable_of(key: str) -> str:
    """The environment variable of a dotted key: `cache.high` -> RUNFS_CACHE__HIGH."""
    return "RUNFS_" + key.upper().replace(".", "__")


# -- the index -----------------------------------------------------------------------------------------------------


def find_index(flags: Mapping[str, Any], environ: Mapping[str, str], cwd: Path) -> tuple[Path, str] | None:
    """The index named by a flag or the environment, and which one named it; None when neither did.

    A project's own index file comes before MACHINABLE_INDEX when the project was named by a flag.
    """
    given = environ.get("MACHINABLE_INDEX", "")
    machinable = (index_path(given, cwd), "MACHINABLE_INDEX") if given else None
    if flags.get("index"):
        return index_path(str(flags["index"]), cwd), "--index"
    if flags.get("project"):
        own = cwd / Path(flags["project"]).expanduser() / places.INDEX_NAME
        return machinable if machinable and not own.exists() else (own, "--project")
    if environ.get("RUNFS_INDEX"):
        return index_path(environ["RUNFS_INDEX"], cwd), "RUNFS_INDEX"
    return machinable


def index_path(text: str, cwd: Path) -> Path:
    """An absolute path from what machinable takes: a path, `~`, or `sqlite:///path`."""
    return cwd / Path(text.removeprefix("sqlite:///")).expanduser()


def _put_index(
    layers: _Layers, found: tuple[Path, str] | None, flags: Mapping[str, Any], environ: Mapping[str, str], cwd: Path
) -> None:
    if flags.get("project"):
        layers.put("project", cwd / Path(flags["project"]).expanduser(), "--project")
    if found is not None:
        layers.put("index", *found)
    elif "index" not in layers.values and "project" in layers.values:
        layers.put("index", Path(layers.values["project"]) / places.INDEX_NAME, layers.origins["project"])
    elif "index" not in layers.values:
        above = places.find_index(cwd)
        if above is not None:
            layers.put("index", above, "found from the current directory")
        elif flags.get("create_index"):
            layers.put("index", cwd / places.INDEX_NAME, "the current directory")


def no_index_message() -> str:
    return (
        f"no index here: there is no {places.INDEX_NAME} in this directory or above it. "
        "Name it with --project DIR or --index FILE, or set MACHINABLE_INDEX"
    )


# -- stores --------------------------------------------------------------------------------------------------------


def _put_stores(
    layers: _Layers,
    flags: Mapping[str, Any],
    environ: Mapping[str, str],
    configured: list[dict[str, Any]],
    last: Mapping[str, Any],
) -> None:
    """--store replaces RUNFS_STORE (several, separated by spaces), which replaces the file's stores."""
    if flags.get("stores"):
        layers.put("stores", named_stores(flags["stores"], configured), "--store")
    elif environ.get("RUNFS_STORE"):
        layers.put("stores", named_stores(environ["RUNFS_STORE"].split(), configured), "RUNFS_STORE")
    elif configured:
        layers.values["stores"] = configured
    elif last.get("stores"):
        layers.put("stores", last["stores"], "the last mount")
    else:
        layers.values.pop("stores", None)


def remember(settings: Settings, config: Path | None) -> None:
    """Keep which configuration and stores a mount used, for the next one and for commands in between. Never a secret:
    a store with secret options is left out (its file is named instead)."""
    if not settings.stores:
        return  # what was remembered may be all there is to find evicted bytes by
    stores = [s.model_dump(mode="json") for s in settings.stores if not any(is_secret(name) for name in s.options)]
    target = places.stores_of(settings.state_dir, settings.index)
    private_directory(target.parent, "RUNFS_STATE_DIR")
    partial = target.with_suffix(".new")
    with open(partial, "w", opener=private_opener) as file:
        file.write(json.dumps({"config": str(config.absolute()) if config else None, "stores": stores}))
    partial.replace(target)


def _last_mount(
    flags: Mapping[str, Any],
    environ: Mapping[str, str],
    layers: _Layers,
    found: tuple[Path, str] | None,
    cwd: Path,
) -> dict[str, Any]:
    index = found[0] if found else places.find_index(cwd)
    if index is None:
        return {}
    state_dir = Path(flags.get("state_dir") or environ.get("RUNFS_STATE_DIR") or layers.values["state_dir"])
    try:
        last = json.loads(places.stores_of(state_dir, index).read_text())
    except (OSError, ValueError):
        return {}  # only a convenience: without it the stores have to be named again
    return last if isinstance(last, dict) else {}


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in values.items():
        *parents, name = key.split(".")
        table = nested
        for parent in parents:
            table = table.setdefault(parent, {})
        table[name] = value
    return nested


# -- showing -------------------------------------------------------------------------------------------------------


def shown(loaded: Loaded) -> dict[str, Any]:
    """For `runfs config show`: every key with its value and origin, secrets replaced by a word."""
    has_index = "index" in loaded.values
    settings = without_index(loaded).settings()
    dump = settings.shown()
    rows = {}
    for key in known_keys():
        if key in NOT_IN_FILE:
            continue
        value: Any = dump
        for part in key.split("."):
            value = value[part]
        rows[key] = {
            "value": None if key == "index" and not has_index else value,
            "origin": loaded.origins.get(key, "default"),
        }
    return {
        "file": str(loaded.file),
        "file_found": loaded.file_found,
        "settings": rows,
        "warnings": list(loaded.warnings),
    }


def without_index(loaded: Loaded) -> Loaded:
    """For commands that need no index: where none was found, one that is nowhere stands for it."""
    if "index" in loaded.values:
        return loaded
    return Loaded(
        {**loaded.values, "index": Path(os.devnull)}, loaded.origins, loaded.file, loaded.file_found, loaded.warnings
    )


def as_toml(shown: Mapping[str, Any]) -> list[str]:
    """What `shown` gave, as a configuration file with the origins in comments."""
    out = [f"# {shown['file']}{'' if shown['file_found'] else ' (there is none)'}"]
    rows = dict(shown["settings"])
    stores = rows.pop("stores")
    plain = [key for key in rows if "." not in key]
    tables = list(dict.fromkeys(key.split(".")[0] for key in rows if "." in key))
    out += [_toml_row(key, rows[key]) for key in plain]
    for table in tables:
        out += ["", f"[{table}]"]
        out += [_toml_row(key.split(".", 1)[1], rows[key]) for key in rows if key.startswith(table + ".")]
    for store in stores["value"]:
        out += ["", f"[stores.{store['name']}]  # {stores['origin']}"]
        out += [
            f"{key} = {_toml(value)}"
            for key, value in store.items()
            if key not in ("name", "options") and value is not None
        ]
        if store["options"]:
            out += [f"[stores.{store['name']}.options]", *(f"{k} = {_toml(v)}" for k, v in store["options"].items())]
    return out + [f"# warning: {text}" for text in shown["warnings"]]


def _toml_row(key: str, row: Mapping[str, Any]) -> str:
    if row["value"] is None:
        return f"# {key} is not set"
    return f"{key} = {_toml(row['value'])}  # {row['origin']}"


def _toml(value: Any) -> str:
    return json.dumps(value)  # JSON's strings, numbers, booleans and lists of them are TOML's too


def checked(loaded: Loaded) -> dict[str, Any]:
    """For `runfs config check`: checks in the form of `runfs doctor`. Raises ConfigError for what cannot be read."""
    from vfs.stores import validate

    checks: list[dict[str, Any]] = []

    def add(name: str, ok: bool | None, message: str, advice: str | None = None) -> None:
        checks.append({"name": name, "ok": ok, "message": message, "advice": advice})

    add("file", True, f"{loaded.file}{'' if loaded.file_found else ' (there is none: defaults are used)'}")
    has_index = "index" in loaded.values
    settings = without_index(loaded).settings()
    add("settings", True, "every key is known and every value fits")
    if not has_index:
        add("index", None, "no index is named or found here", "Set index or project, or run it in a project")
    else:
        exists = settings.index.is_file()
        add("index", exists or None, f"{settings.index}{'' if exists else ' is not there'}", "runfs reindex makes it")
    if not settings.stores:
        add("stores", None, "no store is configured", "Nothing can be pushed or evicted without one")
    for store in settings.stores:
        try:
            warnings = validate(store.url, store.name, store.options)
            add(f"store {store.name}", None if warnings else True, "; ".join(warnings) or store.url)
        except ConfigError as error:
            add(f"store {store.name}", False, str(error))
    for warning in loaded.warnings:
        add("warning", None, warning)
    return {"checks": checks, "exit": 2 if any(check["ok"] is False for check in checks) else 0}
