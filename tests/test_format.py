"""Reading record directories: headers, statuses, times, and what must not be followed or waited for."""

import json
import os
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import arrow
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vfs import format as record_format
from vfs.errors import DamagedRecord
from vfs.format import Status, is_live, is_record_directory, is_safe_uuid, parse_time, read_header, run_status

HEADER: dict[str, Any] = {
    "format": 1,
    "uuid": "qcmIdGsGCpwS",
    "kind": "Execution",
    "identity_key": "i",
    "predicate_key": "p",
    "parent": "aV377i4WyOhs",
}
NOW = datetime(2026, 1, 1, 12, 0, tzinfo=UTC).timestamp()


@pytest.fixture(autouse=True)
def _window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MACHINABLE_HEARTBEAT_WINDOW", raising=False)


@pytest.fixture
def record(tmp_path: Path) -> Path:
    directory = tmp_path / "record"
    directory.mkdir()
    (directory / ".machinable").touch()
    (directory / "id.json").write_text(json.dumps(HEADER))
    return directory


def at(seconds: float) -> bytes:
    return datetime.fromtimestamp(NOW + seconds, UTC).isoformat().encode()


def test_header(record: Path) -> None:
    header = read_header(record)
    assert header == record_format.Header("qcmIdGsGCpwS", "Execution", "i", "p", "aV377i4WyOhs", 1)
    assert read_header(os.fsencode(record)) == header


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"uuid": None}, "has no uuid"),
        ({"uuid": 7}, "has no uuid"),
        ({"identity_key": None}, "has no identity_key"),
        ({"predicate_key": ["p"]}, "has no predicate_key"),
        ({"format": 2}, "has format 2; this runfs knows format 1"),
        ({"format": "1"}, "has format '1'"),
        ({"parent": 3}, "its parent 3 is not a uuid"),
        ({"kind": None}, "its kind None is not a word"),
        ({"uuid": "../x"}, "cannot be a file name"),
        ({"uuid": ".."}, "cannot be a file name"),
        ({"uuid": "a\0b"}, "cannot be a file name"),
        ({"uuid": ""}, "cannot be a file name"),
        ({"uuid": "x" * 65}, "cannot be a file name"),
    ],
)
def test_damaged_header(record: Path, change: dict[str, Any], reason: str) -> None:
    (record / "id.json").write_text(json.dumps({**HEADER, **change}))
    with pytest.raises(DamagedRecord) as caught:
        read_header(record)
    assert reason in str(caught.value)
    assert str(record / "id.json") in str(caught.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"[1]", "is not an object"),
        (b'{"uuid": "\xff"}', "is not UTF-8"),
        (b"[" * 100_000, "is nested too deeply"),
    ],
)
def test_header_that_is_none(record: Path, content: bytes, reason: str) -> None:
    (record / "id.json").write_bytes(content)
    with pytest.raises(DamagedRecord, match=reason):
        read_header(record)


def test_header_without_what_may_be_left_out(record: Path) -> None:
    short = {key: HEADER[key] for key in ("uuid", "identity_key", "predicate_key")}
    (record / "id.json").write_text(json.dumps(short))
    assert read_header(record) == record_format.Header("qcmIdGsGCpwS", "Interface", "i", "p", None)


def test_missing_header_and_directory(record: Path) -> None:
    (record / "id.json").unlink()
    with pytest.raises(DamagedRecord, match=r"has no id\.json"):
        read_header(record)
    with pytest.raises(DamagedRecord, match="there is no such directory"):
        read_header(record / "nowhere")
    (record / "file").touch()
    with pytest.raises(DamagedRecord, match="is not a directory"):
        read_header(record / "file")


