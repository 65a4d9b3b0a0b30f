"""What people type, servers list, archives hold: URLs, configuration, addresses, listings, tar files, index rows."""

import io
import json
import os
import sqlite3
import tarfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from daemon.config import load, shown
from daemon.mountoptions import parse_options
from daemon.mounts import parse_line
from daemon.storeurls import named_stores
from tests.core.making import UUID, Place
from tests.fuzz.hostile import scalars, texts, values
from vfs import archives, cache
from vfs.addresses import parse_address
from vfs.errors import ConfigError, DamagedRecord, IndexUnavailable, RunfsError, StoreError, UsageError
from vfs.index import Index
from vfs.stores import broker, brokers, ftp, http_store, keys, s3_parts, validate
from vfs.where import parse_age, parse_size, parse_where

fuzz = settings.get_profile("fuzz")
lines = st.one_of(texts, st.text(max_size=80))

# --- store URLs, addresses, options ----------------------------------------------------------------------------------

schemes = st.sampled_from(
    [*brokers(), "s3", "webdav+http", "https", "sftp", "fsspec+memory", "fsspec+file", "azblob", "url", "", "FILE"]
)
urls = st.one_of(
    lines,
    st.builds(
        lambda scheme, host, path, query: f"{scheme}://{host}/{path}?{query}",
        schemes,
        st.one_of(texts, st.sampled_from(["", "h:99999", "h:x", "[::1", "[::1]:1", "u@h", "u:p@h", "h:-1", "\u0130"])),
        lines,
        st.one_of(
            lines, st.sampled_from(["read_only=maybe", "endpoint=x", "port=x", "region=", "deadline_s=nan", "a&&=b"])
        ),
    ),
)
options = st.dictionaries(
    st.one_of(
        texts, st.sampled_from(["read_only", "deadline_s", "region", "user", "password", "port", "pattern", "used"])
    ),
    scalars,
    max_size=3,
)


for _name in brokers():
    with suppress(ConfigError):
        broker(_name)  # imported now: that takes a second, and is no input's fault


@fuzz
@given(urls, options)
def test_store_url(url: str, given_options: dict[str, Any]) -> None:
    with suppress(UsageError):
        validate(url, "lab", given_options)


@fuzz
@given(st.lists(urls, max_size=3))
@example(["A://["])
def test_named_stores(given_urls: list[str]) -> None:
    with suppress(ConfigError):
        for store in named_stores(given_urls, []):
            assert "/" not in store["name"]


@fuzz
@given(
    st.one_of(urls, st.builds(lambda kind, rest: f"{kind}+{rest}", st.sampled_from(["url", "file", "link", "x"]), urls))
)
def test_import_address(text: str) -> None:
    with suppress(UsageError):
        found = parse_address(text)
        if found is not None:
            assert found.key
            assert found.shown
            assert found.is_archive in (True, False)


@fuzz
@given(st.lists(lines, max_size=3))
def test_mount_options(given_options: list[str]) -> None:
    with suppress(UsageError):
        parse_options(given_options)


@fuzz
@given(lines)
def test_expressions(text: str) -> None:
    for parse in (parse_where, parse_size, parse_age):
        with suppress(UsageError):
            parse(text)
    parse_line(text)


# --- configuration ---------------------------------------------------------------------------------------------------


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(key))} = {_toml(below)}" for key, below in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, float):
        return repr(value)
    return '""' if value is None else json.dumps(value, ensure_ascii=False)


settings_names = st.sampled_from(
    ["index", "stores", "min_copies", "on_close", "deadline_s", "cache", "cache.high", "cache.low", "push", "state_dir",
     "least_throughput", "log_level", "proof.max_age", "versions.keep", "mountpoint", "runtime_dir",
     "passthrough", "nonsense"]
)  # fmt: skip


