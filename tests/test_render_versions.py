"""What people read of versions and transactions."""

from daemon import render
from daemon.cli import main

VERSIONS = {
    "records": [
        {
            "uuid": "u1",
            "failed": [{"store": "disk", "reason": "no route"}],
            "versions": [
                {
                    "number": 12,
                    "at": 1.0,
                    "files": 3,
                    "bytes": 2_000_000,
                    "changed_bytes": 13,
                    "notes": "cleaned\x1b[31m",
                    "store": "lab",
                    "present": True,
                    "interim": False,
                },
                {"number": 9, "store": "lab", "present": False, "error": "the manifest is not JSON"},
            ],
        }
    ]
}


def test_versions() -> None:
    out = render.lines("versions", VERSIONS, {})
    assert out[0].split() == ["version", "at", "files", "size", "changed", "store", "notes"]
    assert "(present) cleaned" in out[1]
    assert "\x1b" not in out[1]
    assert "damaged: the manifest is not JSON" in out[2]
    assert out[3] == "disk does not answer: no route"
    assert render.lines("versions", {"records": [{"uuid": "u1"}]}, {}) == [
        "u1: no store has a version of it; runfs push"
    ]


def test_restore() -> None:
    result = {"uuid": "u1", "number": 3, "paths": 2, "bytes": 1000, "version": 8, "removed": ["a"], "made": ["b"]}
    assert render.lines("versions restore", result, {}) == [
        "u1: 2 paths changed to what they were in version 3, 1.0 kB of contents; it is version 8 now"
    ]
    dry = render.lines("versions restore", {**result, "dry_run": True}, {})
    assert dry[0].startswith("u1: 2 paths would change")
    assert [line.split()[-1] for line in dry[1:]] == ["a", "b"]
    failed = {**result, "failed": [{"store": "lab", "reason": "no route"}]}
    assert render.lines("versions restore", failed, {})[-1] == "u1: not pushed yet to lab: no route"
    assert "nothing to do" in render.lines("versions restore", {"uuid": "u1", "number": 3, "paths": 0}, {})[0]


def test_prune() -> None:
    result = {
        "versions": 2,
        "objects": 1,
        "bytes": 5_000_000,
        "uploads": 1,
        "pruned": [{"uuid": "u1", "store": "lab", "damaged": [{"number": 4, "reason": "not JSON"}]}],
        "failed": [{"uuid": "u2", "store": "lab", "reason": "no route"}],
    }
    out = render.lines("versions prune", result, {})
    assert out[0] == "2 versions and 1 object removed, 5.0 MB"
    assert "version 4 in lab cannot be read" in out[1]
    assert out[2:] == ["1 unfinished upload removed", "u2: no route (in lab)"]
    assert render.lines("versions prune", {}, {}) == ["nothing to prune"]


def test_transactions() -> None:
    def said(**result: object) -> str:
        return "\n".join(render.lines("transaction", {"uuid": "u1", **result}, {}))

    assert "until: runfs transaction commit u1" in said(what="begin")
    assert said(what="commit", version=4) == "u1: committed as version 4"
    assert said(what="commit", version=None) == "u1: committed; nothing had changed"
    assert "committed, and published as soon as" in said(what="commit", failed=[{"store": "lab", "reason": "r"}])
    assert said(what="rollback", paths=3) == "u1: rolled back; 3 paths changed back"
    status = render.lines(
        "status",
        {"mountpoint": "/m", "transactions": [{"uuid": "u1", "state": "open", "notes": "n", "since": 1.0}]},
        {},
    )
    assert any(line.startswith("open      transaction of u1, since ") and line.endswith(": n") for line in status)


def test_wrong_usage_ends_with_2(capsys: object) -> None:
    for arguments in (
        ["versions", "prune"],
        ["versions", "prune", "u1", "--all"],
        ["versions", "prune", "u1", "--older-than", "soon"],
        ["versions", "restore", "u1", "x"],
        ["versions", "restore", "u1"],
        ["transaction", "begin"],
        ["transaction", "u1"],
    ):
        assert main(arguments) == 2, arguments
