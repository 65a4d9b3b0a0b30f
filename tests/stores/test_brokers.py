"""Configuration as data: what every built-in broker says to a good one, a typing mistake and a wrong value."""

import importlib.metadata
from pathlib import Path
from typing import Any

import pytest

from vfs.errors import ConfigError
from vfs.stores import Broker, Volume, broker, brokers, open_store, validate, volume

UUID = "8c9d9c0e-6a1c-4f8a-9d1f-1d1d1d1d1d1d"
GLOBUS = {"local_endpoint": UUID, "local_directory": "/tmp", "client_id": UUID, "client_secret": "x"}

# Of each broker: a URL with the options it needs, an option with a letter wrong, and what was meant.
GOOD: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "command": ("command://again", {"command": "python -m project {uuid}"}, "enabeld", "enabled"),
    "file": ("file:///srv/lab", {}, "read_onyl", "read_only"),
    "ftp": ("ftp://host/lab", {}, "passwrd", "password"),
    "globus": (f"globus://{UUID}/lab", GLOBUS, "local_endpont", "local_endpoint"),
    "fsspec": ("fsspec+memory://lab", {}, "", ""),  # passes what it does not know on to the implementation
    "http": ("https://host/lab", {}, "patern", "pattern"),
    "machinable": ("machinable:///tmp", {"module": "project.storage"}, "", ""),  # and this to the Storage
    "memory": ("memory://lab", {}, "readonly", "read_only"),
    "nfs": ("nfs:///mnt/lab", {"remote": "host:/export"}, "remot", "remote"),
    "remote": ("s3://lab/study", {}, "endpont", "endpoint"),
    "sftp": ("sftp://host/lab", {}, "known_host", "known_hosts"),
}
STRICT = sorted(name for name, (_, _, typed, _) in GOOD.items() if typed)
SCHEMES = {
    "s3": ("s3://lab", "regoin", "region"),
    "gcs": ("gcs://lab", "credental", "credential"),
    "azblob": ("azblob://box", "account_nam", "account_name"),
    "webdav": ("webdav+https://host/lab", "usernam", "username"),
    "http": ("https://host/lab", "passwrd", "password"),
    "ftps": ("ftps://host/lab", "passwrd", "password"),
}


def built_in() -> set[str]:
    return {name for name in brokers() if type(broker(name)).__module__.startswith("vfs.stores.")}


def test_every_built_in_broker_is_in_the_table() -> None:
    assert set(GOOD) == built_in()


def test_the_installed_package_names_the_same_ones() -> None:
    """Other tools find brokers by their entry points; the table in the code is for checkouts."""
    declared = {each.name for each in importlib.metadata.entry_points(group="runfs.brokers")}
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    section = text.split('[project.entry-points."runfs.brokers"]', 1)[1].split("\n[", 1)[0]
    named = {line.split("=")[0].strip().strip('"') for line in section.splitlines() if "=" in line}
    assert declared <= set(brokers())
    assert named >= built_in()


@pytest.mark.parametrize("name", sorted(GOOD))
class TestEachBroker:
    def test_is_one(self, name: str) -> None:
        assert isinstance(broker(name), Broker)

    def test_a_good_configuration(self, name: str) -> None:
        url, options, _, _ = GOOD[name]
        warnings = validate(url, "lab", options)
        assert all(isinstance(warning, str) and len(warning) > 20 for warning in warnings)
        assert validate({"url": url, "name": "lab", "broker": name, **options}) == warnings
        needed = volume(url, "lab", options)
        assert needed is None or isinstance(needed, Volume)

    @pytest.mark.parametrize("value", [0, -1, "soon", float("nan"), float("inf")])
    def test_limits(self, name: str, value: object) -> None:
        url, options, _, _ = GOOD[name]
        with pytest.raises(ConfigError, match=r"^deadline_s = .*greater than 0"):
            validate(url, "lab", {**options, "deadline_s": value})

    def test_yes_or_no(self, name: str) -> None:
        url, options, _, _ = GOOD[name]
        with pytest.raises(ConfigError, match=r"^read_only = 'perhaps': give true or false"):
            validate(url, "lab", {**options, "read_only": "perhaps"})

    def test_a_secret_in_the_url_is_refused_and_not_repeated(self, name: str) -> None:
        url, options, _, _ = GOOD[name]
        with pytest.raises(ConfigError) as refused:
            validate(f"{url}?password=verySecret", "lab", options)
        assert "verySecret" not in str(refused.value)
        assert "password" in str(refused.value)

    def test_what_validate_refuses_is_not_opened(self, name: str) -> None:
        url, options, _, _ = GOOD[name]
        with pytest.raises(ConfigError, match="read_only"):
            open_store(url, "lab", {**options, "read_only": "perhaps"})


@pytest.mark.parametrize("name", STRICT)
class TestTyping:
    def test_a_mistake_names_what_was_meant(self, name: str) -> None:
        url, options, typed, meant = GOOD[name]
        for call in (validate, open_store):
            with pytest.raises(ConfigError, match=rf"^{typed}: .*did you mean {meant}\?"):
                call(url, "lab", {**options, typed: "x"})

    def test_something_else_lists_what_there_is(self, name: str) -> None:
        url, options, _, meant = GOOD[name]
        with pytest.raises(ConfigError, match=rf"^zzz: .*known: .*{meant}"):
            validate(url, "lab", {**options, "zzz": "x"})


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
def test_a_typing_mistake_in_each_scheme(scheme: str) -> None:
    url, typed, meant = SCHEMES[scheme]
    validate(url)
    with pytest.raises(ConfigError, match=rf"^{typed}: .*did you mean {meant}\?"):
        validate(url, options={typed: "x"})


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({}, "a store needs a url"),
        ({"url": 3}, "a store needs a url"),
        ({"url": "/srv/lab"}, "a store needs a url"),
        ({"url": "memory://x", "broker": "nosuch"}, "nosuch"),
        ({"url": "nosuch://x"}, "no such type"),
    ],
)
def test_no_broker_at_all(config: dict[str, Any], says: str) -> None:
    for call in (validate, open_store):
        with pytest.raises(ConfigError, match=says):
            call(config)


def test_what_has_to_be_mounted_is_told() -> None:
    needed = volume("nfs:///mnt/lab", "lab", {"remote": "host:/export"})
    assert needed == Volume("nfs", "host:/export", Path("/mnt/lab"))
