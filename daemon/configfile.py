"""The configuration file: reading TOML, and which keys there are.

Used by `daemon.config`. Reads one file; no network. Unknown keys are refused here, with the nearest known one.
"""

import stat
import tomllib
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

from vfs.errors import ConfigError
from vfs.settings import Settings, StoreSettings, is_secret

# Settings that only a command can give; in a file they would apply to every mount.
NOT_IN_FILE = ("create_index", "mountpoint", "fuse_options")
PATHS = ("index", "project", "state_dir", "cache_dir", "runtime_dir", "cache.directory")


def read_file(file: Path, *, required: bool) -> list[tuple[str, Any]] | None:
    """Dotted keys and values of a configuration file; None when there is none and none is required.

    Relative paths are taken from the file's directory; `stores` is a list of tables. Raises ConfigError.
    """
    content = _read_toml(file, required=required)
    if content is None:
        return None
    rows: list[tuple[str, Any]] = []
    for key, value in _flat(content, known_keys()):
        if key == "stores":
            rows.append((key, _stores_of_file(value, file)))
            continue
        if key not in known_keys() or key in NOT_IN_FILE:
            raise ConfigError(f"{file}: {unknown_key(key)}")
        rows.append((key, absolute(value, file.parent) if key in PATHS else value))
    return rows


def _read_toml(file: Path, *, required: bool) -> dict[str, Any] | None:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if required:
            raise ConfigError(
                f"{file}: no such configuration file; make it, or leave out --config/RUNFS_CONFIG"
            ) from None
        return None
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: is not UTF-8 text (byte {error.start})") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file}: is not valid TOML: {error}") from error


def _flat(table: Mapping[str, Any], known: Sequence[str], prefix: str = "") -> list[tuple[str, Any]]:
    """Dotted keys of nested tables; `stores` stays whole, and so does a table where a plain value belongs."""
    flat: list[tuple[str, Any]] = []
    for name, value in table.items():
        key = prefix + name
        is_part = any(k.startswith(key + ".") for k in known)
        if isinstance(value, dict) and key != "stores" and (is_part or key not in known) and value:
            flat += _flat(value, known, key + ".")
        else:
            flat.append((key, value))
    return flat


def _stores_of_file(value: Any, file: Path) -> list[dict[str, Any]]:
    """`[stores.NAME]` tables, or `[[stores]]` with a name in each."""
    if isinstance(value, dict) and all(isinstance(store, dict) for store in value.values()):
        stores = [{"name": name, **store} for name, store in value.items()]
    elif isinstance(value, list) and all(isinstance(store, dict) for store in value):
        stores = value
    else:
        raise ConfigError(f'{file}: stores: write one table for each store: [stores.lab] and url = "s3://..." in it')
    for number, store in enumerate(stores):
        name = str(store.get("name", number))
        for key in ("name", "url"):
            if key not in store:
                raise ConfigError(f"{file}: stores.{name} has no {key}")
        for key in store:
            if key not in StoreSettings.model_fields:
                near = get_close_matches(key, StoreSettings.model_fields, n=1)
                hint = (
                    f"did you mean {near[0]!r}?"
                    if near
                    else f"what is for the store itself goes under [stores.{name}.options]"
                )
                raise ConfigError(f"{file}: stores.{name}: unknown key {key!r}; {hint}")
    return stores


def readable_secret(file: Path, stores: Sequence[Mapping[str, Any]]) -> str | None:
    """A warning when the file holds a secret and others can read it."""
    secrets = [name for store in stores for name in store.get("options", {}) if is_secret(name)]
    if not secrets or not stat.S_IMODE(file.stat().st_mode) & 0o077:
        return None
    return f"{file} holds {secrets[0]} and others can read it; run: chmod 600 {file}"


def absolute(value: Any, base: Path) -> Any:
    """A path below `base`, with `~` expanded; what is no text is left for the settings to refuse."""
    return base / Path(value).expanduser() if isinstance(value, str) else value


def known_keys(model: type[BaseModel] = Settings, prefix: str = "") -> tuple[str, ...]:
    """Every dotted key of the settings, in their order; `stores` is one key."""
    keys: list[str] = []
    for name, info in model.model_fields.items():
        part = next((t for t in (info.annotation, *get_args(info.annotation)) if _is_part(t)), None)
        if part is not None and name != "stores":
            keys += known_keys(part, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return tuple(keys)


def _is_part(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def unknown_key(key: str) -> str:
    """The sentence for a key that is not known, with the nearest one that is."""
    if key in NOT_IN_FILE:
        return f"{key} cannot be set here; it is given to a command"
    known = [k for k in known_keys() if k not in NOT_IN_FILE]
    if any(k.startswith(key + ".") for k in known):
        return f"{key} is a table: write [{key}] and its settings below"
    near = get_close_matches(key, known, n=1) or [k for k in known if k.split(".")[-1] == key.split(".")[-1]]
    hint = f"did you mean {near[0]!r}?" if near else "'runfs config show' lists every key"
    return f"unknown key {key!r}; {hint}"
