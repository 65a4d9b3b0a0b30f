"""The replies to the kernel that passthrough changes, byte by byte (include/uapi/linux/fuse.h)."""

import struct

import pytest

from daemon.passthrough import passed_through, with_flags

INIT_EXT, KILLPRIV_V2, WRITEBACK, PASSTHROUGH = 1 << 30, 1 << 28, 1 << 16, 1 << 5
SOME = 1 << 3 | 1 << 13


def asked(flags: int, flags2: int = 0) -> bytes:
    body = struct.pack("<IIIII", 7, 41, 131072, flags, flags2) + bytes(44)
    return struct.pack("<IIQQIIIHH", 40 + len(body), 26, 2, 0, 0, 0, 0, 0, 0) + body


def answered(flags: int, error: int = 0) -> bytes:
    body = struct.pack("<IIIIHHIIHHII", 7, 38, 131072, flags, 12, 9, 1 << 20, 1, 256, 0, 0, 0) + b"\x07" * 24
    return struct.pack("<IiQ", 16 + len(body), error, 2) + body


def fields(reply: bytes) -> tuple[int, int, int]:
    """flags, flags2, max_stack_depth."""
    body = struct.unpack_from("<IIIIHHIIHHII", reply, 16)
    return body[3], body[10], body[11]


@pytest.mark.parametrize(
    ("offered", "replied", "depth", "expected"),
    [
        ((INIT_EXT | KILLPRIV_V2, PASSTHROUGH), SOME, 1, (SOME | INIT_EXT | KILLPRIV_V2, PASSTHROUGH, 1)),
        ((INIT_EXT | KILLPRIV_V2, PASSTHROUGH), SOME, 2, (SOME | INIT_EXT | KILLPRIV_V2, PASSTHROUGH, 2)),
        ((INIT_EXT | KILLPRIV_V2, PASSTHROUGH), SOME, 0, (SOME | KILLPRIV_V2, 0, 0)),
        ((KILLPRIV_V2, PASSTHROUGH), SOME, 1, (SOME | KILLPRIV_V2, 0, 0)),  # no second half: not offered
        ((INIT_EXT, 0), SOME, 1, (SOME, 0, 0)),
        ((INIT_EXT, PASSTHROUGH), SOME | WRITEBACK, 1, (SOME | WRITEBACK, 0, 0)),
    ],
)
def test_init(offered: tuple[int, int], replied: int, depth: int, expected: tuple[int, int, int]) -> None:
    before = answered(replied)
    after = with_flags(before, asked(*offered), depth)
    assert fields(after) == expected
    assert (len(after), after[:16], after[-24:]) == (len(before), before[:16], before[-24:])


@pytest.mark.parametrize("reply", [answered(SOME)[:40], answered(SOME, error=-71), answered(SOME) + b"more"])
def test_another_form_of_reply_is_left_alone(reply: bytes) -> None:
    assert with_flags(reply, asked(INIT_EXT | KILLPRIV_V2, PASSTHROUGH), 1) == reply


@pytest.mark.parametrize("entry", [b"", bytes(range(128))])
def test_open_and_create(entry: bytes) -> None:
    head = struct.pack("<IiQ", 32 + len(entry), 0, 9) + entry
    reply = head + struct.pack("<QIi", 77, 1 << 1 | 1 << 5, 0)
    assert passed_through(reply, 5) == head + struct.pack("<QIi", 77, 1 << 5 | 1 << 7, 5)
    error = struct.pack("<IiQ", 16, -2, 9)
    assert passed_through(error, 5) == error
