"""What people read: the sentences of the design, quantities, and progress."""

import time
from typing import Any

import pytest

from daemon import render
from daemon.quantities import ago, clock, count, duration, plain, rate, size
from daemon.terminal import Reporter
from tests.fake_session import FakeSession


class TestRendering:
    """The sentences of the design."""

    def test_status(self) -> None:
        result = {
            "mountpoint": "/mnt/runs",
            "states": {
                "resident": {"records": 961, "bytes": 388_000_000_000},
                "evicted": {"records": 318, "bytes": 212_400_000_000, "cached_bytes": 300_000_000},
                "dirty": {"records": 1, "files": 5, "bytes": 1_200_000_000},
            },
            "moving": [
                {"what": "push", "uuid": "aV377i4WyOhs", "path": "model.bin", "store": "lab", "done": 41, "size": 100}
                | {"rate": 118e6, "left_s": 5.2}
            ],
            "waiting": [
                {"pid": 4630, "process": "python", "uuid": "zg2XYZOb0kBr", "path": "weights.npy"}
                | {"done": 12_000_000, "size": 2_100_000_000}
            ],
            "stores": [{"name": "lab", "reachable": False, "error": "no route to host"}],
            "warnings": ["the disk is 97 % full"],
        }
        assert render.lines("status", result, {}) == [
            "resident  961 records  388.0 GB     evicted  318  212.4 GB (300 MB of it back in the cache)"
            "     dirty  5 files  1.2 GB",
            "pushing   model.bin of aV377i4WyOhs -> lab   41 %   118 MB/s   0:06 left",
            "waiting   python[4630] reads weights.npy of zg2XYZOb0kBr   12 MB of 2.1 GB here",
            "store     lab: not reachable: no route to host",
            "warning   the disk is 97 % full",
        ]

    def test_mounted(self) -> None:
        info = FakeSession().run_status({}, Reporter(shown=False))
        assert render.mounted(info) == "/mnt/runs: 1,284 records, 5 evicted; lab: reachable, 41 ms"
        assert "no store" in render.mounted({**info, "stores": []})

    def test_evict(self) -> None:
        stay = [("qcmIdGsGCpwS", "live"), ("Om2ibuekBk4f", "live"), ("a", "pinned"), ("b", "open in python[4121]")]
        result = {
            "evicted": [{"uuid": str(n), "bytes": 1, "files": 1} for n in range(318)],
            "stay": [{"uuid": uuid, "reason": reason} for uuid, reason in stay],
            "bytes": 212_400_000_000,
            "proof": [{"store": "lab", "how": "checksum", "verified_at": time.time() - 7300}],
            "dry_run": True,
        }
        assert render.lines("evict", result, {"dry_run": True}) == [
            "318 records, 212.4 GB would be freed; every byte is in lab (checksums read 2 h ago)",
            "4 records stay: 2 live (qcmIdGsGCpwS, Om2ibuekBk4f), 1 pinned (a), 1 open in python[4121] (b)",
        ]

    def test_what_an_eviction_would_do_first(self) -> None:
        result = {
            "evicted": [{"uuid": "a"}],
            "bytes": 10**9,
            "proof": [{"store": "lab", "how": "", "verified_at": None}],
        }
        assert render.lines("evict", {**result, "dry_run": True}, {}) == [
            "1 record, 1.0 GB would be freed; every byte is in lab"
        ]
        assert render.lines("evict", {**result, "proof": [], "to_push": 1, "dry_run": True}, {}) == [
            "1 record, 1.0 GB would be freed; 1 record to be pushed first"
        ]

    def test_a_refusal_has_the_next_step(self) -> None:
        reason = "lab holds 41 of 42 files; log.txt changed 3 s ago and is being pushed"
        stay = {"uuid": "q", "reason": reason, "advice": "Try again, or: runfs push q"}
        result = {"evicted": [], "stay": [stay], "bytes": 0}
        assert render.lines("evict", result, {"uuids": ["q"]}) == [
            f"q: not evicted: {reason}. Try again, or: runfs push q"
        ]

    def test_safe(self) -> None:
        assert render.lines("safe", {"safe": True, "records": 1284, "stores": ["lab"]}, {}) == [
            "safe: every byte of 1,284 records is in lab"
        ]
        unsafe = {"safe": False, "files": 1, "bytes": 5, "stores": [], "unsafe": []}
        assert render.lines("safe", unsafe, {})[0].startswith("not yet: 1 file (5 B) is only on this disk; no store is")

    @pytest.mark.parametrize(
        ("command", "result", "lines"),
        [
            ("push", {"pushed": [], "failed": []}, ["nothing to push: every byte is in its homes"]),
            (
                "push",
                {
                    "pushed": [{"uuid": "a", "bytes": 1500, "files": 2, "store": "lab"}],
                    "failed": [{"uuid": "b", "store": "lab", "reason": "no"}],
                },
                ["1 record pushed to lab: 2 files, 1.5 kB", "b: not pushed to lab: no"],
            ),
            ("pin", {"changed": ["a"]}, ["pinned: a"]),
            ("unpin", {"changed": []}, ["was not pinned"]),
            (
                "hydrate",
                {"hydrated": [{"uuid": "a", "bytes": 10, "restored": True}], "failed": [], "bytes": 10},
                ["1 record hydrated, 10 B; 1 back in its own directory"],
            ),
            (
                "verify",
                {
                    "checked": 42,
                    "bytes": 10**9,
                    "bad": [{"uuid": "a", "path": "w", "store": "lab", "reason": "wrong bytes"}],
                },
                ["42 files checked, 1.0 GB: 1 is wrong or missing", "a: w in lab: wrong bytes"],
            ),
            (
                "reindex",
                {"ingested": 3, "restored_rows": 1, "damaged": [{"path": "/d", "reason": "no id.json"}]},
                [
                    "3 records indexed, 1 record put back into the index; 1 directory is damaged:",
                    "/d: no id.json",
                ],
            ),
            ("import", {"imported": ["a"], "failed": []}, ["1 record imported"]),
            ("receipts", {"receipts": []}, ["no receipts"]),
            ("doctor", {"checks": [{"name": "n", "ok": False, "message": "m", "advice": "a"}]}, ["wrong   n: m. a"]),
            (
                "umount",
                {"mountpoint": "/m", "how": "drained", "pending": {"records": 1, "files": 0, "bytes": 5}},
                ["/m: unmounted; 1 record (5 B) not yet in the homes: kept here, and the next mount goes on with them"],
            ),
            ("umount", {"mountpoint": "/m", "how": "drained"}, ["/m: unmounted; nothing is left to push"]),
        ],
    )
    def test_sentences(self, command: str, result: dict[str, Any], lines: list[str]) -> None:
        assert render.lines(command, result, {}) == lines

    def test_paths(self) -> None:
        path = {"path": "/m/a/w.npy", "uuid": "a", "state": "evicted", "size": 2_100_000_000, "local_bytes": 12_000_000}
        path |= {"replicas": [{"store": "lab", "how": "read", "verified_at": time.time() - 60}], "pinned": True}
        path |= {"stays": ["pinned"], "error": "lab gave wrong bytes\n"}
        assert render.lines("status", {"paths": [path]}, {}) == [
            "/m/a/w.npy  evicted, 2.1 GB (12 MB here), pinned, in lab (read back 60 s ago)",
            "  stays   pinned",
            "  error   lab gave wrong bytes\\n",
        ]

    def test_stores(self) -> None:
        check = {
            "reachable": True,
            "readable": True,
            "writable": False,
            "latency_s": 0.041,
            "problems": ["read only key"],
        }
        info = {"broker": "remote", "ranges": True, "conditional_write": False, "server_copy": True, "checksum": "md5"}
        store = {"name": "lab", "url": "s3://lab", "check": check, "info": info, "warnings": []}
        assert render.lines("stores", {"stores": [store]}, {}) == [
            "lab  s3://lab  reachable, readable, not writable, 41 ms",
            "  remote: ranges, copies on the server, md5 checksums",
            "  several hosts must not write here at once",
            "  warning  read only key",
        ]

    @pytest.mark.parametrize("command", ["status", "ls", "evict", "hydrate", "push", "pin", "unpin", "safe", "verify"])
    def test_an_answer_of_another_version(self, command: str) -> None:
        """Nothing that is missing may stop the rest from being said."""
        assert all(isinstance(line, str) for line in render.lines(command, {"exit": 0}, {}))


