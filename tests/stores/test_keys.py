"""Keys: reversible, different for different paths, and never something an engine would fold."""

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vfs.errors import UsageError
from vfs.stores import keys

SAFE = re.compile(r"[A-Za-z0-9._/%-]+")

# Few different bytes, so that paths that engines would fold into one are met often.
TRICKY = st.lists(
    st.sampled_from([b"a", b"A", b".", b"..", b"/", b"//", b"\\", b" ", b"%", b"2E", b"\xff", b"_", b"-", b"\0"])
)
PATHS = st.one_of(st.binary(max_size=60), TRICKY.map(b"".join))


@given(PATHS)
@example(b"")
@example(b"/")
@example(b"a//b/")
@example(b".runfs/u/manifest.json")
def test_short_paths_come_back(path: bytes) -> None:
    assert keys.decode(keys.encode(path)) == path


@given(st.binary(max_size=3000))
@example(b"x" * 256)
@example(b"\xff" * 400)
@example(b"d/" * 1000)
def test_every_key_can_be_stored(path: bytes) -> None:
    key = keys.encode(path)
    assert SAFE.fullmatch(key)
    assert len(key) <= keys.MAX_KEY
    assert all(part not in ("", ".", "..") and len(part) <= keys.MAX_PART for part in key.split("/"))
    assert not key.startswith(keys.RESERVED)
    assert keys.check_writable(key) == key
    assert keys.check_writable(f"uuid/{key}") == f"uuid/{key}"


@given(PATHS, PATHS)
@example(b"a", b"a ")
@example(b"a/b", b"a//b")
@example(b"a/b", b"a\\b")
@example(b"a", b"A")
@example(b"a/./b", b"a/b")
@example(b"", b"\0")
@example(b"%_", b"")
@example(b"%2E", b".")
@example(b"a\xff", "a\ufffd".encode())
@example(b".runfs", b"%2Erunfs")
def test_different_paths_have_different_keys(one: bytes, other: bytes) -> None:
    assert (keys.encode(one) == keys.encode(other)) == (one == other)


@given(st.binary(min_size=1, max_size=20), st.integers(46, 500), st.integers(46, 500))
def test_different_long_paths_have_different_keys(unit: bytes, one: int, other: int) -> None:
    assert (keys.encode(unit * one) == keys.encode(unit * other)) == (one == other)


@given(st.text(max_size=40))
def test_only_what_encode_makes_is_decoded(text: str) -> None:
    try:
        path = keys.decode(text)
    except ValueError:
        return
    assert keys.encode(path) == text


def test_plain_names_stay_readable() -> None:
    assert keys.encode(b"data/model-1_final.v2.npy") == "data/model-1_final.v2.npy"
    assert keys.encode("a b/ü".encode()) == "a%20b/%C3%BC"


def test_long_paths_are_hashed_below_their_first_part() -> None:
    key = keys.encode(b"qcmIdGsGCpwS/" + b"\xff" * 1000)
    assert re.fullmatch(r"qcmIdGsGCpwS/%-[0-9a-f]{64}", key)
    assert keys.is_hashed(key)
    assert not keys.is_hashed("a/b")
    with pytest.raises(ValueError, match="not a part of a key"):
        keys.decode(key)


def test_our_own_names_are_free() -> None:
    for path in (b".runfs", b".runfs/u/manifest.json", b".runfs.tmp/x", b".runfs-store"):
        assert keys.encode(path).startswith("%2Erunfs")
    assert keys.encode(b"u/.runfs/x") == "u/.runfs/x"
    assert keys.check_writable(".runfs/u/manifest.json")


def test_names_that_other_tools_wrote() -> None:
    assert keys.name_of("a%20b") == b"a b"
    assert keys.name_of("a b") == b"a b"
    assert keys.name_of("ü.txt") == "ü.txt".encode()
    assert keys.name_of("100%") == b"100%"
    assert keys.check_readable("a b/ü.txt") == "a b/ü.txt"


@pytest.mark.parametrize(
    "key", ["", " a", "a ", "a\n", "a//b", "/a", "a/", "..", "a/../b", "./a", "a\0b", "a\ufffd", "\udcff"]
)
def test_names_that_cannot_be_asked_for(key: str) -> None:
    assert keys.why_not_readable(key) is not None
    with pytest.raises(UsageError):
        keys.check_readable(key)