@fuzz
@given(
    st.one_of(
        lines,
        st.dictionaries(settings_names, values, max_size=3).map(
            lambda rows: "\n".join(f"{key} = {_toml(value)}" for key, value in rows.items())
        ),
        st.builds(lambda name, rows: f"[stores.{name}]\nurl = {_toml(name)}\noptions = {_toml(rows)}", texts, options),
    ),
    st.dictionaries(
        st.sampled_from(["RUNFS_CACHE__HIGH", "RUNFS_STORE", "RUNFS_DEADLINE_S", "RUNFS_INDEX"]), texts, max_size=2
    ),
)
def test_configuration(place: Path, text: str, environ: dict[str, str]) -> None:
    file = place / "config.toml"
    file.write_text(text, errors="surrogatepass")
    places = {f"RUNFS_{name}_DIR": str(place) for name in ("STATE", "CACHE", "RUNTIME")}
    try:
        loaded = load({}, config=file, environ={**places, **environ}, cwd=place)
        loaded.settings()
        shown(loaded)
    except (ConfigError, IndexUnavailable):
        pass


# --- listings --------------------------------------------------------------------------------------------------------

facts = st.one_of(
    lines,
    st.builds(
        lambda kind, size, when, name: f"type={kind};size={size};modify={when};unique=1; {name}",
        st.sampled_from(["file", "dir", "cdir", "OS.unix=slink:/x", ""]),
        st.one_of(st.integers().map(str), texts, st.sampled_from(["9" * 5000, "\u0663", "-1", "1e9", ""])),
        st.one_of(texts, st.sampled_from(["20260101000000", "99999999999999", "00000000000000", "20260101000000.123"])),
        lines,
    ),
)


@fuzz
@given(facts)
def test_ftp_listing(line: str) -> None:
    name, found = ftp.parsed(line)
    reason = keys.why_not_readable("u/" + name)
    if reason is None:
        assert ".." not in name.split("/")
    with suppress(StoreError):
        assert ftp.described(name, found).size >= 0


@fuzz
@given(
    st.dictionaries(
        st.sampled_from(["name", "type", "is_dir", "size", "mtime", "mod_time"]),
        st.one_of(values, st.sampled_from(["../x", "a/b", "Thu, 99 Foo 2026", "9" * 30, "2026-01-01T00:00:00Z"])),
    )
)
def test_http_listing(entry: dict[str, Any]) -> None:
    problems: list[str] = []
    key, below = http_store.named("u/", entry, lambda what, _why: problems.append(what))
    if key is not None:
        assert ".." not in key.split("/")
        http_store.listed(key, entry, lambda what, _why: problems.append(what))
    assert below in (True, False)


@fuzz
@given(
    st.one_of(
        st.binary(max_size=200),
        st.builds(lambda tag, text: f"<{tag}>{text}</{tag}>".encode(errors="replace"), lines, lines),
    )
)
def test_answers_of_s3(body: bytes) -> None:
    root = s3_parts.parsed_xml(body)
    assert root.tag


def test_a_size_of_five_thousand_digits() -> None:
    """Python itself refuses to read such a number, with an error that is none of ours."""
    with pytest.raises(StoreError, match="does not tell its size"):
        ftp.described("k", {"size": "9" * 5000})


def test_entities_that_grow_are_not_expanded() -> None:
    """A billion laughs: expat stops it, and so it is no answer."""
    levels = "".join(f'<!ENTITY a{n} "{f"&a{n - 1};" * 10}">' for n in range(1, 10))
    body = f'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a0 "ha">{levels}]><x>&a9;</x>'.encode()
    assert s3_parts.parsed_xml(body).tag == "None"
    outside = b'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]><x>&e;</x>'
    assert b"root:" not in (s3_parts.parsed_xml(outside).text or "").encode()


@fuzz
@given(st.one_of(lines, st.binary(max_size=300).map(os.fsdecode)), st.binary(max_size=1200))
def test_keys(key: str, path: bytes) -> None:
    if not any("\ud800" <= letter <= "\udfff" for letter in key):
        keys.name_of(key)
    made = keys.encode(path)
    keys.check_writable(made)
    if not keys.is_hashed(made):
        assert keys.decode(made) == path
    if keys.why_not_readable(key) is None:
        assert ".." not in key.split("/")
        assert not key.startswith("/")


# --- archives --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def _tar(members: list[tuple[str, bytes, str, int, int]], spoil: list[tuple[int, int]], cut: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT, errors="surrogatepass") as tar:
        for name, kind, link, mode, size in members:
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.mode = kind, link, mode
            member.size = size if kind == tarfile.REGTYPE else 0
            tar.addfile(member, io.BytesIO(bytes(member.size)))
    data = bytearray(buffer.getvalue())
    for position, value in spoil:
        data[position % len(data)] = value
    return bytes(data[: len(data) - cut])