class TestQuantities:
    @pytest.mark.parametrize(
        ("number", "text"),
        [
            (0, "0 B"),
            (999, "999 B"),
            (1000, "1.0 kB"),
            (1500, "1.5 kB"),
            (12000000.0, "12 MB"),
            (999499999, "999 MB"),
            (999999999, "1.0 GB"),
            (212400000000.0, "212.4 GB"),
            (999960000000.0, "1.0 TB"),
            (None, "?"),
            (5e21, "5000.0 EB"),
        ],
    )
    def test_sizes(self, number: float | None, text: str) -> None:
        assert size(number) == text

    def test_the_rest(self) -> None:
        assert rate(118e6) == "118 MB/s"
        assert rate(None) == ""
        assert (count(1, "record"), count(1284, "record"), count(0, "entry", "entries")) == (
            "1 record",
            "1,284 records",
            "0 entries",
        )
        assert (clock(5.2), clock(750), clock(3723), clock(None), clock(float("inf"))) == (
            "0:06",
            "12:30",
            "1:02:03",
            "",
            "",
        )
        assert [duration(s) for s in (11, 240, 7300, 3 * 86400)] == ["11 s", "4 min", "2 h", "3 d"]
        assert (ago(None), ago(100.0, now=100.2), ago(100.0, now=7300.0)) == ("", "just now", "2 h ago")
        assert ago("1970-01-01T00:00:00+00:00", now=60.0) == "60 s ago"
        assert ago(60 * 10**9 * 10**6, now=6e7 + 60) == "60 s ago"  # nanoseconds

    def test_plain(self) -> None:
        assert plain("a\x1b[31m\n\u202eb\udcff é 漢") == "a\\x1b[31m\\n\\u202eb\\xff é 漢"


def test_progress_is_shown_on_a_terminal_only(capsys: pytest.CaptureFixture[str]) -> None:
    for shown in (False, True):
        with Reporter(shown=shown) as reporter:
            reporter({"what": "push", "uuid": "a", "path": "w[red]", "store": "lab", "done": 1, "size": 2, "rate": 5e6})
            reporter({"what": "push", "uuid": "a", "path": "w[red]", "store": "lab", "done": 2, "size": 2})
            reporter({"what": "evict", "uuid": "a", "done": 3, "size": 318})
            reporter({"message": "settling"})
        captured = capsys.readouterr()
        assert captured.out == ""
        assert ("3 of 318" in captured.err and "settling" in captured.err) is shown
