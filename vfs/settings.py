"""Every setting of runfs with its default. Pure data: no environment, no files; `daemon.config` fills it.

Used by the session and everything below it, read only (frozen). Nothing here blocks. Sizes are bytes, times seconds;
in the configuration they may be written with units (`64KiB`, `7d`). The path rules live in `vfs.places`.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import parse_qsl, urlsplit

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from vfs import places
from vfs.errors import UsageError
from vfs.hiding import has_password
from vfs.where import parse_age, parse_size

OnClose = Literal["journal", "push"]
Scalar = str | int | float | bool

HIDDEN = "(hidden)"
_SECRET_NAME = re.compile(
    r"secret|password|passwd|passphrase|token|credential|private|signature|(^|_)(pass|sas|auth)($|_)"
    r"|(access|account|api|sse|master|customer|application|encryption)_?key|^key$",
    re.IGNORECASE,
)


def is_secret(name: str) -> bool:
    """Whether an option with this name holds something that must never be printed or put into a URL."""
    return _SECRET_NAME.search(name) is not None


def _explained(parse: Callable[[str], float], text: str) -> float:
    """What `parse` makes of `text`; pydantic adds the key's name to a ValueError only."""
    try:
        return parse(text)
    except UsageError as error:
        raise ValueError(str(error)) from error


def _size(value: object) -> object:
    return _explained(parse_size, value) if isinstance(value, str) else value