members = st.tuples(
    st.one_of(texts, st.sampled_from(["d", "d/f", "d/l/x", "./d/../x", "/tmp/escaped", "d//f"])),
    st.sampled_from(
        [tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, b"Z"]
    ),
    st.one_of(texts, st.sampled_from(["/etc/passwd", "..", "../../x", "d", "d/f"])),
    st.integers(0, 0o7777),
    st.integers(0, 3000),
)


@fuzz
@given(
    st.lists(members, max_size=4),
    st.lists(st.tuples(st.integers(0, 8000), st.integers(0, 255)), max_size=4),
    st.integers(0, 600),
)
def test_archive(
    place: Path, made: list[tuple[str, bytes, str, int, int]], spoil: list[tuple[int, int]], cut: int
) -> None:
    file, into = place / "a.tar", place / "inner" / f"into-{os.urandom(6).hex()}"
    into.parent.mkdir(exist_ok=True)
    try:
        file.write_bytes(_tar(made, spoil, cut))
    except (UnicodeError, ValueError):
        return  # tarfile itself cannot write that
    before = set(os.listdir(place)), set(os.listdir(into.parent))
    with suppress(DamagedRecord):
        archives.unpack(file, into, "a.tar")
    assert (set(os.listdir(place)), set(os.listdir(into.parent)) - {into.name}) == before
    for base, names, files in os.walk(into):
        for name in names + files:
            path = Path(base, name)
            assert path.is_symlink() or path.is_dir() or not path.stat().st_mode & 0o6000
            assert Path(os.path.realpath(path)).is_relative_to(os.path.realpath(into))


# --- rows of the index, and the mark of a placeholder ----------------------------------------------------------------


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Place:
    made = Place(tmp_path_factory.mktemp("rows") / "host")
    made.record()
    return made


columns = st.sampled_from(
    ["record_id", "kind", "module", "label", "created_by", "created_at_ns", "updated_at_ns", "hidden", "bytes_missing",
     "parent_id", "storage_uri", "local_uri", "storage_id", "config_resolved_json", "extra_json", "predicate_json"]
)  # fmt: skip
cells = st.one_of(
    st.none(), st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False), st.binary(max_size=20),
    texts.filter(lambda text: text.isprintable()),
    st.sampled_from(["file:///etc", "file://../x", "[" * 3000, "{}", "NaN", "../..", "a/b", "."]),
)  # fmt: skip


@fuzz
@given(st.dictionaries(columns, cells, min_size=1, max_size=4))
def test_index_rows(project: Place, changes: dict[str, Any]) -> None:
    copy = project.root / f"{os.urandom(6).hex()}.sqlite"
    with sqlite3.connect(project.index) as source, sqlite3.connect(copy) as target:
        source.backup(target)
        with suppress(sqlite3.IntegrityError):
            target.execute(f'UPDATE "index" SET {", ".join(f"{name} = ?" for name in changes)}', list(changes.values()))
    source.close()
    target.close()
    with suppress(RunfsError), Index.open(copy) as opened:
        for record in opened.page():
            assert "/" not in record.uuid
            opened.rows([record.uuid])
            opened.nested(record.uuid)
            opened.root_of(record.uuid)
            opened.status_here(record)
        list(opened.problems())
        for view in ("label", "module", "kind", "status", "created_by", "date"):
            opened.values(view)
        opened.config_paths()
    for left in copy.parent.glob(copy.name + "*"):
        left.unlink()


@fuzz
@given(st.lists(st.dictionaries(columns, values, max_size=6), max_size=3))
def test_kept_rows(project: Place, rows: list[dict[str, Any]]) -> None:
    """From a manifest's rows: a store's word."""
    with suppress(RunfsError), Index.open(project.index) as opened:
        opened.put_back([{"relations": [], **row} for row in rows])
        assert opened.get(UUID) is not None


@fuzz
@given(st.one_of(st.binary(max_size=80), st.binary(max_size=80).map(lambda raw: b"RFC1" + raw)))
def test_mark_of_a_placeholder(place: Path, raw: bytes) -> None:
    file = place / "marked"
    file.touch()
    os.setxattr(file, cache.ATTRIBUTE, raw)
    with suppress(RunfsError):
        header = cache.read_header(os.fsencode(file))
        assert header is None or len(header.digest) == 32
