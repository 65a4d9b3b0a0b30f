"""Flags, environment and file become settings; what is wrong is named with its key, its origin and the fix."""

import json
from pathlib import Path
from typing import Any

import pytest

from daemon import config
from daemon.configfile import known_keys
from daemon.directories import runtime_dir
from daemon.mountoptions import parse_options
from daemon.storeurls import name_of
from vfs import places
from vfs.errors import ConfigError, IndexMissing, RunfsError, UsageError
from vfs.settings import Settings, StoreSettings, is_secret, limit_of

SECRET = "hunter2hunter2"


class Place:
    """A directory with a configuration file, and an environment that has nothing else in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = path / "config.toml"
        self.environ = {f"RUNFS_{name}_DIR": str(path / name.lower()) for name in ("STATE", "CACHE", "RUNTIME")}
        (path / "work").mkdir()

    def load(self, toml: str | None = None, flags: dict[str, Any] | None = None, **more: Any) -> config.Loaded:
        if toml is not None:
            self.file.write_text(toml)
            self.file.chmod(0o600)
            more.setdefault("config", self.file)
        return config.load(flags, environ=self.environ, cwd=self.path / "work", **more)

    def settings(self, toml: str | None = None, flags: dict[str, Any] | None = None) -> Settings:
        return self.load(toml, flags).settings()


@pytest.fixture
def place(tmp_path: Path) -> Place:
    place = Place(tmp_path)
    place.environ["RUNFS_CONFIG"] = ""
    place.environ["MACHINABLE_INDEX"] = str(tmp_path / "i.sqlite")
    return place


def test_defaults(place: Place) -> None:
    settings = place.settings("")
    assert settings.min_copies == 1
    assert settings.on_close == "journal"
    assert settings.deadline_s == 30
    assert settings.least_throughput == 65536
    assert settings.cache.keep_small == 65536
    assert (settings.push.auto, settings.push.quiet_s, settings.push.every_s) == (True, 1.0, 30.0)
    assert settings.proof.max_age == 7 * 86400
    assert settings.state_dir == place.path / "state"
    assert settings.state == place.path / "state" / places.short_id(place.path / "i.sqlite")


def test_flags_win_over_environment_over_file(place: Place) -> None:
    toml = 'deadline_s = "1m"\nmin_copies = 1\non_close = "push"\n'
    assert place.settings(toml).deadline_s == 60
    place.environ["RUNFS_DEADLINE_S"] = "7"
    assert place.settings(toml).deadline_s == 7
    assert place.settings(toml, {"deadline_s": "2m"}).deadline_s == 120
    assert place.settings(toml).on_close == "push"


def test_nested_keys_in_the_environment(place: Place) -> None:
    place.environ |= {"RUNFS_CACHE__HIGH": "200G", "RUNFS_CACHE__LOW": "none", "RUNFS_PUSH__AUTO": "false"}
    settings = place.settings("")
    assert (settings.cache.high, settings.cache.low, settings.push.auto) == (200_000_000_000, None, False)


@pytest.mark.parametrize(
    ("toml", "says"),
    [
        ("min_copis = 2", ["min_copis", "did you mean 'min_copies'?"]),
        ("[cache]\nhihg = 1", ["'cache.hihg'", "did you mean 'cache.high'?"]),
        ("[cahce]\nhigh = 1", ["'cahce.high'", "did you mean 'cache.high'?"]),
        ("xyzzy = 1", ["'xyzzy'", "runfs config show"]),
        ("cache = 3", ["write [cache]"]),
        ("mountpoint = '/mnt'", ["mountpoint cannot be set here"]),
        ('[cache]\nhigh = "5Q"', ["cache.high", "'5Q'", "50G"]),
        ('[cache]\nhigh = "150%"', ["cache.high", "1% to 100%"]),
        ('[cache]\nlow = "95%"', ["cache", "low (95%) must not be above high (90%)"]),
        ('on_close = "never"', ["on_close", "'journal' or 'push'"]),
        ('deadline_s = "soon"', ["deadline_s", "'soon'", "30d, 12h"]),
        ("deadline_s = -1", ["deadline_s", "greater than or equal to 0"]),
        ("deadline_s = inf", ["deadline_s", "finite"]),
        ("min_copies = 0", ["min_copies", "greater than or equal to 1"]),
        ('min_copies = 2\n[stores.a]\nurl = "memory://a"', ["min_copies is 2", "add a store"]),
        ("[stores.a]", ["stores.a has no url"]),
        ("stores = 3", ["[stores.lab]"]),
        ('[stores.a]\nurl = "memory://a"\nregion = "x"', ["stores.a", "'region'", "[stores.a.options]"]),
        ('[stores.a]\nurl = "memory://a"\non_clsoe = "push"', ["'on_clsoe'", "did you mean 'on_close'?"]),
        ('[stores.a]\nurl = "memory://a"\non_close = "x"', ["stores.a.on_close", "'journal' or 'push'"]),
        ('[stores."a b"]\nurl = "memory://a"', ["stores.a b.name"]),
        ('[stores.a]\nurl = "/data"', ["stores.a.url", "s3://bucket/prefix or file:///dir"]),
        (
            '[[stores]]\nname = "a"\nurl = "memory://a"\n[[stores]]\nname = "a"\nurl = "memory://b"',
            ["two stores", "'a'"],
        ),
        ("a = \n", ["config.toml", "not valid TOML", "line 1"]),
    ],
)
def test_what_is_wrong_is_named_with_its_fix(place: Place, toml: str, says: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        place.settings(toml)
    for text in says:
        assert text in str(caught.value)
    assert caught.value.exit_code == 2


def test_the_origin_is_named(place: Place) -> None:
    place.environ["RUNFS_CACHE__HIGH"] = "xx"
    with pytest.raises(ConfigError, match="from RUNFS_CACHE__HIGH"):
        place.settings("")
    with pytest.raises(ConfigError, match=r"from --cache\.high"):
        place.settings("", {"cache.high": "yy"})


@pytest.mark.parametrize(
    "url",
    [
        f"s3://me:{SECRET}@bucket/prefix",
        f"s3://{SECRET}@bucket/prefix",
        f"s3://bucket?secret_access_key={SECRET}",
        f"azblob://container?account_key={SECRET}",
        f"s3://bucket?session_token={SECRET}",
        f"webdav+http://host/?password={SECRET}",
        SECRET,
    ],
)
def test_a_secret_in_a_url_is_refused_and_never_repeated(place: Place, url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        place.settings(f'[stores.a]\nurl = "{url}"')
    assert SECRET not in str(caught.value)
    if "://" in url:
        with pytest.raises(ConfigError) as caught:
            place.settings("", {"stores": [url]})
        assert SECRET not in str(caught.value)


def test_sftp_may_name_its_user(place: Place) -> None:
    assert place.settings("", {"stores": ["sftp://ada@host/dir"]}).stores[0].url == "sftp://ada@host/dir"


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        ("secret_access_key", True),
        ("token", True),
        ("password", True),
        ("account_key", True),
        ("access_key_id", True),
        ("sas_token", True),
        ("api-key", False),
        ("apikey", True),
        ("private_key", True),
        ("key", True),
        ("endpoint", False),
        ("region", False),
        ("bucket", False),
        ("root", False),
        ("keep_small", False),
    ],
)
def test_which_options_are_secret(name: str, secret: bool) -> None:
    if name == "api-key":  # a dash is no part of an option's name, but must not open a hole either
        assert is_secret("api_key")
    else:
        assert is_secret(name) is secret


def test_secrets_are_never_shown(place: Place) -> None:
    toml = f'[stores.lab]\nurl = "s3://lab"\n[stores.lab.options]\nsecret_access_key = "{SECRET}"\nregion = "eu"'
    loaded = place.load(toml)
    shown = config.shown(loaded)
    assert SECRET not in json.dumps(shown)
    assert SECRET not in "\n".join(config.as_toml(shown))
    assert SECRET not in repr(loaded.settings())
    assert shown["settings"]["stores"]["value"][0]["options"] == {"secret_access_key": "(hidden)", "region": "eu"}
    assert loaded.settings().stores[0].options["secret_access_key"] == SECRET


def test_a_file_with_secrets_that_others_can_read_is_warned_of(place: Place) -> None:
    toml = f'[stores.lab]\nurl = "s3://lab"\n[stores.lab.options]\nsecret_access_key = "{SECRET}"'
    assert place.load(toml).warnings == ()
    place.file.chmod(0o644)
    (warning,) = place.load(config=place.file).warnings
    assert "chmod 600" in warning
    assert SECRET not in warning


def test_an_unknown_variable_is_a_warning_with_the_nearest(place: Place) -> None:
    place.environ |= {"RUNFS_CACHE_HIGH": "1G", "RUNFS_MOUNT": "/mnt"}
    assert place.load("").warnings == (
        "RUNFS_CACHE_HIGH is set in the environment but means nothing to runfs; did you mean RUNFS_CACHE__HIGH?",
    )


def test_what_is_shown_can_be_loaded_again(place: Place) -> None:
    toml = 'min_copies = 1\n[cache]\nhigh = "70%"\nlow = "50%"\n'
    toml += '[stores.lab]\nurl = "memory://x"\n[stores.lab.options]\nn = 3'
    loaded = place.load(toml)
    again = place.load("\n".join(config.as_toml(config.shown(loaded))))
    assert again.settings() == loaded.settings()
    assert 'high = "70%"  # ' + str(place.file) in config.as_toml(config.shown(loaded))


class TestFile:
    def test_a_named_file_must_exist(self, place: Place) -> None:
        with pytest.raises(ConfigError, match="no such configuration file"):
            place.load(config=place.path / "absent.toml")
        place.environ["RUNFS_CONFIG"] = str(place.path / "absent.toml")
        with pytest.raises(ConfigError, match="no such configuration file"):
            place.load()

    def test_relative_paths_are_taken_from_the_file(self, place: Place) -> None:
        del place.environ["MACHINABLE_INDEX"]
        settings = place.settings('project = "study"\n[cache]\ndirectory = "big"')
        assert settings.index == place.path / "study" / ".machinable.sqlite"
        assert settings.cache.directory == place.path / "big"

    def test_bytes_that_are_no_text(self, place: Place) -> None:
        place.file.write_bytes(b"\xff\xfe")
        with pytest.raises(ConfigError, match="not UTF-8"):
            place.load(config=place.file)


class TestIndex:
    """The order in which an index is looked for."""

    def test_order(self, place: Place, tmp_path: Path) -> None:
        project = tmp_path / "project"
        project.mkdir()
        (project / ".machinable.sqlite").touch()
        assert place.settings("", {"index": "x.sqlite"}).index == tmp_path / "work" / "x.sqlite"
        assert place.settings("", {"project": str(project)}).index == project / ".machinable.sqlite"
        assert place.settings("").index == tmp_path / "i.sqlite"  # MACHINABLE_INDEX
        place.environ["RUNFS_INDEX"] = str(tmp_path / "r.sqlite")
        assert place.settings("").index == tmp_path / "r.sqlite"

    def test_a_project_without_its_own_index_uses_the_environments(self, place: Place, tmp_path: Path) -> None:
        assert place.settings("", {"project": str(tmp_path)}).index == tmp_path / "i.sqlite"
        del place.environ["MACHINABLE_INDEX"]
        assert place.settings("", {"project": str(tmp_path)}).index == tmp_path / ".machinable.sqlite"

    def test_machinables_url_form(self, place: Place) -> None:
        place.environ["MACHINABLE_INDEX"] = "sqlite:////data/i.sqlite"
        assert place.settings("").index == Path("/data/i.sqlite")

    def test_upward_from_the_current_directory(self, place: Place, tmp_path: Path) -> None:
        del place.environ["MACHINABLE_INDEX"]
        with pytest.raises(IndexMissing, match="--project DIR or --index FILE"):
            place.settings("")
        (tmp_path / ".machinable.sqlite").touch()
        assert place.settings("").index == tmp_path / ".machinable.sqlite"

    def test_reindex_may_make_one_here(self, place: Place, tmp_path: Path) -> None:
        del place.environ["MACHINABLE_INDEX"]
        settings = place.settings("", {"create_index": True})
        assert (settings.index, settings.create_index) == (tmp_path / "work" / ".machinable.sqlite", True)

    def test_a_link_to_an_index_has_the_same_state(self, tmp_path: Path) -> None:
        (tmp_path / "a").touch()
        (tmp_path / "b").symlink_to("a")
        assert places.index_id(tmp_path / "a") == places.index_id(tmp_path / "b")


class TestStores:
    def test_urls_names_and_order(self, place: Place) -> None:
        toml = '[stores.lab]\nurl = "s3://lab"\non_close = "push"\n[stores.far]\nurl = "memory://far"'
        assert [s.name for s in place.settings(toml).stores] == ["lab", "far"]
        stores = place.settings(toml, {"stores": ["s3://b/c", "mine=file:///x", "lab", "file:///y/b"]}).stores
        assert [(s.name, s.url) for s in stores] == [
            ("b", "s3://b/c"),
            ("mine", "file:///x"),
            ("lab", "s3://lab"),
            ("b-2", "file:///y/b"),
        ]
        assert stores[2].on_close == "push"

    def test_an_unknown_name_says_the_nearest(self, place: Place) -> None:
        with pytest.raises(ConfigError, match="did you mean 'lab'"):
            place.settings('[stores.lab]\nurl = "s3://lab"', {"stores": ["lap"]})
        with pytest.raises(ConfigError, match="s3://bucket/prefix"):
            place.settings("", {"stores": ["/data"]})

    def test_the_environment_names_several(self, place: Place) -> None:
        place.environ["RUNFS_STORE"] = "memory://a  memory://b"
        assert [s.name for s in place.settings("").stores] == ["a", "b"]
        assert [s.name for s in place.settings("", {"stores": ["memory://c"]}).stores] == ["c"]

    @pytest.mark.parametrize(
        ("url", "name"),
        [
            ("s3://lab/study?endpoint=http://127.0.0.1:8333", "lab"),
            ("file:///mnt/big disk", "big-disk"),
            ("file:///", "store"),
            ("webdav+http://host.example:80/x", "host.example"),
            ("memory://", "memory"),
        ],
    )
    def test_names(self, url: str, name: str) -> None:
        assert name_of(url) == name
        assert StoreSettings(name=name, url=url).name == name

    def test_the_last_mounts_stores_serve_commands_without_a_mount(self, place: Place) -> None:
        settings = place.settings("", {"stores": ["memory://a"]})
        config.remember(settings, None)
        assert [s.url for s in place.load("", remembered=True).settings().stores] == ["memory://a"]
        assert place.load("").settings().stores == ()
        config.remember(place.settings(""), None)  # a mount without any does not make it forget
        assert [s.url for s in place.load("", remembered=True).settings().stores] == ["memory://a"]
        toml = '[stores.lab]\nurl = "s3://lab"'
        assert [s.name for s in place.load(toml, remembered=True).settings().stores] == ["lab"]

    def test_a_store_with_a_secret_is_not_remembered(self, place: Place) -> None:
        toml = f'[stores.lab]\nurl = "s3://lab"\n[stores.lab.options]\nsecret_access_key = "{SECRET}"'
        config.remember(place.settings(toml), place.file)
        kept = places.stores_of(place.path / "state", place.path / "i.sqlite").read_text()
        assert SECRET not in kept
        assert [s.name for s in place.load(remembered=True).settings().stores] == ["lab"]  # from the file it names

    def test_what_was_remembered_may_be_broken(self, place: Place) -> None:
        config.remember(place.settings("", {"stores": ["memory://a"]}), None)
        places.stores_of(place.path / "state", place.path / "i.sqlite").write_text("{")
        assert place.load("", remembered=True).settings().stores == ()


class TestOptions:
    """`-o`, as fstab and mount(8) give it."""

    def test_everything_at_once(self) -> None:
        parsed = parse_options(
            [
                "rw,noauto,user,nofail,_netdev,x-systemd.automount,allow_other,ro",
                "store=s3://a?x=1\\,2,cache.high=80%",
                "index=/i,config=/c,foreground,nosuid,max_read=131072",
            ]
        )
        assert parsed.settings == {"allow_other": True, "read_only": True, "cache.high": "80%", "index": "/i"}
        assert (parsed.stores, parsed.config, parsed.foreground) == (["s3://a?x=1,2"], "/c", True)
        assert parsed.fuse == ["nosuid", "max_read=131072"]

    @pytest.mark.parametrize(
        ("option", "says"),
        [
            ("alow_other", "did you mean 'allow_other'"),
            ("stroe=x", "did you mean 'store'"),
            ("store", "-o store=VALUE"),
        ],
    )
    def test_typing_errors(self, option: str, says: str) -> None:
        with pytest.raises(UsageError, match=says):
            parse_options([option])


class TestDirectories:
    def test_the_runtime_directory(self) -> None:
        assert runtime_dir({"RUNFS_RUNTIME_DIR": "/x"}) == Path("/x")
        assert runtime_dir({"XDG_RUNTIME_DIR": "/run/user/7"}) == Path("/run/user/7/runfs")


def test_config_check(place: Place) -> None:
    result = config.checked(place.load('[stores.a]\nurl = "memory://a"'))
    assert result["exit"] == 0
    assert {check["name"] for check in result["checks"]} >= {"file", "settings", "index", "store a"}
    broken = config.checked(place.load('[stores.a]\nurl = "nosuchscheme://a"'))
    assert broken["exit"] == 2
    assert [check["ok"] for check in broken["checks"] if check["name"] == "store a"] == [False]


@pytest.mark.parametrize(
    ("high", "low"), [('"50%"', "40%"), ('"5%"', "2.5%"), ('"100G"', 90_000_000_000), ('"none"', None), ("7", 6)]
)
def test_low_follows_high(place: Place, high: str, low: str | int | None) -> None:
    assert place.settings(f"[cache]\nhigh = {high}").cache.low == low
    assert place.settings("").cache.low == "80%"


def test_settings_are_frozen(place: Place) -> None:
    settings = place.settings("")
    with pytest.raises(ValueError, match="frozen"):
        settings.min_copies = 3


@pytest.mark.parametrize(("mark", "limit"), [("90%", 900), (200, 200), (None, None)])
def test_watermarks(mark: str | int | None, limit: int | None) -> None:
    assert limit_of(mark, 1000) == limit


def _refusal(place: Place, toml: str) -> str | None:
    try:
        place.settings(toml)
    except RunfsError as error:
        return str(error)
    return None


@pytest.mark.parametrize("key", [key for key in known_keys() if key not in ("stores", "index", "project")])
def test_every_key_says_what_is_wrong_with_it(place: Place, key: str) -> None:
    """Whatever a key is set to, the answer is settings or one sentence that names the key."""
    for value in ("[1, 2]", '"\\u0000"', "-7", "{}", "1979-05-27"):
        said = _refusal(place, f"{key} = {value}")
        assert said is None or (key.split(".")[-1] in said and "\n" not in said)


def test_loading_is_not_tied_to_this_process(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNFS_MIN_COPIES", "9")
    assert place.settings("").min_copies == 1