def _seconds(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        return float(value)  # the key's name says seconds, so a bare number is clear here
    except ValueError:
        return _explained(parse_age, value)


def _watermark(value: object) -> object:
    """`90%` stays as it is, a size becomes bytes, `none` switches the watermark off."""
    if not isinstance(value, str):
        return value
    if value.strip().lower() in ("none", "off"):
        return None
    if re.fullmatch(r"\s*\d{1,3}(\.\d+)?\s*%\s*", value):
        if not 0 < float(value.strip().rstrip("% ")) <= 100:
            raise ValueError(f"{value!r} is not a share: write 1% to 100%, a size such as 200G, or none")
        return value.replace(" ", "")
    return _explained(parse_size, value)


Size = Annotated[int, BeforeValidator(_size), Field(ge=0)]
Seconds = Annotated[float, BeforeValidator(_seconds), Field(ge=0, allow_inf_nan=False)]
Watermark = Annotated[str | int | None, BeforeValidator(_watermark)]


def limit_of(mark: str | int | None, total: int) -> int | None:
    """Bytes in use at which a watermark is reached, on a disk of `total` bytes; None when it is switched off."""
    if isinstance(mark, str):
        return int(total * float(mark.rstrip("%")) / 100)
    return mark


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class StoreSettings(Part):
    """One home. `options` go to the broker (endpoint, region, credentials, ...)."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    url: str
    options: dict[str, Scalar] = Field(default_factory=dict, repr=False)  # may hold secrets: never in a repr
    on_close: OnClose | None = None  # None: as the mount
    deadline_s: Seconds | None = None  # None: as the mount
    least_throughput: Size | None = None  # bytes a second; None: as the mount

    @field_validator("url")
    @classmethod
    def _no_secret_in_url(cls, url: str) -> str:
        try:
            parts = urlsplit(url)
        except ValueError:
            raise ValueError("not a store URL: its host cannot be one") from None
        if not re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", url):
            raise ValueError("not a store URL: write for example s3://bucket/prefix or file:///dir")
        user_alone = parts.scheme in ("sftp", "ssh") and parts.password is None
        if has_password(url) or (parts.username is not None and not user_alone):
            raise ValueError("a store URL must not hold credentials: use the environment or [stores.NAME.options]")
        try:
            _ = parts.port
        except ValueError:
            raise ValueError("its port is not a number: write scheme://host:port/path") from None
        if parts.fragment:
            raise ValueError("'#' is not allowed in a store URL: write %23 for it in a path")
        for name, _ in parse_qsl(parts.query, keep_blank_values=True):
            if is_secret(name):
                raise ValueError(f"{name} must not be in a URL: use the environment or [stores.NAME.options]")
        return url

    def shown(self) -> dict[str, Any]:
        """This store as it may be printed: secrets replaced."""
        hidden = {name: HIDDEN if is_secret(name) else value for name, value in self.options.items()}
        return {**self.model_dump(mode="json", exclude={"options"}), "options": hidden}


class CacheSettings(Part):
    """Runfs's own local bytes and when to make room."""

    keep_small: Size = 64 * 1024  # files up to this size stay readable when their record is evicted
    directory: Path | None = None  # None: below cache_dir
    high: Watermark = "90%"  # share of the disk in use, or bytes runfs may use, at which it makes room; none: never
    low: Watermark = "80%"  # where it stops making room; left out: somewhat below high

    @model_validator(mode="before")
    @classmethod
    def _low_follows_high(cls, data: Any) -> Any:
        """Who sets only `high` should not have to know that there is a `low`."""
        if not isinstance(data, dict) or "low" in data or "high" not in data:
            return data
        try:
            high = _watermark(data["high"])
        except ValueError:
            return data  # the field's own check says what is wrong
        if isinstance(high, str):
            share = float(high.rstrip("%"))
            return {**data, "low": f"{max(share - 10, share / 2):g}%"}
        return {**data, "low": high * 9 // 10 if isinstance(high, int) else None}

    @model_validator(mode="after")
    def _low_below_high(self) -> "CacheSettings":
        if type(self.high) is type(self.low) and self.high is not None:
            total = 1_000_000
            if (limit_of(self.low, total) or 0) > (limit_of(self.high, total) or 0):
                raise ValueError(f"low ({self.low}) must not be above high ({self.high})")
        return self


class PushSettings(Part):
    """When dirty bytes go to the homes."""

    auto: bool = True  # push by itself; otherwise only `runfs push` and `umount` do
    quiet_s: Seconds = 1.0  # a file is pushed when it has not been closed again for this long,
    every_s: Seconds = 30.0  # but at the latest after this long (logs, heartbeats)


class ProofSettings(Part):
    """What counts as a proof that a store holds a record's bytes."""

    max_age: Seconds = 7 * 86400.0  # seconds an older proof may be reused for before it is made again


class VersionsSettings(Part):
    """Which earlier versions of a record its stores keep, and what looking at them may cost here."""

    keep: int = Field(default=100, ge=0)  # of each record in each store; when there are a tenth more, the oldest go
    grace: Seconds = 3600.0  # what no version needs is removed this long after it was last written or replaced
    cache: Size = 1 << 30  # bytes of earlier versions that stay on this disk once they were read


class Settings(Part):
    """Everything one mount, or one command without a mount, needs to know."""

    index: Path
    project: Path | None = None  # the project directory; None: the index's own directory
    create_index: bool = False  # make an index where there is none (`runfs reindex`)
    stores: tuple[StoreSettings, ...] = ()
    min_copies: int = Field(default=1, ge=1)
    on_close: OnClose = "journal"
    deadline_s: Seconds = 30.0  # for one remote call, before its size is added
    least_throughput: Size = 64 * 1024  # bytes a second below which a transfer is given up
    notice_s: Seconds = 60.0  # a record in use is compared with its homes this often: another host's changes; 0: never
    cache: CacheSettings = CacheSettings()
    push: PushSettings = PushSettings()
    proof: ProofSettings = ProofSettings()
    versions: VersionsSettings = VersionsSettings()
    state_dir: Path
    cache_dir: Path
    runtime_dir: Path
    mountpoint: Path | None = None
    read_only: bool = False
    allow_other: bool = False
    xattr: bool = False
    passthrough: Literal["auto", "off"] = "auto"  # let the kernel read and write files that are here by itself
    fuse_options: tuple[str, ...] = ()  # options of mount(8) and FUSE that are handed on as they are
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @field_validator("log_level", mode="before")
    @classmethod
    def _lower(cls, value: object) -> object:
        return value.lower() if isinstance(value, str) else value

    @field_validator("stores")
    @classmethod
    def _names_differ(cls, stores: tuple[StoreSettings, ...]) -> tuple[StoreSettings, ...]:
        names = [store.name for store in stores]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two stores are called {twice[0]!r}: give each its own name")
        return stores

    @model_validator(mode="after")
    def _enough_stores(self) -> "Settings":
        if self.stores and self.min_copies > len(self.stores):
            raise ValueError(
                f"min_copies is {self.min_copies} but there are only {len(self.stores)} stores: "
                "add a store or lower min_copies"
            )
        return self

    @property
    def project_dir(self) -> Path:
        return self.project or self.index.parent

    @property
    def state(self) -> Path:
        """This index's directory for the journal."""
        return places.state_of(self.state_dir, self.index)

    @property
    def cache_place(self) -> Path:
        """This index's directory for cached bytes."""
        return places.cache_of(self.cache.directory or self.cache_dir, self.index)

    @property
    def log(self) -> Path:
        return places.log_of(self.state_dir, self.index)

    @property
    def socket(self) -> Path | None:
        """The control socket of this mount; None without a mountpoint."""
        return places.socket_of(self.runtime_dir, self.mountpoint) if self.mountpoint else None

    def shown(self) -> dict[str, Any]:
        """All settings as they may be printed: JSON-able, secrets replaced."""
        return {**self.model_dump(mode="json", exclude={"stores"}), "stores": [store.shown() for store in self.stores]}