def test_links_are_not_followed(record: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(record)
    with pytest.raises(DamagedRecord, match="is a link"):
        read_header(tmp_path / "link")
    assert not is_record_directory(tmp_path / "link")
    (record / "id.json").rename(tmp_path / "elsewhere.json")
    (record / "id.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(DamagedRecord, match=r"id\.json: is a link"):
        read_header(record)
    (record / ".machinable").unlink()
    (record / ".machinable").symlink_to(tmp_path / "elsewhere.json")
    assert not is_record_directory(record)


def test_a_fifo_does_not_block(record: Path) -> None:
    (record / "id.json").unlink()
    os.mkfifo(record / "id.json")
    os.mkfifo(record / "heartbeat_at")
    reasons: list[str] = []

    def read() -> None:
        for call in (read_header, run_status):
            try:
                call(record)
            except DamagedRecord as error:
                reasons.append(str(error))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(5)
    assert not reader.is_alive()
    assert [reason.rpartition("/")[2] for reason in reasons] == [
        "id.json: is not a plain file",
        "heartbeat_at: is not a plain file",
    ]


def test_a_huge_file_is_not_read(record: Path) -> None:
    with (record / "id.json").open("r+b") as file:
        file.truncate(16 * 2**20 + 1)
    with pytest.raises(DamagedRecord, match="is over 16 MiB"):
        read_header(record)


def test_record_directory(record: Path) -> None:
    assert is_record_directory(record)
    assert not is_record_directory(record.parent)
    assert not is_record_directory(record / "nowhere")


# -------------------------------------------------------------------------------------------------------- status


@pytest.mark.parametrize(
    ("markers", "expected"),
    [
        ({}, Status.NONE),
        ({"dispatched_at": at(-5)}, Status.PENDING),
        ({"started_at": at(-5)}, Status.DIED),
        ({"dispatched_at": at(-500), "started_at": at(-500), "heartbeat_at": at(-89.9)}, Status.LIVE),
        ({"dispatched_at": at(-500), "started_at": at(-500), "heartbeat_at": at(-90)}, Status.DIED),
        ({"heartbeat_at": at(-10)}, Status.LIVE),
        ({"heartbeat_at": at(+3600)}, Status.LIVE),
        ({"started_at": at(-500), "heartbeat_at": at(-1), "finished_at": at(0)}, Status.FINISHED),
        ({"started_at": at(-500), "heartbeat_at": at(-1), "finished_at": b"soon"}, Status.LIVE),
        ({"started_at": at(-500), "heartbeat_at": b"\xff\xfe"}, Status.DIED),
        ({"resumed_at": at(-9)}, Status.NONE),
    ],
)
def test_status(record: Path, markers: Mapping[str, bytes], expected: Status) -> None:
    for name, content in markers.items():
        (record / name).write_bytes(content)
    assert run_status(record, NOW) is expected
    assert run_status(markers, NOW) is expected
    assert is_live(record, NOW) == is_live(markers, NOW) == (expected is Status.LIVE)


def test_status_now_is_the_clock(record: Path) -> None:
    (record / "heartbeat_at").write_text(str(arrow.now()))
    assert is_live(record)


def test_window_is_machinables(record: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (record / "heartbeat_at").write_bytes(at(-1000))
    assert not is_live(record, NOW)
    monkeypatch.setenv("MACHINABLE_HEARTBEAT_WINDOW", "1001")
    assert is_live(record, NOW)
    assert not is_live(record, NOW, window=90)
    for malformed in ("no", "-5", "0"):
        monkeypatch.setenv("MACHINABLE_HEARTBEAT_WINDOW", malformed)
        assert record_format.heartbeat_window() == 90


def test_status_of_what_is_not_there_or_cannot_be_told(record: Path, tmp_path: Path) -> None:
    assert run_status(tmp_path / "nowhere") is Status.NONE
    (tmp_path / "link").symlink_to(record)
    with pytest.raises(DamagedRecord, match="is a link"):
        run_status(tmp_path / "link")
    (record / "heartbeat_at").mkdir()
    with pytest.raises(DamagedRecord, match="is not a plain file"):
        run_status(record)


# --------------------------------------------------------------------------------------------------------- times


def theirs(text: str) -> datetime | None:
    try:
        return arrow.get(text).datetime
    except (arrow.ParserError, ValueError):
        return None


@pytest.mark.parametrize(
    "text",
    [
        "2026", "2026-01", "2026-1-1", "20260101", "2026-001", "2026-366", "2024-366", "2026-02-30",
        "2026-01-01T12", "2026-01-01 12:00", "2026-01-01T12:00Z", "20260101T120000Z", "2026-01-01T24:00:00",
        "2026-01-01T24:00:01", "2026-01-01T12:00:00,5", "2026-01-01T12:00:00.1234565", "2026-01-01T12:00:00.1234575",
        "2026-01-01T12:00:00.999999999+00:00", "2026-01-01T12:00:00+0100", "2026-01-01T12:00:00-00:00", "",
        "2026-01-01T12:00:00+01", "2026-01-01T12:00:00z", "2026-01-01x12:00", "abc", "1700000000", "202601",
        "2026-01-01T12:00:00 UTC", "2026-01-01T25:00:00", "2026-01-01T12:60:00", "0000-01-01",
        "2026-01-01T12:00:00 +01:00", "2026-W01-1x",
    ],
)  # fmt: skip
def test_times_read_as_machinables_library_reads_them(text: str) -> None:
    assert parse_time(text) == theirs(text)


ZONES = st.sampled_from(["", "Z", "+00:00", "-07:30", "+0545", "+14"])


@given(
    moment=st.datetimes(datetime(1970, 1, 2), datetime(2200, 1, 1)),
    digits=st.text("0123456789", max_size=9),
    zone=ZONES,
)
@example(datetime(2026, 12, 31, 23, 59, 59), "9999999", "+14")
def test_any_written_time_is_read_alike(moment: datetime, digits: str, zone: str) -> None:
    text = moment.replace(microsecond=0).isoformat() + (f".{digits}" if digits else "") + zone
    assert parse_time(text) == theirs(text)
    assert parse_time(text) is not None


@given(st.datetimes(datetime(1970, 1, 2), datetime(2200, 1, 1), timezones=st.just(UTC)))
def test_updated_at_to_the_nanosecond_as_machinable(moment: datetime) -> None:
    text = str(arrow.get(moment))
    assert record_format.updated_at_ns(f"{text}\n".encode()) == int(arrow.get(text).float_timestamp * 1e9)


def test_no_time_is_none() -> None:
    assert record_format.updated_at_ns(b"yesterday") is None
    assert record_format.updated_at_ns(b"\xff") is None


def test_last_resumption_counts() -> None:
    content = b"2026-01-01T12:00:00+00:00\n2026-01-02T12:00:00+00:00\n"
    assert record_format.marker_time(content, "resumed_at") == datetime(2026, 1, 2, 12, tzinfo=UTC)


@pytest.mark.parametrize("uuid", ["", ".", "..", "a/b", "a\0", "a b", ".by", "é", "x" * 65, "abc\n", None, b"abc"])
def test_unsafe_uuids(uuid: object) -> None:
    assert not is_safe_uuid(uuid)


@pytest.mark.parametrize("uuid", ["qcmIdGsGCpwS", "x", "0e4a-41b2_c", "x" * 64])
def test_safe_uuids(uuid: str) -> None:
    assert is_safe_uuid(uuid)
